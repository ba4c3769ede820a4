"""Draws how success changed with drift, or with the number of sampled answers: one line for each run, one mark a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raydpo.pages.plot import INK, PALE, Picture, figure, svg, variable

__all__ = ["Path", "Spot", "path_picture"]

NAMED = 24
"""Largest number of marks that have the numbers of their rounds in the picture; more would overlap."""


@dataclass(frozen=True)
class Spot:
    """One mark: its place, standard errors (None if unknown), a short label, what it says when it is pointed at, and the id
    that links it to a row of a table."""

    x: float
    y: float
    x_error: float | None
    y_error: float | None
    label: str
    told: str
    mark: str


@dataclass(frozen=True)
class Path:
    """The marks of one run, joined in order of round."""

    name: str
    colour: str
    dashed: bool
    spots: Sequence[Spot]


def path_picture(title: str, caption: str, paths: Sequence[Path], xlabel: str, ylabel: str) -> Picture | None:
    """Draw paths over one another; return None if there is no mark."""
    paths = [path for path in paths if path.spots]
    if not paths:
        return None
    marks, many = {}, sum(len(path.spots) for path in paths)
    with figure(4.4, 3.0, aligned=True) as (made, axes):
        for path in paths:
            across, up = [spot.x for spot in path.spots], [spot.y for spot in path.spots]
            axes.plot(across, up, "--" if path.dashed else "-", color=path.colour, linewidth=1.2)
            for spot in path.spots:
                axes.errorbar(
                    [spot.x],
                    [spot.y],
                    spot.y_error or 0,
                    spot.x_error or 0,
                    fmt="none",
                    ecolor=PALE,
                    elinewidth=0.9,
                    zorder=1,
                )
                axes.plot([spot.x], [spot.y], "o", color=path.colour, markersize=6.5, gid=spot.mark)
                if many <= NAMED:
                    style = {"fontsize": 7.5, "color": INK, "textcoords": "offset points"}
                    axes.annotate(spot.label, (spot.x, spot.y), (5, -10), **style)
                marks[spot.mark] = spot.told
        axes.margins(0.08, 0.12)
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.set(xlabel=xlabel, ylabel=ylabel)
        legend = tuple((path.name, variable(path.colour), path.dashed) for path in paths) if len(paths) > 1 else ()
        return Picture(title, svg(made, title, caption, marks), caption, legend)
