"""Rows of list columns: every Arrow layout gives the same, and nothing is copied."""

import mmap
import os
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from raydpo.data.ragged import Ragged

ROWS = [[5, 6, 7], [], [8], [9, 10], [], [11, 12, 13, 14]]


def _views(rows, kind):
    """As views into a buffer in which the rows lie backwards, each followed by a token that belongs to none."""
    flat, offsets = [], {}
    for index in reversed(range(len(rows))):
        offsets[index] = len(flat)
        flat += [*rows[index], -1]
    width = pa.int32() if kind is pa.ListViewArray else pa.int64()
    starts, sizes = [offsets[index] for index in range(len(rows))], [len(row) for row in rows]
    return kind.from_arrays(pa.array(starts, width), pa.array(sizes, width), pa.array(flat, pa.int32()))


LAYOUTS = {
    "list": lambda rows: pa.array(rows, pa.list_(pa.int32())),
    "large_list": lambda rows: pa.array(rows, pa.large_list(pa.int32())),
    "list_view": lambda rows: _views(rows, pa.ListViewArray),
    "large_list_view": lambda rows: _views(rows, pa.LargeListViewArray),
}


def _split(array, cuts):
    edges = [0, *cuts, len(array)]
    return pa.chunked_array([array.slice(a, b - a) for a, b in pairwise(edges)], array.type)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cuts", [None, [], [2], [0, 1, 1, 4], [1, 2, 3, 4, 5]])
def test_every_layout_and_every_cut_gives_the_same_rows(layout, cuts):
    array = LAYOUTS[layout](ROWS)
    ragged = Ragged.of(array if cuts is None else _split(array, cuts))
    assert [ragged[row].tolist() for row in range(len(ragged))] == ROWS
    assert ragged.lengths.tolist() == [3, 0, 1, 2, 0, 4]
    assert ragged.sums().tolist() == [18, 0, 8, 19, 0, 50]
    for rows in ([], [1], [5, 0, 0, 3, 1], range(6)):
        values, offsets = ragged.gather(list(rows))
        assert [values[a:b].tolist() for a, b in pairwise(offsets)] == [ROWS[row] for row in rows]
    assert ragged.lists(2, 6).equals(pa.array(ROWS[2:], pa.list_(pa.int32())))
    assert len(Ragged.of(array.slice(2, 2))) == 2 and Ragged.of(array.slice(2, 2))[1].tolist() == [9, 10]
    for row in (-1, 6):
        with pytest.raises(IndexError):
            ragged[row]
        with pytest.raises(IndexError):
            ragged.gather([row])


def test_empty_columns():
    for column in (pa.array([], pa.list_(pa.int32())), pa.chunked_array([], pa.list_view(pa.int32()))):
        ragged = Ragged.of(column)
        assert len(ragged) == 0 and len(ragged.lengths) == 0 and len(ragged.sums()) == 0
        assert [len(each) for each in ragged.gather([])] == [0, 1]


def test_sums_add_in_double_precision_whatever_the_blocks(monkeypatch):
    values = np.float32([1e8, 1.0, -1e8]).tolist()
    monkeypatch.setattr("raydpo.data.ragged._BLOCK_ROWS", 2)
    ragged = Ragged.of(pa.chunked_array([[values, []], [[], values, values]], pa.list_(pa.float32())))
    assert ragged.sums().tolist() == [1, 0, 0, 1, 1]


def test_nothing_is_copied(tmp_path):
    """Rows are views of the buffers; a mapped file of 200 MB stays out of this process's own memory."""
    array = LAYOUTS["list"](ROWS)
    assert np.shares_memory(Ragged.of(pa.chunked_array([array]))[0], array.values.to_numpy())
    count = 5_000_000
    table = pa.table(
        {"ids": pa.ListArray.from_arrays(np.arange(0, 10 * count + 1, 10, np.int32), np.zeros(10 * count, np.int32))}
    )
    path = tmp_path / "table.arrow"
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=count // 50)
    del table
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    column = pa.ipc.open_file(pa.py_buffer(mapped)).read_all()["ids"]
    assert column.num_chunks == 50
    before = _own_bytes()
    ragged = Ragged.of(column)
    assert sum(len(ragged[row]) for row in range(0, count, 1000)) == count // 100
    assert _own_bytes() - before < 5_000_000


def _own_bytes():
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs /proc")
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def test_what_is_no_list_is_refused():
    with pytest.raises(TypeError, match="found int64"):
        Ragged.of(pa.array([1, 2]))
    with pytest.raises(ValueError, match="1 of 2 lists are null"):
        Ragged.of(pa.array([[1], None], pa.list_(pa.int32())))
