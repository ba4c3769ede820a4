"""Made-up sets: an identity without a tokenizer, and rows of random tokens."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pyarrow as pa

from raydpo.data.rows import LIGHT_SCHEMA, TOKEN_SCHEMA, Rows
from raydpo.data.tally import SourceReport
from raydpo.storage.files import Storage
from raydpo.tokens.block import Span
from raydpo.tokens.identity import SetIdentity, SourceFile
from raydpo.tokens.store import TokenSet

IDENTITY = SetIdentity(
    files=(SourceFile("a.jsonl", 1000, "sha256 0123"),),
    columns={},
    limit=None,
    numbers={},
    special_tokens="warn",
    most_characters=1_000_000,
    tokenizer={"files": {"tokenizer.json": "abc"}, "class": "Some", "template": None, "template_date": None, "probe": "1"},
    path="/data/a.jsonl",
)


def rows_of(count: int, seed: int = 0, label: str = "a.jsonl", most: int = 30) -> Rows:
    """Rows with random tokens; what the light columns say of lengths is true of them."""
    rng = np.random.default_rng(seed)
    lengths = [rng.integers(1, most, count) for _ in range(3)]
    lists = [
        pa.ListArray.from_arrays(
            pa.array(np.cumsum([0, *each]), pa.int32()), pa.array(rng.integers(0, 1000, each.sum()), pa.int32())
        )
        for each in lengths
    ]
    tokens = pa.Table.from_arrays(lists, schema=TOKEN_SCHEMA)
    parts = zip(("prompt", "chosen", "rejected"), lengths, strict=True)
    columns = {f"{part}_tokens": pa.array(each, pa.int32()) for part, each in parts}
    columns |= {"source": pa.array(np.full(count, -1), pa.int32()), "file": pa.array(np.zeros(count), pa.int32())}
    for field in LIGHT_SCHEMA:
        if field.name not in columns and pa.types.is_fixed_size_binary(field.type):
            width = field.type.byte_width
            columns[field.name] = pa.array([rng.bytes(width) for _ in range(count)], field.type)
        elif field.name not in columns:
            columns[field.name] = pa.array(rng.integers(0, 100, count), field.type)
    account = SourceReport("", "", records=count + 1, malformed_records=1, pairs=count)
    account.malformed.add("no chosen", f"{label}:{seed}")
    account.understood = Counter({"read so": count})
    light = pa.table([columns[name] for name in LIGHT_SCHEMA.names], schema=LIGHT_SCHEMA)
    return Rows(light, tokens, (label,), (), account)


def lines(number: int, each: int = 10, file: int = 0) -> Span:
    """The span of block ``number`` of a file."""
    return Span(file, number * each, (number + 1) * each)


def make(uri: object, blocks: int = 3, each: int = 10, identity: SetIdentity = IDENTITY) -> tuple[TokenSet, list[Rows]]:
    """A whole set of ``blocks`` blocks of one file, as a command makes it: only those that are missing are written."""
    tokens = TokenSet(Storage(str(uri)), identity)
    made = [rows_of(each, seed) for seed in range(blocks)]
    if tokens.complete() is None:
        tokens.prepare()
        there = {block.span for block in tokens.blocks()}
        for number, rows in enumerate(made):
            if lines(number, each) not in there:
                tokens.commit(lines(number, each), rows)
        tokens.finish({"records": blocks * (each + 1)}, {0: blocks * each})
    return tokens, made


def joined(made: list[Rows]) -> tuple[pa.Table, pa.Table]:
    """Light rows and tokens of successive blocks."""
    return pa.concat_tables(one.light for one in made), pa.concat_tables(one.tokens for one in made)


def another(**fields: object) -> SetIdentity:
    return dataclasses.replace(IDENTITY, **fields)  # type: ignore[arg-type]
