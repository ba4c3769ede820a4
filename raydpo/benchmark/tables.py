"""The benchmark's figures as a table and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raydpo.terminal.console import Console

__all__ = ["plot", "print_point"]

_RATES = (
    ("seconds", "s", "{:.3f}"),
    ("pairs_per_second", "pairs/s", "{:.2f}"),
    ("tokens_per_second", "tokens/s", "{:.0f}"),
    ("mfu", "MFU", "{:.1%}"),
)
_PARTS = {
    "reference_pass": "reference pass",
    "train_step": "training step",
    "job": "whole job, raydpo without Ray",
    "sweep": "{} betas, raydpo without Ray",
    "memory": "peak memory",
    "memory_alike": "peak memory at about equal positions of a pass",
}
_NAMES = {
    ("reference_pass", "cached"): "ratio",
    ("sweep", "online"): "ratio",
    ("memory", "online"): "ratio",
    ("memory_alike", "online"): "ratio",
}
"""Name of the main ratio of a part. All others are called ``ratio_vs_<side>``."""


def print_point(point: dict[str, Any], console: Console) -> None:
    """Print what one workload compared, then ``compare.figures`` and, if the sides agree, ``compare.ratios``."""
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
    rows = [
        row for part, label in _PARTS.items() for row in _rows(point, part, label.format(point["sweep"]["betas"]), sides)
    ]
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


def plot(points: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw pairs per second of each side for the reference pass and for a step, with one group of bars per workload."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(6 + 2 * len(points), 4), layout="constrained")
    for axis, part in zip(axes, ("reference_pass", "train_step"), strict=True):
        sides = [name for name in ("raydpo", "cached", "online") if name in points[0][part]]
        for number, name in enumerate(sides):
            bars = axis.bar(
                [index + 0.8 * (number + 0.5) / len(sides) - 0.4 for index in range(len(points))],
                [point[part][name]["pairs_per_second"] for point in points],
                0.8 / len(sides),
                label=name if name == "raydpo" else _title(points[0], name),
            )
            axis.bar_label(bars, labels=[_bar_label(point, part, name) for point in points], fontsize=8)
        axis.set_xticks(range(len(points)), [point["workload"]["name"] for point in points], fontsize=8)
        axis.set_title(_PARTS[part], fontsize=9)
        axis.set_ylabel("pairs per second")
        axis.legend(fontsize=8)
    figure.suptitle(
        "above a bar: how many times as fast raydpo is, and TRL's pairs of a forward pass (the fastest tried)", fontsize=9
    )
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _bar_label(point: dict[str, Any], part: str, name: str) -> str:
    ratio = _ratio(point, part, name)
    told = [f"{ratio} x"] if ratio else []
    if part == "train_step" and name in point["tried"]:
        told.append(f"{_pairs_per_pass(point, name)} pair(s)")
    return "\n".join(told)
