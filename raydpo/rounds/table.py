"""The table of rounds on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raydpo.config.rounds import STAGES
from raydpo.terminal.console import Console

__all__ = ["print_rounds"]


def print_rounds(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the figures of rounds, a row a round.

    Args:
        rows: rows of ``rundir.rounds.ROUNDS_SCHEMA`` in order of round.
    """
    console.table(
        "rounds",
        ("round", "success", "held out", "greedy", "drift", "pairs", "hits", "loss", *(f"{stage} s" for stage in STAGES)),
        [_row(row) for row in rows],
    )


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    seconds = row.get("seconds") or {}
    wanted, loss = row.get("wanted"), (row.get("first_loss"), row.get("last_loss"))
    return (
        str(row["round"]),
        _share(row.get("success")),
        _share(row.get("eval_success"), row.get("eval_success_se")),
        _share(row.get("eval_success_greedy")),
        _number(row.get("eval_drift_initial"), ".2f"),
        _number(row.get("pairs"), ",d"),
        f"{row.get('cache_hits') or 0:,} of {wanted:,}" if wanted else "",
        "" if None in loss else f"{loss[0]:.3f} -> {loss[1]:.3f}",
        *(_number(seconds.get(stage), ".0f") for stage in STAGES),
    )


def _share(value: float | None, error: float | None = None) -> str:
    return "" if value is None else f"{value:.3f}" + ("" if error is None else f" +- {error:.3f}")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
