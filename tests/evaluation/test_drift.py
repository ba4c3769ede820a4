"""The drift against its exact value, in a world where every answer can be enumerated."""

import copy

import numpy as np
import pytest
import torch
from tiny_world import LONGEST, STOP, exact_log_probs, make_world, sequences

from raydpo.answers.draws import Draw
from raydpo.answers.transformers_engine import answer_all
from raydpo.evaluation.drift import exact_steps, measure_drift
from raydpo.model.layout import PromptGroup
from raydpo.model.logps import LogpModel
from raydpo.model.selfcheck import choose_layout

CPU = torch.device("cpu")
PROMPT = np.array([1, 3, 2], np.int32)
SAMPLES, SEEDS = 200, 60


@pytest.fixture(scope="module")
def world():
    """Two models, and for each answer its log-prob by definition, its log-prob by our scorer, and its exact steps."""
    models = make_world(0)
    every = sequences()
    found = {"models": models, "every": every}
    for side in ("policy", "reference"):
        found[side] = exact_log_probs(getattr(models, side), PROMPT, every)
    scorers = {}
    for side in ("policy", "reference"):
        scorers[side] = LogpModel(copy.deepcopy(getattr(models, side)))
        choose_layout(scorers[side], CPU)
        group = PromptGroup(PROMPT, tuple(np.array(ids, np.int32) for ids in every))
        scored = scorers[side].score([group], CPU)[0]
        found[f"scored {side}"] = np.array([float(each.astype(float).sum()) for each in scored])
    found["steps"] = np.array(
        [
            exact_steps(scorers["policy"], scorers["reference"], PromptGroup(PROMPT, (np.array(ids, np.int32),)), CPU)
            for ids in every
        ]
    )
    found["exact"] = float((np.exp(found["policy"]) * (found["policy"] - found["reference"])).sum())
    found["scorers"] = scorers
    return found


def test_the_world_is_whole(world):
    assert np.exp(world["policy"]).sum() == pytest.approx(1.0) and np.exp(world["reference"]).sum() == pytest.approx(1.0)
    assert len(world["every"]) == 1 + 4 + 4 * 4 * 5
    assert world["exact"] > 0.05, "two models that agree would prove nothing"
    for side in ("policy", "reference"):
        assert world[f"scored {side}"] == pytest.approx(world[side], abs=1e-4)


def test_exact_steps_add_up_to_the_divergence(world):
    """The expected sum of the steps' divergences equals the divergence of whole answers, up to rounding (chain rule)."""
    assert (np.exp(world["policy"]) * world["steps"]).sum() == pytest.approx(world["exact"], abs=1e-5)
    assert (world["steps"] >= -1e-6).all()


def test_the_estimate_agrees_within_its_error(world):
    """Real samples of the real sampling code, many seeds: the intervals of both estimators hold the exact value as often as
    they say, neither has a bias, and the exact steps vary less."""
    place = {ids: number for number, ids in enumerate(world["every"])}
    ratios = world["scored policy"] - world["scored reference"]
    found = []
    for seed in range(SEEDS):
        answers = answer_all(
            world["models"].policy,
            [PROMPT] * SAMPLES,
            [Draw(seed=seed, sample=number) for number in range(SAMPLES)],
            max_tokens=LONGEST,
            stop=[STOP],
            batch=SAMPLES,
        )
        numbers = np.array([place[tuple(ids.tolist())] for ids in answers])
        lengths = np.array([len(ids) for ids in answers])
        found.append(measure_drift(ratios[numbers], lengths, np.zeros(SAMPLES, int), world["steps"][numbers]))
    tokens = float((np.exp(world["policy"]) * [len(ids) for ids in world["every"]]).sum())
    for estimate in (found, [one["rao_blackwell"] for one in found]):
        for key, exact in (("kl", world["exact"]), ("kl_per_token", world["exact"] / tokens)):
            covered = sum(one[key]["low"] <= exact <= one[key]["high"] for one in estimate)
            assert covered >= 0.86 * SEEDS, (key, covered)  # of 57 expected; 52 or more have a chance of 99 %
        values = np.array([one["kl"]["value"] for one in estimate])
        errors = np.array([one["std_error"] for one in estimate])
        assert abs(values.mean() - world["exact"]) < 4 * errors.mean() / np.sqrt(SEEDS)
        assert values.std() == pytest.approx(errors.mean(), rel=0.35)
    assert np.mean([one["rao_blackwell"]["std_error"] for one in found]) < 0.7 * np.mean([one["std_error"] for one in found])


def test_a_policy_that_is_the_reference_has_not_drifted(world):
    scorer = world["scorers"]["policy"]
    group = PromptGroup(PROMPT, (np.array([2, 4, 0], np.int32),))
    assert exact_steps(scorer, scorer, group, CPU) == 0.0
    none = np.zeros(8)
    drift = measure_drift(none, np.full(8, 3), np.arange(8), none)
    assert drift["kl"] == {"value": 0.0, "low": 0.0, "high": 0.0} and drift["std_error"] == 0.0
    assert drift["kl_per_token"]["value"] == 0.0


def test_the_error_is_of_prompts_where_there_are_several():
    """Ten samples to each of two prompts are two observations, not twenty."""
    ratios = np.repeat([1.0, 3.0], 10)
    drift = measure_drift(ratios, np.full(20, 4), np.repeat([0, 1], 10), None)
    assert drift["kl"]["value"] == 2.0 and drift["std_error"] == pytest.approx(1.0)
    assert drift["kl_per_token"]["value"] == 0.5 and drift["rao_blackwell"] is None
    assert measure_drift(ratios[:1], np.array([4]), np.array([0]), None)["std_error"] is None
