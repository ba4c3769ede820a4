"""What verification accepts and refuses, above all for sums, where rounding cancels and faults add up."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from kernel import tokenised
from tiny import preferences

from raydpo.reference.compact import find_garbage
from raydpo.reference.identity import identify
from raydpo.reference.part import KEY_TYPE
from raydpo.reference.score import ReferenceSpec, Scorer
from raydpo.reference.shards import Wanted, grouped, prompt_groups
from raydpo.reference.store import UNVERIFIED, ReferenceCache
from raydpo.reference.verify import promote, sum_tolerance, verify_scores


def scorer_of(model, dtype="float32", layout="auto", tokens_per_batch=4096):
    spec = ReferenceSpec(path=str(model), adapter=None, identity=identify(model, dtype), layout=layout)
    return Scorer(spec, device="cpu", tokens_per_batch=tokens_per_batch)


def scored(scorer, wanted):
    """Log-probs of each completion, by key."""
    return {
        one.key: logps
        for groups in [grouped(wanted)]
        for group, each in zip(groups, scorer.score(prompt_groups(groups)), strict=True)
        for one, logps in zip(group, each, strict=True)
    }


@pytest.fixture(scope="module")
def short():
    return list(Wanted([tokenised(preferences(10))]))


@pytest.fixture(scope="module")
def scorer(tiny_llama):
    return scorer_of(tiny_llama)


@pytest.fixture
def cache(tmp_path, scorer, tiny_llama):
    return ReferenceCache.open(str(tmp_path / "cache"), identify(tiny_llama, "float32"), unverified=True)


def bring(cache, completions, sums, tokens=None):
    """Import the sums of completions as another trainer's."""
    tokens = np.array([len(one.tokens) for one in completions] if tokens is None else tokens, np.int32)
    return cache.commit_rows(
        pa.array([one.key for one in completions], KEY_TYPE), tokens, np.array(sums, np.float64), {}, verified=False
    )


def verify(cache, wanted, scorer, sample=None, **settings):
    return verify_scores(cache, wanted, lambda key: "?", scorer, sample=sample, **settings)


def sums_of(live, completions):
    return [float(live[one.key].astype(np.float64).sum()) for one in completions]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("low, high", [(3, 40), (150, 250)], ids=["short", "long"])
def test_sums_of_another_layout_pass_and_those_of_other_tokens_do_not(tiny_llama, tmp_path, dtype, low, high):
    wanted = list(Wanted([tokenised(preferences(10, low=low, high=high))]))
    scorer = scorer_of(tiny_llama, dtype)
    padded = scored(scorer_of(tiny_llama, dtype, "padded", 1000), wanted)

    def report(name, sums):
        cache = ReferenceCache.open(str(tmp_path / name), identify(tiny_llama, dtype), unverified=True)
        bring(cache, wanted, sums)
        return verify(cache, wanted, scorer)

    right = sums_of(padded, wanted)
    found = report("right", right)
    assert found.passed and found.sums_only == len(wanted) and abs(found.shift) < 0.01, found
    for name, kept in (("no last", slice(-1)), ("no first", slice(1, None))):
        wrong = report(name, [float(padded[one.key][kept].sum()) for one in wanted])
        assert not wrong.passed and "sum" in wrong.problem and wrong.shift > 5, name
    one_off = list(right)
    one_off[3] -= 25
    assert "differs by 25 nats" in report("one off", one_off).problem


def test_a_shift_of_all_sums_is_found_below_the_tolerance_of_one(tiny_llama, tmp_path):
    """In bfloat16 with 230 tokens one sum may be 6 nats off. All sums off by 3 to the same side are no rounding."""
    wanted = list(Wanted([tokenised(preferences(10, low=150, high=250))]))
    scorer = scorer_of(tiny_llama, "bfloat16")
    cache = ReferenceCache.open(str(tmp_path), identify(tiny_llama, "bfloat16"), unverified=True)
    bring(cache, wanted, np.array(sums_of(scored(scorer, wanted), wanted)) - 3)
    found = verify(cache, wanted, scorer)
    assert found.worst["mean"] < found.worst["tolerance"] and found.shift == pytest.approx(-3, abs=0.01)
    assert not found.passed and "3 nats too low" in found.problem


def test_only_rows_of_the_very_length_that_was_checked_are_promoted(cache, scorer, short):
    live = scored(scorer, short)
    right, other = short[:2], short[2:4]
    bring(cache, right, sums_of(live, right))
    bring(cache, other, [-99.0, -99.0], tokens=[2, 2])  # of shorter completions than this configuration has
    found = verify(cache, short[:4], scorer)
    assert found.passed and found.checked == 2
    assert promote(cache, short[:4], found) == 2
    cut = [dataclasses.replace(one, tokens=one.tokens[:2]) for one in other]
    strict = ReferenceCache(cache.storage, cache.identity)
    keys = pa.array([one.key for one in [*right, *cut]], KEY_TYPE)
    assert strict.covers(keys, np.array([len(one.tokens) for one in [*right, *cut]], np.int32)).tolist() == [
        True,
        True,
        False,
        False,
    ]
    assert not verify(cache, cut, scorer).passed


def test_each_import_is_looked_at_however_much_there_is_beside_it(cache, scorer, short):
    """A sample of two from eighteen good rows would rarely contain one of the two wrong ones."""
    live = scored(scorer, short)
    good, wrong = short[:-2], short[-2:]
    cache.commit([one.key for one in good[:9]], [live[one.key] for one in good[:9]], {})
    bring(cache, good[9:], sums_of(live, good[9:]))
    bring(cache, wrong, [-1000.0, -2000.0])
    for seed in range(8):
        found = verify(cache, short, scorer, sample=2, seed=seed)
        assert not found.passed and sorted(found.imported.values()) == [2, 2] and found.checked == 6
    none = verify(cache, good, scorer, sample=2)
    assert none.passed and promote(cache, short, none) == len(good) - 9, "what no row of was checked stays unverified"
    assert len(cache.storage.list(f"{cache.directory}/{UNVERIFIED}")) == 1


def test_the_last_import_answers_and_can_be_promoted(cache, scorer, short):
    live = scored(scorer, short)
    reader = ReferenceCache(cache.storage, cache.identity, unverified=True)
    first = bring(cache, short, [-500.0 - number for number in range(len(short))])
    assert not verify(reader, short, scorer).passed
    bring(cache, short[:3], sums_of(live, short[:3]))
    assert [one.path for one in find_garbage(reader)] == [], "of the first import the other rows still answer"
    bring(cache, short, sums_of(live, short))
    assert verify(cache, short, scorer).passed and verify(reader, short, scorer).passed
    assert {one.path.rsplit("/", 1)[-1] for one in find_garbage(reader)} > {first}
    assert promote(reader, short, verify(reader, short, scorer)) == len(short)
    strict = ReferenceCache(cache.storage, cache.identity)
    ((places, part, rows),) = strict.answers(
        np.frombuffer(b"".join(one.key for one in short), np.uint8).reshape(-1, 16),
        np.array([len(one.tokens) for one in short], np.int32),
    )
    assert part.sums[rows].tolist() == [sums_of(live, short)[place] for place in places]
    assert cache.storage.list(f"{cache.directory}/{UNVERIFIED}") == []


def test_verifying_again_promotes_nothing_again(cache, scorer, short):
    live = scored(scorer, short)
    bring(cache, short, sums_of(live, short))
    some = short[:5]
    assert [promote(cache, some, verify(cache, some, scorer)) for _ in range(3)] == [5, 0, 0]
    assert len(cache.parts()) == 1 and len(cache.parts(UNVERIFIED)) == 1
    assert promote(cache, short, verify(cache, short, scorer)) == len(short) - 5
    assert len(cache.parts()) == 2 and cache.parts(UNVERIFIED) == []


def test_what_a_later_import_contradicts_stays_until_verified_rows_answer(cache, scorer, short):
    """The later one may be the wrong one."""
    live = scored(scorer, short)
    bring(cache, short[:3], sums_of(live, short[:3]))
    bring(cache, short[:3], [-1000.0] * 3)
    bring(cache, short[3:], sums_of(live, short[3:]))
    assert promote(cache, short[3:], verify(cache, short[3:], scorer)) == len(short) - 3
    assert len(cache.parts(UNVERIFIED)) == 2


def test_a_live_value_that_is_no_number_does_not_pass(cache, scorer, short):
    live = scored(scorer, short)
    bring(cache, short[:5], sums_of(live, short[:5]))

    class Broken:
        def score(self, groups):
            found = scorer.score(groups)
            broken.append(found[min(1, len(found) - 1)][0].copy())
            broken[-1][0] = np.nan
            found[min(1, len(found) - 1)] = (broken[-1], *found[min(1, len(found) - 1)][1:])
            return found

    broken = []
    found = verify(cache, short[:5], Broken())
    assert len(broken) == 1 and not found.passed and np.isnan(found.worst["mean"]) and "log-prob of nan" in found.problem


def test_the_tolerance_of_a_sum_grows_with_the_root_of_its_tokens():
    assert sum_tolerance(0.1, 100) == pytest.approx(4.0) and sum_tolerance(0.001, 400) == pytest.approx(0.08)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_few_sums_that_are_off_to_the_same_side_by_rounding_pass(count, cache, scorer, short):
    """The mean difference of one sum is its own difference, and its spread is zero."""
    few = short[:count]
    allowed = sum_tolerance(1e-3, np.array([len(one.tokens) for one in few]))
    bring(cache, few, np.array(sums_of(scored(scorer, few), few)) + 0.3 * allowed * np.linspace(1, 1.1, count))
    found = verify(cache, few, scorer)
    assert found.passed and found.shift > 0.003, found.problem
