"""The page that compares runs: settings that differ, final figures, and overlaid curves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

from raydpo.config import SCALE_KEYS
from raydpo.pages.page import render
from raydpo.pages.plot import SERIES, Picture
from raydpo.reports.curves import curve, curves_picture
from raydpo.reports.run import SCRIPTS, status_of
from raydpo.reports.tables import Row, Table, interval, number, setting
from raydpo.rundir.fingerprint import flatten_settings
from raydpo.rundir.read import RunRecord, different_tokens, length_growth
from raydpo.rundir.read_rounds import RoundsRecord
from raydpo.rundir.summary import EVALUATION_TABLE
from raydpo.version import __version__

__all__ = ["MOST", "comparison_page", "differences", "overlaid", "told_apart"]

Record = TypeVar("Record", RunRecord, RoundsRecord)

MOST = 16
"""Largest number of runs whose curves are drawn: eight colours, then the same eight dashed."""
OURS = ("name", "output")
"""Keys that always differ between runs; they are not shown."""
SAME_ONLY = "Compare it only between runs with the same loss and beta."
FELL = "Pairs whose chosen answer is less likely than under the reference."
CURVES = (
    ("rewards/accuracies", "accuracy", "accuracy", 0.5, ""),
    ("loss", "loss", "loss", None, SAME_ONLY),
    ("rewards/margins", "margin", "reward margin", 0.0, SAME_ONLY),
    ("logps/chosen_fell", "chosen fell", "share of pairs", None, FELL),
    ("logratio/chosen_per_token", "drift of chosen", "nats a token", 0.0, ""),
    ("logratio/rejected_per_token", "drift of rejected", "nats a token", 0.0, ""),
    ("length/margin_correlation", "margin and length", "correlation", 0.0, "Near 1 the policy prefers the longer answer."),
)


def comparison_page(runs: Sequence[RunRecord]) -> str:
    """Render the page of several runs."""
    runs = told_apart(runs)
    different = differences(runs)
    incomparable = any(row.head == key or row.head.startswith(f"{key}.") for row in different.rows for key in SCALE_KEYS)
    return render(
        "reports/compare.html",
        scripts=SCRIPTS,
        version=__version__,
        runs=runs,
        differences=different,
        finals=_finals(runs),
        curves=overlaid(runs),
        incomparable=incomparable,
        most=MOST,
        tokens=different_tokens((run.held_out_digest, run.counted[1]) for run in runs),
        learnt=list(dict.fromkeys(run.counted[0] for run in runs if run.counted[0])),
        same_pairs=len({run.held_out_digest for run in runs} - {None}) < 2,
        states=[(run.name, status_of(run)) for run in runs if run.summary is None],
    )


def differences(runs: Sequence[Record]) -> Table:
    """Return a row for each key whose value differs between runs."""
    settings = [flatten_settings(run.config, lists=True) for run in runs]
    keys = [key for key in dict.fromkeys(key for each in settings for key in each) if key not in OURS]
    columns = {key: [each.get(key) for each in settings] for key in keys}
    rows = [
        Row(key, [setting(key, value) for value in values])
        for key, values in columns.items()
        if any(value != values[0] for value in values)
    ]
    return Table("Settings that differ", ("setting", *(run.name for run in runs)), rows)


def overlaid(runs: Sequence[RunRecord], kinds: Sequence[str] = ("held out", "training")) -> list[Picture]:
    """Draw the curves of all runs in one picture for each metric and kind. Runs without the metric are left out."""
    shown = list(runs)[:MOST]
    pictures = []
    for kind in kinds:
        extra = (("grad_norm", "gradient norm", "norm", None, ""),) if kind == "training" else ()
        for metric, title, ylabel, level, caption in CURVES + extra:
            curves = []
            for place, run in enumerate(shown):
                table, rows = (run.evals, "evaluations") if kind == "held out" else (run.steps, "steps")
                colour, dashed = SERIES[place % len(SERIES)], place >= len(SERIES)
                curves.append(curve(table, metric, run.name, colour, dashed=dashed, rows=rows))
            label = f"{title[0].upper()}{title[1:]}, {kind}"
            pictures.append(curves_picture(label, caption, curves, ylabel, level=level, log=metric == "grad_norm"))
    return [picture for picture in pictures if picture is not None]


def _finals(runs: Sequence[RunRecord]) -> Table:
    rows = []
    for run in runs:
        summary, evaluation = run.summary or {}, run.evaluation or {}
        cells = [
            *(number(value, ",.0f") for value in (run.done, summary.get("train_seconds"), summary.get("tokens_per_second"))),
            *(number(run.held_out(key.removeprefix("eval_"))[1]) for key, _ in EVALUATION_TABLE),
            interval((evaluation.get("drift") or {}).get("kl_per_token")),
            interval(length_growth(evaluation), "+.0%"),
        ]
        rows.append(Row(run.name, cells))
    measured = (label for _, label in EVALUATION_TABLE)
    columns = ("run", "steps", "seconds in all", "tokens a second of a step", *measured, "KL, nats a token", "length growth")
    return _without_empty(Table("Final figures, held-out pairs", columns, rows))


def _without_empty(table: Table) -> Table:
    """Drop the columns in which no row has a value."""
    head, *columns = table.columns
    kept = [index for index in range(len(columns)) if any(row.cells[index].value is not None for row in table.rows)]
    rows = [Row(row.head, [row.cells[index] for index in kept], row.mark) for row in table.rows]
    return Table(table.label, (head, *(columns[index] for index in kept)), rows)


def told_apart(runs: Sequence[Record]) -> list[Record]:
    """Name runs that share a name by their path or URI."""
    names = [run.name for run in runs]
    return [dataclasses.replace(run, name=run.place) if names.count(run.name) > 1 else run for run in runs]
