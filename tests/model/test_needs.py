"""A measured budget fits, and uses the memory, by the ledger of the plan: figures of the ledger in place of a GPU's."""

import gc
import itertools

import pytest
import torch
from distributed import run_distributed

from raydpo.config import LoraSettings, ModelConfig, TrainConfig
from raydpo.model import budget
from raydpo.model.budget import MOST_TRAINED, find_budget
from raydpo.model.memory.anatomy import Anatomy
from raydpo.model.memory.ledger import BASE_BYTES, estimate_memory
from raydpo.model.memory.needs import PROPORTIONS, needs_of

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


# ZeRO-3 last: while its engine lives, transformers partitions every model it loads.
STANDING = [
    ("float32", {"zero": 0}),
    ("bfloat16", {"zero": 2, "gradient_checkpointing": True, "offload_activations": True}),
    *(("bfloat16", {"zero": zero}) for zero in range(4)),
]


def storages():
    """Bytes of the storages of all tensors of this process."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and each.device.type == "cpu"]
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}.values())


def wrapped(directory):
    """For each of ``STANDING``, bytes that are there when DeepSpeed has wrapped the policy, and what the ledger says."""
    from raydpo.model.partition import join_process_group
    from raydpo.training.policy.deepspeed_engine import PolicyEngine
    from raydpo.training.policy.engine import PolicySpec

    join_process_group(torch.device("cpu"))
    found, offloads, save_on_cpu = [], [], torch.autograd.graph.save_on_cpu
    torch.autograd.graph.save_on_cpu = lambda **how: (offloads.append(how), save_on_cpu(**how))[1]
    for dtype, settings in STANDING:
        spec, train = PolicySpec(path=str(directory), dtype=dtype, lora=None), TrainConfig(**settings)
        before = storages()
        engine = PolicyEngine(spec, train, torch.device("cpu"))
        taken = storages() - before
        anatomy = Anatomy.of_loaded(engine.module.causal_lm)
        memory = estimate_memory(anatomy, spec, train, PROPORTIONS, workers=2, dtype=dtype)
        offloads.clear()
        found.append((taken, memory.standing.total, anatomy, engine.find_budget().line(), len(offloads)))
        engine.load_whole_models()
        engine.engine.destroy()
        del engine
    return found


def test_the_ledger_knows_what_deepspeed_allocates_before_the_first_step(tmp_path, tiny_llama):
    """As on a GPU: a bucket counts, whether or not a CPU has touched its pages."""
    for rank in run_distributed(wrapped, 2, tmp_path, tiny_llama):
        for setting, (taken, ledger, anatomy, line, offloads) in zip(STANDING, rank, strict=True):
            assert ledger == pytest.approx(taken, rel=0.001, abs=2000), setting
            assert anatomy == Anatomy.of(tiny_llama), "as from config.json, also where the weights are partitioned"
            assert bool(offloads) == setting[1].get("offload_activations", False), (
                "a pass is measured as training computes it"
            )
            assert line.startswith("tokens_per_batch: auto = 1024 ") and "a step takes" in line
