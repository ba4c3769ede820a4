"""Settings trained together are what each is alone, whatever happens to the others."""

import json
import math
import os

import pytest
import torch
from distributed import run_distributed
from kernel import Record, exact, tiny_pairs, train_here, with_reference

from raydpo.errors import DeviceMemoryError, ModelError, TrainError

LORA = {"r": 4, "alpha": 8}
SETTINGS = [
    {"beta": 0.03},
    {"beta": 0.1, "loss": "ipo", "lr": 3e-3},
    {"beta": 0.3, "label_smoothing": 0.1, "clip": 0.05, "weight_decay": 0.1, "schedule": "cosine", "warmup": 3.0,
     "eval_every": 3},
]
STEPS = 9  # 33 pairs in steps of 8: the fifth step of an epoch has one pair


@pytest.fixture(scope="module")
def table(tiny_llama):
    return with_reference(tiny_pairs(33), tiny_llama)


def together_here(table, model, scratch, settings, *, lora=LORA, shuffle=True, dtype="float32", checkpoints=None, keep=None,
                  policy=None, starts_as_reference=True, held_out=None, **common):
    """As ``kernel.train_here``, for several settings: what happened to each, with its weights and its result."""
    from raydpo.config import LoraSettings, TrainConfig
    from raydpo.training.engine import PolicySpec, join_process_group
    from raydpo.training.loop import TrainJob
    from raydpo.training.pairs import TrainingPairs
    from raydpo.training.together import SharedPolicy, train_settings

    device = torch.device("cpu")
    trains = [TrainConfig(**{"lr": 1e-3, "pairs_per_step": 8, "tokens_per_batch": 1024} | common | one) for one in settings]
    spec = PolicySpec(path=str(model), dtype=dtype, lora=None if lora is None else LoraSettings(**lora), **(policy or {}))
    join_process_group(device)
    pairs = TrainingPairs(table)
    shared = SharedPolicy(spec, trains, device, pairs.groups(range(2)))
    jobs = [TrainJob(train=train, shuffle=shuffle, policy=spec, policy_identity="policy", reference_identity="reference",
                     starts_as_reference=starts_as_reference, coarser_dtype=dtype, fingerprint={"lr": train.lr})
            for train in trains]
    records = [Record(keep=None if keep is None else keep / str(number)) for number in range(len(settings))]
    passes = count_passes(shared)

    def after(number, engine, summary):
        records[number].weights = engine.gather()

    results = train_settings(jobs, pairs, None if held_out is None else TrainingPairs(held_out), shared, records,
                             checkpoints or [None] * len(settings), scratch, after)
    for record, result in zip(records, results, strict=True):
        record.result, record.passes = result, passes
    return records


def count_passes(shared):
    """How many settings each forward pass with gradient was for."""
    passes, compute = [], shared.compute

    def counted(layout, members, **asked):
        if torch.is_grad_enabled():
            passes.append(len(members))
        return compute(layout, members, **asked)

    shared.compute = counted
    return passes


def figures(record):
    return exact(record.steps), exact(record.evals), {name: value.tolist() for name, value in record.weights.items()}


def same(row, wanted, what=""):
    for name in (name for name in wanted if name.endswith("margin_correlation")):
        # Of margins that hardly differ yet, it is a quotient of roundings.
        assert row[name] == pytest.approx(wanted[name], abs=1e-3), (what, name)
        row, wanted = ({key: value for key, value in one.items() if key != name} for one in (row, wanted))
    assert row == pytest.approx(wanted, abs=1e-5, rel=1e-5), what


def close(ours, theirs, what=""):
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        assert len(mine) == len(other)
        for row, wanted in zip(mine, other, strict=True):
            same(row, wanted, what)
    assert ours[2].keys() == theirs[2].keys()
    for name, weight in theirs[2].items():
        assert torch.allclose(torch.tensor(ours[2][name]), torch.tensor(weight), atol=1e-5), (what, name)


def alone_and_together(table, model, scratch, settings, common):
    alone = []
    for one in settings:
        run = train_here(table, model, scratch, lora=common.get("lora", LORA),
                         **{"steps": STEPS, "eval_every": 4} | {key: value for key, value in common.items() if key != "lora"}
                         | one, held_out=table)
        run.weights = run.engine.gather()
        alone.append(figures(run))
    records = together_here(table, model, scratch, settings, held_out=table, **{"steps": STEPS, "eval_every": 4} | common)
    for record in records:
        if isinstance(record.result, BaseException):
            raise record.result
    return alone, [figures(record) for record in records], records[0].passes, records[0].notes


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_is_what_it_is_alone(ranks, table, tiny_llama, tmp_path):
    """In tree layout, with several micro-batches a step."""
    found = run_distributed(alone_and_together, ranks, tmp_path / "run", table, tiny_llama, tmp_path / "s", SETTINGS,
                            {"tokens_per_batch": 200})
    alone, together, passes, notes = found[0]
    for setting, mine, wanted in zip(SETTINGS, together, alone, strict=True):
        if ranks == 2 and not mine[2]:
            continue  # weights are gathered by rank 0
        close(mine, wanted, setting)
        assert mine[0][0]["loss"] == pytest.approx(wanted[0][0]["loss"], abs=1e-6)
    assert any("tree" in note and "3 settings together" in note for note in notes)
    assert set(passes) == {3} and len(passes) > STEPS, "each micro-batch is computed once for all"
    assert len({json.dumps(figures[2]) for figures in together}) == 3


def several_kinds(table, model, scratch):
    other = [{"beta": 0.1}, {"beta": 0.5, "lr": 2e-3}]
    unordered = [{"beta": 0.1}, {"beta": 0.1, "seed": 5}]
    return [alone_and_together(table, model, scratch, settings, common)[:2] for settings, common in (
        (other, {"gradient_checkpointing": True, "steps": 3}),
        (other, {"policy": {"layout": "padded"}, "steps": 3}),
        (other, {"lora": LORA | {"rslora": True, "target_modules": r".*layers\.1\..*(q|v)_proj"}, "steps": 3}),
        (other, {"policy": {"quantization": "4bit"}, "starts_as_reference": False, "steps": 3}),
        (unordered, {"shuffle": False, "steps": 3}),
    )]


def test_each_is_what_it_is_alone_in_other_ways_to_compute(table, tiny_llama, tmp_path):
    (found,) = run_distributed(several_kinds, 1, tmp_path / "run", table, tiny_llama, tmp_path / "s")
    for alone, together in found:
        for mine, wanted in zip(together, alone, strict=True):
            close(mine, wanted)
    of_one_seed, of_another = found[-1][1]
    assert of_one_seed[0][1]["loss"] != of_another[0][1]["loss"], "adapters begin as their seeds say"


def interrupted(table, model, scratch, keep):
    common = dict(steps=11, checkpoint_every=4, held_out=table)
    whole = [figures(one) for one in together_here(table, model, scratch / "a", SETTINGS, keep=keep, **common)]
    places = [keep / str(number) for number in range(3)]
    rest = together_here(table, model, scratch / "b", SETTINGS, checkpoints=[place / "step-4" for place in places], **common)
    mixed = together_here(table, model, scratch / "c", SETTINGS, **common,
                          checkpoints=[places[0] / "step-8", None, places[2] / "step-4"])
    alone = train_here(table, model, scratch / "d", lora=LORA, checkpoint=places[1] / "step-8", **common | SETTINGS[1])
    alone.weights = alone.engine.gather()
    return whole, [figures(one) for one in rest], [figures(one) for one in mixed], mixed[0].passes, figures(alone)


def test_interrupted_equals_uninterrupted(table, tiny_llama, tmp_path):
    (found,) = run_distributed(interrupted, 1, tmp_path / "run", table, tiny_llama, tmp_path / "s", tmp_path / "keep")
    whole, rest, mixed, passes, alone = found
    for (steps, evals, weights), after in zip(whole, rest, strict=True):
        assert after[0] == steps[4:] and after[2] == weights
        assert after[1] == [row for row in evals if row["step"] > 4]
    # One from step 8, one from the beginning, one from step 4: whoever is behind goes first, until they meet.
    for (steps, evals, weights), after, first in zip(whole, mixed, (8, -1, 4), strict=True):
        close(after, ([row for row in steps if row["step"] > first], [row for row in evals if row["step"] > first], weights))
    assert passes == [1] * 4 + [2] * 4 + [3] * 3
    steps, evals, weights = whole[1]
    close(alone, (steps[8:], [row for row in evals if row["step"] > 8], weights), "a checkpoint of several, continued alone")


def diverging(table, model, scratch):
    settings = [{"beta": 0.1}, {"lr": 1e30, "max_skipped": 1}, {"beta": 0.3}]
    common = dict(steps=STEPS, shuffle=True)
    alone = [exact(train_here(table, model, scratch, lora=LORA, **common, **settings[number]).steps) for number in (0, 2)]
    records = together_here(table, model, scratch, settings, **common)
    return alone, [exact(record.steps) for record in records], [record.result for record in records], records[0].passes


def test_a_setting_that_is_not_finite_skips_and_ends_alone(table, tiny_llama, tmp_path):
    (found,) = run_distributed(diverging, 1, tmp_path / "run", table, tiny_llama, tmp_path / "s")
    alone, together, results, passes = found
    assert [row["skipped"] for row in together[1]] == [0, 1, 1]
    assert isinstance(results[1], TrainError) and "2 such step(s) in a row" in str(results[1])
    for mine, wanted, result in zip(together[::2], alone, results[::2], strict=True):
        assert result.steps == STEPS and result.skipped == 0
        assert all(math.isfinite(row["loss"]) for row in mine)
        for row, other in zip(mine, wanted, strict=True):
            same(row, other)
    assert passes == [3] * 3 + [2] * (STEPS - 3)


def one_rank_lacks_a_piece(table, model, scratch, keep):
    import shutil

    import torch.distributed as dist

    common = dict(steps=6, checkpoint_every=3)
    together_here(table, model, scratch / "a", SETTINGS, keep=keep, **common)
    dist.barrier()
    places = [keep / str(number) / "step-3" for number in range(3)]
    if dist.get_rank() == 1:  # a copy of its own, as each machine has
        places[1] = shutil.copytree(places[1], scratch / "copy")
        next(places[1].glob("state-00000-*.safetensors")).unlink()
    records = together_here(table, model, scratch / f"b{dist.get_rank()}", SETTINGS, checkpoints=places, **common)
    return [record.result if isinstance(record.result, BaseException) else record.result.steps for record in records]


def test_what_one_rank_lacks_ends_a_setting_on_all(table, tiny_llama, tmp_path):
    for results in run_distributed(one_rank_lacks_a_piece, 2, tmp_path / "run", table, tiny_llama, tmp_path / "s",
                                   tmp_path / "keep"):
        assert results[0] == results[2] == 6
        assert isinstance(results[1], TrainError) and "lacks elements" in str(results[1])


def one_rank_fails(table, model, scratch, kind):
    from raydpo.training import together

    step, rank = together.SettingEngine.step, os.environ["RANK"]

    def fails(self, learning_rate):
        if rank == "1" and self.number == 1 and self.done == 1:
            raise kind("1024 positions are too many on this rank alone")
        return step(self, learning_rate)

    together.SettingEngine.step = fails
    try:
        together_here(table, model, scratch / rank, SETTINGS, steps=3)
    except (RuntimeError, MemoryError) as error:
        return type(error).__name__, str(error)


@pytest.mark.parametrize("kind", [RuntimeError, DeviceMemoryError])
def test_an_error_of_one_rank_ends_all_settings(kind, table, tiny_llama, tmp_path):
    """At once on the rank that has it; Ray then ends the other one, which here finds a closed connection."""
    (_, other), (name, mine) = run_distributed(one_rank_fails, 2, tmp_path / "run", table, tiny_llama, tmp_path / "s", kind)
    assert name == kind.__name__ and "on this rank alone" in mine
    assert "on this rank alone" not in other


def mixing(model, scratch):
    from raydpo.training import together

    table = with_reference(tiny_pairs(9), model)
    compute = together.SharedPolicy.compute

    def rows_that_meet(self, layout, members):
        (found,) = compute(self, layout, members)
        return (found + 0.1 * (found.mean(0) - found),)

    together.SharedPolicy.compute = rows_that_meet
    with pytest.raises(ModelError) as caught:
        together_here(table, model, scratch, SETTINGS, steps=1)
    return str(caught.value)


def test_a_model_whose_rows_meet_is_refused_at_load(tiny_llama, tmp_path):
    (message,) = run_distributed(mixing, 1, tmp_path / "run", tiny_llama, tmp_path / "s")
    assert "cannot train settings together" in message and "one by one" in message


def measured(model):
    from raydpo.config import LoraSettings, TrainConfig
    from raydpo.training.engine import PolicySpec, join_process_group
    from raydpo.training.together import SharedPolicy

    device = torch.device("cpu")
    join_process_group(device)
    spec = PolicySpec(path=str(model), dtype="float32", lora=LoraSettings(**LORA))
    per_token = {}
    for count in (1, 8):
        shared = SharedPolicy(spec, [TrainConfig()] * count, device)
        per_token[count] = shared.find_budget()
        assert not shared.stack.gradients.any()
    return per_token


def test_a_measured_budget_is_of_one_setting_among_all(tiny_llama, tmp_path):
    (found,) = run_distributed(measured, 1, tmp_path / "run", tiny_llama)
    assert (found[1].tokens, found[8].tokens) == (1024, 256)
    assert found[8].bytes_per_token > 4 * found[1].bytes_per_token
