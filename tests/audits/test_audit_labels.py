"""The audit of completions with labels: figures by hand, a page, and pairs beside them that keep their own figures."""

import json

import numpy as np
import polars as pl
import pytest
from kernel import tokenised, unpaired
from tiny import make_tokenizer

from raydpo.audits import audit_pairs, draw, summary_lines, write_audit
from raydpo.config.filter import PairFilter
from raydpo.data.facts import digests_of, pair_facts
from raydpo.data.filter import pairs_to_keep
from raydpo.data.select import LABEL
from raydpo.errors import DataError
from raydpo.storage.files import Storage

META = {"name": "test", "model": "tiny", "raydpo": "0", "identity": "0" * 32, "cache": "cache"}


def record(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


RECORDS = [
    record("sky", " blue blue blue", " cat"),
    record("sky", " blue blue blue", " green"),  # a copy of the desirable one
    record("grass", " cat", " green green"),
    record("cat", " green", " green"),  # the same completion with both labels
    record("blue", " sky sky", " <pad>"),
]


def labelled(kept=None):
    """Ten rows: the completions of ``RECORDS``, each with the label of its side; or those in ``kept``."""
    table = unpaired(tokenised(RECORDS))
    return table if kept is None else table.take(kept)


def sums_of(table, per_token):
    """Log-probs of each side: ``per_token`` by label, 0 for a side without tokens."""
    lengths = [np.array([len(ids) for ids in table[f"{side}_ids"].to_pylist()]) for side in ("chosen", "rejected")]
    return [-lengths[0] * per_token[0], -lengths[1] * per_token[1]]


def audited(table, per_token=(2.0, 3.0)):
    facts = pair_facts(table, *sums_of(table, per_token))
    sample = draw(digests_of(table, "prompt"), 0)
    return audit_pairs(facts, table, make_tokenizer().batch_decode, sample, meta=META)


def test_facts_of_completions_alone():
    table = labelled()
    facts = pair_facts(table, *sums_of(table, (2.0, 3.0)))
    assert facts["label"].to_pylist() == [1, -1] * 5
    for name in ("length_difference", "ref_margin"):
        assert facts[name].null_count == 10
    for side, mine in (("chosen", slice(0, None, 2)), ("rejected", slice(1, None, 2))):
        values = [np.array(facts[f"ref_{side}_per_token"].to_pylist(), float), np.array(facts[f"ref_{side}_logps"])]
        assert np.isnan(values[0]).sum() == np.isnan(values[1]).sum() == 5
        assert set(values[0][mine]) == {-2.0 if side == "chosen" else -3.0}
    assert facts["copies"].to_pylist() == [2, 1, 2, 1, 1, 1, 1, 1, 1, 1]
    assert facts["copy"].to_pylist() == [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert facts["contradictory"].to_pylist() == [False] * 6 + [True, True, False, False]
    assert facts["prompt_pairs"].to_pylist() == [4, 4, 4, 4, 2, 2, 2, 2, 2, 2]
    assert facts["answer_pairs"].to_pylist() == [2, 2, 2, 3, 2, 1, 3, 3, 1, 1], "a missing side is no answer"


def test_a_filter_names_labels_and_says_what_has_no_value():
    table = labelled()
    facts = pair_facts(table, *sums_of(table, (2.0, 3.0)))
    assert pairs_to_keep(PairFilter("label != 0 or ref_margin > 0"), facts).all()
    assert pairs_to_keep(PairFilter("label = 1 and chosen_tokens > 2"), facts).sum() == 3
    with pytest.raises(DataError, match="neither true nor false for 10 pairs"):
        pairs_to_keep(PairFilter("ref_margin > 0"), facts)


def test_figures_by_hand():
    done = audited(labelled())
    labels = done.total["labels"]
    good, bad = labels["desirable"], labels["undesirable"]
    tokens = np.array([len(ids) for ids in labelled()["chosen_ids"].to_pylist()])[::2]
    other = np.array([len(ids) for ids in labelled()["rejected_ids"].to_pylist()])[1::2]
    assert (good["all"], bad["all"], labels["completions"], labels["not_scored"]) == (5, 5, 10, 0)
    assert (good["tokens"]["median"], bad["tokens"]["median"]) == (np.median(tokens), np.median(other))
    wins = np.mean(np.sign(tokens[:, None] - other[None]) / 2 + 0.5)
    assert labels["longer"]["share"] == pytest.approx(wins)
    assert (good["surprise"]["median"], bad["surprise"]["median"]) == (2.0, 3.0)
    assert labels["surprises_more"]["share"] == 1.0
    assert (good["copies"], bad["copies"], good["both_labels"], bad["both_labels"]) == (1, 0, 1, 1)
    assert (good["both_labels_evenly"], bad["both_labels_evenly"]) == (1, 1)
    assert (labels["prompts_with_both"]["count"], labels["prompts_with_both"]["of"]) == (4, 4)
    assert (done.total["pairs"], done.total["all_pairs"], done.total["duplicates"], done.total["contradictory"]) == (
        0,
        0,
        0,
        0,
    )
    lines = summary_lines(done)
    assert lines[0].startswith("audit: completions with labels: 5 desirable and 5 undesirable, ")
    assert "desirable 2.00, undesirable 3.00 nats a token" in lines[1] and "in 100.0%" in lines[1]
    assert lines[2] == "audit: 100.0% of 4 prompts have both labels, 1 copies, 2 also have the other label"
    assert any("Remove completions with both labels".lower() in line.lower() for line in lines)
    json.dumps(done.to_dict(), allow_nan=False)


def test_figures_of_one_label_alone():
    done = audited(labelled([0, 4, 8]))
    labels = done.total["labels"]
    assert labels["undesirable"]["tokens"] is None and labels["longer"]["share"] is None
    assert labels["prompts_with_both"]["count"] == 0
    assert summary_lines(done)[0] == "audit: completions with labels: 3 desirable and 0 undesirable"


def test_pairs_beside_them_keep_their_figures(tmp_path):
    pairs = tokenised([record(f"sky {n}", f" cat {n} blue", f" green {n}") for n in range(4)])
    alone = audited(pairs, (1.0, 2.0))
    import pyarrow as pa

    both = pa.concat_tables([pairs.append_column(LABEL, pa.array([0] * 4, pa.int8())), labelled()])
    mixed = audited(both, (1.0, 2.0))
    assert alone.total["labels"] is None and mixed.total["labels"]["completions"] == 10
    assert {name: value for name, value in mixed.total.items() if name not in ("labels", "counted")} == {
        name: value for name, value in alone.total.items() if name not in ("labels", "counted")
    }
    for done, told in (
        (mixed, "4 pairs and 10 completions with labels"),
        (audited(labelled()), "10 completions with labels"),
    ):
        write_audit(done, Storage(str(tmp_path)))
        page = (tmp_path / "audit.html").read_text()
        assert told in page and "Length by label" in page and "prompts with both labels" in page
        assert "nan" not in page.lower().replace("finance", "")
        assert ("chosen longer" in page) == (done is mixed)
        assert "undesirable: " in page and "None" not in page
    assert "with labels" not in page_of(alone, tmp_path)


def page_of(done, place):
    write_audit(done, Storage(str(place)))
    return (place / "audit.html").read_text()


def test_polars_reads_the_label_column():
    assert pl.from_arrow(pair_facts(labelled()).select(["label"]))["label"].dtype == pl.Int8
