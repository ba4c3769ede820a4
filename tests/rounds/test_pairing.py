"""Which answers become pairs: better ones with worse ones, never ties, never held-out prompts, in any order of rows."""

from __future__ import annotations

import io
import re
from itertools import product

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from round_tables import STOP, answered, prompts, settings, text_of

from raydpo.data.keys import completion_key
from raydpo.data.pairs import PAIR_SCHEMA
from raydpo.errors import DataError
from raydpo.rounds.pairing import ROUND_PAIR_SCHEMA, final_rewards, make_pairs, no_pairs, with_replay
from raydpo.rundir.rounds import SCORE_SCHEMA
from raydpo.terminal.console import Console

ALL = {"choose": "all", "per_prompt": 9}


def made(answers, rounds=None, count=None, number=1):
    """(row, good, bad) of each pair."""
    rounds, table = rounds or settings(), prompts(count or max(answers) + 1)
    samples, scored = answered(table, answers, number)
    found = make_pairs(table, samples, final_rewards(samples, scored, rounds), rounds, number)
    rows = {key: row for row, key in enumerate(table["prompt_id"].to_pylist())}
    return [(rows[one["prompt_id"]], one["good"], one["bad"]) for one in found.to_pylist()]


def rewarded(*rewards):
    """Answers with these rewards and tokens of their own."""
    return [(reward, [10 + number, STOP]) for number, reward in enumerate(rewards)]


# ---- best_worst


@pytest.mark.parametrize(
    ("rewards", "pair"),
    [
        ((0.2, 0.9, 0.1, 0.5), (1, 2)),
        ((0, 1, 1, 0), (1, 0)),  # of equal ones the first
        ((1, 1, 0, 0), (0, 2)),
        ((0.5, 0.5, 0.5), None),
        ((None, 0.5), None),
        ((None, 0.5, 0.7, None), (2, 1)),
        ((-1, -3), (0, 1)),
    ],
)
def test_the_best_is_paired_with_the_worst(rewards, pair):
    assert made({0: rewarded(*rewards)}) == ([] if pair is None else [(0, *pair)])


def test_a_pair_needs_more_than_the_margin():
    answers = {0: rewarded(0.0, 0.5), 1: rewarded(0.0, 0.75)}
    assert made(answers, settings(pairs={"margin": 0.5})) == [(1, 1, 0)]
    assert made(answers, settings(pairs={"margin": 0.75})) == []


def test_the_same_tokens_never_make_a_pair():
    """A judge may give them different rewards. Then the next largest difference counts."""
    answers = {0: [(1.0, [5, STOP]), (0.0, [5, STOP]), (0.3, [6, STOP])]}
    assert made(answers) == [(0, 0, 2)]
    assert made(answers, settings(pairs=ALL)) == [(0, 0, 2)]
    assert made({0: answers[0][:2]}) == []


def test_the_same_text_makes_a_pair_only_if_one_is_cut():
    assert made({0: [(1.0, [8, STOP]), (0.0, [9, STOP])]}) == []
    assert made({0: [(1.0, [8, STOP]), (1.0, [8], "length")]}) == [(0, 0, 1)]


# ---- all


@pytest.mark.parametrize(
    ("rewards", "pairs"),
    [
        ((1, 0, 1, 0, 0), [(0, 1), (2, 3)]),
        ((0, 0, 1), [(2, 0)]),
        ((0.1, 0.9, 0.5, 0.3), [(1, 0), (2, 3)]),
        ((0.1, 0.9, 0.5), [(1, 0)]),
        ((2, 2, 2), []),
        ((1, None, 0), [(0, 2)]),
    ],
)
def test_all_makes_disjoint_pairs_from_the_outside(rewards, pairs):
    assert made({0: rewarded(*rewards)}, settings(pairs=ALL)) == [(0, *pair) for pair in pairs]


def test_at_most_per_prompt_pairs_of_a_prompt():
    answers = {0: rewarded(1, 1, 1, 0, 0, 0), 1: rewarded(1, 0)}
    assert made(answers, settings(pairs=ALL | {"per_prompt": 2})) == [(0, 0, 3), (0, 1, 4), (1, 0, 1)]


# ---- cut answers


def test_what_a_cut_answer_is_worth():
    answers = {0: [(1.0, [5, 6, 7], "length"), (0.6, [5, STOP]), (0.2, [6, STOP])]}
    assert made(answers, settings(cut="keep")) == [(0, 0, 2)]
    assert made(answers, settings(cut="zero")) == [(0, 1, 0)]
    assert made(answers, settings(cut="drop")) == [(0, 1, 2)]


def test_a_cut_answer_is_trained_on_as_sampled():
    table, rounds = prompts(1), settings(cut="zero")
    samples, scored = answered(table, {0: [(1.0, [5, STOP]), (0.9, [5, 6, 7], "length")]})
    (pair,) = make_pairs(table, samples, final_rewards(samples, scored, rounds), rounds, 3).to_pylist()
    assert (pair["chosen_ids"], pair["rejected_ids"]) == ([5, STOP], [5, 6, 7])
    assert (pair["chosen_full"], pair["rejected_full"]) == (2, 3)
    assert pair["prompt_ids"] == [1000]
    assert pair["chosen_key"] == completion_key([1000], [5, STOP])
    assert pair["rejected_key"] == completion_key([1000], [5, 6, 7])
    assert (pair["reward_good"], pair["reward_bad"]) == (1.0, 0.0)
    assert (pair["pair_id"], pair["source"], pair["weight"]) == ("r003:1:0-1", "prompts", 1.0)


def test_final_rewards():
    table = prompts(1)
    samples, scored = answered(table, {0: [(0.7, [5, STOP]), (0.9, [5, 6], "length"), (None, [6, 7], "length")]})
    rewards = {cut: final_rewards(samples, scored, settings(cut=cut)) for cut in ("zero", "drop", "keep")}
    assert rewards["zero"]["reward"].to_pylist() == [0.7, 0.0, None]
    negative = {0: [(-3.0, [5, STOP]), (-2.0, [5, 6], "length"), (None, [6, 7], "length")]}
    below = final_rewards(*answered(table, negative), settings(cut="zero"))
    assert below["reward"].to_pylist() == [-3.0, -2.0, None], "0 would make a cut answer the best by far"
    assert rewards["drop"]["reward"].to_pylist() == rewards["keep"]["reward"].to_pylist() == [0.7, 0.9, None]
    assert all(each.schema == SCORE_SCHEMA for each in rewards.values())
    assert rewards["zero"]["parts"].to_pylist()[1] == [("reward", 0.9)]
    with pytest.raises(ValueError, match="not a finite number"):
        final_rewards(*answered(table, {0: [(float("nan"), [5])]}), settings())
    with pytest.raises(ValueError, match="2 rewards of 3 answers"):
        final_rewards(samples, scored.slice(0, 2), settings())


# ---- any input

answer = st.tuples(
    st.sampled_from([None, 0.0, 0.25, 0.5, 1.0]), st.lists(st.integers(7, 9), min_size=1, max_size=2), st.booleans()
)
world = st.dictionaries(st.integers(0, 5), st.lists(answer, min_size=1, max_size=6), min_size=1, max_size=4)
configurations = st.builds(
    lambda choose, per_prompt, margin, cut: settings(
        pairs={"choose": choose, "margin": margin, "per_prompt": per_prompt if choose == "all" else 1}, cut=cut
    ),
    st.sampled_from(["best_worst", "all"]),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.25, 0.3]),
    st.sampled_from(["zero", "drop", "keep"]),
)


@hypothesis_settings(max_examples=150, deadline=None)
@given(world, configurations, st.randoms(use_true_random=False))
def test_what_holds_for_every_pair(answers, rounds, random):
    table = prompts(6)
    described = {row: [(r, ids, "length" if cut else "stop") for r, ids, cut in each] for row, each in answers.items()}
    samples, scored = answered(table, described)
    scores = final_rewards(samples, scored, rounds)
    pairs = make_pairs(table, samples, scores, rounds, 1)
    assert pairs.schema == ROUND_PAIR_SCHEMA
    row_of = {key: row for row, key in enumerate(table["prompt_id"].to_pylist())}
    used: dict[bytes, list[int]] = {}
    for pair in pairs.to_pylist():
        each = described[row_of[pair["prompt_id"]]]
        sides = []
        for side, number in (("good", pair["good"]), ("bad", pair["bad"])):
            reward, ids, end = each[number]
            assert not (end == "length" and rounds.cut == "drop")
            reward = min(reward, 0.0) if end == "length" and rounds.cut == "zero" else reward
            assert pair[f"reward_{side}"] == reward
            assert pair["chosen_ids" if side == "good" else "rejected_ids"] == ids
            sides.append((reward, ids))
        assert sides[0][0] - sides[1][0] > rounds.pairs.margin
        cut = [each[number][2] for number in (pair["good"], pair["bad"])]
        assert sides[0][1] != sides[1][1]
        assert text_of(sides[0][1]) != text_of(sides[1][1]) or cut[0] != cut[1]
        used.setdefault(pair["prompt_id"], []).extend([pair["good"], pair["bad"]])
    assert all(len(set(each)) == len(each) <= 2 * rounds.pairs.per_prompt for each in used.values())
    assert len(set(pairs["pair_id"].to_pylist())) == len(pairs)
    for row, each in described.items():  # a prompt without a pair has none to give
        able = [
            (min(reward, 0.0) if end == "length" and rounds.cut == "zero" else reward, ids, text_of(ids), end)
            for reward, ids, end in each
            if reward is not None and not (end == "length" and rounds.cut == "drop")
        ]
        fits = any(
            good[0] - bad[0] > rounds.pairs.margin and good[1] != bad[1] and good[2:] != bad[2:]
            for good, bad in product(able, able)
        )
        assert fits == (table["prompt_id"][row].as_py() in used)
    tables = [each.take(pa.array(random.sample(range(len(each)), len(each)))) for each in (table, samples, scores)]
    again = make_pairs(*tables, rounds, 1)  # as other workers and blocks would give them
    assert again.equals(pairs)


def test_pairs_do_not_depend_on_blocks_of_samples():
    rng, table, rounds = np.random.default_rng(3), prompts(40), settings(pairs=ALL)
    answers = {
        row: [(float(rng.integers(0, 3)), rng.integers(3, 9, rng.integers(1, 6)).tolist()) for _ in range(8)]
        for row in range(40)
    }
    samples, scored = answered(table, answers)
    scores = final_rewards(samples, scored, rounds)
    whole = make_pairs(table, samples, scores, rounds, 1)
    assert len(whole) > 60
    for size in (1, 7, 64):
        starts = rng.permutation(range(0, len(samples), size)).tolist()
        blocks = [pa.concat_tables([each.slice(start, size) for start in starts]) for each in (samples, scores)]
        assert make_pairs(table, *blocks, rounds, 1).equals(whole)
    assert whole["pair_id"].to_pylist()[0].startswith("r001:1:")


def test_ids_name_the_source_where_there_are_several():
    table = pa.concat_tables([prompts(2), prompts(4, source="other").slice(2)])
    samples, scored = answered(table, {0: rewarded(1, 0), 3: rewarded(0, 1)})
    found = make_pairs(table, samples, final_rewards(samples, scored, settings()), settings(), 12)
    assert sorted(found["pair_id"].to_pylist()) == ["r012:other:4:1-0", "r012:prompts:1:0-1"]
    held_out = prompts(4, held_out=4, source="held-out").slice(2)
    samples, scored = answered(table, {0: rewarded(1, 0)})
    scores = final_rewards(samples, scored, settings())
    found = make_pairs(pa.concat_tables([prompts(2), held_out]), samples, scores, settings(), 12)
    assert found["pair_id"].to_pylist() == ["r012:1:0-1"], "held-out prompts are in no pair"


def test_answers_to_held_out_prompts_are_refused():
    table = prompts(4, held_out=1)
    samples, scored = answered(table, {0: rewarded(1, 0), 3: rewarded(1, 0)}, 5)
    key = table["prompt_id"][3].as_py().hex()
    with pytest.raises(DataError, match=f"samples of round 5 hold answers to 1 prompts that are held out.*{key}"):
        make_pairs(table, samples, final_rewards(samples, scored, settings()), settings(), 5)


def test_scores_of_other_answers_are_refused():
    table = prompts(3)
    samples, scored = answered(table, {0: rewarded(1, 0), 1: rewarded(1, 0)})
    scores = final_rewards(samples, scored, settings())
    with pytest.raises(DataError, match="the 3 scores are not those of the 4 answers"):
        make_pairs(table, samples, scores.slice(0, 3), settings(), 1)
    other, _ = answered(table, {0: rewarded(1, 0), 2: rewarded(1, 0)})
    with pytest.raises(DataError, match="delete the scores"):
        make_pairs(table, other, scores, settings(), 1)


def test_a_round_without_answers_has_the_columns_of_pairs():
    table = prompts(2)
    samples, scored = answered(table, {})
    found = make_pairs(table, samples, final_rewards(samples, scored, settings()), settings(), 1)
    assert found.schema == ROUND_PAIR_SCHEMA
    assert found.schema.names[: len(PAIR_SCHEMA)] == PAIR_SCHEMA.names


# ---- replay


def round_of(number, rows, token=20):
    """Pairs of a round of its own answers to the prompts ``rows``."""
    table = prompts(60)
    answers = {row: [(1.0, [token + number, 100 + row, STOP]), (0.0, [token + number, 101 + row, STOP])] for row in rows}
    samples, scored = answered(table, answers, number)
    return make_pairs(table, samples, final_rewards(samples, scored, settings()), settings(), number)


@pytest.mark.parametrize(("share", "replayed"), [(0.0, 0), (0.25, 10), (0.5, 30)])
def test_replay_is_a_share_of_all_pairs(share, replayed):
    new, earlier = round_of(3, range(30)), [round_of(1, range(40)), round_of(2, range(40))]
    found = with_replay(new, earlier, settings(replay=share), 3)
    assert len(found) == 30 + replayed
    assert found.slice(0, 30).equals(new)
    ids = found["pair_id"].to_pylist()
    assert len(set(ids)) == len(ids)
    assert {one[:4] for one in ids[30:]} <= {"r001", "r002"}
    if replayed:
        assert len({one[:4] for one in ids[30:]}) == 2


def test_replay_depends_on_the_pairs_and_the_round_alone():
    new, earlier = round_of(3, range(30)), [round_of(1, range(40)), round_of(2, range(40))]
    rounds = settings(replay=0.4)
    found = with_replay(new, earlier, rounds, 3)
    turned = [each.take(pa.array(range(len(each) - 1, -1, -1))) for each in earlier[::-1]]
    assert with_replay(new, turned, rounds, 3).equals(found)
    assert not with_replay(new, earlier, rounds, 4).equals(found)
    assert not with_replay(new, earlier, settings(replay=0.4, sample={"seed": 5}), 3).equals(found)


def test_no_pair_is_in_a_round_twice():
    """Not one that an earlier round replayed, not another round's with the same tokens, not a new one's."""
    first = round_of(1, range(10))
    second = with_replay(round_of(2, range(5)), [first], settings(replay=0.5), 2)
    assert len(second) == 10
    same = round_of(1, range(4))  # the same tokens in another round
    same = same.set_column(0, "pair_id", pa.array([one.replace("r001", "r003") for one in same["pair_id"].to_pylist()]))
    stream = io.StringIO()
    found = with_replay(same, [first, second], settings(replay=0.8), 3, Console(stream))
    keys = list(zip(found["chosen_key"].to_pylist(), found["rejected_key"].to_pylist(), strict=True))
    assert len(set(keys)) == len(keys) == 4 + 6 + 5
    assert "round 3: rounds.replay 0.8 asks for 16 pairs of earlier rounds, but there are only 11" in stream.getvalue()


def test_a_round_without_new_pairs_replays_none():
    assert len(with_replay(round_of(2, []), [round_of(1, range(9))], settings(replay=0.5), 2)) == 0


# ---- no pair


@pytest.mark.parametrize(
    ("answers", "rounds", "why", "told"),
    [
        ({0: rewarded(1, 1), 1: rewarded(1, 1)}, {}, "right", "4 of 4 answers are right .*nothing to learn.*harder prompts"),
        ({0: rewarded(1, 1), 1: rewarded(1, None)}, {}, "right", "3 of 3 answers are right .*1 more"),
        ({0: rewarded(0, 0), 1: rewarded(0, 0)}, {}, "wrong", "none of 4 answers is right.*easier prompts"),
        ({0: 2 * [(1.0, [5], "length")]}, {}, "wrong", r"2 are cut .*: raise rounds.sample.max_tokens \(512\)$"),
        ({0: [(1.0, [5], "length"), *rewarded(0, 0)]}, {}, "wrong", "use easier prompts"),
        ({0: rewarded(1, 1), 1: rewarded(0, 0)}, {}, "tied", "2 of 4 answers are right.*rounds.sample.n"),
        ({0: rewarded(0.9, 0.3)}, {"pairs": {"margin": 0.7}}, "tied", r"rounds.pairs.margin \(0.7\)"),
        ({0: rewarded(None, None)}, {}, "unknown", "none of 2 answers can be in a pair: no reward .*rounds.rewards"),
        (
            {0: rewarded(1, None, None)},
            {},
            "unknown",
            "only 1 of 3 answers, all right, can be in a pair: no reward function",
        ),
        (
            {0: [(1.0, [5]), *2 * [(1.0, [6], "length")]]},
            {"cut": "drop"},
            "unknown",
            "only 1 of 3 .*: 2 are cut at 512 .* 0 ",
        ),
        ({0: [(1.0, [5], "length"), (None, [6])]}, {"cut": "drop"}, "unknown", "1 are cut at 512 tokens.*1 have no reward"),
    ],
)
def test_why_a_round_has_no_pair(answers, rounds, why, told):
    rounds, table = settings(**rounds), prompts(2)
    samples, scored = answered(table, answers)
    scores = final_rewards(samples, scored, rounds)
    assert len(make_pairs(table, samples, scores, rounds, 1)) == 0
    found, sentence = no_pairs(samples, scores, rounds)
    assert found == why
    assert re.search(told, sentence)
