"""The built-in functions as rounds and evaluations call them: in processes, with errors of single answers and details."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pyarrow as pa
import pytest
from answers import answers_of, score

from raydpo.config.rewards import RewardConfig
from raydpo.errors import ConfigError
from raydpo.rewards.programs import FORMS, check

pytest.importorskip("math_verify")


def asked(completions: list[str], **columns: list) -> pa.Table:
    """Answers with these texts and columns."""
    table = answers_of(["ok"] * len(completions))
    rows = [json.dumps(dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]
    for name, values in (("completion", completions), ("columns", rows)):
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.string()))
    return table


def test_math_loses_only_the_answers_that_have_no_verdict(tmp_path: Path) -> None:
    answers = [r"\boxed{7}", r"\boxed{9^{9^{9^9}}}", r"\boxed{8}", "7", r"\boxed{9^{9^9}}", "7"]
    table = asked(answers, answer=["7", "7", "7", r"\binom52", "7", None])
    start = time.monotonic()
    # The time limit of the block is shorter than what the two take that never end.
    rows, _ = score(tmp_path, table, {"use": "math", "seconds": 1, "timeout": 1})
    assert time.monotonic() - start < 40
    assert [row["reward"] for row in rows] == [1.0, None, 0.0, None, None, None]
    assert [row["error"] for row in rows] == [
        None,
        "math: TimeoutError: math-verify took more than 1 s for this answer",
        None,
        r"math: ValueError: the right answer '\\binom52' is neither a number, nor LaTeX that math-verify reads, nor a word",
        "math: TimeoutError: math-verify took more than 1 s for this answer",
        None,
    ]
    assert json.loads(rows[0]["details"]) == {"math": {"read": r"\boxed{7}"}}


def test_constraints_say_what_is_not_followed(tmp_path: Path) -> None:
    table = asked(["a b", "a, b"], instruction_id_list=[["punctuation:no_comma"]] * 2, kwargs=[[{}]] * 2)
    rows, _ = score(tmp_path, table, {"use": "constraints"})
    assert [row["reward"] for row in rows] == [1.0, 0.0]
    assert json.loads(rows[1]["details"]) == {"constraints": {"not_followed": ["punctuation:no_comma"]}}


def test_code_runs_in_the_processes_of_rewards(tmp_path: Path) -> None:
    try:
        check(RewardConfig(use="code"))
    except ConfigError as error:
        pytest.skip(str(error))
    answers = ["print(int(input()) * 2)", "while True: pass", "print(3)", "print(4)"]
    table = asked(answers, tests=[[{"input": "2", "output": "4"}]] * 3 + ["none"])
    rows, printed = score(tmp_path, table, {"use": "code", "seconds": 1, "timeout": 1})
    assert [row["reward"] for row in rows] == [1.0, 0.0, 0.0, None] and "unsafe" not in printed
    assert rows[3]["error"] == (
        f"code: UnreadableTests: the tests are the text 'none', which is no JSON; expected a list of {FORMS}"
    )
    assert json.loads(rows[1]["details"])["code"] == {"passed": 0, "failed": "test 1: more than its time"}
    rows, printed = score(tmp_path, table, {"use": "code", "seconds": 1, "unsafe": True})
    assert [row["reward"] for row in rows] == [1.0, 0.0, 0.0, None]
    assert "the reward code runs programs that a model wrote without a sandbox, with your rights (unsafe: true)" in " ".join(
        printed.split()
    )
