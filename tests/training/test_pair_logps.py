"""Sums, tails and WPO's weights of pairs, against their definitions on a model's full distributions."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kernel import tiny_pairs, with_reference

from raydpo.config import ObjectiveConfig
from raydpo.losses import Objective
from raydpo.model.load import load_causal_lm
from raydpo.model.logps import LogpModel
from raydpo.training.evaluate import pair_logps, reference_logps
from raydpo.training.metrics import PairSums
from raydpo.training.pairs import TrainingPairs

ROWS = [4, 1, 6]


@pytest.fixture(scope="module")
def pairs(tiny_llama):
    import pyarrow as pa

    table = with_reference(tiny_pairs(8), tiny_llama)
    return TrainingPairs.of(table.append_column("pair_weight", pa.array(np.arange(8.0))))


def test_against_the_definition(pairs, tiny_llama):
    model = load_causal_lm(str(tiny_llama), "float32", rope_length=None)
    module = LogpModel(model)
    engine = SimpleNamespace(logps=lambda layout, **asked: module(layout, **asked))
    config = ObjectiveConfig(ld_alpha=0.5, use_weighting=True)
    found = pair_logps(engine, module.lay_out(pairs.groups(ROWS)), pairs, ROWS, config)
    known = reference_logps(pairs, ROWS, config)
    for place, group in enumerate(pairs.groups(ROWS)):
        shared, weight = min(map(len, group.completions)), float(ROWS[place])
        for side, completion in zip(("chosen", "rejected"), group.completions, strict=True):
            ids = torch.from_numpy(np.concatenate([group.prompt, completion]).astype(np.int64))[None]
            with torch.no_grad():
                logps = model(input_ids=ids).logits[0, len(group.prompt) - 1 : -1].double().log_softmax(-1)
            tokens = logps.gather(1, ids[0, len(group.prompt) :, None])[:, 0]
            for values in (found, known):  # the model is the reference
                assert getattr(values, side)[place].item() == pytest.approx(tokens.sum().item(), abs=1e-4)
                assert getattr(values, f"{side}_tail")[place].item() == pytest.approx(tokens[shared:].sum().item(), abs=1e-4)
            weight *= torch.exp((tokens - logps.exp().square().sum(-1).log()).mean()).item()
        assert found.weights[place].item() == pytest.approx(weight, rel=1e-5)
    assert found.weights.requires_grad is False and found.chosen.requires_grad
    assert known.mean_chosen_tokens == pytest.approx(np.mean([len(group.completions[0]) for group in pairs.groups(ROWS)]))


@pytest.mark.parametrize("settings", [{}, {"ld_alpha": 0.5}, {"use_weighting": True}])
def test_after_the_forward_pass_nothing_is_copied_from_memory_that_a_gpu_must_wait_for(pairs, monkeypatch, settings):
    """The meta device stands for a GPU, and pinning for a mark."""
    pinned, copies, to = [], [], torch.Tensor.to

    def pin_memory(tensor):
        pinned.append(tensor)
        return tensor

    def watched(tensor, *where, **how):
        found = to(tensor, *where, **how)
        if tensor.is_cpu and not found.is_cpu:
            copies.append(how.get("non_blocking") and any(tensor is one for one in pinned))
        return found

    tokens = sum(len(one) for group in pairs.groups(ROWS) for one in group.completions)
    logps = torch.empty(tokens, device="meta", requires_grad=True)
    engine = SimpleNamespace(logps=lambda layout, **asked: (logps, logps) if asked else logps)
    objective = Objective(ObjectiveConfig(**settings))
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", watched)
    found = pair_logps(engine, None, pairs, ROWS, objective.config)
    loss = objective(found, 0.1)
    sums = PairSums(pairs.source_names, torch.device("meta"))
    sums.add(loss, found, pairs.source_of(ROWS, torch.device("meta")))
    loss.losses.sum().backward()
    assert len(copies) >= 7 and all(copies)
