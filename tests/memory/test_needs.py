"""A measured budget fits, and uses the memory, by the ledger of the plan: figures of the ledger in place of a GPU's."""

import itertools

import pytest
import torch

from raydpo.config import LoraSettings, ModelConfig, TrainConfig
from raydpo.memory.ledger import BASE_BYTES, estimate_memory
from raydpo.memory.needs import PROPORTIONS, needs_of
from raydpo.model import budget
from raydpo.model.budget import MOST_TRAINED, find_budget

CUDA = torch.device("cuda")
TOTAL = 79.1 * 2**30
"""Bytes that torch tells of an H100."""
BUFFERS = 300 * 2**20
"""Bytes of the first pass besides its positions, such as workspaces."""
ERROR = 1.06
"""What a pass takes, by what the ledger says."""


@pytest.fixture
def measured(monkeypatch, llama):
    """``find_budget`` for a policy whose passes take ``ERROR`` times what the ledger says. Returns the budget, and the bytes
    in use at the peak of a step with it."""

    def find(model, workers, most=MOST_TRAINED, **train):
        given = llama, model, TrainConfig(**train)
        where = {"workers": workers, "dtype": "bfloat16"}
        needs, standing = needs_of(*given, **where), estimate_memory(*given, PROPORTIONS, **where).standing.total
        monkeypatch.setattr(budget, "_peak", lambda run, tokens, device: needs.probe(tokens) * ERROR + BUFFERS)
        monkeypatch.setattr(budget, "free_memory", lambda device, share: share * TOTAL - BASE_BYTES - standing)
        monkeypatch.setattr(budget, "reset_peak_memory", lambda device: None)
        found = find_budget(lambda tokens: None, CUDA, most=most, needs=needs)
        step = estimate_memory(*given, PROPORTIONS.scaled(found.tokens), **where).device
        return found, BASE_BYTES + step + (ERROR - 1) * needs.probe(found.tokens)

    return find


FULL, LORA = ModelConfig(path="m"), ModelConfig(path="m", lora=LoraSettings())
RECOMPUTED = ({}, {"gradient_checkpointing": True}, {"gradient_checkpointing": True, "offload_activations": True})


@pytest.mark.parametrize("model", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("zero", range(4))
def test_a_step_with_the_budget_fits_and_fills_the_gpu(measured, model, zero):
    fitting = 0
    for workers, recomputed in itertools.product((1, 2, 8), RECOMPUTED):
        found, peak = measured(model, workers, zero=zero, **recomputed)
        if found.line().startswith("warning:"):  # the optimizer alone is more than the GPU has
            assert found.tokens == budget.STEP and found.step_bytes > found.free_bytes and model is FULL, (
                workers,
                recomputed,
            )
            continue
        fitting += 1
        assert peak <= TOTAL, (workers, recomputed)
        assert peak >= 0.8 * TOTAL or found.tokens == MOST_TRAINED["cuda"], (workers, recomputed, found.line())
    assert fitting == (9 if model is LORA else {0: 0, 1: 3, 2: 3, 3: 6}[zero])
