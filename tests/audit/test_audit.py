"""The figures of an audit by hand, its advice, and its page in a browser."""

import json
import math

import numpy as np
import polars as pl
import pytest
from browser import BROWSER, look, widths
from kernel import tokenised
from tiny import make_tokenizer, preferences

from raydpo.audit import audit_pairs, summary_lines, write_audit
from raydpo.audit.extremes import shown
from raydpo.audit.measure import figures, overlap, wilson
from raydpo.data.facts import pair_facts
from raydpo.storage import Storage

META = {"name": "test", "model": "tiny", "raydpo": "0", "identity": "0" * 32, "cache": "cache"}


def audited(records, chosen=None, rejected=None, max_length=512, seed=0):
    """An audit of text records; without values, the reference gives every token -1 nat and a little noise."""
    table = tokenised(records, max_length=max_length)
    facts = pair_facts(table)
    noise = np.random.default_rng(seed).normal(0, 0.05, (2, len(records)))
    sums = [given if given is not None else -facts[f"{side}_tokens"].to_numpy() * (1 + each)
            for side, given, each in (("chosen", chosen, noise[0]), ("rejected", rejected, noise[1]))]
    decode = make_tokenizer().batch_decode
    return audit_pairs(pair_facts(table, *sums), table, decode, meta=META, identical={"tiny": 2})


def frame(difference, margin, chosen_tokens=50):
    """Facts with these length differences and margins and nothing else of note."""
    difference, margin = np.array(difference), np.array(margin, float)
    rejected = chosen_tokens - difference
    columns = {"length_difference": difference, "rejected_tokens": rejected,
               "chosen_tokens": np.full(len(margin), chosen_tokens), "prompt_tokens": np.full(len(margin), 9),
               "ref_margin": margin, "ref_chosen_logps": margin - 100.0,
               "ref_rejected_logps": np.full(len(margin), -100.0), "ref_chosen_per_token": (margin - 100) / chosen_tokens,
               "ref_rejected_per_token": -100.0 / rejected}
    zero = np.zeros(len(margin), np.int64)
    one = zero + 1
    return pl.DataFrame(columns | {"copy": zero, "copies": one, "prompt_pairs": one, "answer_pairs": one, "chosen_cut": zero,
                                   "rejected_cut": zero, "contradictory": zero.astype(bool)})


def test_figures_by_hand():
    found = figures(frame([10, 20, -10, 0], [-5, -10, 5, 1]))
    assert found["length"]["chosen_longer"]["share"] == 0.5 and found["length"]["equal"] == 1
    assert found["length"]["rule"] == "longer" and found["length"]["rule_accuracy"]["share"] == (2 + 0.5) / 4
    assert found["reference"]["right_by_sum"]["share"] == 0.5
    # Margin is -1/2 x difference but for the last pair, whose margin is 1 at 0: slope and r of the four points by hand.
    x, y = np.array([10, 20, -10, 0.0]), np.array([-5, -10, 5, 1.0])
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    assert found["length_and_reference"]["slope"] == pytest.approx(slope)
    assert found["length_and_reference"]["pearson"] == pytest.approx(slope * x.std() / y.std())
    assert found["length_and_reference"]["spearman"] == pytest.approx(-1.0)
    bins = {(each["from"], each["to"]): each for each in found["length_and_reference"]["bins"]}
    assert bins[0, 0]["right"]["share"] == 1.0 and bins[1, 25]["pairs"] == 2 and bins[-25, -1]["right"]["share"] == 1.0
    assert found["surprise"]["rejected_perplexity"] == pytest.approx(math.exp(400 / (40 + 30 + 60 + 50)))


def test_wilson_and_overlap():
    assert wilson(0, 0)["share"] is None
    ten = wilson(5, 10)  # Wilson's interval of 5 in 10: 0.2366 to 0.7634
    assert (ten["low"], ten["high"]) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    one = np.random.default_rng(0).normal(size=4000)
    assert overlap(one, one) == {"coefficient": pytest.approx(1.0), "auc": pytest.approx(0.5)}
    apart = overlap(one, one + 100)
    assert apart["coefficient"] == 0 and apart["auc"] == 1.0
    # Two unit normals d apart share 2 Phi(-d/2) of their area, and one exceeds the other with Phi(d / sqrt 2).
    near = overlap(one, np.random.default_rng(1).normal(1, 1, 4000))
    assert near["coefficient"] == pytest.approx(0.617, abs=0.03) and near["auc"] == pytest.approx(0.760, abs=0.02)


def records(count, longer):
    """Pairs of random words; the chosen answer is the longer one in the first ``longer`` of them."""
    made = []
    for number, record in enumerate(preferences(count, low=3, high=30)):
        short, long = sorted((record["chosen"], record["rejected"] + " tree"), key=len)
        chosen, rejected = (long, short) if number < longer else (short, long)
        made.append(record | {"chosen": chosen, "rejected": rejected})
    return made


def titles(audit):
    return [one.title for one in audit.advice]


def test_advice_follows_from_the_figures():
    assert "Length-normalise" in titles(audited(records(200, 160)))
    assert "Length-normalise" in titles(audited(records(200, 40))), "a bias to short answers is one, too"
    balanced = audited(records(200, 100))
    assert not {"Length-normalise", "Watch the length", "Remove copies", "Remove contradictions"} & set(titles(balanced))
    few = records(200, 100)
    doubled = audited(few + few[:20])
    assert doubled.total["duplicates"] == 20 and 'filter: "copy = 0"' in str(doubled.advice)
    turned = [record | {"chosen": record["rejected"], "rejected": record["chosen"]} for record in few[:3]]
    assert audited(few + turned).total["contradictory"] == 6 and "Remove contradictions" in titles(audited(few + turned))
    tokens = np.array([len(row) for row in tokenised(few)["chosen_ids"].to_pylist()])
    assert "Fine-tune on the chosen answers first" in titles(audited(few, chosen=-4.0 * tokens))
    assert "Cut less" in titles(audited(few, max_length=40))


def test_nothing_stands_out_is_said(tmp_path):
    audit = audited(records(200, 100))
    if audit.advice:
        pytest.fail(str(titles(audit)))
    write_audit(audit, Storage(str(tmp_path)))
    assert "Nothing stands out" in (tmp_path / "audit.html").read_text()


def test_lists_of_pairs_worth_reading():
    audit = audited(records(60, 40))
    kinds = {kind["title"]: kind for kind in audit.extremes}
    wrong = [pair["ref_margin"] for pair in kinds["The reference is most wrong, by sum"]["pairs"]]
    assert len(wrong) == 20 and wrong == sorted(wrong)
    longer = [pair["length_difference"] for pair in kinds["Chosen much longer"]["pairs"]]
    assert longer == sorted(longer, reverse=True) and "Contradictory" not in kinds
    assert kinds["Most surprising chosen"]["pairs"][0]["prompt"].startswith("Question:")


def test_hidden_characters_are_shown_and_long_texts_cut():
    assert shown("a\u202eb\x00c\u200bd\ne") == "a\u27e8U+202E\u27e9b\u27e8U+0000\u27e9c\u27e8U+200B\u27e9d\ne"
    cut = shown("x" * 5000)
    assert "3,800 characters left out" in cut and len(cut) < 1300


def test_pairs_that_are_not_scored_count_in_lengths_alone():
    audit = audited(records(20, 10), chosen=np.full(20, np.nan))
    assert audit.total["not_scored"] == 20 and audit.total["surprise"]["chosen"] is None
    assert json.dumps(audit.to_dict(), allow_nan=False) and summary_lines(audit)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    place = tmp_path_factory.mktemp("page")
    evil = [{"prompt": "p <img src=x onerror=alert(1)>", "chosen": f" "
                                                                   f"<script>alert({number})</script></div></details>\u202e",
             "rejected": f" {'long ' * number} & \"quoted\" https://example.com/{'w' * 200}"} for number in range(1, 60)]
    write_audit(audited(evil), Storage(str(place)))
    return place / "audit.html"


def test_text_of_the_data_is_no_markup(page):
    text = page.read_text()
    assert "<script" not in text and "<img" not in text and "&lt;script&gt;" in text and "\u202e" not in text
    assert "http://" not in text.replace("http://www.w3.org", "") and len(text) < 600_000
    json.loads(page.with_name("audit.json").read_text())


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("dark", [False, True])
def test_page_in_a_browser(page, dark):
    document, complaints = look(page, dark=dark)
    assert complaints == [] and document.count("<svg") == 4 and "alert" in document
    assert document.count("<details>") == document.count("</details>") > 4
    content, window = widths(page, 360, dark)
    assert content <= window <= 360
