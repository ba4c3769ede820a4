"""Cells and rows as the tables of the pages want them: what is read, and what is sorted by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raydpo.config import BetaSchedule, ObjectiveConfig

__all__ = ["Cell", "Row", "Table", "duration", "interval", "number", "setting", "share", "text"]


@dataclass(frozen=True)
class Cell:
    """``text`` is shown, ``value`` is sorted by; ``words`` says that it is a sentence, which may be broken."""

    text: str
    value: float | None = None
    words: bool = False


@dataclass(frozen=True)
class Row:
    """A row; ``mark`` ties it to the marks of that gid in the pictures."""

    head: str
    cells: Sequence[Cell]
    mark: str | None = None


@dataclass(frozen=True)
class Table:
    """A table; ``columns`` begins with the name of the first column, that of the heads."""

    label: str
    columns: Sequence[str]
    rows: Sequence[Row]


def number(value: float | None, form: str = ".3f") -> Cell:
    """A figure, or a dash where it is not known."""
    return Cell("-") if value is None else Cell(format(value, form), float(value))


def share(value: float | None) -> Cell:
    """A share in percent, or a dash where it is not known."""
    return Cell("-") if value is None else Cell(f"{value:.1%}", float(value))


def interval(value: dict[str, float | None] | None, form: str = ".3f") -> Cell:
    """A measured value with its 95 % interval; of too few values there is none."""
    if value is None or value.get("value") is None:
        return Cell("-")
    if value.get("low") is None:
        return Cell(format(value["value"], form), float(value["value"]))
    return Cell(f"{value['value']:{form}} ({value['low']:{form}} to {value['high']:{form}})", float(value["value"]))


def text(value: Any) -> Cell:
    """Anything; numbers are sorted by their value."""
    ordered = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    shown = "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value).lower() \
        if isinstance(value, bool) else str(value)
    return Cell(shown, ordered, words=len(shown) > 24)


def setting(key: str, value: Any) -> Cell:
    """The value of a configuration key: of train.beta a schedule as ``0.2-0.05``, of train.loss a mixture as ``0.8 sigmoid +
    0.2 sft``, anything else as it is."""
    try:
        if key == "train.beta" and isinstance(value, dict):
            schedule = BetaSchedule(**value)
            shape = "" if schedule.schedule == "linear" else f" {schedule.schedule}"
            return text(ObjectiveConfig(beta=schedule).beta_text + shape)
        if key == "train.loss" and isinstance(value, list):
            return text(ObjectiveConfig(loss=value).loss_text)
    except ValueError:  # of another version
        pass
    return text(value)


def duration(seconds: float) -> str:
    """Such as ``2 h 05 min``."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
