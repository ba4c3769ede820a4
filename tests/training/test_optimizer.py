"""Options that save memory: offload gives equal results, moments in bfloat16 nearly equal ones."""

import pytest
import torch
from distributed import run_distributed
from kernel import exact, tiny_pairs, train_here, with_reference

from raydpo.config import TrainConfig
from raydpo.errors import ModelError
from raydpo.model.budget import reset_peak_memory, used_memory
from raydpo.training.policy.optimizer import RoundedAdamW, make_optimizer

# ZeRO-3 last: while its engine lives, transformers partitions every model it loads.
KINDS = [
    dict(zero=2, offload_optimizer="cpu"),
    dict(zero=2, gradient_checkpointing=True, offload_activations=True),
    dict(zero=1, offload_optimizer="cpu"),
    dict(zero=2, optimizer_states="bfloat16"),
    dict(zero=3, offload_optimizer="cpu"),
    dict(zero=3, offload_optimizer="cpu", offload_params="cpu"),
    dict(zero=3, optimizer_states="bfloat16"),
]


@pytest.fixture(scope="module")
def table(tiny_llama):
    return with_reference(tiny_pairs(33), tiny_llama)


def curves(table, model, scratch, keep):
    found = [[row["loss"] for row in train_here(table, model, scratch, steps=9, zero=2).steps]]
    for number, kind in enumerate(KINDS):
        found.append(train_here(table, model, scratch, steps=9, checkpoint_every=4, keep=keep / str(number), **kind).steps)
    return found


def continued(table, model, scratch, keep):
    return [
        train_here(table, model, scratch, steps=9, checkpoint=keep / str(number) / "step-4", **kind).steps
        for number, kind in enumerate(KINDS)
    ]


def test_offloaded_and_rounded_states_train_alike_and_resume_exactly(table, tiny_llama, tmp_path):
    plain, *others = run_distributed(curves, 2, tmp_path / "a", table, tiny_llama, tmp_path / "s", tmp_path / "keep")[0]
    rest = run_distributed(continued, 2, tmp_path / "b", table, tiny_llama, tmp_path / "s", tmp_path / "keep")[0]
    for kind, rows, late in zip(KINDS, others, rest, strict=True):
        assert [row["loss"] for row in rows] == pytest.approx(plain, abs=2e-3 if "optimizer_states" in kind else 1e-5), kind
        assert exact(late) == exact(rows)[4:], kind


def test_rounded_moments_are_half_as_large_and_follow_torch():
    torch.manual_seed(0)
    start = torch.randn(64, 64)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
    rounded, plain = RoundedAdamW([ours], **settings), torch.optim.AdamW([theirs], **settings)
    for _ in range(20):
        gradient = torch.randn(64, 64)
        for parameter, optimizer in ((ours, rounded), (theirs, plain)):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert rounded.state[ours]["exp_avg"].dtype == rounded.state[ours]["exp_avg_sq"].dtype == torch.bfloat16
    moved = (theirs - start).abs().mean()
    assert (ours - theirs).abs().mean() < 0.01 * moved


def growth_of_a_step(states):
    """Peak memory of a second step beyond the flat tensor's own bytes, in a process of its own."""
    weights = torch.nn.Parameter(torch.zeros(1 << 26))
    weights.grad = torch.ones_like(weights)
    optimizer = make_optimizer([weights], TrainConfig(optimizer_states=states), torch.device("cpu"))
    optimizer.step()  # makes the moments
    reset_peak_memory(torch.device("cpu"))
    before = used_memory(torch.device("cpu"))
    optimizer.step()
    return used_memory(torch.device("cpu")) - before, weights.nbytes


@pytest.mark.parametrize("states", ["float32", "bfloat16"])
def test_a_step_makes_no_copies_of_the_flat_tensor_that_deepspeed_gives_it(states, tmp_path):
    growth, flat = run_distributed(growth_of_a_step, 1, tmp_path, states)[0]
    assert growth < 0.5 * flat


def test_what_needs_a_gpu_is_refused_on_a_cpu():
    with pytest.raises(ModelError, match=r"adamw_8bit runs on GPUs only.*train.optimizer=adamw"):
        make_optimizer([torch.nn.Parameter(torch.zeros(2))], TrainConfig(optimizer="adamw_8bit"), torch.device("cpu"))


def test_combinations_without_effect_are_refused():
    for settings, fix in (
        (dict(zero=2, offload_params="cpu"), "set zero to 3"),
        (dict(zero=0, offload_optimizer="cpu"), "set zero to 1"),
        (dict(zero=2, offload_optimizer="/nvme"), "needs zero 3"),
        (dict(zero=3, offload_optimizer="/nvme", optimizer_states="bfloat16"), "cannot go to a disk"),
        (dict(offload_activations=True), "gradient_checkpointing"),
        (dict(optimizer="adamw_8bit", optimizer_states="bfloat16"), "has no effect"),
        (dict(optimizer="adamw_8bit", offload_optimizer="cpu"), "drop offload_optimizer"),
    ):
        with pytest.raises(ValueError, match=fix):
            TrainConfig(**settings)
