"""Every optimizer under every ZeRO stage begins at step 0 with the weights it was given, and goes on where it stopped.

bitsandbytes' optimizers run on CPUs, too, with its own code. raydpo refuses them there, since they save no memory.
"""

import json
from itertools import product

import numpy as np
import pytest
import torch
from distributed import run_distributed
from kernel import engine_here
from safetensors.torch import load_file, save_file

from raydpo.model.layout import PromptGroup
from raydpo.training.policy import deepspeed_engine

pytest.importorskip("bitsandbytes")

LR, DECAY, AT, STEPS = 1e-2, 0.1, 3, 6
LORA = {"r": 64, "alpha": 8}  # bitsandbytes keeps moments of fewer than 4,096 numbers in 32 bits
OPTIMIZERS = [dict(), dict(optimizer_states="bfloat16"), dict(optimizer="adamw_8bit"), dict(optimizer="paged_adamw")]
POLICIES = [dict(), dict(lora=LORA), dict(lora=LORA, policy={"quantization": "4bit"})]
# ZeRO-3 last: while its engine lives, transformers partitions every model it loads.
GRID = [
    dict(zero=zero, dtype=dtype) | optimizer | policy
    for zero, dtype, optimizer, policy in product(range(4), ("bfloat16", "float32"), OPTIMIZERS, POLICIES)
    if not (zero == 3 and "policy" in policy)  # refused
]
FEW = [
    dict(zero=0, dtype="bfloat16"),
    dict(zero=0, dtype="bfloat16", optimizer="adamw_8bit", lora=LORA),
    dict(zero=0, dtype="float32", optimizer="adamw_8bit"),
    dict(zero=1, dtype="bfloat16", optimizer="paged_adamw", overlap_communication=True),
    dict(zero=1, dtype="bfloat16", optimizer="adamw_8bit", lora=LORA, policy={"quantization": "4bit"}),
    dict(zero=2, dtype="bfloat16", optimizer="adamw_8bit", overlap_communication=True),
    dict(zero=2, dtype="bfloat16", optimizer_states="bfloat16", lora=LORA),
    dict(zero=3, dtype="bfloat16", optimizer="adamw_8bit"),
    dict(zero=3, dtype="bfloat16", lora=LORA),
]


def engine_of(model, kind):
    """A new engine, which may have an optimizer of bitsandbytes."""
    make = deepspeed_engine.make_optimizer
    deepspeed_engine.make_optimizer = lambda trainable, train, _: make(trainable, train, torch.device("cuda"))
    try:
        return engine_here(model, lr=LR, weight_decay=DECAY, clip=None, **kind)[-1]
    finally:
        deepspeed_engine.make_optimizer = make


def step(engine, number):
    """A step on four prompts that follow from ``number``, whatever the number of ranks."""
    tokens = np.random.default_rng(number).integers(3, 300, (4, 3, 9), dtype=np.int32)
    groups = [PromptGroup(prompt, [*answers]) for prompt, *answers in tokens[engine.rank :: engine.world_size]]
    # The first step is one micro-batch: in bfloat16, two that cancel may add up to 0 in one stage and not in another.
    batches = [[group] for group in groups] if number else [groups]
    for batch in batches:
        logps = engine.logps(engine.lay_out(batch))
        engine.backward(-1000 * logps.sum(), last=batch is batches[-1])  # far above the eps of AdamW
    engine.step(LR)


def masters(engine):
    """The float32 weights of all ranks, by name."""
    pieces = [(one.name, one.start, one.of(one.flat.detach()).clone()) for one in engine.state.fragments()]
    found = {}
    for name, start, values in (piece for rank in engine.gather_objects(pieces) for piece in rank):
        found.setdefault(name, {})[start] = values
    return {name: torch.cat([parts[start] for start in sorted(parts)]) for name, parts in found.items()}


def stored(engine, place):
    """Write the state of all ranks to ``place``. Returns its facts."""
    place.mkdir(parents=True, exist_ok=True)
    for name, tensors in engine.state.files():
        save_file(tensors, place / name)
    engine.barrier()
    return engine.state.facts


def whole_and_resumed(model, kinds, keep):
    """For every kind: the optimizer's state before training, and the masters before it, after a step, at the end, and at the
    end of a run that goes on from a checkpoint."""
    found = []
    for number, kind in enumerate(kinds):
        engine, place = engine_of(model, kind), keep / str(number)
        begun = [state for state in engine.state.optimizer.state.values() if state]
        at = [masters(engine)]
        for count in range(STEPS):
            step(engine, count)
            if count + 1 in (1, STEPS):
                at.append(masters(engine))
            if count + 1 == AT:
                facts = stored(engine, place)
        late = engine_of(model, kind)
        late.state.read(place, facts, engine.world_size)
        for count in range(AT, STEPS):
            step(late, count)
        found.append((begun, facts, *at, masters(late)))
    return found


def _same(kinds, model, scratch):
    found = run_distributed(whole_and_resumed, 2, scratch / "ranks", model, kinds, scratch / "keep")[0]
    given, alike = load_file(model / "model.safetensors"), {}
    for kind, (begun, facts, before, first, end, resumed) in zip(kinds, found, strict=True):
        assert not begun and facts["optimizer_steps"] == AT, kind
        for name, values in before.items() if "lora" not in kind else ():
            rounded = given[name.split("causal_lm.")[-1].removeprefix("policy.")].to(getattr(torch, kind["dtype"]))
            assert torch.equal(values, rounded.float().flatten()), (kind, name)
        policy = repr([kind.get(key) for key in ("dtype", "lora", "policy")])
        like_before, like_first = alike.setdefault(policy, (before, first))
        for name in before:
            assert torch.equal(before[name], like_before[name]), (kind, name)
            assert (first[name] - like_first[name]).abs().max() < 1e-6, (kind, name)
            assert torch.equal(end[name], resumed[name]), (kind, name)
        moved = torch.cat([((before[name] * (1 - LR * DECAY) - first[name]) / LR).abs() for name in before])
        assert float(moved[moved > 1e-3].median()) == pytest.approx(1, abs=0.01), kind


def test_nothing_happens_before_the_first_step_and_a_resumed_run_is_equal_to_the_bit(tiny_llama, tmp_path):
    _same(FEW, tiny_llama, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_all_combinations(zero, dtype, tiny_llama, tmp_path):
    _same([kind for kind in GRID if (kind["zero"], kind["dtype"]) == (zero, dtype)], tiny_llama, tmp_path)


def stretch(model, kind, first, last, keep, source=None, place=None):
    """Train from step ``first`` to before step ``last``. Returns the masters at the end."""
    engine = engine_of(model, kind)
    if source is not None:
        facts, ranks = json.loads((keep / source / "facts.json").read_text())
        engine.state.read(keep / source, facts, ranks)
    for count in range(first, last):
        step(engine, count)
    if place is not None:
        (keep / place / "facts.json").write_text(json.dumps([stored(engine, keep / place), engine.world_size]))
        engine.barrier()
    return masters(engine)


def begun(model, kinds, keep):
    """All steps under ZeRO 0; and the first ones under ZeRO 0, the next ones under ZeRO 2."""
    whole = []
    for number, kind in enumerate(kinds):
        whole.append(stretch(model, kind | {"zero": 0}, 0, STEPS, keep))
        stretch(model, kind | {"zero": 0}, 0, 2, keep, place=f"{number}-a")
        stretch(model, kind | {"zero": 2}, 2, 4, keep, source=f"{number}-a", place=f"{number}-b")
    return whole


def ended(model, kinds, keep):
    """The last steps under ZeRO 3, or under ZeRO 1 if weights are quantized."""
    return [
        stretch(model, kind | {"zero": 1 if "policy" in kind else 3}, 4, STEPS, keep, source=f"{number}-b")
        for number, kind in sorted(enumerate(kinds), key=lambda each: "policy" not in each[1])
    ]


MOVED = [dict(), dict(optimizer="adamw_8bit"), dict(optimizer="adamw_8bit", lora=LORA, policy={"quantization": "4bit"})]


@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_another_stage_and_number_of_ranks_go_on(ranks, tiny_llama, tmp_path):
    kinds = sorted(MOVED, key=lambda kind: "policy" not in kind)
    whole = run_distributed(begun, ranks, tmp_path / "a", tiny_llama, kinds, tmp_path)[0]
    ends = run_distributed(ended, 3 - ranks, tmp_path / "b", tiny_llama, kinds, tmp_path)[0]
    for kind, one, other in zip(kinds, whole, ends, strict=True):
        gaps = torch.cat([(one[name] - other[name]).abs() for name in one])
        if "optimizer" in kind:  # blocks of other numbers share a scale; a weight has moved by up to 0.06
            assert gaps.mean() < 4e-4, kind
        else:
            assert gaps.max() < 1e-6, kind
