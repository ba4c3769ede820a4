"""Run a command and turn its errors into messages and exit statuses."""

from __future__ import annotations

import codecs
import contextlib
import os
import select
import sys
import tempfile
from collections.abc import Callable
from typing import TextIO

from raydpo.errors import RaydpoError, bounded, exit_status, one_line
from raydpo.terminal.console import Console, never_fail_to_print
from raydpo.terminal.interrupt import sigterm_as_interrupt
from raydpo.terminal.phases import Phases

__all__ = ["guarded"]


def guarded(act: Callable[[Console], int | None], interrupted: str = "the same command starts again") -> int:
    """Run ``act`` and return the exit status: its own if it returns one, else 0.

    An error that raydpo explains is printed as one message; for any other the traceback is written to a file. Each message
    is shorter than 2 kB, and printed on any terminal.

    Args:
        interrupted: what the user is told after an interrupt: what is kept, and how to continue.
    """
    from raydpo.storage.uri import hidden

    never_fail_to_print()
    console = Console(phases=Phases(whole_process=True))
    try:
        with sigterm_as_interrupt():
            return act(console) or 0
    except RaydpoError as error:
        _tell(f"error: {bounded(hidden(str(error)))}")
        return exit_status(error)
    except ModuleNotFoundError as error:
        _tell(f"error: this needs the package {error.name!r}; run: pip install 'raydpo[run]'")
        return 1
    except KeyboardInterrupt:
        _tell(f"interrupted; {hidden(interrupted)}")
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and (
            ended := [one for one in (sys.stdout, sys.stderr) if _has_no_reader(one)]
        ):
            for stream in ended:  # the reader of a pipe, such as head, has ended: what is still buffered goes nowhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            return 1
        log = _traceback_file(hidden)
        if _comes_from_the_locale(error):
            _tell(
                f"error: this locale ({sys.getfilesystemencoding()}) cannot express a name or text: {one_line(error, 200)}; "
                f"set PYTHONUTF8=1, or a locale of UTF-8 such as LC_ALL=C.UTF-8 (traceback in {log})"
            )
            return 2
        _tell(f"error: unexpected {type(error).__name__}: {one_line(hidden(str(error)), 300)} (traceback in {log})")
        return 1


def _tell(line: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # the exit status still tells
        print(line, file=sys.stderr, flush=True)


def _traceback_file(hidden: Callable[[str], str]) -> str:
    """Name of a new file with the traceback of the error that is being handled, without secrets of URIs."""
    import traceback

    with tempfile.NamedTemporaryFile(
        "w", prefix="raydpo-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
    ) as log:
        log.write(hidden(traceback.format_exc()))
    return log.name


def _has_no_reader(stream: TextIO) -> bool:
    """Whether ``stream`` is a pipe or socket whose reader has ended."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no file behind it, or closed
        return False


def _comes_from_the_locale(error: Exception) -> bool:
    """Whether the codec of a locale other than UTF-8 failed, or could not read a name of a file or an argument before."""
    locale = codecs.lookup(sys.getfilesystemencoding()).name
    if locale == "utf-8" or not isinstance(error, UnicodeEncodeError | UnicodeDecodeError):
        return False
    if isinstance(error, UnicodeEncodeError) and all(
        "\udc80" <= c <= "\udcff" for c in error.object[error.start : error.end]
    ):
        return True  # bytes of a name that the locale's codec does not know, as Python keeps them
    names = {locale}
    try:
        "\U0010ffff".encode(locale)
    except UnicodeEncodeError as own:  # codecs of one byte a character all call themselves charmap in errors
        names.add(own.encoding)
    try:
        return error.encoding in names or codecs.lookup(error.encoding).name in names
    except LookupError:
        return False
