"""``raydpo rounds`` from the command line, in a small world: all rounds, what their files say, and how they end."""

import json
import os
import re

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from command import raydpo
from small import FIRST_HALF, small_rounds, tables

from raydpo.config import load_config
from raydpo.data.tokenise import Tokeniser, load_tokenizer
from raydpo.evaluation.policy import policy_files
from raydpo.rounds.figures import held_out_figures, sampled_figures
from raydpo.rounds.pairing import make_pairs
from raydpo.rounds.prompts import round_seed, slice_of
from raydpo.rounds.stage import made_of
from raydpo.rundir.rounds import HELD_OUT_SCHEMA, ROUNDS_SCHEMA, SAMPLE_SCHEMA, SCORE_SCHEMA
from raydpo.storage.files import Storage

FOUND = "answering[^:]*: all found in the cache"
FILES = ("samples.parquet", "scores.parquet", "pairs.parquet", "held_out.parquet")


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_llama):
    place = tmp_path_factory.mktemp("rounds")
    small_rounds(place, tiny_llama)
    return place


def rounds(place, *arguments):
    return raydpo("rounds", *arguments, cwd=place)


@pytest.fixture(scope="module")
def run(place):
    """The directory of two rounds."""
    result = rounds(place, "config.yaml")
    assert result.returncode == 0, result.stdout + result.stderr
    (place / "printed.txt").write_text(result.stdout)
    return place / "runs/small"


def stamps(run):
    """When each file of the rounds was written."""
    return {file: file.stat().st_mtime_ns for file in run.glob("round-*/**/*") if file.is_file()}


def read(run, name):
    return pq.read_table(run / name).replace_schema_metadata(None)


def test_two_rounds_learn_the_reward(run):
    rows = pq.read_table(run / "rounds.parquet").to_pylist()
    success = [row["eval_success"] for row in rows]
    assert 0.25 < success[0] < 0.6 and success[2] >= 0.8 and success[0] < success[1] < success[2], success
    assert abs(rows[1]["first_loss"] - np.log(2)) < 1e-6 and rows[2]["first_loss"] < np.log(2)
    assert [row["steps"] for row in rows] == [None, 10, 10]
    assert rows[1]["policy"] != rows[2]["policy"] and rows[1]["reference"] == rows[2]["reference"]


def test_the_workers_that_measure_a_round_sample_for_the_next_one(place, run):
    printed = (place / "printed.txt").read_text()
    assert printed.count("answering: all found in the cache") == 2
    assert all(f"answering, also for round {number} " in printed for number in (1, 2))
    ahead = [made_of(Storage(str(run)), f"round-{number:03d}/held_out.parquet").ahead for number in range(3)]
    assert ahead[0] > 0 and ahead[1] > 0 and ahead[2] == 0
    seconds = [dict(row["seconds"]) for row in pq.read_table(run / "rounds.parquet").to_pylist()]
    assert all(seconds[number]["sample"] > ahead[number - 1] for number in (1, 2))


def test_every_table_is_as_a_recomputation_says(place, run):
    config = load_config(place / "config.yaml")
    settings = config.rounds
    tokeniser = Tokeniser(load_tokenizer(config.model.path))
    prompts = read(run, "prompts.parquet")
    ids = dict(zip(prompts["prompt_id"].to_pylist(), prompts["prompt_ids"].to_pylist(), strict=True))
    out = {row["prompt_id"] for row in prompts.to_pylist() if row["split"] == "held_out"}
    assert prompts.num_rows == 40 and 0 < len(out) < 20
    rows = pq.read_table(run / "rounds.parquet").to_pylist(maps_as_pydicts="strict")
    assert pq.read_schema(run / "rounds.parquet") == ROUNDS_SCHEMA
    for number in (1, 2):
        samples, scores, pairs, held_out = (read(run, f"round-{number:03d}/{name}") for name in FILES)
        assert (samples.schema, scores.schema, held_out.schema) == (SAMPLE_SCHEMA, SCORE_SCHEMA, HELD_OUT_SCHEMA)
        of_round = prompts.take(slice_of(prompts, settings, number))["prompt_id"].to_pylist()
        asked = list(zip(samples["prompt_id"].to_pylist(), samples["sample"].to_pylist(), strict=True))
        assert asked == [(name, sample) for name in of_round for sample in range(8)], "every (prompt, sample) once"
        assert not out & set(samples["prompt_id"].to_pylist()) and set(held_out["prompt_id"].to_pylist()) == out
        assert set(samples["seed"].to_pylist()) == {round_seed(0, number)}
        assert set(held_out["seed"].to_pylist()) == {round_seed(0, 0), None}
        for row in samples.to_pylist() + held_out.to_pylist():
            ends = row["answer_ids"][-1] in tokeniser.stop_ids
            assert row["end"] == ("stop" if ends else "length") and 1 <= len(row["answer_ids"]) <= 2
            text = row["answer_ids"][:-1] if ends else row["answer_ids"]
            assert row["answer"] == tokeniser.tokenizer.decode(text, skip_special_tokens=True)
        rewards = [float(answer[0] < FIRST_HALF) for answer in samples["answer_ids"].to_pylist()]
        assert scores["reward"].to_pylist() == rewards and scores["error"].null_count == len(rewards)
        assert scores["parts"].to_pylist() == [[("first_half", reward)] for reward in rewards]
        assert held_out["reward"].to_pylist() == [
            float(answer[0] < FIRST_HALF) for answer in held_out["answer_ids"].to_pylist()
        ]
        assert pairs.equals(make_pairs(prompts, samples, scores, settings, number)) and pairs.num_rows
        row = rows[number]
        figures = sampled_figures(prompts, samples, scores, settings) | held_out_figures(held_out, settings)
        assert {name: row[name] for name in figures} == figures
        distinct = {
            (bytes(one["prompt_id"]), bytes(one[f"{side}_key"]))
            for one in pairs.to_pylist()
            for side in ("chosen", "rejected")
        }
        assert (row["pairs"], row["replayed"], row["wanted"]) == (pairs.num_rows, 0, len(distinct))
        steps = pq.read_table(run / f"round-{number:03d}/train/metrics.parquet").to_pylist()
        assert (row["steps"], row["first_loss"], row["last_loss"]) == (len(steps), steps[0]["loss"], steps[-1]["loss"])
        assert row["chosen_log_ratio"] - row["rejected_log_ratio"] == pytest.approx(
            steps[-1]["rewards/margins"] / 0.1, rel=1e-4
        )
        record = json.loads((run / f"round-{number:03d}/round.json").read_text())
        assert record["figures"].keys() <= set(ROUNDS_SCHEMA.names) and record["ended"] is None
    assert ids.keys() == set(prompts["prompt_id"].to_pylist())


def test_a_second_call_does_nothing_and_the_ledger_comes_from_the_files(place, run):
    before = stamps(run)
    whole = [(run / name).read_bytes() for name in ("rounds.json", "rounds.parquet")]
    (run / "rounds.parquet").unlink()
    ledger = json.loads(whole[0]) | {"status": "failed", "rounds": []}
    (run / "rounds.json").write_text(json.dumps(ledger))
    result = rounds(place, "config.yaml")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all 2 rounds are already complete" in result.stdout
    for nothing in ("answering", "scoring", "layout", "training"):
        assert nothing not in result.stdout
    assert stamps(run) == before
    assert [(run / name).read_bytes() for name in ("rounds.json", "rounds.parquet")] == whole
    assert "is over, too" not in result.stdout
    fewer = rounds(place, "config.yaml", "rounds.count=1")
    assert "rounds.count is 1, but round 2 is over, too: final and the page are of all 2 rounds" in fewer.stdout
    assert fewer.returncode == 0 and rounds(place, "config.yaml").returncode == 0


def test_changed_settings_are_refused_by_name_before_ray(place, run):
    changes = {
        "rounds.sample.n=4": "rounds.sample.n: 8 -> 4 (round-001/samples.parquet and 1 more files)",
        "rounds.sample.seed=1": "rounds.sample.seed: 0 -> 1",
        "rounds.pairs.margin=0.5": "rounds.pairs.margin: 0.0 -> 0.5",
        "rounds.rewards=[{use: 'small_rewards:all_right', name: first_half}]": "rounds.rewards (first_half)",
        "rounds.cut=zero": "rounds.cut: 'keep' -> 'zero'",
        "rounds.measure.n=2": "rounds.measure.n: 8 -> 2",
        "rounds.reference=previous": "rounds.reference: 'initial' -> 'previous'",
        "train.lr=1e-3": "train.lr: 0.007 -> 0.001",
        "rounds.held_out=0.5": "rounds.held_out.fraction: 0.25 -> 0.5",
    }
    before = (run / "rounds.json").stat().st_mtime_ns
    every = rounds(place, "config.yaml", *changes)
    assert every.returncode == 2 and "--fresh" in every.stderr
    for told in changes.values():
        assert told in every.stderr, (told, every.stderr)
    one = rounds(place, "config.yaml", "train.steps=11")
    assert one.returncode == 2 and "train.steps: 10 -> 11 (round-001/train and 1 more files)" in one.stderr
    assert "rounds.sample.n" not in one.stderr and (run / "rounds.json").stat().st_mtime_ns == before


def test_show_prints_answers_rewards_and_pairs(place, run):
    whole = rounds(place, "show", "runs/small", "1", "-n", "2")
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("prompt ") == 2 + 1 and "29 more prompts" in whole.stdout
    assert "first_half 1" in whole.stdout and "first_half 0" in whole.stdout and "whose rewards differ by 1" in whole.stdout
    pair = read(run, "round-002/pairs.parquet").to_pylist()[0]
    one = rounds(place, "show", "config.yaml", "2", "--prompt", pair["prompt_id"].hex()[:10])
    assert f"pair: {pair['good']} over {pair['bad']}, whose rewards differ by 1" in one.stdout
    samples = read(run, "round-002/samples.parquet").filter(pc.equal(pc.field("prompt_id"), pair["prompt_id"]))
    assert samples.num_rows == 8 and all(
        text.strip() in one.stdout for text in samples["answer"].to_pylist() if text.isalpha()
    )
    held_out = rounds(place, "show", "runs/small", "0", "-n", "1")
    assert "held out" in held_out.stdout and "greedy" in held_out.stdout
    for wrong, told in (
        (("runs/small", "3"), "round 3 in runs/small has no answers; the last round there is 2"),
        (("runs/small", "1", "--prompt", "zz"), "no prompt"),
        (("runs", "1"), "holds no rounds"),
    ):
        refused = rounds(place, "show", *wrong)
        assert refused.returncode == 2 and told in refused.stderr


def test_final_is_the_last_policy_and_the_page_is_there(run):
    assert os.readlink(run / "final") == "round-002/train/final" and (run / "final/config.json").is_file()
    config = load_config(run / "config.yaml")
    found = policy_files(config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"policy": str(run)})}))
    assert found.base == str(run / "final") and found.run is not None and found.adapter is None
    assert "<html" in (run / "report.html").read_text()


@pytest.mark.slow
def test_a_command_ends_where_until_says_and_answers_come_from_the_cache(place, run):
    """Rounds of another name with the same policy and settings: all answers and rewards are in the cache."""
    result = rounds(place, "config.yaml", "name=until", "--until", "1.pair")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "paused before round 1, stage train" in result.stdout
    assert len(re.findall(FOUND, result.stdout)) == 2
    assert "paused before round 1, stage train" in (place / "runs/until/report.html").read_text()
    ledger = json.loads((place / "runs/until/rounds.json").read_text())
    done = {"sample": True, "score": True, "pair": True, "train": False, "measure": False}
    assert ledger["status"] == "paused" and ledger["rounds"][1]["stages"] == done and ledger["final"] is None
    ours, theirs = tables(place / "runs/until"), tables(run)
    assert len(ours) == 4 and all(table.equals(theirs[name]) for name, table in ours.items())
    wrong = rounds(place, "config.yaml", "name=until", "--until", "5")
    assert wrong.returncode == 2 and "beyond rounds.count 2" in wrong.stderr


@pytest.mark.slow
def test_all_right_ends_the_rounds_and_all_wrong_is_an_error(place, run):
    ends = {}
    for which in ("right", "wrong"):
        settings = f"name={which}", f"rounds.rewards=[{{use: 'small_rewards:all_{which}'}}]"
        result = ends[which] = rounds(place, "config.yaml", *settings)
        ledger = json.loads((place / f"runs/{which}/rounds.json").read_text())
        row = pq.read_table(place / f"runs/{which}/rounds.parquet").to_pylist()[-1]
        assert not (place / f"runs/{which}/round-001/train").exists() and not (place / f"runs/{which}/final").exists()
        if which == "right":
            assert result.returncode == 0, result.stdout + result.stderr
            assert "round 1: 248 of 248 answers are right" in result.stdout and ledger["status"] == "stopped"
            assert ledger["stopped"].startswith("round 1: 248 of 248") and (row["round"], row["pairs"], row["success"]) == (
                1,
                0,
                1.0,
            )
        else:
            assert result.returncode == 1 and "round 1: none of 248 answers is right" in result.stderr
            assert ledger["status"] == "failed" and ledger["stopped"] is None and row["round"] == 0


@pytest.mark.slow
def test_an_edited_function_scores_again_without_sampling(place, run):
    """A function that fails is an error beyond max_errors, after all is stored. Corrected, only scores are made again."""
    settings = "name=edited", "rounds.rewards=[{use: 'edited:reward'}]"
    source = (place / "small_rewards.py").read_text()
    (place / "edited.py").write_text(source.replace("def fails(", "def reward("))
    failed = rounds(place, "config.yaml", *settings)
    assert failed.returncode == 1 and "ZeroDivisionError" in failed.stderr and "max_errors" in failed.stderr, failed.stderr
    directory = place / "runs/edited"
    held_out = read(directory, "round-000/held_out.parquet")
    right = [float(ids[0] < FIRST_HALF) for ids in held_out["answer_ids"].to_pylist()]
    known = [reward for reward in held_out["reward"].to_pylist() if reward is not None]
    assert 0 < held_out["reward"].null_count < 81 and len(known) + held_out["reward"].null_count == len(right)
    (place / "edited.py").write_text(source.replace("def first_half(", "def reward("))
    again = rounds(place, "config.yaml", *settings, "--until", "1.pair")
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(re.findall(FOUND, again.stdout)) == 2 and "scoring reward" in again.stdout
    assert read(directory, "round-000/held_out.parquet")["reward"].to_pylist() == right
    assert (directory / "round-001/pairs.parquet").is_file()


@pytest.mark.slow
def test_try_prints_rewards_and_writes_nothing_into_the_run_directory(place, run):
    result = rounds(place, "try", "config.yaml", "-n", "2", "name=tried")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("\nprompt ") == 2 and "first_half 1" in result.stdout
    assert "16 answers to 2 prompt(s): mean reward" in result.stdout
    assert not [*(place / "runs/tried").glob("**/*")]


def test_what_cannot_run_is_refused_before_ray(place, run):
    def refused(*settings):
        result = rounds(place, "config.yaml", "name=refused", *settings)
        assert result.returncode == 2, result.stdout + result.stderr
        return result.stderr

    (place / "empty.jsonl").write_text("")
    assert "empty.jsonl holds no records" in refused("rounds.held_out={path: empty.jsonl}")
    assert "small_rewards:absent" in refused("rounds.rewards=[{use: 'small_rewards:absent'}]")
    assert "needs the column 'absent'" in refused("rounds.rewards=[{use: math, column: absent}]")
    assert "positions" in refused("rounds.sample.max_tokens=4000", "data.max_length=5000")
    assert not (place / "runs/refused/rounds.json").exists()
    (place / "runs/taken").mkdir()
    (place / "runs/taken/run.json").write_text("{}")
    assert "directory of a single run" in refused("name=taken")
