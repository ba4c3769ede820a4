"""Equalities: cached and live reference, one and several workers, interrupted or not, every micro-batch size."""

import math

import numpy as np
import pyarrow as pa
import pytest
from distributed import run_distributed
from kernel import exact, tiny_pairs, train_here, with_reference

from raydpo.config import LOSSES

PAIRS, STEPS = 33, 9  # 33 pairs in steps of 8: the fifth step of an epoch has one pair, fewer than there are ranks


def curves(jobs):
    """Loss curves of several runs, one after the other in one process group."""
    return [[row["loss"] for row in train_here(*args, **kwargs).steps] for args, kwargs in jobs]


@pytest.fixture(scope="module")
def table(tiny_llama):
    return with_reference(tiny_pairs(PAIRS), tiny_llama)


# test_state continues adapters of every stage on another number of workers.
@pytest.mark.parametrize("lora", [None, pytest.param({"r": 4, "alpha": 8}, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_one_worker_equals_two_for_every_zero_stage(lora, table, tiny_llama, tmp_path):
    # ZeRO-3 last: while its engine lives, transformers partitions every model it loads.
    settings = [
        dict(zero=0),
        dict(zero=1),
        dict(zero=2),
        dict(zero=2, tokens_per_batch=200),
        dict(zero=2, gradient_checkpointing=True),
        dict(zero=3),
    ]
    jobs = [((table, tiny_llama, tmp_path / "scratch"), dict(lora=lora, steps=STEPS, **one)) for one in settings]
    (alone,) = run_distributed(curves, 1, tmp_path / "one", jobs)
    two = run_distributed(curves, 2, tmp_path / "two", jobs, fresh=lora is None)
    assert two[0] == two[1]
    for one, other, setting in zip(alone, two[0], settings, strict=True):
        assert one == pytest.approx(alone[0], abs=1e-5), setting
        assert other == pytest.approx(alone[0], abs=1e-5), setting
    assert alone[0][0] == pytest.approx(math.log(2), abs=1e-6) and min(alone[0]) < 0.685  # it learns


def first_losses(jobs):
    return [train_here(*args, **kwargs).steps[0]["loss"] for args, kwargs in jobs]


def test_first_loss_is_ln_2(tiny_llama, tiny_qwen3, tmp_path):
    jobs = [
        (
            (with_reference(tiny_pairs(PAIRS), model, dtype), model, tmp_path / "scratch"),
            dict(dtype=dtype, steps=1, zero=zero, lora=lora),
        )
        for model in (tiny_llama, tiny_qwen3)
        for dtype in ("float32", "bfloat16")
        for zero, lora in ((2, None), (2, {"r": 4, "alpha": 8}), (1, None))
    ]
    (losses,) = run_distributed(first_losses, 1, tmp_path / "ranks", jobs)
    for loss, (_, settings) in zip(losses, jobs, strict=True):
        assert abs(loss - math.log(2)) < (1e-5 if settings["dtype"] == "float32" else 1e-3), settings


def with_live_reference(table, model):
    """Reference log-probs from a second model in memory: plain transformers, one unpadded sequence at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    live = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for side in ("chosen", "rejected"):
        rows = []
        for prompt, completion in zip(table["prompt_ids"].to_pylist(), table[f"{side}_ids"].to_pylist(), strict=True):
            ids = torch.tensor([prompt + completion])
            with torch.no_grad():
                logps = live(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
            rows.append(logps.numpy())
        name = f"ref_{side}_logps"
        table = table.set_column(table.column_names.index(name), name, pa.array(rows, pa.list_(pa.float32())))
    return table


def test_cached_equals_live_reference_for_every_loss(table, tiny_llama, tmp_path):
    live = with_live_reference(table, tiny_llama)
    names = [name for name, traits in LOSSES.items() if traits.reference]
    jobs = [
        (
            (data, tiny_llama, tmp_path / "scratch"),
            dict(loss=name, steps=2, **({"label_smoothing": 1e-3} if name == "exo_pair" else {})),
        )
        for name in names
        for data in (table, live)
    ]
    (losses,) = run_distributed(curves, 1, tmp_path / "ranks", jobs)
    for name, cached, lived in zip(names, losses[::2], losses[1::2], strict=True):
        if name == "dpop":  # it has a kink where the policy is the reference: rounding decides the first gradient
            cached, lived = cached[:1], lived[:1]
        # IPO's loss is of the order of (1 / 2 beta)^2 = 25: its rounding is relative.
        assert cached == pytest.approx(lived, abs=1e-5, rel=1e-6), name


def interrupted(table, model, scratch, keep, settings):
    whole = train_here(table, model, scratch, steps=11, checkpoint_every=4, keep=keep, held_out=table, **settings)
    return whole.steps, whole.evals


def continued(table, model, scratch, checkpoint, settings):
    rest = train_here(table, model, scratch, steps=11, checkpoint_every=4, checkpoint=checkpoint, held_out=table, **settings)
    return rest.steps, rest.evals


LORA_IN_BFLOAT16 = dict(dtype="bfloat16", lora={"r": 4, "alpha": 8})


@pytest.mark.parametrize(
    "settings",
    [
        dict(zero=2),
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in (  # test_optimizer has ZeRO-3, too
                dict(zero=3),
                dict(zero=3) | LORA_IN_BFLOAT16,
                dict(zero=1) | LORA_IN_BFLOAT16,
                dict(zero=0),
                dict(zero=0, dtype="bfloat16"),
            )
        ),
    ],
    ids=str,
)
def test_interrupted_equals_uninterrupted_exactly(settings, table, tiny_llama, tmp_path):
    """The runs cross the end of an epoch: step 5 is short, step 8 is in the second epoch."""
    (steps, evals), _ = run_distributed(
        interrupted, 2, tmp_path / "a", table, tiny_llama, tmp_path / "s", tmp_path / "keep", settings
    )
    for step in (4, 8):
        (rest, late), _ = run_distributed(
            continued,
            2,
            tmp_path / f"b{step}",
            table,
            tiny_llama,
            tmp_path / "s",
            tmp_path / "keep" / f"step-{step}",
            settings,
        )
        assert exact(rest) == exact(steps)[step:]
        assert exact(late) == exact(evals)[-1:]


def test_gradient_and_loss_do_not_depend_on_the_order_of_a_step(table, tiny_llama, tmp_path):
    order = np.arange(8)[::-1]
    first = table.slice(0, 8)
    jobs = [
        ((data, tiny_llama, tmp_path / "scratch"), dict(steps=3, shuffle=False))
        for data in (first, first.take(pa.array(order)))
    ]
    (losses,) = run_distributed(curves, 1, tmp_path / "ranks", jobs)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
