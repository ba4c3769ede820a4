"""Mismatched completions: which completion follows which prompt, how it is cut, and its key."""

import pickle

import numpy as np
import pyarrow as pa
import pytest
from unpaired import labelled, sets_of

from raydpo.data.keys import completion_key
from raydpo.data.mismatch import MismatchedTokens, uncounted, with_mismatched
from raydpo.data.select import COUNT_COLUMNS, LABEL, PAIR_SCHEMA, PairSets
from raydpo.data.tally import DataReport

LABELS = [1, -1, -1, 0, 1, 1, -1]
PARTNERS = {0: 2, 1: 0, 2: 1, 4: 6, 5: 4, 6: 5}  # runs of three rows that are alone: 0 1 2, then 4 5 6


def completion_of(table, row, labels=LABELS):
    return table["chosen_ids" if labels[row] > 0 else "rejected_ids"][row].as_py()


def test_each_row_gets_the_completion_before_it_in_its_run():
    table = labelled(LABELS)
    filled = with_mismatched(sets_of(table), 3, 512).train
    assert filled.schema.names[:10] == PAIR_SCHEMA.names
    for row, label in enumerate(LABELS):
        missing = {1: "rejected", -1: "chosen"}.get(label)
        for side in ("chosen", "rejected"):
            if side != missing:  # its own side, or a pair
                for name in ("ids", "key", "full"):
                    assert filled[f"{side}_{name}"][row].as_py() == table[f"{side}_{name}"][row].as_py()
        if missing:
            other, prompt = completion_of(table, PARTNERS[row]), table["prompt_ids"][row].as_py()
            assert filled[f"{missing}_ids"][row].as_py() == other
            assert filled[f"{missing}_key"][row].as_py() == completion_key(prompt, other)
            assert filled[f"{missing}_full"][row].as_py() == len(other)


def test_it_is_cut_to_the_room_that_its_new_prompt_leaves():
    table = labelled(LABELS)
    prompts = [len(ids) for ids in table["prompt_ids"].to_pylist()]
    most = max(prompts) + 2
    filled = with_mismatched(sets_of(table), 3, most).train
    for row, partner in PARTNERS.items():
        side, whole = "rejected" if LABELS[row] > 0 else "chosen", completion_of(table, partner)
        assert filled[f"{side}_ids"][row].as_py() == whole[: most - prompts[row]]
        assert filled[f"{side}_full"][row].as_py() == len(whole)  # the key is that of the whole completion
        assert filled[f"{side}_key"][row].as_py() == completion_key(table["prompt_ids"][row].as_py(), whole)


def test_a_single_row_gets_its_own_completion_and_pairs_alone_are_left_as_they_are():
    table = labelled([1, -1, 1])
    filled = with_mismatched(sets_of(table), 2, 512).train
    assert filled["rejected_key"][2].as_py() == filled["chosen_key"][2].as_py()
    pairs = sets_of(labelled([0, 0]).drop_columns([LABEL]))
    assert with_mismatched(pairs, 2, 512) is pairs


def test_any_machine_reads_the_same_tokens():
    table = labelled(LABELS)
    sets = with_mismatched(sets_of(table), 3, 512)
    assert isinstance(sets.tokens, MismatchedTokens)
    assert with_mismatched(sets, 3, 512) is sets  # which has them already
    with pytest.raises(ValueError, match="within runs of 3 rows, not of 2"):
        with_mismatched(sets, 2, 512)
    again = pickle.loads(pickle.dumps(sets.tokens))
    order = np.array([6, 0, 3, 0])
    for (prompt, *sides), row in zip(again.rows(np.zeros(4, np.int16), order), order.tolist(), strict=True):
        assert prompt.tolist() == table["prompt_ids"][row].as_py()
        for name, ids in zip(("chosen_ids", "rejected_ids"), sides, strict=True):
            assert ids.tolist() == sets.train[name][row].as_py()


def test_held_out_rows_are_mismatched_among_themselves():
    table = labelled(LABELS)
    sets = sets_of(table)
    both = PairSets(sets.train.slice(0, 4), sets.train.slice(4), DataReport([]), sets.tokens)
    filled = with_mismatched(both, 2, 512)
    for name, rows in (("train", {0: 1, 1: 0, 2: 2}), ("eval", {4: 5, 5: 4, 6: 6})):
        first = 0 if name == "train" else 4
        for row, partner in rows.items():
            side = "rejected" if LABELS[row] > 0 else "chosen"
            found = getattr(filled, name)[f"{side}_ids"][row - first].as_py()
            assert found == completion_of(table, partner)
            read = filled.tokens.rows(np.zeros(1, np.int16), np.array([row]))[0]
            assert read[1 + (side == "rejected")].tolist() == found


@pytest.mark.parametrize("most", [512, 30, None])
def test_weights_of_tokens_go_with_their_completion(most):
    table = labelled(LABELS)
    most = most or 1 + max(map(len, table["prompt_ids"]))  # leaves the longest prompt one token
    runs = {name: [] for name in COUNT_COLUMNS}
    for row in range(len(LABELS)):
        for side in ("chosen", "rejected"):
            length = len(table[f"{side}_ids"][row])
            runs[f"{side}_starts"].append([0, 1, 2][: min(3, length)])
            runs[f"{side}_weights"].append([0.0, 0.5, 1.0 + row][: min(3, length)])
    for name, kind in zip(COUNT_COLUMNS, (pa.int32(), pa.float32()) * 2, strict=True):
        table = table.append_column(name, pa.array(runs[name], pa.list_(kind)))
    filled = with_mismatched(sets_of(table), 3, most).train
    for row, partner in PARTNERS.items():
        side = "rejected" if LABELS[row] > 0 else "chosen"
        length = len(filled[f"{side}_ids"][row])
        assert length >= 1
        assert filled[f"{side}_weights"][row].as_py() == [0.0, 0.5, 1.0 + partner][: min(3, length)]
        assert filled[f"{side}_starts"][row].as_py() == [0, 1, 2][: min(3, length)]
    sides = {row: "rejected" if LABELS[row] > 0 else "chosen" for row in PARTNERS}
    assert uncounted(filled) == sum(len(filled[f"{side}_ids"][row]) == 1 for row, side in sides.items())
