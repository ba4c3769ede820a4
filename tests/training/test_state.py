"""Checkpoints fit every number of ranks and every ZeRO stage, and incomplete ones are refused."""

import json
import shutil

import pytest
from distributed import run_distributed
from kernel import tiny_pairs, train_here, with_reference

from raydpo.errors import TrainError

STEPS, AT = 9, 4
LORA = {"r": 4, "alpha": 8}
# ZeRO-3 last: while its engine lives, transformers partitions every model it loads.
KINDS = {
    f"zero{zero}-{name}": dict(zero=zero, lora=lora)
    for zero in (0, 1, 2, 3)
    for name, lora in (("full", None), ("lora", LORA))
}


@pytest.fixture(scope="module")
def table(tiny_llama):
    return with_reference(tiny_pairs(33), tiny_llama)


def trained(table, model, scratch, keep, names):
    """Metrics of whole runs, each with its checkpoint of step AT in its own folder."""
    return [
        train_here(table, model, scratch, steps=STEPS, checkpoint_every=AT, keep=keep / name, **KINDS[name]).steps
        for name in names
    ]


def resumed(table, model, scratch, keep, names):
    """Metrics of the rest of each run; names are (run of the checkpoint, run to train as)."""
    runs = [
        train_here(table, model, scratch, steps=STEPS, checkpoint=keep / old / f"step-{AT}", **KINDS[new])
        for old, new in names
    ]
    return [(run.steps, run.notes) for run in runs]


def losses(rows):
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 2])
def written(request, table, tiny_llama, tmp_path_factory):
    place = tmp_path_factory.mktemp("written")
    ranks = run_distributed(
        trained, request.param, place / "run", table, tiny_llama, place / "scratch", place / "keep", KINDS
    )
    return request.param, place / "keep", dict(zip(KINDS, ranks[0], strict=True))


def test_any_stage_continues_on_another_number_of_workers(written, table, tiny_llama, tmp_path):
    world, keep, whole = written
    names = [(name, name) for name in KINDS] + [
        ("zero3-full", "zero2-full"),
        ("zero3-lora", "zero0-lora"),
        ("zero1-full", "zero3-full"),
    ]
    names.sort(key=lambda pair: KINDS[pair[1]]["zero"])
    ranks = run_distributed(resumed, 3 - world, tmp_path, table, tiny_llama, tmp_path / "scratch", keep, names)
    for (old, new), (rest, notes) in zip(names, ranks[0], strict=True):
        assert [row["step"] for row in rest] == list(range(AT + 1, STEPS + 1))
        assert losses(rest) == pytest.approx(losses(whole[old])[AT:], abs=1e-5), (old, new)
        assert [row["pairs"] for row in rest] == [row["pairs"] for row in whole[old]][AT:]
        assert any(f"{world} worker" in note and "same pairs" in note for note in notes)


@pytest.mark.slow
def test_four_workers_to_two(table, tiny_llama, tmp_path):
    names = ["zero2-full", "zero3-full"]
    whole, *_ = run_distributed(
        trained, 4, tmp_path / "four", table, tiny_llama, tmp_path / "scratch", tmp_path / "keep", names
    )
    ranks = run_distributed(
        resumed,
        2,
        tmp_path / "two",
        table,
        tiny_llama,
        tmp_path / "scratch",
        tmp_path / "keep",
        [(name, name) for name in names],
    )
    for before, (rest, _) in zip(whole, ranks[0], strict=True):
        assert losses(rest) == pytest.approx(losses(before)[AT:], abs=1e-5)


def test_lora_holds_the_adapter_and_its_moments_only(written):
    _, keep, _ = written
    full, lora = (
        sum(path.stat().st_size for path in (keep / f"zero2-{kind}" / f"step-{AT}").rglob("*.safetensors"))
        for kind in ("full", "lora")
    )
    state = json.loads((keep / "zero2-lora" / f"step-{AT}" / "raydpo.json").read_text())["state"]
    numbers = sum(state["parameters"].values())
    assert all("lora_" in name for name in state["parameters"])
    assert 12 * numbers <= lora < 12 * numbers + 20_000 < full / 3


def broken(table, model, scratch, checkpoint):
    with pytest.raises(TrainError) as caught:
        train_here(table, model, scratch, steps=STEPS, checkpoint=checkpoint, zero=2)
    return str(caught.value)


def test_what_is_missing_or_damaged_is_named(written, table, tiny_llama, tmp_path):
    _, keep, _ = written
    source = keep / "zero2-full" / f"step-{AT}"
    first = sorted(source.glob("state-*"))[0].name

    def after(change):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(source, tmp_path / "copy")
        change(tmp_path / "copy")
        return run_distributed(broken, 1, tmp_path / "run", table, tiny_llama, tmp_path / "scratch", tmp_path / "copy")[0]

    message = after(lambda copy: (copy / first).unlink())
    assert "incomplete" in message and "weight of " in message and "elements 0 to" in message
    message = after(lambda copy: (copy / first).write_bytes((copy / first).read_bytes()[:-100]))
    assert "damaged" in message and first in message
    message = after(lambda copy: (copy / "raydpo.json").unlink())
    assert "incomplete" in message
    message = after(lambda copy: (copy / "raydpo.json").write_bytes(b"\xff" * 99))
    assert "damaged" in message
