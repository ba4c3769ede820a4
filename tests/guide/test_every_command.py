"""Every command of README and the guides is run as it stands, in a directory in which it makes sense.

tests/documented.py names those that cannot be, and why.
"""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from command import raydpo
from documented import DOCUMENTS, GUIDE, ROOT, block, blocks, commands, inline, not_run
from tiny import preferences, write_preferences

from raydpo.losses import PairLogps, preference_loss
from raydpo.reference.store import ReferenceCache

README = ROOT / "README.md"
SWITCHING, OBJECTIVES = GUIDE["switching"], GUIDE["objectives"]
CONFIG = {
    "output": "runs",
    "model": {"path": "./model", "dtype": "float32"},
    "data": {"train": "a.jsonl", "eval": {"fraction": 0.3}},
    "train": {"pairs_per_step": 8, "lr": 1e-3, "steps": 2},
    "evaluate": {"prompts": 2, "max_tokens": 4},
}
ROUNDS = {
    "name": "sums",
    "output": "runs",
    "model": CONFIG["model"],
    "data": {"max_length": 64},
    "train": {"pairs_per_step": 4, "lr": 1e-3, "steps": 2},
    "rounds": {
        "count": 2,
        "prompts": "prompts.jsonl",
        "rewards": [{"use": "regex", "pattern": "[a-h]"}],
        "sample": {"n": 4, "max_tokens": 4},
        "cut": "keep",
        "measure": {"n": 2},
    },
}
TEAM = commands(block(GUIDE["cache"], "", "raydpo cache compact"))
USE = commands(block(README, "", "raydpo doctor"))
OWN_LOSS = commands(block(OBJECTIVES, "", "my_module:my_loss"))
PAGES = [
    command
    for name in ("data", "counting", "evaluation", "runs", "sweeps")
    for _, text in blocks(GUIDE[name])
    for command in commands(text)
]
"""Commands that make sense after those of README's block, in the same directory."""
OF_ROUNDS = [command for _, text in blocks(GUIDE["rounds"]) for command in commands(text)]
"""Commands of rounds in the order of the page, after those of README's block."""


@pytest.fixture
def place(tmp_path, tiny_llama, on_cluster):
    """Where a reader stands: a model, data, a configuration."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    write_preferences(tmp_path / "a.jsonl", preferences(40))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "rounds.yaml").write_text(yaml.safe_dump(ROUNDS))
    write_preferences(tmp_path / "prompts.jsonl", [{"prompt": record["prompt"]} for record in preferences(24, seed=1)])
    return tmp_path


def run(place, command, **replaced):
    """A command that comes to its end, once ``replaced`` names have become those that are there."""
    for old, new in replaced.items():
        command = command.replace(old, new)
    program, *words = shlex.split(command)
    assert program == "raydpo", f"nothing here runs {command!r}; say in tests/documented.py why"
    result = raydpo(*words, cwd=place)
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


def digest(place):
    (identity,) = ReferenceCache.identities(ReferenceCache.open(str(place / "runs/cache")).storage)
    return identity.digest


def test_commands_are_found():
    assert len(USE) == 11 and len(TEAM) == 8 and len(OWN_LOSS) == 1 and len(PAGES) >= 6
    found = [command for file in DOCUMENTS for _, text in blocks(file) for command in commands(text)]
    assert {"raydpo doctor", "raydpo cache gc s3://bucket/cache --delete", "make quickstart"} <= set(found)
    assert len([command for command in found if not not_run(command)]) >= 25
    assert len({command for file in DOCUMENTS for command in inline(file)}) >= 8


def test_each_block_with_commands_has_a_test_here():
    """One that is new needs a place in which it makes sense."""
    known = {
        *USE,
        *TEAM,
        *OWN_LOSS,
        *PAGES,
        *OF_ROUNDS,
        *(command for _, text in blocks(SWITCHING) for command in commands(text)),
    }
    assert {
        command for file in DOCUMENTS for _, text in blocks(file) for command in commands(text) if not not_run(command)
    } <= known


@pytest.mark.slow
def test_use_it(place):
    """README's verbs in the order of a job, then the commands of pages and of running text."""
    verbs = [f"raydpo {verb} " for verb in ("score", "train")]
    first = [command for verb in verbs for command in USE if command.startswith(verb)]
    for command in dict.fromkeys(
        [*first, *USE, *PAGES, *OF_ROUNDS, *(command for file in DOCUMENTS for command in inline(file))]
    ):
        if not_run(command):
            continue
        if "runs/mine" in command and not (place / "runs/mine").exists():
            shutil.copytree(place / "runs/model-sigmoid-beta0.05", place / "runs/mine")
        if command in TEAM:
            continue  # where two caches are
        run(place, command)
    for page in (
        "runs/mine/report.html",
        "runs/model-sweep/report.html",
        "explain.html",
        "runs/model-sigmoid-beta0.1/audit.html",
    ):
        assert (place / page).stat().st_size > 10_000
    assert {"final", "evaluation.json"} <= set(os.listdir(place / "runs/model-sigmoid-beta0.1"))


@pytest.mark.slow
def test_a_cache_for_a_team(place):
    """With a directory in the bucket's place."""
    run(place, "raydpo score config.yaml")
    name = digest(place)
    for one in "ab":
        shutil.copytree(place / "runs/cache", place / f"runs/{one}/cache")
    for command in TEAM:
        if "trl.parquet" in command:
            shutil.copy(place / "out.parquet", place / "trl.parquet")
        told = run(place, command, **{"s3://bucket/cache": "runs/cache", "14dd257b": name[:8], "#14dd": f"#{name[:4]}"})
        assert told.strip()
    assert 20 < pq.read_table(place / "out.parquet").num_rows < 40, "some are held out"


@pytest.mark.slow
def test_a_loss_of_your_own(place):
    (place / "my_module.py").write_text(block(OBJECTIVES, "python", "def my_loss"))
    run(place, "raydpo score config.yaml")
    for command in OWN_LOSS:
        assert "held out, step 2" in run(place, command)


def test_the_loss_of_your_own_is_a_loss(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_module.py").write_text(block(OBJECTIVES, "python", "def my_loss"))
    four = [torch.full((2,), value, dtype=torch.float64) for value in (-3.0, -9.0, -4.0, -5.0, 2.0, 3.0)]
    found = preference_loss("my_module:my_loss", PairLogps(*four), beta=0.5)
    margin = (-3.0 + 4.0) - (-9.0 + 5.0)
    assert found.losses.tolist() == pytest.approx([math.log1p(math.exp(1 - 0.5 * margin))] * 2)


@pytest.mark.slow
def test_the_python_of_the_guide(place):
    code = block(GUIDE["runs"], "python", "import raydpo")
    (place / "readme.py").write_text(f"keys = []\n{code}\nprint(len(summary['samples']), cache.lookup(keys).num_rows)\n")
    done = subprocess.run(
        [sys.executable, "readme.py"],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (place / "runs/model-sigmoid-beta0.05/final").is_dir() and (place / "runs/model-sweep/sweep.json").is_file()


@pytest.mark.slow
def test_switching(place, monkeypatch):
    """The guide from its first block to its last: TRL's script, our file of it, and the values of both trainers."""
    trl = pytest.importorskip("trl")
    import functools

    import torch

    monkeypatch.chdir(place)
    monkeypatch.setattr(
        trl,
        "DPOConfig",
        functools.partial(  # this machine has no GPU, and no trackers
            trl.DPOConfig, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no"
        ),
    )
    names = {}
    for language, text in blocks(SWITCHING):
        if language == "yaml":
            (place / "config.yaml").write_text(text)
        elif language == "python":
            if "torch.load" in text:
                run(place, "raydpo cache export config.yaml out.parquet data.train=trl.parquet")
                rows = pq.read_table("out.parquet").to_pylist()
                torch.save(
                    {
                        f"{side}_logps": torch.tensor([row[f"ref_{side}_logps"] / len(row[f"{side}_ids"]) for row in rows])
                        for side in ("chosen", "rejected")
                    },
                    "0123456789abcdef.pt",
                )
            exec(compile(text, SWITCHING.name, "exec"), names)
        for command in commands(text):
            if "--means" in command:
                shutil.rmtree(place / "runs/cache")  # verified rows would answer before the new import
            told = run(place, command)
            if "cache import" in command:
                assert "40 pairs imported from" in told
            if "cache verify" in command:
                assert "are now verified and used by training" in told
            if "raydpo train" in command:
                assert "first loss 0.693147" in told
    records = [json.loads(line) for line in (place / "open-instruct.jsonl").read_text().splitlines()]
    assert len(records) == 40 and records[0]["chosen_logps"] < 0
