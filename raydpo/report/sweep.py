"""The page of a sweep: the frontier of its trials, the one to take and why, all of them in a table."""

from __future__ import annotations

import raydpo
from raydpo.pages.page import render
from raydpo.report.compare import overlaid
from raydpo.report.frontier import Point, drift_axis, frontier_pictures, points_of, recommend
from raydpo.report.records import SweepRecord
from raydpo.report.run import SCRIPTS
from raydpo.report.tables import Cell, Row, Table, duration, number, share, text

__all__ = ["sweep_page"]


def sweep_page(sweep: SweepRecord) -> str:
    """The page. Trials that wait, run or have failed are in its table, and in its pictures once they are done."""
    evaluated = points_of(sweep)
    points = [point for point in evaluated if point.done]
    recommendation = recommend(points, drift_axis(points))
    runs = [trial.run for trial in sweep.trials if trial.run is not None]
    return render("report/sweep.html", scripts=SCRIPTS, version=raydpo.__version__, sweep=sweep, facts=_facts(sweep),
                  recommendation=recommendation, points=points, frontier=frontier_pictures(points, recommendation.point),
                  measured=any(point.kl is not None for point in points),
                  grown=any(point.length_growth is not None for point in points), table=_table(sweep, evaluated),
                  failed=[trial for trial in sweep.trials if trial.error],
                  curves=overlaid(runs, ["held out"]) or overlaid(runs, ["training"]))


def _facts(sweep: SweepRecord) -> list[tuple[str, str]]:
    states = [trial.status for trial in sweep.trials]
    rates = [f"{rate:.0%}" for rate in sweep.cache.get("hit_rates") or [] if rate is not None]
    seconds = max((trial.seconds or 0.0 for trial in sweep.trials), default=0.0)  # no sum: some run at once
    facts = [("trials", ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))),
             ("varied", ", ".join(sweep.parameters)), ("longest trial", duration(seconds) if seconds else None),
             ("reference identity", sweep.cache.get("identity")), ("cache", sweep.cache.get("uri")),
             ("found in the cache", f"{rates[0]} in each trial" if len(set(rates)) == 1 else ", ".join(rates))]
    return [(name, value) for name, value in facts if value]


def _table(sweep: SweepRecord, points: list[Point]) -> Table:
    by_name = {point.name: point for point in points}
    rows = [Row(trial.name, [*(text(trial.settings.get(key)) for key in sweep.parameters), Cell(trial.status),
                             number(trial.run.done if trial.run else None, ",.0f"), *_figures(by_name.get(trial.name)),
                             number(trial.eval.get("loss")), number(trial.seconds, ",.0f")],
                f"trial-{number_}") for number_, trial in enumerate(sweep.trials)]
    return Table("Trials", ("trial", *sweep.parameters, "state", "steps", "accuracy", "standard error", "margin / beta",
                            "KL, nats a token", "change of log-probs", "length growth", "margin ~ length", "loss",
                            "seconds"), rows)


def _figures(point: Point | None) -> list[Cell]:
    if point is None:
        return [number(None)] * 7
    return [number(point.accuracy), number(point.error), number(point.margin, ".2f"), number(point.kl), number(point.moved),
            share(point.length_growth), number(point.length_pull, "+.2f")]
