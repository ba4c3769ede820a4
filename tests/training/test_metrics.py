"""Metrics from sums over pairs, against figures computed by hand."""

import numpy as np
import pytest
import torch

from raydpo.data.interval import effective_count
from raydpo.losses import PairLogps, preference_loss
from raydpo.training.metrics import PairSums


def metrics(chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens, beta=0.5):
    logps = PairLogps(
        *(
            torch.tensor(values, dtype=torch.float32)
            for values in (chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens)
        )
    )
    sums = PairSums(["a"], torch.device("cpu"))
    loss = preference_loss("sigmoid", logps, beta=beta, label_smoothing=0.0)
    sums.add(loss, logps, torch.zeros(len(chosen), dtype=torch.long))
    return sums.metrics()


def test_figures_by_hand():
    """Rewards are half the log-ratios: chosen 1 and -1, rejected 0.5 and 1; so margins are 0.5 and -2."""
    row = metrics([-8.0, -22.0], [-9.0, -18.0], [-10.0, -20.0], [-10.0, -20.0], [4, 6], [2, 10])
    assert row["rewards/chosen"] == 0.0 and row["rewards/rejected"] == 0.75
    assert row["rewards/margins"] == -0.75 and row["rewards/accuracies"] == 0.5
    assert row["logps/chosen_fell"] == 0.5 and row["logps/accuracies"] == 0.5
    assert row["logratio/chosen_per_token"] == 0.0 and row["logratio/rejected_per_token"] == pytest.approx(3 / 12)
    assert row["length/margin_correlation"] == pytest.approx(1.0)  # longer by 2 with 0.5, shorter by 4 with -2


def test_rounding_is_no_change():
    """A policy equal to the reference up to float32 rounding: no chosen completion fell, no correlation with lengths."""
    row = metrics([-80.00001, -150.00002], [-90.00001, -70.00002], [-80.0, -150.0], [-90.0, -70.0], [20, 50], [30, 10])
    assert row["rewards/accuracies"] == 0.5
    assert row["logps/chosen_fell"] == 0.0 and row["length/margin_correlation"] == 0.0
    assert metrics([-80.1], [-90.0], [-80.0], [-90.0], [20], [30])["logps/chosen_fell"] == 1.0


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_a_tie_is_one_at_every_beta(beta):
    """float32 sums over 100 tokens differ by about 1e-4 nats, which is a tie; half a nat is a preference."""
    row = metrics([-80.0002, -80.5], [-90.0, -90.0], [-80.0, -80.0], [-90.0, -90.0], [100, 100], [80, 80], beta)
    assert row["rewards/accuracies"] == 0.25


def test_pairs_of_one_prompt_tell_less():
    """Two prompts have three pairs each; all of one are won, all of the other lost. With six prompts there are six."""
    margins = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    zero, ten = torch.zeros(6), torch.full((6,), 10.0)
    logps = PairLogps(margins, zero, zero, zero, ten, ten)
    found = {}
    for name, prompts in (("two", [0, 0, 0, 2, 2, 2]), ("six", [5, 4, 3, 2, 1, 0])):
        # Halves on two ranks, added up as the all-reduce does.
        halves = [PairSums(["a"], torch.device("cpu"), prompts=6) for _ in range(2)]
        for sums, rows in zip(halves, ([0, 2, 4], [1, 3, 5]), strict=True):
            part = PairLogps(
                *(
                    getattr(logps, field)[rows]
                    for field in ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_tokens", "rejected_tokens")
                )
            )
            sums.add(
                preference_loss("sigmoid", part, beta=0.5),
                part,
                torch.zeros(3, dtype=torch.long),
                torch.tensor(prompts)[rows],
            )
        halves[0].values += halves[1].values
        found[name] = halves[0].metrics()
    assert found["two"]["rewards/accuracies"] == found["six"]["rewards/accuracies"] == 0.5
    assert (found["two"]["pairs"], found["two"]["prompts"], found["six"]["prompts"]) == (6, 2, 6)
    assert found["two"]["effective_pairs"] == effective_count(np.array([3, 0]), np.array([3, 3])) < 1
    assert found["six"]["effective_pairs"] == 6


def test_lists_are_measured_by_all_pairs_that_are_ranked():
    """Scores of a list of three and of a pair: of four pairs three are ranked right, and there are two losses."""
    logps = PairLogps(
        *(torch.tensor(values) for values in ([2.0, 0.0, 1.0], [1.0, 0.0, 3.0])),
        *[torch.zeros(3)] * 2,
        *(torch.tensor(values) for values in ([4.0, 6.0, 5.0], [8.0, 0.0, 7.0])),
        lists=torch.tensor([1, 1, 2]),
        chosen_ranks=torch.tensor([0, 2, 0], dtype=torch.int32),
        rejected_ranks=torch.tensor([1, -1, 1], dtype=torch.int32),
    )
    loss = preference_loss("plackett_luce", logps, beta=1.0)
    sums = PairSums(["a", "b"], torch.device("cpu"), prompts=2)
    sums.add(loss, logps, torch.tensor([0, 0, 1]), torch.tensor([0, 0, 1]))
    row = sums.metrics()
    assert row["pairs"] == 4 and row["prompts"] == 2
    assert row["loss"] == pytest.approx(loss.losses.sum().item() / 2)
    assert row["a/loss"] == pytest.approx(loss.losses[:2].sum().item()) and row["b/loss"] == pytest.approx(2.126928)
    assert row["rewards/accuracies"] == 0.75 and row["a/rewards/accuracies"] == 1.0 and row["b/rewards/accuracies"] == 0.0
    assert row["rewards/margins"] == pytest.approx((1 + 2 + 1 - 2) / 4)
    assert row["rewards/chosen"] == pytest.approx((2 + 2 + 1 + 1) / 4)
    assert row["length/rejected"] == pytest.approx((8 + 6 + 6 + 7) / 4)
