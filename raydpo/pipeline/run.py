"""``raydpo run``: score, then train."""

from __future__ import annotations

from typing import Any

from raydpo.cluster.preflight import check_cluster
from raydpo.cluster.session import session
from raydpo.cluster.waiting import request_nodes
from raydpo.config import Config
from raydpo.pipeline.checks import check_labels
from raydpo.pipeline.prepare import Prepared, checked
from raydpo.pipeline.score import score_prepared, score_streamed
from raydpo.pipeline.stream import streams
from raydpo.pipeline.train import train_prepared
from raydpo.rundir.directory import RUN, SUMMARY
from raydpo.rundir.earlier import begin_again, finished_summary
from raydpo.storage.files import Storage
from raydpo.terminal.console import Console

__all__ = ["run"]


def run(config: Config, console: Console | None = None, *, fresh: bool = False) -> dict[str, Any]:
    """Call ``score``, then ``train``, in one Ray session. Arguments and result are those of ``train``."""
    console = console or Console()
    tokenised = checked(config, "run", console)
    with session(config):
        check_cluster(config, ["score", "train"], console)
        with request_nodes(config, wanted=fresh or not Storage(config.run_dir).exists(SUMMARY)):
            storage, streamed = Storage(config.run_dir), None
            if tokenised is None and not storage.exists(RUN) and streams(config):
                streamed, tokenised = score_streamed(config, console)
            prepared = Prepared.of(config, console, tokenised)
            check_labels(config, prepared.tables)
            # An earlier run must be handled before scoring, since scoring writes the audit into the run directory.
            if fresh:
                begin_again(storage, console)
            if finished_summary(storage, prepared.fingerprint(), prepared.sets.train) is not None:
                return train_prepared(prepared, console)
            built = score_prepared(prepared, console, report=streamed)
            return train_prepared(prepared, console, built.hit_rate if built.wanted else None)
