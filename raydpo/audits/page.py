"""Renders an audit as one self-contained HTML page."""

from __future__ import annotations

from typing import Any

import polars as pl

from raydpo.audits.audit import Audit
from raydpo.audits.plots import plots
from raydpo.pages.page import render

__all__ = ["render_page"]

MOST_SOURCES = 6
"""Number of sources, at most, that have their own pictures; the table has all of them."""


def render_page(audit: Audit) -> str:
    """Render the page. Text from the data is escaped; the page has no scripts, and its security policy blocks any."""
    pictures = [("All pairs", plots(audit.frame, audit.total))]
    if len(audit.sources) > 1:
        pictures += [
            (name, plots(audit.frame.filter(pl.col("source") == name), figures))
            for name, figures in list(audit.sources.items())[:MOST_SOURCES]
        ]
    columns = list(audit.sources.items())
    identical = [audit.identical.get(name, 0) for name, _ in columns]
    if len(columns) > 1:
        columns, identical = [("all", audit.total), *columns], [sum(audit.identical.values()), *identical]
    rows = [
        {
            "title": title,
            "about": about,
            "values": [read(figures, same) for (_, figures), same in zip(columns, identical, strict=True)],
        }
        for title, about, read in ROWS
    ]
    return render("audits/page.html", audit=audit, plots=pictures, rows=rows, names=[name for name, _ in columns])


def _share(value: dict[str, Any]) -> str:
    return "-" if value["share"] is None else f"{value['share']:.1%} ± {(value['high'] - value['low']) / 2:.1%}"


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _median(value: dict[str, float] | None, form: str) -> str:
    return "-" if value is None else format(value["median"], form)


ROWS = (
    ("pairs", "usable pairs of this source", lambda f, _: f"{f['pairs']:,}"),
    (
        "reference right, sum",
        "pairs whose chosen answer has the higher log-prob under the reference",
        lambda f, _: _share(f["reference"]["right_by_sum"]),
    ),
    (
        "reference right, per token",
        "the same by the mean log-prob per token, which does not favour short answers",
        lambda f, _: _share(f["reference"]["right_per_token"]),
    ),
    ("chosen longer", "pairs whose chosen answer has more tokens", lambda f, _: _share(f["length"]["chosen_longer"])),
    (
        "length rule",
        "accuracy of always preferring the longer (or always the shorter) answer; a tie counts one half",
        lambda f, _: f"{f['length']['rule']}: {_share(f['length']['rule_accuracy'])}",
    ),
    (
        "length difference",
        "median of chosen minus rejected, tokens",
        lambda f, _: _median(f["length"]["difference"], "+.0f"),
    ),
    (
        "margin by length",
        "correlation of the reference's margin with the length difference",
        lambda f, _: _number(f["length_and_reference"]["pearson"]),
    ),
    (
        "surprise chosen",
        "median surprise of the chosen answers, nats a token",
        lambda f, _: _median(f["surprise"]["chosen"], ".2f"),
    ),
    (
        "surprise rejected",
        "median surprise of the rejected answers, nats a token",
        lambda f, _: _median(f["surprise"]["rejected"], ".2f"),
    ),
    (
        "rejected surprises more",
        "probability that a random rejected answer surprises the reference more, per token, than a "
        "random chosen one: 50 % if the reference cannot tell them apart",
        lambda f, _: _share(f["surprise"]["separation"]),
    ),
    (
        "copies",
        "pairs that equal an earlier pair token by token and that no pair contradicts",
        lambda f, _: f"{f['duplicates']:,}",
    ),
    (
        "shared prompts",
        "pairs whose prompt another pair has too, copies not counted",
        lambda f, _: f"{f['shared_prompt']:,}",
    ),
    (
        "shared answers",
        "pairs with an answer that occurs in another pair, under any prompt, copies not counted",
        lambda f, _: f"{f['shared_answer']:,}",
    ),
    (
        "contradictory",
        "pairs that also occur with chosen and rejected swapped; those where both orders are equally frequent",
        lambda f, _: f"{f['contradictory']:,}, {f['contradictory_evenly']:,}",
    ),
    ("identical", "pairs left out because chosen and rejected are the same", lambda f, identical: f"{identical:,}"),
    (
        "empty",
        "chosen and rejected answers that consist of an end token alone",
        lambda f, _: f"{sum(f['empty'].values()):,}",
    ),
    (
        "cut",
        "chosen and rejected answers that were cut to data.max_length",
        lambda f, _: f"{sum(f['truncated'].values()):,}",
    ),
)
