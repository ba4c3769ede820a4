"""Token budgets, measured with memory that is really allocated, and real out-of-memory errors."""

import re
import resource
import weakref
from pathlib import Path

import kernel
import numpy as np
import pytest
import torch
from distributed import run_distributed

from raydpo.model import budget
from raydpo.model.budget import MARGIN, Needs, find_budget, is_out_of_memory

CPU = torch.device("cpu")
BYTES = 2**18
MOST = {"cpu": 10**9}


def hold(tokens):
    return torch.ones(tokens * BYTES // 4)


def test_memory_of_a_position_is_measured():
    found = find_budget(hold, CPU, most=MOST)
    assert found.bytes_per_token == pytest.approx(BYTES, rel=0.1)
    assert found.tokens == pytest.approx(MARGIN * found.free_bytes / BYTES, rel=0.15)
    assert f"= {found.tokens} positions" in found.line()


def test_shares_reserves_and_caps_are_respected(monkeypatch):
    """Under a fixed limit of a container: what the machine has left changes while other tests run."""
    monkeypatch.setattr(budget, "_cgroup_free", lambda: 1.5 * 2**30)
    whole, half = (find_budget(hold, CPU, most=MOST, share=share) for share in (1.0, 0.5))
    assert half.free_bytes == pytest.approx(whole.free_bytes / 2)
    assert find_budget(hold, CPU, most={"cpu": 512}).tokens == 512


def test_what_a_step_needs_beyond_the_pass_is_left_free(monkeypatch):
    """A step that takes half a GiB and twice what a pass takes, by a ledger that says half of what is measured."""
    monkeypatch.setattr(budget, "_cgroup_free", lambda: 1.5 * 2**30)

    def found(fixed):
        needs = Needs(step=lambda tokens: fixed + 1.5 * BYTES * tokens, probe=lambda tokens: 0.5 * BYTES * tokens)
        return find_budget(hold, CPU, most=MOST, needs=needs)

    half = found(2.0**29)
    assert half.tokens == pytest.approx(MARGIN * 2**30 / (2 * BYTES), rel=0.15)
    assert (
        half.step_bytes == pytest.approx(2**29 + 2 * BYTES * half.tokens, rel=0.1)
        and "GiB free, a step takes " in half.line()
    )
    none = found(2.0**31)
    assert none.tokens == 256 and none.line().startswith("warning:") and "that does not fit" in none.line()
    unknown = find_budget(hold, CPU, most=MOST, needs=Needs(lambda _: 0.0, lambda _: 0.0, doubt="no config.json"))
    assert unknown.line().startswith("warning:") and "is not known of this model (no config.json)" in unknown.line()


def test_a_real_out_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2) @ torch.ones(3)
    assert not is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA runtime error: cudaErrorMemoryAllocation",
        "CUDA error: out of memory",
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
    ],
)
def test_the_words_of_each_library_are_known(said):
    assert is_out_of_memory(RuntimeError(said)) and not is_out_of_memory(ValueError(said))


def test_other_errors_of_those_libraries_are_none():
    assert not is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def allow(more: int | None) -> None:
    """Limit this process to ``more`` bytes above what it has; None removes the limit."""
    limit = resource.RLIM_INFINITY
    if more is not None:
        limit = more + 1024 * int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def starved_scoring(model):
    from raydpo.model.layout import PromptGroup
    from raydpo.reference.identity import identify
    from raydpo.reference.score import ReferenceSpec, Scorer

    rng = np.random.default_rng(0)
    groups = [PromptGroup(rng.integers(0, 99, 400), (rng.integers(0, 99, 40), rng.integers(0, 99, 60))) for _ in range(256)]
    scorer = Scorer(
        ReferenceSpec(path=model, adapter=None, identity=identify(model, "float32")), device="cpu", tokens_per_batch=2000
    )
    wanted = np.concatenate([logps for group in scorer.score(groups) for logps in group])
    assert len(scorer.notes) == 1
    scorer.tokens_per_batch = 128_000
    allow(400 * 2**20)  # the whole batch takes 550 MB, half of it 280 MB
    found = np.concatenate([logps for group in scorer.score(groups) for logps in group])
    allow(None)
    return np.abs(found - wanted).max(), scorer.notes[1:], scorer.tokens_per_batch


def test_scoring_goes_on_with_half_of_what_does_not_fit(tiny_llama, tmp_path, monkeypatch):
    # An arena of another thread would reserve 64 MB of addresses. The variable is only read at the start of a process.
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    ((gap, notes, tokens),) = run_distributed(starved_scoring, 1, tmp_path, str(tiny_llama), fresh=True)
    assert gap < 1e-4 and tokens == 64_000
    assert notes == [
        "warning: out of memory with 128000 positions a batch; continuing with 64000. Set "
        "score.tokens_per_batch=64000 to start with that"
    ]


def test_activations_are_free_before_the_cache_of_the_allocator_is_emptied(tiny_llama, monkeypatch):
    """The traceback of the error refers to the frames of the forward pass, whose tensors stay until it is gone."""
    from raydpo.model.layout import PromptGroup
    from raydpo.reference.identity import identify
    from raydpo.reference.score import ReferenceSpec, Scorer

    spec = ReferenceSpec(path=str(tiny_llama), adapter=None, identity=identify(tiny_llama, "float32"))
    scorer = Scorer(spec, device="cpu", tokens_per_batch=64)
    held, alive, compute, back_off = [], [], scorer.model.score_layout, scorer._back_off

    def first_fails(layout, rows):
        if held:
            return compute(layout, rows)
        activations = torch.ones(8)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(scorer.model, "score_layout", first_fails)
    monkeypatch.setattr(scorer, "_back_off", lambda: (alive.append(held[0]() is not None), back_off()))
    group = PromptGroup(np.arange(5), (np.arange(3), np.arange(4)))
    assert [len(logps) for logps in scorer.score([group])[0]] == [3, 4]
    assert alive == [False] and scorer.tokens_per_batch == 32


def starved_training(model, scratch):
    from raydpo.errors import DeviceMemoryError

    done = kernel.Record.step

    def then_starve(record, row):
        done(record, row)
        allow(16 * 2**20)

    kernel.Record.step = then_starve
    table = kernel.with_reference(kernel.tiny_pairs(128), model)
    try:
        kernel.train_here(table, model, scratch, tokens_per_batch=100_000, pairs_per_step=128, steps=3)
    except DeviceMemoryError as error:
        allow(None)
        return error.tokens, str(error)


def test_training_says_what_does_not_fit(tiny_llama, tmp_path):
    ((tokens, message),) = run_distributed(starved_training, 1, tmp_path / "ranks", tiny_llama, tmp_path / "scratch")
    assert tokens == 100_000
    assert "Set train.tokens_per_batch lower, or train.gradient_checkpointing=true" in message


def test_two_passes_are_compared_only_where_the_first_leaves_no_room(monkeypatch):
    """Under a fixed limit, since the machine's free memory changes."""
    monkeypatch.setattr(budget, "_cgroup_free", lambda: 2.0**30)
    passes = []

    def run(tokens):
        passes.append(tokens)
        return hold(tokens)

    plenty = find_budget(run, CPU, most={"cpu": 512})
    assert (plenty.tokens, passes) == (512, [256]) and plenty.bytes_per_token >= 0.9 * BYTES
    assert find_budget(run, CPU, most={"cpu": 512}, known=plenty.bytes_per_token).tokens == 512 and passes == [256]
    scarce = find_budget(run, CPU, most={"cpu": 10**6}, known=plenty.bytes_per_token)
    assert passes == [256, 256, 256, 768] and scarce.tokens == pytest.approx(MARGIN * 2**30 / BYTES, rel=0.15)


def test_memory_that_the_process_kept_is_counted():
    """What was freed before stays with the process, and a pass that uses it again would seem to take nothing."""
    small = [torch.ones(2**14) for _ in range(4096)]  # blocks too small to be returned at once: 256 MiB
    del small
    found = find_budget(lambda tokens: [torch.ones(2**14) for _ in range(4 * tokens)], CPU, most={"cpu": 512})
    assert found.bytes_per_token >= 0.9 * 2**18
