"""The reward constraints: verdicts of lm-eval's checkers, recorded, and instructions that are wrong."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from raydpo.config.rewards import RewardConfig
from raydpo.errors import ConfigError
from raydpo.rewards import constraints
from raydpo.rewards.instructions import CHECKS, InstructionError, follows

RECORDED = json.loads((Path(__file__).parent / "ifeval.json").read_text())
"""What the checkers of lm-eval 0.4.13 said, with NLTK's English model: ``texts``, and ``rows`` of an instruction, its
arguments, and a verdict (0, 1) for each text."""
OTHERWISE = {
    # instruction: texts (their beginning) on which ours decides otherwise, and why
    "change_case:english_lowercase": (  # theirs guesses the language of a few letters; ours looks at the letters only
        *('{"a": 1, "b"', "```json", "{'a': 1}", "*a* *b*", "<<>>\n", "a.\nb.", "null", '{"a": 1, "a"'),
    ),
    "change_case:english_capital": ("A\n******",),  # the same
    "detectable_format:json_format": ("NaN", '{"a": NaN}'),  # NaN is no JSON
    "change_case:capital_word_frequency": ("Q&A: AT&T",),  # NLTK cuts at &
    "length_constraints:number_sentences": (  # initials and abbreviations; ours has no learned model
        *("NASA and the FBI", "J. R. R. Tolkien", "Visit us at 5 a.m.", "A. First choice", "I.e. not much... love"),
    ),
}


def test_verdicts_are_those_of_lm_eval() -> None:
    texts = RECORDED["texts"]
    assert {row[0] for row in RECORDED["rows"]} == set(CHECKS) and len(texts) * len(RECORDED["rows"]) > 15_000
    wrong, excused = [], set()
    for identifier, arguments, verdicts in RECORDED["rows"]:
        for text, verdict in zip(texts, verdicts, strict=True):
            if follows(identifier, arguments, text) != (verdict == "1"):
                known = [start for start in OTHERWISE.get(identifier, ()) if text.startswith(start)]
                excused.update((identifier, start) for start in known)
                wrong += [] if known else [(identifier, arguments, text)]
    assert wrong == []
    # An excuse that nothing needs is an error in this list.
    assert excused == {(identifier, start) for identifier, starts in OTHERWISE.items() for start in starts}


@pytest.mark.parametrize(
    ("identifier", "arguments", "answer", "verdict"),
    [
        # Where theirs fails or guesses: signs of regular expressions, 0, a letter that is none.
        ("keywords:existence", {"keywords": ["C++"]}, "I write c++ code", True),
        ("keywords:existence", {"keywords": ["a.c"]}, "abc", False),
        ("keywords:forbidden_words", {"forbidden_words": ["C++"]}, "I write C++ code", False),
        ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "category", True),
        ("keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": "at least"}, "## a", True),
        ("detectable_format:number_bullet_lists", {"num_bullets": 0}, "no bullets", True),
        ("length_constraints:number_words", {"num_words": 2.0, "relation": "less than"}, "one", True),
        ("startend:end_checker", {"end_phrase": None}, "x", "startend:end_checker lacks its argument 'end_phrase'"),
        ("punctuation:no_comma", {"num_words": None}, "x", True),
        ("punctuation:no_comma", {"num_words": 3}, "x", "punctuation:no_comma has no argument 'num_words'; it takes none"),
        (
            "length_constraints:number_words",
            {"num_words": 3, "relation": "more than"},
            "x",
            "length_constraints:number_words: relation is 'more than', expected 'less than' or 'at least'",
        ),
        (
            "detectable_content:number_placeholders",
            {"num_placeholders": -1},
            "x",
            "detectable_content:number_placeholders: num_placeholders is -1, expected a number of 0 or more",
        ),
        ("keywords:existence", {"keywords": "cat"}, "x", "keywords:existence: keywords is 'cat', expected a list of texts"),
        ("keywords:letter_frequency", {"letter": "ab", "let_frequency": 1, "let_relation": "at least"}, "x", "one letter"),
        (
            "language:response_language",
            {"language": "de"},
            "x",
            "'language:response_language' is unknown; there are length_",
        ),
    ],
)
def test_arguments(identifier, arguments, answer, verdict) -> None:
    if isinstance(verdict, bool):
        assert follows(identifier, arguments, answer) is verdict
    else:
        with pytest.raises(InstructionError) as error:
            follows(identifier, arguments, answer)
        assert verdict in str(error.value)


NO_COMMA = {"id": "punctuation:no_comma"}
WORDS = {"id": "length_constraints:number_words", "num_words": 3, "relation": "at least"}


def test_instructions_of_the_configuration() -> None:
    reward = RewardConfig(use="constraints", instructions=(NO_COMMA, WORDS))
    constraints.check(reward)
    assert constraints.column(reward) == ()
    logged: dict[str, list] = {}
    answers = ["one two three", "one two, three", [{"role": "assistant", "content": "one"}], ""]
    assert constraints.make(reward)(answers, log_extra=logged.__setitem__) == [1.0, 0.0, 0.0, 0.0]
    assert logged["not_followed"] == [[], [NO_COMMA["id"]], [WORDS["id"]], [NO_COMMA["id"], WORDS["id"]]]


def test_instructions_of_the_configuration_are_refused_at_once() -> None:
    for instruction, said in (
        ({"id": "keywords:none"}, "'keywords:none' is unknown"),
        ({"num_words": 3}, "objects with 'id'"),
        ({"id": ["punctuation:no_comma"]}, "is unknown"),
        (WORDS | {"num_words": float("inf")}, "num_words is inf, expected a number of 0 or more"),
        (WORDS | {"num_words": float("nan")}, "num_words is nan, expected a number of 0 or more"),
        (WORDS | {"relation": ["at least"]}, "expected 'less than' or 'at least'"),
    ):
        with pytest.raises(ConfigError, match=said):
            constraints.check(RewardConfig(use="constraints", instructions=(instruction,)))


@pytest.mark.parametrize("unit", [".", "!", "?!", "a.", '"', ".)", "<<", "[", "*", "n't", "-"])
def test_an_answer_that_repeats_one_sign_ends(unit) -> None:
    """Models fall into such loops. Each check takes about linear time: 0.01 s, where 40 s were seen."""
    names = ["number_words", "number_sentences", "number_paragraphs"]
    texts = [{"num_words": 3, "relation": "at least"}, {"num_sentences": 3, "relation": "at least"}, {"num_paragraphs": 2}]
    start = time.process_time()
    for name, arguments in zip(names, texts, strict=True):
        follows(f"length_constraints:{name}", arguments, unit * (3000 // len(unit)))
    for name in ("title", "json_format", "constrained_response"):
        follows(f"detectable_format:{name}", {}, unit * (3000 // len(unit)))
    assert time.process_time() - start < 2


def test_arguments_of_a_prompt_that_are_no_objects_are_an_error_of_that_prompt() -> None:
    function, ids = constraints.make(RewardConfig(use="constraints")), [NO_COMMA["id"]]
    results = function(["a"] * 4, instruction_id_list=[ids] * 3 + [[["x"]]], kwargs=[["{}"], [5], [None], [{}]])
    assert results[2] == 1.0 and [str(results[row])[:38] for row in (0, 1)] == ["expected objects or null in the list k"] * 2
    assert "['x'] is unknown" in str(results[3])


def test_columns_of_ifeval_and_of_ours() -> None:
    reward = RewardConfig(use="constraints")
    assert constraints.column(reward) == ("instruction_id_list", "kwargs")
    # As the data set has it: all arguments in each object, null where they do not belong; and as JSON text.
    lists = [[NO_COMMA["id"], WORDS["id"]], json.dumps([NO_COMMA["id"]]), None, [], ["keywords:none"], [NO_COMMA["id"]], "x"]
    arguments = [[{"num_words": None}, {"num_words": 2, "relation": "at least"}], "[{}]", None, [], [{}], [], []]
    results = constraints.make(reward)(["one, two"] + ["one two"] * 6, instruction_id_list=lists, kwargs=arguments)
    assert results[:4] == [0.0, 1.0, None, None]
    assert [str(one)[:48] for one in results[4:]] == [
        "the instruction 'keywords:none' is unknown; did ",
        "expected two lists of one length in instruction_",
        "the column holds the text 'x', which is no JSON",
    ]
    own = RewardConfig(use="constraints", column="rules")
    assert constraints.column(own) == ("rules",)
    assert constraints.make(own)(["a, b", "a b c", "x"], rules=[[NO_COMMA], json.dumps([NO_COMMA, WORDS]), None]) == [
        0,
        1,
        None,
    ]
