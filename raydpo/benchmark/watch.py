"""Runs one command as a user would, and measures it from outside: wall clock, memory of all its processes, printed lines."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from raydpo.errors import TrainError

__all__ = ["Watched", "watch"]

INTERVAL = 0.5
"""Least seconds between two looks at the memory."""
SHARE = 0.02
"""Largest share of one core that looking takes. The system walks through all pages of all processes; without a limit that
slowed a command of a dozen processes down by a fifth on two cores."""
LOG_LINES = 3
"""Last lines of a failed command's log that are shown."""


@dataclass
class Watched:
    """What was seen of a command.

    Attributes:
        seconds: wall clock from its start to its end.
        tree_bytes: most host memory that it and all its descendants took at one time: the sum of their proportional set
            sizes, so that shared pages count once. 0 where the system has no /proc.
        load: load average of the machine in the minute before, which tells whether it was quiet.
        lines: printed lines, each with the seconds since the start.
    """

    seconds: float = 0.0
    tree_bytes: int = 0
    load: float = 0.0
    lines: list[tuple[float, str]] = field(default_factory=list)

    def when(self, beginning: str) -> float | None:
        """Seconds until the first line that begins so."""
        return next((seconds for seconds, line in self.lines if line.startswith(beginning)), None)


def watch(command: Sequence[str], log: Path, environment: Mapping[str, str], limit: float | None = None) -> Watched:
    """Run ``command``, wait for its end, and keep what it printed in ``log``.

    Args:
        limit: seconds after which it is killed; None = never.

    Raises:
        TrainError: if its exit status is not 0, with the last lines that it printed.
    """
    found, ended = Watched(load=os.getloadavg()[0]), threading.Event()
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(environment)
    )
    sampler = threading.Thread(target=_sample, args=(process.pid, found, ended), daemon=True)
    sampler.start()
    timer = threading.Timer(limit or 0, process.kill)
    if limit is not None:
        timer.start()
    assert process.stdout is not None
    try:
        with open(log, "w", encoding="utf-8") as sink:
            for raw in process.stdout:
                line = raw.decode("utf-8", "replace").rstrip()
                found.lines.append((round(time.perf_counter() - start, 2), line))
                sink.write(f"{found.lines[-1][0]:9.2f}  {line}\n")
                sink.flush()
        status = process.wait()
        found.seconds = time.perf_counter() - start
    finally:
        timer.cancel()
        ended.set()
        if process.poll() is None:
            process.terminate()
            process.wait()
        sampler.join()
    if status:
        said = " | ".join([line.strip() for _, line in found.lines if line.strip()][-LOG_LINES:])
        raise TrainError(f"{' '.join(command[1:4])} ended with status {status}: {said[-600:]} (log: {log})")
    return found


def _sample(root: int, found: Watched, ended: threading.Event) -> None:
    pause = INTERVAL
    while not ended.wait(pause):
        start = time.perf_counter()
        found.tree_bytes = max(found.tree_bytes, sum(map(_proportional, _descendants(root))))
        pause = max(INTERVAL, (time.perf_counter() - start) / SHARE)


def _descendants(root: int) -> list[int]:
    """Process ids of ``root`` and all processes that it or its descendants started."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in parentheses, may hold anything.
            parent = int(entry.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue  # it has ended
        children.setdefault(parent, []).append(int(entry.parent.name))
    found = [root]
    for process in found:
        found.extend(children.get(process, ()))
    return found


def _proportional(process: int) -> int:
    try:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8")
    except OSError:
        return 0
    size = re.search(r"^Pss:\s+(\d+)", rollup, re.MULTILINE)
    return int(size[1]) * 1024 if size else 0
