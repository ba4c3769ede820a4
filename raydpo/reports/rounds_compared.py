"""The page that compares runs of rounds: offline and on-policy, at equal steps, at equal drift and at equal samples."""

from __future__ import annotations

from collections.abc import Sequence

from raydpo.pages.page import render
from raydpo.pages.plot import SERIES, Picture
from raydpo.reports.compare import MOST, differences, told_apart
from raydpo.reports.curves import curves_picture, points
from raydpo.reports.paths import Path, Spot, path_picture
from raydpo.reports.rounds import rounds_status
from raydpo.reports.rounds_arms import AXES, Arm, Axis, Place, arms_of, common, statement
from raydpo.reports.rounds_findings import within
from raydpo.reports.run import SCRIPTS
from raydpo.reports.tables import Cell, Row, Table, number
from raydpo.rundir.read_rounds import RoundsRecord
from raydpo.version import __version__

__all__ = ["rounds_comparison_page"]

MOST_ROWS = 12
"""Largest number of rows of a table of one axis."""
MEASURE = (
    "rounds.rewards",
    "rounds.measure",
    "rounds.cut",
    "rounds.sample.max_tokens",
    "rounds.sample.temperature",
    "rounds.sample.top_p",
)
"""Settings that decide what success is."""


def rounds_comparison_page(records: Sequence[RoundsRecord]) -> str:
    """Render the page of several runs of rounds."""
    records = told_apart(records)
    arms = arms_of(records)
    return render(
        "reports/rounds_compared.html",
        scripts=SCRIPTS,
        version=__version__,
        arms=arms,
        states=[(record.name, rounds_status(record)) for record in records],
        warnings=_warnings(records),
        statements=[statement(arms, axis) for axis in AXES.values()] if len(arms) > 1 else [],
        pictures=_pictures(arms),
        steps=_at_equal(arms, AXES["steps"], "steps"),
        drift=_at_equal(arms, AXES["drift"], "drift, nats an answer"),
        answers=_at_equal(arms, AXES["answers"], "sampled answers"),
        runs=_runs(arms),
        seeds=any(len(arm.runs) > 1 for arm in arms),
        most=MOST,
        differences=differences(records),
    )


def _warnings(records: Sequence[RoundsRecord]) -> list[str]:
    """Why success, or drift, may not compare."""
    found = []
    differ = [key for key in MEASURE if any(run.setting(key) != records[0].setting(key) for run in records)]
    if differ:
        found.append(f"Success is not measured alike: {', '.join(differ)} differ between the runs.")
    tables = [run.held_out(0) for run in records]
    prompts = [None if table is None else frozenset(table["prompt_id"].to_pylist()) for table in tables]
    if len(set(prompts) - {None}) > 1:
        found.append("The runs are measured on different held-out prompts, so their success differs by chance, too.")
    models = {(run.setting("model.path"), run.setting("model.adapter")) for run in records}
    if len(models) > 1:
        found.append("The runs begin with different models, so neither success nor drift has the same start.")
    return found


def _at_equal(arms: Sequence[Arm], axis: Axis, heading: str) -> Table | None:
    """The success of each arm at equal values on an axis, with the farthest that each arm gets; None without any."""
    places = sorted({x for arm in arms for course in arm.courses for place in course if (x := axis.of(place)) is not None})
    shared = common(arms, axis)
    if axis is AXES["drift"]:  # measured drifts are all different
        ends = {most for arm in arms if (most := arm.most(axis)) is not None and most > (shared or 0)}
        places = sorted({*(share * (shared or 0) for share in (0, 0.25, 0.5, 0.75, 1)), *ends}) if places else []
    if len(places) > MOST_ROWS:
        places = [places[round(at * (len(places) - 1) / (MOST_ROWS - 1))] for at in range(MOST_ROWS)]
    rows = [Row(format(x, axis.form), [_cell(arm, axis, x) for arm in arms]) for x in places]
    return Table(f"Success at equal {axis.name}", (heading, *(arm.name for arm in arms)), rows) if rows else None


def _cell(arm: Arm, axis: Axis, x: float) -> Cell:
    value = arm.at(axis, x)
    if value is None:
        most = arm.most(axis)
        return Cell("-" if most is None or most >= x else f"reaches {most:{axis.form}}")
    few = f" ({value.runs} of {len(arm.runs)} seeds)" if value.runs < len(arm.runs) else ""
    return Cell(f"{'≈ ' if value.read else ''}{value}{few}", value.success)


def _runs(arms: Sequence[Arm]) -> Table:
    """Where each run is after its last measurement."""
    rows = [
        Row(run.name, _cells(run, course, arm.offline))
        for arm in arms
        for run, course in zip(arm.runs, arm.courses, strict=True)
    ]
    done = ("rounds", "steps", "answers sampled")
    columns = ("run", "kind", *done, "success", "drift, nats an answer", "tokens", "different answers", "seconds")
    return Table("All runs", columns, rows)


def _cells(run: RoundsRecord, course: Sequence[Place], offline: bool) -> list[Cell]:
    kind, seconds = Cell("offline" if offline else "on-policy"), number(run.seconds, ",.0f")
    if not course:
        return [kind, *[number(None)] * 7, seconds]
    last, row = course[-1], next(row for row in run.rounds if row["round"] == course[-1].round)
    return [
        kind,
        *(number(value, ",.0f") for value in (last.round, last.steps, last.answers)),
        _with_error(last.success, last.success_error, ".3f"),
        _with_error(last.drift, last.drift_error, ".2f"),
        number(row.get("eval_tokens"), ".1f"),
        number(row.get("eval_distinct"), ".1%"),
        seconds,
    ]


def _with_error(value: float | None, error: float | None, form: str) -> Cell:
    return number(None) if value is None else Cell(within(value, error, form), value)


def _pictures(arms: Sequence[Arm]) -> list[Picture]:
    drawn = [(arm, SERIES[place % len(SERIES)], place) for place, arm in enumerate(arms[:MOST])]
    curves = [
        points(
            [vars(each) for each in arm.course],
            "success",
            arm.name,
            colour,
            error="success_error",
            at="steps",
            dashed=arm.offline,
        )
        for arm, colour, _ in drawn
    ]
    caption = "Success on held-out prompts, with bars of one standard error."
    pictures = [curves_picture("Success and steps", caption, curves, "held-out success")]
    for axis, label in ((AXES["drift"], "drift from initial, nats an answer"), (AXES["answers"], "sampled answers")):
        paths = [
            Path(
                arm.name,
                colour,
                arm.offline,
                [_spot(arm, at, each, axis) for each in arm.course if axis.of(each) is not None],
            )
            for arm, colour, at in drawn
        ]
        title = "Success and drift" if axis is AXES["drift"] else "Success and samples"
        caption = "The number at a mark is its round, 0 the start. Up and to the left is better."
        pictures.append(path_picture(title, caption, paths, label, "held-out success"))
    return [picture for picture in pictures if picture is not None]


def _spot(arm: Arm, at: int, place: Place, axis: Axis) -> Spot:
    x, success = axis.of(place), within(place.success, place.success_error, ".3f")
    told = f"{arm.name}, round {place.round}: success {success} at {x:{axis.form}} {axis.name}"
    error = place.drift_error if axis is AXES["drift"] else None
    return Spot(x, place.success, error, place.success_error, f"{place.round}", told, f"arm-{at}-{place.round}")
