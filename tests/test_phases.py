"""The seconds of a start-up by phase."""

import io
import os
import subprocess
import sys
import time

from raydpo.terminal import phases as module
from raydpo.terminal.console import Console
from raydpo.terminal.phases import Phases, Seldom


def test_phases_follow_each_other_without_gaps():
    phases = Phases()
    for name in ("reading", "training", "reading"):
        phases.begin(name)
        time.sleep(0.02)
    phases.end()
    assert list(phases.seconds) == ["imports and settings", "reading", "training"]
    assert phases.seconds["reading"] >= 0.04 and phases.seconds["training"] >= 0.02
    assert sum(phases.seconds.values()) <= phases.elapsed < sum(phases.seconds.values()) + 1
    phases.begin("late")
    assert "late" not in phases.seconds and not phases.running
    phases.seconds["training"] = 61.26
    assert "training 61.3" in phases.line() and phases.line().startswith("start-up: 61.")


def test_the_whole_process_counts_where_asked():
    program = (
        "import time; time.sleep(0.3)\nfrom raydpo.terminal.phases import Phases\n"
        "print(Phases(whole_process=True).elapsed, Phases().elapsed)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    whole, late = map(float, done.stdout.split())
    assert 0.3 <= whole < 30 and late < 0.1


def test_ids_and_texts_are_printed_as_they_are():
    stream = io.StringIO()
    Console(stream).say("pair r001:b:8:7-2 :smile:")
    assert stream.getvalue() == "pair r001:b:8:7-2 :smile:\n"


def test_phases_are_told_only_if_asked():
    told, silent = io.StringIO(), io.StringIO()
    for stream, verbose in ((told, True), (silent, False)):
        console = Console(stream)
        console.verbose = verbose
        console.begin("reading pairs")
        console.phases.end()
        console.begin("nothing")
    assert told.getvalue().split() == ["0.0", "s", "reading", "pairs"] and not silent.getvalue()


def test_only_what_takes_long_is_told_and_seldom(monkeypatch):
    now, told = [100.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    seldom = Seldom(lambda *counts: told.append((*counts, now[0] - 100)))
    for done in range(40):  # a second each
        seldom(done, 40)
        now[0] += 1
    seldom(40, 40)
    assert told == [(10, 40, 10), (20, 40, 20), (30, 40, 30), (40, 40, 40)]
    for done in range(9):  # again, and quicker
        seldom(done, 8)
        now[0] += 1
    assert len(told) == 4
