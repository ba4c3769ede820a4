"""The reward code: the program in an answer, forms of tests, and what counts as equal."""

from __future__ import annotations

import json

import pytest

from raydpo.config.rewards import RewardConfig
from raydpo.errors import ConfigError
from raydpo.rewards import programs
from raydpo.rewards.programs import UnreadableTests, program_of, read_tests


@pytest.fixture(scope="module")
def code():
    try:
        return programs.make(RewardConfig(use="code"))
    except ConfigError as error:
        pytest.skip(str(error))


DOUBLE = [{"input": "3\n", "output": "6"}, {"input": "5", "output": "10\n"}]


def test_programs_read_and_print(code) -> None:
    answers = [
        "Here it is:\n```python\nprint(int(input()) * 2)\n```\nIt doubles.",
        "print(int(input()) * 2)",
        "```python\nprint(6)\n```",
        "I cannot do that.",
        "```python\nimport sys\nfor line in sys.stdin:\n    sys.stdout.write(str(int(line) * 2) + '  \\n\\n')\n```",
        [{"role": "assistant", "content": "```py\nn = int(input())\nif __name__ == '__main__':\n    print(n + n)\n```"}],
        "print(int(input()) * 2, 'extra')",
        "print(int(input()) * 2)\nimport atexit\natexit.register(print, 'at the end')",
        "import threading\nthreading.Thread(target=lambda: print(int(input()) * 2)).start()",
        "1. So:\n   ```Python\n   if True:\n       print(int(input()) * 2)\n   ```",
        "print(int(input()) * 2)\nexit()\nprint('more')",
        "print(int(input()) * 2)\nquit(1)",
    ]
    logged: dict[str, list] = {}
    assert code(answers, log_extra=logged.__setitem__, tests=[DOUBLE] * 12) == [1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0]
    assert logged["passed"] == [2, 2, 1, 0, 2, 2, 0, 0, 2, 2, 2, 0]
    assert code([" \n"], log_extra=logged.__setitem__, tests=[[{"input": "", "output": ""}]]) == [0]
    assert logged["failed"] == ["no program"]
    assert code(answers[2:4], log_extra=logged.__setitem__, tests=[DOUBLE] * 2) == [0, 0]
    assert logged["failed"] == ["test 2: another output", "test 1: exit status 1, SyntaxError: invalid syntax"]


@pytest.mark.parametrize(
    ("program", "test", "passes"),
    [
        ("def f(a, b): return a + b", {"call": "f(1, 2)", "output": 3}, True),
        ("def f(a, b): return a + b", {"call": "f(1, 2)", "output": 3.0}, True),
        ("def f(a, b): return a - b", {"call": "f(1, 2)", "output": 3}, False),
        ("def f(): return 0.1 + 0.2", {"call": "f()", "output": 0.3}, True),
        ("def f(): return 0.301", {"call": "f()", "output": 0.3}, False),
        ("def f(): return 1", {"call": "f()", "output": True}, True),  # as Python compares
        ("def f(): return 2", "assert f() == True", False),
        ("def f(): return '3'", {"call": "f()", "output": 3}, False),
        ("def f(): return (1, [2])", {"call": "f()", "output": [1, [2]]}, True),
        ("def f(): return {'a': (1, 2)}", {"call": "f()", "output": {"a": [1, 2]}}, True),
        ("def f(): return [['a', 1]]", {"call": "f()", "output": {"a": 1}}, False),
        ("def f(): return None", {"call": "f()", "output": None}, True),
        ("def f(): print('noise'); return 1", {"call": "f()", "output": 1}, True),
        ("def f(): raise ValueError", {"call": "f()", "output": 1}, False),
        ("def f(): raise SystemExit(0)", {"call": "f()", "output": None}, False),
        ("def f(): return 10 ** 4000", {"call": "f()", "output": 1.5}, False),
        ("def f(): return float('nan')", {"call": "f()", "output": 1.5}, False),
        ("class A:\n    def __eq__(self, other): return True\ndef f(): return A()", {"call": "f()", "output": 1}, False),
        ("def f(): return f", {"call": "f()", "output": "f"}, False),
        ("def f(n): return set(range(n))", "assert f(3) == {2, 1, 0}", True),
        ("def f(n): return list(range(n))", "assert f(3) == {2, 1, 0}", False),
        ("def f(s): return s.encode()", "assert f('a') == b'a'", True),
        ("def f(s): return s.upper()", "assert f('a') == 'A', 'a message'", True),
        ("def f(s): return {1: 'a'}", "assert f('a') == {1: 'a'}", True),
        ("x = []\nx.append(x)\ndef f(): return x", {"call": "f()", "output": []}, False),
    ],
)
def test_calls(program: str, test, passes: bool, code) -> None:
    assert code([program], tests=[[test]]) == [float(passes)]


def test_a_call_may_forge_nothing(code) -> None:
    """A program may write what it likes where values go. It still does not know what is expected."""
    forged = "import os\nos.write(3, b'{\"other\": 1}')\nos._exit(0)"
    logged: dict[str, list] = {}
    assert code([forged], log_extra=logged.__setitem__, tests=[[{"call": "f()", "output": 3}]]) == [0.0]
    assert code(["import os\nos.write(3, b'[[[')\nos._exit(0)"], tests=[[{"call": "f()", "output": 3}]]) == [0.0]
    assert code(["import os\nos.write(3, b'[' * 9999)\nos._exit(0)"], tests=[[{"call": "f()", "output": 3}]]) == [0.0]
    assert code(["import os\nos.write(3, b'9' * 9999)\nos._exit(0)"], tests=[[{"call": "f()", "output": 3}]]) == [0.0]


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        ("[", "the tests are the text '[', which is no JSON"),
        ([], "the tests are [], expected a list of"),
        ({"input": "x"}, "expected a list of"),
        ([{"input": "x"}], "test 1 is {'input': 'x'}, expected"),
        ([*DOUBLE, {"input": 3, "output": "x"}], "test 3 is {'input': 3, 'output': 'x'}, expected"),
        (["assert f(1)"], "test 1 is 'assert f(1)'; an assertion must compare with a literal by =="),
        (["assert f(1) == g(2)"], "must compare with a literal"),
        (["assert f(1) == 2 == 2"], "must compare with a literal"),
        (["import os"], "must compare with a literal"),
        (["assert ("], "must compare with a literal"),
    ],
)
def test_tests_that_cannot_be_read(tests, said: str) -> None:
    with pytest.raises(UnreadableTests) as error:
        read_tests(tests)
    assert said in str(error.value)


def test_tests_are_read_from_json_and_cost_their_answer_only(code) -> None:
    bad, good, none = code(["print(int(input()) * 2)"] * 3, tests=["[", json.dumps(DOUBLE), None])
    assert isinstance(bad, UnreadableTests) and good == 1.0 and none is None


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("a\n```python\n1\n```\nb\n```py\n2\n```\n```text\n3\n```", "2\n"),
        ("```\n1\n```\n```\n2\n```", "2\n"),
        ("```python\n1\n```\n```\noutput\n```", "1\n"),
        ("```python\nx = '''\n```\n", "x = '''\n"),
        ("```python\ncut = 1\n", "cut = 1\n"),
        ("~~~\nprint(1)", "~~~\nprint(1)"),
        ("```json\n{}\n```", "```json\n{}\n```"),
        ("  ```python\n  1\n  ```", "1\n"),
        ("  ```python\n  if x:\n\n      1\n 2\n  ```", "if x:\n\n    1\n2\n"),
    ],
)
def test_the_program_of_an_answer(answer: str, program: str) -> None:
    assert program_of(answer) == program


def test_options() -> None:
    assert programs.column(RewardConfig(use="code")) == ("tests",)
    assert programs.column(RewardConfig(use="code", column="cases")) == ("cases",)
