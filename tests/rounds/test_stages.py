"""Files of stages, the goal of a command, and the rules by which rounds end: all that needs no Ray."""

import dataclasses
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import raydpo
from raydpo.config import load_config
from raydpo.config.rounds import STAGES, StopConfig
from raydpo.errors import ConfigError, RaydpoError
from raydpo.rounds.goal import Goal, enough, few_mixed, goes_on
from raydpo.rounds.ledger import Ledger
from raydpo.rounds.stage import Content, Made, content_digest, made_of, stage_table
from raydpo.rundir.rounds import SCORE_SCHEMA
from raydpo.storage.files import Storage

NAME = "round-001/scores.parquet"
MADE = Made(stage="score", number=1, settings={"rounds.cut": "zero", "rounds.x": 1}, inputs={"samples": "ab" * 16})


def scores(*rewards):
    rows = [
        {"prompt_id": bytes(16), "sample": place, "reward": reward, "parts": [("f", reward)], "seconds": 0.5}
        for place, reward in enumerate(rewards)
    ]
    return pa.Table.from_pylist(rows, SCORE_SCHEMA)


@pytest.fixture
def storage(tmp_path):
    return Storage(str(tmp_path))


def made(storage, what, *rewards, failed=None, ahead=0.0, **more):
    calls = []

    def make():
        calls.append(1)
        return Content(scores(*rewards), failed, ahead)

    table, stored = stage_table(storage, NAME, what, SCORE_SCHEMA, make, **more)
    return table["reward"].to_pylist(), stored, len(calls)


def test_a_stored_stage_is_read_and_never_made_again(storage):
    assert made(storage, MADE, 1.0, None)[::2] == ([1.0, None], 1)
    before = os.stat(storage.path(NAME))
    rewards, stored, calls = made(storage, dataclasses.replace(MADE, seconds=99.0), 0.0)
    assert (rewards, calls) == ([1.0, None], 0) and os.stat(storage.path(NAME)) == before
    assert stored == made_of(storage, NAME) and stored.settings == MADE.settings and stored.inputs == MADE.inputs
    told = pq.read_metadata(storage.path(NAME)).metadata
    assert told[b"raydpo.digest"].decode() == MADE.digest and json.loads(told[b"raydpo.made"])["stage"] == "score"
    assert pq.read_schema(storage.path(NAME)).remove_metadata() == SCORE_SCHEMA


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"settings": {"rounds.cut": "keep", "rounds.x": 1}}, "rounds.cut: 'zero' -> 'keep'"),
        ({"settings": {"rounds.cut": "zero"}}, "rounds.x: 1 -> None"),
        ({"inputs": {"samples": "cd" * 16}}, "samples has changed"),
    ],
)
def test_another_stage_in_its_place_is_refused_by_the_name_of_what_differs(storage, change, told):
    made(storage, MADE, 1.0)
    other = dataclasses.replace(MADE, **change)
    with pytest.raises(ConfigError) as refused:
        made(storage, other, 0.0)
    assert told in str(refused.value) and NAME in str(refused.value) and "--fresh" in str(refused.value)
    lines = []
    assert made(storage, other, 0.0, again=True, note=lines.append)[::2] == ([0.0], 1)
    assert told in lines[0] and made_of(storage, NAME).digest == other.digest != MADE.digest


def test_what_failed_is_kept_and_made_again(storage):
    rewards, stored, _ = made(storage, MADE, None, 1.0, failed="f on 1 of 2 answers")
    assert rewards == [None, 1.0] and stored.failed == "f on 1 of 2 answers" == made_of(storage, NAME).failed
    assert made(storage, MADE, 1.0, 1.0)[::2] == ([1.0, 1.0], 1) and made_of(storage, NAME).failed is None


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 99])
def test_a_damaged_file_is_named(storage, damage):
    made(storage, MADE, *map(float, range(99)))
    storage.write(NAME, damage(storage.read(NAME)))
    with pytest.raises(RaydpoError, match=rf"{NAME} is damaged .*delete it"):
        made(storage, MADE, 1.0)


def test_a_digest_is_of_rows_and_of_the_chosen_columns():
    whole = scores(1.0, None, 0.25)
    parts = pa.concat_tables([whole.slice(0, 1), whole.slice(1, 0), whole.slice(1)])
    of = ("prompt_id", "sample", "reward")
    assert content_digest(whole, of) == content_digest(parts, of)
    assert content_digest(whole, of) == content_digest(whole.set_column(6, "seconds", pa.array([9.0] * 3)), of)
    others = [scores(1.0, None, 0.5), scores(1.0, 0.25, None), scores(None, 1.0, 0.25), whole.slice(0, 2)]
    assert len({content_digest(one, of) for one in (whole, *others)}) == 5


@pytest.fixture
def config(tree, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    del tree["data"]
    rounds = {"count": 3, "prompts": str(tmp_path / "p.jsonl"), "rewards": [{"use": "regex", "pattern": "a"}]}
    return load_config(tree | {"rounds": rounds})


def test_how_far_a_command_goes(config):
    assert Goal.of(None, config) == Goal(3, 4) == Goal.of("3", config) == Goal.of("3.measure", config)
    goal = Goal.of("2.score", config)
    wanted = [(number, stage) for number in range(4) for stage in ("sample", "score", "pair") if goal.wants(number, stage)]
    assert wanted == [
        *((number, stage) for number in (0, 1) for stage in ("sample", "score", "pair")),
        (2, "sample"),
        (2, "score"),
    ]
    for wrong, told in (
        ("4", "beyond rounds.count 3"),
        ("2.scores", "sample, score, pair"),
        ("x", "no stage"),
        ("0.train", "only"),
    ):
        with pytest.raises(ConfigError, match=told):
            Goal.of(wrong, config)


def test_when_rounds_end():
    figures = {"eval_success": 0.9, "eval_drift_initial": 2.5, "mixed": 0.1}
    assert enough(2, figures, StopConfig()) is None and few_mixed(2, figures, StopConfig()) is None
    assert "round 2: 90.0%" in enough(2, figures, StopConfig(success=0.9))
    assert enough(2, figures, StopConfig(success=0.91)) is None
    assert "2.50 nats" in enough(2, figures, StopConfig(drift=2.4)) and enough(2, figures, StopConfig(drift=2.5)) is None
    assert "10.0% of its prompts" in few_mixed(2, figures, StopConfig(mixed=0.2))
    assert few_mixed(2, figures, StopConfig(mixed=None)) is None and few_mixed(2, figures, StopConfig(mixed=0.1)) is None
    unknown = {"eval_success": None, "eval_drift_initial": None, "mixed": None}
    assert enough(0, unknown, StopConfig(success=0.1, drift=0.1)) is None and few_mixed(1, unknown, StopConfig()) is None


def test_the_time_of_sampling_ahead_is_kept_where_its_answers_are_found_again(storage):
    assert made(storage, MADE, 1.0, failed="x", ahead=-1.5)[1].seconds >= 1.5, "a stage's own seconds are the rest"
    assert made(storage, MADE, 1.0, failed="x", ahead=2.5)[1].ahead == 2.5
    _, again, calls = made(storage, MADE, 1.0)
    assert (again.ahead, again.failed, calls) == (2.5, None, 1) and again.seconds >= 0


@pytest.mark.parametrize(
    ("settings", "until", "expected"),
    [
        ({}, None, [True, True, False]),
        ({"offline": True}, None, [True, False, False]),
        ({"stop": {"success": 0.9}}, None, [False] * 3),
        ({"stop": {"drift": 9.0}}, None, [False] * 3),
        ({}, "1.pair", [True, False, False]),
        ({}, "0", [False] * 3),
    ],
)
def test_which_rounds_are_sampled_for_whatever_the_measurement_says(config, settings, until, expected):
    rounds = load_config({**config.model_dump(), "rounds": config.rounds.model_dump() | {"count": 2} | settings}).rounds
    goal = Goal.of(until, config.model_copy(update={"rounds": rounds}))
    assert [goes_on(number, rounds, goal) for number in range(3)] == expected


def test_the_ledger_is_what_the_files_say(config):
    ledger = Ledger(config)
    assert not ledger.over(0) and ledger.to_dict()["rounds"][1]["stages"]["sample"] is False
    ledger.end_round(0, {"round": 0, "policy": "p0", "eval_success": 0.5, "seconds": {"measure": 1.5}}, {})
    ledger.end_round(1, {"round": 1, "policy": "p1", "steps": 8, "eval_success": float("nan")}, {"train.lr": 1.0})
    ledger.end_round(2, {"round": 2, "policy": "p1", "pairs": 0}, {}, ended="nothing to learn")
    ledger.storage.write("rounds.json", b"not JSON: it is not read")
    ledger.storage.delete("rounds.parquet")
    again = Ledger(config)
    assert again.records == ledger.records and [again.over(number) for number in range(4)] == [True, True, False, False]
    assert again.steps(1) == again.steps(2) == 8 and again.steps(0) == 0
    again.write()
    found = json.loads(again.storage.read("rounds.json"))
    assert [(one["over"], one["ended"]) for one in found["rounds"]] == [
        (True, None),
        (True, None),
        (False, "nothing to learn"),
        (False, None),
    ]
    rows = pq.read_table(again.storage.path("rounds.parquet")).to_pylist(maps_as_pydicts="strict")
    assert [row["eval_success"] for row in rows] == [0.5, None, None] and rows[0]["seconds"] == {"measure": 1.5}
    again.storage.write("round-002.old/round.json", b"{")  # a user's copy is no round
    assert Ledger(config).records == ledger.records and Ledger(config).stages() == []
    again.storage.write("round-001/round.json", b"{")
    with pytest.raises(RaydpoError, match=r"round-001/round.json is damaged"):
        Ledger(config)


def test_offline_rounds_have_no_stages_that_are_never_done(config):
    offline = config.model_copy(update={"rounds": config.rounds.model_copy(update={"offline": True})})
    stages = [list(one["stages"]) for one in Ledger(offline).to_dict()["rounds"]]
    assert stages[:3] == [["measure"], list(STAGES), ["pair", "train", "measure"]]
    assert list(Ledger(config).to_dict()["rounds"][2]["stages"]) == list(STAGES)


def test_the_function_is_what_the_package_gives():
    """The package ``raydpo.rounds`` is imported above; the name is that of the function all the same."""
    from raydpo.rounds.run import rounds

    assert raydpo.rounds is rounds
