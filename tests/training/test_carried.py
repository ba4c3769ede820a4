"""A training in rounds that continues weights, moments, schedule and the order of the pairs is one training, to the bit."""

import pytest
import torch
from distributed import run_distributed
from kernel import exact, tiny_pairs, train_here, with_reference
from tiny import make_tokenizer

ROUNDS, STEPS = 3, 3  # 9 steps over 17 pairs of 4 each: two epochs of 5 steps, and rounds end within them
LORA = {"r": 4, "alpha": 8}
SETTINGS = dict(pairs_per_step=4, warmup=0.4, schedule="cosine", beta={"start": 0.2, "end": 0.05}, checkpoint_every=2)


def one_and_rounds(table, model, place, lora, zero, dtype, forget=""):
    """Steps and final weights of one training, and of the same in rounds, each of which loads what the last one exported."""
    from raydpo.config import LoraSettings
    from raydpo.training.job import Continued
    from raydpo.training.policy.engine import PolicySpec
    from raydpo.training.policy.export import export_policy

    how = SETTINGS | {"zero": zero, "dtype": dtype}
    whole = train_here(table, model, place / "s", lora=lora, steps=ROUNDS * STEPS, **how)
    rows, path, adapter = [], model, None
    for number in range(ROUNDS):
        done = number * STEPS
        facts = {"position": done, "first": done, "total": ROUNDS * STEPS}
        facts |= {forget: 0} if forget in facts else {}
        earlier = place / f"keep-{number}" / f"step-{STEPS}" if number and forget != "moments" else None
        run = train_here(
            table,
            path,
            place / "s",
            lora=None if number else lora,
            policy={"adapter": adapter} if adapter else None,
            steps=STEPS,
            keep=place / f"keep-{number + 1}",
            continued=Continued(name="rounds", begins_as="the policy before", compared="nothing", **facts),
            earlier=earlier,
            starts_as_reference=not number,
            **how,
        )
        rows += [row | {"step": row["step"] + done} for row in run.steps]
        assert not number or run.notes.count(f"first loss {run.steps[0]['loss']:.6f} = these pairs under the policy before")
        spec = PolicySpec(
            path=str(path), dtype=dtype, adapter=adapter, lora=None if adapter or not lora else LoraSettings(**lora)
        )
        final = place / f"final-{number + 1}"
        export_policy(run.engine, spec, str(model), make_tokenizer(), final)
        torch.distributed.barrier()
        path, adapter = (model, str(final)) if lora else (final, None)
    return whole.steps, rows, whole.engine.gather(), run.engine.gather()


@pytest.fixture(scope="module")
def tables(tiny_llama):
    return {dtype: with_reference(tiny_pairs(17), tiny_llama, dtype) for dtype in ("float32", "bfloat16")}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


KINDS = {
    "full": (None, 2, "float32", 1),
    "lora": (LORA, 2, "float32", 1),
    "bfloat16": (None, 1, "bfloat16", 1),
    "two ranks": pytest.param(None, 2, "float32", 2, marks=pytest.mark.slow),
    "zero 0": pytest.param(None, 0, "bfloat16", 1, marks=pytest.mark.slow),
    "zero 3": pytest.param(None, 3, "float32", 2, marks=pytest.mark.slow),
    "zero 3 lora": pytest.param(LORA, 3, "float32", 2, marks=pytest.mark.slow),
}


@pytest.mark.parametrize(("lora", "zero", "dtype", "ranks"), KINDS.values(), ids=KINDS)
def test_rounds_with_carried_moments_are_one_training(lora, zero, dtype, ranks, tables, tiny_llama, tmp_path):
    given = (tables[dtype], tiny_llama, tmp_path, lora, zero, dtype)
    whole, rounds, weights, carried = run_distributed(one_and_rounds, ranks, tmp_path / "run", *given)[0]
    assert exact(rounds) == exact(whole)
    assert len(weights) and same(weights, carried)


@pytest.mark.slow
@pytest.mark.parametrize("forget", ["position", "first", "moments"])
def test_each_part_is_needed(forget, tables, tiny_llama, tmp_path):
    given = (tables["float32"], tiny_llama, tmp_path, None, 2, "float32", forget)
    whole, rounds, weights, carried = run_distributed(one_and_rounds, 1, tmp_path / "run", *given)[0]
    assert exact(rounds)[:STEPS] == exact(whole)[:STEPS] and not same(weights, carried)
