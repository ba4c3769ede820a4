"""An evaluation in the terminal: the figures of evaluation.json, with their intervals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.markup import escape

from raydpo.console import Console
from raydpo.evaluation.interval import Interval
from raydpo.training.report import plain_text

__all__ = ["print_evaluation"]

MOST_SOURCES = 40


def print_evaluation(console: Console, found: dict[str, Any]) -> None:
    """``found`` is what evaluation.json holds."""
    preferences = found["preferences"]
    total = preferences["total"]
    console.table(f"preferences: {total['pairs']:,} pairs, beta {found['beta']:g}, rewards of {found['reward_of']} "
                  f"({found['rewards'].replace('_', ' ')})",
                  ("", "value", "95 % interval"), list(_preference_rows(total)))
    groups = [(name, one) for name, one in preferences["by_source"].items() if len(preferences["by_source"]) > 1]
    groups = groups[:MOST_SOURCES] + [(_edges(one), one) for one in preferences["by_length"] if one["pairs"]]
    console.table("by source, and by tokens that the chosen answer is longer", ("", "pairs", "accuracy", "95 % interval",
                                                                               "margin"),
                  [(escape(plain_text(name)), f"{one['pairs']:,}", *_cells(one["accuracy"]), _figure(one["margin"]["value"]))
                   for name, one in groups])
    if found["generation"] is not None:
        _print_generation(console, found["generation"])
    if found["drift"] is not None:
        _print_drift(console, found["drift"])
    if found["wins"]:
        console.table("wins of the policy over the reference, ties one half",
                      ("", "win rate", "95 % interval", "at equal length", "95 % interval", "wins", "ties", "losses",
                       "not judged"),
                      [(escape(plain_text(f"{one['judge']}, {one['mode']}")), *_cells(one["win_rate"]),
                        *_cells(one["equal_length"]), f"{one['wins']:,}", f"{one['ties']:,}", f"{one['losses']:,}",
                        f"{one['not_judged']:,}") for one in found["wins"]])


def _preference_rows(total: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    yield "accuracy", *_cells(total["accuracy"])
    yield "reward margin", *_cells(total["margin"])
    yield "loss (sigmoid)", _figure(total["loss"]), ""
    yield "chosen more likely than rejected", *_cells(total["log_likelihood_accuracy"])
    yield ("expected calibration error", _figure(total["calibration_error"]),
           f"by chance up to {_figure(total['calibration_chance'])}")
    for key, label in (("longer_is_wrong", "the longer answer is wrong"), ("longer_is_right", "the longer answer is right")):
        yield f"accuracy where {label} ({total[key]['pairs']:,})", *_cells(total[key]["accuracy"])
    yield "pairs whose chosen fell", *_cells(total["chosen_fell"])


def _print_generation(console: Console, generation: dict[str, Any]) -> None:
    rows = []
    for mode, one in generation["modes"].items():
        for name in ("policy", "reference"):
            style = one[name]
            growth = _cells(one["length_growth"]) if name == "policy" else ("", "")
            rows.append((f"{name}, {mode}", *_cells(style["tokens"]), *growth, *(
                _figure(style[key]) for key in ("repetition", "distinct_1", "distinct_2", "cut"))))
    console.table(f"answers to {generation['prompts']:,} prompts, of at most {generation['max_tokens']:,} tokens",
                  ("", "tokens", "95 % interval", "growth", "95 % interval", "repetition", "distinct-1", "distinct-2",
                   "cut"), rows)


def _print_drift(console: Console, drift: dict[str, Any]) -> None:
    rows = [("of the samples' log-probs", *_cells(drift["kl"]), _figure(drift["std_error"]), *_cells(drift["kl_per_token"]))]
    exact = drift["rao_blackwell"]
    if exact is not None:
        rows.append(("exact at each step of them", *_cells(exact["kl"]), _figure(exact["std_error"]),
                     *_cells(exact["kl_per_token"])))
    console.table(f"drift KL(policy || reference) from {drift['samples']:,} samples of the policy, nats",
                  ("", "an answer", "95 % interval", "standard error", "a token", "95 % interval"), rows)


def _edges(one: dict[str, Any]) -> str:
    if one["from"] is None:
        return f"{one['to']} or less"
    if one["to"] is None:
        return f"{one['from']:+d} or more"
    return f"{one['from']:+d}" if one["from"] == one["to"] else f"{one['from']:+d} to {one['to']:+d}"


def _cells(interval: Interval) -> tuple[str, str]:
    spread = "" if interval["low"] is None else f"{_figure(interval['low'])} to {_figure(interval['high'])}"
    return _figure(interval["value"]), spread


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"
