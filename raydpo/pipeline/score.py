"""``raydpo score``: fill the reference cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyarrow as pa

from raydpo.cluster.preflight import check_cluster
from raydpo.cluster.session import session
from raydpo.config import Config
from raydpo.data.rows import TokenSource
from raydpo.model.layout import PromptGroup
from raydpo.pipeline.audit import audit_prepared
from raydpo.pipeline.partition import place_reference
from raydpo.pipeline.prepare import (
    Prepared,
    checked,
    open_reference,
    reference_line,
    wait_for_workers,
)
from raydpo.pipeline.stream import Stream, streams
from raydpo.pipeline.tokenised import Tokenised
from raydpo.reference.build import BuildReport, build
from raydpo.reference.score import ReferenceSpec
from raydpo.reference.store import ReferenceCache
from raydpo.rundir.trackers import export_pass
from raydpo.terminal.console import Console, ProgressLine

__all__ = ["fill_cache", "score", "score_prepared", "score_streamed"]


def score(config: Config, console: Console | None = None) -> BuildReport:
    """Score the pairs of a configuration that the reference cache lacks, and store their log-probs.

    Raises:
        RaydpoError: if it fails. Committed log-probs stay in the cache.
    """
    console = console or Console()
    tokenised = checked(config, "score", console)
    with session(config):
        check_cluster(config, ["score"], console)
        report = None
        if tokenised is None and streams(config):
            report, tokenised = score_streamed(config, console)
        return score_prepared(Prepared.of(config, console, tokenised), console, report=report)


def score_streamed(config: Config, console: Console) -> tuple[BuildReport, Tokenised]:
    """Score the pairs of a configuration while they are tokenised, within a Ray session.

    Raises:
        RaydpoError: if it fails. Committed log-probs and tokenised blocks stay in the cache.
    """
    spec, cache = open_reference(config)
    console.say(reference_line(config, spec))
    console.begin("tokenising the first pairs")
    with Stream(config, console) as stream:
        stored: dict[str, Any] = {"tokens": stream.sets.tokens, "light": stream.light}
        report = fill_cache(stream.windows(), spec, cache, config, console, beside=stream.progress, **stored)
    return report, Tokenised.of(config, console, streamed=True)


def score_prepared(
    prepared: Prepared,
    console: Console,
    tables: list[pa.Table] | None = None,
    *,
    report: BuildReport | None = None,
    again: Sequence[PromptGroup] = (),
) -> BuildReport:
    """Score what the cache lacks, then write the audit.

    Args:
        tables: pairs to score; None = those of ``prepared``.
        report: of a build that has just scored them, without mismatched completions.
        again: as that of ``reference.build.build``.
    """
    config, cache, sets = prepared.config, prepared.cache, prepared.sets
    if config.needs_reference:
        if report is None or sets is not prepared.own:
            stored = {"tokens": sets.tokens, "light": [source.light for source in sets.sources]} if tables is None else {}
            wanted = tables or prepared.tables
            more = fill_cache(wanted, prepared.reference, cache, config, console, again=again, **stored)
            report = more if report is None else report.followed_by(more)
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
    tables: Iterable[pa.Table],
    spec: ReferenceSpec,
    cache: ReferenceCache,
    config: Config,
    console: Console,
    *,
    tokens: TokenSource | None = None,
    light: Sequence[pa.Table] | None = None,
    beside: Callable[[], str] = str,
    again: Sequence[PromptGroup] = (),
) -> BuildReport:
    """Score the completions of tokenised pairs that ``cache`` lacks, with the workers of section ``score``.

    Args:
        tables, tokens, light, again: as the pairs, tokens, light rows and groups ``again`` of ``reference.build.build``.
        beside: says what goes on beside it, for the progress line.
    """
    placed = place_reference(config, spec)
    resources = placed.resources
    line: ProgressLine | None = None
    with contextlib.ExitStack() as stack:  # the progress line begins once build knows what is missing

        def progress(done: int, to_do: int) -> None:
            nonlocal line
            if done:
                console.begin("scoring")
            if line is None:
                placed.tell(console)
                console.begin("scoring: workers")
                first = "the first " if beside() else ""
                teams = f", {resources.partition} in a team" if resources.partition > 1 else ""
                console.say(
                    f"scoring {first}{to_do:,} completions on {resources.workers} {resources.device} worker(s){teams}"
                )
                wait_for_workers("score", config, resources, console)
                line = stack.enter_context(console.progress("scoring", to_do, "completions"))
            line.total = to_do
            line.update(done, beside())

        report = build(
            tables,
            spec,
            cache,
            resources,
            progress=progress,
            note=console.say,
            tokens_per_batch=config.score.tokens_per_batch,
            tokens_per_part=config.score.tokens_per_part,
            tokens=tokens,
            light=light,
            again=again,
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
