"""The reward ``code``: 1 if the program in the answer passes all tests of its prompt, else 0."""

from __future__ import annotations

import ast
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raydpo.config.rewards import RewardConfig
from raydpo.rewards.inside import plain
from raydpo.rewards.sandbox import Sandbox, SandboxError
from raydpo.rewards.sources import answer_text

__all__ = ["UnreadableTests", "check", "column", "make", "program_of", "read_tests"]

_FENCE = re.compile(r"^([ \t]*)```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_PYTHON = ("python", "py", "python3")
FORMS = '{"input": text, "output": text}, {"call": "f(1)", "output": value} or "assert f(1) == value"'
"""Forms of a test."""


class UnreadableTests(ValueError):
    """The tests of a prompt cannot be read."""


def column(reward: RewardConfig) -> tuple[str, ...]:
    """Columns of the prompts that the reward reads: the tests."""
    return (reward.column or "tests",)


def check(reward: RewardConfig) -> None:
    """Refuse the reward where it cannot run programs. It runs one.

    Raises:
        ConfigError: naming the fix.
    """
    Sandbox(reward.seconds, reward.unsafe)


def make(reward: RewardConfig) -> Callable[..., list[Any]]:
    """Return the reward function, with TRL's interface.

    The column holds the tests of a prompt: a list, or its JSON text, of ``FORMS``. Null = the reward does not apply. An
    entry of the result is 1.0, 0.0, None, or an exception: the tests cannot be read, or the sandbox does not start. A
    program that is missing, fails, or takes more than its limits is 0.0. The first test that it fails is logged as
    ``failed``, the number of tests before as ``passed``.

    Raises:
        ConfigError: if this machine cannot run programs.
    """
    (name,) = column(reward)
    sandbox = Sandbox(reward.seconds, reward.unsafe)

    def code(
        completions: Sequence[Any], log_extra: Callable[[str, list[Any]], None] | None = None, **columns: Any
    ) -> list[Any]:
        results: list[Any] = []
        passed: list[int | None] = []
        failed: list[str | None] = []
        for completion, given in zip(completions, columns[name], strict=True):
            result, good, why = None, None, None
            if given is not None:
                try:
                    good, why = _passed(sandbox, program_of(answer_text(completion)), read_tests(given))
                    result = float(why is None)
                except (UnreadableTests, SandboxError) as error:
                    result = error
            results.append(result)
            passed.append(good)
            failed.append(why)
        if log_extra is not None:
            log_extra("passed", passed)
            log_extra("failed", failed)
        return results

    return code


def program_of(answer: str) -> str:
    """The program in an answer: its last fenced block that is marked as Python, else its last block without a mark, else the
    whole answer. The lines of a block lose as much indentation as its fence has, as in Markdown."""
    blocks = _FENCE.findall(answer)
    for marks in (_PYTHON, ("",)):
        found = [(indent, text) for indent, mark, text in blocks if mark.lower() in marks]
        if found:
            indent, text = found[-1]
            return re.sub(rf"^[ \t]{{1,{len(indent)}}}", "", text, flags=re.MULTILINE) if indent else text
    return answer


def read_tests(given: Any) -> list[tuple[dict[str, str], Any]]:
    """What a program is given in each test, and what is expected of it: the text that it prints, or the value of the call as
    ``inside.plain`` writes it.

    Raises:
        UnreadableTests: naming the test.
    """
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise UnreadableTests(
                f"the tests are the text {given[:60]!r}, which is no JSON; expected a list of {FORMS}"
            ) from error
    if not isinstance(given, list) or not given:
        raise UnreadableTests(f"the tests are {str(given)[:60]}, expected a list of {FORMS}")
    return [_test(f"test {number}", one) for number, one in enumerate(given, 1)]


def _test(name: str, given: Any) -> tuple[dict[str, str], Any]:
    if isinstance(given, str):
        return _of_assertion(name, given)
    kinds = set(given) if isinstance(given, Mapping) else set()
    if kinds == {"input", "output"} and isinstance(given["input"], str) and isinstance(given["output"], str):
        return {"input": given["input"]}, given["output"]
    if kinds == {"call", "output"} and isinstance(given["call"], str):
        try:
            ast.parse(given["call"].strip(), mode="eval")
            json.dumps(given["output"], allow_nan=False)
            return {"call": given["call"]}, plain(given["output"])
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise UnreadableTests(
                f"{name} is {str(given)[:60]}; its call must be an expression, and its output JSON without NaN and Infinity "
                f"({error})"
            ) from error
    raise UnreadableTests(f"{name} is {str(given)[:60]}, expected {FORMS}")


def _of_assertion(name: str, text: str) -> tuple[dict[str, str], Any]:
    """An assertion of equality as a call and a value. The program gets the call only."""
    try:
        (statement,) = ast.parse(text.strip()).body
        assert isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Compare)
        (operator,), (right,) = statement.test.ops, statement.test.comparators
        assert isinstance(operator, ast.Eq)
        return {"call": ast.unparse(statement.test.left)}, plain(ast.literal_eval(right))
    except (AssertionError, SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise UnreadableTests(
            f"{name} is {text[:60]!r}; an assertion must compare with a literal by ==, so that the program does not see "
            "what is expected"
        ) from error


def _passed(sandbox: Sandbox, program: str, tests: list[tuple[dict[str, str], Any]]) -> tuple[int, str | None]:
    """Number of tests that a program passes before it fails one, and how it fails that one. An empty program passes none."""
    if not program.strip():
        return 0, "no program"
    replies = sandbox.run(program, [given for given, _ in tests])
    try:
        for number, ((given, expected), reply) in enumerate(itertools.zip_longest(tests, replies)):
            why = _why(given, expected, reply)
            if why is not None:
                return number, f"test {number + 1}: {why}"
    finally:
        replies.close()
    return len(tests), None


def _why(given: Mapping[str, str], expected: Any, reply: Mapping[str, Any] | None) -> str | None:
    """How a program fails a test; None = it passes."""
    if reply is None:
        return "the program ended the process that runs it"
    if reply["over"] is not None:
        return {"time": "more than its time", "output": "more than its output"}[reply["over"]]
    if reply["status"] != 0:
        last = reply["error"].strip().rpartition("\n")[2]
        return f"exit status {reply['status']}" + (f", {last[:200]}" if last else "")
    if "input" in given:
        return None if _lines(reply["output"]) == _lines(expected) else "another output"
    if reply["value"] is None:
        return "no value"
    try:
        same = _equal(json.loads(reply["value"]), expected)
    except (ValueError, OverflowError, RecursionError):  # no JSON, too deep, or numbers too large to compare
        same = False
    return None if same else "another value"


def _lines(text: str) -> list[str]:
    """Lines without spaces at their ends, and without empty lines at the end of the text."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _equal(found: Any, expected: Any) -> bool:
    """Equality of values as in Python, where True is 1; to 9 digits where one is a float."""
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(_equal, found, expected))
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_equal(found[key], expected[key]) for key in found)
    if isinstance(found, (int, float)) and isinstance(expected, (int, float)):
        exact = isinstance(found, int) and isinstance(expected, int)
        return found == expected or (not exact and math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-12))
    return type(found) is type(expected) and found == expected
