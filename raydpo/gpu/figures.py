"""Figures of a check, their limits, and the report that is written as JSON."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from raydpo.estimate.checked import REPORT_FORMAT

__all__ = ["Figure", "Findings", "Report", "Result", "Skip", "temporary_of"]

Rule = Literal["at most", "at least", "goal"]
Status = Literal["pass", "fail", "skip", "error", "timeout"]


class Skip(Exception):
    """A block cannot run here. The message says why, such as ``no deepspeed``."""


@dataclass(frozen=True)
class Figure:
    """One number that a block found.

    Attributes:
        value: the number; None if it is not finite, which is never within a limit.
        unit: such as ``ms``; empty for shares and errors.
        rule: how ``value`` is compared with ``limit``. A goal is told and never fails. None = not compared.
        ok: whether it is within the limit; None without one, and for a goal.
        says: what the number is, in words.
    """

    value: float | None
    unit: str
    rule: Rule | None
    limit: float | None
    ok: bool | None
    says: str

    def line(self) -> str:
        """The figure as one line of text."""
        value = "not finite" if self.value is None else f"{self.value:.4g}"
        text = f"{self.says}: {value}{self.unit and ' ' + self.unit}"
        if self.rule is not None:
            text += f" ({'goal: at least' if self.rule == 'goal' else self.rule} {self.limit:g})"
        return f"{text} FAIL" if self.ok is False else text


class Findings:
    """Collects the figures of one block.

    In all methods ``name`` identifies the figure in the JSON, and ``says`` tells what it is. A limit of None means that the
    figure is not compared, as for speed on a CPU.
    """

    def __init__(self) -> None:
        self.figures: dict[str, Figure] = {}
        self.notes: list[str] = []

    def note(self, line: str) -> None:
        """Add a remark, such as what is not installed."""
        self.notes.append(line)

    def value(self, name: str, value: float, says: str, unit: str = "") -> None:
        """Add a figure that is not compared."""
        self._add(name, value, says, unit, None, None)

    def at_most(self, name: str, value: float, limit: float | None, says: str, unit: str = "") -> None:
        """Add a figure that fails above ``limit``."""
        self._add(name, value, says, unit, "at most", limit)

    def at_least(self, name: str, value: float, limit: float | None, says: str, unit: str = "") -> None:
        """Add a figure that fails below ``limit``."""
        self._add(name, value, says, unit, "at least", limit)

    def goal(self, name: str, value: float, limit: float | None, says: str, unit: str = "") -> None:
        """Add a figure that should reach ``limit`` and does not fail."""
        self._add(name, value, says, unit, "goal", limit)

    def fact(self, name: str, true: bool, says: str) -> None:
        """Add a statement that fails if it is not true; its value is 1 or 0."""
        self._add(name, float(true), says, "", "at least", 1.0)

    def _add(self, name: str, value: float, says: str, unit: str, rule: Rule | None, limit: float | None) -> None:
        if limit is None:
            rule = None
        finite = math.isfinite(value)
        ok = None
        if rule in ("at most", "at least"):
            ok = finite and bool(value <= limit if rule == "at most" else value >= limit)
        self.figures[name] = Figure(float(value) if finite else None, unit, rule, limit, ok, says)


@dataclass
class Result:
    """What a block came to.

    Attributes:
        note: remarks, joined by semicolons; for a skipped block, why.
        error: the exception of a block that ended with one, else None.
    """

    number: int
    name: str
    status: Status
    seconds: float
    figures: dict[str, Figure]
    note: str = ""
    error: str | None = None


@dataclass
class Report:
    """The whole check.

    Attributes:
        started: time in UTC, as ISO 8601.
        seconds: of all blocks so far.
        device, versions, model: what was checked, and on what.
        measured: rates that plans use, see ``raydpo plan --measured``.
    """

    raydpo: str
    started: str
    device: dict[str, Any]
    versions: dict[str, str | None]
    model: dict[str, Any]
    seconds: float = 0.0
    measured: dict[str, Any] = field(default_factory=dict)
    blocks: list[Result] = field(default_factory=list)

    @property
    def summary(self) -> dict[str, Any]:
        """Number of blocks by outcome, and the figures that people ask for first."""
        status = [block.status for block in self.blocks]
        counts = {"pass": status.count("pass"), "skip": status.count("skip")}
        found = {name: figure.value for block in self.blocks for name, figure in block.figures.items()}
        asked = ("score_mfu_32", "score_positions_s_32", "full_mfu_32", "lora_mfu_32", "plan_worst")
        return counts | {"fail": len(status) - sum(counts.values())} | {name: found.get(name) for name in asked}

    def write(self, path: Path) -> None:
        """Replace the file at ``path``. A reader sees the old file or the new one, never half of one."""
        everything = {"format": REPORT_FORMAT} | asdict(self) | {"summary": self.summary}
        temporary = temporary_of(path)
        temporary.write_text(json.dumps(everything, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)


def temporary_of(path: Path) -> Path:
    """File beside ``path`` in which a report is written before it replaces the one at ``path``."""
    return path.with_name(f".{path.name}.{os.getpid()}")
