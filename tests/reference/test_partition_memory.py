"""What each of two processes holds of a model: half of it, and little more while it is loaded and used."""

import ctypes

import numpy as np
import pytest
import torch
from distributed import run_distributed
from tiny import make_model
from transformers import AutoConfig, AutoModelForCausalLM

from raydpo.model.layout import PromptGroup
from raydpo.model.load import load_causal_lm
from raydpo.model.logps import LogpModel
from raydpo.model.partition import Partition, join_process_group, partitioned, partitioned_loading
from raydpo.training.policy.host_memory import HostPeak

M_MMAP_THRESHOLD = -3
MOST = 0.62
"""Largest share of the model's bytes that each of two processes may hold, libraries apart."""


def large_model(directory, layers):
    """A random model in bfloat16 with weights of 8.4 million a layer and 1 million besides."""
    small = make_model(directory, hidden=1024, layers=1)
    config = AutoConfig.from_pretrained(small, num_hidden_layers=layers)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="200MB")
    return sum(parameter.numel() for parameter in model.parameters())


def peaks(tiny, model):
    """Peak bytes above those before, while ``model`` is loaded, after that, and while it scores; and seconds of loading.

    Without the self-check, whose many short passes each exchange the whole model.
    """
    # What is freed goes back at once: what is measured is what loading holds, not what the allocator keeps for later.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    join_process_group(torch.device("cpu"))
    rows = [PromptGroup(np.arange(3, 40, dtype=np.int32), (np.arange(20, dtype=np.int32),))]

    def load(directory):
        with partitioned_loading(Partition(2), "bfloat16"):
            loaded = LogpModel(load_causal_lm(directory, "bfloat16", rope_length=None))
        return partitioned(loaded, Partition(2), "bfloat16")

    load(tiny).score(rows, torch.device("cpu"))  # libraries are imported, and hold what they hold
    with HostPeak() as loading:
        loaded = load(model)
    with HostPeak() as scoring:
        ((logps,),) = loaded.score(rows, torch.device("cpu"))
    assert np.isfinite(logps).all()
    before = loading.start_bytes
    return loading.bytes - before, scoring.start_bytes - before, scoring.bytes - before, loading.seconds


@pytest.mark.slow  # writes 0.5 GB
def test_a_rank_holds_its_part_and_little_more(tiny_llama, tmp_path):
    weights = large_model(tmp_path / "model", 28)
    assert weights > 250e6
    for found in run_distributed(peaks, 2, tmp_path / "ranks", str(tiny_llama), str(tmp_path / "model")):
        loading, after, scoring = (each / (2 * weights) for each in found[:3])
        size = f"{2 * weights / 1e6:.0f} MB in {found[3]:.1f} s"
        print(f"{size}: {loading:.0%} loading, {after:.0%} after, {scoring:.0%} scoring")
        assert after > 0.45 and loading < MOST and scoring < MOST
