"""Steps whose loss or gradient is not finite are not taken, under any ZeRO stage, and the pairs are named."""

import math
import time
from statistics import median

import pyarrow as pa
import pytest
import torch
from distributed import run_distributed
from kernel import exact, tiny_pairs, train_here, with_reference

from raydpo.errors import DeviceMemoryError, TrainError
from raydpo.training import trainer
from raydpo.training.launch.board import Mailbox

# ZeRO-3 last: while its engine lives, transformers partitions every model it loads.
KINDS = [dict(zero=0), dict(zero=1), dict(zero=2), dict(zero=2, loss="aot"), dict(zero=2, dtype="bfloat16"), dict(zero=3)]
BAD = 19


@pytest.fixture(scope="module")
def table(tiny_llama):
    return with_reference(tiny_pairs(33), tiny_llama)


def spoiled(table, rows):
    """``table`` with reference log-probs that are infinite in some rows."""
    column = "ref_chosen_logps"
    values = table[column].to_pylist()
    for row in rows:
        values[row] = [math.inf] * len(values[row])
    return table.set_column(table.column_names.index(column), column, pa.array(values, table.schema.field(column).type))


def runs(table, model, scratch):
    """Notes, metrics, summary and final weights of a run with a spoiled step, for every kind."""
    found = []
    for kind in KINDS:
        # File order: the third step of eight pairs holds the bad one.
        run = train_here(spoiled(table, [BAD]), model, scratch, shuffle=False, steps=4, starts_as_reference=False, **kind)
        found.append(
            (
                [note for note in run.notes if "not finite" in note],
                run.steps,
                run.summary,
                {name: tensor.float().sum().item() for name, tensor in run.engine.gather().items()},
            )
        )
    return found


def clean(table, model, scratch):
    """Losses without spoiled pairs, for every kind. Only the first two steps can be compared: the third is not taken."""
    return [
        [
            row["loss"]
            for row in train_here(table, model, scratch, shuffle=False, steps=4, starts_as_reference=False, **kind).steps
        ]
        for kind in KINDS
    ]


def test_the_step_is_not_taken_and_pair_and_rank_are_named(table, tiny_llama, tmp_path):
    found = run_distributed(runs, 2, tmp_path / "a", table, tiny_llama, tmp_path / "s")
    whole = run_distributed(clean, 2, tmp_path / "b", table, tiny_llama, tmp_path / "s")
    for kind, (notes, steps, summary, weights), losses in zip(KINDS, found[0], whole[0], strict=True):
        assert len(notes) == 1 and f"tiny:{BAD + 1}" in notes[0] and "rank " in notes[0], kind
        assert "step 3" in notes[0] and "tiny:18" not in notes[0]
        assert [row["skipped"] for row in steps] == [0, 0, 1, 0] and summary.skipped == 1
        # The same two steps before it, and a finite one after it, from weights and moments that it left alone.
        assert [row["loss"] for row in steps[:2]] == losses[:2]
        assert math.isfinite(steps[3]["loss"]) and math.isfinite(steps[3]["grad_norm"])
        assert all(math.isfinite(value) for value in weights.values())


def skipped_and_resumed(table, model, scratch, keep):
    """Metrics of a run whose third step is not taken, and of a run that continues from its checkpoint of that step."""
    found = []
    for number, kind in enumerate(KINDS[::2]):
        settings = dict(shuffle=False, steps=6, checkpoint_every=3, starts_as_reference=False) | kind
        place = keep / str(number)
        whole = train_here(spoiled(table, [BAD]), model, scratch, keep=place, **settings)
        rest = train_here(spoiled(table, [BAD]), model, scratch, checkpoint=place / "step-3", **settings)
        found.append((exact(whole.steps), exact(rest.steps), rest.summary.skipped))
    return found


def test_a_run_goes_on_exactly_from_a_checkpoint_of_a_step_that_was_not_taken(table, tiny_llama, tmp_path):
    (found,) = run_distributed(skipped_and_resumed, 1, tmp_path / "a", table, tiny_llama, tmp_path / "s", tmp_path / "keep")
    for kind, (whole, rest, skipped) in zip(KINDS[::2], found, strict=True):
        assert [row["skipped"] for row in whole] == [0, 0, 1, 0, 0, 0], kind
        assert rest == whole[3:] and skipped == 1, kind


def too_many(table, model, scratch):
    with pytest.raises(TrainError) as caught:
        train_here(
            spoiled(table, range(16, 33)), model, scratch, shuffle=False, starts_as_reference=False, steps=9, max_skipped=1
        )
    return str(caught.value)


def test_too_many_in_a_row_end_the_run(table, tiny_llama, tmp_path):
    for message in run_distributed(too_many, 2, tmp_path, table, tiny_llama, tmp_path / "s"):
        assert "step 4" in message and "2 such step(s) in a row, more than train.max_skipped 1" in message
        assert "rank 0: tiny:" in message and "rank 1: tiny:" in message


def with_slow_evaluations(table, model, scratch, keep):
    def slow(*_, **__):
        time.sleep(0.5)
        return {"eval_loss": 1.0}

    before, trainer.evaluate = trainer.evaluate, slow
    try:
        kind = dict(steps=4, eval_every=2, checkpoint_every=2, held_out=table, keep=keep)
        runs = (
            train_here(table, model, scratch, **kind),
            train_here(table, model, scratch, checkpoint=keep / "step-2", **kind),
        )
        return [(run.steps, run.summary) for run in runs]
    finally:
        trainer.evaluate = before


def test_seconds_count_all_evaluations_and_the_rate_none_as_in_the_metrics(table, tiny_llama, tmp_path):
    """Also over two sessions. The evaluation before the first step is no part of either."""
    kept = run_distributed(with_slow_evaluations, 1, tmp_path / "a", table, tiny_llama, tmp_path, tmp_path / "k")[0]
    (rows, summary), (late, resumed) = kept
    assert (len(rows), len(late)) == (4, 2)
    for each, steps in ((summary, rows), (resumed, rows[:2] + late)):
        of_steps = sum(row["seconds"] for row in steps)
        assert each.step_seconds == pytest.approx(of_steps)
        assert each.tokens_per_second == pytest.approx(sum(row["tokens"] for row in steps) / of_steps)
        assert each.seconds - each.step_seconds > 1.0, "the evaluations after steps 2 and 4"


def one_is_slow(table, model, scratch):
    import torch
    import torch.distributed as dist

    def delay(module, _):
        if dist.is_initialized() and dist.get_rank() == 1 and isinstance(module, torch.nn.Embedding):
            time.sleep(0.3)

    torch.nn.modules.module.register_module_forward_pre_hook(delay)
    found = train_here(table, model, scratch, steps=22)
    return found.steps, [note for note in found.notes if "slowest" in note]


def test_a_slow_rank_is_found_waited_for_and_named_once(table, tiny_llama, tmp_path):
    (fast, notes), (slow, _) = run_distributed(one_is_slow, 2, tmp_path / "run", table, tiny_llama, tmp_path / "s")
    assert {row["slowest_rank"] for row in fast[1:]} == {1.0}
    assert len(notes) == 1 and "rank 1 has been the slowest for 20 steps" in notes[0]
    assert median(row["time/wait"] for row in fast) > 0.2 > median(row["time/wait"] for row in slow)


def runs_out(table, model, scratch):
    """What is raised where memory runs out in each part of a run, by the words of two libraries."""
    from raydpo.training import step
    from raydpo.training.policy.deepspeed_engine import PolicyEngine

    def fail(*_, **__):
        raise errors[0]

    places = [
        (PolicyEngine, "find_budget"),
        (PolicyEngine, "step"),
        (step, "_add_up"),
        (trainer, "evaluate"),
        (trainer, "compare"),
        (trainer, "greedy_answers"),
    ]
    errors = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")]
    found = []
    for number, (where, name) in enumerate(places):
        if number == 1:
            errors[0] = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        before = getattr(where, name)
        setattr(where, name, fail)
        try:
            with pytest.raises(DeviceMemoryError) as caught:
                budget = "auto" if name == "find_budget" else 1024
                train_here(table, model, scratch, steps=1, pairs_per_step=8, tokens_per_batch=budget, held_out=table)
        finally:
            setattr(where, name, before)
        found.append((name, str(caught.value), caught.value.tokens))
    return found


def test_memory_that_runs_out_anywhere_in_a_run_is_told_and_halves_the_budget(table, tiny_llama, tmp_path):
    """Also in the update, where an optimizer's first step makes its moments."""
    (found,) = run_distributed(runs_out, 1, tmp_path / "a", table, tiny_llama, tmp_path / "s")
    words = {"step": "a step", "_add_up": "a step", "evaluate": "an evaluation", "compare": "the step-0 gate"}
    words["find_budget"] = "the measurement of a budget"
    for name, message, tokens in found:
        assert tokens == (768 if name == "find_budget" else 1024)
        assert f"{tokens} token positions a micro-batch do not fit in memory: {words.get(name, 'an answer')}" in message
        board = Mailbox()
        number, _ = board.enter()
        assert board.back_off(tokens, number) and board.enter() == (2, tokens // 2), name


def tight(table, model, scratch, shares):
    """Notes, losses, positions of the largest micro-batch by step, and the budget at the end, of a run whose budget is
    measured and of one where it is set. ``shares``: of the memory that the first step takes, by rank."""
    import torch.distributed as dist

    from raydpo.model.budget import Budget
    from raydpo.training.policy.deepspeed_engine import PolicyEngine
    from raydpo.training.step import Stepper

    sizes, take = [], Stepper.take

    def taken(stepper, step, *given):
        sizes.append(max(layout.input_ids.numel() for _, layout in step.batches))
        return take(stepper, step, *given)

    Stepper.take = taken
    trainer.share_of_first_step = lambda device, before, share: shares[dist.get_rank()]
    PolicyEngine.find_budget = lambda engine, share: Budget(512, 1.0, 1.0)
    found = []
    for budget in ("auto", 512):
        kind = dict(steps=4, shuffle=False, pairs_per_step=16, tokens_per_batch=budget, starts_as_reference=False)
        run = train_here(table, model, scratch, **kind)
        notes = [note for note in run.notes if "of a GPU's memory" in note]
        found.append((notes, [row["loss"] for row in run.steps], sizes[:4], run.summary.tokens_per_batch))
        del sizes[:4]
    return found


def test_a_budget_that_leaves_too_little_is_halved_after_the_first_step(table, tiny_llama, tmp_path):
    """On all ranks, whichever has too little; the steps have the same pairs, so the losses stay."""
    ranks = run_distributed(tight, 2, tmp_path / "a", table, tiny_llama, tmp_path / "s", (0.5, 0.96))
    (halved, kept), (other, _) = ranks
    (note,), losses, sizes, budget = halved
    assert "positions take 96% of a GPU's memory; continuing with 256. Set train.tokens_per_batch=256" in note
    assert sizes[0] > 256 >= max(sizes[1:]) and budget == other[3] == 256 and max(other[2][1:]) <= 256
    (note,), same, sizes, _ = kept
    assert "another one may not fit. Set train.tokens_per_batch=256" in note and max(sizes) > 256
    assert losses == pytest.approx(same, rel=1e-5)
