"""Several runs in one process: which ones may be, and what they leave."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from kernel import exact
from test_launch import wait_for_checkpoint, workers_of
from tiny import preferences, write_preferences

import raydpo
from raydpo.config import load_config
from raydpo.console import Console
from raydpo.errors import ConfigError
from raydpo.together import check_together, train_together


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_llama):
    place = tmp_path_factory.mktemp("together")
    write_preferences(place / "a.jsonl", preferences(45))
    return {"output": str(place / "runs"), "model": {"path": str(tiny_llama), "dtype": "float32", "lora": {"r": 4}},
            "data": {"train": str(place / "a.jsonl"), "eval": {"fraction": 0.2}},
            "train": {"pairs_per_step": 8, "lr": 1e-3, "steps": 8, "checkpoint_every": 3, "eval_every": 4,
                      "tokens_per_batch": 1024, "sample_prompts": 1, "sample_tokens": 4}}


def test_what_must_be_equal_is_named_with_both_values(base):
    first = load_config(base, ["name=a", "train.beta=0.1"])
    free = ["name=b", "train.beta=0.3", "train.loss=ipo", "train.lr=1e-4", "train.schedule=cosine", "train.clip=null",
            "train.eval_every=3", "train.keep_checkpoints=1", "train.weight_decay=0.1", "train.warmup=2"]
    check_together([first, load_config(base, free)])
    cases = {"model.lora.r=8": "model.lora.r: 4 and 8", "train.pairs_per_step=16": "train.pairs_per_step: 8 and 16",
             "train.seed=1": "train.seed: 0 and 1", "train.steps=9": "train.steps: 8 and 9",
             "data.eval.fraction=0.1": "data.eval.fraction: 0.2 and 0.1", "model.dtype=bfloat16": "'float32' and 'bfloat16'"}
    for override, told in cases.items():
        with pytest.raises(ConfigError, match=re.escape(told)):
            check_together([first, load_config(base, ["name=b", override])])
    unordered = [load_config(base, [f"name=s{seed}", "data.shuffle=false", f"train.seed={seed}"]) for seed in (0, 1)]
    check_together(unordered)


@pytest.mark.parametrize(("override", "told"), [
    ("model.lora=null", "set model.lora"), ("model.lora={r: 4, dora: true}", "set it to false"),
    ("train.zero=3", "set it to 2"), ("train.offload_optimizer=cpu", "set it to null"),
    ("track.wandb={project: p}", "track.mlflow")])
def test_what_cannot_be_done_together_is_refused_with_the_fix(base, override, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        check_together([load_config(base, ["name=a"]), load_config(base, ["name=b", override])])


def test_two_settings_need_two_run_directories(base):
    with pytest.raises(ConfigError, match="the same run directory"):
        check_together([load_config(base, ["train.beta=0.1"])] * 2)


def files_of(config):
    run = config.run_dir
    return {os.path.join(os.path.relpath(root, run), file) for root, _, found in os.walk(run) for file in found
            if not file.startswith("events.out") and "logs" not in root}


@pytest.mark.slow  # tests/training/test_together.py has the training itself
def test_each_leaves_the_directory_of_a_run(base, on_cluster):
    configs = [load_config(base, [f"name={name}", *more]) for name, more in (
        ("a", ["train.beta=0.05"]), ("b", ["train.beta=0.3", "train.loss=ipo", "train.keep_best=eval_loss"]))]
    said = io.StringIO()
    raydpo.score(load_config(base), Console(said))
    results = train_together(configs, Console(said))
    text = said.getvalue()
    assert "2 settings together" in text and text.count("policy loaded in") == 1, text
    for config, result in zip(configs, results, strict=True):
        run = Path(config.run_dir)
        assert {"./config.yaml", "./run.json", "./metrics.parquet", "./eval.parquet", "./summary.json",
                "final/adapter_model.safetensors", "final/README.md"} <= files_of(config)
        assert json.loads((run / "summary.json").read_text()) == result
        assert result["name"] == config.run_name and result["steps"] == 8 and result["samples"][0]["after"] is not None
        assert pq.read_table(run / "metrics.parquet")["step"].to_pylist() == list(range(1, 9))
        assert pq.read_table(run / "eval.parquet")["step"].to_pylist() == [0, 4, 8]
        kept = json.loads((run / "checkpoints" / "checkpoint_manager_snapshot.json").read_text())
        assert kept["latest_checkpoint_result"]["checkpoint_dir_name"] == "step-00000008"
        assert len(kept["checkpoint_results"]) == 2
        assert sum(path.name.startswith("step-") for path in (run / "checkpoints").iterdir()) == 2
    assert results[0]["first_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert results[1]["first_loss"] == pytest.approx((1 / 0.6) ** 2, abs=1e-5)
    again = io.StringIO()
    assert train_together(configs, Console(again)) == results
    assert again.getvalue().count("is already complete") == 2 and "training:" not in again.getvalue()


def interrupt_after(run_dir, step):
    """As Ctrl-C would, once a checkpoint of ``step`` or later counts."""
    snapshot = Path(run_dir) / "checkpoints" / "checkpoint_manager_snapshot.json"

    def watch():
        while max([0, *map(int, re.findall(r"step-(\d+)", snapshot.read_text() if snapshot.is_file() else ""))]) < step:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.slow
def test_stopped_together_one_goes_on_alone_and_the_rest_together(base, on_cluster):
    betas = (0.05, 0.1, 0.3)
    configs, undisturbed = ([load_config(base, [f"name={mark}{beta}", f"train.beta={beta}", "train.steps=80"])
                             for beta in betas] for mark in "sw")
    raydpo.score(load_config(base), Console(io.StringIO()))
    interrupt_after(configs[0].run_dir, 6)
    with pytest.raises(KeyboardInterrupt):
        train_together(configs, Console(io.StringIO()))
    stopped = [pq.read_table(os.path.join(config.run_dir, "metrics.parquet")).num_rows for config in configs]
    assert all(6 <= steps < 80 for steps in stopped), stopped
    said = io.StringIO()
    raydpo.train(configs[1], Console(said))
    assert f"continuing after step {stopped[1]}" in said.getvalue()
    rest = train_together(configs, Console(said))
    assert "2 settings together" in said.getvalue()
    for mine, other in zip(rest, train_together(undisturbed, Console(io.StringIO())), strict=True):
        assert mine["steps"] == other["steps"] == 80
        assert mine["eval_after"] == pytest.approx(other["eval_after"], abs=1e-5, rel=1e-5)
    single = load_config(base, ["name=single", f"train.beta={betas[0]}", "train.steps=80"])
    assert raydpo.train(single, Console(said))["eval_after"] == pytest.approx(rest[0]["eval_after"], abs=1e-5, rel=1e-5)
    assert files_of(single) == files_of(configs[0]) == files_of(undisturbed[0])


SCRIPT = """
import json, sys
from raydpo.config import load_config
from raydpo.together import train_together
if __name__ == "__main__":
    tree, names = json.loads(sys.argv[1])
    print(len(train_together([load_config(tree, [f"name={name}", f"train.beta={beta}", "train.steps=60"])
                              for name, beta in names])))
"""


@pytest.mark.slow
def test_a_killed_worker_costs_what_is_after_the_checkpoints(base, tmp_path):
    """A Ray of its own for each, which the marked environment reaches."""
    raydpo.score(load_config(base), Console(io.StringIO()))
    names = {mark: [(f"{mark}{beta}", beta) for beta in (0.05, 0.3)] for mark in ("killed", "whole")}
    for mark, runs in names.items():
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, json.dumps([base, runs])], stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True, env=os.environ | {"RAYDPO_TEST_DRIVER": f"t-{mark}"})
        if mark == "killed":
            wait_for_checkpoint(Path(base["output"]).parent, runs[0][0], 6, process)
            (worker,) = workers_of(f"t-{mark}")
            os.kill(worker, signal.SIGKILL)
        output = process.communicate(timeout=200)[0]
        assert process.returncode == 0, output
        assert ("training after step" in output) == (mark == "killed"), output
    for (killed, _), (whole, _) in zip(*names.values(), strict=True):
        ours, theirs = (exact(pq.read_table(Path(base["output"]) / name / "metrics.parquet").to_pylist())
                        for name in (killed, whole))
        assert [row["step"] for row in ours] == list(range(1, 61))
        for row, other in zip(ours, theirs, strict=True):
            assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
