"""Rounds whose answers are vLLM's: each round asks the policy of that round. See ``test_vllm`` for how to run it."""

import os

import numpy as np
import pyarrow.parquet as pq
import pytest
from command import raydpo
from small import small_rounds, tables
from tiny import make_model

from raydpo.answers.transformers_engine import answer_all
from raydpo.data.tokenise import Tokeniser, load_tokenizer
from raydpo.model.load import load_causal_lm

REAL = os.environ.get("RAYDPO_VLLM_PYTHON")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(REAL is None, reason="RAYDPO_VLLM_PYTHON names no Python with vLLM"),
]
SAMPLE = {"n": 8, "max_tokens": 2, "engine": "vllm", "vllm_python": REAL}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """32 is the smallest head that vLLM has kernels for on a CPU."""
    return make_model(tmp_path_factory.mktemp("models") / "model", hidden=128)


@pytest.mark.parametrize("settings", [[], ["model.lora={r: 4}", "train.lr=2e-2"]], ids=["full", "lora"])
def test_each_round_asks_its_own_policy(tmp_path, model, settings):
    small_rounds(tmp_path, model, sample=SAMPLE)
    result = raydpo("rounds", "config.yaml", *settings, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    run = tmp_path / "runs/small"
    rows = pq.read_table(run / "rounds.parquet").to_pylist(maps_as_pydicts="strict")
    if not settings:  # adapters of a random model learn little in 20 steps
        assert rows[2]["eval_success"] > rows[0]["eval_success"] + 0.2
    assert rows[1]["first_loss"] == pytest.approx(np.log(2), abs=1e-5)
    prompts = {one["prompt_id"]: one["prompt_ids"] for one in pq.read_table(run / "prompts.parquet").to_pylist()}
    stop = tuple(Tokeniser(load_tokenizer(str(model))).stop_ids)
    answers = []
    for number in range(3):
        held_out = pq.read_table(run / f"round-{number:03d}/held_out.parquet").to_pylist()
        greedy = [row for row in held_out if row["sample"] < 0]
        asked = [np.array(prompts[row["prompt_id"]], np.int32) for row in greedy]
        policy = None if number == 0 else str(run / f"round-{number:03d}/train/final")
        base, adapter = (str(model), policy) if settings else (policy or str(model), None)
        loaded = load_causal_lm(base, "float32", adapter=adapter, rope_length=None)
        expected = answer_all(loaded, asked, [None] * len(asked), max_tokens=2, stop=stop, batch=64)
        answers.append([row["answer_ids"] for row in greedy])
        assert np.mean([ids.tolist() == row["answer_ids"] for ids, row in zip(expected, greedy, strict=True)]) >= 0.9
        assert (rows[number]["eval_drift_previous"] == 0) == (number == 0)
    assert answers[0] != answers[1], "the rounds changed the policy"

    before = {name: (run / name).stat().st_mtime_ns for name in tables(run)}
    (run / "round-002/round.json").unlink()
    again = raydpo("rounds", "config.yaml", *settings, cwd=tmp_path)
    assert again.returncode == 0 and {name: (run / name).stat().st_mtime_ns for name in before} == before
