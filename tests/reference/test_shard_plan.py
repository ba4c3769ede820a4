"""The plan of what to score: a pure function of what is wanted, from first tokens in place of whole prompts."""

import pickle
import random
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import ray
from families import planned_by_families, positions
from rows import ONE

from raydpo.cluster.resources import Resources
from raydpo.data.ragged import Ragged, digests
from raydpo.data.rows import heads_of
from raydpo.data.select import TokenTables
from raydpo.errors import CacheError
from raydpo.reference import build, shards
from raydpo.reference.heads import in_order
from raydpo.reference.part import KEY_TYPE
from raydpo.reference.score import ReferenceSpec
from raydpo.reference.shards import Wanted, grouped, plan_shards, prompt_groups, read_groups

TOKENS, IDS = 1500, pa.list_(pa.int32())
SYSTEM, RESOURCES = [7] * 9, Resources(2, 0, None)


def pairs(count, seed=0):
    """Dialogues of several turns after a common beginning, in random order; some prompts have several pairs, some pairs are
    there twice. Returns the table of all, as sets of two sources, and each pair's place."""
    rng = np.random.default_rng(seed)
    prompts = []
    while len(prompts) < count:
        prompt = [*SYSTEM, *rng.integers(1, 40, rng.integers(5, 40)).tolist()]
        for _ in range(rng.integers(1, 4)):
            prompts.append(prompt)
            if rng.random() < 0.3:
                prompts.append(prompt)
            prompt = [*prompt, *rng.integers(1, 40, rng.integers(5, 30)).tolist()]
    prompts = [prompts[row] for row in rng.permutation(len(prompts))[:count]]
    sides = [[rng.integers(1, 40, rng.integers(3, 20)).tolist() for _ in range(count)] for _ in "12"]
    keys = [[rng.bytes(16) for _ in range(count)] for _ in "12"]
    for row in rng.choice(count // 2, count // 10, replace=False) + count // 2:  # pairs of earlier rows
        for column in (prompts, *sides, *keys):
            column[row] = column[row - count // 2]
    sets = (np.arange(count) % 3 == 0).astype(np.int16)
    places = np.where(sets, np.cumsum(sets) - 1, np.cumsum(1 - sets) - 1)
    columns = {"prompt_ids": pa.array(prompts, IDS), "set": sets, "place": places}
    for side, tokens, key in zip(("chosen", "rejected"), sides, keys, strict=True):
        columns |= {f"{side}_ids": pa.array(tokens, IDS), f"{side}_key": pa.array(key, KEY_TYPE)}
    return pa.table(columns)


class Tokens:
    """A source of the tokens of a table's sets."""

    def __init__(self, table):
        self.at = {(one["set"], one["place"]): one for one in table.to_pylist()}

    def rows(self, sets, places):
        found = [self.at[each] for each in zip(sets.tolist(), places.tolist(), strict=True)]
        return [tuple(np.array(one[f"{name}_ids"], np.int32) for name in ("prompt", "chosen", "rejected")) for one in found]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(shards, "WINDOWS", (0, 64, 160, 400))


def with_heads(table):
    prompts = Ragged.of(table["prompt_ids"])
    heads = heads_of(*prompts.gather(np.arange(len(prompts))), len(SYSTEM)).tobytes()
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(64), table.num_rows, [None, pa.py_buffer(heads)])
    return table.append_column("head", column).append_column("prompt_hash", pa.array(digests(table["prompt_ids"])))


def bits(planned):
    """All that decides the bits of shards, in order."""
    return [tuple(column.tobytes() for column in vars(shard).values()) for shard in planned]


def by_windows(table):
    """One table for each window of each set, with its rows out of order."""
    window = np.searchsorted(shards.WINDOWS, table["place"].to_numpy(), side="right")
    number = 10 * table["set"].to_numpy() + window
    rng = np.random.default_rng(1)
    return [table.take(rng.permutation(np.flatnonzero(number == each))) for each in np.unique(number)]


class Cache:
    """Holds the completions with these keys."""

    builder, problems = "me", ()

    def __init__(self, *keys):
        self.held = {*keys}

    def covers(self, keys, tokens):
        return np.array([key in self.held for key in keys.to_pylist()], bool)


def planned(given, tokens, cache, light=None, teams=2):
    work = build._Work(given, cache, tokens, light)
    first = work.next_missing()
    return [] if first is None else list(work.shards(first, TOKENS, teams))


def test_a_set_in_the_making_a_found_one_and_a_repeated_build_give_the_same_shards(monkeypatch):
    monkeypatch.setattr(build, "MIN_SHARD_TOKENS", 500)
    table = with_heads(pairs(900))
    tokens = Tokens(table)
    found = planned([table], tokens, Cache())
    assert len(found) > 40 and len({one.tobytes() for shard in found for one in shard.keys}) == 2 * 810
    assert sum(map(len, found)) == 2 * 810
    order = np.random.default_rng(2).permutation(900)
    halves = [table.take(order[:500]), table.take(order[500:])]  # as training and held-out pairs are
    light = [table.filter(pa.array(table["set"].to_numpy() == number)) for number in (0, 1)]
    for given in ([table.take(order)], halves, iter(by_windows(table)), iter(by_windows(table)[::1])):
        assert bits(planned(given, tokens, Cache())) == bits(found)
    bare = [one.drop(["head", "prompt_hash"]) for one in halves]
    assert bits(planned(bare, tokens, Cache(), light)) == bits(found)
    # Killed after some shards, and half of another one: the rest is cut as before.
    keys = [key.tobytes() for shard in found[:7] for key in shard.keys]
    keys += [key.tobytes() for key in found[7].keys[::2]]
    for given in ([table], iter(by_windows(table))):
        rest = planned(given, tokens, Cache(*keys))
        assert bits(rest) == bits([found[7].take(slice(1, None, 2)), *found[8:]])
    assert planned([table], tokens, Cache(*(key.tobytes() for shard in found for key in shard.keys))) == []


def test_many_small_sources_give_few_more_shards_than_one_large_one(monkeypatch):
    """All actors have work after the first source, and shards grow with what is known."""
    monkeypatch.setattr(shards, "WINDOWS", (0, 10**6, 10**7, 10**8))
    monkeypatch.setattr(build, "MIN_SHARD_TOKENS", 100)
    table = pairs(900).drop(["set", "place"])
    sources = [table.slice(start, 30) for start in range(0, 900, 30)]
    work = build._Work(sources, Cache(), None, None)
    many = list(work.shards(0, 10**6, 2))
    first = {int(one) for shard in many for one in shard.sets[:1]}
    assert len(first) == 30 and sum(shard.sets[0] == 0 for shard in many) >= 12
    whole = list(build._Work([table], Cache(), None, None).shards(0, 10**6, 2))
    assert 12 <= len(whole) <= 16 and len(many) <= 5 * len(whole)


def test_only_row_numbers_travel_to_actors_that_can_read_tokens_themselves(monkeypatch):
    table = with_heads(pairs(900))
    monkeypatch.setattr(shards, "WINDOWS", (0, 10**6, 10**7, 10**8))
    put, sent = [], []

    def over_actors(actor, arguments, blocks, *others, **given):
        sent.append((arguments, [(block.nbytes, len(pickle.loads(block["shard"][0].as_py()))) for block in blocks]))
        return iter(())

    monkeypatch.setattr(build, "over_actors", over_actors)
    monkeypatch.setattr(ray, "put", lambda value: put.append(value) or "reference")
    spec, cache = ReferenceSpec(path="model", adapter=None, identity=ONE), Cache()
    cache.storage = SimpleNamespace(uri="cache")
    for tokens in (Tokens(table), None):
        work = build._Work([table], cache, tokens, None)
        cut = work.shards(0, 10**6, 2)
        assert not [*build._score_on_ray(cut, work.source, spec, cache, set(), RESOURCES, 100, print, [])]
    (stored, blocks), (in_memory, _) = sent
    assert isinstance(stored[0], Tokens) and in_memory[0] == "reference" and [type(one) for one in put] == [TokenTables]
    assert len(stored[7]) == 2, "groups to check the layout with"
    assert sum(count for _, count in blocks) == 2 * 810 and all(size <= 36 * count + 1500 for size, count in blocks)


def test_every_completion_is_read_as_its_pair_has_it_and_as_long_as_its_longest_use():
    table = pairs(300)
    cut = table.set_column(
        table.column_names.index("chosen_ids"),
        "chosen_ids",
        pa.array([one[:3] for one in table["chosen_ids"].to_pylist()], IDS),
    )
    whole = {
        key: (one["prompt_ids"], one[f"{side}_ids"])
        for one in table.to_pylist()
        for side in ("chosen", "rejected")
        for key in [one[f"{side}_key"]]
    }
    for given, tokens in (
        ([cut, table], None),
        ([cut.slice(0, 40), table], Tokens(table)),
        ([table.slice(90), table], None),
    ):
        wanted = Wanted(given, tokens)
        read = [one for shard in plan_shards(wanted, TOKENS) for group in read_groups(shard, wanted.source) for one in group]
        assert {one.key: (one.prompt.tolist(), one.tokens.tolist()) for one in read} == whole and len(read) == len(whole)
        assert sorted(one.key for one in wanted) == sorted(whole) and wanted[-1].key == wanted.keys[-1].as_py()
    short = Wanted([cut], Tokens(table))
    assert {len(one.tokens) for one in short if one.key in {*table["chosen_key"].to_pylist()}} == {3}


def test_tokens_of_other_pairs_are_refused():
    table = pairs(50)
    shifted = Tokens(table)
    shifted.at = {(number, place): shifted.at.get((number, place + 1), one) for (number, place), one in shifted.at.items()}
    (shard, *_) = plan_shards(Wanted([table], shifted), TOKENS)
    with pytest.raises(CacheError, match=r"place \d+ of set [01] was read as a prompt of \d+ .* expected \d+ and at least"):
        read_groups(shard, shifted)


def test_prompts_are_sorted_as_their_tokens_are():
    rng = np.random.default_rng(3)
    heads = rng.choice([0, 1, 2**63 - 1, 2**63], (3000, 8)).astype(np.uint64)
    heads[:, :6] *= rng.random((3000, 1)) < 0.3
    lengths, hashes = rng.integers(0, 3, 3000).astype(np.int32), rng.integers(0, 3, 3000).astype(np.uint64)
    rows = list(zip(map(tuple, heads.tolist()), lengths.tolist(), hashes.tolist(), strict=True))
    order, changes = in_order(heads, lengths, hashes)
    assert order.tolist() == sorted(range(3000), key=rows.__getitem__)
    assert changes.tolist() == [index == 0 or rows[order[index]] != rows[order[index - 1]] for index in range(3000)]
    assert 100 < changes.sum() < 2900


def test_first_tokens_bring_together_nearly_what_whole_prompts_do(monkeypatch):
    monkeypatch.setattr(shards, "WINDOWS", (0, 10**6, 10**7, 10**8))
    wanted = Wanted([pairs(2500)])
    mine = sum(positions(prompt_groups(read_groups(one, wanted.source))) for one in plan_shards(wanted, 20_000))
    theirs = sum(positions(prompt_groups(groups)) for groups in planned_by_families(list(wanted), 20_000))
    everything = list(wanted)
    random.Random(0).shuffle(everything)
    mixed = sum(
        positions(prompt_groups(grouped(everything[start : start + 300]))) for start in range(0, len(everything), 300)
    )
    assert mine <= 1.01 * theirs and mine < 0.8 * mixed
