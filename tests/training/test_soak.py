"""The short form of tests/soak.py; ``make soak`` is the long one."""

import pytest
from soak import soak, within_bounds


@pytest.mark.parametrize(
    "faults",
    [
        ["machine", "terminate"],
        # Fast tests of these two, without Ray: test_saver.py has a full disk, test_preemption.py a notice.
        pytest.param(["disk", "preemption"], marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def test_a_disturbed_run_ends_with_the_same_bits(tmp_path, faults):
    """Two simulated machines. One is lost without notice, then the driver gets SIGTERM and the same command runs again.
    Takes minutes: no other fast test kills machines under a run and compares its bits."""
    report = soak(tmp_path, steps=35, faults=faults, pace=0.1)
    assert report["same_bits"] and report["same_metrics"], report
    assert set(report["faults"]) == set(faults), report
    redone = report["redone_after"]
    assert set(redone) >= set(faults) - {"disk"} and report["restarts"] >= len(redone), report
    assert within_bounds(redone), report
