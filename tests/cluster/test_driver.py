"""NVIDIA's driver, and why torch finds no GPU. What the kernel module and torch say is given, so no GPU is needed."""

import io
import json
import subprocess
from types import SimpleNamespace

import pytest

from raydpo.cluster import doctor, driver, preflight
from raydpo.config import load_config
from raydpo.errors import ModelError
from raydpo.terminal.console import Console

CLOSED = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC version:  gcc 12.2.0\n"
)
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder@U22)\n"


@pytest.mark.parametrize(("told", "version"), [(CLOSED, "535.129.03"), (OPEN, "580.95.05"), ("nothing of the kind", None)])
def test_the_version_is_what_the_kernel_module_says(told, version, tmp_path):
    (tmp_path / "version").write_text(told)
    assert driver.driver_version(tmp_path / "version") == version


def test_without_the_kernels_file_nvidia_smi_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="570.86.10\n570.86.10\n"))
    assert driver.driver_version(tmp_path / "none") == "570.86.10"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="NVIDIA-SMI has failed\n"))
    assert driver.driver_version(tmp_path / "none") is None
    monkeypatch.setattr(driver, "_SMI", ("no-such-program",))
    monkeypatch.undo()
    assert driver.driver_version(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("found", "cuda", "why"),
    [
        (
            "570.172.08",
            "13.0",
            "the NVIDIA driver is 570.172.08, and torch 2.13.0, built for CUDA 13.0, needs driver 580.65.06",
        ),
        ("515.105.01", "12.6", "is 515.105.01, and torch 2.13.0, built for CUDA 12.6, needs driver 525.60.13 or newer"),
        ("535.129.03", "12.6", "driver 535.129.03 is new enough"),
        ("580.95.05", "13.0", "driver 580.95.05 is new enough"),
        (None, "13.0", "no NVIDIA driver answers here, and torch 2.13.0, built for CUDA 13.0, needs driver 580.65.06"),
        ("580.95.05", None, "torch 2.13.0 is built without CUDA; install a torch for CUDA"),
        ("700.1", "15.0", "driver 700.1 is new enough"),  # of a CUDA that this table does not know
    ],
)
def test_why_torch_finds_no_gpu(found, cuda, why):
    assert why in driver.why_no_gpu(found, "2.13.0", cuda)


def test_a_torch_for_rocm_is_called_untested():
    assert "for ROCm (HIP 6.4), with which raydpo is untested" in driver.why_no_gpu(None, "2.13.0", None, "6.4")


def test_the_preflight_and_the_doctor_name_the_driver(monkeypatch):
    """torch of a GPU machine whose driver is too old, as its process answers."""
    answer = json.dumps([0, "RuntimeError: the driver is too old\nmore", False, ["2.13.0+cu130", "13.0", None]])
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=f"noise\n{answer}\n"))
    monkeypatch.setattr(preflight, "driver_version", lambda: "550.54.15")
    (problem,) = preflight._gpu_problems("this node", 2, preflight._torch_devices(), None)
    assert problem.startswith("this node has 2 GPU(s) in Ray, and torch finds 0: the NVIDIA driver is 550.54.15, and torch")
    assert "or a torch for an older CUDA (RuntimeError: the driver is too old" in problem
    monkeypatch.undo()

    import torch

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for found, warned in (("550.54.15", True), (None, False)):
        monkeypatch.setattr(doctor, "driver_version", lambda found=found: found)
        doctor.report(Console(stream := io.StringIO()))
        told = " ".join(stream.getvalue().replace("│", " ").split())
        assert f"NVIDIA driver {found or 'none'}" in told
        assert ("warning: torch finds no GPU: the NVIDIA driver is 550.54.15" in told) is warned


def test_the_doctor_points_to_the_check_of_a_gpu(monkeypatch):
    """Where there is a GPU, and nowhere else."""
    import torch

    found = SimpleNamespace(total_memory=80 * 2**30)
    for there in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda there=there: there)
            patch.setattr(torch.cuda, "device_count", lambda: 1)
            patch.setattr(torch.cuda, "get_device_properties", lambda _: found)
            patch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
            rows, _ = doctor._devices("580.95.05")
        assert any("raydpo gpu check" in value for _, value in rows) is there


def test_an_offload_to_a_disk_needs_the_toolkit_on_gpu_machines(tiny_llama, tmp_path, monkeypatch):
    tree = {"output": str(tmp_path), "model": {"path": str(tiny_llama)}, "data": {"train": str(tiny_llama)}}
    config = load_config(tree, ["train.zero=3", "train.offload_optimizer=/nvme"])
    answer = [2, "", False, ["2.13.0+cu130", "13.0", None]]
    monkeypatch.setattr(preflight, "driver_version", lambda: "580.95.05")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=json.dumps(answer)))
    disk = preflight._on_disk(config)
    (problem,) = preflight._gpu_problems("node a", 2, preflight._torch_devices(), disk)
    assert problem.startswith("node a: train.offload_optimizer is '/nvme', a disk, but there is no CUDA toolkit")
    assert problem.endswith("set $CUDA_HOME, or set train.offload_optimizer=cpu")
    answer[2] = True
    assert not [*preflight._gpu_problems("node a", 2, preflight._torch_devices(), disk)]
    assert preflight._on_disk(load_config(tree, ["train.zero=3", "train.offload_optimizer=cpu"])) is None


def test_a_worker_without_the_toolkit_says_so_rather_than_where_deepspeed_stumbles(tmp_path, monkeypatch):
    """DeepSpeed's own words would be: TypeError: expected str, bytes or os.PathLike object, not NoneType."""
    import torch
    import torch.utils.cpp_extension
    from deepspeed.ops.op_builder.async_io import AsyncIOBuilder

    from raydpo.training.policy.offload import disk_folder

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(TypeError, match="NoneType"):
        AsyncIOBuilder().include_paths()
    with pytest.raises(ModelError, match=r"^train\.offload_params is '.*', a disk, but there is no CUDA toolkit"):
        disk_folder("train.offload_params", str(tmp_path))
