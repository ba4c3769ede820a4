"""Which trials go on: the better share at each rung."""

import math
from itertools import islice

from raydpo.config import StopEarlyConfig
from raydpo.sweeps.halving import best_first, rungs, survivors

SCORES = {"a": 0.5, "b": 0.9, "c": 0.7, "d": 0.7, "e": math.nan}


def test_rungs_double():
    assert list(islice(rungs(StopEarlyConfig(grace=20)), 4)) == [20, 40, 80, 160]


def test_best_first_with_ties_in_order_and_what_is_no_number_last():
    assert best_first(SCORES, lower_is_better=False) == ["b", "c", "d", "a", "e"]
    assert best_first(SCORES, lower_is_better=True) == ["a", "c", "d", "b", "e"]


def test_the_better_share_goes_on_rounded_up():
    assert survivors(SCORES, 0.5, lower_is_better=False) == {"b", "c", "d"}
    assert survivors(SCORES, 0.4, lower_is_better=False) == {"b", "c"}
    assert survivors(SCORES, 0.01, lower_is_better=True) == {"a"}
    assert survivors(dict.fromkeys("abcdefghij", 0.5), 0.3, lower_is_better=False) == {"a", "b", "c"}, "not four"
    assert survivors({}, 0.5, lower_is_better=False) == set()
