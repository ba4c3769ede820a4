"""The figures of a round equal what its tables say when counted in plain Python."""

from __future__ import annotations

import math
import random
from collections import Counter
from statistics import fmean, stdev

import pyarrow as pa
import pytest
from round_tables import STOP, answered, prompts, settings

from raydpo.errors import DataError
from raydpo.rounds.figures import held_out_figures, pair_figures, sampled_figures
from raydpo.rounds.pairing import final_rewards, make_pairs, with_replay
from raydpo.rundir.rounds import HELD_OUT_SCHEMA, ROUNDS_SCHEMA, SAMPLE_SCHEMA, SCORE_SCHEMA

KEYS = set(ROUNDS_SCHEMA.names)
FUNCTIONS = ("exact", "form")


def made(seed, n=5, greedy=False, equal=True):
    """A table of held-out answers (its columns are also those of samples and scores), and the prompts."""
    rng, table = random.Random(seed), prompts(12, held_out=4)
    split, rows = "held_out" if greedy else "train", []
    places = [row for row, each in enumerate(table["split"].to_pylist()) if each == split]
    for row in places:
        for sample in range(-1 if greedy else 0, n if equal else rng.randint(1, n)):
            failed = rng.random() < 0.15
            parts = {name: rng.choice([None, 0.0, 0.5, 1.0]) for name in FUNCTIONS}
            known = [value for value in parts.values() if value is not None]
            rows.append(
                {
                    "prompt_id": table["prompt_id"][row].as_py(),
                    "sample": sample,
                    "round": 2,
                    "seed": 1,
                    "answer": "",
                    "answer_ids": [rng.randint(3, 6) for _ in range(rng.randint(1, 3))] + [STOP],
                    "end": rng.choice(["stop", "stop", "length"]),
                    "engine": "transformers",
                    "reward": sum(known) if known else None,
                    "parts": list(parts.items()),
                    "error": "exact: ValueError: x" if failed else None,
                    "details": None,
                    "seconds": 0.1,
                    "log_ratio": None if sample < 0 else rng.gauss(1, 1),
                    "log_ratio_previous": None if sample < 0 else rng.gauss(0.5, 1),
                }
            )
    rng.shuffle(rows)
    return pa.Table.from_pylist(rows, schema=pa.schema(HELD_OUT_SCHEMA)), table


def tables(whole):
    scores = whole.select(SCORE_SCHEMA.names)
    return whole.select(SAMPLE_SCHEMA.names), scores


def counted(rows, threshold):
    """The figures of sampled answers, in plain Python."""
    by_prompt = {}
    for row in rows:
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    right = [row["reward"] is not None and row["reward"] > threshold for row in rows]
    known = {key: [row["reward"] for row in each if row["reward"] is not None] for key, each in by_prompt.items()}
    entropies = []
    for each in by_prompt.values():
        firsts = Counter(row["answer_ids"][0] for row in each)
        entropies.append(-sum(c / len(each) * math.log(c / len(each)) for c in firsts.values()))
    functions = {name: [dict(row["parts"])[name] for row in rows] for name in FUNCTIONS}
    return {
        "prompts": len(by_prompt),
        "answers": len(rows),
        "reward": fmean(row["reward"] for row in rows if row["reward"] is not None),
        "rewards": {name: fmean(v for v in values if v is not None) for name, values in functions.items()},
        "success": fmean(right),
        "any": fmean(any((row["reward"] or -1) > threshold for row in each) for each in by_prompt.values()),
        "mixed": fmean(len(set(each)) > 1 for each in known.values()),
        "ties": sum(len(each) > 1 and len(set(each)) == 1 for each in known.values()),
        "errors": sum(row["error"] is not None for row in rows),
        "unknown": sum(row["reward"] is None for row in rows),
        "cut": fmean(row["end"] == "length" for row in rows),
        "tokens": fmean(len(row["answer_ids"]) for row in rows),
        "distinct": fmean(len({tuple(row["answer_ids"]) for row in each}) / len(each) for each in by_prompt.values()),
        "entropy": fmean(entropies),
    }


def same(found, wanted):
    """Compare figures; those of functions are a dictionary of their own."""
    flat = [
        {name: value for name, value in each.items() if not isinstance(value, dict)}
        | {
            (name, function): value
            for name in each
            if isinstance(each[name], dict)
            for function, value in each[name].items()
        }
        for each in (found, wanted)
    ]
    assert flat[0] == pytest.approx(flat[1])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_figures_of_sampled_answers(seed, threshold):
    whole, table = made(seed, equal=seed % 2 == 0)
    samples, scores = tables(whole)
    found = sampled_figures(table, samples, scores, settings(measure={"success": threshold}))
    same(found, counted(whole.to_pylist(), threshold))
    assert found.keys() <= KEYS


def test_figures_do_not_depend_on_the_order_of_rows():
    whole, table = made(9)
    samples, scores = tables(whole)
    turned = scores.take(pa.array(range(len(scores) - 1, -1, -1)))
    assert sampled_figures(table, samples, turned, settings()) == sampled_figures(table, samples, scores, settings())


@pytest.mark.parametrize("seed", range(4))
def test_figures_of_held_out_answers(seed):
    whole, _ = made(seed, greedy=True)
    found = held_out_figures(whole, settings())
    rows = [row for row in whole.to_pylist() if row["sample"] >= 0]
    greedy = [row for row in whole.to_pylist() if row["sample"] < 0]
    wanted = {f"eval_{name}": value for name, value in counted(rows, 0.5).items()}
    shared = [name for name in wanted if name in KEYS and name != "eval_errors"]
    same({name: found[name] for name in shared}, {name: wanted[name] for name in shared})
    assert found.keys() == {name for name in KEYS if name.startswith("eval_")}
    assert found["eval_errors"] == wanted["eval_errors"] + sum(row["error"] is not None for row in greedy)
    assert found["eval_success_greedy"] == fmean((row["reward"] or 0) > 0.5 for row in greedy)
    assert len(greedy) == 4
    assert found["eval_drift_initial"] == pytest.approx(fmean(row["log_ratio"] for row in rows))
    assert found["eval_drift_previous"] == pytest.approx(fmean(row["log_ratio_previous"] for row in rows))
    for name, value in (
        ("eval_success_se", lambda row: float((row["reward"] or 0) > 0.5)),
        ("eval_drift_initial_se", lambda row: row["log_ratio"]),
        ("eval_drift_previous_se", lambda row: row["log_ratio_previous"]),
    ):  # as many answers of each prompt, so the standard error of the means of prompts
        means = {}
        for row in rows:
            means.setdefault(row["prompt_id"], []).append(value(row))
        means = [fmean(each) for each in means.values()]
        assert found[name] == pytest.approx(stdev(means) / math.sqrt(len(means)))


def test_the_success_of_duels_is_the_win_rate():
    judge = {"judge": {"url": "http://h/v1", "model": "m"}}
    whole, table = made(3, greedy=True)
    found, scored = (
        held_out_figures(whole, settings(rewards=[{**judge, **more, "weight": 2.0}, {"use": "my:form", "weight": 0}]))
        for more in ({}, {"scale": "score"})
    )
    greedy = [row["reward"] for row in whole.to_pylist() if row["sample"] < 0 and row["reward"] is not None]
    assert found["eval_unknown"] > 0 and found["eval_success"] == pytest.approx(found["eval_reward"] / 2)
    assert found["eval_success_greedy"] == pytest.approx(fmean(greedy) / 2) and found["eval_success_se"] > 0
    assert scored["eval_success"] != pytest.approx(found["eval_success"]) and scored["eval_any"] == found["eval_any"]
    samples, scores = tables(made(3)[0])
    unknown = scores.set_column(2, "reward", pa.nulls(len(scores), pa.float64()))
    assert sampled_figures(table, samples, unknown, settings(rewards=[judge]))["success"] is None


def test_an_answer_without_a_reward_is_no_success_and_no_tie():
    table, rounds = prompts(3), settings()
    samples, scored = answered(
        table, {0: [(None, [5]), (1.0, [6])], 1: [(None, [5]), (None, [6])], 2: [(0.0, [5]), (1.0, [5])]}
    )
    found = sampled_figures(table, samples, final_rewards(samples, scored, rounds), rounds)
    assert (found["success"], found["any"], found["unknown"]) == (2 / 6, 2 / 3, 3)
    assert (found["mixed"], found["ties"]) == (1 / 3, 0), "one reward alone is no tie"
    assert found["reward"] == pytest.approx(2 / 3)
    assert found["distinct"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert found["entropy"] == pytest.approx(2 / 3 * math.log(2))


def test_a_drift_that_was_not_measured_is_none():
    whole, _ = made(1, greedy=True)
    place = whole.column_names.index("log_ratio")
    values = whole["log_ratio"].to_pylist()
    values[next(row for row, sample in enumerate(whole["sample"].to_pylist()) if sample >= 0)] = None
    found = held_out_figures(whole.set_column(place, "log_ratio", pa.array(values, pa.float64())), settings())
    assert found["eval_drift_initial"] is None
    assert found["eval_drift_initial_se"] is None
    assert found["eval_success"] is not None
    assert found["eval_drift_previous"] is not None


def test_figures_of_nothing_are_none_and_never_nan():
    whole, table = made(0)
    none = whole.slice(0, 0)
    found = sampled_figures(table, *tables(none), settings()) | held_out_figures(none, settings())
    assert all(value in (None, 0, {}) for value in found.values())
    one = whole.slice(0, 1)
    assert held_out_figures(one, settings())["eval_success_se"] is None  # of one prompt


def test_figures_fit_the_table_of_rounds():
    whole, table = made(3)
    held, _ = made(4, greedy=True)
    found = sampled_figures(table, *tables(whole), settings()) | held_out_figures(held, settings())
    row = dict.fromkeys(ROUNDS_SCHEMA.names) | found
    stored = pa.Table.from_pylist(
        [row | {name: list(row[name].items()) for name in ("rewards", "eval_rewards")}], ROUNDS_SCHEMA
    )
    assert stored["success"][0].as_py() == found["success"]
    assert dict(stored["rewards"][0].as_py()) == found["rewards"]


def test_figures_of_pairs():
    table, rounds = prompts(30), settings(replay=0.5)
    rows = range(10)
    earlier, new = (
        make_pairs(table, samples, final_rewards(samples, scored, rounds), rounds, number)
        for number, (samples, scored) in (
            (number, answered(table, {row: [(1.0, [token, row]), (0.0, [token + 1, row])] for row in rows}, number))
            for number, token in ((1, 50), (2, 60))
        )
    )
    assert pair_figures(new, 2) == {"pairs": 10, "replayed": 0}
    assert pair_figures(with_replay(new, [earlier], rounds, 2), 2) == {"pairs": 20, "replayed": 10}


def test_answers_of_other_rounds_are_refused():
    whole, table = made(0)
    with pytest.raises(DataError, match=r"answers to [1-8] prompts that are not in the table of prompts"):
        sampled_figures(table.slice(8), *tables(whole), settings())
