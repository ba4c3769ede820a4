"""Which files a model or an adapter in a directory has: those that transformers and PEFT read, no others. No torch.

Whoever hashes, counts or checks weights asks here, so that all of them mean what is loaded. What is not known to be read as
it is hashed is refused.
"""

from __future__ import annotations

import json
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydpo.errors import FilesError

__all__ = ["AdapterFiles", "ModelFiles", "adapter_files", "model_files", "read_header", "weights_lacking"]

SINGLE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"

_IN_LAYERS = frozenset({
    "LORA", "ADALORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3", "LN_TUNING", "VERA", "PVERA", "VBLORA", "FOURIERFT", "HRA",
    "MISS", "BONE", "RANDLORA", "ROAD", "TRAINABLE_TOKENS", "HIRA", "SHIRA", "C3A", "WAVEFT", "OSF", "DELORA", "GRALORA",
})
"""Kinds of PEFT adapters that change the layers of the model and nothing before or after them."""


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """The files of a model.

    Attributes:
        config: the entries of config.json.
        weights: safetensors files that transformers loads, in order of their names.
        passed_over: those of an index that it would load if there were no single file beside it.
        code: Python files, in order of their names.
        runs_code: whether loading runs them.
    """

    directory: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]
    passed_over: tuple[Path, ...]
    code: tuple[Path, ...]
    runs_code: bool


@dataclass(frozen=True, kw_only=True)
class AdapterFiles:
    """The files of a PEFT adapter: the entries of adapter_config.json, and one safetensors file."""

    config: dict[str, Any]
    weights: Path


def model_files(path: str | Path, trust_remote_code: bool = False) -> ModelFiles:
    """The files of the model in directory ``path``.

    Raises:
        ModelError: if it is no model stored as safetensors, or one of which it cannot be told what would be loaded.
    """
    directory = Path(path)
    has_adapter = (directory / "adapter_config.json").is_file()
    if has_adapter and not any((directory / name).is_file() for name in (SINGLE, INDEX)):
        raise FilesError(f"{directory} holds an adapter, and a model is wanted; name the adapter's base model as path "
                         "(model.path, reference.path) and this directory as adapter (model.adapter, reference.adapter)")
    if has_adapter:
        raise FilesError(f"{directory} holds a model and an adapter (adapter_config.json), and transformers would load "
                         "both; move the adapter to a directory of its own and name the adapter in model.adapter (or "
                         "reference.adapter)")
    if not (directory / "config.json").is_file():
        raise FilesError(f"{directory} has no config.json; a Hugging Face model directory is wanted, with config.json and "
                         f"{SINGLE} (or {INDEX})")
    config = _read_json(directory / "config.json")
    if "configuration_files" in config:
        raise FilesError(f"{directory}/config.json names other files (configuration_files), of which each version of "
                         "transformers takes another one; keep one config.json")
    strange = next((file for file in directory.glob("shard-*.safetensors")
                    if re.fullmatch(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors", file.name)), None)
    if strange is not None:
        raise FilesError(f"{directory} holds a distributed checkpoint ({strange.name}), which transformers would load in "
                         f"place of {SINGLE}; save the model with save_pretrained to a directory of its own")
    weights, passed_over = _weights(directory, config)
    auto_map = config.get("auto_map") or {}
    if trust_remote_code:
        _refuse_foreign_code(directory, auto_map)
    runs_code = trust_remote_code and bool(auto_map)
    return ModelFiles(directory=directory, config=config, weights=weights, passed_over=passed_over,
                      code=_code(directory, nested=runs_code), runs_code=runs_code)


def adapter_files(path: str | Path) -> AdapterFiles:
    """The files of the PEFT adapter in directory ``path``.

    Raises:
        ModelError: if it is none stored as safetensors, or of a kind that raydpo would not compute.
    """
    directory = Path(path)
    if not (directory / "adapter_config.json").is_file() and (directory / "config.json").is_file():
        raise FilesError(f"{directory} holds a model, and an adapter is wanted; name it as path (model.path, "
                         "reference.path), not as adapter")
    config = _read_json(directory / "adapter_config.json")
    if not (directory / ADAPTER).is_file():
        raise FilesError(f"{directory} has no {ADAPTER}; raydpo reads PEFT adapters saved as safetensors")
    kind = config.get("peft_type")
    if kind not in _IN_LAYERS or config.get("alora_invocation_tokens"):
        raise FilesError(f"{directory} is an adapter of kind {kind}{' (aLoRA)' if kind == 'LORA' else ''}, which works "
                         "outside of the model's layers, or is not known to raydpo: it would be left out of the log-probs. "
                         "Use one that is in the layers, such as LoRA")
    return AdapterFiles(config=config, weights=directory / ADAPTER)


def weights_lacking(path: str | Path) -> list[str]:
    """Names of files that may hold the weights of what was fetched to directory ``path`` without them; none if they are
    there already."""
    directory = Path(path)
    if (directory / "config.json").is_file():
        named = _read_json(directory / "config.json").get("transformers_weights")
        index = directory / (named if named and named.endswith(".json") else INDEX)
        shards = _shards(index) if index.is_file() else []
        wanted = [named] if named and named != index.name else shards or [SINGLE]
        # A repository may have both; that is told when they are read.
        both = [*wanted, SINGLE]
    elif (directory / "adapter_config.json").is_file():
        both = wanted = [ADAPTER]
    else:
        return []
    return [] if all((directory / name).is_file() for name in wanted) else both


def read_header(file: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Of a safetensors file: the byte at which the data begin, and of each tensor ``dtype``, ``shape`` and
    ``data_offsets``.

    Raises:
        ModelError: if it is no such file.
    """
    try:
        with open(file, "rb") as stream:
            start = stream.read(8)
            if start == b"version ":
                raise FilesError(f"{file} is a Git LFS pointer in the place of the weights; run 'git lfs pull' in its "
                                 "directory")
            (length,) = struct.unpack("<Q", start)
            if length > file.stat().st_size:
                raise FilesError(f"{file} is not a safetensors file, or is truncated")
            header = json.loads(stream.read(length))
    except (OSError, struct.error, ValueError) as error:
        if isinstance(error, FilesError):
            raise
        raise FilesError(f"{file} is not a safetensors file: {error}") from None
    header.pop("__metadata__", None)
    return 8 + length, header


def _weights(directory: Path, config: dict[str, Any]) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """What transformers loads and what it passes over: the file that config.json names, else the single file, else the files
    of the index."""
    named = config.get("transformers_weights")
    parts = [part for part in config.values() if isinstance(part, dict)]
    if any("transformers_weights" in part for part in parts) or (named and "text_config" in config):
        raise FilesError(f"{directory}/config.json names the weights of a part of the model (transformers_weights), and "
                         f"which file is loaded cannot be told; save the model with save_pretrained, as {SINGLE}")
    if named is not None:
        file = directory / str(named)
        # As text: files of the hub's cache are links to somewhere else.
        inside = Path(os.path.abspath(file)).is_relative_to(os.path.abspath(directory))
        if not inside or not str(named).endswith((".safetensors", ".safetensors.index.json")):
            raise FilesError(f"transformers_weights in {directory}/config.json is {named!r}; a safetensors file or an index "
                             "in that directory is wanted")
        return _there(directory, _shards(file) if file.suffix == ".json" else [str(named)]), ()
    single, index = directory / SINGLE, directory / INDEX
    if not index.is_file():
        return _there(directory, [SINGLE]), ()
    shards = _shards(index)
    if not single.is_file():
        return _there(directory, shards), ()
    ours, theirs = set(read_header(single)[1]), set(_weight_map(index))
    if ours != theirs:
        raise FilesError(f"{directory} has {SINGLE} and {INDEX}, which name different tensors ({min(ours ^ theirs)}, for "
                         "one), so which of the two is meant cannot be known; delete the one that is not")
    files = [directory / name for name in shards]
    return (single,), tuple(files) if all(file.is_file() for file in files) else ()


def _there(directory: Path, names: list[str]) -> tuple[Path, ...]:
    files = tuple(directory / name for name in names)
    for file in files:
        if not file.is_file():
            pickled = any(directory.glob("pytorch_model*.bin"))
            raise FilesError(f"{directory} has no {file.name}" + (
                "; its weights are pickled (pytorch_model.bin), which can run code when loaded: convert them with "
                "save_pretrained of a recent transformers" if pickled else "; a Hugging Face model directory is wanted"))
    return files


def _shards(index: Path) -> list[str]:
    return sorted(set(_weight_map(index).values()))


def _weight_map(index: Path) -> dict[str, str]:
    found = _read_json(index).get("weight_map")
    if not isinstance(found, dict):
        raise FilesError(f"{index} has no weight_map; an index of safetensors files is wanted")
    return found


def _code(directory: Path, nested: bool) -> tuple[Path, ...]:
    files = sorted(directory.glob("*.py"))
    if nested:  # code that runs may import what lies deeper
        files += sorted(file for file in directory.glob("*/**/*.py")
                        if not any(part.startswith(".") for part in file.relative_to(directory).parts))
    return tuple(files)


def _refuse_foreign_code(directory: Path, auto_map: dict[str, Any]) -> None:
    for value in auto_map.values():
        for name in value if isinstance(value, list) else [value]:
            if name and "--" in name:
                repository = name.partition("--")[0]
                raise FilesError(f"{directory}/config.json would run code of another repository as it is there today "
                                 f"(auto_map: {name!r}); copy the .py files of {repository} into {directory} and take "
                                 f"'{repository}--' out of auto_map, or set model.trust_remote_code=false")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FilesError(f"cannot read {file}: {error}") from None
    if not isinstance(found, dict):
        raise FilesError(f"cannot read {file}: it holds no JSON object")
    return found
