"""Whatever a reward function does costs only the answers on which it does it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from answers import MISBEHAVING, answers_of, config_at, score

from raydpo.config.rewards import RewardConfig
from raydpo.errors import RaydpoError
from raydpo.rewards.apply import account, apply, too_many
from raydpo.rewards.checks import check_rewards
from raydpo.rewards.process import HANGS, FunctionProcess
from raydpo.terminal.console import Console

MINE = {"use": "my_rewards:mine", "timeout": 1.0}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    (tmp_path / "my_rewards.py").write_text(MISBEHAVING)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def without_place(error: str | None) -> str | None:
    """An error without the line of the module where it was raised."""
    return error and re.sub(r" \(my_rewards\.py:\d+\)$", "", error)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("raise", "ZeroDivisionError: division by zero"),
        ("surrogate", r"OSError: no file \udcff"),
        ("exit", "ChildProcessError: the process ended with exit status 3"),
        ("quit", "SystemExit: no more"),
        ("segfault", "ChildProcessError: the process was ended by signal SIGSEGV"),
        ("fork", "ChildProcessError: the process ended with exit status 4"),
        ("hang", "TimeoutError: took more than 1 s"),
        ("alarm", "TimeoutError: rang"),
        ("nan", "ValueError: returned nan; expected a finite number, or None if the function does not apply"),
        ("huge", "ValueError: returned -1e+200; expected a number from -1e+100 to 1e+100"),
        ("infinite", "ValueError: returned -inf; expected a finite number, or None if the function does not apply"),
        ("text", "TypeError: returned 'good'; expected a number or None"),
    ],
)
def test_costs_one_answer_of_64(place, kind, error):
    kinds = [f"ok {row}" for row in range(64)]
    kinds[41] = kind
    rows, _ = score(place, answers_of(kinds), MINE)
    assert [row["reward"] for row in rows] == [None if row == 41 else 1.0 for row in range(64)]
    errors = [without_place(row["error"]) for row in rows]
    assert errors == [f"mine: {error}" if row == 41 else None for row in range(64)]
    assert dict(rows[41]["parts"]) == {"mine": None}


def test_what_is_no_failure(place):
    rows, printed = score(place, answers_of(["none", "true", "print", "input", "leave an alarm"]), MINE)
    assert [row["reward"] for row in rows] == [None, 1.0, 1.0, 0.0, 1.0] and not any(row["error"] for row in rows)
    assert "a line" not in printed and "bytes" not in printed


def test_an_alarm_that_is_left_ends_no_later_call(place):
    process = FunctionProcess(RewardConfig.model_validate(MINE))
    request = {"prompts": ['"x"'], "completions": ["y"], "completion_ids": [[1]], "round": 0, "step": 0}
    try:
        process.ask(request | {"columns": ['{"kind": "leave an alarm"}']}, 5)
        time.sleep(0.4)
        assert process.ask(request | {"columns": ['{"kind": "ok"}']}, 5)["rewards"] == [1.0]
    finally:
        process.end()


def test_fails_on_all(place):
    answers = answers_of(["raise"] * 130)
    rewards = [RewardConfig.model_validate(MINE)]
    scored = apply(rewards, answers, config_at(place), Console())
    assert scored["reward"].null_count == 130
    prompt = answers["prompt_id"][0].as_py().hex()[:8]
    assert account(rewards, scored, answers) == [
        f"reward mine: 130 of 130 answers failed (first: prompt {prompt}, sample 0: ZeroDivisionError: division by zero "
        "(my_rewards.py:6))"
    ]
    told = too_many(rewards, scored, 0.01)
    assert told is not None and "mine on 130 of 130 answers (first error: ZeroDivisionError" in told and "(0.01)" in told
    assert too_many(rewards, scored, 1.0) is None


def test_wrong_lengths_and_types_are_told(place):
    kinds = [f"ok {row}" for row in range(6)]
    rows, _ = score(place, answers_of(kinds), {"use": "my_rewards:whole"})
    assert [row["error"] and row["error"].removeprefix("whole: ") for row in rows] == [
        "TypeError: returned a str; expected a list of numbers, one for each answer",
        "TypeError: returned a dict; expected a list of numbers, one for each answer",
        "TypeError: returned a NoneType; expected a list of numbers, one for each answer",
        "TypeError: returned a float; expected a list of numbers, one for each answer",
        None,
        "ValueError: returned 0 values for 1 answer(s)",
    ]
    rows, _ = score(place, answers_of([f"ok {row}" for row in range(64)]), {"use": "my_rewards:short"})
    assert [row["reward"] for row in rows] == [1.0] * 64  # 63 of 64 for the block, then one for each


def test_a_function_that_always_hangs_ends_soon(place):
    start = time.monotonic()
    rows, _ = score(place, answers_of(["hang"] * 128), {**MINE, "timeout": 0.5})
    errors = [row["error"] for row in rows]
    assert time.monotonic() - start < 30
    assert 1 <= errors.count("mine: TimeoutError: took more than 0.5 s") <= 2 * HANGS
    assert "mine: TimeoutError: not tried, since" in errors[-1]


def test_a_prompt_on_which_a_function_hangs_costs_no_other(place):
    """All answers to the first prompt of a block hang, so the first calls for single answers would all hang in order."""
    rows, _ = score(place, answers_of(["hang"] * 4 + ["ok"] * 60), {**MINE, "timeout": 0.5})
    assert [row["reward"] for row in rows] == [None] * 4 + [1.0] * 60
    assert {row["error"] for row in rows[:4]} == {"mine: TimeoutError: took more than 0.5 s"}


def test_what_a_function_does_to_its_process_changes_no_reward(place):
    (place / "odd.py").write_text(
        "import asyncio, functools, os, sys\n"
        "def value(kind): return [float(one[3:]) for one in kind]\n"
        "def forks(kind, **kwargs):\n    return [99.0] * len(kind) if os.fork() == 0 else value(kind)\n"
        "def pops(prompts, completions, kind, **kwargs):\n"
        "    found = value(kind)\n    prompts.clear(); completions.pop(); kind.clear()\n    return found\n"
        "def closes(kind, **kwargs):\n    sys.stdout = None\n    return value(kind)\n"
        "class Client:\n    loop = None\n    async def ask(self, one):\n"
        "        self.loop = self.loop or asyncio.get_running_loop()\n"
        "        assert self.loop is asyncio.get_running_loop()\n        return float(one[3:])\n"
        "client = Client()\n"
        "async def waits(kind, **kwargs): return [await client.ask(one) for one in kind]\n"
        "def only_named(function):\n    @functools.wraps(function)\n"
        "    def wrapper(**kwargs): return function(kwargs['kind'])\n    return wrapper\n"
        "@only_named\ndef wrapped(kind): return value(kind)\n"
    )
    answers = answers_of([f"ok {row}" for row in range(320)])
    for name in ("forks", "pops", "closes", "waits", "wrapped"):
        check_rewards([RewardConfig(use=f"odd:{name}")], ["kind"])
        rows, _ = score(place, answers, {"use": f"odd:{name}", "timeout": 20.0})
        assert [(row["reward"], row["error"]) for row in rows] == [(float(row), None) for row in range(320)], name


def test_a_child_of_a_hanging_function_is_ended(place):
    rows, _ = score(place, answers_of(["child"]), MINE)
    assert rows[0]["error"] == "mine: TimeoutError: took more than 1 s"
    assert not _alive(int((place / "child").read_text()))


def test_no_process_is_left_when_the_parent_is_killed(place):
    """The function hangs without ever giving up the interpreter, and has a child."""
    (place / "stuck.py").write_text(
        "import os, re, subprocess\nfrom pathlib import Path\n"
        "def mine(completions, **kwargs):\n"
        "    child = subprocess.Popen(['sleep', '600'])\n"
        "    Path('pids').write_text(f'{os.getpid()} {child.pid}')\n"
        "    re.match('(a+)+b', 'a' * 60)\n"
    )
    code = (
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]; from answers import *; from pathlib import Path\n"
        "score(Path('.'), answers_of(['ok']), {'use': 'stuck:mine'})"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        _until(lambda: (place / "pids").is_file() and len((place / "pids").read_text().split()) == 2)
        pids = [int(pid) for pid in (place / "pids").read_text().split()]
        assert all(map(_alive, pids))
        parent.kill()
        parent.wait()
        _until(lambda: not any(map(_alive, pids)))
    finally:
        parent.kill()
        parent.wait()


def test_a_module_that_ends_its_process_when_it_is_imported(place):
    (place / "ending.py").write_text("import os\nos._exit(7)\n")
    with pytest.raises(RaydpoError, match="ending:f cannot be opened: while it was imported, the process ended with exit s"):
        FunctionProcess(RewardConfig(use="ending:f"))


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _until(true, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, os.times()
        time.sleep(0.05)


def test_ctrl_c_ends_the_processes_and_keeps_finished_blocks(place):
    (place / "slow.py").write_text(
        "import os, time\nfrom pathlib import Path\n"
        "def mine(completions, kind, **kwargs):\n"
        "    if kind[0] == 'hang':\n"
        "        Path('pid').write_text(str(os.getpid()))\n"
        "        time.sleep(600)\n"
        "    return [1.0] * len(kind)\n"
    )
    code = (  # a process that a script starts in the background begins with SIGINT ignored
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]; from answers import *; from pathlib import Path\n"
        "score(Path('.'), answers_of(['ok'] * 640 + ['hang'] * 64), {'use': 'slow:mine', 'timeout': 300})"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    try:
        _until(lambda: (place / "pid").is_file() and (place / "pid").read_text())
        _until(lambda: len(list((place / "cache").rglob("*.parquet"))) == 10)
        parent.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in parent.communicate(timeout=60)[1]
        _until(lambda: not _alive(int((place / "pid").read_text())))
    finally:
        parent.kill()
        parent.wait()
