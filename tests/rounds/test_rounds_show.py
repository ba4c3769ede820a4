"""``raydpo rounds show`` on files that are given: replayed pairs, and files that are missing or damaged."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from round_tables import STOP, answered, config, prompts

from raydpo.errors import ConfigError, RaydpoError
from raydpo.rounds.pairing import final_rewards, make_pairs
from raydpo.rounds.show import print_answers, show
from raydpo.rundir.rounds import GREEDY
from raydpo.storage.files import Storage
from raydpo.terminal.console import Console

ANSWERS = ({0: [(1.0, [5, STOP]), (0.0, [6, STOP]), (0.0, [7, STOP])]}, {0: [(0.0, [5, 3]), (0.0, [6, 3]), (1.0, [7, 3])]})
"""Answers of two rounds to one prompt."""


@pytest.fixture
def run(tmp_path):
    made = config(tmp_path / "prompts.jsonl")
    table = prompts(2, held_out=1)
    pairs = []
    for number, answers in enumerate(ANSWERS, 1):
        samples, scored = answered(table, answers, number)
        scores = final_rewards(samples, scored, made.rounds)
        pairs.append(make_pairs(table, samples, scores, made.rounds, number))
        (folder := tmp_path / f"round-00{number}").mkdir()
        for name, each in {"samples": samples, "scores": scores, "pairs": pa.concat_tables(pairs[::-1])}.items():
            pq.write_table(each, folder / f"{name}.parquet")
    pq.write_table(table, tmp_path / "prompts.parquet")
    Storage(str(tmp_path)).write("config.yaml", made.to_yaml().encode())
    (tmp_path / "rounds.json").write_text("{}")
    return tmp_path


def shown(run, number):
    stream = io.StringIO()
    show(str(run), number, Console(stream))
    return stream.getvalue()


def test_a_replayed_pair_is_no_pair_of_these_answers(run):
    assert pq.read_table(run / "round-002/pairs.parquet")["pair_id"].to_pylist() == ["r002:1:2-0", "r001:1:0-1"]
    assert shown(run, 2).count("pair: ") == 1 and "pair: 2 over 0, whose rewards differ by 1" in shown(run, 2)
    assert "pair: 0 over 1, whose rewards differ by 1" in shown(run, 1)


def test_a_command_that_failed_is_told(run):
    assert "failed" not in shown(run, 1)
    (run / "rounds.json").write_text(json.dumps({"status": "failed", "why": "function 'f' raised"}))
    assert "the last command failed" in shown(run, 1) and "function 'f' raised" in shown(run, 1)
    (run / "rounds.json").write_text("[")
    assert "failed" not in shown(run, 1)


def test_answers_are_shown_without_their_prompts(run):
    (run / "prompts.parquet").unlink()
    assert "(it is not in prompts.parquet)" in shown(run, 1) and "pair: 0 over 1" in shown(run, 1)


@pytest.mark.parametrize("name", ["prompts", "round-001/samples", "round-001/scores", "round-001/pairs"])
def test_a_damaged_file_is_named(run, name):
    file = run / f"{name}.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(RaydpoError, match=f"{name}.parquet is damaged .* delete it"):
        shown(run, 1)


@pytest.mark.parametrize("content", [None, b"a: [", b"- 1\n", b"\xff\xfe\x00"])
def test_a_missing_or_damaged_configuration_is_named(run, content):
    (run / "config.yaml").unlink()
    if content is not None:
        (run / "config.yaml").write_bytes(content)
    with pytest.raises(RaydpoError, match=r"config.yaml cannot be read .* run 'raydpo rounds' again"):
        shown(run, 1)


def test_offline_rounds_show_the_answers_of_the_first_one(run):
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("offline: false", "offline: true"))
    for name in ("samples", "scores"):
        (run / f"round-002/{name}.parquet").unlink()
    table = pq.read_table(run / "round-001/pairs.parquet")
    ids = pa.array([one.replace("r001", "r002") for one in table["pair_id"].to_pylist()])
    pq.write_table(table.set_column(0, "pair_id", ids), run / "round-002/pairs.parquet")
    assert "trains on the answers of round 1" in shown(run, 2) and "trains on" not in shown(run, 1)
    assert shown(run, 2).splitlines()[1:] == shown(run, 1).splitlines()
    with pytest.raises(ConfigError, match=r"round 3 in .* has no answers; the last round there is 2"):
        shown(run, 3)


def test_a_failure_on_a_greedy_answer_is_told_as_such():
    stream = io.StringIO()
    row = {"sample": GREEDY, "reward": None, "parts": None, "error": "f: ValueError: odd", "end": "stop", "answer": "5"}
    print_answers(Console(stream), "prompt", None, [row], "keep", ())
    assert "answer greedy: f: ValueError: odd" in stream.getvalue()


@pytest.mark.parametrize(("cut", "told"), [("zero", "0 (cut)"), ("drop", "0 (dropped)"), ("keep", "0")])
def test_what_became_of_a_cut_answer_is_told_beside_its_reward(cut, told):
    """Its parts are those that the functions gave, and may be 1 where the reward is 0."""
    stream = io.StringIO()
    row = {"sample": 0, "reward": 0.0, "parts": [("math", 1.0)], "error": None, "end": "length", "answer": "it is 5"}
    others = [row | {"sample": 1, "end": "stop"}, row | {"sample": 2, "reward": None}]
    print_answers(Console(stream), "prompt", None, [row, *others], cut, ())
    first, *rest = [line for line in stream.getvalue().splitlines() if "it is 5" in line]
    assert told in first and "math 1" in first and ("(" in first) == (cut != "keep")
    assert len(rest) == 2 and not any("(" in line for line in rest)
