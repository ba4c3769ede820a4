"""Sums of rewards, what is stored, settings without effect, and the account of failures."""

from __future__ import annotations

import collections
import json
import os
import re
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from answers import MISBEHAVING, answers_of, config_at, score

from raydpo.config.rewards import RewardConfig
from raydpo.errors import RaydpoError
from raydpo.rewards.apply import SCORES, account, apply, too_many
from raydpo.rewards.functions import resolve
from raydpo.rewards.task import ANSWERS, RewardTask
from raydpo.terminal.console import Console


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    (tmp_path / "my_rewards.py").write_text(MISBEHAVING)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_sum_is_that_of_trl_where_nothing_fails(place):
    """Weights times values of the functions that apply; unknown without any of them, or when a weighted one failed."""
    (place / "sums.py").write_text(
        "def one(kind, **kwargs): return [{'a': 1.0, 'b': None, 'c': 1.0, 'd': 1.0, 'e': None}[k] for k in kind]\n"
        "def two(kind, **kwargs):\n"
        "    return [{'a': 0.5, 'b': 4.0, 'c': None, 'd': 1 / 0 if k == 'd' else 1, 'e': None}[k] for k in kind]\n"
        "def seen(kind, **kwargs): return [{'a': 7.0, 'b': 'x', 'c': 7.0, 'd': 7.0, 'e': 7.0}[k] for k in kind]\n"
    )
    rewards = [{"use": "sums:one", "weight": 2.0}, {"use": "sums:two", "weight": -1.0}, {"use": "sums:seen", "weight": 0}]
    rows, _ = score(place, answers_of(list("abcde")), *rewards)
    assert [row["reward"] for row in rows] == [2 * 1.0 - 0.5, -4.0, 2.0, None, None]
    assert [dict(row["parts"]) for row in rows] == [
        {"one": 1.0, "two": 0.5, "seen": 7.0},
        {"one": None, "two": 4.0, "seen": None},
        {"one": 1.0, "two": None, "seen": 7.0},
        {"one": 1.0, "two": None, "seen": 7.0},
        {"one": None, "two": None, "seen": 7.0},
    ]
    assert [row["error"] for row in rows] == [
        None,
        "seen: TypeError: returned 'x'; expected a number or None",
        None,
        "two: ZeroDivisionError: division by zero (sums.py:3)",
        None,
    ]


def test_async_functions_states_and_logs(place):
    answers = answers_of(["ok"] * 5, gold=[1, "é"])
    rewards = [{"use": "my_rewards:waiting"}, {"use": "my_rewards:called"}, {"use": "my_rewards:state"}]
    rows, _ = score(place, answers, *rewards, round=3, step=7)
    assert [dict(row["parts"]) for row in rows] == [{"waiting": 8.0, "called": 2.0, "state": 307.0}] * 5
    arrays = [0.5, [0, 1], [None], 3, "1j"]  # NumPy's numbers are numbers
    assert [json.loads(row["details"])["state"] for row in rows] == [
        {"mean": 1.5, "twice": 2 * (n + 1), "arrays": arrays[n]} for n in range(5)
    ]
    rows, _ = score(place, answers, {"use": "my_rewards:misaligned"})
    assert [row["reward"] for row in rows] == [1.0] * 5  # one value for one answer, once they are called alone


def test_results_are_stored_and_only_failures_are_tried_again(place):
    (place / "counting.py").write_text(
        "import json, os\nfrom pathlib import Path\n"
        "def f(completions, kind, **kwargs):\n"
        "    with open('calls', 'a') as file: file.write(json.dumps(completions) + '\\n')\n"
        "    return [1 / 0 if k == 'later' and not Path('now').exists() else 1.0 for k in kind]\n"
    )
    answers, calls = answers_of(["ok", "ok", "later", "ok"] + ["ok"] * 140), place / "calls"
    first, printed = score(place, answers, {"use": "counting:f"})
    assert [row for row, one in enumerate(first) if one["error"]] == [2] and "144/144 answers" in printed
    assert len(calls.read_text().splitlines()) == 3 + 64  # three blocks; the first again, one by one
    calls.unlink()
    second, printed = score(place, answers, {"use": "counting:f"})
    assert second[2]["error"] == first[2]["error"] and calls.read_text().splitlines() == ['["answer 2"]']
    calls.unlink()
    (place / "now").touch()
    third, printed = score(place, answers, {"use": "counting:f", "weight": 3.0, "timeout": 5})
    assert [one["reward"] for one in third] == [3.0] * 144 and calls.read_text().splitlines() == ['["answer 2"]']
    assert third[:2] == [{**one, "reward": 3.0} for one in first[:2]]  # with the seconds of then
    calls.unlink()
    _, printed = score(place, answers, {"use": "counting:f"})
    assert not calls.exists() and "scoring f: all found in the cache" in printed
    score(place, answers, {"use": "counting:f"}, round=1)
    assert len(calls.read_text().splitlines()) == 3  # the function may read trainer_state


def test_an_edited_function_and_an_edited_helper_score_again(place, monkeypatch):
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    (place / "edited.py").write_text(
        "import helper\ndef f(completions, **kwargs): return [helper.value] * len(completions)\n"
    )
    (place / "helper.py").write_text("value = 1.0\n")
    written = (place / "helper.py").stat()
    answers = answers_of(["ok"] * 8)
    before = resolve(RewardConfig(use="edited:f"))
    assert {row["reward"] for row in score(place, answers, {"use": "edited:f"})[0]} == {1.0}
    (place / "helper.py").write_text("value = 2.5\n")
    os.utime(place / "helper.py", ns=(written.st_atime_ns, written.st_mtime_ns))  # Python's caches see no difference
    assert {row["reward"] for row in score(place, answers, {"use": "edited:f"})[0]} == {2.5}
    (place / "unrelated.py").write_text("x = 1\n")
    (place / "helper.py").write_text("value = 1.0\n")
    assert resolve(RewardConfig(use="edited:f")) == before
    task = RewardTask.of(RewardConfig(use="edited:f"))
    (place / "helper.py").write_text("value = 3.0\n")
    with pytest.raises(RaydpoError, match=r"the reward f \(edited:f\) has another source on .* or it was edited meanwhile"):
        task.open("cpu")


def test_answers_to_a_prompt_are_scored_together(place):
    (place / "together.py").write_text(
        "def f(prompts, **kwargs): return [float(sum(other == one for other in prompts)) for one in prompts]\n"
    )
    rows, _ = score(place, answers_of(["ok"] * 24 * 11, n=24), {"use": "together:f"})
    assert {row["reward"] for row in rows} == {24.0}
    assert score(place, ANSWERS.empty_table(), {"use": "together:f"})[0] == []


def test_every_answer_has_the_same_columns(place):
    (place / "gold.py").write_text("def f(gold, **kwargs): return [None if one is None else float(one) for one in gold]\n")
    answers = answers_of(["ok"] * 130, n=1)  # three blocks; in the first and the last no prompt has the column
    golds = {100: {"gold": 2}, 101: {"gold": 3, "other": "x"}}
    answers = answers.set_column(5, "columns", [[json.dumps(golds.get(row, {})) for row in range(130)]])
    rows, _ = score(place, answers.cast(ANSWERS), {"use": "gold:f"})
    assert {row: one["reward"] for row, one in enumerate(rows) if one["reward"]} == {100: 2.0, 101: 3.0}
    assert not any(one["error"] for one in rows)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (
            {"judge": {"url": "http://h/v1", "model": "m"}, "timeout": 9},
            "timeout 9.0 has no effect on judge; set judge.timeout",
        ),
        ({"reward_model": "m", "timeout": 9}, "timeout 9.0 has no effect on reward_model; drop it"),
        ({"reward_model": "m", "opponents": 2}, "opponents 2 has no effect on reward_model; drop it, or use judge"),
        ({"use": "math", "whole": False}, "whole False has no effect on math; drop it, or use json"),
    ],
)
def test_a_setting_without_effect_is_refused(reward, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        RewardConfig.model_validate(reward)


def test_a_thousand_prompts_with_a_failing_a_hanging_and_a_misbehaving_function(place):
    """Every good answer is scored, and one readable account tells of the rest."""
    (place / "planted.py").write_text(
        MISBEHAVING + "\ndef failing(kind, **kw): return mine([], ['raise' if k == 'raise' else 'ok' for k in kind])\n"
        "def hanging(kind, **kw): return mine([], ['hang' if k == 'hang' else 'ok' for k in kind])\n"
        "def wild(kind, **kw): return mine([], [k if k not in ('raise', 'hang') else 'ok' for k in kind])\n"
    )
    kinds = ["ok"] * 8000
    planted = {100: "raise", 900: "raise", 5000: "hang", 5001: "hang", 31: "nan", 32: "text", 7999: "exit", 4000: "segfault"}
    for row, kind in planted.items():
        kinds[row] = kind
    answers = answers_of(kinds, n=8)
    rewards = [RewardConfig(use=f"planted:{name}", timeout=1.0) for name in ("failing", "hanging", "wild")]
    start = time.monotonic()
    scored = apply(rewards, answers, config_at(place), Console())
    seconds = time.monotonic() - start
    assert scored.schema.equals(SCORES) and [row["reward"] for row in scored.to_pylist()] == [
        None if row in planted else 3.0 for row in range(8000)
    ]
    prompt = [answers["prompt_id"][row].as_py().hex()[:8] for row in (100, 5000, 31)]
    assert account(rewards, scored, answers) == [
        f"reward failing: 2 of 8,000 answers failed (first: prompt {prompt[0]}, sample 4: ZeroDivisionError: division by "
        "zero (planted.py:6))",
        f"reward hanging: 2 of 8,000 answers failed (first: prompt {prompt[1]}, sample 0: TimeoutError: took more than 1 s)",
        f"reward wild: 4 of 8,000 answers failed (first: prompt {prompt[2]}, sample 7: ValueError: returned nan; expected a "
        "finite number, or None if the function does not apply)",
    ]
    assert too_many(rewards, scored, 0.01) is None and "wild on 4 of 8,000" in str(too_many(rewards, scored, 0.0004))
    assert seconds < 60, seconds


@pytest.mark.slow
def test_actors_of_a_cluster_give_the_same(place, monkeypatch):
    """Ray Data actors, here on a Ray of this machine that counts as a cluster."""
    import ray

    kinds = [["ok", "raise", "none", "exit", "nan"][row % 5 if row % 50 < 5 else 0] for row in range(400)]
    answers, rewards = answers_of(kinds), [RewardConfig(use="my_rewards:mine"), RewardConfig(use="json")]
    here = apply(rewards, answers, config_at(place / "here"), Console())
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        there = apply(rewards, answers, config_at(place / "there"), Console())
    finally:
        ray.shutdown()
    assert here.drop("seconds").equals(there.drop("seconds"))
    assert collections.Counter(kinds)["ok"] == (here["reward"].to_numpy() == 1.0).sum()
    stored = [sorted(file.name for file in (place / at).rglob("*.parquet")) for at in ("here", "there")]
    assert stored[0] == stored[1] and len(stored[0]) == 14
    assert np.isfinite(there["seconds"].to_numpy()).all() and os.path.isdir(place / "there")


def test_as_many_errors_as_allowed_are_not_too_many():
    rewards = [RewardConfig(use="json")]
    for failed, allowed in ((29, 0.29), (57, 0.57), (58, 0.58), (0, 0.0)):
        scored = pa.Table.from_pylist([{"error": "json: x" if row < failed else None} for row in range(100)], SCORES)
        assert too_many(rewards, scored, allowed) is None
        assert failed == 0 or too_many(rewards, scored, allowed - 0.001) is not None
