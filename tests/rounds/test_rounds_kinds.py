"""Kinds of rounds: more rounds later, adapters with a reference that moves, offline rounds, and the drift."""

import json
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from command import raydpo
from judge_server import longer, serving
from small import small_rounds, tables

pytestmark = pytest.mark.slow
ANY_TEMPERATURE = {"n": 8, "max_tokens": 2}
"""Temperature 1, at which the drift is measured."""


def done(place, *arguments):
    result = raydpo("rounds", "config.yaml", *arguments, cwd=place)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, pq.read_table(place / "runs/small/rounds.parquet").to_pylist(maps_as_pydicts="strict")


def log_probs(model, rows, prompts):
    """Log-prob of each answer, computed one at a time, float64 [rows], nats."""
    found = []
    for row in rows:
        prompt, answer = prompts[row["prompt_id"]], row["answer_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        found.append(float(logits[range(len(answer)), answer].sum()))
    return np.array(found)


def test_the_drift_is_that_of_the_policies_and_a_later_round_continues(tmp_path, tiny_llama):
    from transformers import AutoModelForCausalLM

    small_rounds(tmp_path, tiny_llama, sample=ANY_TEMPERATURE)
    _, rows = done(tmp_path)
    run = tmp_path / "runs/small"
    prompts = {one["prompt_id"]: one["prompt_ids"] for one in pq.read_table(run / "prompts.parquet").to_pylist()}
    models = [tiny_llama, *(run / f"round-{number:03d}/train/final" for number in (1, 2))]
    policies = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in models]
    for number in (0, 1, 2):
        held_out = pq.read_table(run / f"round-{number:03d}/held_out.parquet").to_pylist()
        sampled = [row for row in held_out if row["sample"] >= 0]
        assert all(row["log_ratio"] is row["log_ratio_previous"] is None for row in held_out if row["sample"] < 0)
        ours = log_probs(policies[number], sampled, prompts)
        for column, other in (("log_ratio", 0), ("log_ratio_previous", max(0, number - 1))):
            expected = ours - log_probs(policies[other], sampled, prompts)
            assert np.allclose([row[column] for row in sampled], expected, atol=2e-5), (number, column)
        assert rows[number]["eval_drift_initial"] == pytest.approx(np.mean([row["log_ratio"] for row in sampled]))
        assert rows[number]["eval_drift_previous"] == pytest.approx(np.mean([row["log_ratio_previous"] for row in sampled]))
    assert rows[0]["eval_drift_initial"] == 0 and rows[2]["eval_drift_initial"] > rows[1]["eval_drift_initial"] > 0

    before = {name: (run / name).stat() for name in tables(run)}
    said, more = done(tmp_path, "rounds.count=3")
    assert "round 3 of 3: sample" in said and "round 2 of 3" not in said and len(more) == 4
    assert more[:3] == rows and {name: (run / name).stat() for name in before} == before
    assert os.readlink(run / "final") == "round-003/train/final"
    # The slices of rounds 1 and 3 are the same prompts, with new random numbers.
    first, third = (pq.read_table(run / f"round-{number:03d}/samples.parquet") for number in (1, 3))
    assert set(first["prompt_id"].to_pylist()) == set(third["prompt_id"].to_pylist())
    assert not set(first["seed"].to_pylist()) & set(third["seed"].to_pylist())


def test_adapters_against_the_policy_before(tmp_path, tiny_llama):
    file = small_rounds(tmp_path, tiny_llama, reference="previous", per_round=10, replay=0.25)
    _, rows = done(tmp_path, "model.lora={r: 4}", "train.lr=2e-2")
    run = tmp_path / "runs/small"
    assert (run / "final/adapter_config.json").is_file() and file.is_file()
    assert [row["first_loss"] for row in rows[1:]] == pytest.approx([np.log(2)] * 2, abs=1e-5)
    assert rows[2]["reference"] != rows[1]["reference"] and rows[2]["eval_success"] > rows[0]["eval_success"]
    assert rows[1]["replayed"] == 0 < rows[2]["replayed"] <= rows[1]["pairs"]
    slices = [set(pq.read_table(run / f"round-{number:03d}/samples.parquet")["prompt_id"].to_pylist()) for number in (1, 2)]
    assert len(slices[0]) == len(slices[1]) == 10 and not slices[0] & slices[1], "disjoint"
    said, again = done(tmp_path, "model.lora={r: 4}", "train.lr=2e-2")
    assert "already complete" in said and again == rows


def test_offline_rounds_sample_once(tmp_path, tiny_llama):
    small_rounds(tmp_path, tiny_llama, offline=True)
    said, rows = done(tmp_path)
    run = tmp_path / "runs/small"
    assert not any((run / "round-002" / name).exists() for name in ("samples.parquet", "scores.parquet"))
    found = tables(run, "pair_id")
    assert found["round-001/pairs.parquet"].equals(found["round-002/pairs.parquet"])
    assert said.count("329/329 answers") == 1, "sampled once, with the measurement before round 1"
    assert said.count("248/248 answers") == 1, "scored once"
    assert rows[2]["cache_hits"] == rows[2]["wanted"] == rows[1]["wanted"] > 0 == rows[1]["cache_hits"]
    assert rows[2]["eval_success"] > rows[0]["eval_success"]
    ledger = json.loads((run / "rounds.json").read_text())
    assert ledger["status"] == "done" and ledger["rounds"][2]["over"]


def test_held_out_answers_have_duels_with_those_of_the_initial_model(tmp_path, tiny_llama):
    """The judge likes longer texts. The reward of a measurement is a win rate against the measurement before round 1."""
    with serving(longer) as server:
        judge = {"judge": {"url": server.url, "model": "tiny"}, "opponents": 99}
        sample = {"n": 8, "max_tokens": 4, "temperature": 0.9}
        small_rounds(tmp_path, tiny_llama, rewards=[judge], sample=sample, measure={"n": 4, "success": 0.6})
        _, rows = done(tmp_path)
    before, _, after = (
        pq.read_table(tmp_path / f"runs/small/round-{number:03d}/held_out.parquet").to_pylist() for number in range(3)
    )
    assert rows[0]["eval_reward"] == pytest.approx(0.5) and rows[2]["eval_reward"] > 0.7
    assert [row["eval_success"] for row in rows] == pytest.approx([row["eval_reward"] for row in rows])
    theirs = {}
    for row in before:
        theirs.setdefault((row["prompt_id"], row["sample"] == -1), []).append(row["answer"])
    for row in before + after:
        won = [
            0.5 if text == row["answer"] or len(text) == len(row["answer"]) else float(len(row["answer"]) > len(text))
            for text in theirs[row["prompt_id"], row["sample"] == -1]
        ]
        assert row["reward"] == pytest.approx(np.mean(won))
