"""Output of a sweep: a live table of its trials on a terminal, and lines elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from raydpo.rundir.display import TrainingDisplay
from raydpo.sweeps.ledger import Ledger
from raydpo.terminal.console import Console

__all__ = ["SweepTable", "TrialDisplay"]

STYLES = {"running": "cyan", "done": "green", "stopped": "yellow", "failed": "red"}
COLUMNS = ("eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen_fell")
LABELS = {"eval_rewards/accuracies": "accuracy", "eval_rewards/margins": "margin", "eval_logps/chosen_fell": "chosen fell"}


class SweepTable:
    """Shows the trials of a sweep. Safe to use from the threads of all trials."""

    def __init__(self, console: Console, ledger: Ledger) -> None:
        self.console, self.ledger = console, ledger
        self.live: dict[str, dict[str, float]] = {}  # newest step or evaluation of each running trial
        metric = ledger.config.sweep.metric
        self._columns = (*dict.fromkeys((metric, *COLUMNS)),)
        self._lock = threading.Lock()
        self._screen: Live | None = None

    def __enter__(self) -> SweepTable:
        if self.console.rich.is_terminal:
            self._screen = Live(console=self.console.rich, get_renderable=self.render, refresh_per_second=1, transient=True)
            self._screen.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._screen is not None:
            self._screen.stop()
        self.console.print(self.render())

    def say(self, line: str) -> None:
        with self._lock:
            self.console.say(line)

    def hear(self, name: str, kind: str, content: Any) -> None:
        """Show an event of one trial, see ``training.board.Listener``."""
        if kind == "begin":
            first = f" after step {content['first_step']:,}" if content["first_step"] else ""
            self.say(f"  {name}: {'continues' if first else 'begins'}{first}, {content['total_steps']:,} steps")
        elif kind == "note" and content.startswith("warning: "):
            self.say(f"warning: {name}: {content.removeprefix('warning: ')}")
        elif kind in ("step", "evaluated"):
            self.live[name] = self.live.get(name, {}) | content
            if kind == "evaluated" and self._screen is None:
                self.say(f"  {name}: step {int(content['step']):,}: {self._figures(content)}")

    def ended(self, name: str) -> None:
        """Show the new status of a trial, whose entry is up to date."""
        self.live.pop(name, None)
        entry = self.ledger.entries[name]
        told = entry.error if entry.status == "failed" else self._figures(entry.eval or {})
        self.say(
            f"{'warning: ' if entry.status == 'failed' else '  '}{name}: {entry.status} after {entry.steps:,} steps"
            + (f": {told}" if told else "")
        )

    def _figures(self, row: Mapping[str, float]) -> str:
        return ", ".join(f"{LABELS.get(key, key)} {row[key]:z.3f}" for key in self._columns if key in row)

    def render(self) -> Table:
        best = self.ledger.best()
        told = "" if not best else f"; * has the best {self.ledger.config.sweep.metric} so far"
        table = Table(title=f"sweep {self.ledger.config.run_name}{told}", title_justify="left")
        table.add_column("trial", overflow="fold")
        table.add_column("status")
        for label in ("steps", *(LABELS.get(key, key.removeprefix("eval_")) for key in self._columns), "seconds"):
            table.add_column(label, justify="right")
        for name, entry in self.ledger.entries.items():
            row = self.live.get(name, {}) if entry.status == "running" else {}
            evals = (entry.eval or {}) | row
            # Text objects, since printing a line without markup above the table also turns off markup in it.
            table.add_row(
                Text(f"{name} *", "bold") if entry in best else name,
                Text(entry.status, STYLES.get(entry.status, "")),
                f"{int(row.get('step', entry.steps)):,}",
                *(f"{evals[key]:z.3f}" if key in evals else "" for key in self._columns),
                f"{entry.seconds:,.0f}",
            )
        return table


class TrialDisplay(TrainingDisplay):
    """Writes the events of a trial to its log and to the table of the sweep."""

    def __init__(self, log: Console, table: SweepTable, name: str) -> None:
        super().__init__(log)
        self._table, self._name = table, name

    def listen(self, kind: str, content: Any) -> None:
        super().listen(kind, content)
        self._table.hear(self._name, kind, content)
