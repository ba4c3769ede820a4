"""The benchmark's figures as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raydpo.terminal.console import Console

__all__ = ["print_point"]

_RATES = (
    ("seconds", "s", "{:.3f}"),
    ("pairs_per_second", "pairs/s", "{:.2f}"),
    ("tokens_per_second", "tokens/s", "{:.0f}"),
    ("mfu", "MFU", "{:.1%}"),
)
_PARTS = {
    "reference_pass": "reference pass",
    "train_step": "training step",
    "memory": "peak memory",
    "memory_alike": "peak memory at about equal positions of a pass",
}
_NAMES = {("reference_pass", "cached"): "ratio", ("memory", "online"): "ratio", ("memory_alike", "online"): "ratio"}
"""Name of the main ratio of a part. All others are called ``ratio_vs_<side>``."""


def print_point(point: dict[str, Any], console: Console) -> None:
    """Print the result of one workload: its size, how far the two sides differ, and a table of what was measured.

    The table has the figures of each side (``compare.figures``). If the sides agree, it also has raydpo's figures as ratios
    to those of the others (``compare.ratios``).
    """
    work, gaps = point["workload"], point["gaps"]
    console.say(
        f"{work['name']}: {work['pairs']:,} pairs, {work['prompt_tokens']:,} prompt and "
        f"{work['completion_tokens']:,} completion tokens; positions: "
        + ", ".join(f"{count:,} {layout}" for layout, count in work["positions"].items())
    )
    console.say(
        f"{'the same' if point['equal'] else 'NOT the same'} on both sides: reference log-probs differ by "
        f"{gaps['reference_per_token']:.1e} nats a token on average, first losses by "
        f"{gaps['first_loss_cached']:.1e}, losses of all steps by {gaps['loss_cached']:.1e} at most"
    )
    sides = [name for name in ("raydpo", "cached", "online") if name in point["train_step"]]
    for name, tries in point["tried"].items():
        console.say(
            f"{_title(point, name)} reference, tried: "
            + "; ".join(
                f"{one['pairs_per_pass']} pair(s) at a time (at most {one['largest_pass']:,} positions): "
                f"{one['step_seconds']:.3f} s a step, {one['bytes'] / 2**30:.2f} GiB"
                for one in tries
            )
        )
    titles = [
        name if name == "raydpo" else f"{_title(point, name)} reference, {_pairs_per_pass(point, name)} pair(s) at a time"
        for name in sides
    ]
    rows = [row for part, label in _PARTS.items() for row in _rows(point, part, label, sides)]
    console.table("benchmark", ("", "", *titles, *(f"raydpo / {name}" for name in sides[1:])), rows)


def _rows(point: dict[str, Any], part: str, label: str, sides: Sequence[str]) -> list[tuple[str, ...]]:
    found, rows = point[part], []
    kinds = (("bytes", "GiB", "{:.2f}"),) if part.startswith("memory") else _RATES
    for key, unit, shape in kinds:
        values = [found.get(side, {}).get(key) for side in sides]
        if all(value is None for value in values):
            continue
        told = ["" if value is None else shape.format(value / 2**30 if key == "bytes" else value) for value in values]
        compared = ["" if rows else _ratio(point, part, other) for other in sides[1:]]
        rows.append(("" if rows else label, unit, *told, *compared))
    return rows


def _title(point: dict[str, Any], name: str) -> str:
    return f"{point['baseline'].split()[0]}, {name}"


def _pairs_per_pass(point: dict[str, Any], name: str) -> int:
    """Pairs of a forward pass in the fastest run, which the ratios use."""
    return min(point["tried"][name], key=lambda one: one["step_seconds"])["pairs_per_pass"]


def _ratio(point: dict[str, Any], part: str, other: str) -> str:
    """The ratio as text; empty if the sides disagree or were not compared."""
    value = point[part].get(_NAMES.get((part, other), f"ratio_vs_{other}"))
    return "" if value is None else f"{value:.2f}"
