import math

from raydpo.rundir.watch import WINDOW, TrainingWatch


def row(loss=0.6, chosen=0.0, **more):
    return {"loss": loss, "logratio/chosen_per_token": chosen} | more


def said(rows, warned=None):
    watch = TrainingWatch([] if warned is None else warned)
    return [line for step, one in enumerate(rows, 1) for line in watch.look(step, one)]


def test_a_quiet_run_says_nothing():
    assert not said([row(0.69 - 0.001 * step + 0.02 * (step % 3), -0.001 * step) for step in range(200)])


def test_a_spike_is_told_once_with_its_step_and_both_values():
    lines = said([row()] * WINDOW + [row(5.0)] + [row()] * WINDOW + [row(5.0)])
    assert len(lines) == 1 and f"step {WINDOW + 1} is 5.0000" in lines[0] and "0.6000 on average" in lines[0]


def test_a_spike_is_told_with_the_deviation_that_was_measured():
    """Not with the smallest deviation that counts, which is larger where losses hardly vary."""
    (line,) = said([row(0.6 + 0.001 * (-1) ** step) for step in range(WINDOW)] + [row(5.0)])
    assert "(standard deviation 0.0010)" in line
    assert not said([row()] * WINDOW + [row(0.66)]), "a tenth more is no spike"


def test_a_restart_does_not_repeat_it():
    assert not said([row()] * WINDOW + [row(5.0)], warned=["spike"])


def test_collapse_of_chosen_log_probs_is_told_in_probabilities():
    lines = said([row(chosen=-1.0)] * (2 * WINDOW))
    assert len(lines) == 1 and "0.37 of the probability" in lines[0] and "train.beta" in lines[0]


def test_routers_that_collapse_are_told_of():
    lines = said([row(aux_loss=8.0 + 0.1 * step) for step in range(120)])
    assert len(lines) == 1 and "few experts" in lines[0] and "was 8.95 at first" in lines[0]
    assert "train.router_aux_loss_coef" in lines[0]
    assert not said([row(aux_loss=8.0 + 0.02 * step) for step in range(120)])


def test_the_slow_rank_is_named():
    slow = row(slowest_rank=3.0, slowest_lag=0.5)
    lines = said([slow] * (2 * WINDOW))
    assert len(lines) == 1 and "rank 3 has been the slowest" in lines[0] and "50%" in lines[0]
    mixed = [slow if step % 2 else row(slowest_rank=1.0, slowest_lag=0.5) for step in range(100)]
    assert not said(mixed), "not one and the same rank"


def test_steps_that_were_not_taken_do_not_count():
    assert not said([row(math.nan, math.nan)] * 100)
