"""Work on blocks of rows: their borders, what is computed again, and whose seconds are told."""

import pyarrow as pa

from raydpo.cluster.work import do_work
from raydpo.storage.files import Storage


class Doubling:
    """Doubles numbers, in a thread. Numbers above ``limit`` fail."""

    def __init__(self, limit=100):
        self.identity = {"work": "doubling"}
        self.limit, self.blocks = limit, []

    def open(self, device):
        return self

    def __call__(self, rows):
        self.blocks.append(rows["x"].to_pylist())
        return pa.table({"y": pa.array([2 * x if x <= self.limit else None for x in self.blocks[-1]], pa.int64())})

    def close(self):
        pass


def done(work, tables, place, block, **more):
    """The results, what was told in order: the progress, and the table of each block that was computed."""
    told = []

    def spent(table, seconds):
        assert 0 <= seconds < 60
        told.append(f"table {table}")

    found = do_work(
        work,
        [pa.table({"x": rows}) for rows in tables],
        Storage(str(place)),
        1,
        block=block,
        progress=lambda finished, total: told.append((finished, total)),
        doing="doubling",
        warn=told.append,
        spent=spent,
        **more,
    )
    return [table["y"].to_pylist() for table in found], told


def test_each_table_has_blocks_of_its_own_size(tmp_path):
    work = Doubling()
    found, told = done(work, ([1, 2, 3], [4, 5, 6]), tmp_path, (2, 3))
    assert found == [[2, 4, 6], [8, 10, 12]] and work.blocks == [[1, 2], [3], [4, 5, 6]]
    assert told == [(0, 6), (2, 6), "table 0", (3, 6), "table 0", (6, 6), "table 1"]
    again = Doubling()
    assert done(again, ([1, 2, 3], [4, 5, 6]), tmp_path, (2, 3)) == (found, []) and not again.blocks


def test_rows_that_are_computed_again_count_for_their_table(tmp_path):
    tables, failed = ([1, 9], [2]), {"again": lambda result: result["y"].is_null().to_numpy(zero_copy_only=False)}
    assert done(Doubling(limit=5), tables, tmp_path, 2)[0] == [[2, None], [4]]
    work = Doubling()
    assert done(work, tables, tmp_path, 2, **failed) == ([[2, 18], [4]], [(0, 1), (1, 1), "table 0"])
    assert work.blocks == [[9]]
