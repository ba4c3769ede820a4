"""An evaluation where not every token counts: its sums, its protocol, and the pairs of another file."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
from kernel import tokenised, weighted
from rows import ONE, OTHER
from tiny import preferences, write_preferences

from raydpo.config import load_config
from raydpo.evaluation.prompts import evaluation_data
from raydpo.pipeline.evaluate import _Evaluation, protocol
from raydpo.reference.store import ReferenceCache
from raydpo.terminal.console import Console

PAIRS = tokenised(preferences(6))
SIDES = ("chosen", "rejected")


@pytest.fixture
def config(tmp_path):
    (tmp_path / "model").mkdir()
    write_preferences(tmp_path / "a.jsonl", preferences(6))
    data = {"train": str(tmp_path / "a.jsonl"), "eval": {"path": str(tmp_path / "a.jsonl")}}

    def made(**more):
        section = data | {name: value for name, value in more.items() if name not in ("evaluate", "held_out")}
        section["eval"] = data["eval"] | more.get("held_out", {})
        tree = {"output": str(tmp_path / "runs"), "model": {"path": str(tmp_path / "model")}, "data": section}
        return load_config(tree | {"evaluate": more.get("evaluate", {})})

    return made


def halves(side, row, tokens):
    """The first token counts a half, the second not, the others count."""
    return ([0.5, 0.0] + [1.0] * tokens)[:tokens]


def test_sums_are_of_the_tokens_that_count(config):
    random, known = np.random.default_rng(0), {}
    for identity in (ONE, OTHER):
        cache = ReferenceCache.open(config().cache_uri, identity)
        cache.prepare({})
        for side in SIDES:
            logps = [-random.random(len(ids)).astype(np.float32) for ids in PAIRS[f"{side}_ids"].to_pylist()]
            cache.commit(PAIRS[f"{side}_key"].to_pylist(), logps, {})
            known[identity, side] = logps
    policy, reference = SimpleNamespace(spec=SimpleNamespace(identity=ONE)), SimpleNamespace(identity=OTHER)

    def scored(pairs):
        return _Evaluation(config(), Console(io.StringIO()), policy, reference, None, pairs, None)._scored_pairs()

    masked, whole = scored(weighted(PAIRS, halves)), scored(PAIRS)
    for side in SIDES:
        for name, identity in ((side, ONE), (f"ref_{side}", OTHER)):
            logps = known[identity, side]
            assert getattr(whole, name) == pytest.approx([each.sum() for each in logps])
            by_hand = [each[0] / 2 + each[2:].sum() for each in logps]
            assert getattr(masked, name) == pytest.approx(by_hand)
        lengths = [len(ids) for ids in PAIRS[f"{side}_ids"].to_pylist()]
        assert getattr(whole, f"{side}_tokens").tolist() == lengths
        assert getattr(masked, f"{side}_tokens").tolist() == [length - 1.5 for length in lengths]


def test_a_protocol_knows_what_counts(config):
    """Drift and answers do not depend on it, so it is apart from the pairs."""
    reference = SimpleNamespace(identity=OTHER)
    whole, masked = (protocol(config(), pairs, reference) for pairs in (PAIRS, weighted(PAIRS, halves)))
    assert masked["pairs"] == whole["pairs"] and "counted" not in whole and masked["counted"] != masked["pairs"]
    same = weighted(PAIRS, lambda side, row, tokens: [1.0] * tokens)
    assert protocol(config(), same, reference) == whole, "where every token counts, nothing is masked"


@pytest.mark.parametrize(
    ("data", "counted"),
    [
        ({}, {"completion": 1.0}),
        ({"train_on": "answer"}, {"answer": 1.0}),
        ({"train_on": "answer", "held_out": {"train_on": "last_turn"}}, {"last_turn": 1.0}),
        ({"train_on": [{"answer": 1.0}, {"reasoning": 0.1}]}, {"answer": 1.0, "reasoning": 0.1}),
    ],
)
def test_in_pairs_of_another_file_the_same_tokens_count_as_in_held_out_ones(data, counted, config, tmp_path):
    from raydpo.data.counting import train_on_of

    found, _ = evaluation_data(config(**data, evaluate={"data": str(tmp_path / "a.jsonl")}))
    assert train_on_of(found, found.train[0]) == counted
