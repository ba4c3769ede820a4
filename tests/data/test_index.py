import numpy as np
import pyarrow as pa
import pytest

from raydpo.data.index import KeyIndex, as_bytes
from raydpo.reference.part import KEY_TYPE


def index_of(*parts):
    index = KeyIndex()
    for number, (keys, tokens) in enumerate(parts):
        index.add((keys, np.array(tokens, np.int32), number))
    return index


def key(high, low):
    return np.array([high, low], np.uint64).view(np.uint8)


def test_against_a_dictionary():
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 256, (500, 16), dtype=np.uint8)
    index, best, row = KeyIndex(), {}, 0
    for part in range(20):
        keys = pool[rng.integers(0, 400, 60)]
        tokens = rng.integers(1, 6, 60).astype(np.int32)
        index.add((keys, tokens, part))
        for place, (one, count) in enumerate(zip(keys, tokens, strict=True)):
            if one.tobytes() not in best or best[one.tobytes()][0] < count:
                best[one.tobytes()] = (count, part, place, row)
            row += 1
        if part % 7 == 0:  # questions in between must not change later answers
            index.find(pool)
    found = index.find(pool)
    for one, locator in zip(pool, found, strict=True):
        expected = best.get(one.tobytes())
        assert (locator == -1) == (expected is None)
        if expected is not None:
            assert (index.tokens[locator], index.part[locator], index.row[locator], locator) == expected
    assert sorted(index.winners) == sorted(entry[3] for entry in best.values())


def test_all_128_bits_count():
    """Keys that agree in either half are different keys."""
    keys = np.stack([key(7, 1), key(7, 2), key(7, 2**63), key(8, 1)])
    index = index_of((keys, [1, 2, 3, 4]))
    assert index.find(keys).tolist() == [0, 1, 2, 3]
    assert index.find(np.stack([key(7, 3), key(9, 1), key(0, 0), key(2**64 - 1, 0)])).tolist() == [-1] * 4
    twice = index_of((keys, [1, 1, 1, 1]), (keys, [1, 2, 1, 1]))
    assert twice.find(keys).tolist() == [0, 5, 2, 3]


@pytest.mark.parametrize("wanted", [0, 3])
def test_an_empty_index_finds_nothing(wanted):
    assert KeyIndex().find(np.zeros((wanted, 16), np.uint8)).tolist() == [-1] * wanted


def test_slices_of_arrow_arrays():
    array = pa.array([bytes([number]) * 16 for number in range(9)], KEY_TYPE)
    assert as_bytes(array.slice(3, 4))[:, 0].tolist() == [3, 4, 5, 6]
    index = KeyIndex()
    index.add((as_bytes(array.slice(2)), np.ones(7, np.int32), 0))
    assert index.find(as_bytes(array)).tolist() == [-1, -1, 0, 1, 2, 3, 4, 5, 6]
