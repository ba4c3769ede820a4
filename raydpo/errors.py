"""The exceptions that raydpo raises on purpose. All derive from ``RaydpoError``, and each also from a standard type.

The message is one complete sentence for the user: what was found, what was expected, how to fix it. Ray workers raise these
exceptions and the driver prints them, so they must survive pickling: each class takes one positional argument, the message.

A message never exceeds ``MOST_BYTES``: the base class shortens a longer one with ``bounded``.
"""

import re
from collections.abc import Sequence

__all__ = [
    "CacheError",
    "CacheMissError",
    "ConfigError",
    "DataError",
    "DeviceMemoryError",
    "FilesError",
    "GateError",
    "ModelError",
    "ProcessLostError",
    "RaydpoError",
    "TrainError",
    "bounded",
    "exit_status",
    "one_line",
    "reason",
    "some_of",
]

MOST_BYTES = 1900
"""Largest size of a message. With what the terminal puts before and after it, it stays below 2 kB."""
MOST_LINES = 10
"""Number of lines of a message that are kept of its beginning. Its last line is kept, too."""
_END_BYTES = 600
"""Bytes that are kept of the end of a message that is too long: there is the fix."""


class RaydpoError(Exception):
    """Base class of all errors that raydpo explains to its user."""

    def __init__(self, message: str) -> None:
        message = bounded(message)
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:  # LookupError's own __str__ would quote the message
        return self.message


class ConfigError(RaydpoError, ValueError):
    """A setting is unknown, of the wrong type, out of range, contradictory, or names a missing file."""


class DataError(RaydpoError, ValueError):
    """Preference records cannot be read, or too many of them are malformed or dropped."""


class ModelError(RaydpoError, ValueError):
    """A model, adapter or tokenizer cannot be loaded, or raydpo cannot score it exactly."""


class FilesError(ModelError, ConfigError):
    """The files of a directory are not those of one complete model, adapter or tokenizer. This is bad input."""


class CacheError(RaydpoError, RuntimeError):
    """A reference cache is unreadable, damaged, or of another identity than the run needs."""


class CacheMissError(CacheError, LookupError):
    """The cache lacks reference log-probs that a run needs."""


class GateError(CacheError):
    """The step-0 gate found that the cached reference log-probs differ from those of the initial policy."""


class ProcessLostError(RaydpoError, RuntimeError):
    """A process of a team ended without a reason that a setting could mend. The same work may succeed if it is repeated."""


class TrainError(RaydpoError, RuntimeError):
    """A training run cannot start, continue or finish."""


class DeviceMemoryError(TrainError, MemoryError):
    """A micro-batch does not fit in the device's memory. The message begins with its number of token positions."""

    @property
    def tokens(self) -> int:
        """Number of token positions of the micro-batch."""
        return int(self.message.split()[0])


def exit_status(error: BaseException) -> int:
    """Exit status of a command that ended with ``error``: 2 for bad input, 1 for any other error."""
    return 2 if isinstance(error, (ConfigError, DataError)) else 1


def bounded(text: str, most: int = MOST_BYTES) -> str:
    """``text`` in at most ``most`` bytes of UTF-8: its first ``MOST_LINES`` lines, a line that counts what is left out, and
    its last line.

    Beginning and end are kept, since a message begins with what was found and ends with the fix.
    """
    lines = text.rstrip().splitlines()
    if len(lines) > MOST_LINES + 2:
        text = "\n".join([*lines[:MOST_LINES], f"... and {len(lines) - MOST_LINES - 1:,} more", lines[-1]])
    if len(text) * 4 <= most or len(data := text.encode("utf-8", "backslashreplace")) <= most:
        return text
    end = min(_END_BYTES, most // 3)
    first, last = (
        part.decode("utf-8", "ignore") for part in (data[: most - end - len(" ... (1,000,000 bytes) ... ")], data[-end:])
    )
    # Cut between words, so that no half of a URI is left with a secret that is not recognised.
    first = first[: max(first.rfind(" "), len(first) - end)].rstrip()
    last = last[min(last.find(" ") % len(last), end // 2) :].lstrip()
    return f"{first} ... ({len(data) - len(first.encode()) - len(last.encode()):,} bytes) ... {last}"


def one_line(error: object, most: int | None = None) -> str:
    """The text of ``error`` on one line, at most ``most`` characters of it."""
    return " ".join(str(error).split())[:most]


def some_of(names: Sequence[str], most: int = 3) -> str:
    """The first ``most`` of ``names``, and the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


_ALWAYS_LONG = re.compile(r"(Model type should be one of|, or one of the following `model_type` keys in its) .*")
"""Sentences of transformers that list all its classes."""
_NO_HELP = re.compile(r" ?For details look at the (above report!|`CONVERSION` entries of .*)")
"""A sentence of transformers about lines that only a worker's log has."""


def reason(error: BaseException, most: int = 300) -> str:
    """What an exception of a library says, on one line of at most ``most`` characters, and its type in parentheses.

    Sentences that list the classes of a library, or point to output elsewhere, are left out.
    """
    text = _NO_HELP.sub("", _ALWAYS_LONG.sub("", one_line(error))).strip()
    text = text if len(text) <= most else f"{text[: most - 4].rsplit(' ', 1)[0]} ..."
    return f"{text or 'no details'} ({type(error).__name__})"
