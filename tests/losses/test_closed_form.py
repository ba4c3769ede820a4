"""Minimising each loss on a small enumerable problem drives the policy to the known optimum."""

import pytest
import torch
from enumerable import World, X, Y, total_variation

from raydpo.config import ObjectiveConfig

CLOSE = 1e-3
BETAS = [0.3, 1.0, 3.0]


@pytest.fixture(scope="module")
def world():
    return World.random()


@pytest.mark.parametrize("beta", [0.1, *BETAS])
def test_dpo_finds_the_reference_tilted_by_the_reward(world, beta):
    """pi = ref * exp(r / beta) / Z."""
    found, wanted = world.minimiser(ObjectiveConfig(beta=beta)), world.tilted(world.rewards, beta)
    assert total_variation(found, wanted) < CLOSE
    assert total_variation(wanted, world.reference.exp()) > 0.05  # which is elsewhere


@pytest.mark.parametrize("beta", BETAS)
def test_the_implicit_reward_is_the_reward_but_for_a_function_of_the_prompt(world, beta):
    implicit = beta * (world.minimiser(ObjectiveConfig(beta=beta)).log() - world.reference)
    gap = implicit - world.rewards
    assert (gap - gap.mean(1, keepdim=True)).abs().max() < CLOSE


def test_the_partition_function_cancels(world):
    """A reward that depends on the prompt only, or the normaliser of the policy, changes neither expected losses nor
    optima."""
    settings, of_prompt = ObjectiveConfig(beta=0.5), torch.tensor([[7.0], [-3.0], [40.0]], dtype=torch.float64)
    richer = World(world.reference, world.rewards + of_prompt, world.drawn, world.lengths)
    policy = torch.randn(X, Y, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).log_softmax(1)
    loss = world.expected_loss(policy, settings)
    assert richer.expected_loss(policy, settings).item() == pytest.approx(loss.item(), abs=1e-12)
    assert world.expected_loss(policy + of_prompt, settings).item() == pytest.approx(loss.item(), abs=1e-12)
    assert total_variation(richer.tilted(richer.rewards, 0.5), world.tilted(world.rewards, 0.5)) < 1e-12
    assert total_variation(richer.minimiser(settings), world.minimiser(settings)) < CLOSE


def test_which_pairs_are_compared_does_not_matter(world):
    """DPO's optimum depends on the preferences, not on how often each pair is compared, as long as all are."""
    others = World(world.reference, world.rewards, world.drawn.flip(1), world.lengths)
    assert total_variation(others.drawn, world.drawn) > 0.1
    settings = ObjectiveConfig(beta=0.5)
    assert total_variation(others.minimiser(settings), world.minimiser(settings)) < CLOSE


@pytest.mark.parametrize("beta", BETAS)
def test_ipo_finds_the_reference_tilted_by_the_chance_to_win(world, beta):
    """pi = ref * exp(p / beta) / Z, where p is the probability to be preferred to a sampled response (arXiv 2310.12036,
    section 4). p is not the reward, and is bounded however certain the preferences are."""
    wins = (world.preferences * world.drawn[:, None, :]).sum(2)
    found = world.minimiser(ObjectiveConfig(loss="ipo_sum", beta=beta))
    assert total_variation(found, world.tilted(wins, beta)) < CLOSE
    assert total_variation(found, world.tilted(world.rewards, beta)) > 0.02


@pytest.mark.parametrize("flipped", [0.1, 0.3])
def test_robust_dpo_sees_through_flipped_labels(world, flipped):
    wanted = world.tilted(world.rewards, 0.5)
    robust = world.minimiser(ObjectiveConfig(loss="robust", beta=0.5, label_smoothing=flipped), flipped)
    assert total_variation(robust, wanted) < CLOSE
    assert total_variation(world.minimiser(ObjectiveConfig(beta=0.5), flipped), wanted) > 0.02  # DPO does not


RATIO = {
    # The inverse of f': pi / ref as a function of u = (reward - c) / beta, and the u at which it is infinite.
    "forward_kl": (lambda u: 1 / (1 - u), 1.0),
    "js_divergence": (lambda u: 1 / (2 * torch.exp(-u) - 1), 0.6931471805599453),
    "alpha_divergence": (lambda u: (1 - u / 2) ** -2, 2.0),
}


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("divergence", RATIO)
def test_other_divergences_find_their_own_optimum(world, divergence, beta):
    """f'(pi / ref) = (r - c) / beta, where c makes the policy add up to 1 (arXiv 2309.16240, theorem 1)."""
    ratio, limit = RATIO[divergence]
    best = world.rewards.max(1, keepdim=True).values
    wanted = world.normalised(
        lambda c: world.reference.exp() * ratio((world.rewards + c) / beta), beta * limit - best - 1e-12
    )
    assert wanted.sum(1).tolist() == pytest.approx([1.0] * X)
    found = world.minimiser(ObjectiveConfig(beta=beta, f_divergence_type=divergence))
    assert total_variation(found, wanted) < CLOSE
    assert total_variation(wanted, world.tilted(world.rewards, beta)) > 0.01


@pytest.mark.parametrize("beta", BETAS)
def test_a_length_penalty_is_taken_off_the_reward(world, beta):
    """R-DPO: pi = ref * exp((r - alpha * tokens) / beta) / Z."""
    found = world.minimiser(ObjectiveConfig(beta=beta, length_penalty=0.2))
    assert total_variation(found, world.tilted(world.rewards - 0.2 * world.lengths, beta)) < CLOSE


def test_length_normalised_dpo_finds_the_reward_of_each_token(world):
    """log(pi / ref) / tokens = (r + c) / beta."""
    beta = 3.0
    wanted = world.normalised(
        lambda c: torch.exp(world.reference + world.lengths * (world.rewards + c) / beta),
        torch.full((X, 1), 50.0, dtype=torch.float64),
    )
    assert total_variation(world.minimiser(ObjectiveConfig(loss="sigmoid_norm", beta=beta)), wanted) < CLOSE


def test_margins_of_the_data_add_to_the_reward(world):
    known = world.lengths.cos()
    found = world.minimiser(ObjectiveConfig(beta=0.5), margins_of=known)
    assert total_variation(found, world.tilted(world.rewards + known, 0.5)) < CLOSE
    assert total_variation(found, world.tilted(world.rewards, 0.5)) > 0.05


@pytest.mark.parametrize(("size", "beta"), [(2, 0.3), (3, 1.0), (4, 0.3), (5, 3.0)])
def test_rankings_find_the_reference_tilted_by_the_reward(world, size, beta):
    """pi = ref * exp(r / beta) / Z, whatever the length of the lists (arXiv 2305.18290, appendix A.3)."""
    found = world.minimiser(ObjectiveConfig(loss="plackett_luce", beta=beta), list_size=size)
    assert total_variation(found, world.tilted(world.rewards, beta)) < CLOSE
