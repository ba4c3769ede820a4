"""Plans of many pairs from a part of them: the same figures as from all, within what a part can tell."""

import dataclasses
import json

import numpy as np
import pytest
from tiny import make_tokenizer, preferences, write_preferences

from raydpo.cli import configured, entry
from raydpo.config import load_config
from raydpo.data.first import FirstPairs, Reading
from raydpo.data.pairs import load_pairs
from raydpo.data.plan import epoch_order
from raydpo.data.simulate import simulate, steps_of
from raydpo.data.tokenise import Tokeniser
from raydpo.estimate.plan import Rates, make_plan
from raydpo.estimate.tokenising import Tokenising
from raydpo.estimate.work import evaluation_pass, pair_groups, reference_pass, shapes_of_steps
from raydpo.model.cost import ModelCost
from raydpo.pipeline.tokenised import make_missing, open_tokeniser
from raydpo.terminal.console import Console

RATES = Rates(score=1e9, train=1e9, origin="test")
SIZES = ModelCost(parameters=1500, active=1000, hidden=10, vocabulary=50, layers=2, attention_width=8)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_llama):
    """Two sources. In the first, three pairs share each prompt and many prompts begin alike."""
    place = tmp_path_factory.mktemp("work")
    first = preferences(600, low=3, high=20)
    for number, record in enumerate(first):
        record["prompt"] = f"sky blue green {first[number // 3 * 3]['prompt']}"
    write_preferences(place / "a.jsonl", first)
    write_preferences(place / "b.jsonl", preferences(60, seed=1, low=30, high=60))
    return place


def configure(place, tiny_llama, *names, **settings):
    data = {"train": [str(place / f"{name}.jsonl") for name in names or "ab"]}
    tree = {"output": str(place / "runs"), "model": {"path": str(tiny_llama)}, "data": data}
    return load_config(tree | {"train": {"pairs_per_step": 16}}, [f"{key}={value}" for key, value in settings.items()])


def loaded(config):
    return load_pairs(config.data, Tokeniser(make_tokenizer()))


def plan(config, sets, **settings):
    return make_plan(config, sets, SIZES, SIZES, RATES, workers=4, **settings)


def of_source(table, name):
    return table.filter([each == name for each in table["source"].to_pylist()])


@pytest.mark.parametrize("layout", ["tree", "packed", "padded"])
def test_steps_are_planned_as_among_all_pairs(place, tiny_llama, layout):
    table = loaded(configure(place, tiny_llama)).train
    whole = pair_groups(table)[1]
    order = epoch_order(np.zeros(table.num_rows, int), np.ones(1), seed=3, epoch=0, shuffle=True)
    steps = steps_of(order, 32, 4)
    few, (local,) = shapes_of_steps(table, [steps])
    assert len(few) == 128 < len(whole)
    settings = {"world_size": 4, "pairs_per_step": 32, "tokens_per_batch": 512, "layout": layout, "work": SIZES.work}
    of_all = simulate(order, whole, steps=4, **settings)
    assert simulate(np.concatenate(local), few, steps=4, **settings) == of_all


@pytest.mark.parametrize(("layout", "near"), [("packed", 1e-9), ("tree", 0.2), ("padded", 0.1)])
def test_a_part_stands_for_all(place, tiny_llama, monkeypatch, layout, near):
    table = loaded(configure(place, tiny_llama)).train
    wanted, planned, scored, _ = reference_pass([table], 2048, 4096, layout)
    assert wanted == planned == 2 * table.num_rows and evaluation_pass(table, 2048, layout)[0] == table.num_rows
    evaluated = evaluation_pass(table, 2048, layout)[1]
    monkeypatch.setattr("raydpo.estimate.work.MOST_PLANNED", 300)
    count, some, estimated, _ = reference_pass([table], 2048, 4096, layout)
    assert (count, some) == (wanted, 300) and estimated == pytest.approx(scored, rel=near)
    some, estimated = evaluation_pass(table, 2048, layout)
    assert some == 150 and estimated == pytest.approx(evaluated, rel=near)


def test_first_pairs_stand_for_all_of_their_source(place, tiny_llama, monkeypatch):
    """Pairs of the first source stand for five each: as if it were read five times, though nothing is shared more."""
    monkeypatch.setattr("raydpo.estimate.plan.WORLD_SIZES", (1, 4))
    config = configure(place, tiny_llama, **{"model.layout": "packed", "data.eval.fraction": 0.2})
    sets = loaded(config)
    one, five = plan(config, sets), plan(config, sets, scales={"a": 5.0})
    counts, held = ({name: table["source"].to_pylist().count(name) for name in "ab"} for table in (sets.train, sets.eval))
    assert one.data["training_pairs"] == sum(counts.values())
    assert five.data["training_pairs"] == 5 * counts["a"] + counts["b"]
    assert five.data["held_out_pairs"] == 5 * held["a"] + held["b"]
    assert five.data["completions"] == 2 * (five.data["training_pairs"] + five.data["held_out_pairs"])
    per_epoch = five.data["pairs_trained_on"]
    assert per_epoch == pytest.approx(five.data["training_pairs"], rel=0.02) and five.steps == -(-per_epoch // 16)

    def tokens(name):
        mine = [row for row in sets.train.to_pylist() if row["source"] == name]
        return sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in mine)

    wanted = 5 * tokens("a") + tokens("b")
    assert five.data["positions"]["packed"] == pytest.approx(wanted, rel=0.1)
    assert 2 * five.data["prompt_tokens"] + five.data["completion_tokens"] == wanted
    alone = [
        plan(config, dataclasses.replace(sets, train=of_source(sets.train, name), eval=of_source(sets.eval, name)))
        for name in "ab"
    ]
    assert five.score.flops == pytest.approx(5 * alone[0].score.flops + alone[1].score.flops)
    assert one.score.flops == pytest.approx(alone[0].score.flops + alone[1].score.flops)
    assert five.evaluation.flops > 3 * one.evaluation.flops


def test_the_time_of_tokenising_by_hand(place, tiny_llama):
    sets = loaded(configure(place, tiny_llama))
    told = Tokenising.of(FirstPairs(sets, {"a": Reading(600, 6000), "b": Reading(60, 60)}, cpu_seconds=0.5))
    assert told.pairs == 6060 and told.pairs_per_second == 660 / 0.5 and not told.done
    assert told.cpu_minutes == pytest.approx(6060 / 1320 / 60) and told.minutes == pytest.approx(told.cpu_minutes / 16)
    rate = "6,060 pairs at 1,320 a second and core, measured here"
    assert told.line() == f"tokenising, once: {rate}: 0.077 CPU minutes; 0.0048 minutes on 16 cores"
    large = Tokenising(pairs=9_800_000, done=False, pairs_per_second=1210.0, cpu_minutes=134.98, minutes=8.436)
    assert large.line().endswith(" 130 CPU minutes; 8.4 minutes on 16 cores"), "not 1.3e+02"
    assert Tokenising.of(FirstPairs(sets, {})).line() == "tokenising: 660 pairs are already tokenised"


def test_show_reads_on_until_it_has_enough(place, tiny_llama, monkeypatch):
    monkeypatch.setattr("raydpo.tokens.build.worth_ray", lambda source: True)
    config, read = configure(place, tiny_llama, "a", **{"data.filter": "chosen_tokens > 20"}), []
    found = configured.load_first_pairs(config, 20, Console())[0]
    assert 0 < found.sets.train.num_rows < 15 and found.read["a"].records == 200, "none of the first 20 records has such"
    real = configured.load_first_pairs
    monkeypatch.setattr(entry, "load_first_pairs", lambda config, most, told: read.append(most) or real(config, most, told))
    monkeypatch.setattr(entry, "_SHOWN_RECORDS", 20)
    path = place / "show.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)))
    assert entry.main(["show", str(path), "-n", "15"]) == 0 and read[0] == 30 and len(read) > 1


def test_stored_sets_are_read_in_place_of_the_source(place, tiny_llama, monkeypatch, capsys):
    monkeypatch.setattr("raydpo.tokens.build.worth_ray", lambda source: True)
    monkeypatch.setattr("raydpo.estimate.plan.WORLD_SIZES", (1, 2))
    monkeypatch.setattr(entry, "_PLANNED_RECORDS", 50)
    config = configure(place, tiny_llama, output=place / "stored")
    path = place / "stored.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)))
    assert entry.main(["plan", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("from the first 50 of about ") and "tokenising, once: " in printed
    make_missing(config, lambda: open_tokeniser(config), Console())
    whole = configured.load_first_pairs(config, 50, Console())[0]
    assert whole.whole and whole.sets.train.num_rows == loaded(config).train.num_rows
    capsys.readouterr()
    assert entry.main(["plan", str(path), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["tokenising"]["done"] and made["first"] is None and made["data"]["training_pairs"] == 660
    assert made["data"]["planned"] == {"completions": 1320, "held_out_pairs": 0}


def test_processes_that_hold_the_weights_together_wait_for_the_slowest(place, tiny_llama):
    """A prompt with its completions stays on one process: of one pair two processes take half the time waiting."""
    table = loaded(configure(place, tiny_llama)).train
    *alone, waiting = reference_pass([table.slice(0, 1)], 2048, 4096, "packed")
    assert waiting == 0
    for replicas, share in ((2, 1 / 2), (4, 3 / 4)):
        *same, waiting = reference_pass([table.slice(0, 1)], 2048, 4096, "packed", replicas)
        assert same[:2] == alone[:2] and np.array_equal(same[2], alone[2]) and waiting == pytest.approx(share)
    assert 0 < reference_pass([table], 512, 4096, "packed", 2)[-1] < 0.2


def test_gathers_show_where_passes_are_short(place, tiny_llama):
    """They take their time in every pass, however few positions it has."""
    table = loaded(configure(place, tiny_llama)).train.slice(0, 1)
    positions = reference_pass([table], 2048, 4096, "packed")[2][0]
    for gathers, share in ((positions / 2, 0), (10 * positions, 0.9)):
        assert reference_pass([table], 2048, 4096, "packed", 1, gathers)[-1] == pytest.approx(share)
    assert reference_pass([table], 2048, 4096, "packed", 2, 10 * positions)[-1] == pytest.approx(0.95)
