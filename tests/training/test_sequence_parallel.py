"""Dividing the positions of every micro-batch among ranks gives equal losses, norms, evaluations and weights."""

import pytest
from distributed import run_distributed
from kernel import tiny_pairs, train_here, with_reference

from raydpo.config import load_config
from raydpo.errors import ConfigError

STEPS, AT = 6, 3
LORA = {"r": 4, "alpha": 8}
# ZeRO-3 last: while its engine lives, transformers partitions every model it loads.
KINDS = {
    "zero0": dict(zero=0),
    "small batches": dict(zero=2, tokens_per_batch=100),
    "lora": dict(zero=2, lora=LORA),
    "recomputed": dict(zero=1, gradient_checkpointing=True),
    "zero3": dict(zero=3),
}


def trained(table, model, scratch, keep, together, workers, kinds):
    found = {}
    for name in kinds:
        run = train_here(
            table,
            model,
            scratch,
            steps=STEPS,
            checkpoint_every=AT,
            keep=keep / name,
            held_out=table,
            sequence_parallel=together,
            workers=workers,
            **KINDS[name],
        )
        found[name] = (
            run.steps,
            run.evals,
            run.notes,
            {name: value.sum().item() for name, value in run.engine.gather().items()},
        )
    return found


def continued(table, model, scratch, keep):
    run = train_here(table, model, scratch, steps=STEPS, zero=1, checkpoint=keep / f"step-{AT}")
    return [row["loss"] for row in run.steps]


@pytest.fixture(scope="module")
def table(tiny_llama):
    return with_reference(tiny_pairs(17), tiny_llama)


@pytest.mark.parametrize(
    ("workers", "kinds"),
    [
        pytest.param(2, list(KINDS), marks=pytest.mark.slow),
        pytest.param(4, list(KINDS), marks=pytest.mark.slow),
        (4, ["recomputed", "zero3"]),
    ],
    ids=str,
)
def test_ranks_that_compute_together_equal_one(workers, kinds, table, tiny_llama, tmp_path):
    """One group of two ranks, and two groups of two."""
    args = table, tiny_llama
    alone = run_distributed(trained, 1, tmp_path / "1", *args, tmp_path / "s1", tmp_path / "k1", 1, 1, kinds)[0]
    ranks = run_distributed(trained, workers, tmp_path / "2", *args, tmp_path / "s2", tmp_path / "k2", 2, workers, kinds)
    for name, (steps, evals, _, weights) in alone.items():
        ours = ranks[0][name]
        for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "pairs", "tokens"):
            assert [row[key] for row in ours[0]] == pytest.approx([row[key] for row in steps], abs=1e-4, rel=1e-5), name
        assert [row["loss"] for row in ours[0]] == pytest.approx([row["loss"] for row in steps], abs=1e-5), name
        assert [row["eval_loss"] for row in ours[1]] == pytest.approx([row["eval_loss"] for row in evals], abs=1e-5)
        assert ours[3] == pytest.approx(weights, abs=1e-3), name
        assert "sequence parallel: 2 devices compute each micro-batch together" in ours[2][0]
        assert any("12 pairs computed again" in note for note in ours[2])
    # Its checkpoints are continued by one rank that computes alone.
    (rest,) = run_distributed(continued, 1, tmp_path / "rest", *args, tmp_path / "s", tmp_path / "k2" / "recomputed")
    assert rest == pytest.approx([row["loss"] for row in alone["recomputed"][0]][AT:], abs=1e-5)


def test_workers_that_make_no_whole_groups_are_refused(tiny_llama, tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    base = {"output": str(tmp_path / "o"), "model": {"path": str(tiny_llama)}, "data": {"train": str(tmp_path / "a.jsonl")}}
    cases = {
        ("train.sequence_parallel=2", "train.workers=3"): r"workers \(3\) is not a multiple .* set workers to 4",
        ("score.sequence_parallel=2",): r"workers \(1\) is not a multiple of sequence_parallel \(2\)",
        ("train.sequence_parallel=2", "train.workers={min: 2, max: 4}"): "needs a fixed number of workers",
        ("score.sequence_parallel=2", "score.workers=2", "score.gpus_per_worker=0.5"): "whole GPU",
    }
    for overrides, words in cases.items():
        with pytest.raises(ConfigError, match=words):
            load_config(base, overrides)
