"""Figures of implicit rewards on labelled pairs, computed by hand."""

import math

import numpy as np
import pytest
import torch

from raydpo.config import ObjectiveConfig
from raydpo.data.interval import mean, mean_by_group, share, student95
from raydpo.errors import RaydpoError
from raydpo.evaluation.preferences import ScoredPairs, measure_preferences
from raydpo.evaluation.style import length_growth, measure_style
from raydpo.losses import PairLogps, preference_loss
from raydpo.training.metrics import PairSums

DPO = ObjectiveConfig()


def scored(margins, difference, sources=None, chosen_logratio=0.0, prompts=None):
    """Pairs of these margins in nats; the reference gives every completion -50. Each is of a prompt of its own."""
    margins, difference = np.array(margins, float), np.array(difference)
    reference = np.full(len(margins), -50.0)
    return ScoredPairs(
        chosen=reference + chosen_logratio,
        rejected=reference + chosen_logratio - margins,
        ref_chosen=reference,
        ref_rejected=reference,
        chosen_tokens=100 + difference,
        rejected_tokens=np.full(len(margins), 100),
        sources=np.array(sources or ["all"] * len(margins), object),
        prompts=np.arange(len(margins)) if prompts is None else prompts,
    )


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def test_four_pairs_by_hand():
    pairs = scored([10, 5, -20, 0], [30, -30, 5, 0], sources=["a", "a", "b", "b"], chosen_logratio=-1.0)
    found = measure_preferences(pairs, 0.1, DPO)
    total = found["total"]
    assert total["pairs"] == 4
    assert total["accuracy"] == share(2.5, 4) and total["accuracy"]["value"] == 0.625
    assert total["margin"] == mean(np.array([1, 0.5, -2, 0]))
    assert total["margin"]["value"] == pytest.approx(-0.125)
    # Student's quantile of three degrees of freedom, of the sample variance.
    spread = student95(3) * np.std([1, 0.5, -2, 0], ddof=1) / 2
    assert total["margin"]["high"] - total["margin"]["value"] == pytest.approx(spread)
    assert total["loss"] == pytest.approx(-np.mean([math.log(sigmoid(m)) for m in (1, 0.5, -2, 0)]))
    assert total["chosen_fell"]["value"] == 1.0
    assert total["longer_is_right"]["pairs"] == 2 and total["longer_is_right"]["accuracy"]["value"] == 0.5
    assert total["longer_is_wrong"]["pairs"] == 1 and total["longer_is_wrong"]["accuracy"]["value"] == 1.0
    assert found["by_source"]["a"]["accuracy"]["value"] == 1.0 and found["by_source"]["b"]["accuracy"]["value"] == 0.25
    bins = {(one["from"], one["to"]): one["pairs"] for one in found["by_length"]}
    assert bins[26, 100] == 1 and bins[-100, -26] == 1 and bins[1, 25] == 1 and bins[0, 0] == 1
    assert sum(bins.values()) == 4


def test_calibration_by_hand():
    """Confidences 0.731, 0.622, 0.881 (wrong) and 0.5 (a tie) lie in the bins that begin at 0.7, 0.6, 0.85 and 0.5."""
    total = measure_preferences(scored([10, 5, -20, 0], [0, 0, 0, 0]), 0.1, DPO)["total"]
    filled = {round(one["from"], 2): one for one in total["calibration"] if one["pairs"]}
    assert set(filled) == {0.7, 0.6, 0.85, 0.5}
    assert filled[0.7]["predicted"] == pytest.approx(sigmoid(1)) and filled[0.7]["observed"] == 1.0
    assert filled[0.85]["observed"] == 0.0 and filled[0.5]["observed"] == 0.5
    expected = ((1 - sigmoid(1)) + (1 - sigmoid(0.5)) + sigmoid(2) + 0) / 4
    assert total["calibration_error"] == pytest.approx(expected)


def test_a_calibrated_policy_has_little_error_and_a_boastful_one_much():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 20_000)
    labels = np.where(rng.random(20_000) < 1 / (1 + np.exp(-np.abs(logits))), 1, -1)
    margins = np.abs(logits) * labels
    honest = measure_preferences(scored(margins, np.zeros(20_000, int)), 1.0, DPO)["total"]
    boastful = measure_preferences(scored(3 * margins, np.zeros(20_000, int)), 1.0, DPO)["total"]
    assert honest["calibration_error"] < 0.01 < 0.1 < boastful["calibration_error"]
    assert all(one["low"] <= one["observed"] <= one["high"] for one in honest["calibration"])


def test_a_calibrated_policy_of_few_pairs_is_within_chance():
    """A calibrated policy has an error of 0.13 on average with 64 pairs, and more with four copies of each of 32 pairs."""
    rng = np.random.default_rng(1)
    alone = boastful = alike = 0
    for _ in range(200):
        logits = np.abs(rng.normal(0, 1.5, 64))
        honest = logits * np.where(rng.random(64) < 1 / (1 + np.exp(-logits)), 1, -1)
        for factor in (1, 4):
            total = measure_preferences(scored(factor * honest, np.zeros(64, int)), 1.0, DPO)["total"]
            above = total["calibration_error"] > total["calibration_chance"]
            alone, boastful = (alone + above, boastful) if factor == 1 else (alone, boastful + above)
        same = scored(np.repeat(honest[:32], 4), np.zeros(128, int), prompts=np.repeat(np.arange(32), 4))
        total = measure_preferences(same, 1.0, DPO)["total"]
        alike += total["calibration_error"] > total["calibration_chance"]
    assert alone <= 20 and alike <= 20 and boastful >= 180


def test_intervals_are_over_prompts():
    rng = np.random.default_rng(2)
    margins, prompts = np.repeat(rng.normal(0.5, 1, 40), 6), np.repeat(np.arange(40), 6)
    one = measure_preferences(scored(margins[::6], np.full(40, 10)), 1.0, DPO)["total"]
    six = measure_preferences(scored(margins, np.full(240, 10), prompts=prompts), 1.0, DPO)["total"]
    assert (six["pairs"], six["prompts"], one["prompts"]) == (240, 40, 40)
    for found, alone in (
        (six["accuracy"], one["accuracy"]),
        (six["margin"], one["margin"]),
        (six["log_likelihood_accuracy"], one["log_likelihood_accuracy"]),
        (six["longer_is_right"]["accuracy"], one["longer_is_right"]["accuracy"]),
    ):
        assert found == pytest.approx(alone, abs=0.01) and found["low"] < found["value"]


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_rounding_is_a_tie_at_every_beta(beta):
    assert measure_preferences(scored([2e-4, -2e-4, 5], [0, 0, 0]), beta, DPO)["total"]["accuracy"] == share(2, 3)


def test_the_reference_itself_knows_nothing():
    total = measure_preferences(scored(np.zeros(30), np.arange(30) - 15), 0.1, DPO)["total"]
    assert total["accuracy"]["value"] == 0.5 and total["margin"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert total["loss"] == pytest.approx(math.log(2)) and total["calibration_error"] == 0.0
    assert total["chosen_fell"]["value"] == 0.0
    assert total["longer_is_wrong"]["accuracy"]["value"] == total["longer_is_right"]["accuracy"]["value"] == 0.5


def test_rewards_per_token():
    pairs = ScoredPairs(
        *(np.array([value], float) for value in (-40, -90, -50, -100, 10, 40)), np.array(["a"], object), np.array([0])
    )
    assert pairs.margins(0.5, DPO) == pytest.approx(0.0)
    assert pairs.margins(0.5, ObjectiveConfig(loss="sigmoid_norm")) == pytest.approx(0.5 * (10 / 10 - 10 / 40))


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "simpo"},
        {"loss": "cpo"},
        {"loss": "orpo"},
        {"f_divergence_type": "forward_kl"},
        {"loss": "ipo"},
        {"f_divergence_type": "js_divergence"},
        {"loss": "sigmoid_norm", "f_divergence_type": "alpha_divergence"},
    ],
)
def test_rewards_are_those_of_the_training(settings):
    """Accuracy and margin equal those of the evaluation in training, from the same log-probs."""
    random = np.random.default_rng(8)
    tokens = random.integers(5, 60, (2, 40))
    reference = -1.5 * tokens + random.normal(0, 3, (2, 40))
    chosen, rejected = reference + random.normal(0, 2, (2, 40))
    pairs = ScoredPairs(chosen, rejected, *reference, *tokens, np.full(40, "a", object), np.arange(40))
    total = measure_preferences(pairs, 0.3, ObjectiveConfig(**settings))["total"]
    logps = PairLogps(*(torch.from_numpy(np.asarray(each, float)) for each in (chosen, rejected, *reference, *tokens)))
    sums = PairSums(["a"], torch.device("cpu"))
    sums.add(
        preference_loss(settings.pop("loss", "sigmoid"), logps, beta=0.3, **settings),
        logps,
        torch.zeros(40, dtype=torch.long),
    )
    assert total["margin"]["value"] == pytest.approx(sums.metrics()["rewards/margins"])
    assert total["accuracy"]["value"] == pytest.approx(sums.metrics()["rewards/accuracies"])
    assert total["margin"]["value"] != pytest.approx(measure_preferences(pairs, 0.3, DPO)["total"]["margin"]["value"])


def test_too_few_pairs_say_so():
    total = measure_preferences(scored([1.0], [0]), 0.1, DPO)["total"]
    assert total["margin"] == {"value": pytest.approx(0.1), "low": None, "high": None}
    assert total["longer_is_wrong"] == {"pairs": 0, "accuracy": {"value": None, "low": None, "high": None}}


def test_style_by_hand():
    answers = [np.array([5, 6, 5, 6, 5, 6, 5, 2]), np.array([7, 2]), np.array([8, 9, 8])]
    style = measure_style(answers, stop=[2], prompts=np.array([0, 0, 1]))
    assert style["tokens"] == mean_by_group(np.array([8, 2, 3]), np.array([0, 0, 1]))
    assert style["tokens"]["value"] == pytest.approx(13 / 3)
    # 5656 6565 5656 6565 5652: three of five 4-grams are new; the others have fewer than 4 tokens.
    assert style["repetition"] == pytest.approx(2 / 5)
    assert style["distinct_1"] == pytest.approx(6 / 13) and style["distinct_2"] == pytest.approx(6 / 10)
    assert style["cut"] == pytest.approx(1 / 3)


def test_length_growth_by_hand():
    """Two prompts: answers of 6 and 3 tokens against 3 and 6."""
    policy, reference = [np.ones(4), np.ones(8), np.ones(3), np.ones(3)], [np.ones(2), np.ones(4), np.ones(6), np.ones(6)]
    growth = length_growth(policy, reference, np.array([0, 0, 1, 1]))
    assert growth["value"] == 0.0 and growth["low"] == -growth["high"] == pytest.approx(-student95(1) * 3 / 4.5)
    assert length_growth([np.ones(9)], [np.ones(6)], np.array([5])) == {"value": 0.5, "low": None, "high": None}


LENGTHS = {
    "uniform": lambda random, count: random.integers(10, 129, count),
    "lognormal": lambda random, count: np.minimum(np.exp(random.normal(np.log(60), 0.6, count)).astype(int) + 1, 128),
    "geometric": lambda random, count: np.minimum(random.geometric(1 / 60, count), 128),
}


@pytest.mark.parametrize("kind", LENGTHS)
def test_answers_of_equal_lengths_have_not_grown(kind):
    """Both sides from one distribution. The mean of the 64 ratios is 0.3 to 2.7 above 1 in these draws."""
    random, draw = np.random.default_rng(11), LENGTHS[kind]
    held, found = 0, []
    for _ in range(300):
        policy, reference = ([np.empty(length) for length in draw(random, 64)] for _ in range(2))
        growth = length_growth(policy, reference, np.arange(64))
        found.append(growth["value"])
        held += growth["low"] <= 0 <= growth["high"]
    assert np.mean(found) == pytest.approx(0, abs=0.05) and held == pytest.approx(0.95 * 300, abs=10)


def test_rewards_that_overflow_are_an_error_with_a_way_out():
    with pytest.raises(RaydpoError, match=r"rewards of 1 pairs are not finite under forward_kl.*evaluate\.log_ratios=sum"):
        measure_preferences(
            scored([10, 5], [0, 0], chosen_logratio=np.array([-800.0, 1.0])),
            0.1,
            ObjectiveConfig(f_divergence_type="forward_kl"),
        )
