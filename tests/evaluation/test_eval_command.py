"""``raydpo eval`` from end to end on a running Ray: what it measures, and that nothing is computed twice."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import command
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from judge_server import longer, serving
from machines import RayProcesses
from s3_server import s3_server
from test_policy_found import make_adapter
from test_wins import make_classifier
from tiny import make_model, preferences, write_preferences

import raydpo
from raydpo.config import load_config
from raydpo.data.split import held_out, prompt_digest
from raydpo.errors import CacheMissError, ConfigError
from raydpo.pipeline.evaluate import _Evaluation
from raydpo.storage.files import Storage
from raydpo.terminal.console import Console

SETTINGS = {"prompts": 6, "max_tokens": 10, "samples": 2}
FIGURES = {"raydpo", "policy", "reference", "data", "beta", "preferences", "generation", "drift", "wins", "samples"}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_llama):
    """A run whose final/ is an adapter, without the training."""
    place = tmp_path_factory.mktemp("eval")
    write_preferences(place / "a.jsonl", preferences(60, high=20))
    tree = {
        "name": "run",
        "output": str(place / "runs"),
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "data": {"train": str(place / "a.jsonl"), "eval": {"fraction": 0.3}},
        "evaluate": SETTINGS,
    }
    (place / "config.yaml").write_text(yaml.safe_dump(tree))
    make_adapter(place / "runs" / "run" / "final", tiny_llama)
    (place / "runs" / "run" / "run.json").write_text(json.dumps({"fingerprint": {"train.beta": 0.4, "train.loss": "hinge"}}))
    make_classifier(place / "reward", labels=1)
    (place / "my_scores.py").write_text("def length(prompt, answer):\n    return len(answer)\n")
    return place


def evaluated(place, *overrides):
    out = io.StringIO()
    return raydpo.evaluate(load_config(place / "config.yaml", overrides), Console(out)), out.getvalue()


def stored(place):
    return {file.name: file.stat().st_mtime_ns for file in (place / "runs" / "cache").rglob("*.parquet")}


@pytest.mark.slow  # a second whole evaluation takes a minute
def test_a_policy_that_is_the_reference_has_learned_nothing_exactly(place, tiny_llama, on_cluster):
    own = place / "runs" / "run" / "evaluation.json"
    before = own.read_bytes() if own.exists() else None
    same, _ = evaluated(place, f"evaluate.policy={tiny_llama}", "evaluate.exact_steps=false")
    total = same["preferences"]["total"]
    assert total["accuracy"]["value"] == 0.5 and total["margin"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert same["drift"]["kl"] == {"value": 0.0, "low": 0.0, "high": 0.0} and same["drift"]["rao_blackwell"] is None
    for mode in same["generation"]["modes"].values():
        assert mode["policy"] == mode["reference"] and mode["length_growth"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert own.with_name(f"evaluation-{tiny_llama.name}.json").is_file()
    assert (own.read_bytes() if own.exists() else None) == before, "another model is not this run"


def test_evaluation(place, on_cluster, monkeypatch):
    """This run's own adapter, with judges."""
    monkeypatch.chdir(place)
    with serving(longer) as server:
        judges = ("evaluate.score_with=my_scores:length", f"evaluate.judge={{url: '{server.url}', model: tiny}}")
        found, said = evaluated(place, *judges)
        asked = len(server.requests)
        assert asked > 0
        before = stored(place)

        # The same command prints the same figures as JSON, and does nothing.
        again = command.raydpo("eval", "config.yaml", *judges, "--json", cwd=place)
        assert again.returncode == 0, again.stderr
        assert json.loads(again.stdout) == found and len(server.requests) == asked and stored(place) == before
    check_figures(place, found, said)


def test_what_another_run_trained_on_is_noticed_in_our_held_out_pairs(place, tiny_llama):
    """The other run held out fewer pairs of the same file, so it was trained on half of ours. A plain model has none."""
    made_adapter = make_adapter(place / "runs" / "other" / "final", tiny_llama)
    tree = yaml.safe_load((place / "config.yaml").read_text()) | {"name": "other"}
    tree["data"]["eval"] = {"fraction": 0.15}
    (made_adapter.parent / "config.yaml").write_text(yaml.safe_dump(tree))
    (made_adapter.parent / "run.json").write_text(json.dumps({"fingerprint": {"reference identity": None}}))

    def prepared(*overrides):
        out = io.StringIO()
        return _Evaluation.of(load_config(place / "config.yaml", overrides), Console(out)), out.getvalue()

    found, said = prepared(f"evaluate.policy={made_adapter.parent}")
    fewer = held_out([prompt_digest(row["prompt"]) for row in preferences(60, high=20)], 0.15).sum()
    assert 0 < found.trained_on == found.pairs.num_rows - fewer and "trained on the prompts of" in said
    assert "trained against reference None" not in said
    assert prepared()[0].trained_on == 0 and prepared(f"evaluate.policy={tiny_llama}")[0].trained_on is None


def check_figures(place, found, said):
    assert set(found) >= FIGURES and found["beta"] == 0.4 and found["data"] == ["a"]
    told = found["protocol"]
    assert {name: told[name] for name in SETTINGS} == SETTINGS and told["reference"] == found["reference"]["identity"]
    assert told["judge"] == {
        "url": told["judge"]["url"],
        "model": "tiny",
        "max_tokens": 16,
        "criterion": "more helpful, honest and harmless",
    }
    run = place / "runs" / "run"
    assert json.loads((run / "evaluation.json").read_text()) == found
    total = found["preferences"]["total"]
    assert total["pairs"] > 10 and sum(one["pairs"] for one in found["preferences"]["by_length"]) == total["pairs"]
    assert total["margin"]["value"] != 0
    rows = pq.read_table(run / "samples.parquet").to_pylist()
    assert [row["mode"] for row in rows] == ["greedy"] * 6 + ["sampled"] * 12
    drawn = [row for row in rows if row["mode"] == "sampled"]
    ratios = np.array([row["log_ratio"] for row in drawn]).reshape(6, 2).mean(1)
    assert found["drift"]["kl"]["value"] == pytest.approx(ratios.mean()) and found["drift"]["samples"] == 12
    exact = found["drift"]["rao_blackwell"]
    assert exact["kl"]["value"] > 0 and exact["std_error"] < found["drift"]["std_error"]
    lengths = [len(row["policy_ids"]) for row in drawn]
    assert found["generation"]["modes"]["sampled"]["policy"]["tokens"]["value"] == pytest.approx(np.mean(lengths))
    by_judge = {(one["judge"].split()[0], one["mode"]): one for one in found["wins"]}
    assert set(by_judge) == {(judge, mode) for judge in ("my_scores:length", "tiny") for mode in ("greedy", "sampled")}
    assert all(one["wins"] + one["ties"] + one["losses"] + one["not_judged"] == 6 for one in found["wins"])
    longer_ones = sum(len(row["policy"]) > len(row["reference"]) for row in drawn if row["sample"] == 0)
    assert by_judge["my_scores:length", "sampled"]["wins"] == by_judge["tiny", "sampled"]["wins"] == longer_ones
    firsts = [row for row in rows if row["sample"] == 0]
    assert all(row["verdict_score_with"] == (np.sign(len(row["policy"]) - len(row["reference"])) + 1) / 2 for row in firsts)
    assert [row["verdict_judge"] for row in firsts] == [row["verdict_score_with"] for row in firsts]
    assert {row["verdict_judge"] for row in rows if row["sample"]} == {row["verdict_reward_model"] for row in rows} == {None}
    assert all(
        one["equal_length"]["low"] < one["equal_length"]["value"] < one["equal_length"]["high"] for one in found["wins"]
    )
    assert found["samples"][0]["policy"] == rows[0]["policy"] and len(found["samples"]) == 5
    for piece in (
        "Preferences of held-out pairs: beta 0.4",
        "Drift KL(policy || reference) from 12 samples",
        "Wins of the policy",
        "peft=",
    ):
        assert piece in said, said


def test_what_cannot_be_evaluated(place, on_cluster, tmp_path):
    """Errors that are found before any model is loaded."""
    with pytest.raises(CacheMissError, match=r"log-probs of the policy are missing for .* set evaluate\.score_missing=true"):
        evaluated(place, "evaluate={prompts: 0, score_missing: false}", f"cache.uri={tmp_path / 'empty'}")
    with pytest.raises(ConfigError, match="another vocabulary"):
        evaluated(place, f"evaluate.policy={_other_tokens(tmp_path / 'other')}")
    result = command.raydpo("eval", place / "config.yaml", "evaluate.promts=1")
    assert result.returncode == 2 and result.stderr.startswith("error: unknown key 'evaluate.promts'")


def _other_tokens(directory):
    from transformers import AutoTokenizer

    make_model(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_answers(place, on_cluster, monkeypatch, tmp_path):
    from raydpo.pipeline import evaluate as run

    monkeypatch.setattr(run, "WORK_BLOCK", 4)
    found = [
        evaluated(
            place,
            f"score.workers={workers}",
            f"evaluate.batch={batch}",
            f"cache.uri={tmp_path / str(workers)}",
            f"evaluate.reward_model={place / 'reward'}",
        )[0]
        for workers, batch in ((1, 16), (2, 3))
    ]
    assert found[0]["samples"] == found[1]["samples"] and found[0]["generation"] == found[1]["generation"]
    assert found[0]["wins"][0]["judge"] == str(place / "reward")
    assert [one["wins"] for one in found[0]["wins"]] == [one["wins"] for one in found[1]["wins"]]
    assert found[0]["drift"]["kl"]["value"] == pytest.approx(found[1]["drift"]["kl"]["value"], abs=1e-4)


@pytest.mark.slow
def test_a_kill_loses_nothing_that_was_stored(place, tmp_path):
    cache = tmp_path / "cache"
    command = [
        sys.executable,
        "-m",
        "raydpo.cli",
        "eval",
        str(place / "config.yaml"),
        f"cache.uri={cache}",
        "data.eval.fraction=0.9",
        "evaluate.prompts=60",
        "evaluate.samples=4",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    deadline = time.time() + 300
    while len(list(cache.glob("evaluation/*.parquet"))) < 2 and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(2)
    kept = {file: file.stat().st_mtime_ns for file in cache.glob("evaluation/*.parquet")}
    assert len(kept) >= 2 and not list(cache.glob("*/parts/*.parquet")), "the kill must come while answers are made"
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {file: file.stat().st_mtime_ns for file in kept} == kept


@pytest.mark.slow
def test_nodes_fetch_a_run_from_a_bucket_themselves(place, tmp_path, tiny_llama):
    """The head has no CPUs for work; the node that has them has its own disk."""
    pytest.importorskip("moto")
    with s3_server() as s3:
        Storage(s3.uri("runs/run")).upload(place / "runs" / "run" / "final", "final")
        cluster = RayProcesses(cpus=0)
        try:
            cluster.add(5, env={"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": ""}, pool="away")
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "raydpo.cli",
                    "eval",
                    str(place / "config.yaml"),
                    f"output={s3.uri('runs')}",
                    "--json",
                    "score={labels: {pool: away}, gpus_per_worker: 0}",
                    "ray.autoscaling=true",
                    f"ray.address=127.0.0.1:{cluster.gcs}",
                    "evaluate.exact_steps=false",
                    "evaluate.prompts=2",
                    "evaluate.samples=1",
                    "evaluate.max_tokens=4",
                ],
                env=cluster.env | {"XDG_CACHE_HOME": str(tmp_path / "driver")},
                capture_output=True,
                text=True,
                timeout=300,
            )
        finally:
            cluster.stop()
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads(done.stdout)
        assert found["preferences"]["total"]["margin"]["value"] != 0 and found["generation"]["prompts"] == 2
    for home in (tmp_path / "driver", tmp_path / "home" / ".cache"):
        copies = {path.name for path in home.glob("raydpo/models/*/*/*")}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= copies, f"no copy in {home}"
