"""The reward math: verdicts that were written by hand, answers that never end, and right answers that cannot be read."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

import raydpo
from raydpo.config.rewards import RewardConfig
from raydpo.rewards import equality, mathematics
from raydpo.rewards.equality import final_part

pytest.importorskip("math_verify")
ROWS = [
    tuple(part.replace("⏎", "\n") for part in line.rsplit(" | ", 2))
    for line in (Path(__file__).parent / "verdicts.txt").read_text().splitlines()
    if line and not line.startswith(("# ", "## "))
]
DIFFERENT = [
    # What math-verify, or the rule of the part that is read, decides otherwise than a person would.
    (r"5\text{ cm}", r"\boxed{5\text{ m}}", 1.0),  # units are dropped
    (r"\frac{\pi}{2}", r"\boxed{90^\circ}", 0.0),  # degrees are a unit, too
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{(1,2)}", 0.0),  # a column is not a tuple
    ("7", r"\boxed{3+4}", 1.0),  # an expression counts as its value
    ("100/3", r"\boxed{33.3333}", 0.0),  # six decimals, not six digits
    ("100/3", r"\boxed{33.333333}", 1.0),
    ("1/300", r"\boxed{0.00333333}", 1.0),
    ("7", "seven", 0.0),  # no numbers in words
    ("-3", "minus 3", 0.0),
    ("12:30", "2:5", 1.0),  # a ratio, not a time
    ("540", "He runs 540 meters in 7 days.", 0.0),  # the last number counts
    ("18", "It is 18 or more.", 1.0),  # words around a number are not understood
    ("10:30 AM", "10:30 PM", 0.0),
    (r"\emptyset", r"\boxed{\varnothing}", 0.0),  # a sign that it does not know
    ("Paris", "Paris, because it is the capital.", 0.0),  # a word is compared with the whole answer
    ("123_8", r"\boxed{123}", 1.0),  # the base may be left out
    ("50", "0.5", 0.0),  # only a percent sign makes 0.5 and 50 equal
]


@pytest.fixture(scope="module")
def function():
    return mathematics.make(RewardConfig(use="math"))


def test_verdicts_are_those_of_a_person(function) -> None:
    assert (
        f"| {len(ROWS)} of {len(ROWS)} |" in Path(raydpo.__file__).with_name("guide").joinpath("measurements.md").read_text()
    )
    assert len(ROWS) >= 200 and {verdict for *_, verdict in ROWS} == {"0", "1", "?"}
    results = function([answer for _, answer, _ in ROWS], answer=[gold for gold, *_ in ROWS])
    signs = ["?" if isinstance(one, ValueError) else str(int(one)) for one in results]
    assert [row for row, sign in zip(ROWS, signs, strict=True) if row[2] != sign] == []


def test_known_differences_are_the_documented_ones(function) -> None:
    results = function([answer for _, answer, _ in DIFFERENT], answer=[gold for gold, *_ in DIFFERENT])
    assert results == [verdict for *_, verdict in DIFFERENT]


def test_numbers_null_and_conversations(function) -> None:
    read: dict[str, list[str | None]] = {}
    said = [[{"role": "assistant", "content": f"So \\boxed{{{value}}}"}] for value in ("0.1", "7", "1", "2", "1", "1")]
    results = function(said, log_extra=read.__setitem__, answer=[0.1, 7, None, [2], float("nan"), True])
    assert results[:3] == [1.0, 1.0, None] and read["read"][:3] == ["\\boxed{0.1}", "\\boxed{7}", None]
    assert [str(one) for one in results[3:5]] == [
        "the right answer is a list, expected a text or a number",
        "the right answer is nan",
    ]
    assert results[5] == 0.0  # true is a word


def test_an_unreadable_right_answer_is_named_and_costs_its_answer_only(function) -> None:
    bad, good = function(["5", "5"], answer=[r"\binom52", "5"])
    assert good == 1.0 and isinstance(bad, ValueError)
    assert str(bad) == r"the right answer '\\binom52' is neither a number, nor LaTeX that math-verify reads, nor a word"


@pytest.mark.parametrize(
    ("gold", "wrong"),
    [
        ("2023-01-05", "2017"),
        ("555-1234", "-679"),
        ("12/25/2024", "24/50/2024"),
        ("192.168.0.1", "10.0.0.1"),
        ("5 feet 10 inches", "6 feet 10 inches"),
        ("2 hours 30 minutes", "30 minutes"),
        ("2 thousand 5", "5"),
        ("$5-$10", "5"),
        ("10-15 minutes", "-5"),
    ],
)
def test_a_right_answer_that_is_no_single_number_is_not_read_as_arithmetic(function, gold, wrong) -> None:
    bad, good = function([wrong, "5 m"], answer=[gold, "5 m"])
    assert good == 1.0 and isinstance(bad, ValueError) and "write it as one number" in str(bad)


@pytest.mark.parametrize("answer", ["I rule out A and C.\n\nB", "Eliminating C and D:\nB", "Not A, C and D:\n\n**B**"])
def test_letters_of_an_earlier_line_are_no_second_choice(function, answer) -> None:
    assert function([answer], answer=["B"]) == [1.0]


def test_an_answer_that_never_ends_costs_itself_and_the_time_limit() -> None:
    seconds = 1.0
    function = mathematics.make(RewardConfig(use="math", seconds=seconds))
    function(["1"], answer=["1"])  # the process has started
    verifier = next(
        cell.cell_contents for cell in function.__closure__ or () if isinstance(cell.cell_contents, mathematics.Verifier)
    )
    first = verifier._process
    start = time.monotonic()
    result, read = verifier.verdict("7", r"\boxed{9^{9^{9^9}}}")
    assert seconds <= time.monotonic() - start < seconds + 2
    assert str(result) == "math-verify took more than 1 s for this answer" and read is None
    assert first is not None and first.returncode == -signal.SIGKILL
    results = function([r"\boxed{7}", r"\boxed{9^{9^9}}", r"\boxed{7}"], answer=["7"] * 3)
    assert results[0] == results[2] == 1.0 and isinstance(results[1], TimeoutError)


def test_a_verifier_that_dies_is_replaced(function) -> None:
    verifier = mathematics.Verifier(5)
    assert verifier.verdict("7", "7")[0] == 1.0
    assert verifier._process is not None
    os.kill(verifier._process.pid, signal.SIGSEGV)
    lost, _ = verifier.verdict("7", "7")
    assert str(lost) == "the process of math-verify ended with status -11 on this answer"
    assert verifier.verdict("7", "7")[0] == 1.0
    verifier.close()


def test_deep_and_long_answers_end(function) -> None:
    deep = [r"\boxed{" + "(" * 2000 + "7" + ")" * 2000 + "}", "$" * 4000, "the answer " * 900, "7" * 4000, r"\boxed{" * 500]
    assert function(deep, answer=["8"] * len(deep)) == [0.0] * len(deep)


REPEATED = [
    "(",
    "1,  2, ",
    "1, \n",
    "**",
    "`a",
    "A) x ",
    "(A)",
    "A\n",
    "B or ",
    "18 dozen ",
    "1 2/3 ",
    "√(",
    "- A) x\n",
    "(= ",
    "18 (",
]
REPEATED += [
    "a ",
    "_",
    "1-",
    "1 and ",
    "either 1 or ",
    "wait ",
    "</think>",
    "<answer>",
    "the total sum of ",
    "not ",
    "12:",
    "pi",
]


@pytest.mark.parametrize("gold", ["42", "B", "Yes"])
def test_no_expression_takes_more_than_linear_time_by_much(gold) -> None:
    """A text of 4,000 characters takes far less than the time limit, whatever it repeats."""
    equality.verdict(gold, "1")  # imports
    texts = [text * (4000 // len(text)) for text in REPEATED] + ["42 " + "*" * 1900 + " " * 1900 + "x"]
    for text in texts:
        start = time.monotonic()
        equality.verdict(gold, text)
        assert time.monotonic() - start < 2.0, text[:20]


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        (r"\boxed{1} then \boxed{\frac{1}{2}} end", r"\boxed{\frac{1}{2}}"),
        (r"$\boxed{1}$ and $\boxed{2}$", r"$\boxed{1}$ and $\boxed{2}$"),
        ("5 + 1 = 6\n#### 6", "6"),
        ("The answer to 3 is 4.\nSo the answer is 5", "answer is 5"),
        ("x = 4", "x = 4"),
    ],
)
def test_the_part_that_is_read(answer: str, part: str) -> None:
    assert final_part(answer) == part


def test_options() -> None:
    assert mathematics.column(RewardConfig(use="math")) == ("answer",)
    assert mathematics.column(RewardConfig(use="math", column="solution")) == ("solution",)
    mathematics.check(RewardConfig(use="math"))
