"""Workload of both sides: pairs as token ids, from a data file or random, and models with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raydpo.config import DataConfig, SourceConfig
from raydpo.data.keys import completion_key
from raydpo.data.pairs import PAIR_SCHEMA, load_pairs
from raydpo.data.tokenise import Tokeniser, load_tokenizer
from raydpo.errors import DataError
from raydpo.estimate.plan import pair_groups

__all__ = ["IDS", "SHAPES", "of_file", "parts", "statistics", "synthetic", "write_random_llama"]

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
"""Columns that both sides read."""
SPREAD = 0.25
"""Random lengths vary by up to this share of the mean. Rows of equal length would need no padding."""

_LLAMA_3 = {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
SHAPES = {
    "random-1b": _LLAMA_3
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64, "tie_word_embeddings": True},
    "random-8b": _LLAMA_3 | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
}
"""Configurations of Llama 3.2 1B and Llama 3.1 8B."""


def of_file(path: str, pairs: int, model: str, max_length: int) -> pa.Table:
    """The first usable pairs of a preference file, tokenised as in a run: a table of ``data.pairs.PAIR_SCHEMA``.

    Raises:
        DataError: if the file cannot be read or holds fewer pairs.
        ModelError: if the model has no tokenizer, or the tokenizer lacks something the data need.
    """
    tokeniser = Tokeniser(load_tokenizer(model))
    # Some records are malformed or too long, so a few more are read; all of them only if that is not enough.
    for limit in (pairs + 100, 4 * pairs + 1000, None):
        config = DataConfig(train=(SourceConfig(path=path, limit=limit),), max_length=max_length, max_dropped=1.0)
        found = load_pairs(config, tokeniser).train
        if found.num_rows >= pairs:
            return found.slice(0, pairs)
    raise DataError(f"{path} holds {found.num_rows} usable pairs, fewer than --pairs {pairs}")


def synthetic(pairs: int, length: int, ratio: tuple[int, int], vocabulary: int, seed: int) -> pa.Table:
    """Pairs of random tokens; the same arguments give the same pairs.

    Args:
        length: mean tokens of prompt and one completion; each length varies by up to ``SPREAD``.
        ratio: prompt tokens to completion tokens.
        vocabulary: number of token ids to draw from.
    """
    rng = np.random.default_rng((seed, length, *ratio))
    means = [length * part / sum(ratio) for part in (ratio[0], ratio[1], ratio[1])]
    sizes = np.maximum(1, np.round(rng.uniform(1 - SPREAD, 1 + SPREAD, (pairs, 3)) * means)).astype(int)
    rows = []
    for number, each in enumerate(sizes, 1):
        prompt, chosen, rejected = (rng.integers(0, vocabulary, size).astype(np.int32) for size in each)
        rows.append(
            {
                "pair_id": f"random:{number}",
                "source": "random",
                "weight": 1.0,
                "prompt_ids": prompt,
                "chosen_ids": chosen,
                "rejected_ids": rejected,
                "chosen_key": completion_key(prompt, chosen),
                "rejected_key": completion_key(prompt, rejected),
                "chosen_full": each[1],
                "rejected_full": each[2],
            }
        )
    return pa.Table.from_pylist(rows, schema=PAIR_SCHEMA)


def parts(table: pa.Table, per_step: int) -> list[range]:
    """Row numbers of each step of one epoch, in file order. The last step may be smaller."""
    return [range(first, min(first + per_step, table.num_rows)) for first in range(0, table.num_rows, per_step)]


def statistics(table: pa.Table, pairs_per_step: int) -> dict[str, Any]:
    """Counts over all pairs. ``positions``: token positions of one forward pass in each layout. Padded: all rows of a step
    in one batch, each as wide as the longest of them."""
    _, shapes = pair_groups(table)
    in_steps = [list(rows) for rows in parts(table, pairs_per_step)]
    return {
        "pairs": table.num_rows,
        "prompt_tokens": int(shapes.prompt.sum()),
        "completion_tokens": int(shapes.tokens.sum()),
        "longest": int(shapes.longest.max()),
        "positions": {
            "padded": sum(int(shapes.rows[rows].sum() * shapes.longest[rows].max()) for rows in in_steps),
            "packed": int(shapes.positions("packed").sum()),
            "tree": int(shapes.positions("tree").sum()),
        },
    }


def write_random_llama(directory: Path, shape: Mapping[str, object], device: torch.device, seed: int = 0) -> None:
    """Write a Llama with random bfloat16 weights and no tokenizer to ``directory``, unless it exists.

    The weights are made on ``device`` and need 2 bytes a parameter there.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    if directory.is_dir():
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    partial = directory.with_name(f"{directory.name}.partial")
    model.save_pretrained(partial)
    partial.rename(directory)  # so that an interrupted write is not taken for a model
    if device.type == "cuda":
        del model
        torch.cuda.empty_cache()  # for the processes that follow
