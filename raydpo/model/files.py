"""The files of a model or an adapter in a directory: exactly those that transformers and PEFT read. Imports no torch.

Hashing, counting and checking of weights all use these lists, so that they agree with what is loaded. A directory for which
that is unclear is refused.
"""

from __future__ import annotations

import json
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydpo.errors import FilesError, one_line, some_of
from raydpo.storage.pointers import refuse_pointers

__all__ = [
    "AdapterFiles",
    "ModelFiles",
    "adapter_files",
    "model_files",
    "read_header",
    "weights_lacking",
]

SINGLE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
GENERATION = "generation_config.json"
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_IN_LAYERS = (
    "LORA", "ADALORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3", "LN_TUNING", "VERA", "PVERA", "VBLORA", "FOURIERFT", "HRA",
    "MISS", "BONE", "RANDLORA", "ROAD", "TRAINABLE_TOKENS", "HIRA", "SHIRA", "C3A", "WAVEFT", "OSF", "DELORA", "GRALORA",
)  # fmt: skip
"""Kinds of PEFT adapters that only change layers of the model."""


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """The files of a model.

    Attributes:
        config: entries of config.json.
        weights: safetensors files that transformers loads, sorted by name.
        passed_over: files of an index that transformers ignores because there is also a single file.
        code: Python files, sorted by name.
        runs_code: whether loading runs that code.
    """

    directory: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]
    passed_over: tuple[Path, ...]
    code: tuple[Path, ...]
    runs_code: bool


@dataclass(frozen=True, kw_only=True)
class AdapterFiles:
    """The files of a PEFT adapter: entries of adapter_config.json, and one safetensors file."""

    config: dict[str, Any]
    weights: Path


def model_files(path: str | Path, trust_remote_code: bool = False) -> ModelFiles:
    """The files of the model in directory ``path``.

    Raises:
        ModelError: if it is not a model stored as safetensors, or it is unclear which files would be loaded.
    """
    directory = Path(path)
    has_adapter = (directory / "adapter_config.json").is_file()
    if has_adapter and not any((directory / name).is_file() for name in (SINGLE, INDEX)):
        raise FilesError(
            f"{directory} holds an adapter, and a model is expected; name the adapter's base model as path "
            "(model.path, reference.path) and this directory as adapter (model.adapter, reference.adapter)"
        )
    if has_adapter:
        raise FilesError(
            f"{directory} holds a model and an adapter (adapter_config.json), and transformers would load "
            "both; move the adapter to a directory of its own and name the adapter in model.adapter (or "
            "reference.adapter)"
        )
    if not (directory / "config.json").is_file():
        raise FilesError(
            f"{directory} has no config.json; a Hugging Face model directory is expected, with config.json and "
            f"{SINGLE} (or {INDEX})"
        )
    config = _read_json(directory / "config.json")
    if "configuration_files" in config:
        raise FilesError(
            f"{directory}/config.json names other files (configuration_files), and each version of "
            "transformers chooses another one; keep one config.json"
        )
    strange = next(filter(_DISTRIBUTED.fullmatch, sorted(file.name for file in directory.glob("shard-*"))), None)
    if strange is not None:
        raise FilesError(
            f"{directory} holds a distributed checkpoint ({strange}), which transformers would load in "
            f"place of {SINGLE}; save the model with save_pretrained to a directory of its own"
        )
    weights, passed_over = _weights(directory, config)
    auto_map = config.get("auto_map") or {}
    if trust_remote_code:
        _refuse_foreign_code(directory, auto_map)
    runs_code = trust_remote_code and bool(auto_map)
    code = _code(directory, nested=runs_code)
    refuse_pointers([*weights, *code])
    if (directory / GENERATION).is_file():  # of a broken one, transformers makes up another without a word
        _read_json(directory / GENERATION)
    return ModelFiles(
        directory=directory, config=config, weights=weights, passed_over=passed_over, code=code, runs_code=runs_code
    )


def adapter_files(path: str | Path) -> AdapterFiles:
    """The files of the PEFT adapter in directory ``path``.

    Raises:
        ModelError: if it is not an adapter stored as safetensors, or of a kind that raydpo does not support.
    """
    directory = Path(path)
    if not (directory / "adapter_config.json").is_file() and (directory / "config.json").is_file():
        raise FilesError(
            f"{directory} holds a model, and an adapter is expected; name it as path (model.path, "
            "reference.path), not as adapter"
        )
    if not (directory / "adapter_config.json").is_file():
        raise FilesError(
            f"{directory} has no adapter_config.json; a PEFT adapter is expected, with adapter_config.json and {ADAPTER}"
        )
    config = _read_json(directory / "adapter_config.json")
    if not (directory / ADAPTER).is_file():
        raise FilesError(f"{directory} has no {ADAPTER}; raydpo reads PEFT adapters saved as safetensors")
    refuse_pointers([directory / ADAPTER])
    kind = config.get("peft_type")
    if kind not in _IN_LAYERS or config.get("alora_invocation_tokens"):
        raise FilesError(
            f"{directory} is an adapter of kind {kind}{' (aLoRA)' if kind == 'LORA' else ''}, which changes "
            "more than the model's layers or is not known to raydpo: it would be left out of the log-probs. "
            "Use an adapter of layers, such as LoRA"
        )
    return AdapterFiles(config=config, weights=directory / ADAPTER)


def weights_lacking(path: str | Path) -> list[str]:
    """Names of weight files still to fetch into directory ``path``, which has the other files; empty if none is missing."""
    directory = Path(path)
    if (directory / "config.json").is_file():
        named = _read_json(directory / "config.json").get("transformers_weights")
        index = directory / (named if named and named.endswith(".json") else INDEX)
        shards = _shards(index) if index.is_file() else []
        wanted = [named] if named and named != index.name else shards or [SINGLE]
        # A repository may have both; ``model_files`` checks that when they are read.
        both = [*wanted, SINGLE]
    elif (directory / "adapter_config.json").is_file():
        both = wanted = [ADAPTER]
    else:
        return []
    return [] if all((directory / name).is_file() for name in wanted) else both


def read_header(file: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Read the header of a safetensors file.

    Returns:
        The byte at which the data begin; and ``dtype``, ``shape`` and ``data_offsets`` of each tensor by name.

    Raises:
        ModelError: if it is not a safetensors file.
    """
    refuse_pointers([file])
    size = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                raise ValueError(f"its first bytes ask for a header of {length:,} bytes")
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            needed = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (OSError, struct.error, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        why = one_line(error, 200) if size else "it is empty"
        raise FilesError(f"{file} is not a safetensors file ({why}); fetch it again") from None
    if needed < size:
        raise FilesError(f"{file} has {size - needed:,} bytes behind its last tensor, so it is damaged; fetch it again")
    if needed > size:
        raise FilesError(f"{file} is truncated: it has {size:,} bytes, and its tensors need {needed:,}; fetch it again")
    return 8 + length, header


def _weights(directory: Path, config: dict[str, Any]) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Files that transformers loads (named in config.json, else the single file, else the index's), and those it ignores."""
    named = config.get("transformers_weights")
    parts = [part for part in config.values() if isinstance(part, dict)]
    if any("transformers_weights" in part for part in parts) or (named and "text_config" in config):
        raise FilesError(
            f"{directory}/config.json names the weights of a part of the model (transformers_weights), so it "
            f"is unclear which file is loaded; save the model with save_pretrained, as {SINGLE}"
        )
    if named is not None:
        file = directory / str(named)
        # Compared as text, since files in the hub's cache are links to other directories.
        inside = Path(os.path.abspath(file)).is_relative_to(os.path.abspath(directory))
        if not inside or not str(named).endswith((".safetensors", ".safetensors.index.json")):
            raise FilesError(
                f"transformers_weights in {directory}/config.json is {named!r}; a safetensors file or an index "
                "in that directory is expected"
            )
        if file.suffix == ".json":
            return _there(directory, _shards(file), file), ()
        return _there(directory, [str(named)]), ()
    single, index = directory / SINGLE, directory / INDEX
    if not index.is_file():
        return _there(directory, [SINGLE]), ()
    shards = _shards(index)
    if not single.is_file():
        return _there(directory, shards, index), ()
    ours, theirs = set(read_header(single)[1]), set(_weight_map(index))
    if ours != theirs:
        raise FilesError(
            f"{directory} has {SINGLE} and {INDEX}, which name different tensors (such as "
            f"{min(ours ^ theirs)}), so it is unclear which is meant; delete the wrong one"
        )
    files = [directory / name for name in shards]
    return (single,), tuple(files) if all(file.is_file() for file in files) else ()


def _there(directory: Path, names: list[str], index: Path | None = None) -> tuple[Path, ...]:
    """The files ``names``, which ``index`` lists if it is given. Refused if one is missing."""
    files = tuple(directory / name for name in names)
    missing = [name for name in names if not (directory / name).is_file()]
    if index is not None and missing:
        raise FilesError(
            f"{directory} lacks {some_of(missing)}, {len(missing):,} of the {len(names):,} files of weights that "
            f"{index.name} lists; fetch the model again, or put the files there"
        )
    for file in files:
        if not file.is_file():
            expected = "a Hugging Face model directory is expected"
            if any(directory.glob("pytorch_model*.bin")):
                expected = (
                    "its weights are pickled (pytorch_model.bin), which can run code when loaded: convert them with "
                    "save_pretrained of a recent transformers"
                )
            raise FilesError(f"{directory} has no {file.name}; {expected}")
    return files


def _shards(index: Path) -> list[str]:
    return sorted(set(_weight_map(index).values()))


def _weight_map(index: Path) -> dict[str, str]:
    found = _read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise FilesError(f"{index} has no weight_map; an index of safetensors files is expected")
    return found


def _code(directory: Path, nested: bool) -> tuple[Path, ...]:
    files = sorted(directory.glob("*.py"))
    if nested:  # code that runs may import from subfolders
        below = (file for file in directory.glob("*/**/*.py") if "/." not in f"/{file.relative_to(directory).as_posix()}")
        files += sorted(below)
    return tuple(files)


def _refuse_foreign_code(directory: Path, auto_map: dict[str, Any]) -> None:
    for value in auto_map.values():
        for name in value if isinstance(value, list) else [value]:
            if name and "--" in name:
                repository = name.partition("--")[0]
                raise FilesError(
                    f"{directory}/config.json would run code of another repository, in its current version "
                    f"(auto_map: {name!r}); copy the .py files of {repository} into {directory} and take "
                    f"'{repository}--' out of auto_map, or set model.trust_remote_code=false"
                )


def _read_json(file: Path) -> dict[str, Any]:
    refuse_pointers([file])
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FilesError(f"cannot read {file}: {one_line(error, 200)}") from None
    if not isinstance(found, dict):
        raise FilesError(f"cannot read {file}: it holds no JSON object")
    return found
