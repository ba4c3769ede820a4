"""Finds known faults of DPO in the records of a run, and says what to do about them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import polars as pl

from raydpo.data.interval import share
from raydpo.pages.finding import Finding
from raydpo.rundir.read import RunRecord
from raydpo.rundir.watch import COLLAPSE, LAG, SPIKE_DEVIATIONS, UNBALANCED, WINDOW

__all__ = ["findings"]

FELL = 0.5
"""Share of held-out pairs whose chosen answer became less likely, above which it is reported."""
LENGTH_CORRELATION = 0.3
"""Correlation of margin and length difference, from which it is reported: length explains 9 % of the margins' variance."""
CHECKPOINT_SHARE = 0.05
EVALUATION_SHARE = 0.25
WAIT_SHARE = 0.1
"""Shares of the time above which checkpoints, evaluations, and waiting for data or for other ranks are reported."""
MEMORISED = 0.15
"""Difference of the accuracy on training pairs and on held-out pairs, above which it is reported."""
LOSS_ROSE = 0.02
"""Share by which the last held-out loss may be above the lowest one."""
LENGTH_GROWTH = 0.15
"""Growth of the answers' length that is reported if its interval is above this. Under DPO answers grow longer without
becoming better (Park et al., arXiv 2403.19159)."""
CALIBRATION = 0.1
"""Expected calibration error above which it is reported, if chance does not explain it."""
TIMES = {
    "checkpoint": (CHECKPOINT_SHARE, "Checkpoints take long"),
    "evaluation": (EVALUATION_SHARE, "Evaluations take long"),
    "data": (WAIT_SHARE, "Workers wait for data"),
    "wait": (WAIT_SHARE, "Workers wait for one another"),
}
REMEDIES = {
    "checkpoint": "Make fewer: train.checkpoint_every or train.checkpoint_minutes.",
    "evaluation": "Make fewer (train.eval_every), or hold out fewer pairs.",
    "data": "One thread of each worker prepares micro-batches; give each worker more CPUs.",
    "wait": "Ranks have unequal work in a step. 'raydpo plan' shows how equal it can be; more pairs a step help.",
}


def findings(run: RunRecord) -> list[Finding]:
    """Return what stands out, the most important first."""
    return [*_policy(run), *_held_out(run), *_evaluation(run), *_steps(run), *_time(run)]


def _policy(run: RunRecord) -> Iterator[Finding]:
    drift = _recent(run.steps, "logratio/chosen_per_token")
    if drift is not None and drift <= COLLAPSE:
        yield Finding(
            "The chosen answers have collapsed",
            f"Over the last {min(WINDOW, run.done)} steps the policy gives the tokens of the chosen answers "
            f"{math.exp(drift):.2g} of the probability that the reference gives them ({drift:.2f} nats a token).",
            "DPO only increases the difference of the two sides, and both may fall. Raise train.beta, lower train.lr, or "
            "train fewer steps.",
        )
    fell = run.held_out("logps/chosen_fell")[1]
    if fell is not None and fell > FELL:
        margin = run.held_out("rewards/margins")[1]
        cause = "The rejected answers do not fall faster, since the margin has not grown. Read"
        if margin is None or margin > 0:
            cause = (
                "The margin grows because the rejected answers fall faster. That is usual for DPO, and a fault only if the "
                "answers get worse: read"
            )
        yield Finding(
            "Chosen answers became less likely",
            f"In {fell:.0%} of the held-out pairs the chosen answer is less likely than under the reference.",
            f"{cause} the samples, and compare with a larger train.beta or a lower train.lr.",
        )
    correlation = run.held_out("length/margin_correlation")[1]
    where = "held-out"
    if correlation is None:
        correlation, where = _recent(run.steps, "length/margin_correlation"), "training"
    if correlation is not None and abs(correlation) >= LENGTH_CORRELATION:
        kind = "longer" if correlation > 0 else "shorter"
        yield Finding(
            "The margin follows length",
            f"Over {where} pairs the margin correlates with the difference in length at {correlation:+.2f}: the policy "
            f"prefers {kind} answers, which explains {correlation**2:.0%} of the variance of the margins.",
            "Length is the easiest thing to learn. 'raydpo audit' shows how much of it is in the data"
            + ("." if run.objective and run.objective.per_token else f"; {_normalised(run)} takes it out of the loss."),
        )


def _normalised(run: RunRecord) -> str:
    """Return the settings of the loss per token, with its own beta."""
    names = ("length/chosen", "length/rejected")
    lengths = [run.held_out(name)[1] or _recent(run.steps, name) for name in names]
    lengths = [value for value in lengths if value is not None]
    if run.objective is None or not lengths:
        return "train.loss=sigmoid_norm, with train.beta times the mean length of an answer,"
    return f"train.loss=sigmoid_norm train.beta={run.objective.beta_per_token(sum(lengths) / len(lengths))}"


def _held_out(run: RunRecord) -> Iterator[Finding]:
    if not run.evals.height or "loss" not in run.evals.columns:
        return
    yield from _labels(run)
    accuracy = None if _auc(run) is not None else run.held_out("rewards/accuracies")[1]
    pairs = run.held_out("pairs")[1] or (run.summary or {}).get("held_out_pairs")
    if accuracy is not None and pairs and run.evals["step"][-1] > 0:
        # Older runs do not store how many of their pairs are independent.
        count = run.held_out("effective_pairs")[1] or pairs
        within = share(accuracy * count, count)
        said = (
            f"The held-out accuracy is {accuracy:.3f} of {pairs:,.0f} pairs (95 % interval from {within['low']:.3f} to "
            f"{within['high']:.3f})."
        )
        if within["high"] < 0.5:
            yield Finding(
                "Ranks held-out pairs the wrong way round",
                said,
                "Chosen and rejected are most likely swapped in the training pairs or in the held-out pairs. Look at both "
                "with 'raydpo show', and check data.train.columns and data.eval.columns.",
            )
        elif within["low"] <= 0.5:
            why = "Train longer, raise train.lr, or hold out more pairs if the interval is wide."
            yield Finding("Not yet better than a coin", said, why)
        training = _recent(run.steps, "rewards/accuracies")
        if training is not None and training > max(accuracy + MEMORISED, within["high"]):
            yield Finding(
                "Better on training pairs than on others",
                f"Over the last {min(WINDOW, run.done)} steps the accuracy was {training:.3f} on training pairs, and is "
                f"{accuracy:.3f} on held-out ones.",
                "The policy memorises pairs. Train fewer epochs, raise train.beta, or add data.",
            )
    losses = run.evals.select("step", "loss").drop_nulls()
    if losses.height > 2:
        best = losses.row(int(losses["loss"].arg_min()), named=True)
        last = losses.row(-1, named=True)
        if last["loss"] > best["loss"] + LOSS_ROSE * abs(best["loss"]):
            yield Finding(
                "The held-out loss has risen again",
                f"It was lowest at step {best['step']:,} ({best['loss']:.4f}) and ended at {last['loss']:.4f}.",
                "Train fewer steps, or keep the best checkpoint: train.keep_best=eval_loss.",
            )


def _auc(run: RunRecord) -> float | None:
    """How well the last evaluation told desirable completions from undesirable ones; None without labels."""
    return run.held_out("rewards/auc")[1]


def _labels(run: RunRecord) -> Iterator[Finding]:
    auc, count = _auc(run), run.held_out("effective_labels")[1]
    if auc is None or not count or run.evals["step"][-1] == 0:
        return
    within = share(auc * count, count)
    said = (
        f"A desirable held-out answer has a higher reward than an undesirable one in {auc:.3f} of cases (AUC, 95 % interval "
        f"from {within['low']:.3f} to {within['high']:.3f})."
    )
    if within["high"] < 0.5:
        yield Finding(
            "Tells held-out labels the wrong way round",
            said,
            "Good and bad are most likely swapped in the labels of the training data or of the held-out data. Look at both "
            "with 'raydpo show'.",
        )
    elif within["low"] <= 0.5:
        why = "Train longer, raise train.lr, or hold out more answers if the interval is wide."
        yield Finding("Not yet better than a coin", said, why)


def _evaluation(run: RunRecord) -> Iterator[Finding]:
    evaluation = run.evaluation or {}
    modes = (evaluation.get("generation") or {}).get("modes") or {}
    for mode, measured in modes.items():
        growth = measured["length_growth"]
        if growth["low"] is not None and growth["low"] > LENGTH_GROWTH:
            yield Finding(
                "Answers have grown longer",
                f"{mode.capitalize()} answers have {growth['value']:.0%} more tokens than the reference's (95 % interval "
                f"from {growth['low']:.0%}).",
                f"Judges and people tend to prefer longer answers. {_at_equal_length(evaluation.get('wins'), mode)}",
            )
            break
    total = (evaluation.get("preferences") or {}).get("total") or {}
    error, chance = total.get("calibration_error"), total.get("calibration_chance")
    if error is not None and chance is not None and error > max(CALIBRATION, chance):
        yield Finding(
            "The rewards are not calibrated",
            f"The confidence of the rewards and the share of pairs that they rank right differ by {error:.2f} on average. "
            f"For calibrated rewards and as many pairs, chance alone gives up to {chance:.2f}.",
            "sigmoid(margin) is then not the probability of being preferred. The ranking can still be right.",
        )


def _at_equal_length(wins: list[dict[str, Any]] | None, mode: str) -> str:
    """Tell the win rates at equal length, or how to measure them."""
    told = [
        f"{each['equal_length']['value']:.0%} by {each['judge']}"
        for each in wins or ()
        if each["mode"] == mode and (each.get("equal_length") or {}).get("value") is not None
    ]
    if told:
        return f"The estimated win rate at equal length is {', '.join(told)}."
    return "With evaluate.judge, reward_model or score_with, 'raydpo eval' also estimates the win rate at equal length."


def _steps(run: RunRecord) -> Iterator[Finding]:
    steps = run.steps
    if "skipped" in steps.columns and (skipped := int(steps["skipped"].sum())):
        first = steps.filter(pl.col("skipped") > 0)["step"][0]
        yield Finding(
            "Steps were skipped",
            f"{skipped:,} of {run.done:,} steps, the first of them step {first:,}, had a loss or gradient that was not "
            "finite.",
            "The output of the run names their pairs. Lower train.lr, or look at the pairs with 'raydpo show'.",
        )
    spike = _spike(steps)
    if spike is not None:
        yield Finding(
            "The loss has spiked",
            f"The loss of step {spike['step']:,} is {spike['loss']:.4f}, the {WINDOW} steps before it had "
            f"{spike['usual']:.4f} on average.",
            "If it stayed high, lower train.lr or train.clip, or look for outliers in the data with 'raydpo audit'.",
        )
    routed = _recent(steps, "aux_loss")
    before = None if routed is None else steps["aux_loss"].head(WINDOW).mean()
    if before is not None and routed >= UNBALANCED * before:
        yield Finding(
            "The routers send more tokens to fewer experts",
            f"The router loss (aux_loss) is {routed:.2f} over the last {WINDOW} steps, and was {before:.2f} at first.",
            "Raise train.router_aux_loss_coef, or lower train.lr.",
        )
    if "slowest_rank" in steps.columns and steps.height >= WINDOW:
        last = steps.tail(WINDOW).drop_nulls(["slowest_rank"])
        lag = last["slowest_lag"].median() if last.height else None
        if last.height == WINDOW and last["slowest_rank"].n_unique() == 1 and lag >= LAG:
            yield Finding(
                "One worker is slow",
                f"Rank {last['slowest_rank'][0]:.0f} has been the slowest of the last {WINDOW} steps, by {lag:.0%} over the "
                "median rank; all others wait for it.",
                "Check its node for another job, a throttled device or a slow network link.",
            )


def _spike(steps: pl.DataFrame) -> dict[str, Any] | None:
    """Return the first step that ``training.watch`` counts as a spike."""
    if "loss" not in steps.columns:
        return None
    known = steps.select("step", "loss").drop_nulls()
    usual = pl.col("loss").shift(1).rolling_mean(WINDOW)
    spread = pl.max_horizontal(pl.col("loss").shift(1).rolling_std(WINDOW, ddof=0), 0.02 * usual.abs())
    found = known.with_columns(usual=usual, spread=spread).filter(
        pl.col("loss") > pl.col("usual") + SPIKE_DEVIATIONS * pl.col("spread")
    )
    return found.row(0, named=True) if found.height else None


def _time(run: RunRecord) -> Iterator[Finding]:
    if "time/step" not in run.steps.columns:
        return
    total = run.steps["time/step"].sum()
    summary = run.summary or {}
    if not total:
        return
    shares = {name: run.steps[f"time/{name}"].sum() / total for name in TIMES if f"time/{name}" in run.steps.columns}
    if summary.get("checkpoint_seconds"):  # includes the last checkpoint, after the last recorded step
        later = max(0.0, summary["checkpoint_seconds"] - shares.get("checkpoint", 0.0) * total)
        shares["checkpoint"] = summary["checkpoint_seconds"] / (total + later)
    for name, (limit, title) in TIMES.items():
        if shares.get(name, 0.0) > limit:
            yield Finding(title, f"{shares[name]:.0%} of the training's time.", REMEDIES[name])


def _recent(steps: pl.DataFrame, metric: str) -> float | None:
    """Mean of a metric over the last ``WINDOW`` steps."""
    return None if metric not in steps.columns else steps[metric].tail(WINDOW).mean()
