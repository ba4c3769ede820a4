"""``raydpo score``: fill the reference cache."""

from __future__ import annotations

import contextlib

import pyarrow as pa

from raydpo.cluster.preflight import check_cluster
from raydpo.cluster.resources import resources_for
from raydpo.cluster.session import session
from raydpo.config import Config
from raydpo.data.select import PairSets
from raydpo.pipeline.audit import audit_prepared
from raydpo.pipeline.prepare import Prepared, checked, wait_for_workers
from raydpo.reference.build import BuildReport, build
from raydpo.reference.score import ReferenceSpec
from raydpo.reference.store import ReferenceCache
from raydpo.rundir.trackers import export_pass
from raydpo.terminal.console import Console, ProgressLine

__all__ = ["fill_cache", "score", "score_prepared"]


def score(config: Config, console: Console | None = None) -> BuildReport:
    """Score the pairs of a configuration that the reference cache lacks, and store their log-probs.

    Raises:
        RaydpoError: if it fails. Committed log-probs stay in the cache.
    """
    console = console or Console()
    tokenised = checked(config, "score", console)
    with session(config):
        check_cluster(config, ["score"], console)
        return score_prepared(Prepared.of(config, console, tokenised), console)


def score_prepared(prepared: Prepared, console: Console, tables: list[pa.Table] | None = None) -> BuildReport:
    """Score what the cache lacks, then write the audit.

    Args:
        tables: pairs to score; None = those of ``prepared``.
    """
    config, cache = prepared.config, prepared.cache
    if config.needs_reference:
        sets = prepared.sets if tables is None else None
        report = fill_cache(tables or prepared.tables, prepared.reference, cache, config, console, sets)
    else:
        console.say(f"reference: none; loss {config.train.loss_text} needs none, so nothing is scored")
        nothing = dict.fromkeys(("wanted", "hits", "scored", "by_others", "twice", "tokens", "parts"), 0)
        report = BuildReport(cache.identity.digest, **nothing, seconds=0.0, problems=())
    console.begin("audit")
    try:
        audit_prepared(prepared, console)
    except Exception as error:  # the log-probs are stored, so scoring has succeeded
        console.warn(f"the audit failed ({type(error).__name__}: {error}); 'raydpo audit' tries again")
    return report


def fill_cache(
    tables: list[pa.Table],
    spec: ReferenceSpec,
    cache: ReferenceCache,
    config: Config,
    console: Console,
    sets: PairSets | None = None,
) -> BuildReport:
    """Score the completions of tokenised pairs that ``cache`` lacks, with the workers of section ``score``.

    Args:
        sets: the sets that the tables are of, in which workers read tokens; None = they travel in the tables.
    """
    resources = resources_for("score", config)
    line: ProgressLine | None = None
    with contextlib.ExitStack() as stack:  # the progress line begins once build knows what is missing

        def progress(done: int, to_do: int) -> None:
            nonlocal line
            if done:
                console.begin("scoring")
            if line is None:
                console.begin("scoring: workers")
                console.say(f"scoring {to_do:,} completions on {resources.workers} {resources.device} worker(s)")
                wait_for_workers("score", config, resources, console)
                line = stack.enter_context(console.progress("scoring", to_do, "completions"))
            line.update(done)

        report = build(
            tables,
            spec,
            cache,
            resources,
            progress=progress,
            note=console.say,
            tokens_per_batch=config.score.tokens_per_batch,
            tokens_per_part=config.score.tokens_per_part,
            tokens=sets and sets.tokens,
            light=sets and [source.light for source in sets.sources],
        )
    for problem in report.problems:
        console.warn(problem)
    rate = report.tokens / report.seconds if report.scored else 0.0
    told = f", {rate:,.0f} tokens/s with start-up" if report.scored else ""
    console.say(
        f"cache: {report.hits:,} of {report.wanted:,} completions were there ({report.hit_rate:.0%} hits), "
        f"{report.scored:,} scored in {report.parts} part(s){told}; {cache.storage}"
    )
    export_pass(config.track, config.run_name, report.hit_rate, rate, console.warn)
    if report.by_others or report.twice:
        console.say(
            f"another build filled the same cache: it scored {report.by_others:,} completions, "
            f"{report.twice:,} were scored twice"
        )
    return report
