"""Runs of weights, and sums over them, against a loop over the tokens."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydpo.config import DataConfig
from raydpo.data import counting
from raydpo.data.counting import (
    counted_tokens,
    counts,
    needs_marks,
    token_weights,
    train_on_of,
    weight_runs,
    weighted_sums,
)
from raydpo.data.marks import ANSWER, ASSISTANT, LAST_TURN, MARK_BITS, MARK_COLUMNS, REASONING

BITS = {"assistant": ASSISTANT, "last_turn": LAST_TURN, "answer": ANSWER, "reasoning": REASONING}
TOKEN = st.tuples(st.integers(0, 15), st.sampled_from([1.0, 1.0, 0.0, 0.25]))
COMPLETION = st.one_of(st.just([]), st.lists(TOKEN, min_size=1, max_size=9))
TRAIN_ON = st.dictionaries(st.sampled_from(["completion", *BITS]), st.sampled_from([1.0, 0.1, 0.5]), min_size=1)


def light_of(completions):
    """Light rows with the marks of these completions, a list of (parts, factor) of each token, on both sides."""
    marks, factors = [], []
    for tokens in completions:
        runs = [at for at, token in enumerate(tokens) if at == 0 or token != tokens[at - 1]]
        marks.append([at << MARK_BITS | tokens[at][0] for at in runs])
        factors.append([tokens[at][1] for at in runs])
    return pa.table(
        {name: pa.array(marks if "marks" in name else factors, kind) for name, kind in MARK_COLUMNS},
        schema=pa.schema(MARK_COLUMNS),
    )


def table_of(runs, chunks=1):
    """A table of pairs with these runs on both sides."""
    table = pa.table(
        {
            **{f"{side}_tokens": pa.array(runs.tokens) for side in ("chosen", "rejected")},
            **{
                f"{side}_{what}": column
                for side in ("chosen", "rejected")
                for what, column in zip(("starts", "weights"), runs.columns(), strict=True)
            },
        }
    )
    size = max(1, -(-table.num_rows // chunks))
    return pa.concat_tables([table.slice(start, size) for start in range(0, max(1, table.num_rows), size)])


def test_weights_may_be_written_as_yaml_reads_them():
    assert train_on_of(DataConfig(train="x", train_on=[{"answer": "1e-2"}, {"reasoning": 1}]), None) == {
        "answer": 0.01,
        "reasoning": 1.0,
    }


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(COMPLETION, st.integers(-1, 10)), max_size=8), TRAIN_ON, st.integers(1, 3), st.integers(1, 20))
def test_runs_are_those_of_a_loop_over_the_tokens(rows, train_on, chunks, block):
    completions = [tokens for tokens, _ in rows]
    # Of a completion without marks any number of tokens may be in use.
    used = np.array([min(cut, len(tokens)) if tokens else cut for tokens, cut in rows], np.int32)
    expected = []
    for tokens, cut in zip(completions, used.tolist(), strict=True):
        tokens = (tokens or [(0, 1.0)] * cut)[: max(cut, 0)]
        weights = [
            sum(weight for name, weight in train_on.items() if name == "completion" or bits & BITS[name]) * factor
            for bits, factor in tokens
        ]
        expected.append(np.array(weights, np.float32))

    runs = weight_runs(light_of(completions), "chosen", used, train_on)
    table = table_of(runs, chunks)

    for row, weights in enumerate(expected):
        np.testing.assert_array_equal(token_weights(table, "chosen", row), weights)
        mine = runs.weights[runs.offsets[row] : runs.offsets[row + 1]]
        assert (mine[1:] != mine[:-1]).all()  # neighbours differ
    doubles = [weights.astype(np.float64) for weights in expected]
    np.testing.assert_allclose(counts(table, "rejected"), [weights.sum() for weights in doubles], rtol=1e-12)
    assert counted_tokens(table, "rejected").tolist() == [int((weights > 0).sum()) for weights in expected]
    values = [
        np.random.default_rng(row).normal(size=len(weights)).astype(np.float32) for row, weights in enumerate(expected)
    ]
    offsets = np.cumsum([0, *map(len, values)])
    flat = np.concatenate([np.empty(0, np.float32), *values])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "_BLOCK_VALUES", block)
        found = weighted_sums(flat, offsets, table, "chosen")
    np.testing.assert_allclose(
        found, [v.astype(np.float64) @ w for v, w in zip(values, doubles, strict=True)], rtol=1e-9, atol=1e-12
    )


def test_a_table_without_columns_counts_every_token():
    table = pa.table({"chosen_tokens": pa.array([3, 0, 2], pa.int32())})
    values = np.array([0.1, 0.2, 0.3, -1.0, -2.5], np.float32)
    assert token_weights(table, "chosen", 0).tolist() == [1, 1, 1]
    assert counts(table, "chosen").tolist() == [3, 0, 2]
    assert counted_tokens(table, "chosen").tolist() == [3, 0, 2]
    sums = weighted_sums(values, np.array([0, 3, 3, 5]), table, "chosen")
    assert sums.tolist() == [values[:3].astype(np.float64).sum(), 0, -3.5]


def test_a_value_that_does_not_count_may_be_anything():
    runs = weight_runs(light_of([[(ANSWER, 1.0), (0, 1.0)]]), "chosen", np.array([2], np.int32), {"answer": 1.0})
    assert weighted_sums(np.array([-2, -np.inf], np.float32), np.array([0, 2]), table_of(runs), "chosen").tolist() == [-2]


def test_other_numbers_of_values_are_refused():
    table = pa.table({"chosen_tokens": pa.array([3], pa.int32())})
    with pytest.raises(ValueError, match="other numbers of values than of tokens"):
        weighted_sums(np.zeros(2, np.float32), np.array([0, 2]), table, "chosen")


def test_which_settings_need_marks():
    def data(**settings):
        return DataConfig.model_validate({"train": [{"path": "a.jsonl"}, {"path": "b.jsonl"}], **settings})

    assert not needs_marks(data())
    assert not needs_marks(data(train_on=[{"completion": 1}]))
    assert needs_marks(data(train_on="answer"))
    assert needs_marks(data(train_on=[{"completion": 0.5}]))
    assert needs_marks(data(spans_column="spans"))
    assert needs_marks(data(eval={"fraction": 0.5, "train_on": "answer"}))
    own = data(train=[{"path": "a.jsonl", "train_on": "answer"}, {"path": "b.jsonl"}], eval={"path": "c.jsonl"})
    assert needs_marks(own)
    assert [train_on_of(own, source) for source in own.train] == [{"answer": 1.0}, {"completion": 1.0}]
    assert train_on_of(own, None) == {"completion": 1.0}  # the sources differ
    same = data(train=[{"path": "a.jsonl", "train_on": "answer"}], eval={"path": "c.jsonl"})
    assert train_on_of(same, None) == {"answer": 1.0}  # what counts in training
    assert train_on_of(data(train_on="answer", eval={"path": "c.jsonl", "train_on": "reasoning"}), None) == {
        "reasoning": 1.0
    }
