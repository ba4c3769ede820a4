"""Helpers of the verbs that read a configuration."""

from __future__ import annotations

import contextlib
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
    """The pairs of a configuration as score and train use them, without Ray: from their tokenised sets, or read and tokenised
    now, where of large sources the first ``most_records`` records are.

    Raises:
        DataError: see ``data.first.first_pairs``.
    """
    from raydpo.data.filter import filtered_by_tokens
    from raydpo.data.first import FirstPairs, first_pairs
    from raydpo.errors import CacheError
    from raydpo.pipeline.tokenised import find_sets, open_tokeniser
    from raydpo.storage.files import Storage
    from raydpo.tokens.build import worth_ray
    from raydpo.tokens.store import TokenSet

    tokeniser = open_tokeniser(config)
    # Without any set in the cache, no source needs to be identified, which reads its files to their ends.
    if TokenSet.digests(Storage(config.cache_uri)):
        found = find_sets(config, tokeniser)
        if next(found.missing(), None) is None:
            with contextlib.suppress(CacheError):  # a damaged file, which a command that makes sets mends
                sets = filtered_by_tokens(found.select(tokeniser), config.data)[0]
                return FirstPairs(sets, {}), tokeniser
    return first_pairs(config.data, tokeniser, most_records, worth_ray), tokeniser
