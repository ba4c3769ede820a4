"""The table and the lines printed at the end of a training."""

from __future__ import annotations

from typing import Any

from rich.markup import escape

from raydpo.errors import one_line
from raydpo.terminal.console import Console, plain_text

__all__ = ["EVALUATION_TABLE", "print_summary"]

PROMPT_CHARACTERS = 120
EVALUATION_TABLE = (
    ("eval_loss", "loss"),
    ("eval_rewards/accuracies", "preference accuracy (reward)"),
    ("eval_rewards/auc", "desirable above undesirable (AUC)"),
    ("eval_rewards/margins", "reward margin"),
    ("eval_logps/accuracies", "chosen more likely than rejected"),
    ("eval_logps/chosen", "log-prob of chosen, nats"),
    ("eval_logps/rejected", "log-prob of rejected, nats"),
    ("eval_logps/chosen_fell", "pairs whose chosen fell"),
    ("eval_length/margin_correlation", "margin ~ length difference (r)"),
    ("eval_kl", "drift by mismatched answers, nats"),
)
"""Metrics in the table of before and after, and their labels."""


def print_summary(console: Console, summary: dict[str, Any]) -> None:
    """Print the end of a run. ``summary``: content of summary.json."""
    before, after, unit = summary["eval_before"], summary["eval_after"], summary.get("unit", "pairs")
    if before and after:
        console.table(
            f"held-out {unit}: {summary['held_out_pairs']:,}",
            ("", "before", "after"),
            [(label, _figure(before.get(key)), _figure(after[key])) for key, label in EVALUATION_TABLE if key in after],
        )
    for sample in summary["samples"]:
        console.print(f"[bold]prompt[/bold]  {escape(_end(plain_text(sample['prompt'])))}")
        console.print(f"[bold]before[/bold]  {escape(plain_text(sample['before']))}")
        console.print(f"[bold]after[/bold]   {escape(plain_text(sample['after']))}\n")
    console.say(
        f"trained {summary['steps']:,} steps on {summary['pairs_seen']:,} {unit} in {summary['train_seconds']:.0f} s "
        f"with evaluations and checkpoints, at {summary['tokens_per_second']:,.0f} tokens/s without; first loss "
        f"{_loss(summary['first_loss'])}, last {_loss(summary['last_loss'])}"
    )
    seconds = summary["checkpoint_seconds"]
    share = seconds / max(summary["train_seconds"], 1e-9)
    size = f"{summary['checkpoint_bytes'] / 1e6:,.1f} MB"
    console.say(f"checkpoints: {size} each; training stood still for them for {seconds:.1f} s, {share:.1%} of its time")
    console.say(f"run directory: {summary['run_dir']}  (model in final/, metrics.parquet, eval.parquet, tensorboard/)")


def _end(prompt: str) -> str:
    """The end of a prompt on one line. Its start, the system prompt, is often the same for all."""
    line = one_line(prompt)
    if len(line) <= PROMPT_CHARACTERS:
        return line
    end = line[-PROMPT_CHARACTERS:]
    return f"... {end.partition(' ')[2] or end}"


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6f}"


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:z.3f}" if abs(value) < 100 else f"{value:.1f}"
