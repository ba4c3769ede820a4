"""Warnings about a model that can be loaded, but whose files are probably not what was meant."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raydpo.config import is_hub_name
from raydpo.errors import FilesError, one_line, some_of
from raydpo.model.files import GENERATION, ModelFiles, adapter_files, model_files, read_header
from raydpo.reference.identity import differs_from_its_tie, zero_matrices

__all__ = ["doubts"]

_SAMPLE = 4096
"""Bytes compared of each tensor, at its start and in its middle."""


def doubts(path: str | Path, adapter: str | Path | None = None, trust_remote_code: bool = False) -> list[str]:
    """Warnings about the model in directory ``path``, and about the adapter in directory ``adapter`` on top of it.

    Raises:
        ModelError: if transformers refuses the model's generation_config.json, and so the model.
    """
    found = [differs_from_its_tie(path, trust_remote_code)]
    if zero := zero_matrices(path, trust_remote_code):
        found.append(
            f"{path}: all values of {len(zero):,} weight {'matrix' if len(zero) == 1 else 'matrices'} are zero "
            f"({some_of(zero)}), as a damaged download or a failed conversion leaves them; fetch the model again if they "
            "are not zero on purpose"
        )
    found.append(_impossible_generation(Path(path)))
    if adapter is not None:
        found.append(_other_base(model_files(path, trust_remote_code), Path(adapter)))
    return [line for line in found if line is not None]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_POSSIBLE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda value: _is_number(value) and value >= 0, "a number of at least 0"),
    "top_p": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "min_p": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "typical_p": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "top_k": (lambda value: _is_token(value) or value == -1, "an integer of at least -1"),
    "repetition_penalty": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "eos_token_id": (
        lambda value: all(map(_is_token, value if isinstance(value, list) else [value])), "a token id, or a list of them",
    ),
    "bos_token_id": (_is_token, "a token id"),
    "pad_token_id": (_is_token, "a token id"),
}  # fmt: skip
"""What transformers accepts when it generates, by entry; it loads any value of these."""


def _impossible_generation(directory: Path) -> str | None:
    if not (directory / GENERATION).is_file():
        return None
    from transformers import GenerationConfig
    from transformers.utils import logging

    entries = json.loads((directory / GENERATION).read_text(encoding="utf-8"))  # ``model_files`` has parsed it
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it also reports settings that only have no effect
    try:
        GenerationConfig.from_dict(entries)
    except Exception as error:
        raise FilesError(
            f"transformers refuses {directory / GENERATION}, and so the model: {one_line(error, 300)}; correct or delete "
            "that entry"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
    bad = [
        f"{name} is {one_line(json.dumps(entries[name]), 60)} ({expected} is expected)"
        for name, (possible, expected) in _POSSIBLE.items()
        if entries.get(name) is not None and not possible(entries[name])
    ]
    if not bad:
        return None
    return (
        f"{directory / GENERATION}: {', '.join(bad)}; scoring and training do not use it, but the trained model is saved "
        "with it, and programs that generate may refuse it: correct it there"
    )


def _other_base(model: ModelFiles, adapter: Path) -> str | None:
    """A warning if the adapter names another model as its base, and that model is at hand and has other weights."""
    name = adapter_files(adapter).config.get("base_model_name_or_path")
    base = _at_hand(name) if isinstance(name, str) and name else None
    if base is None or base.resolve() == model.directory.resolve():
        return None
    try:
        different = _first_difference(model, model_files(base))
    except (FilesError, OSError):  # a base that cannot be read proves nothing
        return None
    if different is None:
        return None
    return (
        f"the adapter {adapter} was made for {name} (base_model_name_or_path in its adapter_config.json), whose weights "
        f"differ from those of {model.directory}, such as {different}; set the path beside the adapter to {name}, unless "
        "other weights than in its training are meant"
    )


def _at_hand(name: str) -> Path | None:
    """Directory of a model on this machine; a hub name is only looked up among the files that were downloaded."""
    if Path(name).is_dir():
        return Path(name)
    if not is_hub_name(name):
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception:  # never downloaded
        return None


def _first_difference(one: ModelFiles, other: ModelFiles) -> str | None:
    """Name of a tensor that both hold in one dtype and shape, with other bytes in a sample; None if there is none."""
    ours, theirs = _places(one), _places(other)
    for name in sorted(ours.keys() & theirs.keys()):
        (file, start, *kind), (their_file, their_start, *their_kind) = ours[name], theirs[name]
        if kind != their_kind:  # another precision or vocabulary: these may be the same weights
            continue
        for skipped in (0, kind[-1] // 2):
            if _bytes(file, start + skipped, kind[-1]) != _bytes(their_file, their_start + skipped, kind[-1]):
                return name
    return None


def _places(model: ModelFiles) -> dict[str, tuple[Path, int, str, list[int], int]]:
    """File, first byte, dtype, shape and size in bytes of each tensor, by name."""
    places = {}
    for file in model.weights:
        data, header = read_header(file)
        for name, tensor in header.items():
            start, end = tensor["data_offsets"]
            places[name] = (file, data + start, tensor["dtype"], tensor["shape"], end - start)
    return places


def _bytes(file: Path, start: int, size: int) -> bytes:
    with open(file, "rb") as stream:
        stream.seek(start)
        return stream.read(min(size - size // 2, _SAMPLE))
