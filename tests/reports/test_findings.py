"""The findings of a run, each from the figures that lead to it."""

import dataclasses

import numpy as np
import polars as pl
import pytest

from raydpo.reports.findings import findings
from raydpo.rundir.read import RunRecord
from raydpo.rundir.watch import TrainingWatch

EMPTY = RunRecord(
    "place",
    "run",
    {},
    pl.DataFrame({"step": []}, schema={"step": pl.Int64}),
    pl.DataFrame({"step": []}, schema={"step": pl.Int64}),
    None,
    None,
)


def titles(steps=None, evals=None, **fields):
    run = dataclasses.replace(EMPTY, **fields)
    if steps is not None:
        count = len(next(iter(steps.values())))
        run = dataclasses.replace(run, steps=pl.DataFrame({"step": np.arange(1, count + 1)} | steps))
    if evals is not None:
        run = dataclasses.replace(run, evals=pl.DataFrame(evals))
    return [one.title for one in findings(run)]


def test_nothing_stands_out_in_an_empty_or_a_good_run():
    assert titles() == []
    assert (
        titles(
            {
                "loss": np.linspace(0.69, 0.4, 50),
                "rewards/accuracies": np.full(50, 0.8),
                "logratio/chosen_per_token": np.full(50, -0.1),
                "aux_loss": np.linspace(8.2, 9, 50),
                "skipped": np.zeros(50),
                "time/step": np.ones(50),
                "time/checkpoint": np.full(50, 0.01),
            },
            {
                "step": [0, 25, 50],
                "loss": [0.69, 0.5, 0.45],
                "rewards/accuracies": [0.5, 0.7, 0.78],
                "logps/chosen_fell": [0.0, 0.2, 0.3],
                "length/margin_correlation": [0.0, 0.1, 0.1],
            },
            summary={"held_out_pairs": 200},
        )
        == []
    )


@pytest.mark.parametrize(
    ("steps", "evals", "title"),
    [
        ({"logratio/chosen_per_token": np.linspace(0, -1.5, 100)}, None, "The chosen answers have collapsed"),
        (None, {"step": [0, 9], "logps/chosen_fell": [0.0, 0.85]}, "Chosen answers became less likely"),
        (None, {"step": [0, 9], "length/margin_correlation": [0.0, -0.4]}, "The margin follows length"),
        ({"length/margin_correlation": np.full(30, 0.5)}, None, "The margin follows length"),
        (None, {"step": [0, 9], "loss": [0.69, 0.68], "rewards/accuracies": [0.5, 0.53]}, "Not yet better than a coin"),
        (
            {"rewards/accuracies": np.full(30, 1.0)},
            {"step": [0, 9], "loss": [0.69, 0.5], "rewards/accuracies": [0.5, 0.7]},
            "Better on training pairs than on others",
        ),
        (None, {"step": [0, 9, 18], "loss": [0.69, 0.5, 0.6]}, "The held-out loss has risen again"),
        ({"skipped": np.array([0.0, 1.0, 0.0])}, None, "Steps were skipped"),
        ({"time/step": np.ones(10), "time/checkpoint": np.full(10, 0.06)}, None, "Checkpoints take long"),
        ({"time/step": np.ones(10), "time/evaluation": np.full(10, 0.3)}, None, "Evaluations take long"),
        ({"time/step": np.ones(10), "time/wait": np.full(10, 0.2)}, None, "Workers wait for one another"),
        ({"aux_loss": np.linspace(8.2, 16, 80)}, None, "The routers send more tokens to fewer experts"),
        ({"slowest_rank": np.ones(30), "slowest_lag": np.full(30, 0.5)}, None, "One worker is slow"),
    ],
)
def test_a_finding(steps, evals, title):
    assert titles(steps, evals, summary={"held_out_pairs": 300, "train_seconds": 0}) == [title]


@pytest.mark.parametrize(("margin", "grows"), [(0.2, True), (-0.1, False)])
def test_that_the_margin_grows_is_said_only_where_it_does(margin, grows):
    evals = pl.DataFrame({"step": [0, 9], "logps/chosen_fell": [0.0, 0.9], "rewards/margins": [0.0, margin]})
    (found,) = findings(dataclasses.replace(EMPTY, evals=evals))
    assert ("The margin grows" in found.why) == grows and ("has not grown" in found.why) != grows


def test_a_growth_of_length_counts_from_its_lower_end():
    def evaluation(low):
        return {"generation": {"modes": {"greedy": {"length_growth": {"value": 0.3, "low": low, "high": 0.5}}}}}

    assert titles(evaluation=evaluation(0.2)) == ["Answers have grown longer"]
    assert titles(evaluation=evaluation(-0.1)) == titles(evaluation=evaluation(None)) == []


def test_the_last_checkpoint_counts_and_so_does_its_time():
    """The last checkpoint comes after the last recorded step, so its seconds are in the summary only."""
    steps = {"time/step": np.ones(10), "time/checkpoint": np.full(10, 0.01)}
    assert titles(steps, summary={"checkpoint_seconds": 0.4, "train_seconds": 10.0}) == []
    run = dataclasses.replace(
        EMPTY,
        steps=pl.DataFrame({"step": np.arange(1, 11)} | steps),
        summary={"checkpoint_seconds": 30.1, "train_seconds": 10.0},
    )
    assert [(one.title, one.found) for one in findings(run)] == [("Checkpoints take long", "75% of the training's time.")]


def test_a_spike_is_one_that_the_training_would_have_called_so():
    random = np.random.default_rng(1)
    loss = np.exp(-np.arange(200) / 150) * random.uniform(0.9, 1.1, 200)
    loss[[60, 150]] *= 3
    warned, watch = [], TrainingWatch([])
    for step, value in enumerate(loss, 1):
        warned += watch.look(step, {"loss": value, "logratio/chosen_per_token": 0.0})
    found = findings(dataclasses.replace(EMPTY, steps=pl.DataFrame({"step": np.arange(1, 201), "loss": loss})))
    assert len(warned) == 1 and "the loss of step 61 is" in warned[0]
    assert [one.title for one in found] == ["The loss has spiked"]
    assert found[0].found.split(" on average")[0] in warned[0].replace("the loss", "The loss", 1)


WRONG, COIN = "Ranks held-out pairs the wrong way round", "Not yet better than a coin"


@pytest.mark.parametrize(
    ("accuracy", "pairs", "effective", "title"),
    [
        (0.3, 500, None, WRONG),
        (0.3, 500, 12.0, COIN),
        (0.0, 3, None, COIN),
        (1.0, 3, None, COIN),
        (1.0, 4, None, None),
        (0.55, 500, None, None),
        (0.55, 500, 180.0, COIN),
    ],
)
def test_an_accuracy_is_judged_by_its_interval(accuracy, pairs, effective, title):
    """A share of 1 has an interval too, and pairs of the same prompt count for less."""
    row = {"step": [0, 9], "loss": [0.69, 0.5], "rewards/accuracies": [0.5, accuracy]}
    more = {} if effective is None else {"pairs": [float(pairs)] * 2, "effective_pairs": [float(pairs), effective]}
    assert titles(evals=row | more, summary={"held_out_pairs": pairs}) == ([] if title is None else [title])
    if more:  # a run that still goes on has no summary
        assert titles(evals=row | more) == [title]


def test_rewards_are_not_calibrated_where_chance_does_not_tell_it():
    def evaluation(error, chance):
        total = {"calibration_error": error, "calibration_chance": chance}
        return {"preferences": {"total": total if chance is not None else {"calibration_error": error}}}

    assert titles(evaluation=evaluation(0.14, 0.12)) == ["The rewards are not calibrated"]
    assert titles(evaluation=evaluation(0.14, 0.18)) == titles(evaluation=evaluation(0.06, 0.03)) == []
    assert titles(evaluation=evaluation(0.14, None)) == [], "an evaluation of before says nothing of chance"


@pytest.mark.parametrize(
    ("config", "lengths", "told"),
    [
        ({"beta": 0.1}, True, "train.loss=sigmoid_norm train.beta=15 takes"),
        ({"beta": {"start": 0.2, "end": 0.1}}, True, "train.loss=sigmoid_norm train.beta={start: 30, end: 15} takes"),
        ({"beta": 0.1}, False, "train.loss=sigmoid_norm, with train.beta times the mean length of an answer, takes"),
        ({"beta": 5, "loss": "sigmoid_norm"}, True, "how much of it is in the data."),
    ],
)
def test_the_loss_per_token_is_told_with_its_beta(config, lengths, told):
    steps = {"length/margin_correlation": np.full(30, 0.5)}
    steps |= {"length/chosen": np.full(30, 100.0), "length/rejected": np.full(30, 200.0)} if lengths else {}
    run = dataclasses.replace(EMPTY, config={"train": config}, steps=pl.DataFrame({"step": np.arange(1, 31)} | steps))
    assert told in findings(run)[0].why


@pytest.mark.parametrize(("loss", "advised"), [("sigmoid", True), ("ipo", False), ("simpo", False)])
def test_a_loss_per_token_is_not_advised_where_there_is_one(loss, advised):
    evals = pl.DataFrame(
        {"step": [9], "length/margin_correlation": [0.5], "length/chosen": [2000.0], "length/rejected": [1000.0]}
    )
    run = dataclasses.replace(EMPTY, evals=evals, config={"train": {"loss": loss, "beta": 0.1}})
    (found,) = findings(run)
    assert ("train.loss=sigmoid_norm train.beta=150 takes" in found.why) == advised
    assert advised or found.why.endswith("in the data.")
