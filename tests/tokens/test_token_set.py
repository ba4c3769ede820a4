"""Sets on disk: what counts after kills, damage and races."""

import dataclasses
import json
import multiprocessing
import os
import shutil

import pyarrow as pa
import pytest
from killing import killed_at_every_line
from made_sets import IDENTITY, another, joined, lines, make, rows_of

from raydpo.data.tally import SourceReport
from raydpo.errors import CacheError
from raydpo.storage import files
from raydpo.storage.content import checksum
from raydpo.storage.files import Storage
from raydpo.tokens import block, store
from raydpo.tokens.block import DamagedBlock, Span, decode, encode
from raydpo.tokens.store import TokenSet


def opened(place, identity=IDENTITY):
    return TokenSet(Storage(str(place)), identity)


def only(place, pattern):
    (file,) = place.glob(f"sets/*/{pattern}")
    return file


def of_block(place, number, pattern):
    return sorted(place.glob(f"sets/*/{pattern}"))[number]


def check_whole(place, made):
    tokens = opened(place)
    whole = tokens.complete()
    assert whole is not None and tokens.problems == [] and whole.pairs == sum(one.light.num_rows for one in made)
    light, ids = joined(made)
    rows, account = tokens.light(), SourceReport("", "")
    for one in made:
        account.merge(one.account)
    assert rows.light.equals(light) and rows.account == account and rows.labels == ("a.jsonl",)
    assert pa.concat_tables(map(tokens.tokens, whole.blocks)).equals(ids)
    assert whole.tokens == sum(len(ids[name].combine_chunks().values) for name in ids.column_names)


def test_rows_come_back_as_they_were(tmp_path):
    rows = rows_of(20)
    info, data, index = encode(rows, "0" * 32, Span(2, 5, 90))
    back = decode(info, "0" * 32, data, index)
    assert dataclasses.replace(back, light=rows.light, tokens=rows.tokens) == rows
    assert back.light.equals(rows.light) and back.tokens.equals(rows.tokens) and back.light.schema == rows.light.schema
    assert info.span == Span(2, 5, 90) and info.pairs == 20 and info.name.startswith("00002-000000000005-000000000090-20-")
    assert encode(rows, "0" * 32, Span(2, 5, 90)) == (info, data, index), "equal rows give equal bytes"
    for wrong in (data[:-1], data[:100] + b"?" + data[101:]):
        with pytest.raises(DamagedBlock, match="are not those that were written"):
            decode(info, "0" * 32, wrong, index)
    with pytest.raises(DamagedBlock, match=r"is of set 0000.*, not of 1111"):
        decode(info, "1" * 32, data, index)
    empty = rows_of(0)
    info, data, index = encode(empty, "0" * 32, Span(0, 0, 3))
    assert decode(info, "0" * 32, data, index).light.num_rows == 0


def test_a_set_is_found_again_whole(tmp_path):
    _, made = make(tmp_path)
    check_whole(tmp_path, made)
    assert opened(tmp_path).complete().facts == {"records": 33} and opened(tmp_path).description() == IDENTITY
    assert opened(tmp_path, IDENTITY.digest).complete() is not None, "a reader needs the digest alone"
    assert sum(file.stat().st_size for file in tmp_path.rglob("*")) < 100_000


def test_an_index_is_mapped_and_read_once(tmp_path, monkeypatch):
    make(tmp_path)
    opened(tmp_path).complete()
    monkeypatch.setattr(block, "checksum", None)
    before = pa.total_allocated_bytes()
    rows = opened(tmp_path).light(opened(tmp_path).complete().blocks)
    assert rows.light.num_rows == 30 and pa.total_allocated_bytes() - before < rows.light.nbytes / 4


def test_labels_and_sources_of_blocks_are_numbered_together(tmp_path):
    tokens = opened(tmp_path)
    for file, (label, source) in enumerate((("b.jsonl", "one"), ("a.jsonl", "two"), ("b.jsonl", "two"))):
        rows = rows_of(2, file, label)
        numbers = pa.array([-1, 0], pa.int32())
        light = rows.light.set_column(4, rows.light.schema.field("source"), numbers)
        tokens.commit(lines(0, file=file), dataclasses.replace(rows, light=light, sources=(source,)))
    tokens.finish({}, {0: 10, 1: 10, 2: 10})
    rows = opened(tmp_path).light()
    assert (rows.labels, rows.light["file"].to_pylist()) == (("b.jsonl", "a.jsonl"), [0, 0, 1, 1, 0, 0])
    assert (rows.sources, rows.light["source"].to_pylist()) == (("one", "two"), [-1, 0, -1, 1, -1, 1])


@pytest.mark.parametrize("stride", [37, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_every_line(stride, tmp_path):
    place, made = tmp_path / "cache", [rows_of(10, seed) for seed in range(2)]

    def check(ended):
        tokens = opened(place)
        assert (tokens.complete() is not None) == bool(list(place.glob("sets/*/complete-*"))) >= ended
        counting = {one.span for one in tokens.blocks()}
        assert tokens.problems == [] and counting <= {lines(0), lines(1)}
        written = {file: file.stat().st_mtime_ns for file in place.glob("sets/*/blocks/*") if not file.name.startswith(".")}
        make(place, 2)
        check_whole(place, made)
        for span in counting:
            (file,) = [file for file in written if file.name.startswith(f"00000-{span.start:012d}-")]
            assert file.stat().st_mtime_ns == written[file], "a block that counts is not made again"
        assert not list(place.rglob(".tmp-*")), "what the killed one left is deleted"

    kills = killed_at_every_line(
        lambda: make(place, 2), [store, block, files], lambda: shutil.rmtree(place, ignore_errors=True), check, stride
    )
    assert kills > 10


def test_a_block_without_its_index_does_not_count(tmp_path):
    tokens = opened(tmp_path)
    for number in range(2):
        tokens.commit(lines(number), rows_of(10, number))
    of_block(tmp_path, 1, "index/*").unlink()
    assert [one.span for one in opened(tmp_path).blocks()] == [lines(0)]
    with pytest.raises(CacheError, match=r"lacks lines 11 to 20 of file 1; run the command again"):
        opened(tmp_path).finish({}, {0: 20})
    assert opened(tmp_path).complete() is None and opened(tmp_path).problems == []
    _, made = make(tmp_path, 2)
    check_whole(tmp_path, made)


def test_a_gap_is_refused(tmp_path):
    tokens = opened(tmp_path)
    for number in (0, 2):
        tokens.commit(lines(number), rows_of(10, number))
    with pytest.raises(CacheError, match="lacks lines 11 to 20"):
        tokens.finish({})
    tokens.commit(lines(1), rows_of(10, 1))
    with pytest.raises(CacheError, match=r"holds lines 21 to 30 of file 1, which its source does not have; delete "):
        tokens.finish({}, {0: 20})
    with pytest.raises(CacheError, match="lacks lines 1 to 5 of file 2"):
        tokens.finish({}, {0: 30, 1: 5})
    assert tokens.finish({}, {0: 30}).pairs == 30


def _make_at_once(barrier, place, made, results):
    tokens = opened(place)
    barrier.wait()
    tokens.prepare()
    for number, rows in enumerate(made):
        if lines(number) not in {one.span for one in tokens.blocks()}:
            tokens.commit(lines(number), rows)
    results.put(tokens.finish({}, {0: 60}).pairs)


def test_two_processes_make_one_set(tmp_path):
    fork = multiprocessing.get_context("fork")
    made, barrier, results = [rows_of(10, seed) for seed in range(6)], fork.Barrier(2), fork.Queue()
    workers = [fork.Process(target=_make_at_once, args=(barrier, tmp_path, made, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0] and [results.get(), results.get()] == [60, 60]
    assert len(list(tmp_path.glob("sets/*/blocks/*"))) == len(list(tmp_path.glob("sets/*/index/*"))) == 6
    check_whole(tmp_path, made)


def test_readers_see_nothing_before_all_is_there(tmp_path):
    tokens = opened(tmp_path)
    for number in range(3):
        tokens.commit(lines(number), rows_of(10, number))
        assert opened(tmp_path).complete() is None
        with pytest.raises(CacheError, match="is not complete; run the command again"):
            opened(tmp_path).light()
        assert opened(tmp_path).light(opened(tmp_path).blocks()).light.num_rows == 10 * (number + 1)
    tokens.finish({}, {0: 30})
    assert opened(tmp_path).light().light.num_rows == 30


DAMAGE = {
    "a truncated index": lambda place: os.truncate(of_block(place, 1, "index/*"), 2000),
    "an empty index": lambda place: os.truncate(of_block(place, 1, "index/*"), 0),
    "a flipped byte in an index": lambda place: flip(of_block(place, 1, "index/*"), 3000),
    "a missing index": lambda place: of_block(place, 1, "index/*").unlink(),
    "a missing block": lambda place: of_block(place, 1, "blocks/*").unlink(),
    "a damaged list of blocks": lambda place: flip(only(place, "complete-*"), 50),
}


def flip(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_damaged_is_named_set_aside_and_made_again(what, tmp_path):
    _, made = make(tmp_path)
    opened(tmp_path).complete()  # this machine now remembers the indices
    DAMAGE[what](tmp_path)
    broken = opened(tmp_path)
    assert broken.complete() is None and broken.problems
    assert any(IDENTITY.digest in line and ("missing" in line or "not those that" in line) for line in broken.problems)
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob("sets/*/blocks/00000-000000000000-*")}
    make(tmp_path)
    check_whole(tmp_path, made)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept, "other blocks are not made again"
    assert list(tmp_path.glob("sets/*/set-aside/*"))


def test_a_flipped_byte_in_a_block_is_found_where_it_is_decoded(tmp_path):
    _, made = make(tmp_path)
    flip(of_block(tmp_path, 1, "blocks/*"), 300)
    tokens = opened(tmp_path)
    whole = tokens.complete()
    with pytest.raises(
        DamagedBlock, match=r"block 00000-000000000010-.* is damaged: its .*; it is set aside: run the command"
    ):
        tokens.tokens(whole.blocks[1])
    assert only(tmp_path, "set-aside/*").name == whole.blocks[1].file
    with pytest.raises(DamagedBlock, match=r"is gone; run the command again"):
        tokens.tokens(whole.blocks[1])
    make(tmp_path)
    check_whole(tmp_path, made)


def test_foreign_files_are_named_and_moved_away(tmp_path):
    make(tmp_path)
    other, _ = make(tmp_path, identity=another(limit=5))
    (tmp_path / "sets" / IDENTITY.digest / "index" / "notes.txt").write_text("mine")
    for folder in ("blocks", "index"):
        file = sorted((tmp_path / "sets" / other.digest / folder).iterdir())[0]
        shutil.move(file, tmp_path / "sets" / IDENTITY.digest / folder)
    tokens = opened(tmp_path)
    tokens.blocks()
    assert any("notes.txt" in line and "is no index of a block" in line for line in tokens.problems)
    assert any(f"is of set {other.digest}, not of {IDENTITY.digest}" in line for line in tokens.problems)
    tokens.prepare()
    names = {file.name for file in (tmp_path / "sets" / IDENTITY.digest / "set-aside").iterdir()}
    assert "notes.txt" in names and len(names) == 2 and opened(tmp_path).complete() is not None


def test_what_another_version_wrote_is_named_and_left_where_it_is(tmp_path, monkeypatch):
    tokens, _ = make(tmp_path)
    only(tmp_path, "complete-*").unlink()
    data = json.dumps({"set": IDENTITY.digest, "tokens": 5}).encode()
    tokens.storage.write(f"{tokens.directory}/complete-{checksum(data)}.json", data)
    monkeypatch.setattr(block, "FORMAT_VERSION", b"2")
    tokens.commit(lines(3), rows_of(10, 3))
    monkeypatch.undo()
    broken = opened(tmp_path)
    assert broken.complete() is None and len(broken.blocks()) == 3
    assert any("lacks blocks, facts, as if another version" in line for line in broken.problems)
    assert any("has format b'2', this raydpo reads b'1'" in line for line in broken.problems)
    make(tmp_path)
    assert opened(tmp_path).complete() is not None and not list(tmp_path.glob("sets/*/set-aside/*"))


def test_blocks_that_were_cut_otherwise_are_used_where_they_hold_the_most_lines(tmp_path):
    tokens = opened(tmp_path)
    spans = [Span(0, 0, 15), Span(0, 0, 10), Span(0, 10, 20), Span(0, 15, 18), Span(0, 20, 30), Span(1, 0, 4)]
    for number, span in enumerate(spans):
        tokens.commit(span, rows_of(span.stop - span.start, number))
    whole = tokens.finish({}, {0: 30, 1: 4})
    assert [one.span for one in whole.blocks] == [Span(0, 0, 10), Span(0, 10, 20), Span(0, 20, 30), Span(1, 0, 4)]
    assert opened(tmp_path).complete().blocks == whole.blocks


def test_the_nearest_set_of_the_same_path_tells_what_changed(tmp_path):
    make(tmp_path, identity=another(limit=5, special_tokens="refuse"))
    make(tmp_path, identity=another(limit=6))
    make(tmp_path, identity=another(limit=None, path="/data/b.jsonl", numbers={"pair_weight": "w"}))
    nearest = TokenSet.nearest(Storage(str(tmp_path)), IDENTITY)
    assert nearest == another(limit=6) and IDENTITY.differences(nearest) == ["limit of the source: None here, 6 there"]
    assert TokenSet.nearest(Storage(str(tmp_path)), another(path="/data/c.jsonl")) is None


def test_after_a_power_cut_indices_are_read_again(tmp_path, monkeypatch):
    make(tmp_path)
    opened(tmp_path).complete()
    file = of_block(tmp_path, 1, "index/*")
    monkeypatch.setattr(store, "content_stamp", lambda path: [1])  # a file that looks as before
    opened(tmp_path).complete()
    flip(file, 3000)
    assert opened(tmp_path).complete() is not None
    monkeypatch.setattr(store, "last_start", lambda: "another")
    assert opened(tmp_path).complete() is None


def test_a_description_is_for_people_only(tmp_path):
    _, made = make(tmp_path)
    file = only(tmp_path, "set.json")
    assert json.loads(file.read_text())["path"] == "/data/a.jsonl"
    file.write_text("{")
    assert opened(tmp_path).description() is None
    check_whole(tmp_path, made)
