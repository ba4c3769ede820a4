"""The loss over ranked lists: values by hand, the gradient of the plain formula, and what is compared."""

import dataclasses
import math

import pytest
import torch

from raydpo.losses import PairLogps, preference_loss
from raydpo.losses.listwise import comparisons


def logps_of(*lists, beta=0.5, requires_grad=False):
    """``PairLogps`` of lists of (score, rank), whose scores are ``beta`` times the log-ratios."""
    sides, ranks, numbers = ([], []), ([], []), []
    for number, entries in enumerate(lists):
        filled = [*entries, (0.0, -1)] if len(entries) % 2 else entries
        for place, (score, rank) in enumerate(filled):
            sides[place % 2].append(score / beta - 7.0)
            ranks[place % 2].append(rank)
        numbers += [number] * (len(filled) // 2)
    policy = [torch.tensor(side, dtype=torch.float64, requires_grad=requires_grad) for side in sides]
    reference = torch.full((len(numbers),), -7.0, dtype=torch.float64)
    tokens = torch.full((len(numbers),), 5.0, dtype=torch.float64)
    return PairLogps(
        *policy,
        reference,
        reference,
        tokens,
        tokens,
        lists=torch.tensor(numbers),
        chosen_ranks=torch.tensor(ranks[0], dtype=torch.int32),
        rejected_ranks=torch.tensor(ranks[1], dtype=torch.int32),
    )


def term(own, *below):
    return -math.log(math.exp(own) / (math.exp(own) + sum(map(math.exp, below))))


GOLD = {
    "three": ([(0.3, 0), (-0.2, 1), (1.1, 2)], [term(0.3, -0.2, 1.1) + term(-0.2, 1.1), 0.0]),
    "four": (
        [(0.3, 0), (-0.2, 1), (1.1, 2), (0.4, 3)],
        [term(0.3, -0.2, 1.1, 0.4) + term(-0.2, 1.1, 0.4), term(1.1, 0.4)],
    ),
    "three, the best two alike": ([(0.3, 0), (-0.2, 0), (1.1, 2)], [term(0.3, 1.1) + term(-0.2, 1.1), 0.0]),
    "three, the worst two alike": ([(0.3, 0), (-0.2, 1), (1.1, 1)], [term(0.3, -0.2, 1.1), 0.0]),
    "four, the middle two alike": (
        [(0.3, 0), (-0.2, 1), (1.1, 1), (0.4, 3)],
        [term(0.3, -0.2, 1.1, 0.4) + term(-0.2, 0.4), term(1.1, 0.4)],
    ),
    "five": (
        [(0.3, 0), (-0.2, 1), (1.1, 2), (0.4, 3), (2.0, 4)],
        [term(0.3, -0.2, 1.1, 0.4, 2.0) + term(-0.2, 1.1, 0.4, 2.0), term(1.1, 0.4, 2.0) + term(0.4, 2.0), 0.0],
    ),
}


@pytest.mark.parametrize("name", GOLD)
def test_values_by_hand(name):
    entries, expected = GOLD[name]
    assert preference_loss("plackett_luce", logps_of(entries), beta=0.5).losses.tolist() == pytest.approx(
        expected, abs=1e-12
    )
    # Two lists in one micro-batch have nothing to do with each other.
    both = preference_loss("plackett_luce", logps_of(entries, [(9.0, 0), (-4.0, 1)]), beta=0.5).losses.tolist()
    assert both == pytest.approx([*expected, term(9.0, -4.0)], abs=1e-12)


def test_numbers_by_hand():
    """The terms of three completions with scores 0, ln 2 and ln 3: 1/6, 2/5 of the mass."""
    entries = [(0.0, 0), (math.log(2), 1), (math.log(3), 2)]
    loss = preference_loss("plackett_luce", logps_of(entries), beta=0.5).losses
    assert loss.sum().item() == pytest.approx(math.log(6) + math.log(5 / 2), abs=1e-12)


def test_at_the_reference_the_loss_is_the_sum_of_log_of_one_more_than_the_number_below():
    entries = [(0.0, 0), (0.0, 1), (0.0, 1), (0.0, 3), (0.0, 4)]
    loss = preference_loss("plackett_luce", logps_of(entries), beta=0.5).losses
    assert loss.sum().item() == pytest.approx(sum(math.log(1 + below) for below in (4, 2, 2, 1)), abs=1e-12)


@pytest.mark.parametrize("name", GOLD)
def test_the_gradient_is_that_of_the_plain_formula(name):
    entries, _ = GOLD[name]
    logps = logps_of(entries, requires_grad=True)
    found = torch.autograd.grad(
        preference_loss("plackett_luce", logps, beta=0.5).losses.sum(), (logps.chosen, logps.rejected)
    )
    scores = torch.tensor([score for score, _ in entries], dtype=torch.float64, requires_grad=True)
    plain = sum(
        -torch.log(scores[k].exp() / (scores[k].exp() + sum(scores[j].exp() for j in below)))
        for k, (_, rank) in enumerate(entries)
        if (below := [j for j, (_, other) in enumerate(entries) if other > rank])
    )
    (wanted,) = torch.autograd.grad(plain, scores)
    interleaved = torch.stack(found, 1).flatten()[: len(entries)]
    assert (interleaved - 0.5 * wanted).abs().max() < 1e-12


def test_a_list_of_two_is_a_pair():
    random = torch.Generator().manual_seed(0)
    fields = [200 * torch.randn(50, generator=random, dtype=torch.float64) for _ in range(4)]
    pairs = PairLogps(*fields, *[torch.ones(50, dtype=torch.float64)] * 2)
    wanted = preference_loss("sigmoid", pairs, beta=0.3)
    for lists in ({}, {"lists": torch.arange(50), "chosen_ranks": torch.zeros(50), "rejected_ranks": torch.ones(50)}):
        found = preference_loss("plackett_luce", dataclasses.replace(pairs, **lists), beta=0.3)
        assert (found.losses - wanted.losses).abs().max() < 1e-12
        assert torch.equal(found.chosen_rewards, wanted.chosen_rewards)


def test_what_is_compared():
    better, worse = comparisons(logps_of([(0.0, 0), (0.0, 1), (0.0, 1)], [(0.0, 0), (0.0, 1)]))
    assert sorted(zip(better.tolist(), worse.tolist(), strict=True)) == [(0, 1), (0, 2), (4, 5)]
