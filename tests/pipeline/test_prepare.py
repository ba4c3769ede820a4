"""Digests by which runs are compared: they depend on the pairs, and not on how their table lies in memory."""

import hashlib
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydpo.data.select import COUNT_COLUMNS, PAIR_SCHEMA
from raydpo.pipeline.prepare import _digest, measured_pairs
from raydpo.rundir.pairs import pairs_record

SOURCES = ["a", "a", "b", "é", "é", "a", "a"]
WEIGHTS = [1.0, 1.0, 0.5, 2.0, 0.1, 1.0, 1.0]
DIGESTS = {
    "training": "2e54c48335b24254c85095d7b8ecb992",
    "measured": "304cb3cc16322d7cea5bda9646d69e24",
    "record": "c9b80bc5711c3c878a4acd39b6351c5b",
}


def plain():
    """Pairs in one chunk of lists."""
    count = len(SOURCES)
    rows = {
        "pair_id": [f"a:{number}" for number in range(count)],
        "source": SOURCES,
        "weight": WEIGHTS,
        **{
            f"{part}_ids": [[at] * (number % 3 + 1) for number in range(count)]
            for at, part in enumerate(("prompt", "chosen"))
        },
        "rejected_ids": [[7, number, 8] for number in range(count)],
        **{
            f"{side}_key": [bytes([at + number]) * 16 for number in range(count)]
            for at, side in ((1, "chosen"), (50, "rejected"))
        },
        **{f"{side}_full": [4] * count for side in ("chosen", "rejected")},
    }
    numbers = {"pair_weight": np.arange(count) / 4, "pair_margin": np.arange(count) - 2.0}
    return pa.table({**{name: pa.array(rows[name], PAIR_SCHEMA.field(name).type) for name in PAIR_SCHEMA.names}, **numbers})


def views(table):
    """The same pairs in chunks, their tokens as views of lists that are longer, and with the columns of ``select``."""
    parts = []
    for start, stop in ((0, 1), (1, 4), (4, 7)):
        part = table.slice(start, stop - start)
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            lists = part[name].to_pylist()
            flat = pa.array([value for ids in lists for value in [*ids, 99]], pa.int32())
            starts = np.cumsum([0, *(len(ids) + 1 for ids in lists)])[:-1].astype(np.int32)
            sizes = pa.array([len(ids) for ids in lists], pa.int32())
            part = part.set_column(part.column_names.index(name), name, pa.ListViewArray.from_arrays(starts, sizes, flat))
        parts.append(part)
    return pa.concat_tables(parts).append_column("place", pa.array(range(table.num_rows)))


def content(record):
    """Digest of the rows of a Parquet file."""
    return hashlib.sha256(repr(pq.read_table(io.BytesIO(record)).to_pylist()).encode()).hexdigest()[:32]


@pytest.mark.parametrize("stored", [lambda table: table, views], ids=["lists", "views"])
def test_digests_stay_as_they_were(stored):
    table = stored(plain())
    assert {
        "training": _digest(table),
        "measured": measured_pairs(table),
        "record": content(pairs_record(table)),
    } == DIGESTS
    assert _digest(table.slice(0, 0)) == hashlib.sha256(b"pair_weight\0pair_margin\0").hexdigest()[:32]
    others = [table.slice(1), table.set_column(2, "weight", pa.array([*WEIGHTS[:-1], 3.0]))]
    assert len({_digest(table), *map(_digest, others)}) == 3


def test_digests_know_which_tokens_count():
    table, found = plain(), set()
    masks = ([0.0, 1.0], [0.0, 0.5], [1.0, 0.0])
    for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
        for weights in masks:
            one, whole = [[0, 1], [0]], [weights, [1.0]]
            columns = {}
            for each, at in ((side, 0), (other, 1)):
                starts, values = ([one[at]] + [[0]] * 6, [whole[at]] + [[1.0]] * 6)
                columns[f"{each}_starts"] = pa.array(starts, pa.list_(pa.int32()))
                columns[f"{each}_weights"] = pa.array(values, pa.list_(pa.float32()))
            masked = table
            for name in COUNT_COLUMNS:
                masked = masked.append_column(name, columns[name])
            found.add((_digest(masked), measured_pairs(masked)))
            order = np.random.default_rng(0).permutation(7)
            assert measured_pairs(masked.take(order)) == measured_pairs(masked)
    assert len(found) == len({one for one, _ in found}) == len({other for _, other in found}) == 6
    assert DIGESTS["training"] not in {one for one, _ in found}


def test_a_mask_that_counts_everything_is_none():
    table = plain()
    for name in COUNT_COLUMNS:
        kind = pa.list_(pa.int32() if "starts" in name else pa.float32())
        table = table.append_column(name, pa.array([[0 if "starts" in name else 1]] * 7, kind))
    assert _digest(table) == DIGESTS["training"] and measured_pairs(table) == DIGESTS["measured"]
