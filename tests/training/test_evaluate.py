"""Held-out evaluation during training: the figures from which the error of the accuracy follows."""

import numpy as np
import pyarrow as pa
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


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_first_evaluation_of_the_reference_itself_is_read_not_computed(world_size, tiny_llama, tmp_path):
    """With the same figures as if it were computed, by all losses but WPO, whose weights are not stored."""
    table, held = (with_reference(tokenised(preferences(9, seed=seed)), tiny_llama) for seed in (0, 7))
    jobs = [
        ((table, tiny_llama, tmp_path / f"{loss}-{identity}"), settings | {"policy": {"identity": identity}})
        for loss in ("sigmoid", "aot", "simpo")
        for settings in [dict(steps=1, loss=loss, held_out=held)]
        for identity in (None, "reference")
    ]
    for records in run_distributed(evaluations, world_size, tmp_path / "ranks", jobs):
        for computed, read in zip(records[::2], records[1::2], strict=True):
            assert read[0] == pytest.approx(computed[0], abs=1e-5) and read[0]["step"] == 0
            assert read[1] == pytest.approx(computed[1], abs=1e-5)
        assert records[1][0]["eval_loss"] == pytest.approx(np.log(2), abs=1e-15)
        assert records[1][0]["eval_rewards/margins"] == 0


def test_the_gate_also_looks_at_held_out_pairs_that_are_read(tiny_llama, tmp_path):
    table, held = (with_reference(tokenised(preferences(9, seed=seed)), tiny_llama) for seed in (0, 7))
    name = "ref_chosen_logps"
    wrong = pa.array([[value - 0.5 for value in row] for row in held[name].to_pylist()], held.schema.field(name).type)
    held = held.set_column(held.schema.get_field_index(name), name, wrong)

    def jobs(identity):
        return [((table, tiny_llama, tmp_path), dict(steps=1, held_out=held, policy={"identity": identity}))]

    run_distributed(evaluations, 1, tmp_path / "computed", jobs(None))  # the stored values are not believed
    with pytest.raises(AssertionError, match=r"GateError: .* and 0\.5 at most \(tolerance.*; 4 pairs"):
        run_distributed(evaluations, 1, tmp_path / "read", jobs("reference"))
