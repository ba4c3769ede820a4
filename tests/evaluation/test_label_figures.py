"""Figures of an evaluation of completions with labels, alone and beside pairs."""

import dataclasses

import numpy as np
import pytest

from raydpo.config import ObjectiveConfig
from raydpo.data.separation import auc_by_group
from raydpo.evaluation.preferences import ScoredPairs, measure_preferences
from raydpo.reports.evaluation import evaluation_tables

LOGRATIOS = [2.0, -1.0, 3.0, 0.5, -2.0, 1.0]  # of each row's own completion; the first two rows are pairs
LABELS = np.array([0, 0, 1, 1, -1, -1], np.int8)


def scored(labels=LABELS, sources=("a", "a", "a", "b", "a", "b")):
    """Scored pairs whose rejected completion has half of the chosen one's log-ratio. A missing side is 0."""
    ratios, none = np.array(LOGRATIOS), np.zeros(6)
    chosen, rejected = labels >= 0, labels <= 0
    ref = -20 - np.arange(6.0)
    return ScoredPairs(
        np.where(chosen, ref + ratios, none),
        np.where(rejected, ref + np.where(labels == 0, ratios / 2, ratios), none),
        np.where(chosen, ref, none),
        np.where(rejected, ref, none),
        np.where(chosen, 10, 0),
        np.where(rejected, 12, 0),
        np.array(sources, object),
        np.arange(6),
        labels,
    )


@pytest.mark.parametrize("loss", ["kto", "sigmoid_norm"])
def test_labels_and_pairs_are_measured_apart(loss):
    objective = ObjectiveConfig(loss=loss)
    found = measure_preferences(scored(), 0.1, objective)
    pairs = dataclasses.replace(scored().take(LABELS == 0), labels=None)
    expected = measure_preferences(pairs, 0.1, objective)
    assert {name: found[name] for name in expected} == expected and found["total"]["pairs"] == 2
    total = found["labels"]["total"]
    assert (total["completions"], total["desirable"], total["undesirable"], total["prompts"]) == (4, 2, 2, 4)
    assert total["auc"]["value"] == 3 / 4  # 3 and 0.5 against -2 and 1
    assert total["auc"] == auc_by_group(np.array([3, 0.5, -2, 1]), np.array([1, 1, -1, -1]), np.arange(4))
    assert total["desirable_rose"]["value"] == 1.0 and total["undesirable_fell"]["value"] == 0.5
    scale = (10, 12) if loss == "sigmoid_norm" else (1, 1)
    assert total["desirable_reward"]["value"] == pytest.approx(0.1 * 1.75 / scale[0])
    assert total["undesirable_reward"]["value"] == pytest.approx(0.1 * -0.5 / scale[1])
    assert list(found["labels"]["by_source"]) == ["a", "b"]
    assert found["labels"]["by_source"]["b"]["auc"]["value"] == 0.0


def test_the_tables_have_what_was_measured():
    def tables(labels):
        found = measure_preferences(scored(labels), 0.1, ObjectiveConfig(loss="kto"))
        return [table.label for table in evaluation_tables({"preferences": found})]

    both = tables(LABELS)
    assert len(both) == 2 and both[0].startswith("Preferences of") and both[1].startswith("Completions with labels")
    assert len(tables(np.array([1, 1, 1, 1, -1, -1], np.int8))) == 1


def test_one_label_alone_has_no_auc():
    found = measure_preferences(scored(np.array([1, 1, 1, 1, 1, 1], np.int8)), 0.1, ObjectiveConfig(loss="kto"))
    assert found["labels"]["total"]["auc"]["value"] is None
    assert found["labels"]["total"]["undesirable_fell"]["value"] is None
