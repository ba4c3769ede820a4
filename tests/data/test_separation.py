"""AUC of rewards and its interval."""

import numpy as np
import pytest

from raydpo.data.separation import auc_by_group, effective_auc


def test_it_is_the_share_of_couples_in_the_right_order():
    rewards, labels = np.array([3.0, 1.0, 2.0, 2.0, 0.0]), np.array([1, 1, -1, 1, -1])
    # (3 > 2, 3 > 0, 1 < 2, 1 > 0, 2 = 2, 2 > 0): 4.5 of 6
    assert effective_auc(rewards, labels, np.arange(5))[0] == pytest.approx(4.5 / 6)
    flipped = auc_by_group(-rewards, labels, np.arange(5))
    assert flipped["value"] == pytest.approx(1.5 / 6) and flipped["low"] < 1.5 / 6 < flipped["high"]
    assert auc_by_group(rewards, np.ones(5, int), np.arange(5)) == {"value": None, "low": None, "high": None}


@pytest.mark.parametrize("effect", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("size", [1, 4])
def test_the_interval_holds_the_truth_in_95_percent(effect, size):
    """Completions of a prompt share most of their noise, and a prompt has completions of both labels."""
    random, holds, draws = np.random.default_rng(0), 0, 400
    truth = effective_auc(np.r_[random.normal(effect, 1, 200_000), random.normal(0, 1, 200_000)],
                          np.repeat([1, -1], 200_000), np.arange(400_000))[0]  # fmt: skip
    for _ in range(draws):
        groups = np.repeat(np.arange(160 // size), size)
        labels = np.where(random.random(160) < 0.6, 1, -1)
        noise = np.sqrt(0.7) * random.normal(size=160 // size)[groups] + np.sqrt(0.3) * random.normal(size=160)
        found = auc_by_group(noise + effect * (labels > 0), labels, groups) if size == 1 else None
        if found is None:  # noise within prompts is shared only among completions of one label
            shared = random.normal(size=(160 // size, 2))[groups, (labels > 0).astype(int)]
            noise = np.sqrt(0.7) * shared + np.sqrt(0.3) * random.normal(size=160)
            found = auc_by_group(noise + effect * (labels > 0), labels, groups)
        holds += found["low"] <= truth <= found["high"]
    assert 0.92 <= holds / draws <= 1.0


def test_the_interval_holds_the_truth_where_labels_share_prompts():
    """Completions of a prompt share noise whatever their label, and the labels have other numbers of them."""
    random, holds = np.random.default_rng(0), 0
    labels = np.repeat([-1, 1], [60, 90])
    for _ in range(300):
        prompts, shared = random.integers(0, 40, 150), random.normal(size=40)
        found = auc_by_group(shared[prompts] + random.normal(size=150) + 0.5 * (labels > 0), labels, prompts)
        holds += found["low"] <= 0.5981 <= found["high"]  # Phi(0.5 / 2), of completions of different prompts
    assert 0.9 < holds / 300 < 0.99


def test_perfect_and_equal_rewards_have_wide_intervals():
    perfect = auc_by_group(np.array([2.0, 3.0, 0.0, 1.0]), np.array([1, 1, -1, -1]), np.arange(4))
    assert perfect["value"] == 1.0 and perfect["low"] < 0.5
    assert auc_by_group(np.zeros(4), np.array([1, 1, -1, -1]), np.arange(4))["value"] == 0.5
