"""What a training prints."""

import io

from raydpo.rundir.display import TrainingDisplay
from raydpo.terminal.console import Console

BEGINS = {"pairs": 8, "unit": "pairs", "first_step": 0, "total_steps": 3, "steps_per_epoch": 2, "world_size": 1}


def test_a_run_of_one_step_is_a_warning():
    """Such as twenty pairs with the default of train.pairs_per_step."""
    console = Console(io.StringIO())
    with TrainingDisplay(console) as display:
        display.listen("begin", BEGINS)
        display.listen("begin", BEGINS | {"steps_per_epoch": 1})
    assert "one step" not in console.stream.getvalue(), "three epochs of one step are three steps"
    with TrainingDisplay(console) as display:
        display.listen("begin", BEGINS | {"steps_per_epoch": 1, "total_steps": 1})
    assert "warning: all 8 pairs fit into one step" in console.stream.getvalue()
    assert "lower train.pairs_per_step, or raise train.epochs" in console.stream.getvalue()


def test_the_rate_is_that_of_the_steps_alone():
    """The line of the last step comes with it, not after evaluation, checkpoint and export, which took longer here."""
    console = Console(io.StringIO())
    row = {"loss": 0.6, "rewards/accuracies": 1.0, "tokens_per_second": 9.0}
    with TrainingDisplay(console) as display:
        display.listen("begin", BEGINS)
        for step in (1, 2, 3):
            assert "3/3" not in console.stream.getvalue()
            display.listen("step", row | {"step": step})
        assert "training  3/3 steps" in console.stream.getvalue()
        display.listen("note", "final loaded again")
    assert console.stream.getvalue().splitlines()[-1] == "final loaded again"
