"""Token ids read by row: copies of a machine, shared, pruned, and made again where they are not whole."""

import multiprocessing
import os
import pickle
import subprocess
import time

import numpy as np
import pyarrow as pa
import pytest
from made_sets import IDENTITY, another, joined, lines, make, rows_of

from raydpo.errors import CacheError, RaydpoError
from raydpo.storage.files import Storage
from raydpo.tokens import local
from raydpo.tokens.block import DamagedBlock
from raydpo.tokens.local import StoredTokens
from raydpo.tokens.store import TokenSet


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A machine without copies, on which every set is large enough for them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(local, "SMALL_IDS", 0)
    return tmp_path / "home" / "raydpo" / "sets"


def check_rows(stored, number, made, places):
    _, ids = joined(made)
    found = stored.rows(np.full(len(places), number), np.array(places))
    for place, parts in zip(places, found, strict=True):
        wanted = [ids[name][place].as_py() for name in ids.column_names]
        assert [part.tolist() for part in parts] == wanted and all(part.dtype == np.int32 for part in parts)


def test_rows_of_several_sets_in_any_order(home, tmp_path):
    one, made = make(tmp_path / "cache")
    other, more = make(tmp_path / "cache", blocks=2, each=7, identity=another(limit=5))
    stored = StoredTokens(str(tmp_path / "cache"), (one.digest, other.digest))
    sets, places = np.array([0, 1, 0, 1, 0], np.int16), np.array([29, 13, 0, 0, 29])
    found = stored.rows(sets, places)
    tables = [joined(made)[1], joined(more)[1]]
    for number, place, parts in zip(sets, places, found, strict=True):
        assert [part.tolist() for part in parts] == [tables[number][name][place].as_py() for name in tables[0].column_names]
    check_rows(stored, 1, more, list(range(14)))
    assert stored.rows(np.empty(0, int), np.empty(0, int)) == []
    with pytest.raises(CacheError, match="holds 30 pairs, and places 3 to 30 are wanted"):
        stored.rows(np.zeros(2, int), np.array([3, 30]))


def test_it_is_sent_as_its_arguments_and_reads_mapped_copies(home, tmp_path):
    tokens, made = make(tmp_path / "cache", each=2000)
    stored = StoredTokens(str(tmp_path / "cache"), (tokens.digest,))
    check_rows(stored, 0, made, [5, 4000])
    assert len(pickle.dumps(stored)) < 300 and len(list(home.glob("*/*.arrow"))) == 2, "only what is asked for is decoded"
    again = pickle.loads(pickle.dumps(stored))
    before = pa.total_allocated_bytes()
    tables = again.tables(0)
    assert pa.total_allocated_bytes() - before < sum(table.nbytes for table in tables) / 10
    assert [table.num_rows for table in tables] == [2000] * 3 and pa.concat_tables(tables).equals(joined(made)[1])
    assert {file.suffix for file in home.glob("*/*")} == {".arrow"}, "no temporary file, no lock is left"


def test_a_small_set_leaves_no_file(home, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home.parents[1]))
    tokens, made = make(tmp_path / "cache")
    stored = StoredTokens(str(tmp_path / "cache"), (tokens.digest,))
    check_rows(stored, 0, made, [0, 29])
    assert pa.concat_tables(stored.tables(0)).equals(joined(made)[1]) and not home.exists()


def test_a_remote_cache(home, tmp_path):
    uri = f"memory://tokens-{time.time_ns()}"
    tokens, made = make(uri)
    found = TokenSet(Storage(uri), IDENTITY)
    assert found.complete() is not None and found.light().light.equals(joined(made)[0]) and found.problems == []
    check_rows(StoredTokens(uri, (tokens.digest,)), 0, made, [0, 11, 29])
    copies = home.parent / "copies"
    (copy, *_) = sorted(copies.rglob("*.arrow"))
    copy.write_bytes(copy.read_bytes()[:500])
    assert TokenSet(Storage(uri), IDENTITY).complete() is not None, "a damaged copy is fetched again"
    assert TokenSet(Storage(uri), IDENTITY).light().light.equals(joined(made)[0])


def test_a_remote_cache_of_which_no_copy_can_be_kept(home, tmp_path, monkeypatch):
    uri = f"memory://tokens-{time.time_ns()}"
    _, made = make(uri)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        found = TokenSet(Storage(uri), IDENTITY)
        assert found.complete() is not None and found.light().light.equals(joined(made)[0])
        assert "their copies cannot be kept" in found.problems[0]


def test_rows_of_a_set_that_is_being_made(home, tmp_path):
    tokens, made = TokenSet(Storage(str(tmp_path / "cache")), IDENTITY), [rows_of(10, seed) for seed in range(5)]
    stored = StoredTokens(str(tmp_path / "cache"), (tokens.digest,))
    tokens.commit(lines(0), made[0])
    tokens.commit(lines(0, file=1), made[3])
    check_rows(stored, 0, made[:1], [9])
    tokens.commit(lines(1), made[1])
    check_rows(stored, 0, made[:2], [15])  # and not what follows the blocks that were there before
    tokens.commit(lines(2), made[2])
    check_rows(stored, 0, made[:3], [29, 10, 0])
    check_rows(stored, 0, made[:4], [39])
    with pytest.raises(CacheError, match="holds 40 pairs"):
        stored.rows(np.zeros(1, int), np.array([40]))
    with pytest.raises(CacheError, match="is not complete"):
        stored.tables(0)
    tokens.commit(lines(1, file=1), made[4])
    tokens.finish({}, {0: 30, 1: 20})
    check_rows(stored, 0, made, [40, 0])
    assert len(stored.tables(0)) == 5


def test_what_comes_after_a_gap_has_no_place_yet(home, tmp_path):
    tokens, made = TokenSet(Storage(str(tmp_path / "cache")), IDENTITY), [rows_of(10, seed) for seed in range(3)]
    stored = StoredTokens(str(tmp_path / "cache"), (tokens.digest,))
    for number in (0, 2):
        tokens.commit(lines(number), made[number])
    with pytest.raises(CacheError, match="holds 10 pairs"):
        stored.rows(np.zeros(1, int), np.array([10]))
    tokens.commit(lines(1), made[1])
    check_rows(stored, 0, made, [10, 29])


def test_blocks_without_pairs(home, tmp_path):
    tokens, made = TokenSet(Storage(str(tmp_path / "cache")), IDENTITY), [rows_of(count, count) for count in (0, 4, 0, 6, 0)]
    for number, rows in enumerate(made):
        tokens.commit(lines(number), rows)
    tokens.finish({}, {0: 50})
    stored = StoredTokens(str(tmp_path / "cache"), (tokens.digest,))
    check_rows(stored, 0, made, list(range(10)))
    light = tokens.light()
    assert [len(chunk) for chunk in light.light["row"].chunks] == [table.num_rows for table in stored.tables(0)] == [4, 6]
    assert light.account.records == 15


@pytest.mark.parametrize("how", ["cut short", "empty", "of another block"])
def test_a_copy_that_is_not_whole_is_made_again(how, home, tmp_path):
    tokens, made = make(tmp_path / "cache")
    stored = StoredTokens(str(tmp_path / "cache"), (tokens.digest,))
    stored.tables(0)
    file = sorted(home.glob("*/*.arrow"))[1]
    if how == "of another block":
        file.write_bytes(local.table_bytes(rows_of(9).tokens).to_pybytes())
    else:
        os.truncate(file, 400 if how == "cut short" else 0)
    check_rows(StoredTokens(str(tmp_path / "cache"), (tokens.digest,)), 0, made, list(range(30)))


def test_a_damaged_block_is_one_sentence_and_made_again(home, tmp_path):
    tokens, made = make(tmp_path / "cache")
    file = sorted((tmp_path / "cache").glob("sets/*/blocks/*"))[1]
    data = bytearray(file.read_bytes())
    data[200] ^= 4
    file.write_bytes(data)
    with pytest.raises(DamagedBlock, match=r"is damaged: its .* bytes .*; it is set aside: run the command again"):
        StoredTokens(str(tmp_path / "cache"), (tokens.digest,)).rows(np.zeros(1, int), np.array([15]))
    make(tmp_path / "cache")
    check_rows(StoredTokens(str(tmp_path / "cache"), (tokens.digest,)), 0, made, [15])


def _decode(barrier, uri, digest, results):
    decoded, read = [], TokenSet.tokens

    def slowly(tokens, block):
        decoded.append(block.name)
        time.sleep(0.05)
        return read(tokens, block)

    TokenSet.tokens = slowly
    barrier.wait()
    table = pa.concat_tables(StoredTokens(uri, (digest,)).tables(0))
    results.put((len(decoded), table["prompt_ids"].to_pylist()))


def test_processes_at_once_decode_each_block_once(home, tmp_path):
    tokens, made = make(tmp_path / "cache", blocks=4)
    fork = multiprocessing.get_context("fork")
    barrier, results = fork.Barrier(3), fork.Queue()
    arguments = (barrier, str(tmp_path / "cache"), tokens.digest, results)
    workers = [fork.Process(target=_decode, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert sum(decoded for decoded, _ in found) == 4
    assert all(ids == joined(made)[1]["prompt_ids"].to_pylist() for _, ids in found)


def test_copies_that_nobody_used_for_long_make_room(home, tmp_path):
    one, made = make(tmp_path / "cache")
    other, _ = make(tmp_path / "cache", identity=another(limit=5))
    uri = str(tmp_path / "cache")
    old = StoredTokens(uri, (one.digest,))
    old.tables(0)
    left = home / one.digest / f".tmp-{os.uname().nodename}-999999999-{'0' * 32}"
    left.write_text("")
    check_rows(StoredTokens(uri, (one.digest,)), 0, made, [3])
    assert not left.exists(), "what a killed process left is deleted"
    os.utime(home / one.digest, (0, 0))
    StoredTokens(uri, (other.digest,)).tables(0)
    assert [file.name for file in home.iterdir()] == [other.digest]
    check_rows(old, 0, made, [3, 15])
    StoredTokens(uri, (one.digest,)).tables(0)
    assert len(list(home.iterdir())) == 2, "one that is used stays"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_disk_without_room_is_one_sentence_before_anything_is_decoded(home, small_disk, tmp_path, monkeypatch):
    tokens, made = make(tmp_path / "cache", blocks=2, each=4000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_disk))
    stored = StoredTokens(str(tmp_path / "cache"), (tokens.digest,))
    with pytest.raises(
        RaydpoError, match=r"cannot keep uncompressed copies of tokens in .*: they take .* GiB, and .* are free; "
    ):
        stored.tables(0)
    assert not list(small_disk.rglob("*.arrow"))
    monkeypatch.setattr(StoredTokens, "_make_room", lambda self, known, ids: None)
    with pytest.raises(RaydpoError, match=r"No space left.*; set XDG_CACHE_HOME to a local disk with room"):
        stored.tables(0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home.parents[1]))
    check_rows(stored, 0, made, [0, 7999])


def test_a_home_that_cannot_be_written_is_one_sentence(home, tmp_path, monkeypatch):
    tokens, _ = make(tmp_path / "cache")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(RaydpoError, match=r"cannot keep uncompressed copies .*: Not a directory; set XDG_CACHE_HOME"):
        StoredTokens(str(tmp_path / "cache"), (tokens.digest,)).tables(0)
