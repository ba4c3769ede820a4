"""Renders an audit as one self-contained HTML page."""

from __future__ import annotations

from typing import Any

import polars as pl

from raydpo.audits import labels
from raydpo.audits.audit import Audit, counted_line
from raydpo.audits.measure import signed
from raydpo.audits.plots import label_plots, plots
from raydpo.pages.page import render
from raydpo.pages.plot import Picture
from raydpo.pages.text import shown

__all__ = ["render_page"]

MOST_SOURCES = 6
"""Largest number of sources with pictures of their own. The table has all sources."""
MOST_COLUMNS = 4
"""Number of columns of scores, at most, that are named."""


def render_page(audit: Audit) -> str:
    """Render the page. Text from the data is escaped. The page has no scripts, and its security policy blocks them."""
    pictures = [("All", _pictures(audit.frame, audit.total))] if audit.total["labels"] else []
    pictures = pictures or [("All pairs", plots(audit.frame, audit.total))]
    if len(audit.sources) > 1:
        for name, figures in list(audit.sources.items())[:MOST_SOURCES]:
            if drawn := _pictures(audit.frame.filter(pl.col("source") == name), figures):
                pictures.append((name, drawn))
    columns = {
        name: _column(figures, audit.identical.get(name, 0), [audit.scores[name]] if name in audit.scores else [])
        for name, figures in audit.sources.items()
    }
    if len(columns) > 1:
        scores = [audit.scores[name] for name in audit.sources if name in audit.scores]
        columns = {"all": _column(audit.total, sum(audit.identical.values()), scores)} | columns
    rows = [
        {"title": title, "about": about, "values": [column[title] for column in columns.values()]}
        for title, about in _rows(audit.total).items()
    ]
    counted = counted_line(audit) if audit.meta.get("counted") else None
    return render("audits/page.html", audit=audit, plots=pictures, rows=rows, names=list(columns), counted=counted)


def _pictures(frame: pl.DataFrame, figures: dict[str, Any]) -> list[Picture]:
    """Pictures of the pairs, and of the completions with labels; none of what a sample has none of."""
    return [
        *(plots(frame, figures) if figures["pairs"] else ()),
        *(label_plots(frame, figures["labels"]) if figures["labels"] else ()),
    ]


def _rows(total: dict[str, Any]) -> dict[str, str]:
    """Rows of the table, and what each row shows."""
    pairs = ABOUT if total["all_pairs"] or not total["labels"] else {COUNTED: ABOUT[COUNTED]}
    rows = pairs | (labels.ABOUT if total["labels"] else {})
    return {title: about for title, about in rows.items() if title != COUNTED or total["uncounted"]}


def _share(value: dict[str, Any]) -> str:
    """Format a share with its interval, whose bounds are not equally far from a small or a large share."""
    return "-" if value["share"] is None else f"{value['share']:.1%} ({value['low']:.1%} to {value['high']:.1%})"


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _median(value: dict[str, float] | None, form: str) -> str:
    return "-" if value is None else format(value["median"], form)


def _scores(found: list[dict[str, Any]]) -> str:
    """``1, 2 of 8 (score_chosen, score_rejected)``."""
    if not found:
        return "-"
    wrong, tied, of = (sum(each[name] for each in found) for name in ("reversed", "tied", "compared"))
    columns = dict.fromkeys(shown(column[:40]) for each in found for column in each["columns"])
    return f"{wrong:,}, {tied:,} of {of:,} ({', '.join(list(columns)[:MOST_COLUMNS])})"


COUNTED = "tokens that count"
ABOUT = {
    "pairs": "usable pairs of this source; of a sample, those drawn and all of them",
    COUNTED: "tokens of the completions that count, of all that are used; lengths and log-probs are of these",
    "reference right, sum": "pairs whose chosen answer has the higher log-prob under the reference",
    "reference right, per token": "the same by the mean log-prob per token, which does not favour short answers",
    "chosen longer": "pairs whose chosen answer has more tokens",
    "length rule": "accuracy of always preferring the longer (or always the shorter) answer; a tie counts one half",
    "length difference": "median of chosen minus rejected, tokens",
    "margin by length": "correlation of the reference's margin with the length difference",
    "surprise chosen": "median surprise of the chosen answers, nats a token",
    "surprise rejected": "median surprise of the rejected answers, nats a token",
    "rejected surprises more": "probability that a random rejected answer surprises the reference more, per token, than a "
    "random chosen one: 50 % if the reference cannot tell them apart",
    "copies": "pairs that equal an earlier pair token by token and that no pair contradicts",
    "shared prompts": "pairs whose prompt another pair has too, copies not counted",
    "shared answers": "pairs with an answer that occurs in another pair, under any prompt, copies not counted",
    "contradictory": "pairs that also occur with chosen and rejected swapped; second number: both orders equally often",
    "scores reversed, tied": "pairs whose own scores, from the columns named, prefer the rejected answer; those that score "
    "both answers alike; of all pairs with scores. They are used as they stand",
    "identical": "pairs left out because chosen and rejected are the same",
    "empty": "chosen and rejected answers that consist of an end token alone",
    "cut": "chosen and rejected answers that were cut to data.max_length",
}
"""Rows of the table, and what each row shows."""


def _column(figures: dict[str, Any], identical: int, scores: list[dict[str, Any]]) -> dict[str, str]:
    """The figures of one source, or of all, as text, by row of the table."""
    length, reference, surprise = figures["length"], figures["reference"], figures["surprise"]
    return {
        "pairs": " of ".join(f"{count:,}" for count in dict.fromkeys((figures["pairs"], figures["all_pairs"]))),
        COUNTED: f"{figures['counted']:,} of {figures['counted'] + figures['uncounted']:,}",
        "reference right, sum": _share(reference["right_by_sum"]),
        "reference right, per token": _share(reference["right_per_token"]),
        "chosen longer": _share(length["chosen_longer"]),
        "length rule": f"{length['rule']}: {_share(length['rule_accuracy'])}",
        "length difference": "-" if length["difference"] is None else signed(length["difference"]["median"]),
        "margin by length": _number(figures["length_and_reference"]["pearson"]),
        "surprise chosen": _median(surprise["chosen"], ".2f"),
        "surprise rejected": _median(surprise["rejected"], ".2f"),
        "rejected surprises more": _share(surprise["separation"]),
        "copies": f"{figures['duplicates']:,}",
        "shared prompts": f"{figures['shared_prompt']:,}",
        "shared answers": f"{figures['shared_answer']:,}",
        "contradictory": f"{figures['contradictory']:,}, {figures['contradictory_evenly']:,}",
        "scores reversed, tied": _scores(scores),
        "identical": f"{identical:,}",
        "empty": f"{sum(figures['empty'].values()):,}",
        "cut": f"{sum(figures['truncated'].values()):,}",
        **labels.label_columns(figures["labels"]),
    }
