"""Inspect, verify and clean the tokenised sets in a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from raydpo.errors import CacheError
from raydpo.storage.files import FileInfo, Storage
from raydpo.storage.garbage import ABANDONED_SECONDS, Garbage, files_below, half_written, now
from raydpo.tokens.block import BlockInfo, decode
from raydpo.tokens.store import BLOCKS, INDEX, SET_ASIDE, TokenSet

__all__ = ["SetsReport", "describe_set", "find_set_garbage", "list_sets", "verify_sets"]

UNFINISHED_SECONDS = 7 * 24 * 3600.0
"""Age at which the blocks of a set that was never completed are no longer needed: nobody goes on with it."""


def list_sets(storage: Storage) -> list[dict[str, Any]]:
    """List the tokenised sets of a cache.

    Returns:
        One dictionary for each set: set (its digest), path of the source, pairs, blocks, bytes, whether it is complete, and
        the seconds since its newest file was written.
    """
    found: list[dict[str, Any]] = []
    time_there = None
    for digest in TokenSet.digests(storage):
        tokens = TokenSet(storage, digest)
        files = [file for folder in (BLOCKS, INDEX) for file in storage.entries(f"{tokens.directory}/{folder}")]
        identity = tokens.description()
        if not files and identity is None:
            continue  # a directory that cleaning has left
        whole = tokens.complete(check=False)
        blocks = tokens.blocks(check=False) if whole is None else whole.blocks
        time_there = now(storage) if time_there is None else time_there
        found.append(
            {
                "set": digest,
                "path": "?" if identity is None else identity.path,
                "pairs": sum(block.pairs for block in blocks),
                "blocks": len(blocks),
                "bytes": sum(file.size for file in files),
                "complete": whole is not None,
                "age_seconds": max(0.0, time_there - max((file.modified for file in files), default=time_there)),
            }
        )
    return found


def describe_set(storage: Storage, digest: str) -> dict[str, Any]:
    """Describe one set: identity by field, contents, lengths, and what its maker found out about the source.

    Raises:
        CacheError: if an index cannot be read.
    """
    (entry,) = [one for one in list_sets(storage) if one["set"] == digest]
    tokens = TokenSet(storage, digest)
    whole, identity = tokens.complete(), tokens.description()
    rows = tokens.light(tokens.blocks() if whole is None else whole.blocks)
    lengths = [rows.light[f"{part}_tokens"].to_numpy() for part in ("prompt", "chosen", "rejected")]
    total = sum(int(part.sum()) for part in lengths)
    longest = lengths[0] + np.maximum(*lengths[1:])
    completions = np.concatenate(lengths[1:])
    completions = completions[completions > 0]  # a completion alone has no other side
    return {
        "identity": {"digest": digest} | ({} if identity is None else {"path": identity.path} | identity.to_dict()),
        "contents": {name: entry[name] for name in ("complete", "pairs", "blocks", "bytes")}
        | {
            "records": rows.account.records,
            "malformed_records": rows.account.malformed_records,
            "tokens": total,
            "bytes_per_token": entry["bytes"] / max(1, total),
            "set_aside_files": len(storage.entries(f"{tokens.directory}/{SET_ASIDE}")),
        },
        "tokens_of_a_pair": {
            "mean_prompt": float(lengths[0].mean()) if len(longest) else 0.0,
            "mean_completion": float(completions.mean()) if len(completions) else 0.0,
            "longest_prompt_and_completion": int(longest.max(initial=0)),
        },
        "facts": {} if whole is None else whole.facts,
        "problems": tokens.problems,
    }


@dataclass(frozen=True)
class SetsReport:
    """Result of reading every file of the sets.

    Attributes:
        sets, blocks, pairs, bytes: of complete sets and of intact blocks.
        unfinished: number of sets that are not complete. They are not used.
        problems: a sentence for each file that is not used.
    """

    sets: int
    blocks: int
    pairs: int
    bytes: int
    unfinished: int
    problems: tuple[str, ...]


def verify_sets(storage: Storage, digests: Sequence[str]) -> SetsReport:
    """Check both files of every block of these sets: their checksums, identity, and lengths against tokens."""
    sets = blocks = pairs = size = 0
    problems: dict[str, None] = {}
    for digest in digests:
        tokens = TokenSet(storage, digest)
        whole = tokens.complete(check=False)
        sets += whole is not None
        for block in tokens.blocks(check=False) if whole is None else whole.blocks:
            try:
                size += _verify_block(tokens, block)
                blocks, pairs = blocks + 1, pairs + block.pairs
            except (CacheError, OSError) as error:
                problems[f"set {digest}: {error}"] = None
        problems |= dict.fromkeys(tokens.problems)
    return SetsReport(sets, blocks, pairs, size, len(digests) - sets, tuple(problems))


def _verify_block(tokens: TokenSet, block: BlockInfo) -> int:
    """Bytes of a block's files.

    Raises:
        CacheError: if they are damaged, or contradict each other.
    """
    data = tokens.storage.read(f"{tokens.directory}/{BLOCKS}/{block.file}")
    index = tokens.storage.read(f"{tokens.directory}/{INDEX}/{block.index}")
    rows = decode(block, tokens.digest, data, index)
    for part in ("prompt", "chosen", "rejected"):
        if not rows.light[f"{part}_tokens"].equals(pc.list_value_length(rows.tokens[f"{part}_ids"])):
            raise CacheError(f"block {block.name} holds {part} tokens whose number differs from its index")
    return len(data) + len(index)


def find_set_garbage(storage: Storage) -> list[Garbage]:
    """Files of all sets that are not needed, in order of path: temporary files of killed processes, files set aside, files
    that no complete set names, and blocks of a set that nobody has gone on with for a week."""
    found = []
    for digest in TokenSet.digests(storage):
        tokens = TokenSet(storage, digest)
        folders = [f"{tokens.directory}/{folder}" for folder in (BLOCKS, INDEX)]
        aside = f"{tokens.directory}/{SET_ASIDE}"
        found += half_written(storage, [tokens.directory, *folders, aside])
        why = "damaged or foreign, set aside"
        found += [Garbage(path, file.size, why) for path, file in files_below(storage, aside).items()]
        whole = tokens.complete(check=False)  # also one whose files cannot be read here or now
        files = {path: file for folder in folders for path, file in files_below(storage, folder).items()}
        if whole is not None:
            needed = {f"{folders[0]}/{block.file}" for block in whole.blocks}
            needed |= {f"{folders[1]}/{block.index}" for block in whole.blocks}
            rest = {path: file for path, file in files.items() if path not in needed}
            found += _older(storage, rest, ABANDONED_SECONDS, "not part of the complete set")
        else:
            files |= files_below(storage, tokens.directory)
            old = _older(storage, files, UNFINISHED_SECONDS, "of a set that was never completed")
            found += old if len(old) == len(files) else []
    return sorted(found, key=lambda one: one.path)


def _older(storage: Storage, files: dict[str, FileInfo], seconds: float, reason: str) -> list[Garbage]:
    """Those of ``files`` that are older than this."""
    before = now(storage) - seconds if files else 0.0
    return [Garbage(path, file.size, reason) for path, file in files.items() if file.modified < before]
