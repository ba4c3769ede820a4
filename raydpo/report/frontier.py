"""The trials of a sweep as points: how well each ranks held-out pairs, and what that cost in drift and in length."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from raydpo.config import ObjectiveConfig
from raydpo.evaluation.interval import Z95, share_error
from raydpo.pages.plot import BAD, GOOD, INK, PALE, Picture, figure, svg
from raydpo.report.records import SweepRecord, Trial
from raydpo.report.tables import setting

__all__ = ["Point", "Recommendation", "drift_axis", "frontier_pictures", "length_axis", "measured_otherwise",
           "on_same_pairs", "points_of", "recommend", "units_of_margin"]

NAMED = 12
"""Points up to which each is named in the pictures; more would lie on one another."""
PROTOCOL = ("pairs", "prompts", "seed", "max_tokens", "modes", "samples", "temperature", "engine", "reference")
"""What of an evaluation's protocol changes drift and length of the answers."""


@dataclass(frozen=True)
class Point:
    """A trial that has been evaluated, by what compares across beta. None: not measured.

    Attributes:
        mark: its number, which ties pictures and table together.
        done: whether it has been trained to its end.
        beta: of its last evaluation; None where it is unknown.
        accuracy: held-out, with its standard error.
        margin: held-out reward margin divided by beta, in ``unit``: nats, or nats a token where the loss is of these.
        kl: measured drift, nats a token of the policy's own answers. moved: in its place, by how much the log-prob of a
            token of a held-out answer has changed, mean of chosen and rejected, nats.
        length_growth: of the policy's own answers, a share. length_pull: in its place, the correlation of margin and length
            difference.
        protocol: how ``kl`` and ``length_growth`` were measured; they compare between trials where it is the same.
        held_out: digest of the pairs that ``accuracy`` is of; accuracies compare where it is the same.
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
    unit: str = ""
    protocol: str | None = None
    held_out: str | None = None


@dataclass(frozen=True)
class Axis:
    """What a trial is measured by: its name with its unit, and where a point has it.

    Attributes:
        measured: whether it is of the policy's own answers; else it is read off held-out log-probs.
    """

    label: str
    read: Callable[[Point], float | None]
    measured: bool = False


ACCURACY = Axis("held-out accuracy", lambda point: point.accuracy)
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
    evaluation, scores, done = trial.evaluation or {}, trial.eval, trial.status == "done"
    total = (evaluation.get("preferences") or {}).get("total") or {}
    accuracy, error = _accuracy(trial, total.get("accuracy") or {})
    objective = trial.run.objective if trial.run else None
    beta = _last_beta(trial.settings.get("train.beta") if objective is None else objective.model_dump()["beta"], done)
    margin = scores.get("rewards/margins", (total.get("margin") or {}).get("value"))
    sides = [scores.get(f"logratio/{side}_per_token") for side in ("chosen", "rejected")]
    modes = (evaluation.get("generation") or {}).get("modes") or {}
    growth = next((modes[mode]["length_growth"]["value"] for mode in ("sampled", "greedy") if modes.get(mode)), None)
    return Point(
        mark, trial.name, _label(trial.settings), done, beta, accuracy, error,
        margin / beta if margin is not None and beta else None,
        ((evaluation.get("drift") or {}).get("kl_per_token") or {}).get("value"),
        None if None in sides else sum(abs(side) for side in sides) / 2, growth, scores.get("length/margin_correlation"),
        "" if objective is None else _unit(objective), _protocol(evaluation),
        (trial.run and trial.run.held_out_digest) if "rewards/accuracies" in scores else
        (evaluation.get("protocol") or {}).get("pairs"))


def _accuracy(trial: Trial, evaluated: dict[str, float | None]) -> tuple[float | None, float | None]:
    """The held-out accuracy with its standard error: of the training's last evaluation, else of ``raydpo eval``."""
    accuracy = trial.eval.get("rewards/accuracies")
    if accuracy is None:
        value, low, high = (evaluated.get(key) for key in ("value", "low", "high"))
        return value, None if low is None else (high - low) / (2 * Z95)
    # Pairs of one prompt are alike: newer evaluations tell how many independent ones they are worth.
    pairs = trial.eval.get("effective_pairs") or ((trial.run and trial.run.summary) or {}).get("held_out_pairs")
    return accuracy, share_error(accuracy, pairs) if pairs else None


def _last_beta(beta: Any, done: bool) -> float | None:
    """With which the last evaluation was made: of a schedule its end, once a trial is there."""
    if isinstance(beta, dict):
        return beta.get("end") if done else None
    return beta


def _unit(objective: ObjectiveConfig) -> str:
    """Of the reward margin divided by beta; margins compare where it is the same."""
    unit, (first, *others) = "nats", objective.traits.values()
    if not others and first.per_token:
        unit += " a token"
    if not others and "f_divergence_type" in first.heeds and objective.f_divergence_type != "reverse_kl":
        unit = f"scores of {objective.f_divergence_type}"
        unit += f" {objective.f_alpha_divergence_coef:g}" if objective.f_divergence_type == "alpha_divergence" else ""
    if not objective.needs_reference:
        unit += " without a reference"
    return unit if objective.ld_alpha is None else f"{unit}, ld_alpha {objective.ld_alpha:g}"


def _protocol(evaluation: dict[str, Any]) -> str | None:
    if not evaluation:
        return None
    # Evaluations of earlier versions tell only these two.
    known = evaluation.get("protocol") or {key: (evaluation.get("generation") or {}).get(key)
                                           for key in ("prompts", "max_tokens")}
    return json.dumps({key: known.get(key) for key in PROTOCOL})


def _label(settings: dict[str, object]) -> str:
    """``beta 0.1, lr 1e-05``."""
    return ", ".join(f"{key.rsplit('.', 1)[-1]} {setting(key, value).text}" for key, value in settings.items())


def drift_axis(points: Sequence[Point]) -> Axis:
    """The measured drift where all trials have it of equal evaluations, else what held-out log-probs say of it."""
    return _axis(points, "drift: KL, nats a token", lambda point: point.kl,
                 "drift: change of log-probs, nats a token", lambda point: point.moved)


def length_axis(points: Sequence[Point]) -> Axis:
    """Likewise of length."""
    return _axis(points, "growth of the answers' length", lambda point: point.length_growth,
                 "correlation of margin and length", lambda point: point.length_pull)


def _axis(points: Sequence[Point], label: str, measured: Callable[[Point], float | None], other_label: str,
          other: Callable[[Point], float | None]) -> Axis:
    """What was measured, where all points have it alike; without another figure, of those measured as most are."""
    way, count = _usual_protocol(points, measured)
    if count and (count == len(points) or all(other(point) is None for point in points)):
        return Axis(label, lambda point: measured(point) if point.protocol == way else None, measured=True)
    return Axis(other_label, other)


def _usual_protocol(points: Sequence[Point], measured: Callable[[Point], float | None]) -> tuple[str | None, int]:
    """The protocol by which most points were measured, and how many."""
    ways = Counter(point.protocol for point in points if measured(point) is not None)
    return ways.most_common(1)[0] if ways else (None, 0)


def measured_otherwise(points: Sequence[Point]) -> list[Point]:
    """Where the drift of some trials is measured: those that lack it, or have it by another protocol than most."""
    way, count = _usual_protocol(points, lambda point: point.kl)
    return [point for point in points if point.kl is None or point.protocol != way] if count else []


def on_same_pairs(points: Sequence[Point]) -> bool:
    """Whether no two points are known to be measured on different held-out pairs."""
    return len({point.held_out for point in points} - {None}) < 2


def units_of_margin(points: Sequence[Point]) -> list[str]:
    """In which units margins were measured; more than one do not compare."""
    return list(dict.fromkeys(point.unit for point in points if point.margin is not None))


def recommend(points: Sequence[Point], drift: Axis) -> Recommendation:
    """The trial that drifts least of those whose accuracy is within one standard error of the best.

    That is the one-standard-error rule (Breiman et al., Classification and Regression Trees, 1984, section 3.4.3), with
    drift in the place of size. Only of trials whose accuracy is above that of a coin by more than chance: one that has
    learnt nothing does not drift. Equal drift: the larger beta.
    """
    known = [point for point in points if None not in (point.accuracy, point.error, drift.read(point))]
    if not known:
        return Recommendation(None, "No trial has both a held-out accuracy with its number of pairs and a drift yet, so "
                                    "none can be recommended. Held-out pairs (data.eval) are what a sweep is judged by.")
    first = max(known, key=lambda point: (point.accuracy, -drift.read(point)))
    if len(known) == 1:
        return Recommendation(None, f"{first.label or first.name} is the only trial so far that can be judged.")
    if not on_same_pairs(known):
        return Recommendation(None, "The trials are measured on different held-out pairs, so their accuracies do not "
                                    "compare. Hold out the same pairs in all of them: a file of their own (data.eval.path) "
                                    "that no setting of section data cuts or drops, or vary such settings in two sweeps.")
    learnt = [point for point in known if point.accuracy - 0.5 > Z95 * point.error]
    if not learnt:
        return Recommendation(None, f"No trial is better than a coin by more than chance: the best held-out accuracy is "
                                    f"{first.accuracy:.3f}, of {first.label or first.name}, and a coin has 0.5 with a "
                                    f"standard error of {first.error:.3f}. Train longer, raise train.lr, or "
                                    "hold out more pairs.")
    best = max(learnt, key=lambda point: (point.accuracy, -drift.read(point)))
    bound = best.accuracy - best.error
    close = [point for point in learnt if point.accuracy >= bound]
    chosen = min(close, key=lambda point: (drift.read(point), -(point.beta or 0.0)))
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
    if len(learnt) < len(known):
        reason += (f" {len(known) - len(learnt)} trial(s) are not better than a coin by more than chance and were not "
                   "considered.")
    left_out = len(points) - len(known)
    if left_out:
        reason += f" {left_out} trial(s) lack one of the two figures and were not considered."
    return Recommendation(chosen, reason)


def frontier_pictures(points: Sequence[Point], recommended: Point | None) -> list[Picture]:
    """Accuracy and margin against drift and against length, a mark for each trial. Without margins where these are in
    different units; none at all where the trials are measured on different held-out pairs."""
    if not on_same_pairs(points):
        return []
    drift, length, units = drift_axis(points), length_axis(points), units_of_margin(points)
    margin = Axis(", ".join(filter(None, ("margin / beta", *units))),
                  lambda point: point.margin if len(units) == 1 else None)
    pictures = [_picture(title, caption, points, x, y, recommended) for title, caption, x, y in (
        ("Accuracy and drift", UNBEATEN, drift, ACCURACY),
        ("Margin and drift", "A margin that grows with drift alone has been paid for, not learnt. It is divided by beta, so "
                             "that trials compare.", drift, margin),
        ("Accuracy and length", "Accuracy that comes with length may be length.", length, ACCURACY),
        ("Margin and length", "The margin, divided by beta, against length.", length, margin))]
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
