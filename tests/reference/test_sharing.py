"""Builds of one cache share the work: the loop of a build and its actors, repeated many times, without Ray and a model.

The same with both is in test_build_together.py and sweep/test_two_users.py.
"""

import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
import transformers
from rows import ONE

from raydpo.cluster.resources import Resources
from raydpo.data.pairs import PAIR_SCHEMA
from raydpo.data.select import TokenTables
from raydpo.reference import build as module
from raydpo.reference.build import build
from raydpo.reference.claims import Claims
from raydpo.reference.compact import compact
from raydpo.reference.score import ReferenceSpec
from raydpo.reference.shards import plan_shards
from raydpo.reference.store import ReferenceCache

SHARD_TOKENS = 200
SECONDS = 0.02
"""For a shard."""


def pairs(count):
    rng = np.random.default_rng(0)
    return pa.table(
        {
            "pair_id": [f"a:{number}" for number in range(count)],
            "source": ["a"] * count,
            "weight": [1.0] * count,
            "prompt_ids": [rng.integers(1, 99, 10).tolist() for _ in range(count)],
            "chosen_ids": [rng.integers(1, 99, 10).tolist() for _ in range(count)],
            "rejected_ids": [rng.integers(1, 99, 10).tolist() for _ in range(count)],
            "chosen_key": [rng.bytes(16) for _ in range(count)],
            "rejected_key": [rng.bytes(16) for _ in range(count)],
            "chosen_full": [10] * count,
            "rejected_full": [10] * count,
        },
        schema=PAIR_SCHEMA,
    )


class SlowScorer:
    notes, provenance, sample = (), {}, ()

    def __init__(self, spec, **settings):
        pass

    def score(self, groups):
        time.sleep(SECONDS * bool(groups))
        return [tuple(np.full(len(tokens), -1, np.float32) for tokens in group.completions) for group in groups]

    def close(self):
        pass


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """One actor per build, called in its own thread."""

    def score(shards, source, spec, cache, known, resources, tokens_per_batch, tell, again):
        actor = module._ScoreShard(source, spec, cache.storage.uri, cache.builder, frozenset(known), resources, 100, [])
        for shard in shards:
            yield actor(pa.table({"shard": [pickle.dumps(shard)]})).to_pylist()[0]

    monkeypatch.setattr(module, "open_scorer", SlowScorer)
    monkeypatch.setattr(module, "on_this_machine", lambda spec: spec)
    monkeypatch.setattr(module, "_score_on_ray", score)
    monkeypatch.setattr(module, "MIN_SHARD_TOKENS", SHARD_TOKENS)
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 3.0)


def one_build(uri, table, told=None, **given):
    cache = ReferenceCache.open(str(uri), ONE)
    return build(
        [table] if isinstance(table, pa.Table) else table,
        ReferenceSpec(path="model", adapter=None, identity=ONE),
        cache,
        Resources(1, 0, None),
        tokens_per_batch=100,
        tokens_per_part=SHARD_TOKENS,
        progress=given.pop("progress", lambda done, to_do: None),
        note=(told.append if told is not None else lambda line: None),
        **given,
    )


@pytest.mark.parametrize(("pairs_wanted", "builders"), [(20, 2), (200, 2), (200, 4)])
def test_of_builds_that_begin_together_each_scores_a_part_and_next_to_nothing_is_twice(tmp_path, pairs_wanted, builders):
    """Without claims two builds of 40 shards did 7 % twice on average, and of 8 shards 23 %."""
    table = pairs(pairs_wanted)
    with ThreadPoolExecutor(builders) as pool:
        found = [each.result(60) for each in [pool.submit(one_build, tmp_path, table) for _ in range(builders)]]
    cache = ReferenceCache.open(str(tmp_path), ONE)
    rows, largest = sum(part.rows for part in cache.parts()), max(part.rows for part in cache.parts())
    assert len(cache.keys()) == 2 * pairs_wanted
    for report in found:
        assert report.hits + report.scored + report.by_others == report.wanted == 2 * pairs_wanted
    # A shard for each build that began before another one, and one for claims of the same millisecond.
    assert sum(report.scored for report in found) == rows <= 2 * pairs_wanted + builders * largest
    assert Claims.names(cache) == []


def test_what_a_build_claimed_that_died_is_scored_after_a_while(tmp_path):
    """The build was alive after the other one started, and then died."""
    table, told = pairs(60), []
    dead = ReferenceCache.open(str(tmp_path), ONE)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(one_build, tmp_path, table, told)
        while not Claims.names(dead) and not other.done():
            time.sleep(0.002)
        shards = plan_shards(module.Wanted([table]), SHARD_TOKENS)
        claims = Claims(dead, frozenset())
        theirs = [key for shard in shards for key in claims.take(shard)[0].keys]
        assert theirs, "or this test proves nothing"
        report = other.result(60)
    assert report.scored == report.wanted == 120 and report.by_others == 0
    assert any("waiting for another build" in line for line in told)


def test_pairs_are_scored_while_others_are_not_known_yet(tmp_path):
    """Windows of a set come one by one; the last pairs of each are in the next one, too."""
    table = pairs(60)
    light = [table.append_column("set", pa.array(np.zeros(60, np.int16))).append_column("place", pa.array(np.arange(60)))]
    seen, told = [], []

    def windows():
        for start in (0, 20, 40):
            seen.append(len(ReferenceCache.open(str(tmp_path), ONE).keys()))
            yield light[0].slice(max(0, start - 5), min(20 + start, 60) - max(0, start - 5))

    given = {"tokens": TokenTables([[table]]), "progress": lambda *each: told.append(each)}
    report = one_build(tmp_path, windows(), **given)
    assert (report.wanted, report.scored, report.hits) == (120, 120, 0) and seen == [0, 40, 80]
    assert told[0] == (0, 40) and told[-1] == (120, 120) and [one for one in told if one[1] == 80]
    assert len(ReferenceCache.open(str(tmp_path), ONE).keys()) == 120
    again = one_build(tmp_path, windows(), **given)
    assert (again.wanted, again.scored, again.hits, again.parts) == (120, 0, 120, 0)
    with pytest.raises(ValueError, match="need tokens, where they are read; found None"):
        one_build(tmp_path, windows())


def test_another_transformers_is_told_and_the_same_one_is_not(tmp_path):
    table, told = pairs(4), []
    cache = ReferenceCache.open(str(tmp_path), ONE)
    keys = [one for side in ("chosen", "rejected") for one in table[f"{side}_key"].to_pylist()]
    values = [np.full(10, -1, np.float32)] * 8
    here = transformers.__version__
    cache.commit(keys[:4], values[:4], {"transformers": f"{here}.post1"})
    cache.commit(keys[4:], values[4:], {"transformers": here})
    assert one_build(tmp_path, table, told).hits == 8 and told == []
    cache.commit(keys[:1], values[:1], {"transformers": "4.30.2"})
    compact(cache)
    one_build(tmp_path, table, told)
    (line,) = told
    assert "transformers 4.30.2, here is" in line and here in line and "raydpo cache verify" in line


def test_a_shard_whose_call_is_repeated_after_it_was_committed_is_not_scored_again(tmp_path, monkeypatch):
    """The actor's process died after it had written the part and before Ray had its answer."""
    wanted = module.Wanted([pairs(10)])
    shard = next(plan_shards(wanted, SHARD_TOKENS))
    block = pa.table({"shard": [pickle.dumps(shard)]})
    arguments = ReferenceSpec(path="model", adapter=None, identity=ONE), str(tmp_path), "builder1", frozenset()
    first, again = (module._ScoreShard(wanted.source, *arguments, Resources(1, 0, None), 100, []) for _ in range(2))
    answer = first(block).to_pylist()[0]
    again.repeated = True
    monkeypatch.setattr(again.scorer, "score", lambda groups: [] if not groups else pytest.fail("scored again"))
    repeated = again(block).to_pylist()[0]
    assert answer["completions"] == len(shard) > 0
    assert {**repeated, "seconds": 0, "tokens": 0} == {**answer, "seconds": 0, "tokens": 0}
    assert len(ReferenceCache.open(str(tmp_path), ONE).parts()) == 1
