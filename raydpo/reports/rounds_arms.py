"""Runs of rounds side by side. Runs that differ only in seeds are one arm. Success is read at equal steps, at equal drift
and at equal numbers of sampled answers."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from raydpo.data.interval import standard_error, student95
from raydpo.reports.rounds_findings import within
from raydpo.rundir.fingerprint import flatten_settings
from raydpo.rundir.read_rounds import RoundsRecord

__all__ = ["AXES", "Arm", "Axis", "Place", "Value", "arms_of", "common", "course_of", "statement"]

SEEDS = ("train.seed", "rounds.sample.seed")
"""Settings in which the runs of an arm may differ, beside where they are stored."""
STORED = ("name", "output", "cache.uri")
ENOUGH = 2.0
"""Number of standard errors of a difference from which it counts; more where errors are known from a few seeds."""


@dataclass(frozen=True)
class Place:
    """A measurement of a run: after which round, the optimizer steps and sampled answers until then, and what was measured.
    Errors are standard errors; None = unknown."""

    round: int
    steps: float
    answers: float
    drift: float | None
    drift_error: float | None
    success: float
    success_error: float | None


@dataclass(frozen=True)
class Value:
    """The success of an arm somewhere. ``runs``: how many runs it is the mean of. ``read``: it lies between measurements."""

    success: float
    error: float | None
    runs: int
    read: bool

    def __str__(self) -> str:
        return within(self.success, self.error, ".3f")


@dataclass(frozen=True)
class Axis:
    """What success is compared at: a name for a sentence, the value of a measurement, and a format.

    Attributes:
        error: standard error of the value; None where it is known exactly.
        between: whether a value between two measurements is meaningful.
    """

    name: str
    of: Callable[[Place], float | None]
    form: str
    error: Callable[[Place], float | None] | None = None
    between: bool = True


AXES = {
    "steps": Axis("optimizer steps", lambda place: place.steps, ",.0f"),
    "drift": Axis("nats of drift from the initial model", lambda place: place.drift, ".3g", lambda place: place.drift_error),
    "answers": Axis("sampled answers", lambda place: place.answers, ",.0f", between=False),
}
"""Axes by name."""


@dataclass(frozen=True)
class Arm:
    """One setup: a run, or several that differ only in their seeds.

    Attributes:
        offline: the runs sample in their first round only.
        courses: measurements of each run, in order of round.
    """

    name: str
    offline: bool
    runs: Sequence[RoundsRecord]
    courses: Sequence[Sequence[Place]]

    @property
    def course(self) -> list[Place]:
        """Mean of the runs after each round that all of them have measured, with standard errors over the runs."""
        if len(self.courses) == 1:
            return list(self.courses[0])
        by_round = [{place.round: place for place in course} for course in self.courses]
        shared = sorted(set.intersection(*(set(each) for each in by_round)))
        return [self._mean([each[number] for each in by_round]) for number in shared]

    @staticmethod
    def _mean(places: Sequence[Place]) -> Place:
        def mean(values: Sequence[float | None]) -> tuple[float | None, float | None]:
            if None in values:
                return None, None
            return float(np.mean(values)), standard_error(np.array(values))

        steps, answers = (float(np.mean([getattr(place, name) for place in places])) for name in ("steps", "answers"))
        drift, success = (mean([getattr(place, name) for place in places]) for name in ("drift", "success"))
        return Place(places[0].round, steps, answers, *drift, *success)

    def most(self, axis: Axis) -> float | None:
        """The largest value on an axis that every run reaches; None if a run has no value there."""
        reached = [
            max((x for place in course if (x := axis.of(place)) is not None), default=None) for course in self.courses
        ]
        return None if None in reached or not reached else min(reached)

    def at(self, axis: Axis, x: float) -> Value | None:
        """Return the success where the axis has the value ``x``, the mean over the runs that get there; None if none does.
        Its error is over the runs, or that of the one run."""
        found = [value for course in self.courses if (value := _read(course, axis, x)) is not None]
        if len(found) < 2:
            return found[0] if found else None
        values = np.array([value.success for value in found])
        return Value(float(values.mean()), standard_error(values), len(found), any(value.read for value in found))


def course_of(record: RoundsRecord) -> list[Place]:
    """Return the measurements of a run. Offline rounds after the first sample no answers."""
    course, steps, answers = [], 0, 0
    for row in record.rounds:
        steps += row.get("steps") or 0
        answers += record.sampled(row)
        if row.get("eval_success") is not None:
            drift, success = ((row.get(f"eval_{name}"), row.get(f"eval_{name}_se")) for name in ("drift_initial", "success"))
            course.append(Place(row["round"], steps, answers, *drift, *success))
    return course


def _read(course: Sequence[Place], axis: Axis, x: float) -> Value | None:
    """Return the success of a run where the axis first has the value ``x``; None if it never has.

    Of several measurements with exactly this value the last counts. Between two measurements success and errors are
    interpolated: an interpolated error is an upper bound, whether or not the two are independent. Where the value on the
    axis has an error, it counts with the slope of success.
    """
    places = [(value, place) for place in course if (value := axis.of(place)) is not None]
    exact = [number for number, (value, _) in enumerate(places) if value == x]
    if exact:
        last = exact[-1]
        return _between(places[max(last - 1, 0)], places[last], 1.0, axis)
    for one, other in itertools.pairwise(places) if axis.between else ():
        if min(one[0], other[0]) < x < max(one[0], other[0]):
            return _between(one, other, (x - one[0]) / (other[0] - one[0]), axis)
    return None


def _between(one: tuple[float, Place], other: tuple[float, Place], share: float, axis: Axis) -> Value:
    """Success at a share of the way from one measurement to another, each with its value on the axis."""
    (low, first), (high, last) = one, other

    def at(start: float | None, end: float | None) -> float | None:
        return end if share == 1 else None if start is None or end is None else (1 - share) * start + share * end

    error = at(first.success_error, last.success_error)
    if error is not None and axis.error is not None and high != low:
        slope = (last.success - first.success) / (high - low)
        error = math.hypot(error, slope * (at(axis.error(first), axis.error(last)) or 0.0))
    return Value(at(first.success, last.success), error, 1, read=share < 1)


def arms_of(records: Sequence[RoundsRecord]) -> list[Arm]:
    """Group runs whose configurations differ only in seeds. Runs with equal seeds are arms of their own."""
    groups: dict[tuple[str, int], list[RoundsRecord]] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for record in records:
        settings = flatten_settings(record.config, lists=True)
        seeds = json.dumps([settings.get(key) for key in SEEDS], default=str)
        rest = {key: value for key, value in settings.items() if key not in (*SEEDS, *STORED)}
        setup = json.dumps(rest, sort_keys=True, default=str) if rest else record.place
        seen[setup, seeds] += 1
        groups.setdefault((setup, seen[setup, seeds]), []).append(record)
    names = [_name(runs) for runs in groups.values()]
    found = []
    for name, runs in zip(names, groups.values(), strict=True):
        offline = bool(runs[0].setting("rounds.offline"))
        label = runs[0].name if not name or names.count(name) > 1 else name
        about = [*(["offline"] if offline else []), *([f"{len(runs)} seeds"] if len(runs) > 1 else [])]
        label += f" ({', '.join(about)})" if about else ""
        found.append(Arm(label, offline, runs, [course_of(run) for run in runs]))
    return found


def _name(runs: Sequence[RoundsRecord]) -> str:
    """The name of a run, or what the names of several have in common."""
    if len(runs) == 1:
        return runs[0].name
    letters = itertools.takewhile(lambda each: len(set(each)) == 1, zip(*(run.name for run in runs), strict=False))
    start = "".join(each[0] for each in letters).rstrip(" -_.=0123456789")
    return start.removesuffix("seed").rstrip(" -_.=")


def common(arms: Sequence[Arm], axis: Axis) -> float | None:
    """Return the largest value on an axis at which all runs have a success; None if there is none but the start."""
    if axis.between:
        reached = [arm.most(axis) for arm in arms]
        return None if None in reached or not min(reached) > 0 else min(reached)
    shared = set.intersection(*({axis.of(place) for place in course} for arm in arms for course in arm.courses))
    return max((x for x in shared if x > 0), default=None)


def statement(arms: Sequence[Arm], axis: Axis) -> str:
    """Say which arms differ at the largest value on the axis that all reach.

    Two arms differ if their difference is above ``ENOUGH`` combined standard errors, or above Student's bound for 95 % where
    errors are over a few seeds (Welch, Biometrika 34, 1947).
    """
    x = common(arms, axis)
    if x is None:
        without = [arm.name for arm in arms if not (arm.most(axis) or 0) > 0]
        why = f"{', '.join(without)} has none" if without else "the runs have none in common"
        return f"Success cannot be compared at equal {axis.name}: {why}."
    values = [arm.at(axis, x) for arm in arms]
    told = ", ".join(f"{arm.name} {value}" for arm, value in zip(arms, values, strict=True))
    pairs = [(one, other) for one in range(len(arms)) for other in range(one + 1, len(arms))]
    verdicts = {pair: _verdict(*(values[at] for at in pair)) for pair in pairs}
    said = []
    for (one, other), verdict in verdicts.items():
        if verdict is None:
            said.append(f"whether {arms[one].name} and {arms[other].name} differ is not known, since an error is not")
        elif verdict:
            better, worse = (one, other) if values[one].success > values[other].success else (other, one)
            difference = values[better].success - values[worse].success
            error = math.hypot(values[one].error, values[other].error)
            said.append(f"{arms[better].name} is above {arms[worse].name} by {within(difference, error, '.3f')}")
    if alike := sum(verdict is False for verdict in verdicts.values()):
        said.append("no difference can be seen" + ("" if alike == len(pairs) else " between the others"))
    return f"At {x:{axis.form}} {axis.name}: {told}: {'; '.join(said)}."


def _verdict(one: Value, other: Value) -> bool | None:
    """Whether two values differ by more than chance explains; None if it cannot be said."""
    difference = abs(one.success - other.success)
    if one.error is None or other.error is None:
        return None
    error = math.hypot(one.error, other.error)
    if error == 0:
        return None if difference else False
    few = sum(value.error**4 / (value.runs - 1) for value in (one, other) if value.runs > 1)
    bound = max(ENOUGH, student95(max(1, int(error**4 / few)))) if few else ENOUGH
    return difference > bound * error
