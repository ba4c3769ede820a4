"""Draws matplotlib figures as inline SVG with the page's colours, which follow light and dark mode. Text stays text."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

__all__ = ["BAD", "GOOD", "INK", "PALE", "SERIES", "Picture", "bin_name", "figure", "length_bars", "svg", "variable"]

INK = "#010101"
"""Placeholder for the text colour of the page's style sheet; ``svg`` replaces it. The other colours are placeholders too."""
GRID = "#020202"
GOOD = "#030303"
"""Better values, the policy, chosen answers."""
BAD = "#040404"
"""Worse values, held-out curves, rejected answers."""
PALE = "#050505"
"""Context, such as error bars."""
SERIES = tuple(f"#0601{number:02x}" for number in range(1, 9))
"""Placeholders for the colours of series of equal rank."""
_VARIABLES = {INK: "--ink", GRID: "--line", GOOD: "--good", BAD: "--bad", PALE: "--pale"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES, 1)
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "raydpo",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    # Names come from users: a dollar sign in a name does not start a formula.
    "text.parse_math": False,
}


_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def _styled() -> Iterator[None]:
    """Set matplotlib's style, one thread at a time: its settings are global, and trials of a sweep end in threads."""
    with _ONE_AT_A_TIME, matplotlib.rc_context(_STYLE):
        yield


@dataclass(frozen=True)
class Picture:
    """A figure of a page.

    Attributes:
        legend: (name, colour as given by ``variable``, whether the line is dashed) of each line.
        readout: values that plots.js shows under the pointer, or None: see ``report.curves``.
    """

    title: str
    svg: str
    caption: str
    legend: tuple[tuple[str, str, bool], ...] = ()
    readout: dict[str, Any] | None = None


@contextmanager
def figure(width: float = 4.4, height: float = 2.8, *, aligned: bool = False) -> Iterator[tuple[Figure, Axes]]:
    """Make a figure with one pair of axes. Width and height are in inches; the default can be read on a phone.

    Args:
        aligned: use fixed margins, so that pictures below one another line up. It also halves the time to draw.
    """
    with _styled():
        made = Figure(figsize=(width, height), layout="none" if aligned else "constrained")
        if aligned:
            made.subplots_adjust(left=0.165, bottom=0.165, right=0.965, top=0.93)
        yield made, made.add_subplot()


def svg(made: Figure, title: str, about: str, marks: Mapping[str, str] | None = None, frame: int | None = None) -> str:
    """Return the figure as an ``<svg>`` element with a title and a description for screen readers.

    Args:
        marks: text to show when an artist is pointed at, tapped or focused, by the gid of the artist (one word).
        frame: number of the frame that is visible at first. Artists with gid ``frame-0``, ``frame-1-dots`` and so on belong
            to frames; a script shows the others.
    """
    sink = io.StringIO()
    with _styled():
        # savefig would draw the figure a second time.
        FigureCanvasSVG(made).print_svg(sink, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = sink.getvalue()
    text = text[text.index("<svg") :]
    for colour, name in _VARIABLES.items():
        text = text.replace(colour, f"var({name})")
    # Most bytes of the page are digits of coordinates, and no screen shows more than two decimals.
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]).replace("\n", ""), text)
    text = re.sub(r'font-family: [^;"]*', "font-family: inherit", text)
    text = re.sub(r"\n\s+", "\n", text)
    # Several figures share a page, so each prefixes its identifiers.
    prefix = re.sub(r"\W+", "-", title.lower())
    text = re.sub(r'id="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'(href="#|url\(#)', rf"\1{prefix}-", text)
    for gid, said in (marks or {}).items():
        text = text.replace(
            f'<g id="{prefix}-{gid}">',
            f'<g class="mark" data-mark="{gid}" tabindex="0" role="img" '
            f'aria-label="{escape(said)}"><title>{escape(said)}</title>',
        )
    text = re.sub(
        rf'<g id="{prefix}-frame-(\d+)[^"]*"',
        lambda found: f'<g data-frame="{found[1]}"' + ("" if int(found[1]) == frame else ' display="none"'),
        text,
    )
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # A screen reader sees no parts of an image, but marks must be visible to it.
    role = "group" if marks else "img"
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', rf'<svg role="{role}" \1', text, count=1)
    text = re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", text, count=1)
    start = text.index(">") + 1
    return f"{text[:start]}<title>{escape(title)}</title><desc>{escape(about)}</desc>{text[start:]}"


def variable(colour: str) -> str:
    """Return the CSS variable of a placeholder colour."""
    return f"var({_VARIABLES[colour]})"


def length_bars(
    title: str, caption: str, bins: Sequence[dict[str, Any]], shares: Sequence[dict[str, float]], ylabel: str
) -> Picture:
    """Draw a share of pairs by how many tokens longer the chosen answer is, with 95 % intervals.

    Args:
        bins: ``from`` and ``to`` of each bin, see ``bin_name``. shares: ``value``, ``low`` and ``high`` of each bin.
    """
    values, low, high = (np.array([each[name] for each in shares]) for name in ("value", "low", "high"))
    with figure() as (made, axes):
        intervals, style = np.abs([low - values, high - values]), {"ecolor": INK, "elinewidth": 1.0}
        axes.bar(range(len(bins)), values, 0.7, color=PALE, yerr=intervals, error_kw=style)
        axes.axhline(0.5, color=INK, linewidth=0.8, linestyle="--")
        axes.set(ylim=(0, 1), xlabel="chosen longer by, tokens", ylabel=ylabel)
        axes.set_xticks(range(len(bins)), [bin_name(each, "\n… ") for each in bins], fontsize=7.5)
        axes.grid(False, axis="x")
        return Picture(title, svg(made, title, caption), caption)


def bin_name(each: dict[str, Any], between: str = " … ") -> str:
    """Name a bin of length differences, tokens. A bin is open where ``from`` or ``to`` is None."""
    if each["from"] is None:
        return "any number of" if each["to"] is None else f"≤ {each['to']}"
    if each["to"] is None:
        return f"≥ {each['from']}"
    return str(each["from"]) if each["from"] == each["to"] else f"{each['from']}{between}{each['to']}"
