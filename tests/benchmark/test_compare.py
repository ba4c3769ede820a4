"""Figures worked out by hand for two made-up sides, and what counts as a difference between them."""

import dataclasses
import math

import numpy as np
import pytest

from raydpo.benchmark.compare import Measurement, disagreements, fastest, figures, median_ratio, ratios
from raydpo.benchmark.job import Result
from raydpo.data.shapes import Shapes
from raydpo.model.cost import ModelCost

GIB = 2.0**30


def result(**values):
    same = {"losses": [0.6931, 0.68, 0.67], "chosen_logps": [-50.0] * 3, "rejected_logps": [-60.0] * 3}
    return Result(**{"load_seconds": 1.0} | (same if "step_seconds" in values else {}) | values)


@pytest.fixture
def measured():
    """Eight pairs of 10 + (20 + 30) tokens, two in a step; three of four steps were taken."""
    reference = {"ref_chosen": [-100.0] * 8, "ref_rejected": [-200.0] * 8}
    return Measurement(
        names=[f"pair:{number}" for number in range(8)],
        shapes=Shapes.of_lengths(np.full(8, 10), np.full(8, 20), np.full(8, 30)),
        score=result(reference_seconds=4.0, peak_bytes=1 * GIB, **reference),
        train=result(step_seconds=[9.0, 2.0, 4.0], peak_bytes=2 * GIB),
        cached=result(reference_seconds=6.0, step_seconds=[1.0, 3.0, 8.0], peak_bytes=4 * GIB, **reference),
        online=result(step_seconds=[1.0, 6.0, 10.0], peak_bytes=5 * GIB),
        dtype="float32",
        model=ModelCost(parameters=10, active=3, hidden=1, vocabulary=5, layers=1, attention_width=1),
        lora=True,
        peak=1000.0,
        pairs_per_step=2,
        warmup=1,
    )


def test_ratios(measured):
    assert median_ratio([1.0, 3.0, 8.0], [9.0, 2.0, 4.0], 1) == 1.75
    found = ratios(measured)
    assert found["reference_pass"] == {"ratio": 1.5}
    assert found["train_step"] == {"ratio_vs_cached": 1.75, "ratio_vs_online": 2.75}
    assert found["memory"] == {"ratio": 2 / 5, "ratio_vs_cached": 2 / 4}
    assert found["memory_alike"] == {"ratio": None, "ratio_vs_cached": None}


def of_batch(size, positions, seconds, gib, reference=None):
    passes = 8 // size
    facts = {"pairs_per_pass": size, "forward_passes": passes, "positions": passes * positions, "largest_pass": positions}
    return result(
        step_seconds=[9.0, seconds, seconds],
        reference_seconds=reference,
        peak_bytes=gib * GIB,
        facts=facts,
    )


def test_the_fastest_batch_is_compared_and_memory_at_positions_alike():
    one, two, eight = of_batch(1, 1000, 4.0, 1.0, 8.0), of_batch(2, 2000, 3.0, 1.5, 6.0), of_batch(8, 8000, 5.0, 9.0, 2.0)
    best = fastest([one, two, eight], warmup=1)
    assert best.facts["pairs_per_pass"] == 2 and best.peak_bytes == 1.5 * GIB
    assert best.reference_seconds == 2.0, "the fastest reference pass"
    online = [of_batch(1, 1000, 4.0, 2.0), of_batch(8, 8000, 3.0, 18.0)]
    assert fastest(online, warmup=1) is online[1]


def test_memory_is_compared_at_positions_alike(measured):
    tried = {
        "cached": [of_batch(1, 1000, 4.0, 4.0), of_batch(8, 8000, 3.0, 9.0)],
        "online": [of_batch(1, 1000, 4.0, 8.0), of_batch(8, 8000, 3.0, 18.0)],
    }
    train = dataclasses.replace(measured.train, facts={"largest_pass": 1200})
    measured = dataclasses.replace(measured, train=train, tried=tried)
    found = figures(measured)
    assert found["memory_alike"]["online"] == {"bytes": 8 * GIB, "largest_pass": 1000}
    assert [one["bytes"] for one in found["tried"]["cached"]] == [4 * GIB, 9 * GIB]
    assert ratios(measured)["memory_alike"] == {"ratio": 2 / 8, "ratio_vs_cached": 2 / 4}


def test_figures(measured):
    found = figures(measured)
    # 60 real tokens a pair; 10*10/2 + 10*50 + (20*20 + 30*30)/2 = 1200 looks; 50 predictions.
    flops = 60 * 6 + 1200 * 4 + 50 * 10
    assert found["reference_pass"]["raydpo"] == {
        "seconds": 4.0,
        "pairs_per_second": 2.0,
        "tokens_per_second": 120.0,
        "mfu": pytest.approx(8 * flops / 4 / 1000),
    }
    # Of two counted steps of 2 and 4 seconds; adapters: twice the products of the layers, three times attention's.
    trained = 60 * 6 * 2 + 1200 * 4 * 3 + 50 * 10 * 2
    assert found["train_step"]["raydpo"] == {
        "seconds": 3.0,
        "pairs_per_second": 0.75,
        "tokens_per_second": 45.0,
        "mfu": pytest.approx((2 * trained / 2 + 2 * trained / 4) / 2 / 1000),
    }
    assert found["memory"]["raydpo"] == {"bytes": 2 * GIB, "scoring_bytes": 1 * GIB, "training_bytes": 2 * GIB}


def test_nothing_is_compared_with_what_was_left_out(measured):
    found = ratios(dataclasses.replace(measured, online=None))
    assert found["train_step"]["ratio_vs_online"] is None
    assert found["memory"] == {"ratio": None, "ratio_vs_cached": 0.5}


def test_equal_sides_agree(measured):
    problems, gaps = disagreements(measured)
    assert problems == [] and set(gaps.values()) == {0.0}


@pytest.mark.parametrize("value", [-200.01, math.nan])
def test_a_wrong_log_prob_is_named(measured, value):
    wrong = dataclasses.replace(measured.cached, ref_rejected=[-200.0] * 6 + [value, -200.0])
    problems, _ = disagreements(dataclasses.replace(measured, cached=wrong))
    assert len(problems) == 1
    for words in ("1 pairs differ", "pair:6", "rejected", "-200 with raydpo", f"{value:.6g} with TRL"):
        assert words in problems[0]


def test_bfloat16_rounds_more_but_not_any_more(measured):
    def problems(gap):
        cached = dataclasses.replace(measured.cached, ref_chosen=[-100.0 + gap] * 8, losses=[0.6931, 0.5, 0.4])
        online = dataclasses.replace(measured.online, losses=[0.6931, 0.5, 0.4])
        return disagreements(dataclasses.replace(measured, dtype="bfloat16", cached=cached, online=online))[0]

    # Of 20 + 30 tokens a pair.
    assert problems(2.0) == []
    assert len(problems(3.0)) == 1


@pytest.mark.parametrize(
    ("field", "values", "words"),
    [
        ("losses", [0.6935, 0.68, 0.67], "loss of step 1"),
        ("losses", [0.6931, 0.68, 0.672], "loss of step 3"),
        ("losses", [0.6931, math.nan, 0.67], "loss of step 2"),
        ("chosen_logps", [-50.1] * 3, "chosen completions of the first"),
    ],
)
def test_training_that_differs_is_refused(measured, field, values, words):
    online = dataclasses.replace(measured.online, **{field: values})
    problems, _ = disagreements(dataclasses.replace(measured, online=online))
    assert len(problems) == 1 and words in problems[0] and "online" in problems[0]
