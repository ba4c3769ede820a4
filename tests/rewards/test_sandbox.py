"""The sandbox of programs: what a program tries, it cannot do, or it is ended; and the next program is unharmed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from raydpo.config.rewards import RewardConfig
from raydpo.errors import ConfigError
from raydpo.rewards import programs, sandbox
from raydpo.rewards.sandbox import Sandbox

SECONDS = 1.0


def _usable() -> str:
    try:
        Sandbox(5.0)
    except ConfigError as error:
        return str(error)
    return ""


REFUSED = _usable()
pytestmark = pytest.mark.skipif(bool(REFUSED), reason=REFUSED)
DONE = "print('done')"
# Each program prints "done" if it could do what it tries.
TRIES = {
    "fork bomb": f"import os\nwhile True:\n    os.fork()\n{DONE}",
    "process": f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', '1'], check=True)\n{DONE}",
    "daemon": f"import os, time\nif os.fork():\n    {DONE}\nelse:\n    os.setsid()\n    time.sleep(60)",
    "2 GB": f"x = bytearray(2 << 30)\n{DONE}",
    "2 GB in small parts": f"x = []\nfor _ in range(2048):\n    x.append(bytearray(1 << 20))\n{DONE}",
    "endless loop": f"while True:\n    pass\n{DONE}",
    "endless sleep": f"import time\ntime.sleep(1000)\n{DONE}",
    "ignored signals": f"import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True:\n    pass\n{DONE}",
    "100 MB of output": f"import sys\nfor _ in range(100):\n    sys.stdout.write('x' * (1 << 20))\n{DONE}",
    "100 MB of errors": f"import sys\nfor _ in range(100):\n    sys.stderr.write('x' * (1 << 20))\n{DONE}",
    "large file": f"open('x', 'wb').write(b'x' * (2 << 20))\n{DONE}",
    "many files": f"for i in range(64):\n    open(f'{{i}}', 'wb').write(b'x' * (1 << 20))\n{DONE}",
    "shared memory": f"open('/dev/shm/x', 'wb').write(b'x')\n{DONE}",
    "shared memory of System V": "import ctypes\nlibc = ctypes.CDLL(None)\nsegment = libc.shmget(0, 1 << 20, 0o1600)\n"
    f"assert segment >= 0 and libc.shmctl(segment, 0, None) == 0\n{DONE}",
    "socket": f"import socket\nsocket.create_connection(('127.0.0.1', 22), 1)\n{DONE}",
    "any socket": f"import socket\nsocket.socket()\n{DONE}",
    "kill the parent": f"import os\nos.kill(os.getppid(), 9)\n{DONE}",
    "kill all": f"import os\nos.kill(-1, 9)\n{DONE}",
    "shadow": f"open('/etc/shadow').read()\n{DONE}",
    "passwd": f"open('/etc/passwd').read()\n{DONE}",
    "read a file": f"open(PRIVATE + '/file').read()\n{DONE}",
    "write a file": f"open(PRIVATE + '/new', 'w').write('x')\n{DONE}",
    "delete a file": f"import os\nos.remove(PRIVATE + '/file')\n{DONE}",
    "symbolic link": f"import os\nos.symlink(PRIVATE, 'link')\nopen('link/file').read()\n{DONE}",
    "library": f"import json\nopen(json.__file__, 'a').write('x')\n{DONE}",
    "environment": f"import os\nassert 'RAYDPO_SECRET' in os.environ\n{DONE}",
    "process list": f"import os\nassert [one for one in os.listdir('/proc') if one.isdigit()]\n{DONE}",
    "parent's memory": f"import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0\n{DONE}",
    "user namespace": f"import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0\n{DONE}",
    "exit before output": f"import sys\nsys.exit(0)\n{DONE}",
    "exit at once": f"import os\nos._exit(0)\n{DONE}",
    "right output, wrong status": f"import sys\n{DONE}\nsys.exit(3)",
    "abort": f"import os\nos.abort()\n{DONE}",
    "crash": f"import ctypes\nctypes.string_at(0)\n{DONE}",
    "deep recursion": f"def f(): return f()\nf()\n{DONE}",
    "thread bomb": "import threading, time\n"
    f"for _ in range(5000):\n    threading.Thread(target=time.sleep, args=(60,)).start()\n{DONE}",
}
GOOD = "print('do' + 'ne')"


@pytest.fixture(scope="module")
def code():
    return programs.make(RewardConfig(use="code", seconds=SECONDS))


@pytest.fixture
def private(monkeypatch) -> Iterator[Path]:
    """A directory with a file. It is not below /tmp, which the sandbox has a /tmp of its own for."""
    monkeypatch.setenv("RAYDPO_SECRET", "x")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        (Path(place) / "file").write_text("private")
        yield Path(place)


def test_programs_cannot(code, private: Path) -> None:
    logged: dict[str, list] = {}
    bad = {what: f"PRIVATE = {str(private)!r}\n{text}" for what, text in TRIES.items()}
    both = [text for one in bad.values() for text in (one, GOOD)]
    start = time.monotonic()
    rewards = code(both, log_extra=logged.__setitem__, tests=[[{"input": "", "output": "done\n"}]] * len(both))
    seconds = time.monotonic() - start
    could = {what: reward for what, reward in zip(bad, rewards[::2], strict=True) if reward != 0.0}
    assert could == {}
    assert rewards[1::2] == [1.0] * len(bad)
    why = dict(zip(bad, logged["failed"][::2], strict=True))
    ended = {what for what, said in why.items() if said.endswith(("more than its time", "more than its output"))}
    endless = {"endless loop", "endless sleep", "ignored signals"}
    assert ended >= {*endless, "100 MB of output", "100 MB of errors"} and all(
        said.startswith("test 1: ") for said in why.values()
    )
    assert seconds < len(endless) * 3 * SECONDS + 2 * len(both)
    assert [path.name for path in private.iterdir()] == ["file"]


def test_tries_are_real(private: Path) -> None:
    """Without the sandbox, or in a plain Python, the same programs can. Else the test above would show nothing."""
    unsafe = programs.make(RewardConfig(use="code", seconds=SECONDS, unsafe=True))
    test = [{"input": "", "output": "done"}]
    can = ["passwd", "read a file", "write a file", "symbolic link", "process list", "delete a file"]
    assert unsafe([f"PRIVATE = {str(private)!r}\n{TRIES[what]}" for what in can], tests=[test] * len(can)) == [1.0] * len(
        can
    )
    # These work in a plain Python.
    for what in ("process", "daemon", "any socket", "environment", "shared memory", "shared memory of System V"):
        plain = f"import signal\n{TRIES[what].replace('60', '0')}"
        assert subprocess.run([sys.executable, "-c", plain], capture_output=True, text=True).stdout == "done\n", what
    Path("/dev/shm/x").unlink()


def test_no_limit_ends_the_tests_that_follow(code) -> None:
    program = "import sys\nn = int(input())\nwhile n == 2:\n    pass\nprint(n)"
    logged: dict[str, list] = {}
    tests = [{"input": str(n), "output": str(n)} for n in (1, 2, 3)]
    assert code([program], log_extra=logged.__setitem__, tests=[tests]) == [0.0]
    assert logged == {"passed": [1], "failed": ["test 2: more than its time"]}
    assert code([program], tests=[[tests[0], tests[2]]]) == [1.0]


def test_the_limit_of_time_has_a_signal_of_its_own() -> None:
    """SIGKILL may mean other limits, too."""
    (reply,) = Sandbox(1).run("while True: pass", [{"input": ""}])
    assert (reply["status"], reply["over"]) == (-signal.SIGXCPU, "time")


@pytest.mark.parametrize(
    ("wait", "seconds", "allowed"),
    [("time.sleep(0.8)", 0.5, 1), ("\nwhile time.process_time() < 0.3: pass", 0.5, 1)],
    ids=["clock", "CPU"],
)
def test_limits_of_time_are_those_of_all_tests_together(wait, seconds, allowed) -> None:
    replies = list(Sandbox(seconds).run(f"import time\n{wait}", [{"input": ""}] * 4))
    assert [reply["over"] for reply in replies] == [None] * allowed + ["time"] * (4 - allowed)


def test_what_is_expected_cannot_be_found() -> None:
    """The program searches files, variables of all frames, objects of the collector and its memory for the secret."""
    secret = f"secret-{uuid.uuid4().hex}"
    search = r"""
import gc, os, re, sys
found, pattern = set(), re.compile(r"secret-[0-9a-f]{32}")
def look(value, depth=0):
    if isinstance(value, (str, bytes)):
        found.update(pattern.findall(str(value)))
    elif isinstance(value, (dict, list, tuple)) and depth < 5:
        for one in (*value.keys(), *value.values()) if isinstance(value, dict) else tuple(value):
            look(one, depth + 1)
frame = sys._getframe()
while frame is not None:
    look(dict(frame.f_globals)), look(dict(frame.f_locals))
    frame = frame.f_back
for one in gc.get_objects():
    for value in gc.get_referents(one):
        look(value)
for place in ("/proc", "/tmp", "/etc", "/home", "/var", "/run"):
    for folder, _, files in os.walk(place):
        for name in files:
            try:
                look(open(os.path.join(folder, name), errors="replace").read(1 << 20))
            except Exception:
                pass
look(str(os.environ)), look(str(sys.argv))
print(*found)
"""
    code = programs.make(RewardConfig(use="code", seconds=30))
    logged: dict[str, list] = {}
    tests = [{"input": "x", "output": secret}, {"call": "found", "output": secret}]
    for test in tests:
        assert code([search], log_extra=logged.__setitem__, tests=[[test]]) == [0.0]
        assert logged["failed"][0] in ("test 1: another output", "test 1: another value")
    # It does find what is there.
    assert code([search], tests=[[{"input": "", "output": secret}]]) == [0.0]
    assert code([f"x = {secret!r}\n{search}"], tests=[[{"input": "", "output": secret}]]) == [1.0]


def test_nothing_is_left_of_a_program() -> None:
    mark = uuid.uuid4().hex
    box = Sandbox(SECONDS)
    box._command[-1] += f"\n# {mark}\n"

    def alive() -> list[str]:
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark.encode() in (entry / "cmdline").read_bytes():
                    found.append(entry.name)
            except OSError:
                pass
        return found

    running = box.run("import time\nprint('x', flush=True)\ntime.sleep(60)", [{"input": ""}] * 2)
    start = time.monotonic()
    assert next(running)["over"] == "time"
    assert alive()
    running.close()
    while alive() and time.monotonic() - start < 20:
        time.sleep(0.05)
    assert alive() == []
    # Also if the process that started it is killed.
    script = (
        "import sys\nfrom raydpo.rewards.sandbox import Sandbox\nbox = Sandbox(60)\n"
        f"box._command[-1] += '\\n# {mark}\\n'\nprint('up', flush=True)\n"
        "next(box.run('import time\\ntime.sleep(100)', [{'input': ''}]))"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert parent.stdout is not None and parent.stdout.readline() == b"up\n"
    while len(alive()) < 4 and time.monotonic() - start < 60:  # the parent, bubblewrap and its init, inside, and the program
        time.sleep(0.05)
    assert len(alive()) >= 4
    parent.kill()
    parent.wait()
    start = time.monotonic()
    while alive() and time.monotonic() - start < 20:
        time.sleep(0.05)
    assert alive() == []


def test_no_user_namespaces_are_refused_in_one_sentence() -> None:
    """A process that may make no further user namespaces: bubblewrap really fails."""
    script = (
        "from raydpo.rewards.sandbox import Sandbox\nfrom raydpo.errors import ConfigError\n"
        "try:\n    Sandbox(5)\nexcept ConfigError as error:\n    print(error)\nprint(Sandbox(5, unsafe=True).seconds)"
    )
    binary = sandbox._binary()
    assert binary is not None
    shut = [binary, "--unshare-user", "--disable-userns", "--dev-bind", "/", "/", sys.executable, "-c", script]
    done = subprocess.run(shut, capture_output=True, text=True, check=True, env=dict(os.environ))
    sentence, _, rest = done.stdout.partition("\n")
    assert sentence.startswith("the reward code runs programs in a sandbox, which this machine refuses (bwrap: ")
    assert "user.max_user_namespaces" in sentence and sentence.endswith("with your rights") and rest == "5\n"


def test_bubblewrap_is_missing(monkeypatch) -> None:
    monkeypatch.setattr(sandbox, "_binary", lambda: None)
    with pytest.raises(ConfigError, match=r"needs the program bwrap .* pip install 'raydpo\[rewards\]'"):
        programs.check(RewardConfig(use="code"))


def test_a_sandbox_that_fails_later_is_no_reward(monkeypatch, code) -> None:
    box = next(cell.cell_contents for cell in code.__closure__ if isinstance(cell.cell_contents, Sandbox))
    monkeypatch.setattr(box, "_command", ["/bin/sh", "-c", "echo no space left >&2; exit 1"])
    (result,) = code([GOOD], tests=[[{"input": "", "output": "done"}]])
    assert isinstance(result, sandbox.SandboxError) and str(result) == "no space left"
