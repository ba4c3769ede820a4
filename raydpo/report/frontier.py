"""The trials of a sweep as points: how well each ranks held-out pairs, and what that cost in drift and in length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raydpo.evaluation.interval import share_error
from raydpo.pages.plot import BAD, GOOD, INK, PALE, Picture, figure, svg
from raydpo.report.records import SweepRecord, Trial
from raydpo.report.tables import text

__all__ = ["Point", "Recommendation", "frontier_pictures", "points_of", "recommend"]

NAMED = 12
"""Points up to which each is named in the pictures; more would lie on one another."""


@dataclass(frozen=True)
class Point:
    """A trial that has been evaluated, by what compares across beta. None: not measured.

    Attributes:
        mark: its number, which ties pictures and table together.
        done: whether it has been trained to its end.
        beta: None where it is unknown.
        accuracy: held-out, with its standard error.
        margin: held-out reward margin divided by beta: nats, or nats a token where the loss is of these.
        kl: measured drift, nats a token of the policy's own answers. moved: in its place, by how much the log-prob of a
            token of a held-out answer has changed, mean of chosen and rejected, nats.
        length_growth: of the policy's own answers, a share. length_pull: in its place, the correlation of margin and length
            difference.
    """

    mark: str
    name: str
    label: str
    done: bool
    beta: float | None
    accuracy: float | None
    error: float | None
    margin: float | None
    kl: float | None
    moved: float | None
    length_growth: float | None
    length_pull: float | None


@dataclass(frozen=True)
class Axis:
    """What a trial is measured by: its name with its unit, and where a point has it."""

    label: str
    read: Callable[[Point], float | None]


ACCURACY = Axis("held-out accuracy", lambda point: point.accuracy)
MARGIN = Axis("margin / beta, nats", lambda point: point.margin)
UNBEATEN = "Up and to the left is better. The line joins the trials that no other beats in both."


@dataclass(frozen=True)
class Recommendation:
    """The trial to take, None where none can be told from the others; and why, in sentences."""

    point: Point | None
    reason: str


def points_of(sweep: SweepRecord) -> list[Point]:
    """The trials that have been evaluated; those that are not done were so before their end."""
    return [_point(f"trial-{number}", trial) for number, trial in enumerate(sweep.trials)
            if trial.eval or trial.evaluation]


def _point(mark: str, trial: Trial) -> Point:
    evaluation, scores = trial.evaluation or {}, trial.eval
    total = (evaluation.get("preferences") or {}).get("total") or {}
    accuracy = scores.get("rewards/accuracies", (total.get("accuracy") or {}).get("value"))
    pairs = ((trial.run and trial.run.summary) or {}).get("held_out_pairs") or total.get("pairs")
    beta = trial.settings.get("train.beta", trial.run.setting("train.beta") if trial.run else None)
    margin = scores.get("rewards/margins", (total.get("margin") or {}).get("value"))
    sides = [scores.get(f"logratio/{side}_per_token") for side in ("chosen", "rejected")]
    modes = (evaluation.get("generation") or {}).get("modes") or {}
    growth = next((modes[mode]["length_growth"]["value"] for mode in ("sampled", "greedy") if modes.get(mode)), None)
    return Point(
        mark, trial.name, _label(trial.settings), trial.status == "done", beta, accuracy,
        share_error(accuracy, scores.get("effective_pairs") or pairs) if accuracy is not None and pairs else None,
        margin / beta if margin is not None and beta else None,
        ((evaluation.get("drift") or {}).get("kl_per_token") or {}).get("value"),
        None if None in sides else sum(abs(side) for side in sides) / 2, growth, scores.get("length/margin_correlation"))


def _label(settings: dict[str, object]) -> str:
    """``beta 0.1, lr 1e-05``."""
    return ", ".join(f"{key.rsplit('.', 1)[-1]} {text(value).text}" for key, value in settings.items())


def drift_axis(points: Sequence[Point]) -> Axis:
    """The measured drift where any trial has it, else what held-out log-probs say of it."""
    if any(point.kl is not None for point in points):
        return Axis("drift: KL, nats a token", lambda point: point.kl)
    return Axis("drift: change of log-probs, nats a token", lambda point: point.moved)


def length_axis(points: Sequence[Point]) -> Axis:
    """Likewise of length."""
    if any(point.length_growth is not None for point in points):
        return Axis("growth of the answers' length", lambda point: point.length_growth)
    return Axis("correlation of margin and length", lambda point: point.length_pull)


def recommend(points: Sequence[Point], drift: Axis) -> Recommendation:
    """The trial that drifts least of those whose accuracy is within one standard error of the best.

    That is the one-standard-error rule (Breiman et al., Classification and Regression Trees, 1984, section 3.4.3), with
    drift in the place of size. Equal drift: the larger beta.
    """
    known = [point for point in points if None not in (point.accuracy, point.error, drift.read(point))]
    if not known:
        return Recommendation(None, "No trial has both a held-out accuracy with its number of pairs and a drift yet, so "
                                    "none can be recommended. Held-out pairs (data.eval) are what a sweep is judged by.")
    best = max(known, key=lambda point: (point.accuracy, -drift.read(point)))
    bound = best.accuracy - best.error
    close = [point for point in known if point.accuracy >= bound]
    chosen = min(close, key=lambda point: (drift.read(point), -(point.beta or 0.0)))
    if len(known) == 1:
        return Recommendation(None, f"{best.label or best.name} is the only trial so far that can be judged.")
    if chosen is best:
        reason = (f"{best.label or best.name} has the best held-out accuracy, {best.accuracy:.3f} (standard error "
                  f"{best.error:.3f})")
        reason += (f", and of the {len(close)} trials within one standard error of it drifts least ({drift.read(best):.3g} "
                   "nats a token)." if len(close) > 1 else
                   f", and no other is within one standard error of it. It drifts {drift.read(best):.3g} nats a token.")
    else:
        reason = (f"{chosen.label or chosen.name} has a held-out accuracy of {chosen.accuracy:.3f}, within one standard "
                  f"error ({best.error:.3f}) of the best, {best.accuracy:.3f} of {best.label or best.name}. Of the "
                  f"{len(close)} trials that are that close it drifts least: {drift.read(chosen):.3g} against "
                  f"{drift.read(best):.3g} nats a token.")
    left_out = len(points) - len(known)
    if left_out:
        reason += f" {left_out} trial(s) lack one of the two figures and were not considered."
    return Recommendation(chosen, reason)


def frontier_pictures(points: Sequence[Point], recommended: Point | None) -> list[Picture]:
    """Accuracy and margin against drift and against length, a mark for each trial."""
    drift, length = drift_axis(points), length_axis(points)
    pictures = [_picture(title, caption, points, x, y, recommended) for title, caption, x, y in (
        ("Accuracy and drift", UNBEATEN, drift, ACCURACY),
        ("Margin and drift", "A margin that grows with drift alone has been paid for, not learnt. It is divided by beta, so "
                             "that trials compare.", drift, MARGIN),
        ("Accuracy and length", "Accuracy that comes with length may be length.", length, ACCURACY),
        ("Margin and length", "The margin, divided by beta, against length.", length, MARGIN))]
    return [picture for picture in pictures if picture is not None]


def _picture(title: str, caption: str, points: Sequence[Point], x: Axis, y: Axis,
             recommended: Point | None) -> Picture | None:
    known = sorted((point for point in points if None not in (x.read(point), y.read(point))), key=x.read)
    if not known:
        return None
    joined = unbeaten(known, x, y) if caption == UNBEATEN else []
    if len(known) < len(points):
        caption += f" {len(points) - len(known)} of {len(points)} trials lack one of the two figures and are not shown."
    middle = (x.read(known[0]) + x.read(known[-1])) / 2
    marks = {}
    with figure(4.4, 3.0, aligned=True) as (made, axes):
        axes.plot([x.read(point) for point in joined], [y.read(point) for point in joined], color=PALE, linewidth=1.2)
        for number, point in enumerate(known):
            across, up = x.read(point), y.read(point)
            chosen = recommended is not None and point.mark == recommended.mark
            axes.plot([across], [up], "o", color=BAD if chosen else GOOD, markersize=9 if chosen else 6.5, gid=point.mark)
            if y is ACCURACY and point.error is not None:
                axes.errorbar([across], [up], [point.error], color=PALE, elinewidth=0.9, zorder=1)
            if len(known) <= NAMED:  # towards the middle, and in turn above and below
                side, away = ("right", -6) if across > middle else ("left", 6)
                axes.annotate(_short(point, known), (across, up), (away, -9 if number % 2 else 5), ha=side,
                              textcoords="offset points", fontsize=7.5, color=INK)
            marks[point.mark] = (f"{point.label or point.name}: {y.label} {up:.3f}, {x.label} {across:.3g}"
                                 + (" (recommended)" if chosen else ""))
        axes.margins(0.1, 0.14)
        axes.locator_params(axis="x", nbins=5)
        axes.set(xlabel=x.label, ylabel=y.label)
        return Picture(title, svg(made, title, caption, marks), caption)


def unbeaten(points: Sequence[Point], x: Axis, y: Axis) -> list[Point]:
    """Those to which no other has less of x and more of y, in order of x."""
    line: list[Point] = []
    for point in sorted(points, key=lambda point: (x.read(point), -y.read(point))):
        if not line or y.read(point) > y.read(line[-1]):
            line.append(point)
    return line


def _short(point: Point, points: Sequence[Point]) -> str:
    """Of the label only what tells the points apart, as far as it fits."""
    parts = [set(other.label.split(", ")) for other in points]
    common = set.intersection(*parts) if len(parts) > 1 else set()
    return ", ".join(part for part in point.label.split(", ") if part not in common)[:24]
