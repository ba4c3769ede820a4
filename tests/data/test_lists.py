"""Ranked lists as rows: how they are read, dropped as a whole, compared, and planned."""

import json
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from tiny import make_tokenizer

from raydpo.config import DataConfig
from raydpo.data.filter import filtered_by_tokens
from raydpo.data.lists import aligned, all_or_none, all_pairs, begins, compared, most_agreed, rows_of, starts_of
from raydpo.data.messages import Malformed
from raydpo.data.pairs import load_pairs
from raydpo.data.plan import BatchPlan
from raydpo.data.preference import normalise
from raydpo.data.select import COUNT_COLUMNS
from raydpo.data.shapes import Shapes
from raydpo.data.tokenise import TokenisedPair, Tokeniser
from raydpo.errors import DataError
from raydpo.pipeline.prepare import _digest, measured_pairs
from raydpo.reference.shards import Wanted

WORDS = ["sky", "blue", "green", "cat", "dog", "runs", "red", "sun"]
CHAT = [{"role": "user", "content": "q"}]


@pytest.fixture(scope="module")
def tokeniser():
    return Tokeniser(make_tokenizer())


@pytest.fixture
def load(tmp_path, tokeniser):
    def load(records, **data):
        path = tmp_path / "ranked.jsonl"
        path.write_text("\n".join(map(json.dumps, records)))
        return load_pairs(DataConfig(train=str(path), **{"ranked": "lists"} | data), tokeniser)

    return load


def record(prompt, *ranks, words=WORDS, repeat=1):
    return {"prompt": prompt, "completions": [f" {word}" * repeat for word in words[: len(ranks)]], "ranks": list(ranks)}


def rows(table):
    return list(zip(*(table[name].to_pylist() for name in ("pair_id", "chosen_rank", "rejected_rank")), strict=True))


def test_completions_become_neighbouring_rows_best_first():
    given = {"prompt": "p", "completions": ["d", "a", "b", "c", "e"], "ranks": [3, 1, 2, 2, 9]}
    read = [(each.chosen, each.rejected, each.ranks, each.alone) for each in normalise(given, lists=True)]
    assert read == [("a", "b", (0, 1), None), ("c", "d", (1, 3), None), ("e", "", (4, None), "chosen")]
    by_score = {"prompt": CHAT, "completions": ["bad", "good", "so"], "scores": [0.1, 0.9, 0.5]}
    read = normalise(by_score, lists=True)
    assert [each.chosen[0]["content"] for each in read] == ["good", "bad"] and read[1].rejected == []
    (pair,) = normalise({"prompt": "p", "chosen": "c", "rejected": "r"}, lists=True)
    assert pair.ranks == (0, 1) and pair.alone is None


def test_an_answer_that_a_list_has_twice_counts_once():
    read = normalise({"prompt": "p", "completions": ["a", "b", "a"], "ranks": [1, 2, 3]}, lists=True)
    assert [(each.chosen, each.rejected) for each in read] == [("a", "b")]
    assert read[0].notes == ("an answer that a list has twice counts once, at its best place",)
    for completions, ranks in ((["a", "b", "c"], [1, 1, 1]), (["a", "a"], [1, 2])):
        with pytest.raises(Malformed, match="no completion is better than another"):
            normalise({"prompt": "p", "completions": completions, "ranks": ranks}, lists=True)


def test_all_pairs_of_lists_are_those_that_are_read_as_pairs(load):
    records = [record("one", 1, 2, 3), record("two", 4, 3, 2, 1), record("three", 1, 2, 2), record("four", 1, 2)]
    pairs, lists = load(records, ranked="pairs").train, load(records).train
    assert "list" not in pairs.column_names
    assert rows(lists)[:4] == [("ranked:1", 0, 1), ("ranked:1#1", 2, -1), ("ranked:2", 0, 1), ("ranked:2#1", 2, 3)]
    both = [name for name in pairs.column_names if name not in ("set", "place", "highest")]
    found = all_pairs(lists)
    for name in both:
        assert found[name].to_pylist() == pairs[name].to_pylist(), name
    assert all_pairs(pairs) is pairs
    empty = lists.filter(pc.equal(lists["rejected_rank"], -1))
    assert empty["rejected_ids"].to_pylist() == [[]] * 2 and empty["rejected_key"].to_pylist() == [bytes(16)] * 2


def test_each_completion_is_scored_once_whether_it_is_in_lists_or_in_pairs(load):
    records = [record("one", 1, 2, 3), record("two", 4, 3, 2, 1), record("three", 1, 2, 2)]
    of_lists, of_pairs = (Wanted([load(records, ranked=ranked).train]) for ranked in ("lists", "pairs"))
    assert len(of_lists) == len(of_pairs) == 3 + 4 + 3
    assert sorted(map(bytes, of_lists.keys)) == sorted(map(bytes, of_pairs.keys))


def test_digests_know_lists_and_ranks(load):
    """A training depends on them. Held-out pairs are the same, wherever they are compared."""
    ranked = load([record("one", 1, 2, 3), record("two", 1, 2, 3, 4)]).train
    tied = load([record("one", 1, 2, 2), record("two", 1, 2, 3, 4)]).train
    pairs = load([record("one", 1, 2, 3), record("two", 1, 2, 3, 4)], ranked="pairs").train
    joined = ranked.set_column(ranked.column_names.index("list"), "list", pa.array([1] * len(ranked)))
    assert len({_digest(table) for table in (ranked, tied, joined, pairs)}) == 4
    assert measured_pairs(ranked) == measured_pairs(pairs) != measured_pairs(tied)


def test_masks_of_lists_are_those_of_pairs(load):
    """Each completion of a list counts as it does in a pair; a list is dropped whole if nothing of one of them counts."""

    def thought(number):
        return [{"role": "assistant", "content": f"<think>{' '.join(WORDS[:number])}</think>\n\n{WORDS[number]}"}]

    records = [
        {"prompt": CHAT, "completions": [thought(number + place) for place in range(size)], "ranks": list(range(size))}
        for number, size in enumerate((3, 2, 4), 1)
    ]
    bare = {"prompt": CHAT, "completions": [thought(2), thought(3), [{"role": "assistant", "content": "dog"}]]}
    records.append(bare | {"ranks": [1, 2, 3]})
    for train_on, dropped in (("reasoning", 1), ([{"answer": 1.0}, {"reasoning": 0.1}], 0)):
        options = dict(train_on=train_on, max_dropped=1)
        lists, pairs = load(records, **options), load(records, ranked="pairs", **options)
        assert lists.report.sources[0].dropped.total == dropped
        alike = pairs.train.filter(pc.not_equal(pc.utf8_slice_codeunits(pairs.train["pair_id"], 7, 8), "4"))
        found = all_pairs(lists.train).slice(0, alike.num_rows)
        for name in (*COUNT_COLUMNS, "chosen_key", "rejected_ids"):
            assert found[name].to_pylist() == alike[name].to_pylist(), name
        assert lists.train.num_rows == (5 if dropped else 7)


def test_a_list_is_dropped_whole(load):
    long = record("long", 1, 2, 3, words=[" ".join(WORDS * 4), "cat", "dog"])
    sets = load([record("one", 1, 2, 3), long], max_length=20, truncation="drop", max_dropped=1)
    assert [name for name, *_ in rows(sets.train)] == ["ranked:1", "ranked:1#1"]
    (report,) = sets.report.sources
    assert (report.pairs, report.kept, dict(report.dropped.counts)) == (2, 1, {"longer than max_length": 1})
    assert "2 records, 1 lists kept" in report.lines()[0] and "1 lists dropped" in report.lines()[1]
    with pytest.raises(DataError, match="1 of 2 lists would be dropped"):
        load([record("one", 1, 2, 3), long], max_length=20, truncation="drop")


def test_completions_of_different_rows_may_become_the_same_by_truncation(load):
    """The second and the third are equal as far as they are used."""
    start = " ".join(WORDS)
    alike = record("long", 1, 2, 3, words=["cat", f"{start} sky", f"{start} dog"])
    sets = load([record("one", 1, 2, 3), alike], max_length=8, max_dropped=1)
    assert sets.report.sources[0].dropped.counts == {"identical after truncation": 1}
    assert len(sets.train) == 2 and load([record("one", 1, 2), alike], max_length=30).train.num_rows == 3


def test_malformed_completions_take_their_list_with_them(load):
    wrong = record("wrong", 1, 2, 3) | {"completions": ["a", "b", " "]}
    sets = load([record("one", 1, 2, 3), wrong], max_malformed=1)
    assert [name for name, *_ in rows(sets.train)] == ["ranked:1", "ranked:1#1"]
    (report,) = sets.report.sources
    assert (report.pairs, report.malformed_records) == (1, 1)


def test_shares_of_the_data_hold_whole_lists(load):
    records = [record(f"prompt {number}", *range(2 + number % 4)) for number in range(40)]
    sizes = {f"ranked:{number + 1}": (2 + number % 4 + 1) // 2 for number in range(40)}
    sets = load(records, fraction=0.5, eval={"fraction": 0.3})
    seen = 0
    for table in (sets.train, sets.eval):
        starts = starts_of(begins(table["list"]))
        for start, stop in pairwise(starts.tolist()):
            assert stop - start == sizes[table["pair_id"][start].as_py()]
        seen += len(starts) - 1
    kept, before = sets.report.thinned
    assert kept == len(starts_of(begins(sets.train["list"]))) - 1 < before < 40 and seen < 40
    twice = load(records[:3] + records[:1])
    assert twice.report.sources[0].duplicates == 1


def test_a_filter_takes_whole_lists(load):
    records = [record("one", 1, 2, 3), record("two", 1, 2, 3, words=["sky", "blue " * 9, "cat"]), record("three", 1, 2)]
    config = DataConfig(train="-", ranked="lists", filter="rejected_tokens < 6")
    sets, line = filtered_by_tokens(load(records), config)
    assert [name for name, *_ in rows(sets.train)] == ["ranked:1", "ranked:1#1", "ranked:3"]
    assert "1 of 3 lists left out (ranked: 1 of 3)" in line
    with pytest.raises(DataError, match="leaves none"):
        filtered_by_tokens(load(records), config.model_copy(update={"filter": "rejected_tokens > 99"}))


def ids(*tokens):
    return np.array(tokens, np.int32)


def test_all_completions_of_a_list_follow_the_same_prompt():
    """Tokens of the third merged with the end of the prompt, so the first two begin one token earlier, too."""
    given = [TokenisedPair(ids(1, 2, 3), ids(4), ids(5, 6)), TokenisedPair(ids(1, 2), ids(7, 8), ids())]
    moved = aligned(given)
    assert [[part.tolist() for part in row] for row in moved] == [[[1, 2], [3, 4], [3, 5, 6]], [[1, 2], [7, 8], []]]
    assert most_agreed(moved) == 1
    assert aligned(given[:1])[0] is given[0]
    same = aligned([*given, TokenisedPair(ids(1, 2), ids(3, 4), ids(9))])
    assert str(same) == "two completions of a list have the same tokens"
    assert str(aligned([given[0], TokenisedPair(ids(5), ids(4), ids(3))])) == "prompt has no tokens"


def test_rows_and_masks_of_lists_by_hand():
    begin = begins(np.array([7, 7, 3, 4, 4, 4]))
    starts = starts_of(begin)
    assert starts.tolist() == [0, 2, 3, 6]
    assert rows_of(starts, [2, 0, 2]).tolist() == [3, 4, 5, 0, 1, 3, 4, 5] and rows_of(starts, []).tolist() == []
    kept = all_or_none(np.array([True, False, True, True, True, True]), begin)
    assert kept.tolist() == [False, False, True, True, True, True]
    better, worse = compared(np.array([7, 7, 9]), np.array([0, 1, 0]), np.array([1, -1, 1]))
    assert list(zip(better.tolist(), worse.tolist(), strict=True)) == [(0, 1), (0, 2), (4, 5)]
    assert [len(each) for each in compared(*[np.empty(0, np.int64)] * 3)] == [0, 0]


SIZES = np.array([1, 3, 2, 1, 4, 2, 2, 1, 3, 1, 2])


def plan(world_size, tokens_per_batch=60, **settings):
    """Lists of two sources, the second with weight 2."""
    starts = np.append(0, np.cumsum(SIZES))
    sources = np.repeat([0] * 6 + [1] * 5, SIZES)

    def shapes(lists):
        return Shapes.of([ids(number) for number in lists], [[5] * (2 * int(SIZES[number])) for number in lists])

    return BatchPlan(
        shapes,
        sources,
        np.array([1.0, 2.0]),
        starts=starts,
        world_size=world_size,
        tokens_per_batch=tokens_per_batch,
        **{"seed": 0, "pairs_per_step": 4, "shuffle": True, "epochs": 2, "steps": None} | settings,
    )


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("tokens_per_batch", [10, 60, 1000])
def test_a_list_is_never_cut(world_size, tokens_per_batch):
    one, many = plan(1), plan(world_size, tokens_per_batch)
    starts = set(one.starts[:-1].tolist())
    assert (many.pairs_per_epoch, many.steps_per_epoch) == (16, 4)
    drawn = []
    for step in range(many.total_steps):
        wanted = one.pairs(step)
        drawn += [row for row in wanted.tolist() if row in starts]
        ranks = [many.micro_batches(step, rank) for rank in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1
        counted = [batch.pairs for batches in ranks for batch in batches if batch.counts]
        assert sorted(row for pairs in counted for row in pairs) == sorted(wanted.tolist())
        assert many.count(step) == 4 == sum(row in starts for row in wanted)
        for pairs in counted:
            lists = np.split(np.array(pairs), np.flatnonzero([row in starts for row in pairs])[1:])
            for each in lists:
                number = int(np.searchsorted(one.starts, each[0]))
                assert each.tolist() == list(range(one.starts[number], one.starts[number + 1]))
    uses = np.unique(drawn, return_counts=True)[1]
    assert uses.tolist() == [2] * 6 + [4] * 5, "in two epochs"
