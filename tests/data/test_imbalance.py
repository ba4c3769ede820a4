"""Warnings about labels out of balance, with TRL 1.16's recommended ranges."""

import re

import pytest
from unpaired import labelled

from raydpo.config import ObjectiveConfig
from raydpo.data.imbalance import label_doubts


def trl_ranges(desirable, undesirable, good, bad):
    """As printed by ``KTOTrainer``."""
    least, most = round(undesirable * bad / desirable, 2), round(undesirable * bad / desirable * 1.33, 2)
    low, high = round(desirable * good / undesirable / 1.33, 2), round(desirable * good / undesirable, 2)
    return [least, most, low, high], least <= good <= most or low <= bad <= high


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.2, 1.0), (0.25, 1.0), (0.33, 1.0), (0.4, 1.0), (1.0, 4.0), (1.0, 3.2)])
def test_the_ranges_are_those_of_trl(weights):
    good, bad = weights
    table = labelled([1] * 8 + [-1] * 2)
    objective = ObjectiveConfig(loss="kto", desirable_weight=good, undesirable_weight=bad)
    ranges, fine = trl_ranges(8, 2, good, bad)
    lines = list(label_doubts(table, objective))
    assert len(lines) == (not fine)
    for line in lines:
        told = [float(each) for pair in re.findall(r"\[([\d.]+), ([\d.]+)\]", line) for each in pair]
        assert told == pytest.approx(ranges, abs=0.006)


def test_what_is_balanced_or_not_weighed_is_not_told():
    assert not list(label_doubts(labelled([1, -1] * 3), ObjectiveConfig(loss="kto")))
    assert not list(label_doubts(labelled([1, 1, 1, -1]), ObjectiveConfig(loss="bco")))
    assert not list(label_doubts(labelled([0, 0]).drop_columns(["label"]), ObjectiveConfig(loss="kto")))
    assert list(label_doubts(labelled([1, 1, 1, -1]), ObjectiveConfig(loss="apo_zero")))
    # A pair has half of a desirable and half of an undesirable term in kto: 3.5 to 2.5, and not 4 to 3.
    (line,) = label_doubts(labelled([0, 1, 1, 1, -1, -1]), ObjectiveConfig(loss="kto"))
    assert "3.5 desirable and 2.5 undesirable" in line


@pytest.mark.parametrize(
    ("label", "words"), [(1, "desirable, so nothing tells the policy what to avoid"), (-1, "undesirable")]
)
def test_labels_of_one_kind_are_told(label, words):
    (line,) = label_doubts(labelled([label] * 3), ObjectiveConfig(loss="bco"))
    assert "all 3 completions are" in line and words in line


@pytest.mark.parametrize(
    ("labels", "run", "told"),
    [([1, -1], 1, "pairs_per_step is 1, so"), ([0, 0, 1], 4, "one row with a label"), ([1, -1], 2, ""), ([1, -1], None, "")],
)
def test_a_row_that_is_mismatched_with_itself_is_told(labels, run, told):
    lines = list(label_doubts(labelled(labels), ObjectiveConfig(loss="kto"), run))
    assert any("measures the drift on completions of other rows" in line and told in line for line in lines) == bool(told)
