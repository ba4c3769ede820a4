import argparse
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from raydpo.cli import entry
from raydpo.terminal.interrupt import interruptible, sigterm_as_interrupt

SCRIPT = """
import sys, threading, time
from raydpo.terminal.interrupt import interruptible
stop = threading.Event()
def act():
    print("begun", flush=True)
    stop.wait(30)
    time.sleep(float(sys.argv[1]))
    print("ended", flush=True)
print("asked", interruptible(act, stop.set))
"""


def run(after, signals, pause=0.3):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(after)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    for number in signals:
        process.send_signal(number)
        time.sleep(pause)
    output, errors = process.communicate(timeout=20)
    return process.returncode, output, errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_lets_it_come_to_its_end(number):
    status, output, errors = run(0.2, [number])
    assert status == 0 and "ended\nasked True" in output
    assert f"{number.name}: stopping after this step" in errors


def test_the_second_ends_at_once():
    start = time.time()
    status, output, _ = run(25, [signal.SIGTERM, signal.SIGINT], pause=1.3)
    assert status == 130 and "ended" not in output and time.time() - start < 15


def test_a_signal_that_comes_twice_is_one_request():
    """``timeout`` of GNU coreutils signals its command, and then the group of it."""
    status, output, errors = run(0.5, [signal.SIGTERM, signal.SIGTERM], pause=0.05)
    assert (status, errors.count("stopping after this step")) == (0, 1) and "ended" in output


def test_what_it_raises_is_raised_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 / 0, lambda: None)
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_is_an_interrupt():
    with pytest.raises(KeyboardInterrupt), sigterm_as_interrupt():
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        time.sleep(5)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["gpu", "check", "--device", "cpu", "--out", "r.json"],
            "blocks that ended are in r.json. The same command starts again",
        ),
        (["gpu", "check", "--out", "s3://user:word@bucket/r.json"], "blocks that ended are in s3://***@bucket/r.json"),
        (["score", "c.yaml"], "what was committed is kept. Run the same command again to continue"),
        (["train", "c.yaml"], "Run the same command again to continue"),
        (["run", "c.yaml", "--fresh"], "Run the same command without --fresh to continue"),
        (["sweep", "c.yaml"], "Run the same command again to continue"),
        (["plan", "c.yaml"], "interrupted; the same command starts again"),
        (["quickstart"], "interrupted; the same command starts again"),
    ],
)
def test_what_an_interrupt_leaves_is_told_for_each_command(monkeypatch, capsys, arguments, told):
    def interrupted(args, console):
        raise KeyboardInterrupt

    arguments_of = entry.parsed
    monkeypatch.setattr(entry, "parsed", lambda argv: argparse.Namespace(**vars(arguments_of(argv)) | {"act": interrupted}))
    assert entry.main(arguments) == 130
    assert told in capsys.readouterr().err
