"""The short form of tests/soak.py; ``make soak`` is the long one."""

import pytest
from soak import CHECKPOINT_EVERY, soak


@pytest.mark.alone
def test_a_disturbed_run_ends_with_the_same_bits(tmp_path):
    """Two simulated machines: a full disk, a machine taken away with notice, one without, SIGTERM and the same command
    again."""
    faults = ["disk", "preemption", "machine", "terminate"]
    report = soak(tmp_path, steps=60, faults=faults, pace=0.1)
    assert report["same_bits"] and report["same_metrics"], report
    assert set(report["faults"]) == set(faults), report
    assert report["restarts"] >= 3, report
    redone = report["redone_after"]
    assert max(redone["machine"]) <= CHECKPOINT_EVERY, report
    # After a notice, and after SIGTERM, the checkpoint is of the last step that was done.
    assert redone["preemption"] == [0] and redone["terminate"] == [0], report
