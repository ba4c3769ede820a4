"""Held-out evaluation during training: the figures from which the error of the accuracy follows."""

import pytest
from distributed import run_distributed
from kernel import tokenised, train_here, with_reference
from tiny import preferences


def evaluations(jobs):
    return [train_here(*args, **settings).evals for args, settings in jobs]


@pytest.mark.parametrize("world_size", [1, 2])
def test_pairs_that_share_prompts_count_for_less(world_size, tiny_llama, tmp_path):
    """Three copies of each of nine pairs count as nine pairs, on any number of ranks, for pairwise and whole-step
    objectives."""
    table, once = (with_reference(tokenised(preferences(9, seed=seed)), tiny_llama) for seed in (0, 7))
    thrice = once.take([row for row in range(9) for _ in range(3)])
    jobs = [
        ((table, tiny_llama, tmp_path / f"{loss}-{len(held)}"), dict(steps=1, loss=loss, held_out=held))
        for loss in ("sigmoid", "aot")
        for held in (once, thrice)
    ]
    for records in run_distributed(evaluations, world_size, tmp_path / "ranks", jobs):
        for single, triple in zip(records[::2], records[1::2], strict=True):
            alone, together = single[-1], triple[-1]
            assert 0 < alone["eval_rewards/accuracies"] == together["eval_rewards/accuracies"] < 1
            assert (alone["eval_pairs"], alone["eval_prompts"], alone["eval_effective_pairs"]) == (9, 9, 9)
            assert (together["eval_pairs"], together["eval_prompts"]) == (27, 9)
            # Less than nine: that copies are alike is an estimate of nine prompts, and Student's quantile says so.
            assert 5 < together["eval_effective_pairs"] < 9
            tied = triple[0]  # before the first step every pair is a tie, and nothing tells how alike they are
            assert tied["eval_rewards/accuracies"] == 0.5 and tied["eval_effective_pairs"] == 9
