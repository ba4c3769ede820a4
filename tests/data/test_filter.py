"""Facts of pairs computed by hand, and conditions on them."""

import numpy as np
import pyarrow as pa
import pytest
from kernel import tokenised, weighted

from raydpo.config.filter import FACTS, PairFilter
from raydpo.data.facts import pair_facts
from raydpo.data.filter import left_out, pairs_to_keep
from raydpo.errors import ConfigError, DataError

RECORDS = [
    {"prompt": "a", "chosen": " sky blue green", "rejected": " cat"},
    {"prompt": "a", "chosen": " cat", "rejected": " sky blue green"},  # contradicts the first
    {"prompt": "a", "chosen": " sky blue green", "rejected": " cat"},  # copies the first
    {"prompt": "b", "chosen": " sky blue green", "rejected": " cat"},  # another prompt: neither
    {"prompt": "b", "chosen": " dog", "rejected": " cat runs"},
]


@pytest.fixture
def facts():
    chosen, rejected = np.array([-4.0, -2.0, -4.0, -6.0, -1.0]), np.array([-2.0, -4.0, -2.0, -8.0, -5.0])
    return pair_facts(tokenised(RECORDS), chosen, rejected)


def test_facts_by_hand(facts):
    assert facts.column_names == list(FACTS)
    assert facts["copies"].to_pylist() == [2, 1, 2, 1, 1] and facts["copy"].to_pylist() == [0, 0, 1, 0, 0]
    assert facts["contradictory"].to_pylist() == [True, True, True, False, False]
    assert facts["prompt_pairs"].to_pylist() == [3, 3, 3, 2, 2]
    assert facts["answer_pairs"].to_pylist() == [4, 4, 4, 4, 1], "' sky blue green' and ' cat' are in four pairs each"
    chosen, rejected = (np.array(facts[f"{side}_tokens"]) for side in ("chosen", "rejected"))
    assert np.array_equal(np.array(facts["length_difference"]), chosen - rejected) and chosen[0] == rejected[1]
    assert facts["ref_margin"].to_pylist() == [-2.0, 2.0, -2.0, 2.0, 4.0]
    assert facts["ref_chosen_per_token"][4].as_py() == -1.0 / chosen[4]


def test_facts_are_of_the_tokens_that_count():
    """In the first chosen completion every token but the last counts a half, in all others the last one alone."""
    table = tokenised(RECORDS)
    known = np.full(5, -3.0), np.full(5, -4.0)
    plain = pair_facts(table, *known)
    first = plain["chosen_tokens"][0].as_py()
    facts = pair_facts(
        weighted(
            table,
            lambda side, row, tokens: (
                [0.5] * (tokens - 1) + [0] if (side, row) == ("chosen", 0) else [0] * (tokens - 1) + [1]
            ),
        ),
        *known,
    )
    assert facts["chosen_tokens"].to_pylist() == [first - 1, 1, 1, 1, 1] and facts["rejected_tokens"].to_pylist() == [1] * 5
    assert facts["length_difference"].to_pylist() == [first - 2, 0, 0, 0, 0]
    assert facts["chosen_weights"].to_pylist() == [(first - 1) / 2, 1, 1, 1, 1]
    assert facts["ref_chosen_per_token"].to_pylist() == [-3 / ((first - 1) / 2), -3, -3, -3, -3]
    assert facts["ref_rejected_per_token"].to_pylist() == [-4] * 5
    for side in ("chosen", "rejected"):
        both = np.array(facts[f"{side}_tokens"]) + np.array(facts[f"{side}_uncounted"])
        assert np.array_equal(both, np.array(plain[f"{side}_tokens"])), "all tokens that are used"
        assert np.array_equal(np.array(plain[f"{side}_weights"]), np.array(plain[f"{side}_tokens"]))
        assert not np.array(plain[f"{side}_uncounted"]).any()
    same = set(FACTS) - {name for name in FACTS if name.endswith(("_tokens", "_uncounted", "_weights", "_per_token"))}
    assert all(facts[name].equals(plain[name]) for name in same - {"length_difference"}), "copies are of whole completions"


def test_truncation_counts_as_cut():
    table = tokenised(RECORDS, max_length=4)
    facts = pair_facts(table)
    used = zip(table["chosen_full"].to_pylist(), table["chosen_ids"].to_pylist(), strict=True)
    assert facts["chosen_cut"].to_pylist() == [full - len(ids) for full, ids in used]
    assert max(facts["chosen_cut"].to_pylist()) > 0 and facts["ref_margin"].null_count == 5


@pytest.mark.parametrize(
    "expression, kept",
    [
        ("ref_margin > 0", [1, 3, 4]),
        ("ref_margin > 0 and copies = 1", [1, 3, 4]),
        ("copy == 0 and not contradictory", [3, 4]),
        ("length_difference between -10 and -1", [1, 4]),
        ("abs(ref_margin) >= 3 or contradictory", [0, 1, 2, 4]),
        ("source in ('tiny') and pair_id <> 'tiny:2'", [0, 2, 3, 4]),
        ("pair_id like '%:5'", [4]),
    ],
)
def test_conditions(facts, expression, kept):
    condition = PairFilter(expression)
    keep = pairs_to_keep(condition, facts)
    assert np.flatnonzero(keep).tolist() == kept
    assert f"{5 - len(kept)} of 5 pairs left out (tiny: {5 - len(kept)} of 5)" in left_out(condition, facts, keep)
    assert condition.needs_reference == ("ref_" in expression)


@pytest.mark.parametrize(
    "expression, said",
    [
        ("chosen_token < 5", "did you mean 'chosen_tokens'"),
        ("chosen_tokens <", "parse"),
        ("chosen_tokens + 1", "true or false"),
        ("1 < 2", "names no field"),
        ("sum(chosen_tokens) > 2", "one value for all pairs"),
        ("source > 3", "data.filter"),
        ("__import__('os').system('true')", "data.filter"),
        ("copies > (select max(copies) from facts)", "data.filter"),
        ("read_csv('/etc/passwd')", "data.filter"),
        ("copies = 1; drop table x", "data.filter"),
    ],
)
def test_what_is_no_condition_is_one_readable_error(expression, said):
    with pytest.raises(ConfigError, match=r"data\.filter") as caught:
        PairFilter(expression)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_neither_true_nor_false_and_nothing_left_are_errors(facts):
    unknown = pair_facts(tokenised(RECORDS), np.array([-4.0, np.nan, -4.0, -6.0, -1.0]), np.full(5, -3.0))
    with pytest.raises(DataError, match=r"neither true nor false for 1 pairs \(first: tiny:2\)"):
        pairs_to_keep(PairFilter("ref_margin > 0"), unknown)
    with pytest.raises(DataError, match="leaves none of 5 pairs"):
        pairs_to_keep(PairFilter("chosen_tokens > 1000"), facts)


def test_facts_of_no_pairs():
    assert pair_facts(tokenised(RECORDS).slice(0, 0), np.empty(0), np.empty(0)).num_rows == 0
    assert isinstance(pair_facts(tokenised(RECORDS)), pa.Table)
