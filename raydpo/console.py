"""What the user sees: lines, progress with rate and remaining time, tables. Everything else goes to a file."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["Console", "ProgressLine"]

FILE_WIDTH = 200
LINE_INTERVAL = 10.0
"""Seconds between progress lines where the output is not a terminal."""


class Console:
    """Prints to standard output, or to the given stream."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._use(stream or sys.stdout)

    def _use(self, stream: TextIO) -> None:
        self.stream = stream
        # In a file nobody's window cuts a table; rich would assume 80 columns.
        width = None if stream.isatty() else FILE_WIDTH
        self.rich = RichConsole(file=stream, highlight=False, soft_wrap=True, width=width)

    def say(self, line: str) -> None:
        self.rich.print(line, markup=False)

    def note(self, line: str) -> None:
        """A line that comes from a worker, shown as a warning if it calls itself one."""
        if line.startswith("warning: "):
            self.warn(line.removeprefix("warning: "))
        else:
            self.say(line)

    def warn(self, line: str) -> None:
        self.rich.print(f"warning: {line}", markup=False, style="yellow")

    def print(self, renderable: object) -> None:
        """Any rich renderable."""
        self.rich.print(renderable)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Left-aligned names and right-aligned figures."""
        table = Table(title=title, title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index and len(columns) > 2 else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self.rich.print(table)

    @contextlib.contextmanager
    def progress(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[ProgressLine]:
        """A bar on a terminal, a line now and then elsewhere; call ``update(done, extra)`` on what it yields."""
        if self.rich.is_terminal:
            bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
                           TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), TextColumn("{task.fields[extra]}"),
                           console=self.rich)
            with bar:
                yield ProgressLine(self, label, total, unit, done, bar)
        else:
            line = ProgressLine(self, label, total, unit, done, None)
            yield line
            line.finish()

    def counter(self, label: str, unit: str) -> Callable[[int], None]:
        """For long parts whose end is unknown: call what it returns with the number done so far."""
        start = printed = time.monotonic()

        def count(done: int) -> None:
            nonlocal printed
            now = time.monotonic()
            if now - printed >= LINE_INTERVAL:
                printed = now
                self.say(f"  {label}  {done:,} {unit}  {done / (now - start):.3g} {unit}/s")

        return count

    @contextlib.contextmanager
    def noise_to(self, log: Path) -> Iterator[None]:
        """Until the end of the block, everything that anyone else writes to standard output or error goes to ``log``.

        By file descriptor, so that Ray's C++ threads and child processes are caught too.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        saved = [os.dup(1), os.dup(2)]
        before = self.stream
        ours = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8", errors="replace")
        self._use(ours)
        with open(log, "ab") as sink:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in zip((1, 2), saved, strict=True):
                os.dup2(original, descriptor)
                os.close(original)
            ours.flush()
            self._use(before)
            ours.close()


class ProgressLine:
    """Progress of one long part; rates count from its beginning, not from what was done before."""

    def __init__(self, console: Console, label: str, total: int, unit: str, done: int, bar: Progress | None) -> None:
        self.console, self.label, self.total, self.unit = console, label, total, unit
        self.first = self.done = done
        self.start = self.printed = time.monotonic()
        self.extra = ""
        self._bar = bar
        self._task = bar.add_task(label, total=total, completed=done, rate="", extra="") if bar else None

    def update(self, done: int, extra: str = "") -> None:
        """``done`` of ``total`` are finished; ``extra`` is shown behind the rate."""
        self.done, self.extra = done, extra
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rate=self._rate(), extra=extra)
        elif time.monotonic() - self.printed >= LINE_INTERVAL and done < self.total:
            self._print_line()

    def finish(self) -> None:
        if self.done > self.first:
            self._print_line()

    def _rate(self) -> str:
        seconds = time.monotonic() - self.start
        made = self.done - self.first
        if not made or not seconds:
            return ""
        return f"{made / seconds:.3g} {self.unit}/s"

    def _print_line(self) -> None:
        self.printed = time.monotonic()
        seconds, made = self.printed - self.start, self.done - self.first
        left = _clock((self.total - self.done) * seconds / made) if made else "?"
        tail = f"remaining {left}" if self.done < self.total else f"took {_clock(seconds)}"
        extra = f"  {self.extra}" if self.extra else ""
        self.console.say(f"  {self.label}  {self.done:,}/{self.total:,} {self.unit}  {self._rate()}  {tail}{extra}")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
