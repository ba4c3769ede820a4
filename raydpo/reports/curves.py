"""Draws metrics over steps or rounds: thinned, smoothed, and with the values that are shown under the pointer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from raydpo.pages.plot import PALE, Picture, figure, svg, variable

__all__ = ["POINTS", "Curve", "bars_picture", "curve", "curves_picture", "phases_picture", "points"]

POINTS = 240
"""Largest number of points of a curve, for runs of any length: about its width in pixels on a phone."""
SMOOTH_FROM = 40
"""Number of points from which a running mean is drawn over a curve. It spans a twentieth of them."""


@dataclass(frozen=True)
class Curve:
    """One line of a picture. Each point stands for ``each`` rows of the table: their mean, lowest and highest value. A point
    of one row may have a standard error: ``low`` and ``high`` are then one below and above its value.

    Attributes:
        steps: the last step, or the round, of each point, [points].
        smooth: draw a running mean over the line; otherwise draw points on it.
        rows: what a row of the table is, in the plural: steps, evaluations or rounds.
    """

    name: str
    colour: str
    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    each: int
    smooth: bool
    dashed: bool = False
    rows: str = "steps"

    @property
    def running_mean(self) -> np.ndarray:
        """Running mean over a twentieth of the points, centred; over fewer points at the ends."""
        width = 2 * max(1, len(self.mean) // 40) + 1
        return pl.Series(self.mean).fill_nan(None).rolling_mean(width, min_samples=1, center=True).to_numpy()


def curve(
    table: pl.DataFrame, metric: str, name: str, colour: str, *, dashed: bool = False, rows: str = "steps"
) -> Curve | None:
    """Thin a metric of a table to at most ``POINTS`` points; None if the table has no value of it.

    Args:
        table: has the columns ``step`` and ``metric``.
        name, colour, dashed, rows: see ``Curve``.
    """
    if metric not in table.columns or table[metric].null_count() == table.height:
        return None
    each = -(-table.height // POINTS)
    value = pl.col(metric)
    thin = (
        table.select("step", value.cast(pl.Float64))
        .with_row_index("row")
        .group_by(pl.col("row") // each, maintain_order=True)
        .agg(pl.col("step").last(), value.mean().alias("mean"), value.min().alias("low"), value.max().alias("high"))
    )
    mean, low, high = (thin[column].to_numpy().astype(float) for column in ("mean", "low", "high"))
    return Curve(name, colour, thin["step"].to_numpy(), mean, low, high, each, len(mean) >= SMOOTH_FROM, dashed, rows)


def points(
    rows: Sequence[dict[str, Any]],
    key: str,
    name: str,
    colour: str,
    *,
    error: str | None = None,
    at: str = "round",
    dashed: bool = False,
) -> Curve | None:
    """Make a curve of a figure of each round; None if no round has it.

    Args:
        rows: have ``at``, ``key`` and ``error``; those without a value of ``key`` are left out.
        error: key of the standard error.
        at: key of the place on the x axis.
        name, colour, dashed: see ``Curve``.
    """
    known = [row for row in rows if row.get(key) is not None]
    if not known:
        return None
    places, mean = np.array([row[at] for row in known]), np.array([float(row[key]) for row in known])
    spread = np.array([float((error and row.get(error)) or 0.0) for row in known])
    return Curve(name, colour, places, mean, mean - spread, mean + spread, 1, False, dashed, "rounds")


def curves_picture(
    title: str,
    caption: str,
    curves: Sequence[Curve | None],
    ylabel: str,
    *,
    ylim: tuple[float, float] | None = None,
    level: float | None = None,
    log: bool = False,
    unit: str = "step",
) -> Picture | None:
    """Draw curves over one another; return None if there are none.

    Args:
        ylim: range of the y axis; None = set by the values.
        level: value of a dotted horizontal line.
        log: use a logarithmic axis if all values are positive and the largest is above 30 times the median.
        unit: what a whole number on the x axis counts.
    """
    curves = [one for one in curves if one is not None]
    if not curves:
        return None
    with figure(aligned=True) as (made, axes):
        for one in curves:
            if one.each > 1:
                axes.fill_between(one.steps, one.low, one.high, color=one.colour, alpha=0.18, linewidth=0)
            dash = "--" if one.dashed else "-"
            if one.smooth:
                axes.plot(one.steps, one.mean, color=one.colour, linewidth=0.6, alpha=0.5)
                axes.plot(one.steps, one.running_mean, dash, color=one.colour, linewidth=1.6)
            else:
                axes.plot(one.steps, one.mean, dash, color=one.colour, linewidth=1.4, marker="o", markersize=2.2)
            if (errors := _errors(one)) is not None:
                axes.errorbar(one.steps, one.mean, errors, fmt="none", ecolor=one.colour, elinewidth=0.8, alpha=0.6)
        if level is not None:
            axes.axhline(level, color=PALE, linewidth=0.9, linestyle=":")
        axes.set(xlabel=unit, ylabel=ylabel)
        _count_steps(axes)
        axes.set_ylim(*ylim or _range(curves, level))
        values = np.concatenate([one.mean for one in curves])
        if log and np.nanmin(values) > 0 and np.nanmax(values) > 30 * np.nanmedian(values):
            axes.set_yscale("log")
            axes.set_ylim(np.nanmin(values) / 1.3, np.nanmax(values) * 1.3)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda value, _: "")
        drawn = svg(made, title, caption)
    return Picture(
        title, drawn, f"{caption} {_point_text(curves)}".strip(), _legend(curves), _readout(made, axes, curves, unit)
    )


def bars_picture(title: str, caption: str, curves: Sequence[Curve | None], ylabel: str, unit: str) -> Picture | None:
    """Draw the values of curves as bars, stacked from the bottom upwards; return None if there are none."""
    curves = [one for one in curves if one is not None]
    if not curves:
        return None
    with figure(aligned=True) as (made, axes):
        base: dict[float, float] = {}
        for one in curves:
            axes.bar(one.steps, one.mean, 0.6, [base.get(step, 0.0) for step in one.steps], color=one.colour, alpha=0.8)
            base |= {step: base.get(step, 0.0) + value for step, value in zip(one.steps, one.mean, strict=True)}
        axes.set(xlabel=unit, ylabel=ylabel)
        axes.grid(False, axis="x")
        _count_steps(axes)
        drawn = svg(made, title, caption)
    return Picture(title, drawn, caption, _legend(curves), _readout(made, axes, curves, unit))


def phases_picture(table: pl.DataFrame, phases: dict[str, str]) -> Picture | None:
    """Draw the seconds of each step by phase, stacked.

    Args:
        phases: colour of each phase, by name, from the bottom upwards.
    """
    curves = [one for name, colour in phases.items() if (one := curve(table, f"time/{name}", name, colour)) is not None]
    if not curves:
        return None
    title, caption = "Time of a step", "Seconds of each phase, stacked."
    with figure(aligned=True) as (made, axes):
        base = np.zeros(len(curves[0].steps))
        for one in curves:
            top = base + np.nan_to_num(one.mean)
            axes.fill_between(
                one.steps, base, top, color=one.colour, alpha=0.8, linewidth=0, step="mid" if len(base) > 1 else None
            )
            base = top
        axes.set(xlabel="step", ylabel="seconds")
        _count_steps(axes)
        # A rare checkpoint or evaluation must not flatten all other steps.
        axes.set_ylim(0, max(1.6 * float(np.quantile(base, 0.9)), 1e-9))
        drawn = svg(made, title, caption)
    each = curves[0].each
    if each > 1:
        caption += f" Each point is the mean of {each:,} steps."
    return Picture(title, drawn, f"{caption} Tall peaks are cut off.", _legend(curves), _readout(made, axes, curves))


def _range(curves: Sequence[Curve], level: float | None) -> tuple[float, float]:
    """Range of the y axis: all means and most values. A single outlier among thousands must not flatten the rest."""
    values = np.concatenate(
        [one.mean for one in curves]
        + [np.quantile(side[np.isfinite(side)], [0.02, 0.98]) for one in curves for side in (one.low, one.high)]
        + ([] if level is None else [np.array([level])])
    )
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
    return low - margin, high + margin


def _count_steps(axes: Axes) -> None:
    """Label whole steps, few enough that labels such as ``100,000`` do not overlap."""
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")


def _errors(one: Curve) -> np.ndarray | None:
    """Return the standard errors of a curve's points; None if it has none."""
    return one.high - one.mean if one.each == 1 and (one.high > one.mean).any() else None


def _legend(curves: Sequence[Curve]) -> tuple[tuple[str, str, bool], ...]:
    return tuple((one.name, variable(one.colour), one.dashed) for one in curves) if len(curves) > 1 else ()


def _readout(made: Figure, axes: Axes, curves: Sequence[Curve], unit: str = "step") -> dict[str, Any]:
    """Return the data with which plots.js shows the values under the pointer.

    ``box``: left, top, right and bottom of the axes, in points from the upper left corner of the SVG. ``xlim``: steps at the
    left and right edge. ``unit``: what a step is. ``curves``: steps x, values y, null where a value is missing, and
    standard errors e, if there are any.
    """
    width, height = made.get_size_inches() * 72
    place = axes.get_position()
    box = (place.x0 * width, (1 - place.y1) * height, place.x1 * width, (1 - place.y0) * height)
    return {
        "box": [round(float(edge), 2) for edge in box],
        "xlim": [float(edge) for edge in axes.get_xlim()],
        "unit": unit,
        "curves": [
            {"name": one.name, "x": one.steps.tolist(), "y": [_rounded(value) for value in one.mean]}
            | ({} if (errors := _errors(one)) is None else {"e": [_rounded(value) for value in errors]})
            for one in curves
        ],
    }


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if np.isfinite(value) else None


def _point_text(curves: Sequence[Curve]) -> str:
    most = {rows: max(one.each for one in curves if one.rows == rows) for rows in dict.fromkeys(one.rows for one in curves)}
    told = " or ".join(f"{each:,} {rows}" for rows, each in most.items() if each > 1)
    return f"Each point is the mean of {told}, the band shows their lowest and highest." if told else ""
