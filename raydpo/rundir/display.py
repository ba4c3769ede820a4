"""Progress of a training, in the terminal."""

from __future__ import annotations

import contextlib
from typing import Any

from raydpo.terminal.console import Console, ProgressLine

__all__ = ["TrainingDisplay"]


class TrainingDisplay:
    """Shows the events of ``training.launch`` as a progress bar and lines."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = contextlib.ExitStack()
        self._line: ProgressLine | None = None
        self._total = 0

    def __enter__(self) -> TrainingDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def listen(self, kind: str, content: Any) -> None:
        """Show an event, see ``training.launch.board.Listener``."""
        getattr(self, f"_{kind}")(content)

    def _phase(self, name: str) -> None:
        self.console.begin(name)

    def _begin(self, facts: dict[str, Any]) -> None:
        first, total, trained = facts["first_step"], facts["total_steps"], f"{facts['pairs']:,} {facts['unit']}"
        if self._total:
            self.console.warn(f"workers were restarted; continuing after step {first}")
            self._bar.close()
        elif first:
            self.console.say(f"continuing after step {first}")
        self.console.say(
            f"training: {trained}, {total:,} steps ({facts['steps_per_epoch']:,} an epoch), {facts['world_size']} worker(s)"
        )
        if facts["steps_per_epoch"] == total == 1:
            self.console.warn(
                f"all {trained} fit into one step, and the run ends after it; lower train.pairs_per_step, or raise "
                "train.epochs or train.steps"
            )
        self._line, self._total = None, total

    def _step(self, row: dict[str, float]) -> None:
        if self.console.phases.running:
            self.console.phases.end()
            if self.console.verbose:
                self.console.say(self.console.phases.line())
        if self._line is None:  # begins with the first step: gate and first evaluation would distort the rate
            progress = self.console.progress("training", self._total, "steps", done=int(row["step"]))
            self._line = self._bar.enter_context(progress)
        accuracy = f"  accuracy {row['rewards/accuracies']:.2f}" if "rewards/accuracies" in row else ""
        self._line.update(int(row["step"]), f"loss {row['loss']:.4f}{accuracy}  {row['tokens_per_second']:,.0f} tokens/s")
        if int(row["step"]) == self._total:
            self._bar.close()  # evaluation, checkpoint and export that follow are no steps

    def _evaluated(self, row: dict[str, float]) -> None:
        told = [f"loss {row['eval_loss']:.4f}"]
        for name, metric in (("accuracy", "accuracies"), ("margin", "margins")):  # either may be unknown with labels
            if (value := row.get(f"eval_rewards/{metric}")) is not None:
                told.append(f"{name} {value:z.3f}")
        self.console.say(f"  held out, step {int(row['step'])}: {', '.join(told)}")

    def _note(self, line: str) -> None:
        self.console.say(line)
