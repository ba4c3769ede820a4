"""What a reference is: everything that its log-probs depend on besides token ids, and nothing else.

The identity names the directory that holds its log-probs, so a cache of other weights is not found rather than wrong.
Tokenizer, template and truncation are not in it: they are in the token ids. Beta, loss, seed, learning rate, LoRA rank
and world size are not in it: they do not matter.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import struct
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from raydpo.config import is_hub_name
from raydpo.errors import ModelError
from raydpo.local_copy import local_home

__all__ = ["QUANTIZED", "SCORING_VERSION", "ReferenceIdentity", "identify", "on_this_machine", "resolve_model"]

SCORING_VERSION = 2
"""Raised whenever raydpo itself changes the numbers it would store."""

_NOT_ARCHITECTURE = frozenset({
    "_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "_attn_implementation",
    "_attn_implementation_autoset", "id2label", "label2id",
})
_NOT_ADAPTER = frozenset({"base_model_name_or_path", "inference_mode", "revision", "auto_mapping", "task_type",
                          "peft_version", "lora_dropout"})


@dataclass(frozen=True, kw_only=True)
class ReferenceIdentity:
    """The identity field by field. Digests are hexadecimal SHA-256."""

    weights: str
    """Of all weight tensors: names, dtypes, shapes and bytes, however they are split into files."""
    architecture: str
    """Of config.json without names and paths, and of any Python code beside it."""
    adapter: str | None
    """Of the adapter's weights and configuration."""
    dtype: str
    """Precision of the forward pass."""
    quantisation: str | None = None
    scoring_version: int = SCORING_VERSION

    @property
    def digest(self) -> str:
        """32 hexadecimal digits over all fields: the name of the cache directory."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:32]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> ReferenceIdentity:
        return cls(**json.loads(text))

    def differences(self, other: ReferenceIdentity) -> list[str]:
        """``field: mine, not theirs`` for each field in which the two differ."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return [f"{field}: {_short(mine[field])} here, {_short(theirs[field])} there" for field in mine
                if mine[field] != theirs[field]]

    def same_model(self, other: ReferenceIdentity) -> bool:
        """Whether the two are the same function but for rounding: all fields but the precision agree."""
        return dataclasses.replace(self, dtype=other.dtype) == other


QUANTIZED = {"4bit": "bitsandbytes nf4, double", "8bit": "bitsandbytes int8, threshold 0"}
"""What ``model.load`` makes of each; part of the identity, so a change there must change the text here."""


def identify(path: str | Path, dtype: str, adapter: str | Path | None = None,
             quantization: str | None = None) -> ReferenceIdentity:
    """The identity of the model in directory ``path``, with the adapter in directory ``adapter`` on top.

    Args:
        quantization: ``4bit``, ``8bit`` or None.

    Reads every weight once; digests are remembered for each file by path, inode, size and times.

    Raises:
        ModelError: if a directory is not a model or adapter stored as safetensors.
    """
    directory = Path(path)
    return ReferenceIdentity(
        weights=_tensors_digest(_weight_files(directory)),
        architecture=_settings_digest(directory / "config.json", _NOT_ARCHITECTURE, code=directory),
        adapter=None if adapter is None else _adapter_digest(Path(adapter)),
        dtype=dtype,
        quantisation=None if quantization is None else QUANTIZED[quantization],
    )


def resolve_model(path: str) -> str:
    """The local directory of a model or adapter, fetched from the hub if ``path`` is a hub name that is not here yet.

    Raises:
        ModelError: if it can be found neither here nor there.
    """
    if Path(path).is_dir():
        return str(Path(path).absolute())
    if not is_hub_name(path):
        raise ModelError(f"there is no model directory {path!r} on this machine; put it on storage that every node "
                         "mounts under the same path, or use a hub name")
    return _from_hub(path)


Spec = TypeVar("Spec")


def on_this_machine(spec: Spec) -> Spec:
    """A specification of a model (with ``path``, and perhaps ``adapter`` and ``origin``) whose directories a worker has.

    A driver that got a model from the hub names a directory that other machines lack. Its name holds the repository and the
    revision, so they fetch the same files, and what is there already costs one question to the hub. What the driver copied
    from a bucket (``origin``) they copy, too. Any other directory is left as it is.

    Raises:
        ModelError: if the hub does not give it, or the bucket has other files by now.
    """
    places = {name: place for name in ("path", "adapter") if (place := getattr(spec, name, None))}
    here = {name: _local(place) for name, place in places.items()}
    if getattr(spec, "origin", None) is not None:
        here["adapter" if "adapter" in here else "path"] = spec.origin.here()
    return dataclasses.replace(spec, **here)


def _local(directory: str) -> str:
    snapshot = re.search(r"/models--([^/]+)/snapshots/([0-9a-f]{40})/?$", directory)
    if snapshot is None:
        return directory
    try:  # even where the directory exists: another worker of this machine may be filling it at this moment
        return _from_hub(snapshot[1].replace("--", "/"), snapshot[2])
    except ModelError:
        if Path(directory).is_dir():
            return directory
        raise


def _from_hub(path: str, revision: str | None = None) -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(path, revision=revision,
                                 allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py"])
    except Exception as error:  # every network and hub failure is the same to the user: no model
        raise ModelError(f"there is no directory {path!r}, and the hub does not give a model of that name: "
                         f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from None


def _short(value: Any) -> str:
    return f"{value[:16]}..." if isinstance(value, str) and len(value) > 32 else repr(value)


def _adapter_digest(directory: Path) -> str:
    weights = directory / "adapter_model.safetensors"
    if not weights.is_file():
        raise ModelError(f"{directory} has no adapter_model.safetensors; raydpo reads PEFT adapters saved as safetensors")
    settings = _settings_digest(directory / "adapter_config.json", _NOT_ADAPTER)
    return hashlib.sha256(f"{_tensors_digest([weights])}{settings}".encode()).hexdigest()


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        files = [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    else:
        files = [directory / "model.safetensors"]
    for file in files:
        if not file.is_file():
            pickled = sorted(directory.glob("pytorch_model*.bin"))
            raise ModelError(f"{directory} has no {file.name}" + (
                "; its weights are pickled (pytorch_model.bin), which can run code when loaded: convert them with "
                "save_pretrained of a recent transformers" if pickled else "; a Hugging Face model directory is wanted"))
    return files


def _settings_digest(file: Path, ignored: frozenset[str], code: Path | None = None) -> str:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ModelError(f"cannot read {file}: {error}") from None
    digest = hashlib.sha256(json.dumps(_without(settings, ignored), sort_keys=True).encode())
    for source in sorted(code.glob("*.py")) if code is not None else ():
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()


def _without(settings: Any, ignored: frozenset[str]) -> Any:
    if isinstance(settings, dict):
        return {key: _without(value, ignored) for key, value in settings.items() if key not in ignored}
    if isinstance(settings, list):
        # PEFT saves sets of module names in arbitrary order.
        return sorted(settings) if all(isinstance(entry, str) for entry in settings) else settings
    return settings


def _tensors_digest(files: list[Path]) -> str:
    """Over (name, dtype, shape, bytes) of every tensor in order of name, so that sharding does not matter."""
    tensors: dict[str, str] = {}
    for file in files:
        tensors |= _file_tensors(file)
    return hashlib.sha256(json.dumps(tensors, sort_keys=True).encode()).hexdigest()


def _file_tensors(file: Path) -> dict[str, str]:
    stat = file.stat()
    # The change time cannot be set by a copy that preserves times, so overwritten weights are never mistaken.
    stamp = [str(file.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    memo = _memo_directory() / f"{hashlib.sha256(json.dumps(stamp).encode()).hexdigest()}.json"
    try:
        return json.loads(memo.read_text())
    except (OSError, json.JSONDecodeError):
        pass
    tensors = _hash_tensors(file)
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        temporary = memo.with_suffix(f".{uuid.uuid4().hex}")
        temporary.write_text(json.dumps(tensors))
        os.replace(temporary, memo)
    except OSError:
        pass  # a read-only home costs time, not correctness
    return tensors


def _hash_tensors(file: Path) -> dict[str, str]:
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except (struct.error, json.JSONDecodeError, UnicodeDecodeError, MemoryError, OverflowError) as error:
        raise ModelError(f"{file} is not a safetensors file: {error}") from None
    header.pop("__metadata__", None)

    def one(entry: tuple[str, dict[str, Any]]) -> tuple[str, str]:
        name, tensor = entry
        start, end = tensor["data_offsets"]
        digest = hashlib.sha256(f"{tensor['dtype']}{tensor['shape']}".encode())
        with open(file, "rb") as stream:
            stream.seek(8 + length + start)
            left = end - start
            while left:
                block = stream.read(min(left, 1 << 24))
                if not block:
                    raise ModelError(f"{file} is truncated: tensor {name} lacks {left} bytes")
                digest.update(block)  # releases the GIL: the threads hash in parallel
                left -= len(block)
        return name, digest.hexdigest()

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(pool.map(one, header.items()))


def _memo_directory() -> Path:
    return local_home() / "digests"
