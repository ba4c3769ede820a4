"""Weights and moments on a disk: the same training, whole checkpoints, and one message where it cannot be."""

import os
import signal
import subprocess
import sys

import pytest
from distributed import run_distributed
from kernel import exact, tiny_pairs, train_here, with_reference
from tiny import make_model

from raydpo.errors import ModelError
from raydpo.training.disk import PREFIX, disk_folder

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
from raydpo.training import disk
disk._require_asynchronous_files = lambda *_: None
print(disk.disk_folder("field", sys.argv[1]), flush=True)
time.sleep(60)
"""


def test_every_process_has_a_folder_of_its_own_and_those_of_the_dead_go(tmp_path):
    """What DeepSpeed needs is not looked for here."""
    def begin():
        process = subprocess.Popen([sys.executable, "-c", MAKE, str(tmp_path)], stdout=subprocess.PIPE, text=True,
                                   env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
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


def trained(table, model, scratch, keep, kinds, checkpoint=None):
    """Losses of each kind; ``checkpoint`` is the kind whose checkpoint of step 3 each goes on from."""
    found = []
    for name, kind in kinds.items():
        kept = None if checkpoint is None else keep / checkpoint / "step-3"
        found.append(exact(train_here(table, model, scratch, steps=6, checkpoint_every=3, keep=keep / name, zero=3,
                                      checkpoint=kept, **kind).steps))
    return found


@pytest.mark.slow  # DeepSpeed compiles for minutes, once a machine
def test_a_disk_changes_nothing_and_its_checkpoints_fit_everywhere(tmp_path):
    if not has_libaio():
        pytest.skip("libaio is not installed here")
    # More than 1 MB a rank, below which DeepSpeed leaves a tensor in memory.
    model, keep = make_model(tmp_path / "model", hidden=128, layers=4), tmp_path / "keep"
    table = with_reference(tiny_pairs(17), model)
    disk = {"offload_optimizer": str(tmp_path / "disk")}
    kinds = {"memory": {"offload_optimizer": "cpu"}, "disk": disk, "both": disk | {"offload_params": str(tmp_path / "disk")}}
    memory, *others = run_distributed(trained, 2, tmp_path / "a", table, model, tmp_path / "s", keep, kinds)[0]
    assert all(rows == memory for rows in others)
    assert memory[-1]["loss"] != memory[0]["loss"]
    for checkpoint in ("memory", "disk", "both"):
        rest = run_distributed(trained, 2, tmp_path / checkpoint, table, model, tmp_path / "s", keep, kinds, checkpoint)[0]
        assert all(rows == memory[3:] for rows in rest), checkpoint
