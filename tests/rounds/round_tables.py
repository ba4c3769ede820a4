"""Tables of rounds, made of short descriptions."""

from __future__ import annotations

import pyarrow as pa

from raydpo.config import Config
from raydpo.config.rounds import RoundsConfig
from raydpo.rounds.prompts import prompt_id
from raydpo.rundir.rounds import PROMPT_SCHEMA, SAMPLE_SCHEMA, SCORE_SCHEMA

STOP = 2


def settings(**rounds: object) -> RoundsConfig:
    return RoundsConfig(**{"prompts": "prompts.jsonl", "rewards": [{"use": "my:reward"}]} | rounds)


def config(path: object, data: dict | None = None, **rounds: object) -> Config:
    """A configuration of rounds over the prompts at ``path``."""
    section = {"prompts": [{"path": str(path)}], "rewards": [{"use": "math"}], "sample": {"max_tokens": 8}}
    return Config(output="runs", model={"path": "model"}, data=data or {}, rounds=section | rounds)


def text_of(ids: list[int]) -> str:
    """The text of an answer: tokens 8 and 9 are two ways to write the same."""
    return " ".join(str(8 if one == 9 else one) for one in ids if one != STOP)


def prompts(count: int, held_out: int = 0, source: str = "prompts") -> pa.Table:
    """Prompts of one token, the last ``held_out`` of which are held out."""
    rows = [
        {
            "prompt_id": prompt_id([1000 + number]),
            "row": number + 1,
            "source": source,
            "split": "held_out" if number >= count - held_out else "train",
            "prompt_ids": [1000 + number],
            "prompt": f'"{number}"',
            "columns": "{}",
        }
        for number in range(count)
    ]
    return pa.Table.from_pylist(rows, schema=PROMPT_SCHEMA)


def answered(table: pa.Table, answers: dict[int, list[tuple]], number: int = 1) -> tuple[pa.Table, pa.Table]:
    """Samples, and what reward functions said of them.

    Args:
        answers: by row of the prompts: (reward, token ids) of each answer, or (reward, token ids, end).
    """
    keys = table["prompt_id"].to_pylist()
    samples, scored = [], []
    for row, each in answers.items():
        for sample, (reward, ids, *end) in enumerate(each):
            samples.append(
                {
                    "prompt_id": keys[row],
                    "sample": sample,
                    "round": number,
                    "seed": 7,
                    "answer_ids": ids,
                    "answer": text_of(ids),
                    "end": end[0] if end else "stop",
                    "engine": "transformers",
                }
            )
            scored.append({"reward": reward, "parts": [("reward", reward)], "seconds": 0.0})
    schema = pa.schema([SCORE_SCHEMA.field(name) for name in SCORE_SCHEMA.names[2:]])
    return pa.Table.from_pylist(samples, schema=SAMPLE_SCHEMA), pa.Table.from_pylist(scored, schema=schema)
