"""Builds, kills, corruptions, compactions, clean-ups and reads in random order, against a model of the expected content."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from killing import killed_once
from rows import ONE, OTHER, values

from raydpo.reference import compact as compact_module
from raydpo.reference import store as store_module
from raydpo.reference.compact import compact, delete_garbage, find_garbage
from raydpo.reference.part import KEY_TYPE, digest_is_sound, encode_part, ragged
from raydpo.reference.store import PARTS, ReferenceCache
from raydpo.storage import files as storage_module

STEPS = 40
MODULES = [compact_module, store_module, storage_module]
steps_taken = [0]


def truth(number, tokens=20):
    """The true log-probs of completion ``number``, the same for every scorer."""
    return -np.random.default_rng(number).random(20).astype(np.float32)[:tokens]


def key(number):
    return number.to_bytes(16, "little")


def fresh(place):
    return ReferenceCache.open(str(place), ONE)


class History(RuleBasedStateMachine):
    """Completions are numbers. ``lengths`` maps each committed one to the number of its tokens that must be found."""

    def __init__(self):
        super().__init__()
        self.place = Path(tempfile.mkdtemp(prefix="history-"))
        self.parts = self.place / ONE.digest / PARTS
        self.lengths = {}
        self.reader = fresh(self.place)  # lives through everything, as a trainer does
        fresh(self.place).prepare({})

    def teardown(self):
        shutil.rmtree(self.place)

    def commit(self, numbers, tokens):
        fresh(self.place).commit([key(one) for one in numbers], [truth(one, tokens) for one in numbers], {})

    def note(self, numbers, tokens):
        for one in numbers:
            self.lengths[one] = max(tokens, self.lengths.get(one, 0))

    completions = st.lists(st.integers(0, 40), min_size=1, max_size=8, unique=True)
    lengths_of = st.integers(1, 20)

    @rule(numbers=completions, tokens=lengths_of)
    def append(self, numbers, tokens):
        self.commit(numbers, tokens)
        self.note(numbers, tokens)

    @rule(numbers=completions, tokens=lengths_of, line=st.integers(1, 45))
    def append_killed(self, numbers, tokens, line):
        if killed_once(lambda: self.commit(numbers, tokens), MODULES, line):
            self.note(numbers, tokens)

    @rule()
    def compact(self):
        compact(fresh(self.place), target_bytes=8000)

    @rule(line=st.integers(1, 400))
    def compact_killed(self, line):
        killed_once(lambda: compact(fresh(self.place), target_bytes=8000), MODULES, line)

    @rule()
    def clean(self):
        cache = fresh(self.place)
        cache.prepare({})
        delete_garbage(cache, find_garbage(cache))

    @rule(line=st.integers(1, 500))
    def clean_killed(self, line):
        def act():
            cache = fresh(self.place)
            delete_garbage(cache, find_garbage(cache))

        killed_once(act, MODULES, line)

    @rule(choice=st.integers(0, 1000), how=st.sampled_from(["truncate", "flip", "empty", "foreign", "swap"]))
    def corrupt(self, choice, how):
        parts = sorted(self.parts.glob("*.parquet"))
        if not parts:
            return
        path = parts[choice % len(parts)]
        data = bytearray(path.read_bytes())
        if how == "foreign":
            name, data = encode_part(
                OTHER,
                pa.array([key(0)], KEY_TYPE),
                np.array([1], np.int32),
                ragged([np.array([-9.0], np.float32)]),
                {},
                builder="00000000",
                time_ns=choice,
            )
            path = self.parts / name
        elif how == "truncate":
            data = data[: choice % max(1, len(data))]
        elif how == "flip" and data:
            data[choice % len(data)] ^= 1 << choice % 8
        elif how == "swap":
            data = parts[(choice + 1) % len(parts)].read_bytes()
        else:
            data = b""
        path.write_bytes(data)
        left = self.on_disk()
        # What no sound file holds any more may be missing, until it is scored again.
        self.lengths = {one: min(tokens, left[key(one)]) for one, tokens in self.lengths.items() if key(one) in left}

    def on_disk(self):
        """Most tokens of each key in all intact files, read without the store."""
        found = {}
        for file in self.parts.glob("*.parquet"):
            content = file.read_bytes()
            if not digest_is_sound(file.name, content):
                continue
            table = pq.read_table(pa.BufferReader(content), columns=["key", "tokens"])
            if table.schema.metadata[b"raydpo.identity"] == ONE.to_json().encode():
                for one, tokens in zip(table["key"].to_pylist(), table["tokens"].to_pylist(), strict=True):
                    found[one] = max(tokens, found.get(one, 0))
        return found

    @rule(tokens=lengths_of)
    def build(self, tokens):
        """What a build does: set aside what is damaged, find what is missing, score it, find everything."""
        cache = fresh(self.place)
        numbers = list(range(0, 40, 3))
        keys = pa.array([key(one) for one in numbers], KEY_TYPE)
        covered = cache.covers(keys, np.full(len(numbers), tokens, np.int32))
        cache.set_aside()
        missing = [one for one, there in zip(numbers, covered, strict=True) if not there]
        if missing:
            self.commit(missing, tokens)
        self.note(numbers, tokens)
        assert cache.covers(keys, np.full(len(numbers), tokens, np.int32)).all()

    @invariant()
    def nothing_lost_nothing_wrong(self):
        steps_taken[0] += 1
        for cache in (fresh(self.place), self.reader):
            found = values(cache, [key(one) for one in range(41)])
            for one, row in enumerate(found):
                assert row is None or np.array_equal(row, truth(one, len(row))), "a wrong value"
                assert (0 if row is None else len(row)) >= self.lengths.get(one, 0), f"completion {one} is lost"


@pytest.mark.parametrize("examples", [12, pytest.param(60, marks=pytest.mark.slow)])
def test_random_histories(examples):
    steps_taken[0] = 0
    history = History.TestCase
    # Without shrinking: a failure prints its history, and shrinking one of forked processes takes minutes.
    history.settings = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    history().runTest()
    assert steps_taken[0] >= examples * STEPS // 3, steps_taken
