import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from kernel import counting, part_of
from rows import ONE, rows

from raydpo.errors import CacheMissError
from raydpo.reference import join as join_module
from raydpo.reference.join import join
from raydpo.reference.pairs import join_reference, place_reference, reference_values
from raydpo.reference.part import KEY_TYPE
from raydpo.reference.store import ReferenceCache


@pytest.fixture
def cache(tmp_path):
    return ReferenceCache.open(str(tmp_path), ONE, unverified=True)


def as_keys(keys):
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)


@pytest.mark.parametrize("block", [1, 50, 1 << 22])
def test_values_come_in_the_order_asked_for_cut_and_repeated(cache, block, monkeypatch):
    monkeypatch.setattr(join_module, "BLOCK_VALUES", block)
    monkeypatch.setattr(join_module, "FORGET_ROWS", 3)
    keys, logps = rows(40, tokens=12)
    for start in range(0, 40, 7):
        cache.commit(keys[start : start + 7], logps[start : start + 7], {})
    rng = np.random.default_rng(0)
    asked = rng.integers(0, 40, 100)
    needed = rng.integers(1, 13, 100).astype(np.int32)
    joined = join(cache, as_keys([keys[index] for index in asked]), needed)
    for place, (index, count) in enumerate(zip(asked, needed, strict=True)):
        values = joined.values[joined.offsets[place] : joined.offsets[place + 1]]
        assert np.array_equal(values, logps[index][:count])
        assert joined.sums[place] == pytest.approx(float(logps[index][:count].astype(np.float64).sum()), abs=1e-12)
    assert joined.lists(10, 20).to_pylist() == [
        logps[index][:count].tolist() for index, count in zip(asked[10:20], needed[10:20], strict=True)
    ]


def test_what_is_missing_is_not_a_number_and_never_zero(cache):
    keys, logps = rows(3, tokens=5)
    cache.commit(keys[:2], logps[:2], {})
    joined = join(cache, as_keys(keys), np.array([5, 6, 4], np.int32))
    assert np.isnan(joined.sums).tolist() == [False, True, True], "one is too short, one is not there"
    assert np.isnan(joined.values[5:]).all() and not np.isnan(joined.values[:5]).any()


def test_sums_answer_for_exactly_their_tokens_and_give_way_to_tokens(cache):
    keys, logps = rows(3, tokens=5)
    cache.commit_rows(pa.array(keys, KEY_TYPE), np.full(3, 5, np.int32), np.array([-50.0, -60.0, -70.0]), {}, verified=False)
    cache.commit(keys[:1], logps[:1], {})
    joined = join(cache, as_keys([*keys, keys[1]]), np.array([5, 5, 5, 4], np.int32))
    assert joined.sums[0] == pytest.approx(float(logps[0].sum()), abs=1e-5), "log-probs of tokens win"
    assert joined.sums[1:3].tolist() == [-60.0, -70.0] and np.isnan(joined.sums[3]), "a sum of 5 tokens is none of 4"
    assert np.isnan(joined.values[5:15]).all(), "of their tokens nothing is known"
    refused = join(ReferenceCache(cache.storage, ONE), as_keys(keys), np.full(3, 5, np.int32))
    assert np.isnan(refused.sums).tolist() == [False, True, True], "unverified rows count only where they are allowed"


def test_a_full_disk_is_an_error_and_no_crash(tmp_path):
    """In its own process, because writing to a full disk through a mapping would kill it."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", small], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    script = """
import sys
from raydpo.errors import RaydpoError
from raydpo.reference import join
values, _ = join._file_of(200_000)
values[:] = 1
del values
try:
    join._file_of(2_000_000)[0][:] = 1
except RaydpoError as error:
    print(error)
"""
    try:
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"TMPDIR": str(small)}
        )
    finally:
        subprocess.run(["umount", small], check=True)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert f"8,000,000 bytes, in {small}" in done.stdout and "set TMPDIR" in done.stdout


def test_nothing_asked_nothing_given(cache):
    joined = join(cache, np.empty((0, 16), np.uint8), np.empty(0, np.int32))
    assert len(joined.values) == len(joined.sums) == 0


def pairs_of(keys, tokens, weights_of=None):
    """A table of the completions of ``keys``, two to a pair, each with ``tokens`` tokens in use."""
    count = len(keys) // 2
    table = pa.table(
        {
            "pair_id": [f"a:{row}" for row in range(count)],
            "source": ["a"] * count,
            **{f"{side}_key": pa.array(keys[at::2], KEY_TYPE) for at, side in enumerate(("chosen", "rejected"))},
            **{f"{side}_tokens": pa.array([tokens] * count, pa.int32()) for side in ("chosen", "rejected")},
        }
    )
    return table if weights_of is None else counting(table, weights_of)


def test_sums_are_over_the_tokens_that_count(cache):
    keys, logps = rows(6, tokens=8)
    cache.commit(keys, logps, {})
    masked = pairs_of(keys, 6, part_of)
    joined, (placed, _) = join_reference(masked, cache, "training"), place_reference(masked, cache, "training")
    for row in range(3):
        for at, side in enumerate(("chosen", "rejected")):
            expected = logps[2 * row + at][:6].astype(np.float64) @ part_of(side, row, 6)
            assert joined[f"ref_{side}_sum"][row].as_py() == pytest.approx(expected, abs=1e-12)
            assert placed[f"ref_{side}_sum"][row].as_py() == pytest.approx(expected, abs=1e-12)
            assert joined[f"ref_{side}_logps"][row].as_py() == logps[2 * row + at][:6].tolist()  # every token
    some = reference_values(masked, cache, np.array([2, 0]))[1]
    assert some.sums.tolist() == [joined["ref_rejected_sum"][row].as_py() for row in (2, 0)]
    plain, every = (pairs_of(keys, 6, weights) for weights in (None, lambda side, row, tokens: np.ones(tokens)))
    for one, other in zip(reference_values(plain, cache), reference_values(every, cache), strict=True):
        assert one.sums.tolist() == other.sums.tolist()


def test_of_imported_sums_every_token_must_count(cache):
    keys, logps = rows(4, tokens=5)
    cache.commit_rows(
        pa.array(keys, KEY_TYPE), np.full(4, 5, np.int32), np.array([-5.0, -6.0, -7.0, -8.0]), {}, verified=False
    )
    cache.commit(keys[:1], logps[:1], {})

    def weights_of(side, row, tokens):  # not all tokens of the first pair's chosen completion, of which each is known
        return np.arange(tokens) > 1 if (side, row) == ("chosen", 0) else np.ones(tokens)

    placed, _ = place_reference(pairs_of(keys, 5, weights_of), cache, "training")
    assert placed["ref_rejected_sum"].to_pylist() == [-6.0, -8.0] and placed["ref_chosen_sum"][1].as_py() == -7.0
    assert placed["ref_chosen_sum"][0].as_py() == pytest.approx(float(logps[0][2:].sum()), abs=1e-5)
    with pytest.raises(CacheMissError, match=r"of 1 chosen completions \(first: a:1\) the cache holds only imported sums"):
        place_reference(pairs_of(keys, 5, lambda side, row, tokens: np.arange(tokens) >= 2 * row), cache, "training")
