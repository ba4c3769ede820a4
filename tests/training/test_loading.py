"""Under ZeRO-3 no rank holds the whole model while it is loaded."""

import ctypes
import gc
import time

import numpy as np
import pytest
import torch
from distributed import run_distributed
from tiny import make_model

from raydpo.training.policy.host_memory import HostPeak, free_bytes, host_copy

M_MMAP_THRESHOLD = -3


def test_a_peak_that_passes_is_seen():
    gc.collect()
    with HostPeak() as peak:
        passing = np.ones(20_000_000)
        time.sleep(0.5)
        del passing
    assert peak.bytes - peak.start_bytes == pytest.approx(160e6, rel=0.2)
    assert 0.5 <= peak.seconds < 60


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 20e9),
        ({"memory.max": "max\n", "memory.current": "5"}, 20e9),
        ({"memory.max": "9000000000", "memory.current": "5000000000", "memory.stat": "inactive_file 1000\n"}, 4e9 + 1000),
        ({"memory.max": "90000000000", "memory.current": "5", "memory.stat": "anon 7\n"}, 20e9),
        (
            {f"memory/memory.{name}": value for name, value in {
                "limit_in_bytes": "6000000000", "usage_in_bytes": "5000000000", "stat": "total_inactive_file 7"}.items()},
            1e9 + 7,
        ),
    ],
)  # fmt: skip
def test_free_memory_is_what_the_machine_has_within_the_limit_of_the_container(files, free, tmp_path):
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "meminfo").write_text("MemTotal:       32000000 kB\nMemAvailable:   19531250 kB\nHugePages_Total:   0\n")
    assert free_bytes(tmp_path / "meminfo", tmp_path) == free
    assert free_bytes(tmp_path / "none", tmp_path) == 0


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


def test_a_copy_from_a_gpu_is_in_page_locked_memory_if_there_is_any(monkeypatch):
    original, asked, empty = torch.arange(5.0), [], torch.empty

    def without_pins(*shape, pin_memory=False, **how):
        asked.append(pin_memory)
        return empty(*shape, **how)

    # Where no memory can be locked, as here, or no more of it, any other does.
    for locked in (False, True):
        if locked:
            monkeypatch.setattr(torch, "empty", without_pins)
        copy = host_copy(original.as_subclass(OnGpu))
        assert torch.equal(copy.as_subclass(torch.Tensor), original) and copy.data_ptr() != original.data_ptr()
        assert asked == ([True] if locked else [])


def loaded(model, zero):
    """(bytes of all weights in bfloat16, peak host memory while loading, seconds) on this rank."""
    import transformers.models.llama.modeling_llama  # noqa: F401 - its code is no weight
    from transformers.integrations import HfDeepSpeedConfig

    from raydpo.model.load import load_causal_lm
    from raydpo.model.partition import join_process_group

    # What is freed goes back at once: what is measured is what loading holds, not what the allocator keeps for later.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    join_process_group(torch.device("cpu"))
    partitioned = (
        HfDeepSpeedConfig(
            {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": zero}, "bf16": {"enabled": True}}
        )
        if zero == 3
        else None
    )
    with HostPeak() as peak:
        policy = load_causal_lm(model, "bfloat16", rope_length=None)
    del partitioned
    whole = 2 * sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in policy.parameters())
    return whole, peak.bytes - peak.start_bytes, peak.seconds


def test_loading_takes_a_rank_its_share_and_little_more(tmp_path):
    """A float32 file of 240 MB is loaded in bfloat16 by two ranks: 120 MB each if whole, 60 MB each if partitioned."""
    model = make_model(tmp_path / "model", hidden=512, layers=26)
    for whole, taken, seconds in run_distributed(loaded, 2, tmp_path / "plain", model, 2):
        print(f"whole: {taken / 1e6:.0f} of {whole / 1e6:.0f} MB in {seconds:.1f} s")
        assert taken > 0.95 * whole
    for whole, taken, seconds in run_distributed(loaded, 2, tmp_path / "shares", model, 3):
        print(f"in shares: {taken / 1e6:.0f} of {whole / 1e6:.0f} MB in {seconds:.1f} s")
        assert 0.45 * whole < taken < 0.7 * whole
