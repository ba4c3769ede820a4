"""Limits of a model, from its files: the token ids that its embedding has rows for, and the positions that it was made for.

An id or a position beyond them is an IndexError on a CPU, and on a GPU an assertion that ends the process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpo.data.ragged import tokens_in_use
from raydpo.data.tokenise import load_tokenizer
from raydpo.errors import FilesError
from raydpo.model.files import GENERATION, model_files, read_header

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ModelLimits", "check_limits", "longest_sequence", "tokenizer_warnings"]

_TOKENS = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|tokens_embed|embeddings|lm_head|embed_out)\.weight$"
)
_LEARNED = re.compile(r"(?:^|\.)(?:wpe|embed_positions|position_embeddings|positions_embed)\.weight$")
OTHER_TOWERS = re.compile(r"vision|visual|image|audio|speech|projector|connector|aligner|encoder\.")
"""Part of the names of weights that are not of the language model of a package (``model.package``)."""
PARTS = ("text_config", "vision_config", "audio_config")
"""Entries of a package's config.json for its parts."""
_TABLED = ("gptj", "codegen", "ctrl", "mpt")
"""Architectures that compute a table of positions once, of the size that config.json gives."""
_PADDED_TABLES = (
    "roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "data2vec-text", "ibert", "lilt",
    "longformer", "luke", "markuplm", "mpnet", "xmod",
)  # fmt: skip
"""Architectures that number positions from the one behind the padding token's id."""
_MOST_OTHERS = 0.01
"""Share of ids with another token at which two tokenizers are told to differ."""
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")


@dataclass(frozen=True)
class ModelLimits:
    """Limits of one model.

    Attributes:
        rows: rows of the embedding, or of the head if that has fewer; token ids must be below. None if unknown.
        positions: longest sequence, in tokens, that the model was made for; None if it has no such limit.
        fixed: whether a longer sequence cannot be computed at all. Rotary positions can; they are only untrained.
    """

    rows: int | None
    positions: int | None
    fixed: bool

    @classmethod
    def of(cls, path: str | Path, trust_remote_code: bool = False) -> ModelLimits:
        """Read the limits of the model in directory ``path``.

        Raises:
            ModelError: if it is not a model stored as safetensors.
        """
        files = model_files(path, trust_remote_code)
        shapes: dict[str, list[int]] = {}
        for file in files.weights:
            shapes |= {name: tensor["shape"] for name, tensor in read_header(file)[1].items() if len(tensor["shape"]) == 2}
        config = files.config.get("text_config") or files.config
        positions, fixed = _positions(config, [shapes[name][0] for name in _matching(_LEARNED, shapes)])
        if positions is not None and not fixed:
            positions = _stretched(config, positions)
        # Padded in the files of quantized models, whose tables have another shape.
        rows = [shapes[name][0] for name in _matching(_TOKENS, shapes)] if "quantization_config" not in files.config else []
        vocabulary = config.get("vocab_size")
        return cls(min(rows, default=vocabulary if isinstance(vocabulary, int) else None), positions, fixed)


def longest_sequence(causal_lm: nn.Module) -> int | None:
    """Tokens of the longest sequence that a loaded model can compute; None if its positions have no end."""
    tables = [
        module.num_embeddings
        for name, module in causal_lm.named_modules()
        if hasattr(module, "num_embeddings") and _LEARNED.search(f"{name}.weight") and not OTHER_TOWERS.search(name)
    ]
    positions, fixed = _positions(causal_lm.config.get_text_config().to_dict(), tables)
    return positions if fixed else None


def _positions(config: Mapping[str, Any], tables: Sequence[int]) -> tuple[int | None, bool]:
    """Positions of a model by its config.json and the rows of its tables of learned positions; and whether it can compute
    no more."""
    positions = next((value for key in _POSITIONS if isinstance(value := config.get(key), int) and value > 0), None)
    fixed = bool(tables) or config.get("model_type") in _TABLED
    if config.get("model_type") in _PADDED_TABLES:
        padding = config.get("pad_token_id")
        tables = [rows - 1 - (1 if padding is None else padding) for rows in tables]  # 1 is their default
    return min([*tables, *([] if positions is None else [positions])], default=None), fixed


def _matching(pattern: re.Pattern[str], names: Mapping[str, Any]) -> Iterator[str]:
    return (name for name in names if pattern.search(name) and not OTHER_TOWERS.search(name))


def _stretched(config: Mapping[str, Any], positions: int) -> int:
    """Positions with the model's scaling of rotary frequencies, as vLLM counts them."""
    longest = positions
    for rope in _rope_settings(config):
        factor, kind = rope.get("factor"), rope.get("rope_type", rope.get("type"))
        if isinstance(factor, int | float) and kind not in ("longrope", "su", "llama3"):
            longest = max(longest, int(factor * (rope.get("original_max_position_embeddings") or positions)))
    return longest


def _rope_settings(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(rope := config.get(key), dict):
            yield from (rope, *(one for one in rope.values() if isinstance(one, dict)))


def check_limits(tables: Sequence[pa.Table], models: Mapping[str, ModelLimits]) -> list[str]:
    """Compare the token ids and lengths of tokenised pairs with the limits of models.

    Args:
        tables: tables of ``data.pairs.PAIR_SCHEMA``.
        models: limits by the model's path.

    Returns:
        Warnings about sequences that are longer than a model was made for.

    Raises:
        ModelError: if a token id has no row, or a sequence cannot be computed.
    """
    longest = max((int(_lengths(table).max()) for table in tables if table.num_rows), default=0)
    fewest = min((limits.rows for limits in models.values() if limits.rows is not None), default=None)
    highest = max((_highest(table, fewest) for table in tables), default=-1)
    warnings = []
    for path, limits in models.items():
        if limits.rows is not None and highest >= limits.rows:
            count, first = _pairs(tables, lambda table, most=limits.rows: _highest_by_pair(table) >= most)
            raise FilesError(
                f"{count:,} pair(s) (first: {first}) have token ids up to {highest:,}, but the embedding of {path} has "
                f"{limits.rows:,} rows (ids 0 to {limits.rows - 1:,}); set model.tokenizer to the tokenizer that belongs "
                "to the model, or give the model whose embedding was resized for it"
            )
        if limits.positions is not None and longest > limits.positions:
            count, first = _pairs(tables, lambda table, most=limits.positions: _lengths(table) > most)
            found = f"{count:,} pair(s) (first: {first}) have up to {longest:,} tokens, but {path} has {limits.positions:,}"
            if limits.fixed:
                raise FilesError(f"{found} positions, and cannot compute more; set data.max_length={limits.positions}")
            warnings.append(
                f"{found} positions (config.json, with its scaling of rotary frequencies): the log-probs beyond them are of "
                f"positions that the model was not trained for; data.max_length={limits.positions} cuts or drops those pairs"
            )
    return warnings


def tokenizer_warnings(tokenizer: Any, models: Mapping[str, str], trust_remote_code: bool = False) -> list[str]:
    """Compare a tokenizer with models whose vocabulary may have the same size.

    Args:
        models: local directories of the models, by path.

    Returns:
        Warnings about models that end a text with another token, or whose own tokenizer gives other ids.
    """
    warnings = []
    ours = {number: token for token, number in tokenizer.get_vocab().items()}
    for path, directory in models.items():
        file, ends = _ends(Path(directory))
        if tokenizer.eos_token_id is not None and ends and tokenizer.eos_token_id not in ends:
            warnings.append(
                f"the tokenizer ends a text with {tokenizer.eos_token!r} (eos_token_id {tokenizer.eos_token_id}), but "
                f"eos_token_id in {file} of {path} is {', '.join(map(str, sorted(ends)))}: text that the model generates "
                "may not stop; set both to the same token"
            )
        if Path(directory).resolve() == Path(tokenizer.name_or_path).resolve():
            continue
        try:
            own = load_tokenizer(directory, trust_remote_code=trust_remote_code).get_vocab()
        except Exception:  # it has no tokenizer of its own, or one that cannot be loaded and is not used
            continue
        theirs = {number: token for token, number in own.items()}
        others = sorted(number for number in ours.keys() & theirs.keys() if ours[number] != theirs[number])
        if len(others) > _MOST_OTHERS * max(len(theirs), 1):  # a few may be tokens for chat in place of unused ones
            first = others[0]
            warnings.append(
                f"the tokenizer and that of {path} differ in {len(others):,} of {len(theirs):,} tokens (first: id {first}, "
                f"{ours[first]!r} and {theirs[first]!r}), so the model reads other texts than the data hold; set "
                "model.tokenizer to the model's own"
            )
    return warnings


def _ends(directory: Path) -> tuple[str, set[int]]:
    """Ids at which a model stops to generate, and the file that says so: generation_config.json before config.json."""
    for name in (GENERATION, "config.json"):
        try:
            values = json.loads((directory / name).read_text(encoding="utf-8"))
            found: set[int] = set()
            for part in (values, values.get("text_config") or {}):
                ends = part.get("eos_token_id")
                found |= {end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)}
        except (OSError, ValueError, AttributeError):
            continue
        if found:
            return name, found
    return "config.json", set()


def _pairs(tables: Sequence[pa.Table], wanted: Any) -> tuple[int, str]:
    """Number of the pairs for which ``wanted(table)`` is true, and ``pair_id`` of the first."""
    found = [name for table in tables for name in table["pair_id"].filter(pa.array(wanted(table))).to_pylist()]
    return len(found), found[0]


def _lengths(table: pa.Table) -> np.ndarray:
    """Tokens of the longer sequence of each pair: int64 [pairs]."""
    prompt, chosen, rejected = (tokens_in_use(table, part).astype(np.int64) for part in ("prompt", "chosen", "rejected"))
    return prompt + np.maximum(chosen, rejected)


def _highest(table: pa.Table, fewest: int | None) -> int:
    """Highest token id, -1 if there is none.

    Args:
        fewest: rows of the smallest embedding. Where no id of a pair before truncation reaches it, tokens are not read.
    """
    if "highest" in table.column_names:
        bound = pc.max(table["highest"]).as_py()
        if bound is None or fewest is None or bound < fewest or "prompt_ids" not in table.column_names:
            return -1 if bound is None else bound
    columns = (chunk for part in ("prompt", "chosen", "rejected") for chunk in table[f"{part}_ids"].chunks)
    return max((pc.max(chunk.flatten()).as_py() or 0 for chunk in columns if len(chunk)), default=-1)


def _highest_by_pair(table: pa.Table) -> np.ndarray:
    """Highest token id of each pair: [pairs]. Only called for a message."""
    if "prompt_ids" not in table.column_names:
        return table["highest"].to_numpy()
    parts = (table[f"{part}_ids"].to_pylist() for part in ("prompt", "chosen", "rejected"))
    return np.array([max(max(ids, default=-1) for ids in pair) for pair in zip(*parts, strict=True)])
