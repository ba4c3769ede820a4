"""Find the data files that a source stands for: a file, a directory with splits, what save_to_disk leaves, a hub cache."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from raydpo.config import SourceConfig, is_hub_name
from raydpo.config.data import DATA_SUFFIXES, bare_suffix
from raydpo.errors import DataError, RaydpoError, reason, some_of
from raydpo.storage.files import Storage
from raydpo.storage.uri import is_uri, redact

__all__ = ["DataFile", "data_files", "hub_dataset", "is_on_hub"]

_KEYWORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("holdout", "heldout", "hold-out", "held-out", "hold_out", "held_out"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
"""Words that name a split in the names of files and directories, as on the hub."""
_KEYWORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(_KEYWORDS, key=len, reverse=True))})(?![a-z])")
_SHARD = re.compile(r"(.+?)-\d{5}-of-(\d{5})$")
_OWN_SPLIT = re.compile(rf"({'|'.join(_KEYWORDS)})_[a-z]\w*$")
"""Name of a split such as train_prefs, in the names of shards."""
_KIND_OF_DATA = re.compile(r"_(prefs?|preferences?|dpo|sft|gen|rm|ppo|grpo)$")
"""End of such a name in the name of any file."""
_NO_DATA = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
_CACHED = re.compile(r"cache-[^/]*\.arrow$")
_MOST_NAMED = 5


@dataclass(frozen=True)
class DataFile:
    """One file: its file system, its path there, its name for messages, and how it was chosen (on the first file only)."""

    filesystem: pafs.FileSystem
    path: str
    label: str
    note: str | None = None


def is_on_hub(source: SourceConfig) -> bool:
    """Whether the source is a data set on the hub, not files.

    Raises:
        DataError: if it can be neither.
    """
    if is_uri(source.path) or _exists(source.path):
        return False
    if not is_hub_name(source.path):
        raise DataError(f"there is no file {source.path!r}; check the path in data.train or data.eval")
    return True


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError as error:  # no permission, or a name that is too long
        raise DataError(f"cannot open {path!r}: {reason(error)}") from None


def hub_dataset(source: SourceConfig) -> Any:
    """The data set of a source on the hub, as the package ``datasets`` loads it.

    Raises:
        DataError: if the hub does not give it.
    """
    try:
        from datasets import load_dataset

        names = {} if source.subset is None else {"name": source.subset}
        return load_dataset(source.path, **names, split=source.split)
    except Exception as error:  # to the user every network, hub or format failure means the same: no data
        hint = "; set the source's subset" if "onfig name is missing" in str(error) else ""
        raise DataError(
            f"there is no file {source.path!r}, and the hub does not give split {source.split!r} of a data set "
            f"of that name: {reason(error)}{hint}"
        ) from None


def data_files(source: SourceConfig) -> Iterator[DataFile]:
    """Yield the data files that ``source.path`` stands for, in order.

    Raises:
        DataError: if there are none, or none of the split.
    """
    path = source.path
    try:
        storage = Storage(path)
        info = storage.fs.get_file_info(storage.root)
    except Exception as error:  # every file system has its own errors
        raise DataError(f"cannot open {redact(path)}: {reason(error)}") from None
    if info.type == pafs.FileType.NotFound:
        raise DataError(f"there is no file {redact(path)!r}; check the path in data.train or data.eval")
    if "[" in source.split:
        raise DataError(
            f"split {source.split!r} is a part of a split, which is read from the hub alone, not from {redact(path)}; set "
            "the whole split, and data.fraction for a share of its prompts"
        )
    if info.type != pafs.FileType.Directory:
        if source.subset is not None:
            raise DataError(f"subset {source.subset!r} is set, but {redact(path)} is one file; remove subset")
        yield DataFile(storage.fs, storage.root, info.base_name)
        return
    try:
        names, note = _in_directory(storage, source)
    except RaydpoError:
        raise
    except Exception as error:  # no permission, or a state.json that is none of save_to_disk's
        raise DataError(f"cannot read the directory {redact(path)}: {reason(error)}") from None
    for number, name in enumerate(names):
        yield DataFile(storage.fs, storage.path(name), name, None if number else note)


def _in_directory(storage: Storage, source: SourceConfig) -> tuple[Sequence[str], str]:
    """Names of the data files of a directory, and how they were chosen."""
    shown, below = redact(source.path), ""
    if source.subset is not None:
        below = f"{source.subset}/"
        outside = source.subset.startswith("/") or ".." in source.subset.split("/")
        if outside or not storage.list(source.subset):
            raise DataError(
                f"the directory {shown} has no directory {source.subset!r}, its subset; found "
                f"{some_of(storage.list(), _MOST_NAMED)}"
            )
    names = set(storage.list(below.rstrip("/")))
    if "snapshots" in names:  # as the hub's client keeps a repository
        below = _snapshot(storage, below)
        names = set(storage.list(below.rstrip("/")))
    if "dataset_dict.json" in names:
        splits = json.loads(storage.read(f"{below}dataset_dict.json"))["splits"]
        if source.split not in splits:
            raise DataError(
                f"{shown}, written by save_to_disk, has no split {source.split!r}, but {', '.join(map(repr, splits))}; set "
                "the source's split"
            )
        below = f"{below}{source.split}/"
        names = set(storage.list(below.rstrip("/")))
    if {"state.json", "dataset_info.json"} <= names:
        files = json.loads(storage.read(f"{below}state.json"))["_data_files"]
        return [below + file["filename"] for file in files], f"read as written by save_to_disk, from {below or './'}"
    entries = [entry.name for entry in storage.entries(below.rstrip("/"))]
    found = [below + name for name in entries if _is_data(name)]
    directories = [f"{name}/" for name in sorted(names - set(entries)) if not name.startswith((".", "_"))] if found else []
    if not found:
        found = [name for name in _all_below(storage, below) if _is_data(name[len(below) :])]
    elif of_split := _directories_of_split(found, directories, source, below):
        found += [name for name in _all_below(storage, below) if name.startswith(of_split) and _is_data(name[len(below) :])]
        directories = [name for name in directories if below + name not in of_split]
    if not found:
        raise DataError(f"the directory {shown} holds no {', '.join(DATA_SUFFIXES)} files, compressed or not")
    chosen = _of_split(found, source, below)
    others = [name[len(below) :] for name in sorted(set(found) - set(chosen))] + directories
    left = f"; not read: {some_of(others, _MOST_NAMED)}" if others else ""
    read = f"read {some_of([name[len(below) :] for name in chosen], _MOST_NAMED)}{left}"
    if missing := _missing(chosen):
        read = f"warning: {read}; by their names {missing:,} more files belong to these, which are not there"
    return chosen, read


def _missing(names: Sequence[str]) -> int:
    """How many files are missing by names such as ``train-00000-of-00002``."""
    found: dict[tuple[str, str, int], int] = {}
    for name in names:
        place, _, file = name.rpartition("/")
        if shard := _SHARD.match(bare_suffix(file).rsplit(".", 1)[0]):
            key = place, shard[1], int(shard[2])
            found[key] = found.get(key, 0) + 1
    return sum(max(0, of - count) for (_, _, of), count in found.items())


def _snapshot(storage: Storage, below: str) -> str:
    """The directory of the newest commit that a hub cache holds."""
    commits = storage.list(f"{below}snapshots")
    if storage.exists(f"{below}refs/main"):
        main = storage.read(f"{below}refs/main").decode().strip()
        commits = [main] if main in commits else commits
    if len(commits) != 1:
        raise DataError(
            f"{storage} is a hub cache with {len(commits)} commits; give the directory of one, such as "
            f"{below}snapshots/{commits[-1] if commits else '...'}"
        )
    return f"{below}snapshots/{commits[0]}/"


def _all_below(storage: Storage, below: str) -> list[str]:
    root = storage.path(below.rstrip("/"))
    if storage.is_local:  # links to files are followed, those to directories might lead in a circle
        found = (
            os.path.relpath(os.path.join(place, file), storage.root) for place, _, files in os.walk(root) for file in files
        )
        return sorted(name.replace(os.sep, "/") for name in found)
    infos = storage.fs.get_file_info(pafs.FileSelector(root, recursive=True))
    start = len(storage.root.rstrip("/")) + 1
    return sorted(info.path[start:] for info in infos if info.type == pafs.FileType.File)


def _is_data(name: str) -> bool:
    parts = name.split("/")
    return (
        bare_suffix(name).endswith(DATA_SUFFIXES)
        and not any(part.startswith((".", "_")) for part in parts)
        and parts[-1] not in _NO_DATA
        and not _CACHED.match(parts[-1])
    )


def _directories_of_split(found: list[str], directories: list[str], source: SourceConfig, below: str) -> tuple[str, ...]:
    """The directories named like the wanted split, if none of the files beside them is."""
    wanted = _wanted(source)
    if any(_split(name[len(below) :]) in wanted for name in found):
        return ()
    return tuple(
        below + name for name in directories if _KEYWORD.fullmatch(name[:-1].lower()) and _canonical(name[:-1]) in wanted
    )


def _wanted(source: SourceConfig) -> set[str]:
    return {_canonical(part.strip()) for part in source.split.split("+")}


def _of_split(names: list[str], source: SourceConfig, below: str) -> list[str]:
    """The files of the wanted split where their names say so, for ``train`` otherwise those whose names name none."""
    splits = {name: _split(name[len(below) :]) for name in names}
    if not any(splits.values()):
        return names
    wanted = _wanted(source)
    chosen = [name for name in names if splits[name] in wanted]
    near = sorted({split for split in splits.values() if split and split.partition("_")[0] in wanted})
    if not chosen and len(near) == 1:
        chosen = [name for name in names if splits[name] == near[0]]
    if not chosen and not near and wanted == {"train"}:
        chosen = [name for name in names if splits[name] is None]
    if not chosen:
        found = [repr(split) for split in sorted(filter(None, set(splits.values())))]
        raise DataError(
            f"{redact(source.path)} holds no files of split {source.split!r}, but of {some_of(found, _MOST_NAMED)}; "
            "set the source's split, or name a file"
        )
    return chosen


def _split(name: str) -> str | None:
    """The split that a path names: in the file's name, otherwise in the nearest directory's."""
    *directories, file = name.lower().split("/")
    stem = bare_suffix(file).rsplit(".", 1)[0]
    shard = _SHARD.match(stem)
    stem = shard[1] if shard else stem
    if _OWN_SPLIT.match(stem) and (shard or _KIND_OF_DATA.search(stem)):
        return stem
    for part in (stem, *reversed(directories)):
        if word := _KEYWORD.search(part):
            return _KEYWORDS[word[1]]
    return None


def _canonical(split: str) -> str:
    return _KEYWORDS.get(split.lower(), split.lower())
