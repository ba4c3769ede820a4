"""NVIDIA's driver and toolkit on a machine, and whether torch's build can use them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

__all__ = ["TORCH_FACTS", "driver_version", "no_toolkit", "why_no_gpu"]

LEAST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
"""Oldest Linux driver by major version of CUDA (NVIDIA, CUDA Toolkit release notes, minor version compatibility)."""
TORCH_FACTS = "torch.__version__, torch.version.cuda, torch.version.hip"
"""Python expression with the last three arguments of ``why_no_gpu``, to evaluate where torch runs."""
_SMI = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def driver_version(proc: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Version of NVIDIA's driver, such as ``580.95.05``; None if there is none, or a container does not show it.

    Args:
        proc: what the kernel module says of itself. Without that file (WSL), nvidia-smi is asked.
    """
    try:
        told = proc.read_text(encoding="utf-8", errors="replace")
    except OSError:
        try:
            told = subprocess.run(_SMI, capture_output=True, text=True, timeout=20, check=False).stdout
        except (OSError, subprocess.TimeoutExpired):
            return None
    found = re.search(r"\b\d{3,4}\.\d+(\.\d+)?\b", told)
    return found[0] if found else None


def why_no_gpu(driver: str | None, torch: str, cuda: str | None, hip: str | None = None) -> str:
    """Say why torch finds no GPU or too few, and what to do about it.

    Args:
        driver: result of ``driver_version``.
        torch: version of torch.
        cuda: version of CUDA that torch was built with, such as ``13.0``; None = without CUDA.
        hip: version of ROCm's HIP that torch was built with; None = without ROCm.
    """
    if cuda is None:
        built = f"for ROCm (HIP {hip}), with which raydpo is untested" if hip else "without CUDA"
        return f"torch {torch} is built {built}; install a torch for CUDA"
    least = LEAST_DRIVER.get(int(cuda.split(".")[0]))
    needs = f"torch {torch}, built for CUDA {cuda}," + (f" needs driver {least} or newer" if least else " needs a driver")
    if driver is None:
        return (
            f"no NVIDIA driver answers here, and {needs}; install one, or start the container with access to GPUs "
            "(docker run --gpus all, or the cluster's device plugin)"
        )
    if least and _numbers(driver) < _numbers(least):
        return f"the NVIDIA driver is {driver}, and {needs}; install a newer driver, or a torch for an older CUDA"
    return (
        f"the NVIDIA driver {driver} is new enough for torch {torch} (CUDA {cuda}); look whether nvidia-smi lists the GPUs, "
        "whether CUDA_VISIBLE_DEVICES hides them, and whether the driver's libraries are where the container looks "
        "(LD_LIBRARY_PATH)"
    )


def no_toolkit(field: str, where: str) -> str:
    """Say that ``field``, an offload to the disk ``where``, cannot work on a GPU machine without CUDA's toolkit.

    DeepSpeed 0.19.8 compiles its access to disks where it runs, on such a machine against the toolkit's headers
    (ops/op_builder/async_io.py, ``include_paths``), which torch's wheels and raydpo's image do not have.
    """
    return (
        f"{field} is {where!r}, a disk, but there is no CUDA toolkit, against which DeepSpeed compiles its access to disks; "
        f"install the toolkit of torch's CUDA on every machine and set $CUDA_HOME, or set {field}=cpu"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
