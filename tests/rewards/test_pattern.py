"""Reward ``regex``: RE2 search in text and in conversations, in linear time."""

from __future__ import annotations

import time

import pytest

from raydpo.config.rewards import RewardConfig
from raydpo.rewards.functions import resolve
from raydpo.rewards.sources import open_built_in


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        ("^(Yes|No)$", "Yes", 1.0),
        ("^(Yes|No)$", "Yes\n", 0.0),  # Python's re would find it
        ("^(Yes|No)$", "no\nYes", 0.0),
        ("(?m)^(Yes|No)$", "no\nYes", 1.0),
        ("a.c", "a\nc", 0.0),
        ("(?s)a.c", "a\nc", 1.0),
        ("(?i)é", "É", 1.0),
        ("^<think>(?s:.*)</think>", "<think>x\ny</think> z", 1.0),
        ("b", "abc", 1.0),
        ("", "", 1.0),
    ],
)
def test_searches_the_text(pattern, text, found):
    function = open_built_in(RewardConfig(use="regex", pattern=pattern))
    assert function(completions=[text, [{"role": "assistant", "content": text}]], prompts=["", []]) == [found, found]


def test_no_pattern_hangs():
    function = open_built_in(RewardConfig(use="regex", pattern="^(a+)+$"))
    start = time.monotonic()
    assert function(completions=["a" * 100_000 + "b"]) == [0.0]
    assert time.monotonic() - start < 5


def test_another_pattern_is_another_function():
    one, other = (resolve(RewardConfig(use="regex", pattern=pattern)) for pattern in "ab")
    assert one.digest == other.digest and one.options != other.options
    assert resolve(RewardConfig(use="regex", pattern="a", weight=2.0, name="other", timeout=3.0)) == one


def test_defaults_are_part_of_what_a_function_is():
    """Rewards that another release stored under another default are not used."""
    assert resolve(RewardConfig(use="json")).options == {"column": None, "whole": True}
    assert resolve(RewardConfig(use="math")).options == {"column": None, "seconds": 5.0}
