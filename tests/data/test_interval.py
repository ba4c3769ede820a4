"""Intervals against published figures, and how often they contain the true value. Draws are the same in every run."""

from itertools import combinations

import numpy as np
import pytest

from raydpo.data.interval import (
    Z95,
    by_group,
    effective_count,
    mean,
    mean_by_group,
    ratio,
    share,
    share_by_group,
    share_error,
    student95,
)

NONE = {"value": None, "low": None, "high": None}


def holds(interval, truth):
    return interval["low"] <= truth <= interval["high"]


def test_student_as_it_is_tabled():
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 9: 2.262, 20: 2.086, 100: 1.984, 10**6: 1.960}
    assert {freedom: student95(freedom) for freedom in table} == pytest.approx(table, abs=1e-3)


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_few_values_have_an_interval_that_holds(count):
    """With 1.96 in place of Student's t, the interval of two values contains the true value in 70 % of draws only."""
    draws = np.random.default_rng(0).normal(0, 1, (2000, count))
    assert np.mean([holds(mean(values), 0) for values in draws]) == pytest.approx(0.95, abs=0.015)
    assert mean(draws[0][:1])["low"] is None and mean(draws[0][:0]) == NONE == share(0, 0)


def test_wilson():
    ten = share(5, 10)  # 0.2366 to 0.7634
    assert (ten["low"], ten["high"]) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    for total in range(1, 200):  # printed, a bound of -1e-17 would be -0.0%
        assert f"{share(0, total)['low']:.1%} {share(total, total)['high']:.1%}" == "0.0% 100.0%", total


def test_a_share_of_all_has_an_error():
    """19 of 20 is within one standard error of 20 of 20."""
    assert share_error(1.0, 20) == pytest.approx(share_error(0.0, 20)) == pytest.approx(0.0557, abs=1e-4)
    assert share_error(0.5, 100) == pytest.approx(0.05, rel=0.02)
    assert share_error(0.75, 10_000) == pytest.approx((0.75 * 0.25 / 10_000) ** 0.5, rel=1e-3)


def rankings(random, records, answers=4):
    """Wins over all pairs of ranked answers, and the number of the record of each. Skill differs from record to record."""
    wins, groups = [], []
    for record in range(records):
        score = np.arange(answers)[::-1] * 0.5 * (0.8 + random.normal()) + random.normal(0, 1, answers)
        wins += [float(score[better] > score[worse]) for better, worse in combinations(range(answers), 2)]
        groups += [record] * (answers * (answers - 1) // 2)
    return np.array(wins), np.array(groups)


@pytest.mark.parametrize("records", [5, 20, 60])
def test_pairs_of_one_prompt_count_as_what_they_are_worth(records):
    """Taken as independent, the pairs of rankings have intervals that hold the truth in 84 % of draws, and an error that is
    two thirds of the real one."""
    random = np.random.default_rng(1)
    truth = rankings(np.random.default_rng(2), 20_000)[0].mean()
    draws = [rankings(random, records) for _ in range(300)]
    assert np.mean([holds(share(wins.sum(), len(wins)), truth) for wins, _ in draws]) < 0.89
    assert np.mean([holds(share_by_group(*draw), truth) for draw in draws]) == pytest.approx(0.95, abs=0.025)
    told = [share_error(wins.mean(), effective_count(*by_group(wins, groups))) for wins, groups in draws]
    assert np.mean(told) == pytest.approx(np.std([wins.mean() for wins, _ in draws]), rel=0.15)


def test_groups_of_one_are_no_groups():
    wins = np.array([1, 1, 0.5, 0, 1, 1, 1])
    assert share_by_group(wins, np.arange(7)) == share(5.5, 7)
    margins = np.array([2.0, -1.0, 0.5, 4.0])
    assert mean_by_group(margins, np.arange(4)) == mean(margins)
    assert share_by_group(wins[:0], np.arange(0)) == mean_by_group(wins[:0], np.arange(0)) == NONE


def test_what_does_not_vary_is_worth_its_groups():
    """Six pairs of each of four records, all won, count as four observations, not as 24."""
    groups = np.repeat(np.arange(4), 6)
    assert share_by_group(np.ones(24), groups) == share(4, 4)
    assert effective_count(np.array([4.0]), np.array([6])) == 1.0
    # Pairs of a prompt that disagree more than chance would have it are no more than they are.
    assert effective_count(np.full(50, 3.0), np.full(50, 6)) == 50.0
    assert effective_count(np.tile([3.0, 3.01], 25), np.full(50, 6)) == 300.0


def test_a_mean_over_groups_of_many_sizes():
    random = np.random.default_rng(3)
    alone = together = 0
    for _ in range(300):
        groups = np.repeat(np.arange(40), random.choice([1, 3, 6], 40))
        values = random.normal(0, 1, 40)[groups] + random.normal(0, 1, len(groups))
        alone, together = alone + holds(mean(values), 0), together + holds(mean_by_group(values, groups), 0)
    assert alone < 0.85 * 300 and together == pytest.approx(0.95 * 300, abs=0.025 * 300)


def test_a_ratio_by_hand():
    """(3 + 5) / (1 + 3) = 2; the residuals are 1 and -1, with standard error 1, divided by the mean 2."""
    assert ratio(np.array([3.0, 5.0]), np.array([1.0, 3.0])) == {
        "value": 2.0,
        "low": pytest.approx(2 - student95(1) / 2),
        "high": pytest.approx(2 + student95(1) / 2),
    }
    assert student95(10**9) == pytest.approx(Z95)
