"""The exceptions raydpo raises on purpose: one root, each also a standard type, all safe to pickle.

Each is raised with one complete sentence for a person: what was found, what was expected, how to mend it.
They cross process borders (Ray workers raise them, the driver prints them), so a class here takes exactly
one positional argument, the message.
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
]


class RaydpoError(Exception):
    """Root of all errors that raydpo explains to its user."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:  # LookupError's own __str__ would quote the message
        return self.message


class ConfigError(RaydpoError, ValueError):
    """A setting that is unknown, of the wrong type, out of range, contradictory, or names a missing file."""


class DataError(RaydpoError, ValueError):
    """Preference records that cannot be read, or too many that are malformed or dropped."""


class ModelError(RaydpoError, ValueError):
    """A model, adapter or tokenizer that cannot be loaded or that raydpo cannot score exactly."""


class FilesError(ModelError, ConfigError):
    """A directory whose files are not those of one whole model or adapter: bad input, wherever it is found."""


class CacheError(RaydpoError, RuntimeError):
    """A reference cache that is unreadable, damaged, or of another identity than the run needs."""


class CacheMissError(CacheError, LookupError):
    """Reference log-probs that a run needs and the cache does not hold."""


class GateError(CacheError):
    """The step-0 gate found that cached reference log-probs are not those of the policy as initialised."""


class TrainError(RaydpoError, RuntimeError):
    """A training run that cannot start, continue or finish."""


class DeviceMemoryError(TrainError, MemoryError):
    """A micro-batch that does not fit in the device's memory. The message begins with its token positions."""

    @property
    def tokens(self) -> int:
        """Token positions of the micro-batch."""
        return int(self.message.split()[0])


def exit_status(error: BaseException) -> int:
    """The process exit status for ``error``: 2 for bad input, 1 for everything else that went wrong."""
    return 2 if isinstance(error, (ConfigError, DataError)) else 1
