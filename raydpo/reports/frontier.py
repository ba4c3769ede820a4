"""The trials of a sweep as points: accuracy on held-out pairs against drift and length, and the recommended trial."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from raydpo.config import ObjectiveConfig
from raydpo.data.interval import Z95, share, share_error
from raydpo.pages.plot import BAD, GOOD, INK, PALE, Picture, figure, svg
from raydpo.reports.tables import setting
from raydpo.rundir.read import SweepRecord, TrialRecord, different_tokens, length_growth

__all__ = [
    "Point",
    "Recommendation",
    "counted_apart",
    "drift_axis",
    "frontier_pictures",
    "length_axis",
    "measured_otherwise",
    "on_same_pairs",
    "points_of",
    "recommend",
    "units_of_margin",
]

NAMED = 12
"""Largest number of points that have labels in the pictures; more labels would overlap."""
PROTOCOL = ("pairs", "prompts", "seed", "max_tokens", "modes", "samples", "temperature", "engine", "reference")
"""Settings of an evaluation that change drift and length of the answers."""


@dataclass(frozen=True)
class Point:
    """An evaluated trial, by figures that can be compared between values of beta. A figure is None if it was not measured.

    Attributes:
        mark: gid that links pictures and table.
        done: whether the training is complete.
        beta: beta of the last evaluation; None if unknown.
        accuracy, error: held-out accuracy and its standard error; with labels (``of_labels``) the area under the ROC curve.
        low: lower bound of its 95 % interval (Wilson's, which holds for few pairs, too).
        margin: held-out reward margin divided by beta, in ``unit``: nats, or nats a token for a loss per token.
        kl: drift measured on the policy's own answers, nats a token.
        moved: substitute for ``kl``: change of the log-prob per token of held-out answers, nats, mean of both sides; of the
            tokens that count.
        length_growth: growth of the policy's own answers, a share.
        length_pull: substitute for ``length_growth``: correlation of margin and length difference.
        protocol: how ``kl`` and ``length_growth`` were measured. They compare only where it is equal.
        held_out: digest of the held-out pairs and of what counts in them. Accuracies compare only where it is equal.
        counted: what counts in the held-out pairs, in words; None if unknown.
    """

    mark: str
    name: str
    label: str
    done: bool
    beta: float | None
    accuracy: float | None
    error: float | None
    low: float | None
    margin: float | None
    kl: float | None
    moved: float | None
    length_growth: float | None
    length_pull: float | None
    unit: str = ""
    protocol: str | None = None
    held_out: str | None = None
    counted: str | None = None
    of_labels: bool = False

    @property
    def shown(self) -> str:
        """The settings, or the name if there are none."""
        return self.label or self.name


@dataclass(frozen=True)
class Axis:
    """An axis of a picture: its label with the unit, and how to read the value of a point.

    Attributes:
        measured: whether the value is measured on the policy's own answers rather than on held-out log-probs.
    """

    label: str
    read: Callable[[Point], float | None]
    measured: bool = False


ACCURACY = Axis("held-out accuracy", lambda point: point.accuracy)
UNBEATEN = "Up and to the left is better. The line joins the trials that no other trial beats in both figures."
MOVED = (
    "The margin is divided by beta, so that trials compare. If it grows only with drift, the policy has moved without "
    "learning more."
)
BY_LABELS = (
    " Accuracy is the area under the ROC curve here: how often a desirable answer has a higher reward than an "
    "undesirable one."
)
LONGER = "If accuracy grows with length, it may only be a preference for length."


@dataclass(frozen=True)
class Recommendation:
    """The recommended trial, None if there is none, and the reason in sentences."""

    reason: str
    point: Point | None = None


def points_of(sweep: SweepRecord) -> list[Point]:
    """Return the trials that have been evaluated, including unfinished ones."""
    return [_point(f"trial-{number}", trial) for number, trial in enumerate(sweep.trials) if trial.eval or trial.evaluation]


def _point(mark: str, trial: TrialRecord) -> Point:
    evaluation, scores, done = trial.evaluation or {}, trial.eval, trial.status == "done"
    total = (evaluation.get("preferences") or {}).get("total") or {}
    labels = ((evaluation.get("preferences") or {}).get("labels") or {}).get("total") or {}
    accuracy, error, low = _accuracy(trial, labels.get("auc") or total.get("accuracy") or {})
    objective = trial.run.objective if trial.run else None
    beta = _last_beta(trial.settings.get("train.beta") if objective is None else objective.model_dump()["beta"], done)
    margin = scores.get("rewards/margins", (total.get("margin") or {}).get("value"))
    sides = [scores.get(f"logratio/{side}_per_token") for side in ("chosen", "rejected")]
    return Point(
        mark,
        trial.name,
        _label(trial.settings),
        done,
        beta,
        accuracy,
        error,
        low,
        margin / beta if margin is not None and beta else None,
        ((evaluation.get("drift") or {}).get("kl_per_token") or {}).get("value"),
        None if None in sides else sum(abs(side) for side in sides) / 2,
        (length_growth(evaluation) or {}).get("value"),
        scores.get("length/margin_correlation"),
        "" if objective is None else _unit(objective),
        _protocol(evaluation),
        *_measured_on(trial),
        of_labels="rewards/auc" in scores or bool(labels),
    )


def _measured_on(trial: TrialRecord) -> tuple[str | None, str | None]:
    """Digest of the held-out pairs that the accuracy is of, and what counts in them in words."""
    if "rewards/accuracies" in trial.eval:
        return (trial.run.held_out_digest, trial.run.counted[1]) if trial.run else (None, None)
    evaluation = trial.evaluation or {}
    protocol = evaluation.get("protocol") or {}
    parts = [protocol.get(name) for name in ("pairs", "counted")]  # evaluations on all tokens have no second part
    return " ".join(filter(None, parts)) or None, evaluation.get("train_on")


def _accuracy(trial: TrialRecord, evaluated: dict[str, float | None]) -> tuple[float | None, ...]:
    """Return the held-out accuracy, its standard error and the lower bound of its interval.

    They come from the last evaluation in training, or else from ``raydpo eval``.
    """
    # Labels out of balance make an accuracy of more than one half without any learning, but not an area under the curve.
    ranks = "rewards/auc" in trial.eval
    accuracy = trial.eval.get("rewards/auc" if ranks else "rewards/accuracies")
    if accuracy is None:
        value, low, high = (evaluated.get(key) for key in ("value", "low", "high"))
        return value, None if low is None else (high - low) / (2 * Z95), low
    # Pairs of one prompt are not independent; newer evaluations store the effective number.
    pairs = trial.eval.get("effective_labels" if ranks else "effective_pairs") or (
        (trial.run and trial.run.summary) or {}
    ).get("held_out_pairs")
    if not pairs:
        return accuracy, None, None
    return accuracy, share_error(accuracy, pairs), share(accuracy * pairs, pairs)["low"]


def _last_beta(beta: Any, done: bool) -> float | None:
    """Return the beta of the last evaluation. For a schedule it is the end value, and known only if the trial is done."""
    if isinstance(beta, dict):
        return beta.get("end") if done else None
    return beta


def _unit(objective: ObjectiveConfig) -> str:
    """Return the unit of the reward margin divided by beta. Margins compare only where it is equal."""
    unit, (first, *others) = "nats a token" if objective.per_token else "nats", objective.traits.values()
    if not others and "f_divergence_type" in first.heeds and objective.f_divergence_type != "reverse_kl":
        unit = f"scores of {objective.f_divergence_type}"
        unit += f" {objective.f_alpha_divergence_coef:g}" if objective.f_divergence_type == "alpha_divergence" else ""
    if not objective.needs_reference:
        unit += " without a reference"
    return unit if objective.ld_alpha is None else f"{unit}, ld_alpha {objective.ld_alpha:g}"


def _protocol(evaluation: dict[str, Any]) -> str | None:
    if not evaluation:
        return None
    # Earlier versions stored only these two.
    known = evaluation.get("protocol") or {
        key: (evaluation.get("generation") or {}).get(key) for key in ("prompts", "max_tokens")
    }
    return json.dumps({key: known.get(key) for key in PROTOCOL})


def _label(settings: dict[str, object]) -> str:
    """Format settings, such as ``beta 0.1, lr 1e-05``."""
    return ", ".join(f"{key.rsplit('.', 1)[-1]} {setting(key, value).text}" for key, value in settings.items())


def drift_axis(points: Sequence[Point]) -> Axis:
    """Return the axis of drift: KL if all trials measured it alike, else the change of held-out log-probs."""
    moved = Axis("drift: change of log-probs, nats a token", lambda point: point.moved)
    return _axis(points, "drift: KL, nats a token", lambda point: point.kl, moved)


def length_axis(points: Sequence[Point]) -> Axis:
    """Return the axis of length: growth if all trials measured it alike, else the correlation with the margin."""
    pull = Axis("correlation of margin and length", lambda point: point.length_pull)
    return _axis(points, "growth of the answers' length", lambda point: point.length_growth, pull)


def _axis(points: Sequence[Point], label: str, measured: Callable[[Point], float | None], other: Axis) -> Axis:
    """Return the measured axis if all points have it by one protocol, or if nothing else is known; else the other axis."""
    way, count = _usual_protocol(points, measured)
    if count and (count == len(points) or all(other.read(point) is None for point in points)):
        return Axis(label, lambda point: measured(point) if point.protocol == way else None, measured=True)
    return other


def _usual_protocol(points: Sequence[Point], measured: Callable[[Point], float | None]) -> tuple[str | None, int]:
    """Return the protocol that most points were measured by, and their number."""
    ways = Counter(point.protocol for point in points if measured(point) is not None)
    return ways.most_common(1)[0] if ways else (None, 0)


def measured_otherwise(points: Sequence[Point]) -> list[Point]:
    """Return the points without a measured drift, or with another protocol than most; empty if no drift is measured."""
    way, count = _usual_protocol(points, lambda point: point.kl)
    return [point for point in points if point.kl is None or point.protocol != way] if count else []


def on_same_pairs(points: Sequence[Point]) -> bool:
    """Whether all points with known held-out pairs have the same ones."""
    return len({point.held_out for point in points} - {None}) < 2


def counted_apart(points: Sequence[Point]) -> list[str]:
    """What counts in the held-out pairs, in words, if the points are measured on different tokens; else empty."""
    return different_tokens((point.held_out, point.counted) for point in points)


def units_of_margin(points: Sequence[Point]) -> list[str]:
    """Return the units of the margins. Margins of different units do not compare."""
    return list(dict.fromkeys(point.unit for point in points if point.margin is not None))


def recommend(points: Sequence[Point], drift: Axis) -> Recommendation:
    """Recommend the trial with the least drift among those whose accuracy is within one standard error of the best.

    This is the one-standard-error rule (Breiman et al., Classification and Regression Trees, 1984, section 3.4.3), with
    drift in place of tree size. Trials that are not better than a coin by more than chance are left out, since a policy
    that has learnt nothing does not drift. Among equal drifts, the larger beta is taken.
    """
    known = [point for point in points if None not in (point.accuracy, point.error, drift.read(point))]
    if not known:
        return Recommendation(
            "No trial has both a held-out accuracy and a drift yet, so none can be recommended. A sweep needs held-out "
            "pairs (data.eval)."
        )
    first = max(known, key=lambda point: (point.accuracy, -drift.read(point)))
    if len(known) == 1:
        return Recommendation(f"{first.shown} is the only trial with an accuracy and a drift so far.")
    if words := counted_apart(known):
        return Recommendation(
            f"The trials are measured on different tokens of the held-out pairs ({'; '.join(words)}), so their accuracies "
            "do not compare. With data.eval.train_on, for example data.eval.train_on=completion, all are measured on the "
            "same tokens."
        )
    if not on_same_pairs(known):
        return Recommendation(
            "The trials are measured on different held-out pairs, so their accuracies do not compare. Hold out the same "
            "pairs in all of them: a separate file (data.eval.path) that no setting of section data changes. Or make two "
            "sweeps."
        )
    learnt = [point for point in known if point.low > 0.5]
    if not learnt:
        return Recommendation(
            f"No trial is better than a coin by more than chance: the best held-out accuracy is {first.accuracy:.3f} "
            f"(standard error {first.error:.3f}), of {first.shown}. Train longer, raise train.lr, or hold out more pairs."
            + (BY_LABELS if first.of_labels else "")
        )
    best = max(learnt, key=lambda point: (point.accuracy, -drift.read(point)))
    bound = best.accuracy - best.error
    close = [point for point in learnt if point.accuracy >= bound]
    chosen = min(close, key=lambda point: (drift.read(point), -(point.beta or 0.0)))
    if chosen is best:
        reason = f"{best.shown} has the best held-out accuracy, {best.accuracy:.3f} (standard error {best.error:.3f})"
        reason += (
            f", and the least drift of the {len(close)} trials within one standard error of it: "
            f"{drift.read(best):.3g} nats a token."
            if len(close) > 1
            else f"; no other trial is within one standard error of it. Its drift is {drift.read(best):.3g} nats a token."
        )
    else:
        reason = (
            f"{chosen.shown} has a held-out accuracy of {chosen.accuracy:.3f}, within one standard error ({best.error:.3f}) "
            f"of the best, {best.accuracy:.3f} of {best.shown}. It drifts least of the {len(close)} trials within that "
            f"range: {drift.read(chosen):.3g} against {drift.read(best):.3g} nats a token."
        )
    if len(learnt) < len(known):
        reason += (
            f" {len(known) - len(learnt)} trial(s) are not better than a coin by more than chance and were not considered."
        )
    if left_out := len(points) - len(known):
        reason += f" {left_out} trial(s) lack one of the two figures and were not considered."
    return Recommendation(reason + (BY_LABELS if chosen.of_labels else ""), chosen)


def frontier_pictures(points: Sequence[Point], recommended: Point | None) -> list[Picture]:
    """Draw accuracy and margin against drift and against length, one mark for each trial.

    Margins in different units are not drawn. Nothing is drawn if the trials are measured on different held-out pairs, or on
    different tokens of them.
    """
    if counted_apart(points) or not on_same_pairs(points):
        return []
    drift, length, units = drift_axis(points), length_axis(points), units_of_margin(points)
    label = ", ".join(filter(None, ("margin / beta", *units)))
    margin = Axis(label, lambda point: point.margin if len(units) == 1 else None)
    kinds = (
        ("Accuracy and drift", UNBEATEN, drift, ACCURACY),
        ("Margin and drift", MOVED, drift, margin),
        ("Accuracy and length", LONGER, length, ACCURACY),
        ("Margin and length", "The margin, divided by beta, against length.", length, margin),
    )
    pictures = [_picture(title, caption, points, x, y, recommended) for title, caption, x, y in kinds]
    return [picture for picture in pictures if picture is not None]


def _picture(
    title: str, caption: str, points: Sequence[Point], x: Axis, y: Axis, recommended: Point | None
) -> Picture | None:
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
            if len(known) <= NAMED:  # labels point to the middle, alternately above and below
                side, away = ("right", -6) if across > middle else ("left", 6)
                offset, style = (away, -9 if number % 2 else 5), {"fontsize": 7.5, "color": INK}
                axes.annotate(_short(point, known), (across, up), offset, ha=side, textcoords="offset points", **style)
            told = f"{point.shown}: {y.label} {up:.3f}, {x.label} {across:.3g}"
            marks[point.mark] = told + (" (recommended)" if chosen else "")
        axes.margins(0.1, 0.14)
        axes.locator_params(axis="x", nbins=5)
        axes.set(xlabel=x.label, ylabel=y.label)
        return Picture(title, svg(made, title, caption, marks), caption)


def unbeaten(points: Sequence[Point], x: Axis, y: Axis) -> list[Point]:
    """Return the points that no other point beats by less x and more y, in order of x."""
    line: list[Point] = []
    for point in sorted(points, key=lambda point: (x.read(point), -y.read(point))):
        if not line or y.read(point) > y.read(line[-1]):
            line.append(point)
    return line


def _short(point: Point, points: Sequence[Point]) -> str:
    """Return the parts of the label in which the points differ, at most 24 characters."""
    parts = [set(other.label.split(", ")) for other in points]
    common = set.intersection(*parts) if len(parts) > 1 else set()
    return ", ".join(part for part in point.label.split(", ") if part not in common)[:24]
