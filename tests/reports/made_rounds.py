"""Directories of rounds as the real stages leave them, without models: healthy by default, with figures to replace."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydpo.config import load_config
from raydpo.rundir.rounds import HELD_OUT_SCHEMA, PROMPT_SCHEMA, ROUNDS_SCHEMA, SCORE_SCHEMA
from raydpo.storage.files import Storage

PROMPTS = 12
"""Number of held-out prompts."""


def made_rounds(
    output: Path,
    name: str,
    *,
    rounds: int = 3,
    figures: dict[str, list[Any]] | None = None,
    settings: dict[str, Any] | None = None,
    stopped: str | None = None,
    parts: dict[str, list[float]] | None = None,
    prompt: Any = "What is 3 + 4?",
    answer: str = "The answer is 7.",
    errors: dict[int, str] | None = None,
    trained_seconds: float = 30.0,
    step: int = 8,
) -> Path:
    """Make a directory of rounds ``<output>/<name>``.

    Args:
        figures: figures of rounds.parquet, one value for each round from 0 (None where there is none).
        settings: further settings of section ``rounds``, and of others as ``train.beta``.
        parts: mean of each reward function over the answers to held-out prompts, for each round from 0. Prompts differ
            from it by up to 0.05, the same way in all rounds.
        errors: what a function failed with on one training answer of a round.
        trained_seconds: seconds of training in each round's 40 of its stage.
        step: optimizer steps of a round.
    """
    directory = output / name
    storage = Storage(str(directory))
    section: dict[str, Any] = {
        "count": rounds,
        "prompts": "org/sums",
        "per_round": 40,
        "sample": {"n": 8, "max_tokens": 12},
        "rewards": [{"use": "math"}],
    }
    other = {key: value for key, value in (settings or {}).items() if "." in key}
    section |= {key: value for key, value in (settings or {}).items() if "." not in key}
    tree: dict[str, Any] = {
        "name": name,
        "output": str(output),
        "model": {"path": "HuggingFaceTB/SmolLM2-135M-Instruct"},
        "train": {"steps": step},
        "rounds": section,
    }
    for key, value in other.items():
        first, last = key.split(".")
        tree.setdefault(first, {})[last] = value
    storage.write("config.yaml", load_config(tree).to_yaml().encode())
    storage.write(
        "rounds.json", json.dumps({"name": name, "status": "stopped" if stopped else "done", "why": stopped}).encode()
    )
    parts = parts or {"math": [round(0.2 + 0.2 * number, 3) for number in range(rounds + 1)]}
    rows = [
        _row(number, rounds, step, {key: values[number] for key, values in parts.items()}) for number in range(rounds + 1)
    ]
    for key, values in (figures or {}).items():
        for row, value in zip(rows, values, strict=True):
            row[key] = value
    write_parquet(storage, "rounds.parquet", pa.Table.from_pylist(rows, ROUNDS_SCHEMA))
    ids = [hashlib.sha256(f"prompt {number}".encode()).digest()[:16] for number in range(PROMPTS)]
    known = [
        {"prompt_id": one, "row": number + 1, "source": "prompts", "split": "held_out", "prompt_ids": [1, 2, number]}
        | {"prompt": json.dumps(prompt), "columns": "{}"}
        for number, one in enumerate(ids)
    ]
    write_parquet(storage, "prompts.parquet", pa.Table.from_pylist(known, PROMPT_SCHEMA))
    for number in range(rounds + 1):
        folder = f"round-{number:03d}"
        held_out = [
            {"prompt_id": one, "sample": sample, "round": number, "seed": 7, "answer_ids": [5] * (6 + sample), "engine": "x"}
            | {
                "answer": f"{answer} ({number}, {sample})",
                "end": "length" if sample == 3 else "stop",
                "reward": float(number),
            }
            | {"parts": [(key, values[number] + 0.05 * (place / PROMPTS - 0.5)) for key, values in parts.items()]}
            | {"error": None, "details": None, "seconds": 0.1, "log_ratio": None if sample < 0 else 0.5 * number}
            for place, one in enumerate(ids)
            for sample in range(-1, 4)
        ]
        write_parquet(storage, f"{folder}/held_out.parquet", pa.Table.from_pylist(held_out, HELD_OUT_SCHEMA))
        if number:
            scores = [
                {"prompt_id": ids[0], "sample": 0, "reward": None, "parts": [], "error": text}
                for at, text in (errors or {}).items()
                if at == number
            ]
            write_parquet(storage, f"{folder}/scores.parquet", pa.Table.from_pylist(scores, SCORE_SCHEMA))
            summary = {"steps": step, "train_seconds": trained_seconds}
            storage.write(f"{folder}/train/summary.json", json.dumps(summary).encode())
    return directory


def write_parquet(storage: Storage, name: str, table: pa.Table) -> None:
    """Write a table into a directory."""
    sink = io.BytesIO()
    pq.write_table(table, sink)
    storage.write(name, sink.getvalue())


def _row(number: int, rounds: int, step: int, parts: dict[str, float]) -> dict[str, Any]:
    """The figures of a round that went well."""
    row: dict[str, Any] = {
        "round": number,
        "policy": f"policy{number}",
        "eval_prompts": PROMPTS,
        "eval_answers": 5 * PROMPTS,
        "eval_reward": next(iter(parts.values())),
        "eval_rewards": list(parts.items()),
        "eval_success": 0.2 + 0.2 * number,
        "eval_success_se": 0.03 + 0.001 * number,
        "eval_success_greedy": 0.25 + 0.2 * number,
        "eval_any": min(1.0, 0.5 + 0.2 * number),
        "eval_errors": 0,
        "eval_unknown": 0,
        "eval_tokens": 10.0 - 0.25 * number,
        "eval_cut": max(0.0, 0.2 - 0.05 * number),
        "eval_distinct": 0.9 - 0.05 * number,
        "eval_entropy": 2.0 - 0.3 * number,
        "eval_drift_initial": 0.7 * number,
        "eval_drift_initial_se": 0.05 * number,
        "eval_drift_previous": 0.6 if number else 0.0,
        "eval_drift_previous_se": 0.04 if number else 0.0,
        "seconds": [("measure", 12.0)],
    }
    if number:
        row |= {
            "reference": "policy0",
            "prompts": 40,
            "answers": 320,
            "reward": 0.2 * number,
            "rewards": [("math", 0.2 * number)],
            "success": 0.2 * number,
            "any": 0.5 + 0.1 * number,
            "mixed": 0.6,
            "ties": 16,
            "errors": 0,
            "unknown": 0,
            "cut": 0.1,
            "tokens": 10.0,
            "distinct": 0.9,
            "entropy": 1.9,
            "pairs": 24,
            "replayed": 0,
            "wanted": 48,
            "cache_hits": number - 1,
            "steps": step,
            "first_loss": 0.693 - 0.05 * (number - 1),
            "last_loss": 0.6 - 0.05 * (number - 1),
            "chosen_log_ratio": 1.4,
            "rejected_log_ratio": -2.5,
            "seconds": [("sample", 30.0), ("score", 8.0), ("pair", 0.5), ("train", 40.0), ("measure", 12.0)],
        }
    return row
