"""Matplotlib figures as inline SVG whose colours are the page's: they follow light and dark, and text stays text."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib

matplotlib.use("agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["BAD", "GOOD", "INK", "PALE", "figure", "svg"]

INK, GRID, GOOD, BAD, PALE = "#010101", "#020202", "#030303", "#040404", "#050505"
"""Stand-ins for the colours of the page's style sheet, which no figure would use by chance."""
_VARIABLES = {INK: "--ink", GRID: "--line", GOOD: "--good", BAD: "--bad", PALE: "--pale"}
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "raydpo", "font.family": "sans-serif", "font.size": 9.0, "axes.titlesize": 10.0,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GRID, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID,
    "grid.linewidth": 0.5, "figure.facecolor": "none", "axes.facecolor": "none", "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


@contextmanager
def figure(width: float = 4.4, height: float = 2.8) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one pair of axes, in inches, narrow enough that its text can be read on a phone."""
    with matplotlib.rc_context(_STYLE):
        made = Figure(figsize=(width, height))
        yield made, made.add_subplot()


def svg(made: Figure, title: str, about: str) -> str:
    """The figure as an ``<svg>`` element with a title and a description for those who do not see it."""
    sink = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        made.savefig(sink, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = sink.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    # Identifiers are made unique to the figure: several of them share a page.
    prefix = re.sub(r"\W+", "-", title.lower())
    text = re.sub(r'id="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'(href="#|url\(#)', rf"\1{prefix}-", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r'<svg role="img" \1', text, count=1)
    text = re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", text, count=1)
    start = text.index(">") + 1
    return f"{text[:start]}<title>{_escaped(title)}</title><desc>{_escaped(about)}</desc>{text[start:]}"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
