"""The short form of tests/soak.py; ``make soak`` is the long one."""

import pytest
from soak import soak


@pytest.mark.alone
def test_a_disturbed_run_ends_with_the_same_bits(tmp_path):
    """Two simulated machines: a hung worker, a machine taken away with notice, one without, SIGTERM and the same command
    again, a full disk."""
    faults = ["hang", "preemption", "disk", "machine", "terminate"]
    report = soak(tmp_path, steps=160, faults=faults)
    assert report["same_bits"] and report["same_metrics"], report
    assert set(report["faults"]) == set(faults), report
    assert report["restarts"] >= 4, report
    # After a notice, and after SIGTERM, the checkpoint is of the last step that was done.
    assert report["redone_after"]["preemption"] == [0] and report["redone_after"]["terminate"] == [0], report
