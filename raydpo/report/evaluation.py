"""What ``raydpo eval`` found, as tables and pictures: its file is evaluation.json in the run directory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from raydpo.audit.extremes import shown
from raydpo.pages.plot import GOOD, INK, PALE, Picture, figure, svg
from raydpo.report.tables import Row, Table, interval, number, share, text

__all__ = ["EvaluationPart", "evaluation_part", "shown_samples"]


@dataclass(frozen=True)
class EvaluationPart:
    """The part of a run's page about its evaluation; ``samples`` are prompts with the answers of policy and reference."""

    about: str
    tables: list[Table]
    pictures: list[Picture]
    samples: list[dict[str, str]]


def evaluation_part(evaluation: dict[str, Any]) -> EvaluationPart:
    """What a page shows of an evaluation.

    Args:
        evaluation: what evaluation.json holds; parts that were not measured are null.
    """
    preferences = evaluation["preferences"]
    total = preferences["total"]
    lengths = preferences.get("by_length") or []
    pairs = "held-out pairs" if evaluation.get("held_out") else "the pairs that were measured"
    tables = [_preferences(preferences, lengths, pairs)]
    if generation := evaluation.get("generation"):
        tables.append(_generation(generation))
    if wins := evaluation.get("wins"):
        tables.append(_wins(wins))
    pictures = []
    if bins := [each for each in total.get("calibration") or [] if each["pairs"]]:
        pictures.append(_calibration(bins, total))
    if known := [each for each in lengths if each["pairs"]]:
        pictures.append(_by_length(known))
    about = (f"{total['pairs']:,} pairs of {', '.join(evaluation['data'])}, at beta {evaluation['beta']:g}, against the "
             f"reference {evaluation['reference']['path']}.")
    if evaluation.get("trained_on"):
        about += f" {evaluation['trained_on']:,} of them ask what the policy was trained on: they measure memory, too."
    if (of := evaluation.get("reward_of", "log-ratios")) != "log-ratios":
        about += f" Rewards are of {of}, as in the loss that trained the policy."
    if drift := evaluation.get("drift"):
        about += (f" The policy has drifted {_words(drift['kl'])} nats an answer from the reference, "
                  f"{_words(drift['kl_per_token'], '.3f')} nats a token (KL divergence, from {drift['samples']:,} answers "
                  "of its own).")
    return EvaluationPart(about, tables, pictures, shown_samples(evaluation.get("samples")))


def shown_samples(samples: list[dict[str, str]] | None) -> list[dict[str, str]]:
    """Data and models may say anything: what is invisible, or turns the direction of the text, is made visible."""
    return [{side: shown(said) for side, said in sample.items()} for sample in samples or []]


def _preferences(preferences: dict[str, Any], lengths: list[dict[str, Any]], pairs: str) -> Table:
    total = preferences["total"]
    groups = [("all pairs", total)]
    sources = preferences.get("by_source") or {}
    if len(sources) > 1:
        groups += list(sources.items())
    groups += [(f"length difference {bin_name(each)}", each) for each in lengths if each["pairs"]]
    groups += [(name, total[key]) for key, name in (("longer_is_right", "the longer is the chosen"),
                                                    ("longer_is_wrong", "the shorter is the chosen")) if total.get(key)]
    rows = [Row(name, [number(each["pairs"], ",.0f"), interval(each.get("accuracy")), interval(each.get("margin"), ".2f"),
                       interval(each.get("log_likelihood_accuracy")), number(each.get("calibration_error")),
                       number(each.get("calibration_chance")),
                       interval(each.get("chosen_fell"))]) for name, each in groups]
    return Table(f"Preferences of {pairs}", ("pairs of", "pairs", "accuracy", "margin", "chosen more likely",
                                    "calibration error", "of it by chance, up to", "chosen fell"), rows)


def _generation(generation: dict[str, Any]) -> Table:
    rows = []
    for mode, measured in generation["modes"].items():
        for side in ("policy", "reference"):
            each = measured[side]
            growth = interval(measured["length_growth"], "+.0%") if side == "policy" else number(None)
            rows.append(Row(f"{mode}, {side}", [interval(each["tokens"], ".0f"), growth, share(each["repetition"]),
                                                number(each["distinct_1"]), number(each["distinct_2"]), share(each["cut"])]))
    return Table(f"Answers to {generation['prompts']:,} prompts, of at most {generation['max_tokens']:,} tokens",
                 ("answers", "tokens", "length growth", "repeated 4-grams", "distinct 1-grams", "distinct 2-grams",
                  "cut"), rows)


def _wins(wins: list[dict[str, Any]]) -> Table:
    return Table("Wins against the reference", ("judge", "answers", "win rate", "at equal length", "won", "tied", "lost",
                                                "not judged"), [
        Row(each["judge"], [text(each["mode"]), interval(each["win_rate"]), interval(each.get("equal_length")),
                            *(number(each.get(name), ",.0f") for name in ("wins", "ties", "losses", "not_judged"))])
        for each in wins])


def _calibration(bins: list[dict[str, Any]], total: dict[str, Any]) -> Picture:
    predicted, observed, low, high = (np.array([each[name] for each in bins], float)
                                      for name in ("predicted", "observed", "low", "high"))
    with figure() as (made, axes):
        axes.plot([0.5, 1], [0.5, 1], color=INK, linewidth=0.8, linestyle="--")
        axes.errorbar(predicted, observed, np.abs([low - observed, high - observed]), color=GOOD, fmt="o-", markersize=4,
                      linewidth=1.4, elinewidth=1.0)
        axes.set(xlim=(0.49, 1.01), ylim=(0, 1.02), xlabel="confidence: sigmoid of the margin", ylabel="right")
        caption = ("How often the rewards prefer the chosen answer, against how sure they are of the answer they prefer, "
                   "with 95 % intervals. On the dashed line they are probabilities; they are off by "
                   f"{total['calibration_error']:.3f} on average{_by_chance(total)}.")
        return Picture("Calibration", svg(made, "Calibration", caption), caption)


def _by_chance(total: dict[str, Any]) -> str:
    chance = total.get("calibration_chance")
    return "" if chance is None else f"; calibrated rewards of as many pairs would be by up to {chance:.3f}"


def _by_length(bins: list[dict[str, Any]]) -> Picture:
    values, low, high = (np.array([each["accuracy"][name] for each in bins]) for name in ("value", "low", "high"))
    with figure() as (made, axes):
        axes.bar(range(len(bins)), values, 0.7, color=PALE, yerr=np.abs([low - values, high - values]),
                 error_kw={"ecolor": INK, "elinewidth": 1.0})
        axes.axhline(0.5, color=INK, linewidth=0.8, linestyle="--")
        axes.set(ylim=(0, 1), xlabel="chosen longer by, tokens", ylabel="accuracy")
        axes.set_xticks(range(len(bins)), [bin_name(each, "\n… ") for each in bins], fontsize=7.5)
        axes.grid(False, axis="x")
        caption = ("Accuracy among pairs of about the same difference in length, with 95 % intervals. A slope "
                   "means that the policy ranks by length.")
        return Picture("Accuracy by length", svg(made, "Accuracy by length", caption), caption)


def bin_name(each: dict[str, Any], between: str = " … ") -> str:
    """A bin of length differences, tokens; open where from or to is None."""
    if each["from"] is None:
        return "any number of" if each["to"] is None else f"≤ {each['to']}"
    if each["to"] is None:
        return f"≥ {each['from']}"
    return str(each["from"]) if each["from"] == each["to"] else f"{each['from']}{between}{each['to']}"


def _words(value: dict[str, float], form: str = ".2f") -> str:
    return interval(value, form).text
