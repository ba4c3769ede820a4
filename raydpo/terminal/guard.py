"""Run a command and turn its errors into messages and exit statuses."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable

from raydpo.errors import RaydpoError, bounded, exit_status, one_line
from raydpo.terminal.console import Console, never_fail_to_print
from raydpo.terminal.interrupt import sigterm_as_interrupt
from raydpo.terminal.phases import Phases

__all__ = ["guarded"]


def guarded(act: Callable[[Console], int | None]) -> int:
    """Run ``act`` and return the exit status: its own if it returns one, else 0.

    An error that raydpo explains is printed as one message; for any other the traceback is written to a file. Each message
    is shorter than 2 kB, and printed on any terminal.
    """
    from raydpo.storage.uri import hidden

    never_fail_to_print()
    console = Console(phases=Phases(whole_process=True))
    try:
        with sigterm_as_interrupt():
            return act(console) or 0
    except RaydpoError as error:
        print(f"error: {bounded(hidden(str(error)))}", file=sys.stderr)
        return exit_status(error)
    except ModuleNotFoundError as error:
        print(f"error: this needs the package {error.name!r}; run: pip install 'raydpo[run]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was committed is kept. Run the same command again to continue", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        return 1
    except Exception as error:
        if isinstance(error, UnicodeError) and (encoding := sys.getfilesystemencoding()) != "utf-8":
            print(
                f"error: this locale ({encoding}) cannot express a name or text: {one_line(error, 200)}; set PYTHONUTF8=1, "
                "or a locale of UTF-8 such as LC_ALL=C.UTF-8",
                file=sys.stderr,
            )
            return 2
        with tempfile.NamedTemporaryFile(
            "w", prefix="raydpo-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as log:
            import traceback

            log.write(hidden(traceback.format_exc()))
        print(
            f"error: unexpected {type(error).__name__}: {one_line(hidden(str(error)), 300)} (traceback in {log.name})",
            file=sys.stderr,
        )
        return 1
