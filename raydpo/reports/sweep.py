"""The page of a sweep: the frontier of its trials, the recommended trial and why, and a table of all trials."""

from __future__ import annotations

from raydpo.config.counting import EVERYTHING
from raydpo.pages.page import render
from raydpo.reports.compare import MOST, overlaid
from raydpo.reports.frontier import (
    Point,
    Recommendation,
    counted_apart,
    drift_axis,
    frontier_pictures,
    length_axis,
    measured_otherwise,
    on_same_pairs,
    points_of,
    recommend,
    units_of_margin,
)
from raydpo.reports.run import SCRIPTS
from raydpo.reports.tables import Cell, Row, Table, duration, number, setting, text
from raydpo.rundir.read import RunRecord, SweepRecord
from raydpo.version import __version__

__all__ = ["recommendation_of", "sweep_page"]

QUALITY = ("accuracy", "standard error", "margin / beta")
DRIFT = ("KL, nats a token", "change of log-probs", "length growth", "margin ~ length")
FIGURES = (*QUALITY, *DRIFT)


def recommendation_of(sweep: SweepRecord) -> Recommendation:
    """Recommend one of the trials that are done."""
    points = [point for point in points_of(sweep) if point.done]
    return recommend(points, drift_axis(points))


def sweep_page(sweep: SweepRecord) -> str:
    """Render the page. Trials that wait, run or have failed are in the table only; pictures show trials that are done."""
    evaluated = points_of(sweep)
    points = [point for point in evaluated if point.done]
    recommendation, units = recommendation_of(sweep), units_of_margin(evaluated)
    drawn, left_out = _drawn(sweep, recommendation.point)
    return render(
        "reports/sweep.html",
        scripts=SCRIPTS,
        version=__version__,
        sweep=sweep,
        facts=_facts(sweep),
        recommendation=recommendation,
        points=points,
        frontier=frontier_pictures(points, recommendation.point),
        measured=drift_axis(points).measured,
        grown=length_axis(points).measured,
        otherwise=measured_otherwise(points),
        same_pairs=on_same_pairs(points),
        tokens=counted_apart(points),
        counted=_counted(sweep, evaluated),
        units=units,
        table=_table(sweep, evaluated, tell_unit=len(units) > 1),
        failed=[trial for trial in sweep.trials if trial.error],
        drawn=len(drawn),
        left_out=left_out,
        curves=overlaid(drawn, ["held out"]) or overlaid(drawn, ["training"]),
    )


def _drawn(sweep: SweepRecord, recommended: Point | None) -> tuple[list[RunRecord], int]:
    """Return the runs whose curves are drawn, including the recommended one, and the number of runs left out."""
    runs = [trial.run for trial in sweep.trials if trial.run is not None]
    drawn = runs[:MOST]
    taken = [run for run in runs[MOST:] if recommended is not None and run.name == recommended.name]
    return [*drawn[: MOST - len(taken)], *taken], max(0, len(runs) - MOST)


def _counted(sweep: SweepRecord, points: list[Point]) -> str | None:
    """What counts in the held-out pairs, in words, if that is the same for all points. None if everything counts in all
    pairs of the sweep."""
    words = {point.counted for point in points if point.counted is not None}
    varied = any(key.endswith(".train_on") for key in sweep.parameters)
    return next(iter(words)) if len(words) == 1 and (varied or words != {EVERYTHING}) else None


def _facts(sweep: SweepRecord) -> list[tuple[str, str]]:
    states = [trial.status for trial in sweep.trials]
    rates = [f"{rate:.0%}" for rate in sweep.cache.get("hit_rates") or [] if rate is not None]
    seconds = max((trial.seconds or 0.0 for trial in sweep.trials), default=0.0)  # not the sum: trials run in parallel
    facts = [
        ("trials", ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))),
        ("varied", ", ".join(sweep.parameters)),
        ("longest trial", duration(seconds) if seconds else None),
        ("reference identity", sweep.cache.get("identity")),
        ("cache", sweep.cache.get("uri")),
        ("in the cache when the last call began", f"{rates[0]} of each trial" if len(set(rates)) == 1 else ", ".join(rates)),
    ]
    return [(name, value) for name, value in facts if value]


def _table(sweep: SweepRecord, points: list[Point], *, tell_unit: bool) -> Table:
    by_name = {point.name: point for point in points}
    apart = bool(counted_apart(points))
    rows = [
        Row(
            trial.name,
            [
                *(setting(key, trial.settings.get(key)) for key in sweep.parameters),
                Cell(trial.status),
                number(trial.run.done if trial.run else None, ",.0f"),
                *([text(trial.run.counted[1] if trial.run else None)] if apart else []),
                *_figures(by_name.get(trial.name), tell_unit),
                number(trial.eval.get("loss")),
                number(trial.seconds, ",.0f"),
            ],
            f"trial-{number_}",
        )
        for number_, trial in enumerate(sweep.trials)
    ]
    where = ["measured on"] if apart else []
    return Table("Trials", ("trial", *sweep.parameters, "state", "steps", *where, *FIGURES, "loss", "seconds"), rows)


def _figures(point: Point | None, tell_unit: bool) -> list[Cell]:
    if point is None:
        return [number(None)] * len(FIGURES)
    margin = number(point.margin, ".2f")
    if tell_unit and point.margin is not None:  # no value to sort by: the units do not compare
        margin = Cell(f"{margin.text} {point.unit}")
    return [
        number(point.accuracy),
        number(point.error),
        margin,
        number(point.kl),
        number(point.moved),
        number(point.length_growth, ".1%"),
        number(point.length_pull, "+.2f"),
    ]
