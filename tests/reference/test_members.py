"""Processes of a team: none outlives another for long, and why one ended is told. Real processes, killed and stopped."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from tiny import preferences, write_preferences

from raydpo.reference import members as module
from raydpo.reference.members import Members, WithoutWordsError

SECONDS = 5
"""Within which every process of a broken team has ended."""


@dataclass
class Job:
    """A setup that does what its messages say: Python expressions."""

    package: str = "os"

    def __setstate__(self, state):
        __import__(state["package"])
        vars(self).update(state)

    def join(self):
        return self

    def score(self, message):
        exec(message)


HANG = "import threading; lock = threading.Lock(); lock.acquire(); lock.acquire()"


def state(pid):
    """One letter of /proc: R, S, T = stopped, Z = a zombie. None = there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return None


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def gone_after(pids, seconds=SECONDS):
    """Seconds until none of them runs any more. A zombie holds nothing; whoever adopted it collects it."""
    start = time.monotonic()
    while left := [pid for pid in pids if state(pid) not in (None, "Z")]:
        assert time.monotonic() - start < seconds, f"still there: {[(pid, state(pid)) for pid in left]}"
        time.sleep(0.02)
    return time.monotonic() - start


def members_of(driver):
    """Processes of teams, by the process that started them, of all that descend from ``driver``."""
    teams = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if b"raydpo.reference.members" not in (entry / "cmdline").read_bytes():
                continue
            ancestor = leader = parent(entry.name)
            while ancestor not in (driver, 0, 1):
                ancestor = parent(ancestor)
        except OSError:
            continue
        if ancestor == driver:
            teams.setdefault(leader, []).append(int(entry.name))
    return teams


@pytest.fixture
def team():
    made = []

    def make(count=2, lost=lambda causes: None, setup=None):
        made.append(Members(count, lost))
        made[-1].tell([setup or Job()] * count, 30)
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_they_do_what_they_are_told_and_all_end_when_the_first_process_says_so(team, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(module, "CLOSE_S", 20.0)  # none needs to be killed
    both = team()
    both.wait_until_ready(30)
    note = f"import os; open('{tmp_path}/' + str(os.getpid()), 'w').write(str(os.environ.get('PYTHONDONTWRITEBYTECODE')))"
    both.tell([note + f"; {HANG}"] * 2, 30)
    files = [tmp_path / str(process.pid) for process in both.processes]
    until(lambda: all(file.exists() and file.read_text() for file in files))
    assert {file.read_text() for file in files} == {"None"}, "each would compile all modules again"
    start = time.monotonic()
    both.close()
    assert time.monotonic() - start < SECONDS
    assert [process.poll() for process in both.processes] == [0, 0], "ended by themselves, whatever they were doing"
    assert [state(process.pid) for process in both.processes] == [None, None], "and were collected"


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_what_a_member_raised_is_told_also_at_its_start(team):
    broken = team(setup=Job("os"))
    broken.wait_until_ready(30)
    broken.tell(["raise KeyError('why')", HANG], 30)
    until(lambda: broken.processes[0].poll() is not None)
    (why,) = broken.reasons()
    assert type(why) is KeyError and str(why) == "'why'"
    with pytest.raises(WithoutWordsError, match="process 1 has ended"), broken.working():
        raise AssertionError

    lacking = Job()
    lacking.package = "no_such_package"
    lacking = team(setup=lacking)
    with pytest.raises(WithoutWordsError):
        lacking.wait_until_ready(30)
    assert all(type(why) is ModuleNotFoundError and "no_such_package" in str(why) for why in lacking.reasons())


def test_a_death_is_noticed_while_the_main_thread_waits_for_ever(team, monkeypatch):
    monkeypatch.setattr(module, "STUCK_S", 0.5)
    monkeypatch.setattr(module, "WORDS_S", 0.5)
    told = []
    both = team(lost=told.append)
    both.wait_until_ready(30)
    with both.working():
        os.kill(both.processes[1].pid, signal.SIGBUS)
        until(lambda: told)
    (causes,) = told
    assert [str(cause) for cause in causes] == ["process 2 was ended by SIGBUS, as a full /dev/shm causes"]
    told.clear()
    noticed = team(lost=told.append)
    noticed.wait_until_ready(30)
    with noticed.working():
        os.kill(noticed.processes[0].pid, signal.SIGKILL)
        until(noticed.reasons)
    time.sleep(1)
    assert not told, "the main thread noticed by itself, as gloo lets it"


def stop(process):
    """Stop a process, and wait until all its threads stand still."""
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)


def test_a_member_that_reads_nothing_is_not_waited_for_without_end(team):
    both = team()
    both.wait_until_ready(30)
    stop(both.processes[0])
    with pytest.raises(TimeoutError, match="has read nothing for"):
        both.tell(["pass " + "#" * 1_000_000] * 2, 0.5)
    both.close()
    assert both.processes[0].poll() == -signal.SIGKILL, "a stopped process ends, too"
    both._ready.clear()
    slow = team(setup=Job())
    os.kill(slow.processes[0].pid, signal.SIGSTOP)
    with pytest.raises(TimeoutError, match="process 1 has not started after 1 s"):
        slow.wait_until_ready(1.0)


LEADER = """
import sys, time
from test_members import Job
from raydpo.reference.members import Members
team = Members(2, lambda causes: None)
print(*(process.pid for process in team.processes), flush=True)
if sys.argv[1] == "starting":
    time.sleep(1000)
team.tell([Job()] * 2, 30)
team.wait_until_ready(30)
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, 3, is_master=True, wait_for_workers=False)
join = '''
import datetime, torch, torch.distributed as dist
store = dist.TCPStore("127.0.0.1", {port}, 3, is_master=False)
dist.init_process_group("gloo", rank={rank}, world_size=3, store=store, timeout=datetime.timedelta(hours=1))
dist.all_reduce(torch.ones(1))
print("joined", file=sys.stderr, flush=True)
dist.all_reduce(torch.ones(1))
'''
team.tell([join.format(port=store.port, rank=rank) for rank in (1, 2)], 30)
dist.init_process_group("gloo", rank=0, world_size=3, store=store)
import torch
dist.all_reduce(torch.ones(1))
print("inside", flush=True)
time.sleep(1000)  # the others wait in the second all_reduce
"""


@pytest.mark.parametrize("moment", ["starting", "inside a collective"])
def test_none_outlives_a_first_process_that_is_killed(moment):
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *filter(None, sys.path)])
    leader = subprocess.Popen(
        [sys.executable, "-c", LEADER, moment],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    pids = []
    try:
        pids += map(int, leader.stdout.readline().split())
        assert len(pids) == 2
        if moment != "starting":
            assert leader.stdout.readline() == "inside\n"
            os.kill(pids[0], signal.SIGSTOP)  # its threads cannot read the pipe
        leader.kill()
        gone_after(pids)
    finally:
        leader.kill()
        leader.wait()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def configured(place, tiny_llama, **score):
    write_preferences(place / "a.jsonl", preferences(400, low=20, high=60))
    tree = {
        "output": str(place / "runs"),
        "name": "build",
        "model": {"path": str(tiny_llama), "dtype": "float32", "layout": "tree"},
        "data": {"train": str(place / "a.jsonl")},
        "score": {"workers": 2, "tokens_per_batch": 128, "tokens_per_part": 2500, **score},
    }
    (place / "config.yaml").write_text(yaml.safe_dump(tree))
    return [sys.executable, "-m", "raydpo.cli", "score", str(place / "config.yaml"), f"cache.uri={place / 'cache'}"]


def parts(cache):
    return {file.name: file.read_bytes() for file in cache.glob("*/parts/part-*.parquet")}


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["partition", "sequence_parallel"])
def test_a_build_goes_on_after_a_member_and_a_first_process_were_killed(tiny_llama, tmp_path, shared):
    from raydpo.reference.store import ReferenceCache

    command, cache = configured(tmp_path, tiny_llama, **{shared: 2}), tmp_path / "cache"
    build = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        kept = {}
        for stop in (False, True):
            until(lambda: build.poll() is not None or (parts(cache).keys() > kept.keys() and members_of(build.pid)), 200)  # noqa: B023
            assert build.poll() is None, build.communicate()[0]
            ((leader, (member,)),) = members_of(build.pid).items()
            kept |= parts(cache)
            if stop:  # so the first process waits for it in a collective
                os.kill(member, signal.SIGSTOP)
                time.sleep(1)
            os.kill(leader if stop else member, signal.SIGKILL)
            gone_after([leader, member])
        output = build.communicate(timeout=300)[0]
    finally:
        build.kill()
    assert build.returncode == 0, output
    after = parts(cache)
    assert kept.items() <= after.items(), "committed parts are not touched"
    opened = ReferenceCache.open(str(cache))
    opened.refresh()
    stored = sum(part.rows for part in opened.parts())
    assert stored == len(opened.keys()) == 800, "each completion is stored once"
    assert re.search(r"cache: 0 of 800 completions were there .*?, 800 scored", output), output
    assert output.count("it was started again") == 2 and "process 1 was ended by SIGKILL" in output, output
    assert not members_of(build.pid)
