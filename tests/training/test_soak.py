"""The short form of tests/soak.py; ``make soak`` is the long one."""

import pytest
from soak import soak, within_bounds


@pytest.mark.slow  # minutes on two cores; tests/cli/test_verbs.py has a killed worker among the fast tests
def test_a_disturbed_run_ends_with_the_same_bits(tmp_path):
    """Two simulated machines: a full disk, a machine lost with notice, one without, then SIGTERM and the same command
    again."""
    faults = ["disk", "preemption", "machine", "terminate"]
    report = soak(tmp_path, steps=60, faults=faults, pace=0.1)
    assert report["same_bits"] and report["same_metrics"], report
    assert set(report["faults"]) == set(faults), report
    assert report["restarts"] >= 3, report
    redone = report["redone_after"]
    assert {"machine", "preemption", "terminate"} <= set(redone) and within_bounds(redone), report
