"""A worker killed at any line while it stores a checkpoint: the newest valid one is whole."""

import json
from types import SimpleNamespace

import torch
from killing import killed_at_every_line
from safetensors.torch import load_file

from raydpo.storage import files as storage_module
from raydpo.storage.files import Storage
from raydpo.training.checkpoint import files as files_module
from raydpo.training.checkpoint.files import PendingCheckpoint
from raydpo.training.job import TrainSummary
from raydpo.training.launch.launch import _scratch

WEIGHTS = {f"state-{number}": {"weight": torch.arange(9.0) + number} for number in range(2)}


def test_a_checkpoint_killed_at_every_third_line(tmp_path):
    storage = Storage(str(tmp_path / "run"))
    state = SimpleNamespace(files=lambda: iter(WEIGHTS.items()), facts={})
    engine = SimpleNamespace(rank=0, world_size=1, zero=2, state=state)

    def act():
        with _scratch(storage, 0, 1) as scratch:
            for step in (4, 8):
                pending = PendingCheckpoint(engine, scratch / f"step-{step}", step, {}, TrainSummary(), copy=True)
                pending.write()
                storage.move_into(pending.directory, f"checkpoints/step-{step}")
                storage.write(f"valid-{step}", b"")

    seen = set()

    def check(ended):
        valid = [step for step in (4, 8) if storage.exists(f"valid-{step}")]
        seen.add(len(valid))
        assert not ended or valid == [4, 8]
        for step in valid:
            place = tmp_path / "run" / "checkpoints" / f"step-{step}"
            assert json.loads((place / "raydpo.json").read_text())["step"] == step
            for name, tensors in WEIGHTS.items():
                assert torch.equal(load_file(place / name)["weight"], tensors["weight"])

    def prepare():
        for name in storage.list():
            if name.startswith("valid"):
                storage.delete(name)

    kills = killed_at_every_line(act, [files_module, storage_module], prepare, check, stride=3)
    assert kills > 25 and seen == {0, 1, 2}
    assert not (tmp_path / "run" / ".scratch").exists(), "what the killed ones left is gone, too"


def test_each_worker_removes_what_killed_ones_of_a_larger_group_left(tmp_path):
    root = tmp_path / ".scratch"
    for rank in range(5):
        (root / f"{rank:05d}" / "step").mkdir(parents=True)
    with _scratch(Storage(str(tmp_path)), 1, 2) as one:
        assert one == root / "00001" and not list(one.iterdir())
        assert sorted(path.name for path in root.iterdir()) == ["00000", "00001", "00002", "00004"]
        with _scratch(Storage(str(tmp_path)), 0, 2):
            assert sorted(path.name for path in root.iterdir()) == ["00000", "00001"]
    assert not root.exists()
