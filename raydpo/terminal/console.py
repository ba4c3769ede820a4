"""Terminal output: lines, progress with rate and remaining time, tables. All other output goes to a file."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeGuard

from raydpo.errors import bounded
from raydpo.terminal.phases import Phases

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.progress import Progress

__all__ = ["Console", "ProgressLine", "never_fail_to_print", "plain_text"]

FILE_WIDTH = 200
"""Columns of a table when the output is not a terminal. rich would assume 80."""
LINE_INTERVAL = 10.0
"""Seconds between progress lines when the output is not a terminal."""


class Console:
    """Prints to standard output, or to the given stream.

    Attributes:
        phases: of the start-up of the command. In a program of the user's own it begins with the console.
        verbose: whether each phase is printed when it begins.
    """

    def __init__(self, stream: TextIO | None = None, *, phases: Phases | None = None) -> None:
        self.stream = stream or sys.stdout
        self.phases = phases or Phases()
        self.verbose = False

    @cached_property
    def rich(self) -> RichConsole:
        """The rich console on the present stream. Made at first use: importing rich takes a tenth of a second."""
        from rich.console import Console as RichConsole

        return RichConsole(
            file=self.stream,
            highlight=False,
            emoji=False,  # texts and ids such as r001:b:8 are printed as they are
            soft_wrap=True,
            width=None if self.stream.isatty() else FILE_WIDTH,
        )

    def _use(self, stream: TextIO) -> None:
        self.stream = stream
        self.__dict__.pop("rich", None)

    def begin(self, phase: str) -> None:
        """Begin a phase of the start-up, and print its name if ``verbose``."""
        if self.verbose and self.phases.running:
            self.say(f"  {self.phases.elapsed:5.1f} s  {phase}")
        self.phases.begin(phase)

    def say(self, line: str) -> None:
        """Print a line: as a warning, shortened if it is very long, if it begins with ``warning: ``."""
        if line.startswith("warning: "):
            self.warn(line.removeprefix("warning: "))
        else:
            self.rich.print(line, markup=False)

    def warn(self, line: str) -> None:
        """Print a line as a warning, shortened if it is very long."""
        self.rich.print(f"warning: {bounded(line)}", markup=False, style="yellow")

    def print(self, renderable: object) -> None:
        """Print a rich renderable."""
        self.rich.print(renderable)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table: the first column left-aligned; the others right-aligned if it has more than two."""
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index and len(columns) > 2 else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self.rich.print(table)

    @contextlib.contextmanager
    def progress(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[ProgressLine]:
        """Show progress: a bar on a terminal, else a line every ``LINE_INTERVAL``. Yields the object to ``update``."""
        if self.rich.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            label_text, rate, extra = map(TextColumn, ("{task.description}", "{task.fields[rate]}", "{task.fields[extra]}"))
            columns = (label_text, BarColumn(), MofNCompleteColumn(), TextColumn(unit), rate, TimeRemainingColumn(), extra)
            with Progress(*columns, console=self.rich) as bar:
                yield ProgressLine(self, label, total, unit, done, bar)
        else:
            line = ProgressLine(self, label, total, unit, done, None)
            yield line
            line.finish()

    @contextlib.contextmanager
    def part(self, label: str, unit: str = "rows") -> Iterator[Callable[[int, int], None]]:
        """Show progress of work whose results may be stored already. Yields a function to call with (done, total); if it is
        never called, a line says that all was found."""
        line = None
        with contextlib.ExitStack() as stack:

            def update(done: int, total: int) -> None:
                nonlocal line
                if line is None:
                    line = stack.enter_context(self.progress(label, total, unit))
                line.update(done)

            yield update
        if line is None:
            self.say(f"  {label}: all found in the cache")

    def counter(self, label: str, unit: str) -> Callable[[int], None]:
        """Show progress without a known total. Call the returned function with the number done so far."""
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
        """Within the block, send everything except this console's own output from standard output and error to ``log``.

        File descriptors are redirected, which includes Ray's C++ threads and child processes. The log is UTF-8, whatever
        the encoding of the terminal is.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        saved = [os.dup(1), os.dup(2)]
        encodings = [
            (stream, stream.encoding, stream.errors) for stream in (sys.stdout, sys.stderr) if _is_text_file(stream)
        ]
        before = ours = self.stream
        if before is sys.stdout:  # a console on another stream keeps it
            ours = os.fdopen(os.dup(1), "w", buffering=1, encoding=before.encoding, errors="backslashreplace")
            self._use(ours)
        with open(log, "ab") as sink:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
        for stream, *_ in encodings:
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in zip((1, 2), saved, strict=True):
                os.dup2(original, descriptor)
                os.close(original)
            for stream, encoding, errors in encodings:
                stream.reconfigure(encoding=encoding, errors=errors)
            ours.flush()
            if ours is not before:
                self._use(before)
                ours.close()

    def quiet(self) -> contextlib.AbstractContextManager[None]:
        """Within the block, drop all output but this console's own, such as what libraries print while a model loads."""
        return self.noise_to(Path(os.devnull))


class ProgressLine:
    """Progress of one long part. Rates do not count what was done before it began."""

    def __init__(self, console: Console, label: str, total: int, unit: str, done: int, bar: Progress | None) -> None:
        self.console, self.label, self.total, self.unit = console, label, total, unit
        self.first = self.done = done
        self.start = self.printed = time.monotonic()
        self.extra = ""
        self._bar = bar
        self._task = bar.add_task(label, total=total, completed=done, rate="", extra="") if bar else None

    def update(self, done: int, extra: str = "") -> None:
        """Show that ``done`` of ``total`` are finished, with ``extra`` behind the rate. ``total`` may be set before."""
        self.done, self.extra = done, extra
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=self.total, completed=done, rate=self._rate(), extra=extra)
        elif time.monotonic() - self.printed >= LINE_INTERVAL and done < self.total:
            self._print_line()

    def finish(self) -> None:
        """Print a last line with the time taken, if anything was done."""
        if self.done > self.first:
            self._print_line()

    def _rate(self) -> str:
        seconds = time.monotonic() - self.start
        made = self.done - self.first
        return f"{made / seconds:.3g} {self.unit}/s" if made and seconds else ""

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


def _is_text_file(stream: TextIO | None) -> TypeGuard[io.TextIOWrapper]:
    return isinstance(stream, io.TextIOWrapper)


def never_fail_to_print() -> None:
    """Let standard output and error escape what their encoding cannot express, such as an accent on an ASCII terminal."""
    for stream in (sys.stdout, sys.stderr):
        if _is_text_file(stream):
            stream.reconfigure(errors="backslashreplace")


def plain_text(text: str) -> str:
    """``text`` without terminal control characters, which data and answers may contain."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)
