"""Pieces of any size hold the records that one loop over the source gives, with the same places, notes and errors."""

import bz2
import gzip
import json
import lzma
import pickle
from itertools import pairwise

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import records_oracle
import zstandard

from raydpo.config import SourceConfig
from raydpo.data.pieces import Sizes, pieces_of
from raydpo.data.records import read_records, records_of
from raydpo.errors import DataError

SIZES = {
    "one line": Sizes(first=1, most=1, lines=1, first_lines=1),
    "7 lines": Sizes(first=1 << 22, most=1 << 22, lines=7, first_lines=7),
    "300 bytes": Sizes(first=300, most=300, lines=1000, first_lines=1000),
    "4 MB": Sizes(first=1 << 22, most=1 << 22, lines=1 << 20, first_lines=1 << 20),
}
RECORDS = [
    {"prompt": f"p {number} é", "chosen": "a" * number, "rejected": [{"role": "user", "content": None}]}
    for number in range(40)
]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
ODD = (
    b"\xef\xbb\xbf\n \r\n"
    + LINES
    + b'\n\n{"a": 1, "a": 2}\r\n{"a": "\xff"}\n[1]\n{"a": "\\ud83d"}\n{not\r{"b": 1}\n\t\n{"last": 1}'
)
TABLE = pa.table(
    {
        "prompt": [record["prompt"] for record in RECORDS],
        "tools": pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": null}', None] * 20)),
        "kind": pa.array(["x", "y"] * 20).dictionary_encode(),
        "messages": [[{"role": "user", "content": None}, {"role": None, "content": "c"}]] * 39
        + [[{"role": "x", "content": ""}]],
    }
)


def parquet(rows=7):
    sink = pa.BufferOutputStream()
    pq.write_table(TABLE, sink, row_group_size=rows)
    return sink.getvalue().to_pybytes()


def arrow(kind):
    sink = pa.BufferOutputStream()
    with kind(sink, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=9)
    return sink.getvalue().to_pybytes()


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}
LONG = LINES + b"".join(b'{"long": "%d %s"}\n' % (number, b"x" * 3000) for number in range(300)) + LINES
NOISE = LINES + b"".join(json.dumps({"n": number**9}).encode() + b"\n" for number in range(3000))
FILES = {
    "lines.jsonl": LINES,
    "odd.jsonl": ODD,
    "odd.json": ODD,
    "blank.jsonl": b"\n \n",
    "empty.jsonl": b"",
    "no-end.jsonl": LINES[:-1],
    "long.jsonl": LONG,
    **{f"packed.jsonl{suffix}": compress(ODD) for suffix, compress in COMPRESS.items()},
    **{f"cut.jsonl{suffix}": compress(NOISE)[:-700] for suffix, compress in COMPRESS.items()},
    "twice.jsonl.gz": gzip.compress(LINES) + gzip.compress(LINES),
    "unnamed.jsonl": zstandard.ZstdCompressor().compress(ODD),
    "list.json": json.dumps(RECORDS).encode(),
    "list.jsonl": json.dumps(RECORDS, indent=1).encode(),
    "list.json.gz": gzip.compress(json.dumps(RECORDS).encode()),
    "wrong.json": b"[\n" + LINES,
    "first-wrong.jsonl": b"[1]\n" + LINES,
    "first-cut.jsonl": b'{"a": \n' + LINES,
    "objects.jsonl": b"\n" + "\n".join(json.dumps(record, indent=1) for record in RECORDS).encode(),
    "wide.jsonl": LINES.decode().encode("utf-16"),
    "wide.json": json.dumps(RECORDS).encode("utf-32"),
    "table.parquet": parquet(),
    "table.json": parquet(100),
    "table.parquet.gz": gzip.compress(parquet()),
    "cut.parquet": parquet()[:-9],
    "stream.arrow": arrow(pa.ipc.new_stream),
    "file.arrow": arrow(pa.ipc.new_file),
    "cut.arrow": arrow(pa.ipc.new_stream)[:-2000],
    "pointer.jsonl": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
    "table.csv": LINES,
}


def outcome(records):
    """The records up to an error, and the error."""
    found = []
    try:
        for record in records:
            found.append(vars(record))
    except DataError as error:
        return found, str(error)
    return found, None


def of_pieces(source, sizes):
    end = file = 0
    for piece in pieces_of(source, sizes):
        end = end if piece.file == file else 0
        file = piece.file
        assert piece.start == end < piece.last <= piece.stop, "pieces of a file follow each other"
        end = piece.stop
        records = list(records_of(pickle.loads(pickle.dumps(piece)), source.columns))
        assert len(records) == piece.records and records[-1].row == piece.before + piece.last
        if sizes.lines == 1 and not isinstance(piece.content, tuple):
            assert piece.records == 1
        yield from records


@pytest.mark.parametrize("name", FILES)
def test_pieces_of_any_size_hold_the_same_records(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    for settings in (
        {},
        {"limit": 1},
        {"limit": 7},
        {"limit": 45},
        {"columns": {"chosen": "prompt", "rejected": "nowhere"}},
    ):
        source = SourceConfig(path=str(tmp_path / name), **settings)
        wanted, error = outcome(records_oracle.read_records(source))
        if "limit" in settings and len(wanted) == settings["limit"]:
            error = None  # the loop looks at one record more than it gives
        assert outcome(read_records(source)) == (wanted, error)
        for sizes in SIZES.values():
            found, raised = outcome(of_pieces(source, sizes))
            assert found == wanted
            assert raised == error or error.endswith("or rows") or "has the column" in error, (
                "the last two are of read_records"
            )


def test_pieces_of_a_directory(tmp_path):
    for name in (
        "lines.jsonl",
        "odd.jsonl",
        "blank.jsonl",
        "packed.jsonl.gz",
        "list.json",
        "table.parquet",
        "objects.jsonl",
    ):
        (tmp_path / name).write_bytes(FILES[name])
    for limit in (None, 41, 90, 130):
        source = SourceConfig(path=str(tmp_path), limit=limit)
        wanted = outcome(records_oracle.read_records(source))
        assert wanted[1] is None and len(wanted[0]) > 40
        assert outcome(read_records(source)) == wanted
        for sizes in SIZES.values():
            assert outcome(of_pieces(source, sizes)) == wanted


def test_pieces_of_a_hub_data_set(monkeypatch):
    data = datasets.Dataset.from_list([{"a": number, "b": [{"c": None}]} for number in range(2500)])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    for limit in (None, 1100):
        source = SourceConfig(path="org/prefs", limit=limit)
        wanted = outcome(records_oracle.read_records(source))
        assert outcome(read_records(source)) == wanted
        for name, sizes in SIZES.items():
            if name != "one line":
                assert outcome(of_pieces(source, sizes)) == wanted


@pytest.mark.parametrize("name", ["odd.jsonl", "list.jsonl", "table.parquet"])
def test_parts_of_a_piece_hold_its_records(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    (piece,) = pieces_of(SourceConfig(path=str(tmp_path / name)), SIZES["4 MB"])
    cuts = [piece.start, 2, 3, 20, piece.stop]
    parts = [piece.part(*cut) for cut in pairwise(cuts)]
    assert [record for part in parts for record in part.parsed()] == list(piece.parsed())
    assert [part.records for part in parts] == [len(list(part.parsed())) for part in parts]
    assert list(piece.first(5).parsed()) == list(piece.parsed())[:5]


def test_pieces_grow_and_tell_what_was_read(tmp_path):
    content = b"".join(b'{"n": %d}\n' % number for number in range(30000))
    for name, stored in (("a.jsonl", content), ("b.jsonl.gz", gzip.compress(content))):
        (tmp_path / name).write_bytes(stored)
    stored = sum(file.stat().st_size for file in tmp_path.iterdir())
    pieces = list(pieces_of(SourceConfig(path=str(tmp_path)), Sizes(1000, 9000, 1 << 20, first_lines=70)))
    lengths = [len(piece.content) for piece in pieces if piece.file == 0]
    assert pieces[0].stop == 70 and lengths[1] < 1020 and 9000 <= lengths[-2] < 9020
    assert all(one < next_ + 20 for one, next_ in pairwise(lengths[1:-1]))
    assert [len(piece.content) for piece in pieces if piece.file == 1] == lengths, "compression does not change them"
    read = [piece.read for piece in pieces]
    assert read == sorted(read) and read[-1] == stored
