"""Prints an evaluation in the terminal: the tables of its page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.markup import escape

from raydpo.reports.evaluation import evaluation_tables
from raydpo.reports.tables import Table
from raydpo.terminal.console import Console, plain_text

__all__ = ["print_evaluation"]

MOST_GROUPS = 50
"""Largest number of sources and lengths that are printed. The title says how many there are; the page has all of them."""


def print_evaluation(console: Console, found: dict[str, Any]) -> None:
    """Print ``found``, the content of evaluation.json."""
    others = evaluation_tables(found)
    if found["preferences"]["total"]["pairs"]:
        _print_preferences(console, found, others.pop(0))
    for table in others:
        _print(console, table.label, table.columns, [(row.head, *(cell.text for cell in row.cells)) for row in table.rows])


def _print_preferences(console: Console, found: dict[str, Any], preferences: Table) -> None:
    total, *groups = preferences.rows
    _print(
        console,
        f"{preferences.label}: beta {found['beta']:g}, rewards of {found['reward_of']} "
        f"({found['rewards'].replace('_', ' ')})"
        + (f", tokens that count: {found['train_on']}" if found.get("train_on") else ""),
        ("all pairs", "value"),
        [(name, cell.text) for name, cell in zip(preferences.columns[1:], total.cells, strict=True)],
    )
    left_out = f"; the first {MOST_GROUPS} of {len(groups)}, the page has all" if len(groups) > MOST_GROUPS else ""
    _print(
        console,
        f"By source and by length, tokens{left_out}",
        preferences.columns[:4],
        [(row.head, *(cell.text for cell in row.cells[:3])) for row in groups[:MOST_GROUPS]],
    )


def _print(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    console.table(title, columns, [[escape(plain_text(text)) for text in row] for row in rows])
