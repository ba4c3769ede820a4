"""Offload of weights and moments to a disk: equal training, complete checkpoints, one message if it is impossible."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from distributed import run_distributed
from kernel import exact, tiny_pairs, train_here, with_reference
from tiny import make_model

from raydpo.errors import ModelError
from raydpo.training.policy.offload import PREFIX, disk_folder

FIELD = "train.offload_optimizer"


def has_libaio():
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return AsyncIOBuilder().is_compatible()


def refused(table, model, scratch, disk):
    with pytest.raises(ModelError) as caught:
        train_here(table, model, scratch, zero=3, offload_optimizer=str(disk))
    return str(caught.value)


def test_without_libaio_one_message_names_the_setting_and_the_fix(tiny_llama, tmp_path):
    if has_libaio():
        pytest.skip("libaio is installed here")
    table = with_reference(tiny_pairs(9), tiny_llama)
    (message,) = run_distributed(refused, 1, tmp_path, table, tiny_llama, tmp_path / "s", tmp_path / "disk")
    assert message.startswith(f"{FIELD} is '{tmp_path}/disk', but libaio is not installed here.")
    assert "install libaio-dev" in message and f"set {FIELD}=cpu" in message
    assert not list((tmp_path / "disk").glob(f"{PREFIX}*"))


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=rf"{FIELD} is '{tmp_path}/file/below', where this worker cannot write: Not a dir"):
        disk_folder(FIELD, str(tmp_path / "file" / "below"))


MAKE = """
import sys, time
from raydpo.training.policy import offload as disk
disk._require_asynchronous_files = lambda *_: None
print(disk.disk_folder("field", sys.argv[1]), flush=True)
time.sleep(60)
"""


def test_every_process_has_a_folder_of_its_own_and_those_of_the_dead_go(tmp_path):
    """Skip the check for libaio."""

    def begin():
        process = subprocess.Popen(
            [sys.executable, "-c", MAKE, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        return process, process.stdout.readline().strip()

    (first, one), (second, two) = begin(), begin()
    assert one != two and os.path.isdir(one) and os.path.isdir(two)
    first.send_signal(signal.SIGKILL)
    first.wait()
    third, three = begin()
    assert not os.path.exists(one) and os.path.isdir(two) and os.path.isdir(three)
    for process in (second, third):
        process.kill()
        process.wait()


class PythonFiles:
    """Replacement of DeepSpeed's compiled file access if libaio is missing: the calls that its swapping makes."""

    locked: ClassVar[list[torch.Tensor]] = []
    written = 0

    def __init__(self, *_, **settings):
        self.pending = 0

    def new_cpu_locked_tensor(self, numel, like):
        self.locked.append(torch.empty(int(numel), dtype=like.dtype))
        return self.locked[-1]

    def free_cpu_locked_tensor(self, tensor):
        self.locked[:] = [each for each in self.locked if each.data_ptr() != tensor.data_ptr()]

    def is_pinned(self, tensor):
        return any(0 <= tensor.data_ptr() - each.data_ptr() < each.nbytes for each in self.locked)

    def async_pwrite(self, tensor, path, offset):
        with open(path, "r+b" if os.path.exists(path) else "wb") as file:
            file.seek(offset)
            file.write(tensor.numpy().tobytes())
        self.pending += 1
        PythonFiles.written += tensor.nbytes
        return 0

    def async_pread(self, tensor, path, offset):
        with open(path, "rb") as file:
            file.seek(offset)
            tensor.copy_(torch.frombuffer(bytearray(file.read(tensor.nbytes)), dtype=tensor.dtype))
        self.pending += 1
        return 0

    def wait(self):
        done, self.pending = self.pending, 0
        return done


def trained(table, model, scratch, keep, jobs):
    """Metrics of each job (name, settings, checkpoint to continue from), and the bytes written to disk so far."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not has_libaio():
        AsyncIOBuilder.is_compatible = lambda self, verbose=False: True
        AsyncIOBuilder.load = lambda self, verbose=False: SimpleNamespace(aio_handle=PythonFiles)
    found = []
    for name, kind, checkpoint in jobs:
        run = train_here(
            table,
            model,
            scratch,
            steps=6,
            checkpoint_every=3,
            keep=keep / name,
            zero=3,
            checkpoint=None if checkpoint is None else keep / checkpoint / "step-3",
            **kind,
        )
        weights = {key: value.double().sum().item() for key, value in run.engine.gather().items()}
        found.append((exact(run.steps), weights, PythonFiles.written))
    return found


@pytest.mark.slow  # DeepSpeed compiles for minutes, once a machine
def test_a_disk_changes_nothing_and_its_checkpoints_fit_everywhere(tmp_path):
    # More than 1 MB a rank, below which DeepSpeed leaves a tensor in memory.
    model, disk = make_model(tmp_path / "model", hidden=160, layers=3), str(tmp_path / "disk")
    memory, moments = {"offload_optimizer": "cpu"}, {"offload_optimizer": disk}
    everything = moments | {"offload_params": disk}
    whole = [("memory", memory, None), ("moments", moments, None), ("all", everything, None)]
    rest = [("x", memory, "all"), ("y", moments, "memory"), ("z", everything, "moments")]
    found = run_distributed(
        trained,
        2,
        tmp_path / "run",
        with_reference(tiny_pairs(17), model),
        model,
        tmp_path / "s",
        tmp_path / "keep",
        whole + rest,
    )
    for (steps, weights, before), *others in found:
        assert len(steps) == 6 and steps[-1]["loss"] != steps[0]["loss"]
        assert [other for other, _, _ in others] == [steps, steps, steps[3:], steps[3:], steps[3:]]
        assert not weights or all(other == weights for _, other, _ in others)
        assert has_libaio() or (before == 0 and others[0][2] > 3e6)
