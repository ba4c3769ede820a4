"""Cells, rows and tables of the pages: each cell has a text to show and a value to sort by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raydpo.config import BetaSchedule, ObjectiveConfig
from raydpo.config.counting import train_on_text

__all__ = ["Cell", "Row", "Table", "duration", "interval", "number", "setting", "text"]


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what the cell shows.
        value: number by which rows are sorted; None = by the text.
        words: whether the text may wrap.
    """

    text: str
    value: float | None = None
    words: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a table. ``mark`` is the id of the marks of pictures that belong to it."""

    head: str
    cells: Sequence[Cell]
    mark: str | None = None


@dataclass(frozen=True)
class Table:
    """A table. The first of ``columns`` names the column of the heads."""

    label: str
    columns: Sequence[str]
    rows: Sequence[Row]


def number(value: float | None, form: str = ".3f") -> Cell:
    """Show a number, or a dash for None."""
    return Cell("-") if value is None else Cell(_formatted(value, form), float(value))


def interval(value: dict[str, float | None] | None, form: str = ".3f") -> Cell:
    """Show a measured value with its 95 % interval, if it has one."""
    if value is None or value.get("value") is None:
        return Cell("-")
    low, high = value.get("low"), value.get("high")
    within = "" if low is None or high is None else f" ({_formatted(low, form)} to {_formatted(high, form)})"
    return Cell(f"{_formatted(value['value'], form)}{within}", float(value["value"]))


def _formatted(value: float, form: str) -> str:
    """The number in the format, without a minus before zeros: what rounds to 0 is 0.000, not -0.000."""
    sign = form[:1] if form[:1] in "+- " else ""
    return format(float(value), f"{sign}z{form.removeprefix(sign)}")


def text(value: Any) -> Cell:
    """Show any value. Numbers are sorted as numbers."""
    ordered = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    if isinstance(value, list):
        value = ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        value = str(value).lower()
    shown = "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return Cell(shown, ordered, words=len(shown) > 24)


def setting(key: str, value: Any) -> Cell:
    """Show the value of a configuration key: a schedule of train.beta as ``0.2-0.05``, a mixture of losses as
    ``0.8 sigmoid + 0.2 sft``, parts of a completion that count as ``answer + 0.1 reasoning``."""
    try:
        if key == "train.beta" and isinstance(value, dict):
            schedule = BetaSchedule(**value)
            shape = "" if schedule.schedule == "linear" else f" {schedule.schedule}"
            return text(ObjectiveConfig(beta=schedule).beta_text + shape)
        if key == "train.loss" and isinstance(value, list):
            return text(ObjectiveConfig(loss=value).loss_text)
        if key.endswith("train_on") and isinstance(value, list):
            return text(train_on_text(value))
    except (ValueError, AttributeError):  # written by another version
        pass
    return text(value)


def duration(seconds: float) -> str:
    """Format a time, such as ``2 h 05 min``."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
