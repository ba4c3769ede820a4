"""The exceptions that raydpo raises on purpose. All derive from ``RaydpoError``, and each also from a standard type.

The message is one complete sentence for the user: what was found, what was expected, how to fix it. Ray workers raise these
exceptions and the driver prints them, so they must survive pickling: each class takes one positional argument, the message.
"""

__all__ = [
    "CacheError",
    "CacheMissError",
    "ConfigError",
    "DataError",
    "DeviceMemoryError",
    "FilesError",
    "GateError",
    "ModelError",
    "RaydpoError",
    "TrainError",
    "exit_status",
    "one_line",
]


class RaydpoError(Exception):
    """Base class of all errors that raydpo explains to its user."""

    def __init__(self, message: str) -> None:
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


def one_line(error: object, most: int | None = None) -> str:
    """The text of ``error`` on one line, at most ``most`` characters of it."""
    return " ".join(str(error).split())[:most]
