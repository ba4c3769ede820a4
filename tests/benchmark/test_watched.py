"""A command seen from outside: its wall clock, the memory of all its processes, its lines and its failure."""

import os
import sys

import pytest

from raydpo.benchmark import watch as module
from raydpo.benchmark.watch import watch
from raydpo.errors import TrainError

MIB = 2**20
CHILD = "import time; held = bytearray(96 * 2**20); time.sleep(1)"
PARENT = f"""
import subprocess, sys, time
print("begun", flush=True)
held = bytearray(64 * 2**20)
subprocess.run([sys.executable, "-c", {CHILD!r}])
print("ended")
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_memory_is_that_of_all_processes_and_lines_have_times(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "INTERVAL", 0.05)
    found = watch([sys.executable, "-c", PARENT], tmp_path / "log", os.environ)
    assert (64 + 96) * MIB < found.tree_bytes < (64 + 96 + 80) * MIB
    begun, ended = found.when("begun"), found.when("ended")
    assert begun is not None and ended is not None and begun + 1 <= ended <= found.seconds
    assert found.when("nothing") is None
    assert (tmp_path / "log").read_text().split()[1::2] == ["begun", "ended"]


def test_a_command_that_fails_is_told_with_its_last_lines(tmp_path):
    code = "import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)"
    with pytest.raises(TrainError, match=r"status 3: one | two .log: "):
        watch([sys.executable, "-u", "-c", code], tmp_path / "log", os.environ)
