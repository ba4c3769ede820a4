"""The identity of a reference: everything its log-probs depend on besides token ids, and nothing else.

The identity names the directory that holds the log-probs, so log-probs of other weights are never read by mistake.
Tokenizer, template and truncation are not part of it: token ids already reflect them. Beta, loss, seed, learning rate, LoRA
rank and world size are not part of it: the reference's log-probs do not depend on them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import platform
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from raydpo.config import is_hub_name
from raydpo.errors import FilesError, ModelError, one_line, some_of
from raydpo.model.files import ADAPTER, AdapterFiles, ModelFiles, adapter_files, model_files, read_header, weights_lacking
from raydpo.model.rotary import rope_length
from raydpo.storage.files import Storage
from raydpo.storage.local_copy import RemoteDirectory
from raydpo.storage.memory import remembered, stamp
from raydpo.storage.uri import is_uri

__all__ = [
    "QUANTIZED",
    "ReferenceIdentity",
    "differs_from_its_tie",
    "directory_here",
    "earlier_identity",
    "identify",
    "on_this_machine",
    "origin_of",
    "proved_here",
    "resolve_model",
    "zero_matrices",
]

SCORING_VERSION = 2
"""Version of raydpo's own arithmetic, raised whenever a change alters the numbers it would store."""
_ADAPTER_VERSION = 3
"""Scoring version of adapters in bfloat16, whose numbers changed after the version above."""

_QUANTIZED_VERSION = 4
"""Scoring version of quantized layers in bfloat16, which gave float32 to attention before."""

_NOT_ARCHITECTURE = frozenset({
    "_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "_attn_implementation",
    "_attn_implementation_autoset", "id2label", "label2id", "transformers_weights",
})  # fmt: skip
_NOT_ADAPTER = frozenset(
    {"base_model_name_or_path", "inference_mode", "revision", "auto_mapping", "task_type", "peft_version", "lora_dropout"}
)
_FIRST_MATCH = ("rank_pattern", "alpha_pattern")
"""Entries of adapter_config.json in which the first matching pattern wins, so their order matters."""


@dataclass(frozen=True, kw_only=True)
class ReferenceIdentity:
    """The identity, field by field. Digests are hexadecimal SHA-256."""

    weights: str
    """Digest of all weight tensors (name, dtype, shape, bytes). It does not depend on how they are split into files."""
    architecture: str
    """Digest of config.json without names and paths, of Python code beside it, and of whether that code runs."""
    adapter: str | None
    """Digest of the adapter's weights and configuration."""
    dtype: str
    """Precision of the forward pass."""
    quantisation: str | None = None
    scoring_version: int = SCORING_VERSION
    rope_length: int | None = None
    """Length that the rotary frequencies are made for, if the model's frequencies depend on one (see ``model.rotary``)."""

    @property
    def digest(self) -> str:
        """32 hexadecimal digits over all fields: the name of the cache directory."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:32]

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)

    def to_dict(self) -> dict[str, Any]:
        """The fields by name. Later fields appear only where they have a value, so that older digests stay valid."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if name != "rope_length" or value is not None}

    @classmethod
    def from_json(cls, text: str | bytes) -> ReferenceIdentity:
        return cls(**json.loads(text))

    def differences(self, other: ReferenceIdentity) -> list[str]:
        """``field: mine here, theirs there`` for each field that differs."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return [
            f"{field}: {_short(mine[field])} here, {_short(theirs[field])} there"
            for field in mine
            if mine[field] != theirs[field]
        ]

    def same_model(self, other: ReferenceIdentity) -> bool:
        """Whether all fields but precision and scoring version agree: the same function up to rounding."""
        return dataclasses.replace(self, dtype=other.dtype, scoring_version=other.scoring_version) == other


QUANTIZED = {"4bit": "bitsandbytes nf4, double", "8bit": "bitsandbytes int8, threshold 0"}
"""What ``model.load`` makes of each quantization. Part of the identity: change the text if the loading changes."""


def identify(
    path: str | Path,
    dtype: str,
    adapter: str | Path | None = None,
    quantization: str | None = None,
    trust_remote_code: bool = False,
    *,
    max_length: int | None = None,
) -> ReferenceIdentity:
    """Compute the identity of the model in directory ``path``, with the adapter in directory ``adapter`` on top.

    Reads every weight once, and checks that it is a finite number and that no file ends in zeros. Digests of files are
    remembered by path, inode, size and times.

    Args:
        quantization: ``4bit``, ``8bit`` or None.
        trust_remote_code: whether loading runs code of the directory. No effect where config.json names no code.
        max_length: longest sequence in tokens, ``data.max_length``. Without it, a model whose rotary frequencies depend on
            the length gets an identity that ``load_causal_lm`` refuses to load.

    Raises:
        ModelError: if a directory is not a model or adapter stored as safetensors, it is ambiguous what would be loaded,
            weights are NaN or infinite, or a file holds zeros in place of weights.
    """
    model = model_files(path, trust_remote_code)
    return ReferenceIdentity(
        weights=_weights_digest(model),
        architecture=_architecture_digest(model),
        adapter=None if adapter is None else _adapter_digest(adapter_files(adapter)),
        dtype=dtype,
        quantisation=None if quantization is None else QUANTIZED[quantization],
        scoring_version=_scoring_version(model, dtype, adapter, quantization),
        rope_length=None if max_length is None else rope_length(model.config, max_length),
    )


def _scoring_version(model: ModelFiles, dtype: str, adapter: str | Path | None, quantization: str | None) -> int:
    if dtype != "bfloat16":
        return SCORING_VERSION
    if quantization is not None or {"quantization_config", "compression_config"} & model.config.keys():
        return _QUANTIZED_VERSION
    return SCORING_VERSION if adapter is None else _ADAPTER_VERSION


def differs_from_its_tie(path: str | Path, trust_remote_code: bool = False) -> str | None:
    """A warning if config.json ties head and embedding, and the files hold two different ones; else None."""
    model = model_files(path, trust_remote_code)
    text = model.config.get("text_config") or {}
    if not (model.config.get("tie_word_embeddings") or text.get("tie_word_embeddings")):
        return None
    tensors: dict[str, str] = {}
    for file in model.weights:
        tensors |= _file_tensors(file)["digests"]
    ends = [[name for name in tensors if name.endswith(end)] for end in ("lm_head.weight", "embed_tokens.weight")]
    if not all(len(names) == 1 for names in ends) or len({tensors[names[0]] for names in ends}) == 1:
        return None
    return (
        f"{path}/config.json says tie_word_embeddings, but its files hold a {ends[0][0]} that differs from {ends[1][0]}: "
        "transformers computes with both, other programs such as vLLM with the embedding alone; set tie_word_embeddings to "
        f"false, or take {ends[0][0]} out of the files"
    )


def zero_matrices(path: str | Path, trust_remote_code: bool = False) -> list[str]:
    """Names of the weight matrices of the model in directory ``path`` that are zero everywhere. Biases and norms may be."""
    return sorted(name for file in model_files(path, trust_remote_code).weights for name in _file_tensors(file)["zero"])


def earlier_identity(identity: ReferenceIdentity) -> tuple[ReferenceIdentity, str]:
    """The identity that earlier versions of raydpo gave the same model, and what has changed since; ``identity`` itself and
    an empty text if nothing has."""
    changed = []
    if identity.scoring_version == _ADAPTER_VERSION:
        changed.append(
            "a model with an adapter now keeps its rotary frequencies, and the input of an adapted head, in "
            "float32; before, both were rounded to bfloat16"
        )
    if identity.scoring_version == _QUANTIZED_VERSION:
        changed.append("quantized layers now give bfloat16 to attention, as other layers do; before, they gave float32")
    if identity.rope_length is not None:
        changed.append("its rotary frequencies no longer depend on the longest sequence of a batch")
    return dataclasses.replace(identity, scoring_version=SCORING_VERSION, rope_length=None), "; ".join(changed)


def origin_of(path: str) -> RemoteDirectory | None:
    """The remote directory of a model or adapter at a URI, such as the policy of an earlier round; None for other paths."""
    if not is_uri(path):
        return None
    above, _, name = path.rstrip("/").rpartition("/")
    return RemoteDirectory.now(Storage(above), name)


def resolve_model(path: str) -> str:
    """Local directory of a model or adapter. A hub name is downloaded if it is not on this machine yet, and what is at a URI
    is copied to it.

    Raises:
        ModelError: if it is neither a directory nor on the hub.
    """
    if (origin := origin_of(path)) is not None:
        return origin.here()
    if Path(path).is_dir():
        return str(Path(path).absolute())
    if not is_hub_name(path):
        raise ModelError(
            f"there is no model directory {path!r} on this machine; put it on storage that every node "
            "mounts under the same path, or use a hub name"
        )
    return _from_hub(path)


Spec = TypeVar("Spec")


def on_this_machine(spec: Spec) -> Spec:
    """Copy of a model specification whose directories exist on this machine.

    A driver that downloaded a model from the hub names a directory that other machines lack. Its path holds the repository
    and revision, so each machine downloads the same files; if they are there already, this costs one request to the hub.
    What the driver copied from a bucket (``origin``) is copied again here. Other directories are left as they are.

    Args:
        spec: dataclass with ``path``, and perhaps ``adapter`` and ``origin``.

    Raises:
        ModelError: if the hub does not provide the files, or the bucket holds other files by now.
    """
    places = {name: place for name in ("path", "adapter") if (place := getattr(spec, name, None))}
    here = {name: directory_here(place) for name, place in places.items()}
    if getattr(spec, "origin", None) is not None:
        here["adapter" if "adapter" in here else "path"] = spec.origin.here()
    return dataclasses.replace(spec, **here)


def directory_here(directory: str) -> str:
    """The directory on this machine that another one calls ``directory``; see ``on_this_machine``."""
    snapshot = re.search(r"/models--([^/]+)/snapshots/([0-9a-f]{40})/?$", directory)
    if snapshot is None:
        return directory
    try:  # even if the directory exists: another worker of this machine may be downloading it right now
        return _from_hub(snapshot[1].replace("--", "/"), snapshot[2])
    except ModelError:
        if Path(directory).is_dir():
            return directory
        raise


@contextlib.contextmanager
def proved_here(spec: Any, *, prove: bool = True) -> Iterator[None]:
    """Context for loading a model: proves that the files on this machine match ``spec.identity``.

    Everything that is stored under an identity loads its model this way: a node may have other files under the same path,
    and files may be replaced during a run. Hashing reads the same pages as loading and needs other resources, so they
    overlap. Processes of one machine that load the same model at once hash each file once: one does, the others wait and
    read what it found (``storage.memory.remembered``).

    Args:
        prove: False = another process proves it of the same files, and ends this one if they are another model.

    Raises:
        ModelError: if they are another model, naming the node and the differences.
    """
    if not prove:
        yield
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        hashing = pool.submit(_identity_here, spec)
        yield
        hashing.result()
    # Again, from remembered digests: files may have been replaced while they were loaded.
    here = _identity_here(spec)
    if here != spec.identity:
        raise ModelError(
            f"{spec.path} on {platform.node()} is another model than where the run was started: "
            f"{'; '.join(here.differences(spec.identity))}; give all machines the same files, leave them unchanged, and run "
            "it again"
        )


def _identity_here(spec: Any) -> ReferenceIdentity:
    dtype, length = spec.identity.dtype, spec.identity.rope_length
    return identify(spec.path, dtype, spec.adapter, spec.quantization, spec.trust_remote_code, max_length=length)


def _from_hub(path: str, revision: str | None = None) -> str:
    from huggingface_hub import snapshot_download

    try:
        directory = snapshot_download(
            path, revision=revision, allow_patterns=["*.json", "*.jinja", "*.model", "*.txt", "*.py"]
        )
        # Only the weights that are read: a repository may also hold them in other formats.
        if lacking := weights_lacking(directory):
            snapshot_download(path, revision=Path(directory).name, allow_patterns=lacking)
        return directory
    except Exception as error:  # to the user every network or hub failure means the same: no model
        raise ModelError(
            f"there is no directory {path!r}, and the hub does not give a model of that name: "
            f"{type(error).__name__}: {one_line(error, 300)}"
        ) from None


def _short(value: Any) -> str:
    return f"{value[:16]}..." if isinstance(value, str) and len(value) > 32 else repr(value)


def _weights_digest(model: ModelFiles) -> str:
    digest = _tensors_digest(model.weights)
    if model.passed_over and _tensors_digest(model.passed_over) != digest:
        raise FilesError(
            f"{model.directory} has {model.weights[0].name} and an index whose files hold other weights; "
            "delete the one that is not meant"
        )
    return digest


def _architecture_digest(model: ModelFiles) -> str:
    digest = hashlib.sha256(json.dumps(_without(model.config, _NOT_ARCHITECTURE), sort_keys=True).encode())
    for source in model.code:
        digest.update(source.relative_to(model.directory).as_posix().encode() + b"\0" + source.read_bytes())
    if model.runs_code:
        digest.update(b"\0runs")
    return digest.hexdigest()


def _adapter_digest(adapter: AdapterFiles) -> str:
    settings = {
        key: list(value.items()) if key in _FIRST_MATCH and value and list(value) != sorted(value) else value
        for key, value in adapter.config.items()
    }
    digest = hashlib.sha256(json.dumps(_without(settings, _NOT_ADAPTER, sets=True), sort_keys=True).encode()).hexdigest()
    return hashlib.sha256(f"{_tensors_digest([adapter.weights])}{digest}".encode()).hexdigest()


def _without(settings: Any, ignored: frozenset[str], sets: bool = False) -> Any:
    """``settings`` without the keys in ``ignored``, at any depth.

    Args:
        sets: sort lists of names. PEFT saves sets as lists in arbitrary order; in config.json the order has a meaning.
    """
    if isinstance(settings, dict):
        return {key: _without(value, ignored, sets) for key, value in settings.items() if key not in ignored}
    if sets and isinstance(settings, list) and all(isinstance(entry, str) for entry in settings):
        return sorted(settings)
    return settings


def _tensors_digest(files: Sequence[Path]) -> str:
    """Digest of (name, dtype, shape, bytes) of every tensor in order of name. Sharding does not affect it."""
    tensors: dict[str, str] = {}
    for file in files:
        found = _file_tensors(file)["digests"]
        if twice := sorted(name for name in tensors.keys() & found.keys() if tensors[name] != found[name]):
            raise FilesError(
                f"{file} holds {some_of(twice)}, which another file of the model holds with other values, so it is unclear "
                "which are loaded; fetch or save the model again"
            )
        tensors |= found
    return hashlib.sha256(json.dumps(tensors, sort_keys=True).encode()).hexdigest()


def _file_tensors(file: Path) -> dict[str, Any]:
    """``digests`` of the tensors of ``file`` by name, and ``zero``: names of matrices without a number other than zero."""
    # The last entries say what was checked: earlier versions remembered digests of weights that may be NaN or zero.
    return remembered("digests", [*stamp(file), "finite", "zero"], lambda: _hash_tensors(file))


_INFINITE = {
    "F64": ("i8", 0x7FF0000000000000), "F32": ("i4", 0x7F800000), "F16": ("i2", 0x7C00), "BF16": ("i2", 0x7F80),
    "F8_E5M2": ("i1", 0x7C), "F8_E4M3": ("i1", 0x7F),
}  # fmt: skip
"""By dtype: the integer type of its size, and the smallest positive number that is infinite or NaN, read as that integer."""


def _finite_and_zero(block: bytes, dtype: str) -> tuple[bool, bool]:
    """Whether all numbers are finite, and whether all are zero, found from their bits.

    Without the sign, NaN and infinity are the largest integers, and zero is the smallest. Two maxima take a twentieth of the
    time of the digest, and make no copy of the block.
    """
    if dtype not in _INFINITE or not block:
        return True, not np.frombuffer(block, "u1").any()
    kind, infinite = _INFINITE[dtype]
    signed = np.frombuffer(block, f"<{kind}")
    unsigned, sign = signed.view(f"<u{kind[1:]}"), 1 << (8 * signed.itemsize - 1)
    most, most_unsigned = int(signed.max()), int(unsigned.max())
    return most < infinite and most_unsigned < sign + infinite, most <= 0 and most_unsigned in (0, sign)


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """What hashing finds of one tensor.

    Attributes:
        zero: whether it holds numbers, and all are zero.
        ends_in_zeros: whether its last 64 bytes are zero.
    """

    name: str
    digest: str
    finite: bool
    zero: bool
    ends_in_zeros: bool


def _hash_tensors(file: Path) -> dict[str, Any]:
    data, header = read_header(file)

    def one(entry: tuple[str, dict[str, Any]]) -> _Tensor:
        name, tensor = entry
        start, end = tensor["data_offsets"]
        digest = hashlib.sha256(f"{tensor['dtype']}{tensor['shape']}".encode())
        finite, zero, last = True, end > start, b""
        with open(file, "rb") as stream:
            stream.seek(data + start)
            left = end - start
            while left:
                block = stream.read(min(left, 1 << 20))  # stays in the processor's cache
                if not block:
                    raise FilesError(f"{file} is truncated: tensor {name} lacks {left} bytes")
                digest.update(block)  # releases the GIL, so that the threads hash in parallel
                if finite and (zero or tensor["dtype"] in _INFINITE):
                    finite, zeros = _finite_and_zero(block, tensor["dtype"])
                    zero = zero and zeros
                last = (last + block[-64:])[-64:]
                left -= len(block)
        # Some models store masks, which are infinite on purpose.
        finite = finite or "mask" in name
        return _Tensor(name=name, digest=digest.hexdigest(), finite=finite, zero=zero, ends_in_zeros=not any(last))

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(one, header.items()))
    bad = [tensor.name for tensor in found if not tensor.finite]
    if bad:
        raise FilesError(
            f"{file}: {some_of(bad)} {'holds' if len(bad) == 1 else 'hold'} NaN or infinite values, so that no log-prob "
            "would be a number; save or fetch the weights again (a merge, or a conversion to float16, may have overflowed)"
        )
    _refuse_zeros(file, header, found)
    zero = [
        tensor.name
        for tensor in found
        if tensor.zero and len(header[tensor.name]["shape"]) > 1 and header[tensor.name]["dtype"] in _INFINITE
    ]
    return {
        "digests": {tensor.name: tensor.digest for tensor in found},
        "zero": [name for name in zero if "mask" not in name and file.name != ADAPTER],
    }


def _refuse_zeros(file: Path, header: dict[str, dict[str, Any]], found: Sequence[_Tensor]) -> None:
    """Refuse a file that was never written to its end: all its matrices are zero, or all from the midst of a tensor on.

    Single matrices may be zero on purpose: of layers that were pruned, or added and not trained yet.
    """
    matrices = [tensor for tensor in found if sum(size > 1 for size in header[tensor.name]["shape"]) > 1]
    # Most kinds of adapters are zero before they are trained. Of LoRA only one of each two matrices is.
    expected = file.name == ADAPTER and not any(".lora_A." in tensor.name for tensor in found)
    nothing = bool(matrices) and not expected and all(tensor.zero for tensor in matrices)
    in_order = sorted(found, key=lambda tensor: header[tensor.name]["data_offsets"][0], reverse=True)
    tail = list(itertools.takewhile(lambda tensor: tensor.zero, in_order))
    before = in_order[len(tail) : len(tail) + 1]
    cut = bool(before) and before[0].ends_in_zeros and any(tensor in tail for tensor in matrices)
    if nothing or cut:
        what = "all its matrices are zero" if nothing else f"it is zero from the last part of {before[0].name} on"
        names = sorted(tensor.name for tensor in (matrices if nothing else tail))
        raise FilesError(
            f"{file} holds zeros in place of weights: {what} ({some_of(names)}), as a download leaves it that was cut "
            "short; fetch or save it again"
        )
