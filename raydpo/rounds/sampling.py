"""Stage ``sample``, and the answers of a measurement: the policy answers prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raydpo.answers.answering import Answering
from raydpo.answers.draws import answer_rows, rows_of_block
from raydpo.answers.engine import pick_engine, sampling
from raydpo.answers.ray_engine import RayAnswering
from raydpo.cluster.resources import resources_for
from raydpo.reference.score import ReferenceSpec
from raydpo.rounds.inputs import Inputs
from raydpo.rounds.prompts import round_seed, slice_of
from raydpo.rundir.rounds import CUT, GREEDY, SAMPLE_SCHEMA

__all__ = ["Asked", "answer", "sample_settings"]

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


@dataclass(frozen=True)
class Asked:
    """Prompts and how they are answered.

    Attributes:
        rows: numbers of the prompts in ``Inputs.prompts``, int64 [prompts].
        n: sampled answers to each. seed: seed of their random numbers.
        greedy: whether each prompt is answered greedily, too.
    """

    rows: np.ndarray
    n: int
    seed: int
    greedy: bool = False

    @classmethod
    def in_round(cls, inputs: Inputs, number: int) -> Asked:
        """What round ``number``, from 1, trains on."""
        sample = inputs.rounds.sample
        return cls(slice_of(inputs.prompts, inputs.rounds, number), sample.n, round_seed(sample.seed, number))

    @property
    def block(self) -> int:
        """Rows of ``tables`` that a worker answers and stores together."""
        return rows_of_block(self.n, WORK_BLOCK)

    def tables(self, inputs: Inputs) -> list[pa.Table]:
        """Rows of ``answers.draws.ROWS``: those of sampled answers, and those of greedy ones."""
        ids, sample = inputs.prompts["prompt_ids"].take(pa.array(self.rows)).to_pylist(), inputs.rounds.sample
        tables = [answer_rows(ids, samples=self.n, seed=self.seed, temperature=sample.temperature, top_p=sample.top_p)]
        return [*tables, answer_rows(ids)] if self.greedy else tables


def answer(
    inputs: Inputs, spec: ReferenceSpec, asked: Asked, *, number: int, following: Asked | None = None
) -> tuple[pa.Table, float]:
    """Answer prompts.

    Args:
        spec: the policy.
        number: number of the round.
        following: what the next round asks of the same policy. The same workers answer it, after ``asked``, and its answers
            are stored in the cache.

    Returns:
        Rows of ``rundir.rounds.SAMPLE_SCHEMA`` for ``asked``, all answers of the first prompt first, its greedy answer last
        of them; and the seconds that the workers took for ``following``, 0 with engine ray, which does not tell them.
    """
    engine, line = pick_engine(inputs.config, spec)
    inputs.say_once(line)
    work = sampling(inputs.config, spec, engine, inputs.tokeniser.stop_ids, max(map(len, inputs.prompts["prompt_ids"])))
    tables, blocks = [], []
    for each in (asked, following):
        if each is not None:
            tables += each.tables(inputs)
            blocks += [each.block] * (len(tables) - len(blocks))

    ahead = 0.0

    def spent(place: int, seconds: float) -> None:
        nonlocal ahead
        ahead += seconds if place >= own else 0.0

    own, doing = 1 + asked.greedy, "answering" if following is None else f"answering, also for round {number + 1}"
    found = inputs.work(work, tables, doing, blocks, spent)
    answers = [one for table in found[:own] for one in table["answer_ids"].to_pylist()]
    # Each worker answers alone, also where score.sequence_parallel or score.partition make teams of those that score.
    return _samples(inputs, asked, answers, work, number), ahead / resources_for("score", inputs.config).workers


def _samples(
    inputs: Inputs, asked: Asked, answers: Sequence[Sequence[int]], work: Answering | RayAnswering, number: int
) -> pa.Table:
    """Rows of ``rundir.rounds.SAMPLE_SCHEMA`` of the answers to ``asked.tables``."""
    names, each = inputs.prompts["prompt_id"].take(pa.array(asked.rows)).to_pylist(), np.arange(len(asked.rows))
    of, numbers = [np.repeat(each, asked.n)], [np.tile(np.arange(asked.n), len(each))]
    if asked.greedy:
        of, numbers = [*of, each], [*numbers, np.full(len(each), GREEDY)]
    places, samples, stop = np.concatenate(of), np.concatenate(numbers), set(work.stop)
    ended = [one[-1] in stop for one in answers]
    texts = [one[:-1] if end else one for one, end in zip(answers, ended, strict=True)]
    made = pa.table(
        {
            "prompt_id": [names[place] for place in places.tolist()],
            "sample": samples,
            "round": [number] * len(answers),
            "seed": pa.array([None if sample == GREEDY else asked.seed for sample in samples.tolist()], pa.uint64()),
            "answer_ids": answers,
            "answer": inputs.tokeniser.tokenizer.batch_decode(texts, skip_special_tokens=True),
            "end": ["stop" if end else CUT for end in ended],
            "engine": [work.engine] * len(answers),
        },
        schema=SAMPLE_SCHEMA,
    )
    return made.take(np.argsort(places, kind="stable"))
