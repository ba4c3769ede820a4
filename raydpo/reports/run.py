"""The page of one run: its course, the policy it trained, and what to look at."""

from __future__ import annotations

import functools
from typing import Any

import yaml

from raydpo.config.counting import EVERYTHING
from raydpo.pages.page import render
from raydpo.pages.plot import BAD, GOOD, PALE, SERIES, Picture
from raydpo.reports.curves import Curve, curve, curves_picture, phases_picture
from raydpo.reports.evaluation import evaluation_part, shown_samples
from raydpo.reports.findings import findings
from raydpo.reports.tables import Cell, Row, Table, duration, number, setting
from raydpo.rundir.read import RunRecord
from raydpo.rundir.summary import EVALUATION_TABLE
from raydpo.version import __version__

__all__ = ["run_page", "status_of"]

PHASES = {
    "forward": SERIES[0],
    "backward": SERIES[5],
    "optimizer": SERIES[2],
    "data": SERIES[4],
    "wait": SERIES[1],
    "checkpoint": SERIES[3],
    "evaluation": SERIES[6],
    "other": PALE,
}
SCRIPTS = ("pages/plots.js", "pages/tables.js")
CURVES: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("Loss", "loss", "loss", {}),
    ("Accuracy", "rewards/accuracies", "accuracy", {"level": 0.5}),
    ("Labels told apart", "rewards/auc", "AUC", {"level": 0.5}),
    ("Margin", "rewards/margins", "reward margin", {"level": 0.0}),
    ("Rewards", "rewards/{}", "reward", {"level": 0.0}),
    ("Drift", "logratio/{}_per_token", "nats a token", {"level": 0.0}),
    ("Estimated drift", "kl", "nats an answer", {}),
    ("Log-probs", "logps/{}", "nats", {}),
    ("Chosen fell", "logps/chosen_fell", "share of pairs", {"ylim": (-0.02, 1.02)}),
    ("Margin and length", "length/margin_correlation", "correlation", {"level": 0.0}),
    ("Lengths", "length/{}", "tokens", {}),
    ("Router loss", "aux_loss", "aux_loss", {}),
    ("Learning rate", "learning_rate", "learning rate", {}),
    ("Speed", "tokens_per_second", "tokens a second", {}),
)
"""(title, metric, label of the y axis, options of ``curves_picture``) of each picture of a run."""
CAPTIONS = {
    "Loss": "Compare it only between runs with the same loss and beta.",
    "Accuracy": "Share of pairs whose chosen answer has the higher reward; a tie counts one half. An answer alone is right "
    "if its reward is on the side of the loss's threshold that its label says.",
    "Labels told apart": "How often a desirable answer has a higher reward than an undesirable one: the area under the ROC "
    "curve.",
    "Margin": "Mean reward of chosen answers minus that of rejected ones.",
    "Rewards": "beta times the change of each side's log-prob against the reference. Where both fall, the chosen answers "
    "become less likely while the margin grows.",
    "Drift": "Change of the log-prob per token against the reference.",
    "Estimated drift": "The loss's estimate of KL(policy || reference), at least 0: the mean change of log-prob, of answers "
    "to other prompts where answers are alone.",
    "Log-probs": "Sums over an answer. Training steps vary with the lengths of their answers.",
    "Chosen fell": "Share of pairs whose chosen answer is less likely than under the reference.",
    "Margin and length": "Correlation of the margin with the difference in length. Near 1 the policy prefers the longer "
    "answer, near -1 the shorter one.",
    "Lengths": "Lengths of the answers in the data.",
    "Router loss": "The load-balancing loss of a mixture of experts, without its coefficient; no part of the loss above. It "
    "is the number of experts of a token if all are used alike, and grows as fewer experts do the work.",
    "Learning rate": "As scheduled, by step.",
    "Speed": "Prompts count once a pair; checkpoints and evaluations are not included.",
}
MASKED = {
    "Rewards": "beta times the change of each side's log-prob against the reference, over the tokens that count. Where both "
    "fall, the chosen answers become less likely while the margin grows.",
    "Drift": "Change of the log-prob against the reference per token that counts.",
    "Log-probs": "Sums over the tokens that count, each with its weight. Training steps vary with their number.",
    "Chosen fell": "Share of pairs in whose chosen answer the tokens that count are less likely than under the reference.",
    "Margin and length": "Correlation of the margin with the difference in length, both of the tokens that count. Near 1 "
    "the policy prefers the longer answer, near -1 the shorter one.",
    "Lengths": "Tokens of the answers in the data that count, each with its weight.",
}
"""Captions where not every token of a completion counts."""


def run_page(run: RunRecord) -> str:
    """Render the page. Where something is missing, because the run is unfinished or holds nothing out, the page says so."""
    summary = run.summary or {}
    part = evaluation_part(run.evaluation) if run.evaluation else None
    return render(
        "reports/run.html",
        scripts=SCRIPTS,
        run=run,
        version=__version__,
        status=status_of(run),
        facts=_facts(run),
        findings=findings(run),
        curves=_curves(run),
        before_after=_before_after(run),
        sources=_sources(run),
        times=_times(run),
        phases=phases_picture(run.steps, PHASES),
        evaluation=part,
        samples=shown_samples(summary.get("samples")),
        cache=_cache(run),
        settings=yaml.safe_dump(run.config, sort_keys=False, width=100, allow_unicode=True) if run.config else None,
    )


def status_of(run: RunRecord) -> str:
    """Describe in words how far the run is."""
    if run.summary is not None:
        return f"Finished after {run.summary['steps']:,} steps."
    if not run.steps.height:
        return "No step has been recorded yet: the run is starting, or it stopped before its first checkpoint."
    wanted = run.setting("train.steps")
    where = f" of {wanted:,} are recorded" if wanted else " are recorded"
    if not wanted and "epoch" in run.steps.columns:
        where += f", epoch {run.steps['epoch'][-1]:.2f} of {run.setting('train.epochs') or 1}"
    return (
        f"Not finished: {run.done:,} steps{where}. The run is in progress or was stopped; the same command continues "
        "it. Records are written with each checkpoint."
    )


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    summary, steps, known = run.summary or {}, run.steps, run.steps.columns
    lora, path = run.setting("model.lora"), run.setting("model.path")
    trains = f"LoRA, r {lora['r']}" if lora else "all weights" if run.config else None
    seconds = summary.get("train_seconds", steps["time/step"].sum() if "time/step" in known else None)
    memory = steps["peak_memory_bytes"].max() if "peak_memory_bytes" in known and steps.height else None
    losses = [steps["loss"][at] for at in (0, -1)] if steps.height else [None]
    unit = run.setting("data.ranked") or "pairs"
    facts = [
        ("model", path and path.rstrip("/").rsplit("/", 1)[-1]),
        ("what trains", "an adapter" if run.setting("model.adapter") else trains),
        *_counted(run),
        *((name, _setting(run, f"train.{name}")) for name in ("loss", "beta")),
        ("learning rate", _form(run.setting("train.lr"), "g")),
        (f"{unit} a step", run.setting("train.pairs_per_step")),
        ("steps", f"{run.done:,}" if steps.height else None),
        (f"{unit} seen", _form(steps["pairs"].sum(), ",.0f") if "pairs" in known else None),
        ("training time, with evaluations and checkpoints", None if seconds is None else duration(seconds)),
        ("tokens a second, without these", _form(summary.get("tokens_per_second"), ",.0f")),
        ("peak memory of a worker", None if memory is None else f"{memory / 2**30:.2f} GiB"),
        ("first loss, last loss", None if None in losses else ", ".join(f"{loss:.4f}" for loss in losses)),
    ]
    return [(name, str(value)) for name, value in facts if value is not None]


def _counted(run: RunRecord) -> list[tuple[str, str | None]]:
    """Facts about what counts, where not every token does."""
    trained, measured = run.counted
    if trained in (None, EVERYTHING) and measured in (None, EVERYTHING):
        return []
    return [("tokens that count", trained), ("in held-out pairs", None if measured == trained else measured)]


def _curves(run: RunRecord) -> list[Picture]:
    training = functools.partial(curve, run.steps)
    held_out = functools.partial(curve, run.evals, dashed=True, rows="evaluations")

    def curves(metric: str) -> list[Curve | None]:
        """Curves of training and held-out pairs; with ``{}`` in the metric, of chosen and rejected answers."""
        if "{}" not in metric:
            return [training(metric, "training", GOOD), held_out(metric, "held out", BAD)]
        return [
            draw(metric.format(side), f"{side}{kind}", colour)
            for draw, kind in ((training, ""), (held_out, ", held out"))
            for side, colour in (("chosen", GOOD), ("rejected", BAD))
        ]

    captions = CAPTIONS | (MASKED if _counted(run) else {})
    pictures = [
        curves_picture(title, captions[title], curves(metric), ylabel, **options)
        for title, metric, ylabel, options in CURVES
    ]
    clip, norms = run.setting("train.clip"), curves("grad_norm")
    pictures.append(curves_picture("Gradient norm", _clipping(run), norms, "norm", level=clip, log=True))
    return [picture for picture in pictures if picture is not None]


def _clipping(run: RunRecord) -> str:
    clip = run.setting("train.clip")
    if clip is None or "grad_norm" not in run.steps.columns:
        return "Norm over all weights that train, before clipping."
    share_clipped = (run.steps["grad_norm"] > clip).mean() or 0.0
    return f"Norm over all weights that train. Dotted: train.clip, {clip:g}; {share_clipped:.0%} of the steps were clipped."


def _before_after(run: RunRecord) -> Table | None:
    rows = []
    for key, label in EVALUATION_TABLE:
        before, after = run.held_out(key.removeprefix("eval_"))
        if before is not None or after is not None:
            rows.append(Row(label, [number(before), number(after)]))
    first, last = (run.evals["step"][0], run.evals["step"][-1]) if run.evals.height else (0, 0)
    columns = ("held-out pairs", f"step {first:,}", f"step {last:,}")
    return Table("Held-out pairs before and after", columns, rows) if rows else None


def _sources(run: RunRecord) -> Table | None:
    """Metrics by source: of the held-out pairs, or of the last training steps if nothing is held out."""
    if not run.sources:
        return None
    table, where = run.steps.tail(50), f"training pairs, last {min(50, run.done)} steps"
    if run.evals.height:
        table, where = run.evals.tail(1), "held-out pairs, last evaluation"

    def mean(column: str) -> Cell:
        return number(table[column].mean() if column in table.columns else None)

    metrics = ("loss", "rewards/accuracies", "rewards/margins")
    rows = [Row(name, [mean(f"{name}/{metric}") for metric in metrics]) for name in run.sources]
    return Table(f"By source: {where}", ("source", "loss", "accuracy", "margin"), rows)


def _times(run: RunRecord) -> Table | None:
    if "time/step" not in run.steps.columns or not (total := run.steps["time/step"].sum()):
        return None
    spent = [(name, run.steps[f"time/{name}"].sum()) for name in PHASES if f"time/{name}" in run.steps.columns]
    rows = [
        Row(name, [Cell(duration(seconds), seconds), number(seconds / total, ".1%")])
        for name, seconds in sorted(spent, key=lambda one: -one[1])
    ]
    return Table("Where the time went", ("phase", "time", "share"), rows)


def _cache(run: RunRecord) -> list[tuple[str, str]]:
    """Facts about the reference cache that the run was trained against."""
    summary = run.summary or {}
    reference = summary.get("reference") or {}
    hits = summary.get("cache_hit_rate")
    parts = [reference.get(part) or run.setting(f"reference.{part}") for part in ("path", "adapter")]
    facts = [
        ("reference", " + ".join(filter(None, parts))),
        ("identity", reference.get("identity")),
        ("cache", run.setting("cache.uri")),
        ("in the cache when the run began", None if hits is None else f"{hits:.0%} of the completions"),
        ("step-0 gate", (summary.get("gate") or "").removeprefix("step-0 gate: ")),
    ]
    return [(name, str(value)) for name, value in facts if value]


def _setting(run: RunRecord, key: str) -> str | None:
    value = run.setting(key)
    return None if value is None else setting(key, value).text


def _form(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)
