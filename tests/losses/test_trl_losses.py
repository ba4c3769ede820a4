"""Value and gradient of every loss of TRL 1.16 against TRL's own code in float64."""

import pytest
import torch
from trl_losses import (
    CHOSEN_TOKENS,
    cpo_loss,
    dpo_loss,
    kto_loss,
    orpo_loss,
    orpo_loss_and_metrics,
    token_logps,
)

from raydpo.config import ObjectiveConfig
from raydpo.losses import Objective, ObjectiveState, PairLogps
from raydpo.training.metrics import PairSums

PAIRS = len(CHOSEN_TOKENS)


def ours(*args, **settings):
    """raydpo's mean loss on the same tokens."""
    return objective_and_logps(*args, **settings)[0].losses.mean()


def objective_and_logps(policy, reference, mask, log_sum_sq=None, **settings):
    """raydpo's losses and rewards on the same tokens, and their inputs."""
    lengths = mask.sum(1)
    shared = torch.minimum(*lengths.chunk(2)).repeat(2)
    tail = torch.arange(mask.shape[1]) >= shared[:, None]
    sides = [side for each in (policy, reference) for side in each.sum(1).chunk(2)]
    tails = [side for each in (policy, reference) for side in (each * tail).sum(1).chunk(2)]
    weights = None
    if log_sum_sq is not None:
        aligned = torch.exp(((policy - log_sum_sq) * mask).detach().sum(1) / lengths)
        weights = aligned[:PAIRS] * aligned[PAIRS:]
    logps = PairLogps(*sides, *lengths.to(policy.dtype).chunk(2), *tails, weights=weights)
    config = ObjectiveConfig(**settings)
    return Objective(config)(logps, config.beta, ObjectiveState()), logps


def value_and_gradient(function, policy, *args, **settings):
    padding = policy == 0
    policy = policy.clone().requires_grad_()
    loss = function(policy, *args, **settings)
    return loss, torch.autograd.grad(loss, policy)[0].masked_fill(padding, 0)


def assert_equal(mine, theirs, tolerance=1e-6):
    assert mine[0].item() == pytest.approx(theirs[0].item(), abs=tolerance, rel=tolerance)
    torch.testing.assert_close(mine[1], theirs[1], atol=tolerance, rtol=tolerance, check_dtype=False)
    assert mine[1].abs().max() > 1e-4  # there is a gradient to compare


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sigmoid", {}),
        ("hinge", {}),
        ("ipo", {}),
        ("exo_pair", {"label_smoothing": 1e-3}),
        ("nca_pair", {}),
        ("robust", {"label_smoothing": 0.1}),
        ("bco_pair", {}),
        ("sppo_hard", {}),
        ("aot", {"label_smoothing": 0.1}),
        ("aot_unpaired", {}),
        ("apo_zero", {}),
        ("apo_down", {}),
        ("discopop", {}),
        ("discopop", {"discopop_tau": 0.4}),
        ("sigmoid_norm", {}),
        ("sigmoid", {"f_divergence_type": "forward_kl"}),
        ("hinge", {"f_divergence_type": "js_divergence"}),
        ("sigmoid_norm", {"f_divergence_type": "js_divergence"}),
        ("sigmoid", {"ld_alpha": 0.3}),
        ("bco_pair", {"ld_alpha": 0.0}),
        ("sigmoid_norm", {"ld_alpha": 0.5}),
    ],
    ids=str,
)
def test_dpo_losses(name, settings, beta):
    policy, reference, mask = token_logps()
    assert_equal(
        value_and_gradient(ours, policy, reference, mask, loss=name, beta=beta, **settings),
        value_and_gradient(dpo_loss, policy, reference, mask, [name], beta=beta, **settings),
    )


@pytest.mark.parametrize("coefficient", [0.5, 1.0, 2.0])
def test_alpha_divergence(coefficient):
    """In float32, because TRL's bound on the exponent is the one of float32."""
    policy, reference, mask = token_logps(dtype=torch.float32)
    settings = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": coefficient}
    theirs = value_and_gradient(dpo_loss, policy, reference, mask, ["sigmoid"], **settings)
    assert_equal(value_and_gradient(ours, policy, reference, mask, loss="sigmoid", **settings), theirs, 1e-5)


def test_sft_term_and_mixture():
    policy, reference, mask = token_logps()
    assert_equal(
        value_and_gradient(ours, policy, reference, mask, loss="sft"),
        value_and_gradient(dpo_loss, policy, reference, mask, ["sft"]),
    )
    mixture = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}
    for alpha in (None, 0.4):  # the likelihood is of whole completions
        assert_equal(
            value_and_gradient(
                ours, policy, reference, mask, loss=[{name: weight} for name, weight in mixture.items()], ld_alpha=alpha
            ),
            value_and_gradient(
                dpo_loss, policy, reference, mask, list(mixture), loss_weights=list(mixture.values()), ld_alpha=alpha
            ),
        )


def test_wpo_weights():
    policy, reference, mask = token_logps()
    log_sum_sq = -torch.rand(mask.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for loss in ("sigmoid", "apo_zero"):
        assert_equal(
            value_and_gradient(ours, policy, reference, mask, log_sum_sq, loss=loss, use_weighting=True),
            value_and_gradient(dpo_loss, policy, reference, mask, [loss], use_weighting=True, log_sum_sq=log_sum_sq),
        )


@pytest.mark.parametrize("shift", [-1.0, 2.0])
def test_kto(shift):
    """With TRL's estimate of the drift set to ours: 0 where the policy fell below the reference, else positive."""
    policy, reference, mask = token_logps()
    reference = reference - shift * mask
    drift = (policy.sum(1) - reference.sum(1)).mean().clamp(min=0)
    assert (drift > 0) == (shift > 0)
    settings = dict(beta=0.2, desirable_weight=1.5, undesirable_weight=0.7)
    assert_equal(
        value_and_gradient(ours, policy, reference, mask, loss="kto", **settings),
        value_and_gradient(kto_loss, policy, reference, mask, drift, **settings),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cpo_and_simpo(smoothing):
    policy, reference, mask = token_logps()
    for alpha in (0.5, 1.0):
        assert_equal(
            value_and_gradient(ours, policy, reference, mask, loss="cpo", cpo_alpha=alpha, label_smoothing=smoothing),
            value_and_gradient(
                cpo_loss, policy, mask, loss_type="sigmoid", beta=0.1, cpo_alpha=alpha, label_smoothing=smoothing
            ),
        )
    # SimPO's authors train without the likelihood; TRL's default adds it.
    settings = dict(beta=2.0, simpo_gamma=1.0, label_smoothing=smoothing)
    theirs = value_and_gradient(cpo_loss, policy, mask, loss_type="simpo", cpo_alpha=0.0, **settings)
    assert_equal(value_and_gradient(ours, policy, reference, mask, loss="simpo", **settings), theirs)
    theirs = value_and_gradient(cpo_loss, policy, mask, loss_type="simpo", cpo_alpha=1.0, **settings)
    assert_equal(value_and_gradient(ours, policy, reference, mask, loss=[{"simpo": 1.0}, {"sft": 1.0}], **settings), theirs)


def test_orpo():
    policy, reference, mask = token_logps()
    assert_equal(
        value_and_gradient(ours, policy, reference, mask, loss="orpo", beta=0.3),
        value_and_gradient(orpo_loss, policy, mask, beta=0.3),
    )


def test_rewards_of_orpo():
    """As TRL logs them: from the mean log-prob per token."""
    policy, reference, mask = token_logps()
    loss, logps = objective_and_logps(policy, 0 * reference, mask, loss="orpo", beta=0.3)
    sums = PairSums(["data"], torch.device("cpu"), reference=False)
    sums.add(loss, logps, torch.zeros(PAIRS, dtype=torch.long))
    mine, (_, theirs) = sums.metrics(), orpo_loss_and_metrics(policy, mask, beta=0.3)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert mine[name] == pytest.approx(theirs[name], abs=1e-6), name
    assert mine["rewards/accuracies"] != mine["logps/accuracies"], "sums would have told the same"
