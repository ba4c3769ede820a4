import pytest

from raydpo.training.schedule import learning_rate, warmup_steps


def rates(schedule, warmup, total):
    return [learning_rate(step, peak=1.0, schedule=schedule, warmup=warmup, total_steps=total) for step in range(total)]


def test_warmup_share_rounds_up_and_counts_stay():
    assert (warmup_steps(0.1, 25), warmup_steps(0.0, 25), warmup_steps(3, 25)) == (3, 0, 3)


def test_warmup_begins_above_zero_and_ends_at_the_peak():
    assert rates("constant", 3, 5) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_linear_falls_evenly_and_never_reaches_zero():
    assert rates("linear", 0, 4) == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_cosine_is_half_way_at_half_time():
    values = rates("cosine", 0, 4)
    assert values[0] == 1.0 and values[2] == pytest.approx(0.5) and values[3] > 0
