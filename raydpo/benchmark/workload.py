"""Workload of both sides: a file of pairs that both read, and models with random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raydpo.config import DataConfig, SourceConfig
from raydpo.data.pairs import load_pairs
from raydpo.data.plan import epoch_order
from raydpo.data.preference import normalise
from raydpo.data.records import read_records
from raydpo.data.shapes import Shapes
from raydpo.data.tokenise import Tokeniser, load_tokenizer
from raydpo.errors import DataError
from raydpo.estimate.work import pair_groups

__all__ = ["ORDERS", "SHAPES", "Workload", "random_records", "usable_records", "write_random_llama"]

ORDERS = ("file", "shuffled")
"""Orders of the pairs. ``shuffled`` is the order that ``data.shuffle`` gives; TRL then reads a file in that order."""
SPREAD = 0.25
"""Random lengths vary by up to this share of the mean. Rows of equal length would need no padding."""

_LLAMA_3 = {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
SHAPES = {
    "random-1b": _LLAMA_3
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64, "tie_word_embeddings": True},
    "random-8b": _LLAMA_3 | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
}
"""Configurations of Llama 3.2 1B and Llama 3.1 8B."""


@dataclass(frozen=True)
class Workload:
    """The pairs of one measurement.

    Attributes:
        file, in_order: jsonl files of the pairs as raydpo reads them, and in the order in which both sides take them.
        rows: line of ``file`` of each pair, in the order taken.
        table: the pairs as tokenised by raydpo, a table of ``data.pairs.PAIR_SCHEMA`` in the order of ``file``.
        shapes: lengths of the pairs in the order in which they are taken.
    """

    file: Path
    in_order: Path
    order: str
    rows: list[int]
    table: pa.Table
    shapes: Shapes

    @classmethod
    def write(cls, records: Sequence[dict[str, Any]], model: str, max_length: int, order: str, directory: Path) -> Workload:
        """Write the files of these records, and tokenise them as a run would.

        Raises:
            DataError: if not every record makes one pair.
        """
        rows = list(range(len(records)))
        if order == "shuffled":
            rows = epoch_order(np.zeros(len(rows), int), np.ones(1), seed=0, epoch=0, shuffle=True).tolist()
        directory.mkdir(parents=True, exist_ok=True)
        file, in_order = directory / f"pairs-{len(rows)}.jsonl", directory / f"pairs-{len(rows)}-{order}.jsonl"
        _write_lines(file, records)
        _write_lines(in_order, [records[row] for row in rows])
        config = DataConfig(train=(SourceConfig(path=str(file)),), max_length=max_length)
        table = load_pairs(config, Tokeniser(load_tokenizer(model))).train
        if table.num_rows != len(rows):
            raise DataError(f"{len(rows)} records make {table.num_rows} pairs; the benchmark needs one pair of each record")
        return cls(file, in_order, order, rows, table, pair_groups(table.take(rows))[1])

    @property
    def name(self) -> str:
        """Its name in the file of results."""
        return f"{len(self.rows)} pairs, {self.order}"

    def statistics(self) -> dict[str, Any]:
        """Counts over all pairs; and of each pair, in the order taken, ``widths`` (positions of a padded row: prompt and
        longer completion) and ``tokens`` (prompt and both completions), from which unmeasured steps are extrapolated."""
        return {
            "pairs": self.table.num_rows,
            "order": self.order,
            "prompt_tokens": int(self.shapes.prompt.sum()),
            "completion_tokens": int(self.shapes.tokens.sum()),
            "longest": int(self.shapes.longest.max()),
            "widths": self.shapes.longest.tolist(),
            "tokens": (self.shapes.prompt + self.shapes.tokens).tolist(),
        }


def usable_records(path: str, pairs: int, model: str, max_length: int) -> list[dict[str, Any]]:
    """The first records of a preference file that make one pair each, which fits ``max_length`` uncut: TRL can then do
    without a limit, and use its reference log-probs again for another beta. Each has prompt, chosen and rejected, all as
    text or all as messages.

    Raises:
        DataError: if the file cannot be read or holds fewer such records.
        ModelError: if the model has no tokenizer, or the tokenizer lacks something the data need.
    """
    tokeniser, usable = Tokeniser(load_tokenizer(model)), []
    # Some records are malformed or too long, so a few more are read; all of them only if that is not enough.
    for limit in (pairs + 100, 4 * pairs + 1000, None):
        source = SourceConfig(path=path, limit=limit)
        config = DataConfig(
            train=(source,), max_length=max_length, truncation="drop", max_dropped=1.0, max_malformed=1.0, max_lost=1.0
        )
        kept = {pair.rpartition(":")[2] for pair in load_pairs(config, tokeniser).train["pair_id"].to_pylist()}
        found = (record for record in read_records(source) if record.value is not None and str(record.row) in kept)
        read = [(preferences[0], record) for record in found if len(preferences := normalise(record.value or {})) == 1]
        usable = [
            {"prompt": one.prompt, "chosen": one.chosen, "rejected": one.rejected} for one, _ in read if one.tools is None
        ]
        if len(usable) >= pairs:
            return usable[:pairs]
    raise DataError(f"{path} holds {len(usable)} usable pairs of at most {max_length} tokens, fewer than --pairs {pairs}")


def random_records(pairs: int, prompt: int, completion: int, vocabulary: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs of random words for a model of ``write_random_llama``, a token a word; the same arguments give the same pairs.

    Args:
        prompt, completion: mean tokens; each length varies by up to ``SPREAD``.
        vocabulary: words of the model's tokenizer.
    """
    rng = np.random.default_rng((seed, prompt, completion))
    means = [prompt, completion, completion]
    sizes = np.maximum(1, np.round(rng.uniform(1 - SPREAD, 1 + SPREAD, (pairs, 3)) * means)).astype(int)

    def words(size: int) -> str:
        return "".join(f"w{token} " for token in rng.integers(_SPECIAL, vocabulary, size))

    return [dict(zip(("prompt", "chosen", "rejected"), map(words, each), strict=True)) for each in sizes]


_SPECIAL = 2
"""Number of special tokens of the word tokenizer: padding and end."""


def write_random_llama(directory: Path, shape: Mapping[str, Any], device: torch.device, seed: int = 0) -> None:
    """Write a Llama with random bfloat16 weights and a tokenizer of made-up words to ``directory``, unless it exists.

    The weights are made on ``device`` and need 2 bytes a parameter there.
    """
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    if directory.is_dir():
        return
    shape = dict(shape) | {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    words = {"<pad>": 0, "</s>": 1} | {f"w{number}": number for number in range(_SPECIAL, shape["vocab_size"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    partial = directory.with_name(f"{directory.name}.partial")
    model.save_pretrained(partial)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(partial)
    partial.rename(directory)  # so that an interrupted write is not taken for a model
    if device.type == "cuda":
        del model
        torch.cuda.empty_cache()  # for the processes that follow


def _write_lines(file: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write the file, unless it holds this already: a file with another time is another one for ``datasets``, and TRL would
    not find its reference log-probs again (datasets 5.2, ``data_files.py``)."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")
