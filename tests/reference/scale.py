"""Measure time and memory of planning and of the training join with made-up pairs; run by hand.

    python tests/reference/scale.py /a/place/on/disk --pairs 5000000 --missing 0.01

Makes a cache and pairs once (minutes, 6 GB), then measures in a new process: finding the missing completions, planning the
shards to score, and joining the log-probs to the pairs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from raydpo.data.pairs import PAIR_SCHEMA
from raydpo.data.spool import spooled
from raydpo.reference.identity import ReferenceIdentity
from raydpo.reference.pairs import reference_values
from raydpo.reference.part import KEY_TYPE
from raydpo.reference.shards import Wanted, missing_shards
from raydpo.reference.store import ReferenceCache

IDENTITY = ReferenceIdentity(weights="1" * 64, architecture="a" * 64, adapter=None, dtype="float32")
ROWS_PER_PART, PAIRS_PER_TABLE = 25_000, 100_000
PROMPT_TOKENS, SHORTEST, LONGEST = 40, 20, 101


def keys_of(count: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (count, 16), dtype=np.uint8)


def tokens_of(count: int) -> np.ndarray:
    return np.random.default_rng(6).integers(SHORTEST, LONGEST, count).astype(np.int32)


def binary(keys: np.ndarray) -> pa.Array:
    return pa.FixedSizeBinaryArray.from_buffers(KEY_TYPE, len(keys), [None, pa.py_buffer(np.ascontiguousarray(keys))])


def ids(lengths: np.ndarray, rng: np.random.Generator) -> pa.Array:
    offsets = np.cumsum([0, *lengths], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(rng.integers(0, 150_000, offsets[-1], dtype=np.int32)))


def make(place: Path, pairs: int) -> None:
    """The cache, its rows in an order of their own, and the pairs as Arrow files."""
    keys, tokens, rng = keys_of(2 * pairs), tokens_of(2 * pairs), np.random.default_rng(1)
    cache = ReferenceCache.open(str(place / "cache"), IDENTITY)
    cache.prepare({})
    order = rng.permutation(2 * pairs)
    for start in range(0, 2 * pairs, ROWS_PER_PART):
        rows = order[start : start + ROWS_PER_PART]
        offsets = np.cumsum([0, *tokens[rows]], dtype=np.int32)
        logps = pa.array(-rng.gamma(0.4, 3.0, offsets[-1]).astype(np.float32))
        cache.commit_rows(binary(keys[rows]), tokens[rows], pa.ListArray.from_arrays(pa.array(offsets), logps), {})
    with pa.OSFile(str(place / "pairs.arrow"), "wb") as sink, pa.ipc.new_file(sink, PAIR_SCHEMA) as writer:
        for start in range(0, pairs, PAIRS_PER_TABLE):
            count = min(PAIRS_PER_TABLE, pairs - start)
            chosen, rejected = (slice(start + side * pairs, start + side * pairs + count) for side in (0, 1))
            writer.write_table(
                pa.table(
                    [
                        pa.array([f"made-up:{row}" for row in range(start, start + count)]),
                        pa.array(["made-up"] * count),
                        pa.array(np.ones(count)),
                        ids(np.full(count, PROMPT_TOKENS), rng),
                        ids(tokens[chosen], rng),
                        ids(tokens[rejected], rng),
                        binary(keys[chosen]),
                        binary(keys[rejected]),
                        pa.array(tokens[chosen]),
                        pa.array(tokens[rejected]),
                    ],
                    schema=PAIR_SCHEMA,
                )
            )


def measure(place: Path, missing: float) -> None:
    peak = {"RssAnon": 0, "RssFile": 0, "VmRSS": 0}

    def watch() -> None:
        while True:
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            for name in peak:
                peak[name] = max(peak[name], int(status[name].split()[0]))
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()
    source = pa.ipc.open_file(pa.OSFile(str(place / "pairs.arrow")))
    batches = (source.get_batch(index) for index in range(source.num_record_batches))
    table = spooled((pa.Table.from_batches([batch]) for batch in batches), PAIR_SCHEMA)
    print(f"{table.num_rows:,} pairs")
    start = time.perf_counter()
    cache = ReferenceCache.open(str(place / "cache"), IDENTITY)
    wanted = Wanted([table])
    covered = cache.covers(wanted.keys, wanted.tokens)
    assert covered.all()
    covered[: int(missing * len(covered))] = False
    planned = time.perf_counter()
    shards = completions = 0
    for shard in missing_shards(wanted, covered, 262_144):
        shards, completions = shards + 1, completions + len(shard.completions)
    sharded = time.perf_counter()
    chosen, rejected = reference_values(table, cache)
    assert not np.isnan(chosen.sums).any() and not np.isnan(rejected.sums).any()
    done = time.perf_counter()
    print(f"wanted minus present: {planned - start:.1f} s for {len(wanted):,} completions")
    print(f"shards of the missing: {sharded - planned:.1f} s for {completions:,} completions in {shards:,} shards")
    print(f"join: {done - sharded:.1f} s for {len(chosen.values) + len(rejected.values):,} log-probs")
    print(
        f"all: {done - start:.1f} s; peak memory {peak['VmRSS'] / 2**20:.2f} GiB, of which at most "
        f"{peak['RssAnon'] / 2**20:.2f} GiB "
        f"are the process's own and {peak['RssFile'] / 2**20:.2f} GiB pages of files"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", type=Path)
    parser.add_argument("--pairs", type=int, default=5_000_000)
    parser.add_argument("--missing", type=float, default=0.01)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.place, args.missing)
        return
    if not (args.place / "pairs.arrow").exists():
        make(args.place, args.pairs)
    subprocess.run([sys.executable, __file__, str(args.place), "--missing", str(args.missing), "--measure"], check=True)


if __name__ == "__main__":
    main()
