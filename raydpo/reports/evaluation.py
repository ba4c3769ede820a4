"""The result of ``raydpo eval`` as tables and pictures, from evaluation.json in the run directory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from raydpo.pages.plot import GOOD, INK, Picture, bin_name, figure, length_bars, svg
from raydpo.pages.text import shown
from raydpo.reports.tables import Cell, Row, Table, interval, number, text

__all__ = ["EvaluationPart", "evaluation_part", "evaluation_tables", "shown_samples"]


@dataclass(frozen=True)
class EvaluationPart:
    """The evaluation section of a run's page.

    Attributes:
        about: sentences above the tables.
        samples: prompts with the answers of policy and reference.
    """

    about: str
    tables: list[Table]
    pictures: list[Picture]
    samples: list[dict[str, str]]


def evaluation_part(evaluation: dict[str, Any]) -> EvaluationPart:
    """Return what a page shows of an evaluation.

    Args:
        evaluation: the content of evaluation.json; parts that were not measured are null.
    """
    preferences = evaluation["preferences"]
    total = preferences["total"]
    pictures = []
    if bins := [each for each in total.get("calibration") or [] if each["pairs"]]:
        pictures.append(_calibration(bins, total))
    if known := [each for each in preferences.get("by_length") or [] if each["pairs"]]:
        caption = (
            "Accuracy by the difference in length of the two answers, with 95 % intervals. A slope means that the policy "
            "ranks by length."
        )
        shares = [each["accuracy"] for each in known]
        pictures.append(length_bars("Accuracy by length", caption, known, shares, "accuracy"))
    about = (
        f"{_measured(preferences)} of {', '.join(evaluation['data'])}, beta {evaluation['beta']:g}, reference "
        f"{evaluation['reference']['path']}."
    )
    if counted := evaluation.get("train_on"):
        about += f" Preferences are measured on the tokens that count: {counted}."
    if evaluation.get("trained_on"):
        about += (
            f" The policy was trained on the prompts of {evaluation['trained_on']:,} of them, "
            "so the figures also measure what it memorised."
        )
    elif evaluation.get("trained_on", 0) is None:
        about += " It is not known whether the policy was trained on some of them."
    if (of := evaluation.get("reward_of", "log-ratios")) != "log-ratios":
        about += f" Rewards are computed from {of}, as in the loss that trained the policy."
    return EvaluationPart(about, evaluation_tables(evaluation), pictures, shown_samples(evaluation.get("samples")))


def _measured(preferences: dict[str, Any]) -> str:
    """``3 pairs``, ``3 completions with labels``, or both."""
    pairs, alone = preferences["total"]["pairs"], ((preferences.get("labels") or {}).get("total") or {}).get("completions")
    told = [f"{pairs:,} pairs"] if pairs or not alone else []
    return " and ".join([*told, *([f"{alone:,} completions with labels"] if alone else [])])


def shown_samples(samples: list[dict[str, str]] | None) -> list[dict[str, str]]:
    """Return the samples with visible signs in place of invisible characters and those that change the writing direction."""
    return [{side: shown(said) for side, said in sample.items()} for sample in samples or []]


def evaluation_tables(evaluation: dict[str, Any]) -> list[Table]:
    """Return the tables of an evaluation: preferences over pairs and over labels first, then answers, drift, wins and
    rewards of functions, where they were measured."""
    tables = [_preferences(evaluation)] if evaluation["preferences"]["total"]["pairs"] else []
    if labels := evaluation["preferences"].get("labels"):
        tables.append(_labels(labels))
    if generation := evaluation.get("generation"):
        tables.append(_generation(generation))
    if drift := evaluation.get("drift"):
        tables.append(_drift(drift))
    if wins := evaluation.get("wins"):
        tables.append(_wins(wins))
    if rewards := evaluation.get("reward_functions"):
        tables.append(_rewards(rewards))
    return tables


def _preferences(evaluation: dict[str, Any]) -> Table:
    preferences = evaluation["preferences"]
    total = preferences["total"]
    groups = [("all pairs", total)]
    sources = preferences.get("by_source") or {}
    if len(sources) > 1:
        groups += list(sources.items())
    groups += [
        (f"chosen minus rejected {bin_name(each)}", each) for each in preferences.get("by_length") or [] if each["pairs"]
    ]
    for side, key in (("chosen", "longer_is_right"), ("rejected", "longer_is_wrong")):
        if total.get(key):
            groups.append((f"the {side} answer is longer", total[key]))
    columns: dict[str, Callable[[dict[str, Any]], Cell]] = {
        "pairs": lambda each: number(each["pairs"], ",.0f"),
        "accuracy": lambda each: interval(each.get("accuracy")),
        "reward margin": lambda each: interval(each.get("margin"), ".2f"),
        "loss (sigmoid)": lambda each: number(each.get("loss")),
        "chosen more likely than rejected": lambda each: interval(each.get("log_likelihood_accuracy")),
        "calibration error": lambda each: number(each.get("calibration_error")),
        "calibration error by chance, up to": lambda each: number(each.get("calibration_chance")),
        "pairs whose chosen fell": lambda each: interval(each.get("chosen_fell")),
    }
    rows = [Row(name, [read(each) for read in columns.values()]) for name, each in groups]
    which = "held-out pairs" if evaluation.get("held_out") else "the pairs that were measured"
    return Table(f"Preferences of {which}", ("pairs of", *columns), rows)


def _labels(labels: dict[str, Any]) -> Table:
    """Figures of completions with a label, without another to compare them with."""
    sources = labels["by_source"]
    groups = [("all completions", labels["total"]), *(sources.items() if len(sources) > 1 else ())]
    columns: dict[str, Callable[[dict[str, Any]], Cell]] = {
        "desirable": lambda each: number(each["desirable"], ",.0f"),
        "undesirable": lambda each: number(each["undesirable"], ",.0f"),
        "AUC": lambda each: interval(each["auc"]),
        "desirable that rose": lambda each: interval(each["desirable_rose"]),
        "undesirable that fell": lambda each: interval(each["undesirable_fell"]),
        "reward of desirable": lambda each: interval(each["desirable_reward"], ".2f"),
        "reward of undesirable": lambda each: interval(each["undesirable_reward"], ".2f"),
    }
    rows = [Row(name, [read(each) for read in columns.values()]) for name, each in groups]
    label = "Completions with labels; AUC: how often a desirable one has a higher reward than an undesirable one"
    return Table(label, ("completions of", *columns), rows)


def _generation(generation: dict[str, Any]) -> Table:
    rows = []
    for mode, measured in generation["modes"].items():
        for side in ("policy", "reference"):
            each = measured[side]
            growth = interval(measured["length_growth"], "+.0%") if side == "policy" else number(None)
            variety = [number(each["repetition"], ".1%"), number(each["distinct_1"]), number(each["distinct_2"])]
            cells = [interval(each["tokens"], ".0f"), growth, *variety, number(each["cut"], ".1%")]
            rows.append(Row(f"{side}, {mode}", cells))
    return Table(
        f"Answers to {generation['prompts']:,} prompts, at most {generation['max_tokens']:,} tokens each",
        ("answers", "tokens", "length growth", "repeated 4-grams", "distinct 1-grams", "distinct 2-grams", "cut"),
        rows,
    )


def _drift(drift: dict[str, Any]) -> Table:
    kinds = (("log-probs of the samples", drift), ("exact at each position of the samples", drift.get("rao_blackwell")))
    rows = [
        Row(name, [interval(each["kl"]), number(each.get("std_error")), interval(each["kl_per_token"])])
        for name, each in kinds
        if each
    ]
    label = f"Drift KL(policy || reference) from {drift['samples']:,} samples of the policy, nats"
    return Table(label, ("estimated from", "an answer", "standard error", "a token"), rows)


def _wins(wins: list[dict[str, Any]]) -> Table:
    columns = ("judge", "answers", "win rate", "at equal length", "wins", "ties", "losses", "not judged")
    rows = []
    for each in wins:
        counts = [number(each.get(name), ",.0f") for name in ("wins", "ties", "losses", "not_judged")]
        rates = [interval(each["win_rate"]), interval(each.get("equal_length"))]
        rows.append(Row(each["judge"], [text(each["mode"]), *rates, *counts]))
    return Table("Wins of the policy over the reference; a tie counts one half", columns, rows)


def _rewards(rewards: list[dict[str, Any]]) -> Table:
    rows = []
    for each in rewards:
        means = [interval(each[side]) for side in ("policy", "reference")]
        counts = [number(each["answers"], ",.0f")]
        counts += [number(sum(each[name].values()), ",.0f") for name in ("none", "errors")]
        weight = number(each["weight"], "g")
        rows.append(Row(each["name"], [text(each["mode"]), weight, *means, interval(each["difference"], "+.3f"), *counts]))
    columns = ("function", "answers", "weight", "policy", "reference", "difference", "of each", "does not apply", "failed")
    return Table("Rewards of answers by reward functions, means with 95 % intervals over prompts", columns, rows)


def _calibration(bins: list[dict[str, Any]], total: dict[str, Any]) -> Picture:
    predicted, observed, low, high = (
        np.array([each[name] for each in bins], float) for name in ("predicted", "observed", "low", "high")
    )
    chance = total.get("calibration_chance")
    caption = (
        "How often the rewards rank a pair right, against how confident they are, with 95 % intervals. On the dashed "
        f"line confidence is probability. The mean distance from it is {total['calibration_error']:.3f}"
        + ("." if chance is None else f"; for perfectly calibrated rewards chance gives up to {chance:.3f}.")
    )
    with figure() as (made, axes):
        axes.plot([0.5, 1], [0.5, 1], color=INK, linewidth=0.8, linestyle="--")
        bars = np.abs([low - observed, high - observed])
        axes.errorbar(predicted, observed, bars, color=GOOD, fmt="o-", markersize=4, linewidth=1.4, elinewidth=1.0)
        axes.set(xlim=(0.49, 1.01), ylim=(0, 1.02), xlabel="confidence: sigmoid of the margin", ylabel="ranked right")
        return Picture("Calibration", svg(made, "Calibration", caption), caption)
