"""An engine starts from the weights it was given, without moments, and its first step is the same under every ZeRO stage."""

from itertools import product

import numpy as np
import pytest
import torch
from distributed import run_distributed
from kernel import engine_here

from raydpo.model.layout import PromptGroup

LR, DECAY = 1e-2, 0.1
LORA = {"r": 4, "alpha": 8}
PROMPT, COMPLETIONS = np.arange(8, dtype=np.int32), [np.arange(20, 30, dtype=np.int32), np.arange(40, 46, dtype=np.int32)]


def masters(engine):
    """The float32 weights of all ranks, by name."""
    pieces = [(one.name, one.start, one.of(one.flat.detach()).clone()) for one in engine.state.fragments()]
    found = {}
    for name, start, values in (piece for rank in engine.gather_objects(pieces) for piece in rank):
        found.setdefault(name, {})[start] = values
    return {name: torch.cat([parts[start] for start in sorted(parts)]) for name, parts in found.items()}


def moments(engine):
    """Number of steps that the optimizer has counted, and the largest number in its moments."""
    states = [state for state in engine.state.optimizer.state.values() if state]
    tensors = [value for state in states for name, value in state.items() if torch.is_tensor(value) and "qmap" not in name]
    return max((int(state["step"]) for state in states), default=0), max(
        (float(one.abs().max()) for one in tensors), default=0
    )


def first_steps(model, kinds):
    """For every kind: steps and moments before training, master weights before and after one step, the model's after it."""
    found = []
    for kind in kinds:
        *_, engine = engine_here(model, lr=LR, weight_decay=DECAY, clip=None, **kind)
        begun, before = moments(engine), masters(engine)
        logps = engine.logps(engine.lay_out([PromptGroup(PROMPT, COMPLETIONS)]))
        engine.backward(-1000 * logps.sum(), last=True)  # far above the eps of AdamW
        engine.step(LR)
        found.append((begun, before, masters(engine), moments(engine)[0]))
    return found


# ZeRO-3 last: while its engine lives, transformers partitions every model it loads.
KINDS = [
    dict(zero=zero, dtype=dtype, lora=lora)
    for zero, lora, dtype in product((0, 1, 2, 3), (None, LORA), ("bfloat16", "float32"))
]


def test_nothing_happens_before_the_first_step_and_every_stage_takes_the_same(tiny_llama, tmp_path):
    found = run_distributed(first_steps, 2, tmp_path, tiny_llama, KINDS)[0]
    groups = {}
    for kind, (begun, before, after, steps) in zip(KINDS, found, strict=True):
        assert begun == (0, 0) and steps == 1, kind
        _, start, end = groups.setdefault((kind["dtype"], kind["lora"] is None), (kind, before, after))
        for name in start:
            assert torch.equal(before[name], start[name]), (kind, name)
            torch.testing.assert_close(
                after[name], end[name], rtol=0, atol=1e-6, msg=lambda text, at=(kind, name): f"{at}: {text}"
            )
        moved = torch.cat([((before[name] * (1 - LR * DECAY) - after[name]) / LR).abs() for name in before])
        assert float(moved[moved > 0].median()) == pytest.approx(1, abs=0.01), kind
