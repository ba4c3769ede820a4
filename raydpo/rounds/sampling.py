"""Stage ``sample``, and the answers of a measurement: the policy answers prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from raydpo.answers.draws import answer_rows, rows_of_block
from raydpo.answers.engine import pick_engine, sampling
from raydpo.reference.score import ReferenceSpec
from raydpo.rounds.inputs import Inputs
from raydpo.rundir.rounds import CUT, GREEDY, SAMPLE_SCHEMA

__all__ = ["answer", "sample_settings"]

WORK_BLOCK = 64
"""Least number of answers that a worker makes and stores together; a kill loses one such block for each worker. It is no
setting, since the borders of blocks decide how answers round."""


def sample_settings(inputs: Inputs) -> dict[str, Any]:
    """Settings that decide what is sampled, by their keys. The engine is none of them: its rounding is."""
    chosen = inputs.rounds.sample.model_dump(mode="json", include={"n", "temperature", "top_p", "max_tokens", "seed"})
    return {f"rounds.sample.{name}": value for name, value in chosen.items()} | {
        "rounds.per_round": inputs.rounds.per_round,
        "model.tokenizer (stop tokens)": list(inputs.tokeniser.stop_ids),
    }


def answer(
    inputs: Inputs, spec: ReferenceSpec, rows: np.ndarray, *, n: int, seed: int, number: int, greedy: bool = False
) -> pa.Table:
    """Answer prompts: ``n`` sampled answers to each, and a greedy one if ``greedy``.

    Args:
        spec: the policy.
        rows: numbers of the prompts in ``inputs.prompts``.
        seed: seed of the random numbers.
        number: number of the round.

    Returns:
        Rows of ``rundir.rounds.SAMPLE_SCHEMA``, all answers of the first prompt first, its greedy answer last of them.
    """
    prompts = inputs.prompts.take(rows)
    ids, names = prompts["prompt_ids"].to_pylist(), prompts["prompt_id"].to_pylist()
    sample = inputs.rounds.sample
    tables = [answer_rows(ids, samples=n, seed=seed, temperature=sample.temperature, top_p=sample.top_p)]
    tables += [answer_rows(ids)] if greedy else []
    places = [np.repeat(np.arange(len(ids)), n), *([np.arange(len(ids))] if greedy else [])]
    samples = [np.tile(np.arange(n), len(ids)), *([np.full(len(ids), GREEDY)] if greedy else [])]
    engine, line = pick_engine(inputs.config, spec)
    inputs.say_once(line)
    work = sampling(inputs.config, spec, engine, inputs.tokeniser.stop_ids, max(map(len, inputs.prompts["prompt_ids"])))
    found = inputs.work(work, tables, "answering", rows_of_block(n, WORK_BLOCK))
    answers = [one for table in found for one in table["answer_ids"].to_pylist()]
    stop = set(work.stop)
    ended = [one[-1] in stop for one in answers]
    numbers, of = np.concatenate(samples), np.concatenate(places)
    texts = [one[:-1] if end else one for one, end in zip(answers, ended, strict=True)]
    made = pa.table(
        {
            "prompt_id": [names[place] for place in of.tolist()],
            "sample": numbers,
            "round": [number] * len(answers),
            "seed": pa.array([None if sample == GREEDY else seed for sample in numbers.tolist()], pa.uint64()),
            "answer_ids": answers,
            "answer": inputs.tokeniser.tokenizer.batch_decode(texts, skip_special_tokens=True),
            "end": ["stop" if end else CUT for end in ended],
            "engine": [work.engine] * len(answers),
        },
        schema=SAMPLE_SCHEMA,
    )
    return made.take(np.argsort(of, kind="stable"))
