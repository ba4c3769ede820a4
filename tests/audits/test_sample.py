"""An audit of a part of the prompts: which pairs it has, and that its figures are those of all pairs."""

import json
from pathlib import Path

import numpy as np
import pytest
from kernel import tokenised
from tiny import make_tokenizer, preferences, write_preferences

import raydpo
from raydpo.audits import audit_pairs, draw, summary_lines
from raydpo.audits.page import render_page
from raydpo.config import load_config
from raydpo.data.facts import pair_facts
from raydpo.data.pairs import load_pairs
from raydpo.data.ragged import digests
from raydpo.data.tokenise import Tokeniser

META = {"name": "test", "model": "tiny", "raydpo": "0", "identity": "0" * 32, "cache": "cache"}


def most(monkeypatch, pairs):
    monkeypatch.setattr("raydpo.audits.sample.MOST_AUDITED", pairs)


def records(prompts):
    """Up to four pairs of each prompt, and some pairs that are copies, contradict others or repeat an answer elsewhere."""
    first = preferences(prompts, low=3, high=12)
    more = [
        first[number % prompts] | one
        for number, one in enumerate(preferences(prompts * 2, seed=1, low=3, high=12))
        if number % 3
    ]
    more = [one | {"prompt": first[number % prompts]["prompt"]} for number, one in enumerate(more)]
    turned = [one | {"chosen": one["rejected"], "rejected": one["chosen"]} for one in first[::7]]
    elsewhere = [one | {"prompt": first[-1 - number]["prompt"]} for number, one in enumerate(first[:5])]
    return [*first, *more, *first[::5], *turned, *elsewhere]


def audited(table, sample, counted_apart=True):
    everything = pair_facts(table)
    random = np.random.default_rng(0)
    sums = [
        -everything[f"{side}_tokens"].to_numpy() * (1 + random.normal(0, 0.3, table.num_rows))
        for side in ("chosen", "rejected")
    ]
    facts = pair_facts(table, *sums).take(sample.rows)
    decode = make_tokenizer().batch_decode
    return audit_pairs(facts, table, decode, sample, meta=META, everything=everything if counted_apart else None)


def test_all_pairs_of_a_prompt_that_was_drawn_are_in(monkeypatch):
    prompts = digests(tokenised(records(200))["prompt_ids"])
    most(monkeypatch, 150)
    sample, again, other = draw(prompts, 3), draw(prompts, 3), draw(prompts, 4)
    assert 0 < len(sample.rows) < len(prompts) and not sample.whole
    inside = np.isin(prompts, prompts[sample.rows])
    assert np.array_equal(np.flatnonzero(inside), sample.rows)
    assert np.array_equal(sample.rows, again.rows) and not np.array_equal(sample.rows, other.rows)
    drawn = sample.to_dict()
    assert drawn == {
        "pairs": inside.sum(),
        "of_pairs": len(prompts),
        "prompts": len(set(prompts[inside])),
        "of_prompts": len(set(prompts)),
        "seed": 3,
    }
    most(monkeypatch, len(prompts))
    assert draw(prompts, 3).whole and draw(prompts, 3).to_dict() is None


def test_about_as_many_pairs_as_allowed_are_drawn(monkeypatch):
    most(monkeypatch, 10_000)
    prompts = np.repeat(np.random.default_rng(0).integers(0, 2**63, 25_000, np.uint64), 2)
    assert all(9_500 < len(draw(prompts, seed).rows) < 10_500 for seed in range(5))
    most(monkeypatch, 1)
    assert all(len(draw(prompts, seed).rows) == 2 for seed in range(5)), "one prompt at least"
    assert len(draw(np.full(10, 7, np.uint64), 0).rows) == 10


def test_a_sample_of_all_pairs_has_the_figures_of_all():
    table = tokenised(records(60))
    sample = draw(digests(table["prompt_ids"]), 0)
    found = audited(table, sample).to_dict()
    assert found == audited(table, sample, counted_apart=False).to_dict()
    assert found["meta"]["sample"] is None and found["total"]["all_pairs"] == found["total"]["pairs"] == table.num_rows


def test_figures_of_samples_are_those_of_all_pairs_within_their_intervals(monkeypatch):
    table = tokenised(records(500))
    prompts = digests(table["prompt_ids"])
    whole = audited(table, draw(prompts, 0)).total
    most(monkeypatch, 400)
    counted = ("all_pairs", "duplicates", "contradictory", "contradictory_evenly", "shared_prompt", "shared_answer", "empty")
    within = {("length", "chosen_longer"): 0, ("length", "rule_accuracy"): 0, ("reference", "right_by_sum"): 0}
    for seed in range(40):
        found = audited(table, draw(prompts, seed)).total
        assert found["pairs"] < 600 and [found[name] for name in counted] == [whole[name] for name in counted]
        for part, name in within:
            share = found[part][name]
            within[part, name] += share["low"] <= whole[part][name]["share"] <= share["high"]
    assert whole["duplicates"] and whole["contradictory"] and whole["shared_answer"] and whole["shared_prompt"]
    assert min(within.values()) >= 36, "95 % intervals"


def test_answers_that_a_pair_outside_the_sample_has_too_count(monkeypatch):
    table = tokenised(records(60))
    most(monkeypatch, 30)
    sample = draw(digests(table["prompt_ids"]), 1)
    facts, alone = pair_facts(table).take(sample.rows), pair_facts(table.take(sample.rows))
    assert (facts["answer_pairs"].to_numpy() > alone["answer_pairs"].to_numpy()).any()
    assert facts["copies"].equals(alone["copies"]) and facts["prompt_pairs"].equals(alone["prompt_pairs"])


@pytest.fixture
def config(tmp_path, tiny_llama):
    big, small = records(80), preferences(3, seed=9)
    write_preferences(tmp_path / "big.jsonl", big)
    write_preferences(tmp_path / "small.jsonl", small)
    return load_config(
        {
            "output": str(tmp_path / "runs"),
            "name": "sampled",
            "model": {"path": str(tiny_llama)},
            "data": {"train": [str(tmp_path / "big.jsonl"), str(tmp_path / "small.jsonl")]},
            "train": {"seed": 5},
        }
    )


def test_the_command_says_what_it_sampled(config, monkeypatch, capsys):
    most(monkeypatch, 20)
    made = raydpo.audit(config).to_dict()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("audit: ")]
    drawn, pairs = made["meta"]["sample"], load_pairs(config.data, Tokeniser(make_tokenizer())).train
    sample = draw(digests(pairs["prompt_ids"]), 5)
    assert drawn == sample.to_dict() and drawn["of_pairs"] == pairs.num_rows
    about = f"{drawn['pairs']} of {pairs.num_rows} pairs"
    assert printed[0].startswith(
        f"audit: a sample of {about}, all those of {drawn['prompts']} of {drawn['of_prompts']} prompts"
    )
    run = Path(config.run_dir)
    assert json.loads((run / "audit.json").read_text())["meta"]["sample"] == drawn
    page = " ".join((run / "audit.html").read_text().split())
    assert f"A sample of {about}" in page and "drawn with seed 5." in page
    assert f"<td>{drawn['pairs']} of {pairs.num_rows}</td>" in page
    assert raydpo.audit(config).to_dict() == made


def test_a_source_of_which_nothing_is_drawn_has_its_counts(config, monkeypatch):
    pairs = load_pairs(config.data, Tokeniser(make_tokenizer())).train
    most(monkeypatch, 20)
    for seed in range(50):
        sample = draw(digests(pairs["prompt_ids"]), seed)
        if "small" not in pairs["source"].take(sample.rows).to_pylist():
            break
    else:
        pytest.fail("each sample has pairs of the small source")
    audit = audited(pairs, sample)
    assert audit.sources["small"]["pairs"] == 0 and audit.sources["small"]["all_pairs"] == 3
    assert "<td>0 of 3</td>" in render_page(audit) and summary_lines(audit)
