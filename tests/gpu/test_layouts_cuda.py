"""Implementations of attention that only run on CUDA, and their log-probs."""

import dataclasses

import numpy as np
import pytest
import torch
from architectures import make_random
from definition import VOCAB, groups

from raydpo.model.attention import Demand, why_not
from raydpo.model.bodycheck import why_wrong
from raydpo.model.budget import reset_peak_memory, used_memory
from raydpo.model.layout import Method, PromptGroup
from raydpo.model.logps import LogpModel
from raydpo.model.selfcheck import choose_layout

CUDA = torch.device("cuda")
BODIES = ["flash", "varlen", "flex", "sdpa"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"window": 4096},
        {"key_heads": 8},
        {"key_heads": 1},
        {"softcap": 50.0},
        {"sinks": True},
        {"size": 128},
        {"size": 256},
    ],
    ids=str,
)
@pytest.mark.parametrize("body", BODIES)
def test_bodies_are_the_definition_in_values_and_gradients(body, change):
    demand = dataclasses.replace(Demand(size=64, dtype=torch.bfloat16, heads=8, key_heads=2), **change)
    if reason := why_not(body, demand):
        pytest.skip(reason)
    assert why_wrong(body, [demand], CUDA) is None


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "qwen3_moe"])
def test_the_self_check_chooses_the_tree_in_bfloat16(name):
    sizes = {} if name == "gemma2" else {"hidden_size": 256}
    ours = LogpModel(make_random(name, VOCAB, **sizes).to(CUDA, torch.bfloat16))
    report = choose_layout(ours, CUDA)
    assert report.method.layout == "tree", report.line
    tree_logps = np.concatenate([one for group in ours.score(groups(), CUDA) for one in group])
    ours.use(Method("padded"))
    padded = np.concatenate([one for group in ours.score(groups(), CUDA) for one in group])
    assert np.abs(tree_logps - padded).mean() < 0.02


class NoLogits:
    weight_dtype = torch.bfloat16

    def __call__(self, hidden, targets):
        return hidden.sum()


def test_logits_take_little_memory():
    """At 4,096 tokens and a vocabulary of 150,000: at most 1.3 times the forward pass without any logits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=150_000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=16,
        num_attention_heads=16,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    model = LogpModel(LlamaForCausalLM(config).to(CUDA, torch.bfloat16).eval())
    choose_layout(model, CUDA)
    layout = model.lay_out([PromptGroup(np.arange(1), (np.arange(1, 4096),))]).to(CUDA)
    peaks = []
    with torch.no_grad():
        for head in (model._parts[2], NoLogits()):
            model._parts = (*model._parts[:2], head)
            model(layout)
            torch.cuda.empty_cache()
            reset_peak_memory(CUDA)
            model(layout)
            peaks.append(used_memory(CUDA))
    assert peaks[0] < 1.3 * peaks[1], peaks
