"""A small world of rounds: a random model with a few hundred tokens, prompts of words, and a reward for the first token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from tiny import WORDS

__all__ = ["FIRST_HALF", "small_rounds", "tables"]

FIRST_HALF = 150
"""Token ids below this are rewarded; about the half of the vocabulary."""
REWARDS = f"""
def first_half(completion_ids, **columns):
    return [float(ids[0] < {FIRST_HALF}) for ids in completion_ids]


def all_right(completion_ids, **columns):
    return [1.0] * len(completion_ids)


def all_wrong(completion_ids, **columns):
    return [0.0] * len(completion_ids)


def all_tied(completion_ids, **columns):
    return [0.7] * len(completion_ids)


def all_but_one_right(completion_ids, number, **columns):
    return [0.0 if row == 0 and number[0] == min(number) else 1.0 for row in range(len(completion_ids))]


def not_applicable(completion_ids, **columns):
    return [None] * len(completion_ids)


def fails(completion_ids, **columns):
    if any(ids[0] < 30 for ids in completion_ids):
        raise ZeroDivisionError("a planted fault")
    return [float(ids[0] < {FIRST_HALF}) for ids in completion_ids]
"""


def small_rounds(place: Path, model: Path, **rounds: Any) -> Path:
    """Write prompts, reward functions and a configuration of rounds into ``place``; returns the configuration. The
    functions are found by commands that run in ``place``.

    Args:
        rounds: settings of section ``rounds`` instead of the usual ones.
    """
    place.mkdir(parents=True, exist_ok=True)
    (place / "small_rewards.py").write_text(REWARDS)
    asked = [f"{WORDS[row % len(WORDS)]} {WORDS[7 * row % len(WORDS)]} {row}:" for row in range(40)]
    (place / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt, "number": row}) + "\n" for row, prompt in enumerate(asked))
    )
    tree = {
        "output": str(place / "runs"),
        "name": "small",
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"max_length": 64},
        "train": {"pairs_per_step": 32, "steps": 10, "lr": 7e-3, "tokens_per_batch": 1024},
        "rounds": {
            "count": 2,
            "prompts": str(place / "prompts.jsonl"),
            "held_out": 0.25,
            "per_round": 31,
            "sample": {"n": 8, "max_tokens": 2, "temperature": 0.9},  # so the drift is not measured, which takes time
            "rewards": [{"use": "small_rewards:first_half"}],
            "cut": "keep",
            "pairs": {"choose": "all", "per_prompt": 4},
            "measure": {"n": 8, "prompts": 16},
        }
        | rounds,
    }
    file = place / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def tables(run: Path, *columns: str) -> dict[str, pa.Table]:
    """The Parquet files of all rounds, by their path in ``run``, without what a clock says.

    Args:
        columns: further columns to leave out.
    """
    return {
        str(file.relative_to(run)): (table := pq.read_table(file).replace_schema_metadata(None)).drop_columns(
            [name for name in ("seconds", *columns) if name in table.column_names]
        )
        for file in sorted(run.glob("round-*/*.parquet"))
    }
