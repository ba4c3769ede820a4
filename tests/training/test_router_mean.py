"""The router loss of a step: each token weighs the same, whichever micro-batch and rank it is in."""

from types import SimpleNamespace

import pytest
import torch

from raydpo.config import ObjectiveConfig
from raydpo.data.plan import MicroBatch
from raydpo.training.router import RouterLoss

STEP = [(MicroBatch((0,)), SimpleNamespace(tokens=30)), (MicroBatch((1, 2)), SimpleNamespace(tokens=10))]
STAND_IN = (MicroBatch((0,), counts=False), SimpleNamespace(tokens=30))
OTHERS = 60.0
"""Tokens of the other ranks."""


def engine(leader=True):
    return SimpleNamespace(device="cpu", is_leader=leader, sum_over_ranks=lambda values: values.add_(OTHERS))


def test_shares_and_metric_weigh_by_tokens():
    router = RouterLoss.asked(engine(), ObjectiveConfig(router_aux_loss_coef=0.5))
    router.begin([*STEP, STAND_IN])
    losses = [torch.tensor(value, requires_grad=True) for value in (2.0, 4.0, 8.0)]
    shares = []
    for (batch, layout), loss in zip([*STEP, STAND_IN], losses, strict=True):
        router.add(batch, layout, loss)
        shares.append(router.share(batch, layout))
    assert [share.item() for share in shares] == pytest.approx([0.5 * 2 * 30 / 100, 0.5 * 4 * 10 / 100, 0])
    sum(shares).backward()
    assert [loss.grad.item() for loss in losses] == pytest.approx([0.15, 0.05, 0])
    assert router.metrics()["aux_loss"] == pytest.approx((2 * 30 + 4 * 10) / 40)


def test_ranks_of_one_micro_batch_count_it_once():
    router = RouterLoss(engine(leader=False), 0.5)
    router.begin(STEP)
    router.add(*STEP[0], torch.tensor(2.0))
    assert router.values.tolist() == [0, 0]
    assert router.share(*STEP[0]).item() == pytest.approx(0.5 * 2 * 30 / 60)


@pytest.mark.parametrize("coef", [None, 0.0])
def test_nothing_is_asked_without_a_coefficient(coef):
    assert RouterLoss.asked(engine(), ObjectiveConfig(router_aux_loss_coef=coef)) is None
