"""Helpers of the verbs that read a configuration."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from raydpo.errors import ConfigError, RaydpoError
from raydpo.rundir.directory import DRIVER_LOG
from raydpo.terminal.console import Console

if TYPE_CHECKING:
    from raydpo.config import Config
    from raydpo.data.first import FirstPairs
    from raydpo.data.tokenise import Tokeniser

__all__ = ["load_first_pairs", "quietly"]


def quietly(config: Config, console: Console, act: Callable[[], object]) -> None:
    """Run ``act`` with all output but the console's in the run's logs, or in a temporary file if the run is at a URI.

    Raises:
        ConfigError: if the directory of the run cannot be made.
        RaydpoError: if the log cannot be written later.
    """
    from raydpo.storage.files import Storage

    storage = Storage(config.run_dir)
    log = Path(storage.path(DRIVER_LOG) if storage.is_local else tempfile.mkdtemp(prefix="raydpo-logs-") + "/driver.log")
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"'output' does not work: cannot write to {log.parent}: {reason}; set output to another place"
        ) from None
    try:
        with console.noise_to(log):
            act()
    except OSError as error:
        if error.filename and str(log.parent) in str(error.filename):
            raise RaydpoError(f"cannot write to {log.parent}: {error}") from None
        raise


def load_first_pairs(config: Config, most_records: int) -> tuple[FirstPairs, Tokeniser]:
    """Tokenise the pairs of a configuration as score and train do, without Ray; of large sources the first records.

    Raises:
        DataError: see ``data.first.first_pairs``.
    """
    from raydpo.data.first import first_pairs
    from raydpo.pipeline.prepare import open_tokeniser

    tokeniser = open_tokeniser(config)
    return first_pairs(config.data, tokeniser, most_records), tokeniser
