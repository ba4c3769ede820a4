"""Stage ``score``, and the scores of a measurement: reward functions judge answers."""

from __future__ import annotations

import json

import pyarrow as pa

from raydpo.rewards.apply import account, apply, too_many
from raydpo.rewards.task import ANSWERS
from raydpo.rounds.inputs import Inputs
from raydpo.rounds.pairing import final_rewards
from raydpo.rounds.prompts import rows_of
from raydpo.rounds.stage import Content

__all__ = ["score"]


def score(inputs: Inputs, samples: pa.Table, *, number: int, step: int, against: pa.Table | None = None) -> Content:
    """Score answers with all reward functions.

    Args:
        samples: rows of ``rundir.rounds.SAMPLE_SCHEMA``.
        number: number of the round. step: number of steps that were trained before; both are told to the functions.
        against: rows of ``SAMPLE_SCHEMA`` that the answers are compared with in duels; None = with each other.

    Returns:
        Rows of ``rundir.rounds.SCORE_SCHEMA`` in the order of ``samples``, after ``rounds.cut``; not final if a function
        failed on more answers than ``rounds.max_errors`` allows.
    """
    answers = _answers(inputs, samples)
    rewards = inputs.rounds.rewards
    others = None if against is None else _answers(inputs, against)
    scored = apply(rewards, answers, inputs.config, inputs.console, round=number, step=step, against=others)
    for line in account(rewards, scored, answers):
        inputs.console.say(line)
    failed = too_many(rewards, scored, inputs.rounds.max_errors)
    return Content(final_rewards(samples, scored, inputs.rounds), failed)


def _answers(inputs: Inputs, samples: pa.Table) -> pa.Table:
    """Rows of ``rewards.task.ANSWERS``: the answers, each with its prompt and the prompt's columns. All have the columns of
    all prompts: a function gets null, and no error, where the few prompts of a round lack a column that others have."""
    asked = inputs.prompts.take(rows_of(inputs.prompts, samples["prompt_id"]))
    none, given = dict.fromkeys(sorted(inputs.columns)), asked["columns"].to_pylist()
    whole = {text: json.dumps(none | json.loads(text)) for text in set(given)}  # once for all answers to a prompt
    columns = {
        "prompt_id": samples["prompt_id"],
        "sample": samples["sample"],
        "prompt": asked["prompt"],
        "completion": samples["answer"],
        "completion_ids": samples["answer_ids"],
        "columns": [whole[text] for text in given],
    }
    return pa.table({name: columns[name] for name in ANSWERS.names}, schema=ANSWERS)
