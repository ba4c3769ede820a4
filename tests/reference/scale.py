"""Measure time and memory of planning and of the training join with made-up pairs; run by hand.

    python tests/reference/scale.py /a/place/on/disk --pairs 5000000 --missing 0.01
    python tests/reference/scale.py /a/place/on/disk --plan --pairs 10000000 --missing 0.5

The first makes a cache and pairs once (minutes, 6 GB), then measures in a new process: finding the missing completions,
planning the shards to score, and joining the log-probs to the pairs. The second makes light rows only (1.5 GB), as those of
a stored set, and measures the plan of all shards.

    python tests/reference/scale.py pairs.jsonl --positions --model DIRECTORY

counts the token positions of scoring real pairs in the tree layout: planned in windows, at once, and from whole prompts.
"""

from __future__ import annotations

import argparse
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from families import planned_by_families, positions

from raydpo.config import DataConfig
from raydpo.data.index import KeyIndex, as_bytes
from raydpo.data.pairs import PAIR_SCHEMA, load_pairs
from raydpo.data.rows import LIGHT_SCHEMA
from raydpo.data.select import SourceRows, select
from raydpo.data.spool import spooled
from raydpo.data.tally import SourceReport
from raydpo.data.tokenise import Tokeniser, load_tokenizer
from raydpo.reference import shards
from raydpo.reference.identity import ReferenceIdentity
from raydpo.reference.pairs import reference_values
from raydpo.reference.part import KEY_TYPE
from raydpo.reference.shards import Plan, Wanted, plan_shards, prompt_groups, read_groups
from raydpo.reference.store import ReferenceCache

IDENTITY = ReferenceIdentity(weights="1" * 64, architecture="a" * 64, adapter=None, dtype="float32")
ROWS_PER_PART, PAIRS_PER_TABLE = 25_000, 100_000
PART_TOKENS, BATCH = 262_144, 16_384
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


def make_light(place: Path, pairs: int) -> None:
    """Light rows in blocks, as a stored set has them."""
    rng, keys, tokens = np.random.default_rng(2), keys_of(2 * pairs), tokens_of(2 * pairs)
    hashes = rng.integers(0, 1 << 63, pairs, dtype=np.uint64)
    with pa.OSFile(str(place / "light.arrow"), "wb") as sink, pa.ipc.new_file(sink, LIGHT_SCHEMA) as writer:
        for start in range(0, pairs, 8192):
            count = min(8192, pairs - start)
            ids = np.minimum(rng.zipf(1.3, (count, 24)), 100_000).astype(np.uint64)
            # Another pair with the prompt before it, or one that continues it.
            again = np.flatnonzero(rng.random(count) < 0.2)
            ids[again] = ids[again - 1]
            mine = hashes[start : start + count]
            mine[again[::2]] = mine[again[::2] - 1]
            heads = (ids[:, ::3] << np.uint64(42) | ids[:, 1::3] << np.uint64(21) | ids[:, 2::3]).astype(">u8")
            chosen, rejected = (slice(start + side * pairs, start + side * pairs + count) for side in (0, 1))
            digest = binary(np.stack([mine, mine], axis=1).view(np.uint8))
            columns = {
                "row": np.arange(start + 1, start + count + 1),
                "line": np.arange(start + 1, start + count + 1),
                "source": np.full(count, -1, np.int32),
                "prompt_tokens": (50 + mine % np.uint64(250)).astype(np.int32),
                "chosen_tokens": tokens[chosen],
                "rejected_tokens": tokens[rejected],
                "chosen_key": binary(keys[chosen]),
                "rejected_key": binary(keys[rejected]),
                "prompt_digest": digest,
                "question_digest": digest,
                "prompt_hash": mine,
                "head": pa.FixedSizeBinaryArray.from_buffers(pa.binary(64), count, [None, pa.py_buffer(heads.tobytes())]),
            }
            arrays = [
                pa.array(columns.get(field.name, np.zeros(count, field.type.to_pandas_dtype()))).cast(field.type)
                for field in LIGHT_SCHEMA
            ]
            writer.write_batch(pa.record_batch(arrays, schema=LIGHT_SCHEMA))


class NoTokens:
    """Stands for the tokens of stored sets, which a plan does not read."""

    def rows(self, sets: np.ndarray, places: np.ndarray) -> list[tuple[np.ndarray, ...]]:
        raise AssertionError("a plan needs no tokens")


def measure_plan(place: Path, missing: float) -> None:
    """The stored keys stand for the index of a cache that holds the other completions."""
    light = pa.ipc.open_file(pa.memory_map(str(place / "light.arrow"))).read_all()
    peak, began = watched(), time.perf_counter()
    start = time.process_time()
    stored = KeyIndex()
    keys = keys_of(2 * light.num_rows)[: int((1 - missing) * 2 * light.num_rows)]
    stored.add((keys, np.full(len(keys), LONGEST, np.int32), 0))
    del keys
    print(f"index of the cache: {time.process_time() - start:.1f} CPU s for {len(stored.keys):,} rows, {peak()}")
    start = time.process_time()
    rows = SourceRows(light, None, ["made-up"], [], SourceReport("", ""), "made-up", "made-up", 1.0)
    sets = select(DataConfig(train="made-up", max_length=350, eval={"fraction": 0.01}), [rows], None, None)
    print(f"selected: {time.process_time() - start:.1f} CPU s for {sets.train.num_rows:,} and {len(sets.eval):,}, {peak()}")
    whole, start = time.process_time() - start, time.process_time()
    wanted = Wanted([sets.train, sets.eval], NoTokens(), [light])
    print(f"distinct: {time.process_time() - start:.1f} CPU s for {len(wanted):,} of {2 * light.num_rows:,}, {peak()}")
    whole += time.process_time() - start
    shards = completions = size = 0
    for number, window in enumerate(wanted.windows()):
        start = time.process_time()
        covered = stored.find(as_bytes(window.keys)) >= 0
        found = time.process_time()
        plan = Plan(window, PART_TOKENS)
        planned = time.process_time()
        print(
            f"window {number}: {len(window):,} completions, present {found - start:.1f} CPU s, "
            f"plan {planned - found:.1f} CPU s, {len(plan):,} shards, {peak()}"
        )
        for shard in plan.missing(covered):
            shards, completions, size = shards + 1, completions + len(shard), size + len(pickle.dumps(shard))
        print(f"shards made and pickled: {time.process_time() - planned:.1f} CPU s, {peak()}")
        whole += time.process_time() - start
    each = size / max(1, completions)
    print(f"all: {whole:.1f} CPU s; {shards:,} shards of {completions:,} completions, {each:.1f} B each")
    print(f"by the clock, with the index: {time.perf_counter() - began:.1f} s; {peak()}")


def measure_positions(data: Path, model: Path) -> None:
    """Windows are those of 270,000 and of 10 million pairs, made smaller as the data are."""
    config = DataConfig(train=str(data), max_dropped=1.0, max_malformed=1.0)
    sets = load_pairs(config, Tokeniser(load_tokenizer(str(model))))
    known = {"tokens": sets.tokens, "light": [source.light for source in sets.sources]}
    count = sets.train.num_rows
    print(f"{count:,} pairs")
    usual = shards.WINDOWS
    everything = [list(Wanted([sets.train], **known))]
    for part in (20_000, PART_TOKENS):
        exact = sum(positions(prompt_groups(groups), BATCH) for groups in planned_by_families(*everything, part))
        print(f"shards of {part:,} tokens: {exact:,} positions from whole prompts")
        for name, pairs in (("at once", 1), ("in windows of 10M", 10_000_000), ("in windows of 270k", 270_000)):
            shards.WINDOWS = tuple(round(first * count / pairs) if pairs > 1 else (first and 10**9) for first in usual)
            wanted = Wanted([sets.train], **known)
            plan = plan_shards(wanted, part)
            mine = sum(positions(prompt_groups(read_groups(one, wanted.source)), BATCH) for one in plan)
            print(f"    {name}: {mine:,}, {mine / exact:.4f} of these")


def watched() -> Callable[[], str]:
    """Watch this process's memory. What is returned tells the peak so far."""
    peak = {"RssAnon": 0, "RssFile": 0, "VmRSS": 0}

    def watch() -> None:
        while True:
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            for name in peak:
                peak[name] = max(peak[name], int(status[name].split()[0]))
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()
    return lambda: (
        f"peak memory {peak['VmRSS'] / 2**20:.2f} GiB, of which at most {peak['RssAnon'] / 2**20:.2f} GiB are the process's "
        f"own and {peak['RssFile'] / 2**20:.2f} GiB pages of files"
    )


def measure(place: Path, missing: float) -> None:
    peak = watched()
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
    for window in wanted.windows():
        for _shard in Plan(window, PART_TOKENS).missing(covered[completions : completions + len(window)]):
            shards += 1
        completions += len(window)
    sharded = time.perf_counter()
    chosen, rejected = reference_values(table, cache)
    assert not np.isnan(chosen.sums).any() and not np.isnan(rejected.sums).any()
    done = time.perf_counter()
    print(f"wanted minus present: {planned - start:.1f} s for {len(wanted):,} completions")
    print(f"shards of the missing: {sharded - planned:.1f} s in {shards:,} shards")
    print(f"join: {done - sharded:.1f} s for {len(chosen.values) + len(rejected.values):,} log-probs")
    print(f"all: {done - start:.1f} s; {peak()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", type=Path)
    parser.add_argument("--pairs", type=int, default=5_000_000)
    parser.add_argument("--missing", type=float, default=0.01)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--plan", action="store_true", help="measure the plan of light rows")
    parser.add_argument("--positions", action="store_true", help="count positions of scoring the pairs in the file")
    parser.add_argument("--model", type=Path, help="directory of the tokenizer")
    args = parser.parse_args()
    if args.positions:
        measure_positions(args.place, args.model)
        return
    if args.measure:
        (measure_plan if args.plan else measure)(args.place, args.missing)
        return
    args.place.mkdir(parents=True, exist_ok=True)
    if not (args.place / ("light.arrow" if args.plan else "pairs.arrow")).exists():
        (make_light if args.plan else make)(args.place, args.pairs)
    command = [sys.executable, __file__, str(args.place), "--missing", str(args.missing), "--measure"]
    subprocess.run([*command, *(["--plan"] if args.plan else [])], check=True)


if __name__ == "__main__":
    main()
