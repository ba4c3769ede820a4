"""Builders of one cache leave claimed work to each other, and claims of dead builders delay no other build."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from rows import ONE, rows

from raydpo.reference import build, compact
from raydpo.reference.claims import CLAIMS, Claims
from raydpo.reference.compact import find_garbage
from raydpo.reference.part import KEY_TYPE
from raydpo.reference.shards import Shard
from raydpo.reference.store import ReferenceCache

KEYS = rows(6)[0]
PROMPT = np.arange(3, dtype=np.int32)


def shard(*numbers, tokens=4):
    """Chosen completions of the pairs at these places."""
    count = len(numbers)
    keys = np.frombuffer(b"".join(KEYS[number] for number in numbers), np.uint8).reshape(-1, 16)
    needed, prompts = (np.full(count, length, np.int32) for length in (tokens, len(PROMPT)))
    return Shard(np.zeros(count, np.int16), np.array(numbers), np.zeros(count, np.uint8), needed, prompts, keys)


class Tokens:
    """Tokens of any pair."""

    def rows(self, sets, places):
        return [(PROMPT, np.zeros(9, np.int32), np.zeros(9, np.int32)) for _ in places]


def taken(found):
    return [KEYS.index(key.tobytes()) for key in found[0].keys]


@pytest.fixture
def builder(tmp_path):
    """Makes builders of one cache, each knowing what exists when it starts."""

    def begin():
        cache = ReferenceCache.open(str(tmp_path / "cache"), ONE)
        cache.refresh()
        return Claims(cache, frozenset([*Claims.names(cache), *(path.rsplit("/", 1)[-1] for path in cache.paths())]))

    return begin


def test_what_another_one_scores_is_left_to_it_until_it_takes_its_claim_back(builder):
    one, two = builder(), builder()
    mine = one.take(shard(0, 1, 2))
    assert taken(mine) == [0, 1, 2]
    theirs = two.take(shard(1, 2, 3))
    assert taken(theirs) == [3], "row by row: two users' data need not be cut alike"
    none, claim = two.take(shard(0, 1))
    assert len(none) == 0 and claim is None
    one.release(mine[1])
    assert taken(two.take(shard(0, 1))) == [0, 1]


def test_a_claim_on_fewer_tokens_is_not_enough(builder):
    one, two = builder(), builder()
    one.take(shard(0, 1, tokens=4))
    assert taken(two.take(shard(0, 1, tokens=4))) == []
    assert taken(two.take(shard(0, 1, tokens=5))) == [0, 1]


def test_what_a_killed_build_left_behind_holds_up_nobody_and_one_that_lives_counts_again(builder):
    before = builder()
    before.take(shard(0, 1))
    after = builder()
    mine = after.take(shard(0))
    assert taken(mine) == [0], "nothing tells that it lives"
    before.cache.commit([KEYS[5]], [np.full(3, -1, np.float32)], {})
    after.cache.refresh()
    assert taken(after.take(shard(1))) == [], "it has committed something since"
    third = builder()
    before.take(shard(3))
    assert taken(third.take(shard(1, 3))) == [], "or claimed something"


def test_ones_own_claims_do_not_count_and_all_are_taken_back_at_the_end(builder):
    one, other = builder(), builder()
    one.take(shard(0))
    assert taken(one.take(shard(0))) == [0], "an actor that died is tried again"
    mine = other.take(shard(1))
    one.clear()
    assert Claims.names(one.cache) == [mine[1]]


def test_of_claims_of_the_same_moment_the_least_name_keeps_it(builder):
    """Both builders have looked and seen nothing before either has written."""
    one, two = builder(), builder()
    meet, written = threading.Barrier(2), threading.Barrier(2)
    found = {}

    def claim(who):
        look, looks = who._of_others, []

        def of_others(before=None):
            looks.append(before)
            (meet if len(looks) == 1 else written).wait()
            seen = look(before)
            if len(looks) == 1:
                meet.wait()
            return seen

        who._of_others = of_others
        found[who] = who.take(shard(0, 1))

    threads = [threading.Thread(target=claim, args=(who,)) for who in (one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(len(taken(found[who])) for who in (one, two)) == [0, 2]
    winner = max(found.values(), key=lambda entry: len(entry[0]))
    assert Claims.names(one.cache) == [winner[1]], "the other one took its claim back"


def test_a_claim_that_is_torn_or_foreign_counts_for_what_can_be_read_of_it(builder):
    one, two = builder(), builder()
    name = one.take(shard(0, 1))[1]
    path = f"{one.cache.directory}/{CLAIMS}"
    one.cache.storage.write(f"{path}/{name}", one.cache.storage.read(f"{path}/{name}")[:27])
    one.cache.storage.write(f"{path}/notes.txt", b"mine")
    assert taken(two.take(shard(0, 1))) == [1]


def test_gc_finds_claims_of_builds_long_gone(builder, monkeypatch):
    one = builder()
    name = one.take(shard(0))[1]
    assert find_garbage(one.cache) == []
    monkeypatch.setattr(compact, "ABANDONED_SECONDS", -60.0)
    assert [entry.path.rsplit("/", 1)[-1] for entry in find_garbage(one.cache)] == [name]


class Scoring:
    """Stands for a ``Scorer`` on a GPU. The first batch takes until the next shard is claimed."""

    notes, provenance, sample = (), {"raydpo": "0"}, np.zeros(1, np.float32)

    def __init__(self):
        self.begun, self.claimed, self.in_time = threading.Event(), threading.Event(), []

    def score(self, groups):
        if not self.begun.is_set():
            self.begun.set()
            self.in_time.append(self.claimed.wait(10))
        return [tuple(np.full(len(tokens), -1, np.float32) for tokens in group.completions) for group in groups]

    def close(self):
        pass


def test_the_next_shard_is_claimed_while_one_is_computed(builder):
    """On a store that takes a second to answer, the GPU does not wait for it."""
    claims, scoring = builder(), Scoring()
    actor = object.__new__(build._ScoreShard)
    vars(actor).update(
        cache=claims.cache, claims=claims, known=claims.known, repeated=False, threads=None, scorer=scoring, values=[]
    )
    actor.tokens = Tokens()
    actor.planning, actor.computing = threading.Lock(), threading.Lock()
    blocks = [pa.table({"shard": [pickle.dumps(shard(*numbers))]}) for numbers in ((0, 1), (2, 3))]
    with ThreadPoolExecutor(2) as calls:
        first = calls.submit(actor, blocks[0])
        assert scoring.begun.wait(10)
        take = claims.take
        claims.take = lambda wanted: (take(wanted), scoring.claimed.set())[0]
        second = calls.submit(actor, blocks[1])
        assert [one.result()["completions"].to_pylist() for one in (first, second)] == [[2], [2]]
    assert scoring.in_time == [True]
    assert claims.cache.covers(pa.array(KEYS[:5], KEY_TYPE), np.full(5, 4, np.int32)).tolist() == [True] * 4 + [False]
    assert Claims.names(claims.cache) == []
