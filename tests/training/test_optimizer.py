"""Options that save memory: offload gives equal results, a first moment in bfloat16 nearly equal ones."""

import pytest
import torch
from distributed import run_distributed
from kernel import exact, tiny_pairs, train_here, with_reference
from safetensors.torch import load_file, save_file

from raydpo.config import TrainConfig
from raydpo.errors import ConfigError
from raydpo.model.budget import reset_peak_memory, used_memory
from raydpo.training.policy.deepspeed_engine import _deepspeed_config
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


def from_an_earlier_version(table, model, scratch, keep):
    """Continue from a checkpoint whose second moment is in bfloat16, as earlier versions wrote it."""
    kind = dict(steps=9, optimizer_states="bfloat16")
    whole = train_here(table, model, scratch, checkpoint_every=4, keep=keep, **kind).steps
    for path in (keep / "step-4").glob("state-*.safetensors"):
        tensors = load_file(path)
        assert {tensor.dtype for key, tensor in tensors.items() if key.startswith("exp_avg_sq|")} == {torch.float32}
        save_file({key: one.bfloat16() if key.startswith("exp_avg") else one for key, one in tensors.items()}, path)
    return whole, train_here(table, model, scratch, checkpoint=keep / "step-4", **kind).steps


def test_a_checkpoint_with_both_moments_in_bfloat16_is_continued(table, tiny_llama, tmp_path):
    whole, late = run_distributed(from_an_earlier_version, 1, tmp_path / "a", table, tiny_llama, tmp_path, tmp_path / "k")[0]
    assert [row["loss"] for row in late] == pytest.approx([row["loss"] for row in whole[4:]], abs=1e-3)


def test_a_rounded_first_moment_is_half_as_large_and_follows_torch():
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
    assert rounded.state[ours]["exp_avg"].dtype == torch.bfloat16
    assert torch.equal(rounded.state[ours]["exp_avg_sq"], plain.state[theirs]["exp_avg_sq"])
    moved = (theirs - start).abs().mean()
    assert (ours - theirs).abs().mean() < 0.01 * moved


def test_updates_do_not_drift_over_a_thousand_steps():
    """The second moment in bfloat16 stopped at a quarter of its value, so that updates were longer as torch's; and it
    did not fall with the gradients."""
    ours, theirs = (torch.nn.Parameter(torch.zeros(8)) for _ in range(2))
    settings = {"lr": 1e-3, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8}
    optimizers = {ours: RoundedAdamW([ours], **settings), theirs: torch.optim.AdamW([theirs], **settings)}
    moved = dict.fromkeys(optimizers, 0.0)
    for step in range(1200):
        for parameter, optimizer in optimizers.items():
            before = parameter.detach().clone()
            parameter.grad = torch.full_like(parameter, 1.0 if step < 1000 else 0.1)
            optimizer.step()
            moved[parameter] = float((before - parameter.detach()).mean())
        if step in (999, 1199):
            assert moved[ours] == pytest.approx(moved[theirs], rel=0.04), step
    second = [float(optimizer.state[one]["exp_avg_sq"][0]) for one, optimizer in optimizers.items()]
    assert second[0] == pytest.approx(second[1], rel=1e-5)


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


@pytest.mark.parametrize(("zero", "asked", "overlaps"), [(1, False, False), (2, True, True), (3, False, True)])
def test_deepspeed_overlaps_communication_where_asked_and_with_zero_3(zero, asked, overlaps):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    settings = _deepspeed_config(TrainConfig(zero=zero, overlap_communication=asked), "bfloat16")
    assert DeepSpeedZeroConfig(**settings["zero_optimization"]).overlap_comm is overlaps
    assert zero < 3 or DeepSpeedZeroConfig(stage=3).overlap_comm  # its default


def test_what_needs_a_gpu_is_refused_on_a_cpu():
    with pytest.raises(ConfigError, match=r"adamw_8bit runs on GPUs only.*train.optimizer=adamw"):
        make_optimizer([torch.nn.Parameter(torch.zeros(2))], TrainConfig(optimizer="adamw_8bit"), torch.device("cpu"))


@pytest.mark.parametrize(
    ("zero", "shapes", "fits"),
    [
        (2, [(8_030, 1_000_000)], False),
        (1, [(9_241, 1_000_000)], False),  # above 2^32: bitsandbytes would update the first 7 %
        (2, [(2**31 - 1,)], True),
        (2, [(2**30,), (2**30,)], False),
        (0, [(2**30,), (2**30,)], True),
        (0, [(2**16, 2**15)], False),
        (3, [(8_030, 1_000_000)], True),
    ],
)
def test_more_numbers_than_bitsandbytes_counts_are_refused(zero, shapes, fits):
    tensors = [torch.empty(shape, device="meta") for shape in shapes]
    said = r"Set train.zero to (0 or|3 or train.optimizer to adamw)" if not fits else "runs on GPUs only"
    with pytest.raises(ConfigError, match=said):
        make_optimizer(tensors, TrainConfig(optimizer="paged_adamw_8bit", zero=zero), torch.device("cpu"))


def test_combinations_without_effect_are_refused():
    for settings, fix in (
        (dict(zero=2, offload_params="cpu"), "set zero to 3"),
        (dict(zero=0, offload_optimizer="cpu"), "set zero to 1"),
        (dict(zero=0, overlap_communication=True), "overlap_communication has no effect without ZeRO"),
        (dict(zero=3, overlap_communication=True), "overlap_communication has no effect on ZeRO 3"),
        (dict(zero=2, offload_optimizer="/nvme"), "needs zero 3"),
        (dict(zero=3, offload_optimizer="/nvme", optimizer_states="bfloat16"), "cannot go to a disk"),
        (dict(offload_activations=True), "gradient_checkpointing"),
        (dict(optimizer="adamw_8bit", optimizer_states="bfloat16"), "has no effect"),
        (dict(optimizer="adamw_8bit", offload_optimizer="cpu"), "drop offload_optimizer"),
    ):
        with pytest.raises(ValueError, match=fix):
            TrainConfig(**settings)
