import bz2
import gzip
import json
import lzma
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from raydpo.config import SourceConfig, source_name
from raydpo.data.records import read_records
from raydpo.errors import DataError

RECORDS = [{"prompt": f"p{number}", "chosen": "a", "rejected": "b"} for number in range(5)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def read(path, **settings):
    return list(read_records(SourceConfig(path=str(path), **settings)))


def values(path, **settings):
    return [record.value for record in read(path, **settings)]


@pytest.mark.parametrize(
    "suffix, compress",
    [
        ("", bytes),
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", zstandard.ZstdCompressor().compress),
    ],
)
@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".parquet"])
def test_kinds_and_compressions(tmp_path, suffix, compress, kind):
    content = json.dumps(RECORDS, indent=1).encode() if kind == ".json" else LINES
    if kind == ".parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(RECORDS), sink)
        content = sink.getvalue().to_pybytes()
    path = tmp_path / f"prefs{kind}{suffix}"
    path.write_bytes(compress(content))
    records = read(path)
    assert [record.value for record in records] == RECORDS
    assert [record.row for record in records] == [1, 2, 3, 4, 5]
    assert records[4].where == f"{path.name}:5"


@pytest.mark.parametrize("compress, suffix", [(gzip.compress, ".gz"), (zstandard.ZstdCompressor().compress, ".zst")])
def test_several_compressed_members(tmp_path, compress, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(LINES) + compress(LINES))
    assert values(path) == RECORDS * 2


def test_json_lines_under_the_name_json(tmp_path):
    path = tmp_path / "prefs.json"
    path.write_bytes(b"\xef\xbb\xbf" + LINES)
    assert values(path) == RECORDS


def test_directory_is_read_in_order_of_names(tmp_path):
    files = {"b.jsonl": LINES, "a.jsonl.gz": gzip.compress(b"\n" + LINES), "README.md": b"x", ".c.jsonl": b"x"}
    for name, lines in files.items():
        (tmp_path / name).write_bytes(lines)
    records = read(tmp_path)
    assert [record.where for record in records][::5] == ["a.jsonl.gz:2", "b.jsonl:1"]
    assert [record.row for record in records] == list(range(2, 12))
    with pytest.raises(DataError, match=r"holds no \.jsonl"):
        (tmp_path / "empty").mkdir()
        read(tmp_path / "empty")


def test_uris(tmp_path):
    import fsspec

    (tmp_path / "a.jsonl").write_bytes(LINES)
    assert values(f"file://{tmp_path}/a.jsonl") == RECORDS
    with fsspec.open("memory://prefs.jsonl.gz", "wb") as stream:
        stream.write(gzip.compress(LINES))
    assert values("memory://prefs.jsonl.gz") == RECORDS
    with pytest.raises(DataError, match=r"memory://none.jsonl"):
        read("memory://none.jsonl")
    with pytest.raises(DataError, match=r"cannot open nothing://here.jsonl"):
        read("nothing://here.jsonl")


def test_bad_lines_are_records_with_a_problem(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": \n[1]\n{"a": "\xff"}\n{"a": "\\ud800"}\n{"a": "\\ud83d\\ude00"}\n' + b"[" * 100_000)
    assert [(record.row, record.problem) for record in read(path)] == [
        (1, None),
        (3, "not valid JSON"),
        (4, "not a JSON object"),
        (5, "not valid UTF-8"),
        (6, "text with half a surrogate pair"),
        (7, None),
        (8, "not valid JSON"),
    ]
    assert read(path)[1].where == "a.jsonl:3"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.jsonl", None, "there is no file"),
        ("empty.jsonl", b"\n\n", "holds no records"),
        ("empty.json", b"[]", "holds no records"),
        ("cut.json", b'[{"a": 1}', "cut.json is not valid JSON"),
        ("bad.jsonl.gz", b"plain", "cannot read bad.jsonl.gz: .*gzip"),
        ("cut.jsonl.gz", gzip.compress(LINES, mtime=0)[:-12], "cannot read cut.jsonl.gz"),
        (
            "twice.jsonl.gz",
            gzip.compress(gzip.compress(LINES, mtime=0), mtime=0),
            r"holds bytes that are no text \(is it compressed t",
        ),
        ("bad.jsonl.zst", b"plain", "cannot read bad.jsonl.zst"),
        ("bad.jsonl.xz", b"plain", "cannot read bad.jsonl.xz"),
        ("bad.parquet", b"plain text, no Parquet", "cannot read bad.parquet"),
        ("prefs.csv", b"a,b", "prefs.csv has an unknown suffix"),
    ],
)
def test_unreadable_files_are_one_sentence(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_hub_that_cannot_be_reached(monkeypatch):
    import datasets

    def refuse(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"the hub does not give split 'train' .* no route"):
        read("org/prefs")


def test_hub_data_set(monkeypatch):
    import datasets

    def load_dataset(name, split):
        return datasets.Dataset.from_list([{"name": name, "split": split, "tools": None}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (record,) = read("org/prefs", split="test")
    assert (record.where, record.value) == ("org/prefs[test]:1", {"name": "org/prefs", "split": "test"})


def test_limit(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    assert values(tmp_path / "a.jsonl", limit=2) == RECORDS[:2]


def test_columns_are_mapped_and_the_others_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "p", "chosen": "x", "rejected": "y", "good": "g", "extra": 1}\n{"q": "p", "chosen": "x"}\n')
    columns = {"prompt": "q", "chosen": "good", "rejected": "chosen"}
    assert values(path, columns=columns) == [
        {"prompt": "p", "chosen": "g", "rejected": "x", "extra": 1},
        {"prompt": "p", "rejected": "x"},
    ]
    with pytest.raises(DataError, match=r"no record of .* has the column 'god'.* 'chosen'; .*did you mean 'good'"):
        read(path, columns={"chosen": "god"})
    with pytest.raises(DataError, match=r"no record of .* has the column 'god'"):
        read(path, columns={"chosen": "god"}, limit=1)


def test_parquet_fields_that_other_rows_have_are_absent(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{"prompt": [{"role": "user", "content": "q"}]}, {"prompt": [{"role": "user", "content": "q", "name": "n"}]}]
    pq.write_table(
        pa.Table.from_pylist(
            rows,
            schema=pa.schema(
                [("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())])))]
            ),
        ),
        path,
    )
    assert values(path) == rows


def test_bytes_that_are_no_text_spoil_their_record_under_either_name(tmp_path):
    """Half a surrogate pair as raw bytes, which Python's JSON accepts and no tokenizer does; and other invalid bytes."""
    lines = [b'{"a": "x"}', b'{"a": "\xed\xa0\x80"}', '{"a": "ä"}'.encode(), b'{"a": ["\xff"]}', b'{"a": "\\ud83d\\ude00"}']
    found = {}
    for name, content in (
        ("a.jsonl", b"\n".join(lines)),
        ("a.json", b"[" + b",".join(lines) + b"]"),
        ("b.json", b"\xef\xbb\xbf[" + b",".join(lines) + b"]"),
    ):
        (tmp_path / name).write_bytes(content)
        found[name] = [(record.row, record.value, record.problem) for record in read(tmp_path / name)]
    assert (
        found["a.jsonl"]
        == found["a.json"]
        == found["b.json"]
        == [
            (1, {"a": "x"}, None),
            (2, None, "not valid UTF-8"),
            (3, {"a": "ä"}, None),
            (4, None, "not valid UTF-8"),
            (5, {"a": "😀"}, None),
        ]
    )


def test_a_long_list_is_read_in_linear_time(tmp_path):
    records = [{"a": "x" * 1000, "number": number} for number in range(4000)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records))
    start = time.process_time()
    assert values(path) == records
    assert time.process_time() - start < 1.5, "once it took 10 s, and four times that for twice the records"


PRETTY = "\n".join(json.dumps(record, indent=1) for record in RECORDS)


@pytest.mark.parametrize(
    "name, content, note",
    [
        ("list.jsonl", json.dumps(RECORDS), "list.jsonl is a JSON list, though not named so"),
        ("lines.jsonl", json.dumps(RECORDS, indent=1), "lines.jsonl is a JSON list, though not named so"),
        ("bom.ndjson", "\ufeff\n" + json.dumps(RECORDS), "bom.ndjson is a JSON list, though not named so"),
        ("objects.jsonl", PRETTY, "objects.jsonl holds objects over several lines"),
        ("objects.json", "\n" + PRETTY, "objects.json holds objects over several lines"),
    ],
)
def test_json_of_another_layout_than_the_name_says(tmp_path, name, content, note):
    (tmp_path / name).write_text(content, encoding="utf-8")
    records = read(tmp_path / name)
    assert [record.value for record in records] == RECORDS
    assert [record.note for record in records] == [note] + [None] * 4


def test_place_of_an_object_over_several_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n" + PRETTY)
    assert [record.where for record in read(tmp_path / "a.jsonl")] == [f"a.jsonl:{line}" for line in (2, 7, 12, 17, 22)]


def test_a_first_line_that_is_wrong_does_not_change_how_the_others_are_read(tmp_path):
    for number, first in enumerate(("[1]", '{"a": ', "[")):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(first.encode() + b"\n" + LINES)
        if first == "[":
            with pytest.raises(DataError, match=r"2.jsonl is not valid JSON"):
                read(path)
            continue
        assert [record.value for record in read(path)] == [None, *RECORDS]


@pytest.mark.parametrize("suffix", ["JSONL", "Json", "PARQUET", "JSONL.GZ", "jsonl.Zst"])
def test_suffixes_in_capitals(tmp_path, suffix):
    content = LINES
    if suffix == "PARQUET":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(RECORDS), sink)
        content = sink.getvalue().to_pybytes()
    compress = {"GZ": gzip.compress, "Zst": zstandard.ZstdCompressor().compress}.get(suffix.rpartition(".")[2], bytes)
    path = tmp_path / f"PREFS.{suffix}"
    path.write_bytes(compress(content))
    assert values(path) == RECORDS
    assert source_name(SourceConfig(path=str(path))) == "PREFS"


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, zstandard.ZstdCompressor().compress])
def test_compressed_files_without_the_suffix(tmp_path, compress):
    (tmp_path / "a.jsonl").write_bytes(compress(LINES))
    records = read(tmp_path / "a.jsonl")
    assert [record.value for record in records] == RECORDS
    assert records[0].note.startswith("a.jsonl is compressed (")


def test_parquet_under_another_name(tmp_path):
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "a.json")
    assert values(tmp_path / "a.json") == RECORDS


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.json", "a.jsonl.gz", "a.arrow"])
def test_git_lfs_pointers(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(DataError, match=rf"{name} is a Git LFS pointer .* 'git lfs pull'"):
        read(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name, layout", [("a.jsonl", LINES), ("a.json", json.dumps(RECORDS).encode())])
def test_other_encodings_of_unicode(tmp_path, encoding, name, layout):
    (tmp_path / name).write_bytes(layout.decode().encode(encoding))
    records = read(tmp_path / name)
    assert [record.value for record in records] == RECORDS
    assert records[0].note.endswith(", not UTF-8") and f"{name} is UTF-" in records[0].note
    (tmp_path / name).write_bytes(layout.decode().encode(encoding) + b"\x00")
    with pytest.raises(DataError, match=r"is neither UTF-8 nor valid UTF-(16|32).*; save it as UTF-8"):
        read(tmp_path / name)


def test_links_to_directories_are_not_followed(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_bytes(LINES)
    (tmp_path / "data" / "up").symlink_to(tmp_path)
    (tmp_path / "data" / "b.jsonl").symlink_to(tmp_path / "data" / "a.jsonl")
    assert values(tmp_path) == RECORDS * 2


@pytest.mark.parametrize(
    "line, key",
    [
        ('{"prompt": "q", "chosen": "a", "chosen": "c", "rejected": "b"}', "chosen"),
        ('{"prompt": [{"role": "user", "content": "q", "content": "p"}], "chosen": "a", "rejected": "b"}', "content"),
    ],
)
def test_an_object_with_a_key_twice_is_refused(tmp_path, line, key):
    good = '{"prompt": "q", "prompt": "q", "chosen": "a", "rejected": "b"}'
    (tmp_path / "a.jsonl").write_text(f"{good}\n{line}\n")
    first, second = read_records(SourceConfig(path=str(tmp_path / "a.jsonl")))
    assert (first.problem, second.problem) == (None, f"the key {key!r} twice in one object, with different values")
    (tmp_path / "a.json").write_text(f"[{good}, {line}]")
    with pytest.raises(DataError, match=f"the key '{key}' twice in one object"):
        list(read_records(SourceConfig(path=str(tmp_path / "a.json"))))
