"""Hand-worked algebra. One pair: policy -10 and -20 nats, reference -12 and -18, so the log-ratios are +2 and -2 and the
margin is 4; 5 and 10 completion tokens."""

import math

import pytest
import torch

from raydpo.losses import LOSSES, PairLogps, preference_loss


def pair(chosen=-10.0, rejected=-20.0, ref_chosen=-12.0, ref_rejected=-18.0, chosen_tokens=5.0, rejected_tokens=10.0):
    values = (chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens)
    return PairLogps(*(torch.tensor([value], dtype=torch.float64, requires_grad=False) for value in values))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


@pytest.mark.parametrize(("name", "beta", "smoothing", "expected"), [
    ("sigmoid", 0.1, 0.0, -log_sigmoid(0.4)),
    ("sigmoid", 0.5, 0.0, -log_sigmoid(2.0)),
    ("sigmoid", 0.1, 0.3, -0.7 * log_sigmoid(0.4) - 0.3 * log_sigmoid(-0.4)),
    ("hinge", 0.1, 0.0, 0.6),
    ("hinge", 0.5, 0.0, 0.0),
    # per token: 2/5 + 2/10 = 0.6, target 1/(2*0.1) = 5
    ("ipo", 0.1, 0.0, (0.6 - 5.0) ** 2),
    ("sigmoid_norm", 2.0, 0.0, -log_sigmoid(1.2)),
    ("sigmoid_norm", 2.0, 0.1, -0.9 * log_sigmoid(1.2) - 0.1 * log_sigmoid(-1.2)),
])
def test_value(name, beta, smoothing, expected):
    loss = preference_loss(name, pair(), beta=beta, label_smoothing=smoothing)
    assert loss.losses.item() == pytest.approx(expected, abs=1e-12)


def test_rewards_are_those_of_the_loss():
    summed = preference_loss("sigmoid", pair(), beta=0.1)
    assert (summed.chosen_rewards.item(), summed.rejected_rewards.item()) == pytest.approx((0.2, -0.2))
    per_token = preference_loss("sigmoid_norm", pair(), beta=0.1)
    assert (per_token.chosen_rewards.item(), per_token.rejected_rewards.item()) == pytest.approx((0.04, -0.02))


def test_sigmoid_of_the_reference_itself_is_ln_2():
    same = pair(chosen=-12.0, rejected=-18.0)
    for beta in (0.01, 0.1, 5.0):
        assert preference_loss("sigmoid", same, beta=beta).losses.item() == pytest.approx(math.log(2), abs=1e-15)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_raises_chosen_and_lowers_rejected(name):
    chosen = torch.tensor([-12.0], requires_grad=True)
    rejected = torch.tensor([-18.0], requires_grad=True)
    one = torch.ones(1)
    loss = preference_loss(name, PairLogps(chosen, rejected, chosen.detach(), rejected.detach(), one, one), beta=0.1)
    loss.losses.sum().backward()
    assert chosen.grad < 0 < rejected.grad
    assert not loss.chosen_rewards.requires_grad


def test_gradient_of_sigmoid_at_the_reference_is_half_beta():
    """d/dmargin of -log sigmoid(beta * margin) at margin 0 is -beta/2."""
    chosen = torch.zeros(1, requires_grad=True)
    zero, one = torch.zeros(1), torch.ones(1)
    preference_loss("sigmoid", PairLogps(chosen, zero, zero, zero, one, one), beta=0.3).losses.sum().backward()
    assert chosen.grad.item() == pytest.approx(-0.15)
