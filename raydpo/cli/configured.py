"""Helpers of the verbs that read a configuration."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from raydpo.errors import CacheError, ConfigError, DataError, RaydpoError
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


def load_first_pairs(config: Config, most_records: int, console: Console) -> tuple[FirstPairs, Tokeniser]:
    """The pairs of a configuration as score and train use them, without Ray.

    They come from their tokenised sets. Without these, sources are read and tokenised now, large ones up to record
    ``most_records``. Then ``data.filter`` counts copies and shared prompts among what was read.

    Args:
        console: for a warning of a damaged set.

    Raises:
        DataError: see ``data.first.first_pairs``.
    """
    from raydpo.data.filter import filtered_by_tokens
    from raydpo.data.first import first_pairs
    from raydpo.pipeline.tokenised import open_tokeniser
    from raydpo.tokens.build import worth_ray

    tokeniser = open_tokeniser(config)
    found = _stored(config, tokeniser, console) or first_pairs(config.data, tokeniser, most_records, worth_ray)
    try:
        sets = filtered_by_tokens(found.sets, config.data)[0]
    except DataError:  # none of these pairs meets the condition
        if found.whole:
            raise
        return load_first_pairs(config, 10 * most_records, console)
    return dataclasses.replace(found, sets=sets), tokeniser


def _stored(config: Config, tokeniser: Tokeniser, console: Console) -> FirstPairs | None:
    """All pairs, if the set of each source is stored."""
    from raydpo.data.first import FirstPairs
    from raydpo.pipeline.tokenised import find_sets
    from raydpo.storage.files import Storage
    from raydpo.tokens.store import TokenSet

    # Without any set in the cache, no source needs to be identified, which reads its files to their ends.
    if not TokenSet.digests(Storage(config.cache_uri)):
        return None
    found = find_sets(config, lambda: tokeniser)
    if (missing := next(found.missing(), None)) is not None:
        for problem in missing.stored.problems:
            console.warn(f"{problem}; 'raydpo score' makes it")
        return None
    try:
        return FirstPairs(found.select(), {})
    except CacheError as error:  # a damaged file, which the commands that make sets mend
        console.warn(str(error))
        return None
