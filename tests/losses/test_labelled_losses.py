"""Losses of completions with labels, alone and mixed with pairs, against values by hand."""

import math

import pytest
import torch

from raydpo.config import ObjectiveConfig
from raydpo.losses import Objective, ObjectiveState, PairLogps

BETA = 0.1
# Rows: a pair; a desirable and two undesirable completions alone. The other side of these is the mismatched completion.
CHOSEN, REF_CHOSEN = [-10.0, -8.0, -31.0, -20.0], [-12.0, -11.0, -30.0, -24.0]
REJECTED, REF_REJECTED = [-14.0, -26.0, -9.0, -7.0], [-13.0, -27.0, -12.0, -5.0]
LABELS = [0, 1, -1, -1]
DESIRABLE, UNDESIRABLE = [2.0, 3.0], [-1.0, 3.0, -2.0]  # log-ratios by label; of the pair first
MISMATCHED = [1.0, -1.0, 4.0]
PAIR = [2.0, -1.0]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def rows(mismatched=True, labels=LABELS):
    tokens = [tensor([5.0] * 4), tensor([7.0] * 4)]
    sides = [tensor(each) for each in (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)]
    if not mismatched:
        for side, alone in ((0, -1), (1, 1)):
            gone = torch.tensor([label == alone for label in labels])
            for each in (sides[side], sides[side + 2], tokens[side]):
                each[gone] = 0
    return PairLogps(*sides, *tokens, labels=torch.tensor(labels, dtype=torch.int8))


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def losses_of(loss, logps, memory=None, **settings):
    config = ObjectiveConfig(loss=loss, beta=BETA, **settings)
    return Objective(config)(logps, BETA, memory)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 1.3)])
def test_kto_shifts_by_the_drift_of_mismatched_completions_and_pairs(weights):
    good, bad = weights
    drift = sum(MISMATCHED + PAIR) / 5
    assert drift == pytest.approx(1.0)

    def desirable(ratio):
        return good * (1 - sigmoid(BETA * (ratio - drift)))

    def undesirable(ratio):
        return bad * (1 - sigmoid(BETA * (drift - ratio)))

    found = losses_of("kto", rows(), desirable_weight=good, undesirable_weight=bad)
    expected = [(desirable(2.0) + undesirable(-1.0)) / 2, desirable(3.0), undesirable(3.0), undesirable(-2.0)]
    assert found.losses.tolist() == pytest.approx(expected, abs=1e-12)
    assert float(found.threshold) == pytest.approx(drift)


@pytest.mark.parametrize("mismatched", [False, True])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 1.3)])
def test_bco_and_apo_have_the_term_of_the_label(mismatched, weights):
    good, bad = weights
    settings = {"desirable_weight": good, "undesirable_weight": bad}
    memory = ObjectiveState(rewards=9, reward_mean=0.4)
    for loss, shift in (("bco", 0.4), ("bco_pair", 0.0)):

        def term(ratio, sign, weight, shift=shift):
            return -weight * math.log(sigmoid(sign * (BETA * ratio - shift)))

        expected = [term(2.0, 1, good) + term(-1.0, -1, bad), term(3.0, 1, good), term(3.0, -1, bad), term(-2.0, -1, bad)]
        assert losses_of(loss, rows(mismatched), memory, **settings).losses.tolist() == pytest.approx(expected, abs=1e-12)
    expected = [good * (1 - sigmoid(0.2)) + bad * sigmoid(-0.1), good * (1 - sigmoid(0.3)), bad * sigmoid(0.3)]
    assert losses_of("apo_zero", rows(mismatched), **settings).losses.tolist()[:3] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("mismatched", [False, True])
def test_sft_is_the_mean_over_tokens_of_desirable_completions(mismatched):
    logps = rows(mismatched)
    losses = losses_of("sft", logps).losses
    assert losses.mean().item() == pytest.approx((10 + 8) / (5 + 5))
    assert losses[2:].tolist() == [0, 0]
    none = rows(mismatched, [-1, -1, -1, -1])
    assert losses_of("sft", none).losses.tolist() == [0] * 4  # and not NaN


@pytest.mark.parametrize("mismatched", [False, True])
def test_bco_remembers_the_rewards_of_the_completions_that_rows_have(mismatched):
    objective = Objective(ObjectiveConfig(loss="bco", beta=BETA))
    _, memory = objective.remember(rows(mismatched), BETA, ObjectiveState(rewards=5, reward_mean=0.1))
    assert memory.rewards == 10
    assert memory.reward_mean == pytest.approx((5 * 0.1 + BETA * sum(DESIRABLE + UNDESIRABLE)) / 10)


def test_dynamic_beta_follows_the_means_of_both_labels():
    objective = Objective(ObjectiveConfig(loss="bco_pair", beta=BETA, dynamic_beta=0.6))
    margin = BETA * (sum(DESIRABLE) / 2 - sum(UNDESIRABLE) / 3)
    beta, memory = objective.remember(rows(), BETA, ObjectiveState())
    assert beta == pytest.approx(BETA * (1 + 0.6 * margin)) and memory.margin_mean == pytest.approx(0.1 * margin)
    one_kind = rows(labels=[1, 1, 1, 1])
    assert objective.remember(one_kind, BETA, ObjectiveState(margin_mean=0.2)) == (BETA, ObjectiveState(margin_mean=0.2))


def test_mismatched_completions_get_no_gradient():
    logps = rows()
    logps.chosen.requires_grad_(), logps.rejected.requires_grad_()
    for loss in ("kto", "bco", "sft"):
        slopes = torch.autograd.grad(
            losses_of(loss, logps, ObjectiveState(1, 0.1)).losses.sum(), (logps.chosen, logps.rejected), allow_unused=True
        )
        chosen, rejected = (torch.zeros(4) if each is None else each for each in slopes)
        assert not chosen[2:].any() and chosen[:2].all() and not rejected[1]


def test_all_pairs_with_labels_are_as_pairs_without():
    import dataclasses

    labelled = rows(labels=[0, 0, 0, 0])
    plain = dataclasses.replace(labelled, labels=None)
    for loss in ("kto", "bco", "bco_pair", "apo_zero", "sft"):
        one, other = (losses_of(loss, each, ObjectiveState(1, 0.1)).losses for each in (labelled, plain))
        torch.testing.assert_close(one, other, rtol=1e-14, atol=0)
