"""Where a model is loaded to: its device, weight by weight, except under ZeRO-3."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig
from transformers.utils import logging

from raydpo.model.load import load_causal_lm


class Asked(Exception):
    pass


@pytest.mark.parametrize(
    ("device", "quantization", "zero", "to"),
    [
        ("cuda:1", None, 2, "cuda:1"),
        (torch.device("cuda"), None, 0, "cuda"),
        ("cuda:1", "8bit", 2, "cuda:1"),
        ("cpu", "8bit", 2, "cpu"),
        ("cpu", None, 2, None),
        ("cuda:1", None, 3, None),
    ],
)
def test_a_model_is_loaded_straight_to_its_device(device, quantization, zero, to, tiny_llama, monkeypatch):
    def from_pretrained(*_, **given):
        raise Asked(given)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    partitioned = None
    if zero == 3:
        partitioned = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    with pytest.raises(Asked) as asked:
        load_causal_lm(tiny_llama, "bfloat16", rope_length=None, device=device, quantization=quantization)
    del partitioned
    (given,) = asked.value.args
    assert given.get("device_map") == (None if to is None else {"": torch.device(to)})
    assert ("quantization_config" in given) is (quantization is not None)


def test_that_way_gives_the_same_bits(tiny_llama):
    """Buffers too: transformers computes rotary frequencies on the CPU and copies them."""
    plain, straight = (
        AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16, **how)
        for how in ({}, {"device_map": {"": torch.device("cpu")}})
    )
    tensors = [dict(model.named_parameters()) | dict(model.named_buffers()) for model in (plain, straight)]
    assert tensors[0].keys() == tensors[1].keys() and any("inv_freq" in name for name in tensors[0])
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert not any(hasattr(module, "_hf_hook") for module in straight.modules())


def test_progress_is_told_in_bytes_of_the_files(tiny_llama):
    told = []
    load_causal_lm(tiny_llama, "bfloat16", rope_length=None, progress=lambda *counts: told.append(counts))
    size = (tiny_llama / "model.safetensors").stat().st_size
    assert told[0] == (0, size) and told[-1] == (size, size) and told == sorted(told) and len(told) > 10
    load_causal_lm(tiny_llama, "bfloat16", rope_length=None)
    assert logging.set_tqdm_hook(None) is None
