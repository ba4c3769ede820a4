"""``raydpo rounds try``: the policy answers a few prompts, and every reward function scores the answers."""

from __future__ import annotations

import dataclasses
from typing import Any

from raydpo.cluster.preflight import check_cluster
from raydpo.cluster.session import session
from raydpo.config import Config
from raydpo.config.rewards import only_duels
from raydpo.errors import RaydpoError
from raydpo.rewards.apply import too_many
from raydpo.rounds.before import check_inputs
from raydpo.rounds.figures import sampled_figures
from raydpo.rounds.sampling import Asked, answer
from raydpo.rounds.scoring import score
from raydpo.rounds.show import print_answers
from raydpo.terminal.console import Console

__all__ = ["attempt"]


def attempt(config: Config, console: Console | None = None, *, count: int = 8) -> dict[str, Any]:
    """Let the initial model answer the first training prompts, score the answers, and print all of it.

    Nothing is written into the directory of the rounds. Answers and rewards are kept in the cache.

    Args:
        count: number of prompts.

    Returns:
        The figures of these answers, keys of ``rundir.rounds.ROUNDS_SCHEMA``.

    Raises:
        RaydpoError: if something is wrong with the settings, the prompts or the models.
    """
    console = console or Console()
    inputs = check_inputs(config, console)
    rounds = inputs.rounds
    asked = Asked.in_round(inputs, 1)
    asked = dataclasses.replace(asked, rows=asked.rows[:count])
    console.begin("Ray")
    with session(config):
        check_cluster(config, ["score"], console)
        samples, _ = answer(inputs, inputs.policy(0), asked, number=1)
        scores = score(inputs, samples, number=1, step=0).table
    told = {row["prompt_id"]: row["prompt"] for row in inputs.prompts.take(asked.rows).to_pylist()}
    answers = [a | b for a, b in zip(samples.to_pylist(), scores.to_pylist(), strict=True)]
    for key, prompt in told.items():
        of = [row for row in answers if row["prompt_id"] == key]
        print_answers(console, f"prompt {key.hex()[:12]}", prompt, of, rounds.cut, ())
    figures = sampled_figures(inputs.prompts, samples, scores, rounds)
    threshold = "share of duels won" if only_duels(rounds.rewards) else f"reward above {rounds.measure.success:g}"
    success = "unknown" if figures["success"] is None else f"{figures['success']:.1%}"
    console.say(
        f"{figures['answers']:,} answers to {figures['prompts']:,} prompt(s): mean reward "
        f"{'none' if figures['reward'] is None else format(figures['reward'], '.3f')}, success {success} "
        f"({threshold}), {figures['mixed']:.1%} of the prompts with different rewards, "
        f"{figures['cut']:.1%} cut at rounds.sample.max_tokens ({rounds.sample.max_tokens})"
    )
    if (failed := too_many(rounds.rewards, scores, rounds.max_errors)) is not None:
        raise RaydpoError(failed)
    return figures
