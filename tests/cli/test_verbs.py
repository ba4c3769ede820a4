"""Commands as a user runs them: exit status, output, and files on disk."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from command import as_a_user, raydpo
from kernel import exact
from machines import wait_for_checkpoint, workers
from safetensors.torch import load_file, save_file
from tiny import preferences, write_preferences

STEPS = 20


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_llama):
    place = tmp_path_factory.mktemp("cli")
    write_preferences(place / "a.jsonl", preferences(40))
    write_preferences(place / "b.jsonl", preferences(20, seed=1))
    tree = {
        "name": "first",
        "output": str(place / "runs"),
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "data": {
            "train": [{"path": str(place / "a.jsonl")}, {"path": str(place / "b.jsonl"), "weight": 0.5}],
            "eval": {"fraction": 0.2},
        },
        "score": {"workers": 2},
        "train": {
            "workers": 2,
            "pairs_per_step": 8,
            "lr": 1e-3,
            "steps": STEPS,
            "eval_every": 10,
            "sample_prompts": 1,
            "sample_tokens": 8,
        },
    }
    (place / "config.yaml").write_text(yaml.safe_dump(tree))
    return place


@pytest.fixture(scope="module")
def first(place):
    result = as_a_user("run", place / "config.yaml")
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def test_run_says_what_happened(first):
    for piece in (
        "(0% hits)",
        "step-0 gate:",
        "loss 0.693147",
        "first loss 0.693147",
        "held-out pairs:",
        "before",
        "after",
        "run directory:",
        "final/",
        "report.html",
    ):
        assert piece in first.stdout, first.stdout
    assert first.stderr == ""
    assert not any(noise in first.stdout for noise in ("INFO", "WARNING", "(pid=", "DeepSpeed", "ray::"))


def test_run_directory(first, place):
    run = place / "runs" / "first"
    assert {
        "config.yaml",
        "metrics.parquet",
        "eval.parquet",
        "final",
        "checkpoints",
        "tensorboard",
        "logs",
        "summary.json",
        "report.html",
    } <= set(os.listdir(run))
    steps = pq.read_table(run / "metrics.parquet").to_pylist()
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert {
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
        "grad_norm",
        "learning_rate",
        "epoch",
        "a/loss",
        "b/loss",
    } <= set(steps[0])
    evals = pq.read_table(run / "eval.parquet").to_pylist()
    assert [row["step"] for row in evals] == [0, 10, STEPS]
    assert evals[0]["eval_rewards/accuracies"] == 0.5
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == STEPS and summary["samples"][0]["after"] is not None
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["beta"] == 0.1
    assert any(file.name.startswith("events.out") for file in (run / "tensorboard").iterdir())


def test_final_loads_without_us_and_is_the_policy(first, place):
    """transformers alone computes the log-probs of the last evaluation from final/."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from raydpo.config import load_config
    from raydpo.data.pairs import load_pairs
    from raydpo.data.tokenise import Tokeniser

    final = place / "runs" / "first" / "final"
    model = AutoModelForCausalLM.from_pretrained(final)
    sets = load_pairs(load_config(place / "config.yaml").data, Tokeniser(AutoTokenizer.from_pretrained(final)))
    sums = []
    for prompt, chosen in zip(*(sets.eval[name].to_pylist() for name in ("prompt_ids", "chosen_ids")), strict=True):
        ids = torch.tensor([prompt + chosen])
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        sums.append(logps[len(prompt) - 1 :].sum().item())
    last = pq.read_table(place / "runs" / "first" / "eval.parquet").to_pylist()[-1]
    assert np.mean(sums) == pytest.approx(last["eval_logps/chosen"], abs=1e-3)


def test_a_second_run_hits_everything_and_a_filter_lora_and_fresh_do_what_they_say(first, place, tiny_llama, on_cluster):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    old = place / "runs" / "second"
    old.mkdir()
    (old / "run.json").write_text(json.dumps({"fingerprint": {"train.beta": 7}}))
    (old / "audit.html").write_text("of the old run")
    result = raydpo(
        "run",
        place / "config.yaml",
        "name=second",
        "model.lora={r: 4}",
        "train.beta=0.3",
        "train.zero=3",
        "train.workers=1",
        "train.steps=2",
        "data.filter=ref_margin > 0 and copy = 0",
        "--fresh",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "pairs left out (a: " in result.stdout and "b: " in result.stdout, result.stdout
    trained = int(re.search(r"training: (\d+) pairs", result.stdout)[1])
    assert trained < int(re.search(r"pairs: (\d+) to train on", result.stdout)[1])
    assert json.loads((old / "summary.json").read_text())["training_pairs"] == trained
    assert f"`b.jsonl`, {trained} pairs" in (old / "final" / "README.md").read_text()
    assert (place / "runs" / "second~1" / "audit.html").read_text() == "of the old run"
    assert (old / "audit.html").stat().st_size > 10_000 and f"audit: {old}/audit.html" in result.stdout
    assert "(100% hits), 0 scored" in result.stdout
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), place / "runs" / "second" / "final")
    assert any(value.abs().max() > 0 for name, value in policy.named_parameters() if "lora_B" in name)


def test_train_without_a_cache_says_what_to_run(place, on_cluster):
    result = raydpo("train", place / "config.yaml", "name=third", f"cache.uri={place / 'empty'}")
    assert result.returncode == 1
    assert "missing for" in result.stderr and "raydpo score" in result.stderr and "a:" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["train.bata=1"], ["data.train=nope.jsonl"], ["train.gpus_per_worker=1"]])
def test_bad_input_is_exit_status_2_and_one_message(arguments, place, on_cluster):
    result = raydpo("train", place / "config.yaml", "name=fourth", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr


@pytest.mark.parametrize("verb", ["score", "train", "run", "sweep", "eval"])
def test_a_model_that_lacks_weights_is_refused_before_ray(verb, place, tiny_llama, tmp_path, monkeypatch):
    """No Ray cluster is at that address: a command that connected first would fail with another message."""
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file(
        {name: value for name, value in tensors.items() if ".layers.1." not in name},
        model / "model.safetensors",
        {"format": "pt"},
    )
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    more = {"sweep": ["sweep={grid: {train.lr: [1.0e-3, 1.0e-4]}}"], "eval": [f"evaluate.policy={tiny_llama}"]}.get(verb, [])
    result = raydpo(verb, place / "config.yaml", f"name=lacking-{verb}", f"model.path={model}", *more)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: the files of ") and result.stderr.count("\n") == 1
    assert "lack model.layers.1.input_layernorm.weight" in result.stderr


def test_an_output_that_cannot_be_made_is_exit_status_2_and_one_message(place, tmp_path):
    (tmp_path / "file").write_text("")
    result = raydpo("run", place / "config.yaml", f"output={tmp_path}/file/below")
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "'output' does not work: cannot write to" in result.stderr and "Not a directory" in result.stderr


def test_malformed_data_is_exit_status_2_with_line_numbers(place, on_cluster):
    (place / "bad.jsonl").write_text('{"prompt": "p", "chosen": "c"}\nnot json\n' * 3)
    result = raydpo("score", place / "config.yaml", f"data.train={place / 'bad.jsonl'}")
    assert result.returncode == 2
    assert "bad.jsonl:1" in result.stderr and "rejected" in result.stderr and "data.max_malformed" in result.stderr


def test_show_prints_pairs_as_the_model_sees_them(place):
    result = raydpo("show", place / "config.yaml", "-n", "2")
    assert result.returncode == 0, result.stderr
    assert "Question:" in result.stdout and "</s>" in result.stdout and "key " in result.stdout


def test_plan_estimates_without_ray(place):
    program = (
        "import sys; from raydpo.cli.entry import main; status = main(sys.argv[1:]); "
        "assert 'ray' not in sys.modules and 'deepspeed' not in sys.modules; sys.exit(status)"
    )
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            program,
            "plan",
            place / "config.yaml",
            "train.steps=4",
            "--workers",
            "2",
            "--price",
            "3",
            "--runs",
            "5",
        ],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    for piece in (
        "data a: 40 records",
        "reference pass",
        "5 training(s)",
        "H100",
        "prefix tree",
        "the same with 4 pairs a rank",
        "bound",
        "longest pair",
        "cheapest mode that fits: train.zero=0",
        "QLoRA, which trains adapters only",
    ):
        assert piece in result.stdout, result.stdout


@pytest.mark.slow
def test_plan_measures_here_and_prints_json(place):
    result = raydpo(
        "plan",
        place / "config.yaml",
        "train.tokens_per_batch=1000",
        "score.tokens_per_batch=1000",
        "model.lora={}",
        "--measure",
        "--json",
    )
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["rates"]["origin"].startswith("measured on ") and plan["rates"]["train"] > 0
    assert plan["score"]["seconds"] > 0 and plan["score"]["dollars"] is None
    assert plan["memory"]["proposed"]["fits"] and plan["memory"]["budget"] == 1000
    assert [row["world_size"] for row in plan["fixed"]][:3] == [1, 2, 4]
    assert raydpo("plan", place / "config.yaml", "--device", "abacus").returncode == 2


def test_plan_says_what_does_not_fit(place):
    """1.5 GiB are reserved on each device, more than the 1 GiB given."""
    result = raydpo("plan", place / "config.yaml", "--memory", "1", "--json")
    assert result.returncode == 0, result.stderr
    memory = json.loads(result.stdout)["memory"]
    assert memory["proposed"] is None and memory["workers_needed"] is None
    assert not any(row["fits"] for row in memory["rows"])
    assert raydpo("plan", place / "config.yaml", "--memory", "-1").returncode == 2


def test_cache_ls_and_show(first, place):
    listed = raydpo("cache", "ls", place / "runs" / "cache")
    assert listed.returncode == 0 and "float32" in listed.stdout
    shown = raydpo("cache", "show", place / "runs" / "cache")
    assert shown.returncode == 0, shown.stderr
    assert "weights" in shown.stdout and "bytes per token" in shown.stdout and "rows" in shown.stdout
    assert raydpo("cache", "ls", place / "nowhere").returncode == 1


def test_doctor():
    result = raydpo("doctor")
    assert result.returncode == 0 and "deepspeed" in result.stdout and "precision" in result.stdout


def test_jobs_are_the_same_commands(place, on_cluster):
    script = Path(__file__).parents[2] / "jobs" / "score.py"
    result = subprocess.run(
        [sys.executable, str(script), str(place / "config.yaml")], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0 and "hits" in result.stdout
    assert subprocess.run([sys.executable, str(script), str(place / "none.yaml")], capture_output=True).returncode == 2


def test_filter_and_audit(first, place, on_cluster):
    short = raydpo("audit", place / "config.yaml", "data.filter=chosen_tokens < 20", "name=short")
    assert short.returncode == 0 and "pairs left out (a: " in short.stdout, short.stdout + short.stderr
    wrong = raydpo("train", place / "config.yaml", "data.filter=chosen_token < 20")
    assert wrong.returncode == 2 and "did you mean 'chosen_tokens'" in wrong.stderr and wrong.stderr.count("\n") == 1
    assert "audit: the chosen answer is longer in " in first.stdout
    assert (place / "runs" / "first" / "audit.html").stat().st_size > 10_000
    audit = json.loads(raydpo("audit", place / "config.yaml", "--json").stdout)
    assert set(audit["sources"]) == {"a", "b"} and audit["total"]["not_scored"] == 0
    assert audit["total"]["pairs"] == sum(source["pairs"] for source in audit["sources"].values())


def test_python_api_and_a_killed_worker_changes_nothing(first, place, on_cluster):
    """The same training as ``first``, from Python, ends with the same weights and metrics though a worker is killed."""
    tokens = re.findall(r"tokens_per_batch: auto = (\d+) ", first.stdout)[-1]
    program = (
        "import raydpo\n"
        f"config = raydpo.load_config({str(place / 'config.yaml')!r},\n"
        f"    ['name=api', 'train.tokens_per_batch={tokens}', 'train.checkpoint_every=3'])\n"
        "report = raydpo.score(config)\n"
        "assert report.hit_rate == 1.0\n"
        "cache = raydpo.ReferenceCache.open(config.cache_uri)\n"
        "assert cache.lookup([b'x' * 16])['tokens'].to_pylist() == [0]\n"
        f"assert raydpo.train(config)['steps'] == {STEPS}\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=place
    )
    run, undisturbed = (place / "runs" / name for name in ("api", "first"))
    wait_for_checkpoint(run, 3, process)
    os.kill(workers(b"test_verbs.py")[-1], signal.SIGKILL)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and "workers were restarted; continuing after step" in output, output
    for file in ("metrics.parquet", "eval.parquet"):
        assert exact(pq.read_table(run / file).to_pylist()) == exact(pq.read_table(undisturbed / file).to_pylist())
    ours, theirs = (load_file(each / "final" / "model.safetensors") for each in (run, undisturbed))
    assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)


def test_the_audit_of_an_earlier_run_stays_its_own(first, place, on_cluster):
    audit = place / "runs" / "first" / "audit.html"
    before = audit.read_bytes()
    other = (place / "config.yaml", f"data.train={place / 'b.jsonl'}")
    run = raydpo("run", *other)
    assert run.returncode == 2 and "is a run with other settings" in run.stderr and "cache:" not in run.stdout
    audited = raydpo("audit", *other)
    assert audited.returncode == 2 and "is a run of other pairs or another reference" in audited.stderr
    scored = raydpo("score", *other)
    assert scored.returncode == 0 and "warning: the audit failed" in scored.stdout + scored.stderr
    assert audit.read_bytes() == before
    assert raydpo("audit", place / "config.yaml", "train.lr=1e-4").returncode == 0, "of the same pairs"
