"""Matplotlib figures as inline SVG whose colours are the page's: they follow light and dark, and text stays text."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

__all__ = ["BAD", "GOOD", "INK", "PALE", "SERIES", "Picture", "figure", "svg", "variable"]

INK = "#010101"
"""Stand-in for the colour of text in the page's style sheet, which no figure would use by chance; so are the others."""
GRID = "#020202"
GOOD = "#030303"
"""Of what is better."""
BAD = "#040404"
"""Of what is worse."""
PALE = "#050505"
"""Of what is beside the point."""
SERIES = tuple(f"#0601{number:02x}" for number in range(1, 9))
"""Stand-ins for colours of equal rank."""
_VARIABLES = {INK: "--ink", GRID: "--line", GOOD: "--good", BAD: "--bad", PALE: "--pale"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES, 1)}
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "raydpo", "font.family": "sans-serif", "font.size": 9.0, "axes.titlesize": 10.0,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GRID, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID,
    "grid.linewidth": 0.5, "figure.facecolor": "none", "axes.facecolor": "none", "legend.frameon": False,
    # Names come from people: a dollar sign in one is no formula.
    "text.parse_math": False,
}


_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def _styled() -> Iterator[None]:
    """matplotlib's settings are the process's, and the trials of a sweep end in threads."""
    with _ONE_AT_A_TIME, matplotlib.rc_context(_STYLE):
        yield


@dataclass(frozen=True)
class Picture:
    """A figure of a page.

    Attributes:
        legend: names, their colours as ``variable`` gives them, and whether their lines are dashed.
        readout: what plots.js shows of it under the pointer, or None: see ``report.curves``.
    """

    title: str
    svg: str
    caption: str
    legend: tuple[tuple[str, str, bool], ...] = ()
    readout: dict[str, Any] | None = None


@contextmanager
def figure(width: float = 4.4, height: float = 2.8, *, aligned: bool = False) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one pair of axes, in inches, narrow enough that its text can be read on a phone.

    Args:
        aligned: margins are the same whatever the labels, so that pictures below one another line up; half the time, too.
    """
    with _styled():
        made = Figure(figsize=(width, height), layout="none" if aligned else "constrained")
        if aligned:
            made.subplots_adjust(left=0.165, bottom=0.165, right=0.965, top=0.93)
        yield made, made.add_subplot()


def svg(made: Figure, title: str, about: str, marks: Mapping[str, str] | None = None, frame: int | None = None) -> str:
    """The figure as an ``<svg>`` element with a title and a description for those who do not see it.

    Args:
        marks: what to say of an artist when it is pointed at, tapped or focused, by its gid, which is one word.
        frame: which to show of the artists whose gid is ``frame-0``, ``frame-1-dots`` and so on; a script shows others.
    """
    sink = io.StringIO()
    with _styled():
        # Not savefig, which draws everything once more to no end.
        FigureCanvasSVG(made).print_svg(sink, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = sink.getvalue()
    text = text[text.index("<svg") :]
    for colour, name in _VARIABLES.items():
        text = text.replace(colour, f"var({name})")
    # A hundredth of a point is finer than any screen, and most of the page is digits.
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]).replace("\n", ""), text)
    text = re.sub(r'font-family: [^;"]*', "font-family: inherit", text)
    text = re.sub(r"\n\s+", "\n", text)
    # Identifiers are made unique to the figure: several of them share a page.
    prefix = re.sub(r"\W+", "-", title.lower())
    text = re.sub(r'id="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'(href="#|url\(#)', rf"\1{prefix}-", text)
    for gid, said in (marks or {}).items():
        text = text.replace(f'<g id="{prefix}-{gid}">', f'<g class="mark" data-mark="{gid}" tabindex="0" role="img" '
                            f'aria-label="{escape(said)}"><title>{escape(said)}</title>')
    text = re.sub(rf'<g id="{prefix}-frame-(\d+)[^"]*"', lambda found: f'<g data-frame="{found[1]}"' + (
        "" if int(found[1]) == frame else ' display="none"'), text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # What is an image has no parts for a screen reader; marks are such parts.
    role = "group" if marks else "img"
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', rf'<svg role="{role}" \1', text, count=1)
    text = re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", text, count=1)
    start = text.index(">") + 1
    return f"{text[:start]}<title>{escape(title)}</title><desc>{escape(about)}</desc>{text[start:]}"


def variable(colour: str) -> str:
    """The page's own name for a stand-in."""
    return f"var({_VARIABLES[colour]})"
