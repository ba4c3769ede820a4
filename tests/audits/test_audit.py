"""The figures of an audit by hand, its advice, and its page in a browser."""

import json
import math

import numpy as np
import polars as pl
import pytest
from browser import BROWSER, look, widths
from kernel import tokenised, weighted
from tiny import make_tokenizer, preferences

from raydpo.audits import audit_pairs, draw, summary_lines, write_audit
from raydpo.audits.advice import advise
from raydpo.audits.measure import figures, separation, signed
from raydpo.config import ObjectiveConfig
from raydpo.config.filter import PairFilter
from raydpo.data.facts import pair_facts
from raydpo.data.filter import pairs_to_keep
from raydpo.data.ragged import digests
from raydpo.pages.text import shown
from raydpo.storage.files import Storage

META = {"name": "test", "model": "tiny", "raydpo": "0", "identity": "0" * 32, "cache": "cache"}


def audited(records, chosen=None, rejected=None, max_length=512, seed=0, weigh=None, counted=None):
    """An audit of text records; without values, the reference gives every token -1 nat and a little noise.

    Args:
        weigh: as of ``kernel.weighted``; None = all tokens count. counted: in words.
    """
    table = tokenised(records, max_length=max_length)
    table = table if weigh is None else weighted(table, weigh)
    facts = pair_facts(table)
    noise = np.random.default_rng(seed).normal(0, 0.05, (2, len(records)))
    sums = [
        given if given is not None else -facts[f"{side}_tokens"].to_numpy() * (1 + each)
        for side, given, each in (("chosen", chosen, noise[0]), ("rejected", rejected, noise[1]))
    ]
    decode = make_tokenizer().batch_decode
    scores = {"tiny": {"reversed": 3, "tied": 1, "compared": 1234, "columns": ["score_chosen", "<b>score_rejected"]}}
    sample = draw(digests(table["prompt_ids"]), 0)
    about = {"meta": META | {"counted": counted}, "identical": {"tiny": 2}, "scores": scores}
    return audit_pairs(pair_facts(table, *sums), table, decode, sample, **about)


def test_a_median_between_two_numbers_is_not_rounded_to_zero():
    assert [signed(median) for median in (-0.5, 2.5, -4.0, 0.0, 1200.0)] == ["-0.5", "+2.5", "-4", "+0", "+1,200"]


def frame(difference, margin, chosen_tokens=50):
    """Facts with these length differences and margins and nothing else of note."""
    difference, margin = np.array(difference), np.array(margin, float)
    rejected = chosen_tokens - difference
    columns = {
        "length_difference": difference,
        "rejected_tokens": rejected,
        "chosen_tokens": np.full(len(margin), chosen_tokens),
        "prompt_tokens": np.full(len(margin), 9),
        "ref_margin": margin,
        "ref_chosen_logps": margin - 100.0,
        "ref_rejected_logps": np.full(len(margin), -100.0),
        "ref_chosen_per_token": (margin - 100) / chosen_tokens,
        "ref_rejected_per_token": -100.0 / rejected,
    }
    zero = np.zeros(len(margin), np.int64)
    one = zero + 1
    return pl.DataFrame(
        columns
        | {
            "label": zero,
            "copy": zero,
            "copies": one,
            "prompt_pairs": one,
            "answer_pairs": one,
            **dict.fromkeys(("chosen_cut", "rejected_cut", "chosen_uncounted", "rejected_uncounted"), zero),
            "chosen_weights": columns["chosen_tokens"],
            "rejected_weights": columns["rejected_tokens"],
            "opposites": zero,
            "contradictory": zero.astype(bool),
            "prompt": np.arange(len(margin)),
        }
    )


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


def test_a_beta_is_written_as_people_write_it():
    assert [ObjectiveConfig(beta=0.1).beta_per_token(tokens) for tokens in (25.0, 1000.0, 12345.0)] == ["2.5", "100", "1200"]


def test_separation():
    one, alone = np.random.default_rng(0).normal(size=4000), np.arange(4000)
    assert separation(one, one, alone)["share"] == pytest.approx(0.5)
    apart = separation(one[:10], one[:10] + 100, alone[:10])
    assert apart["share"] == pytest.approx(apart["high"]) == 1.0 and apart["low"] < 0.75, "ten pairs are no proof"
    # Of two unit normals 1 apart, one exceeds the other with Phi(1 / sqrt 2).
    near = separation(one, np.random.default_rng(1).normal(1, 1, 4000), alone)
    assert near["low"] < 0.760 < near["high"] and near["high"] - near["low"] < 0.03
    assert separation(one[:0], one[:0], alone[:0])["share"] is None
    # Six pairs of each of ten prompts prove no more than ten do; nor do those of a single prompt.
    assert separation(np.zeros(60), np.ones(60), np.arange(60) // 6)["low"] == pytest.approx(
        separation(np.zeros(10), np.ones(10), alone[:10])["low"]
    )
    assert separation(alone[:6], alone[:6] + 0.5, np.zeros(6))["high"] > 0.9


@pytest.mark.parametrize("pairs", [20, 100])
def test_the_same_distribution_twice_is_not_told_apart(pairs):
    """The pairs of a prompt are correlated strongly, and the two sides of a pair slightly."""
    random = np.random.default_rng(2)
    held, found = 0, []
    for _ in range(300):
        prompts = np.arange(pairs) // 2
        topic = random.normal(0, 0.5, pairs)
        one, two = (topic[prompts] + random.normal(0, 1, pairs)[prompts] + random.normal(0, 0.3, pairs) for _ in range(2))
        told = separation(one, two, prompts)
        found.append(told["share"])
        held += told["low"] <= 0.5 <= told["high"]
    assert np.mean(found) == pytest.approx(0.5, abs=0.005) and held == pytest.approx(0.95 * 300, abs=10)


def test_shares_count_prompts():
    """60 pairs that are 30 pairs twice have intervals as wide as those of 30 pairs."""
    one = frame([10, -10] * 15, [-5, 5] * 15)
    alone, double = figures(one), figures(pl.concat([one, one]))
    for name in ("chosen_longer", "rule_accuracy"):
        assert double["length"][name]["of"] == 60 and double["length"][name]["low"] == pytest.approx(
            alone["length"][name]["low"], abs=0.01
        )
    assert double["reference"]["right_by_sum"]["high"] == pytest.approx(alone["reference"]["right_by_sum"]["high"], abs=0.01)


def setting(found, title):
    return next(one.setting for one in found if one.title == title)


def test_short_answers_are_not_answers_ranked_right():
    """Tokens of both sides are equally likely: the reference ranks all pairs right by sums only because of length."""
    random = np.random.default_rng(3)
    chosen, rejected = random.integers(20, 61, 400), random.integers(150, 401, 400)
    surprise = [1 + random.normal(0, 0.05, 400) for _ in range(2)]
    table = frame(chosen - rejected, -chosen * surprise[0] + rejected * surprise[1])
    table = table.with_columns(ref_chosen_per_token=-surprise[0], ref_rejected_per_token=-surprise[1])
    told = figures(table)
    assert told["reference"]["right_by_sum"]["share"] == 1.0 and told["reference"]["right_per_token"]["share"] < 0.6
    assert "Little is left to learn" not in [one.title for one in advise(told)]
    better = figures(table.with_columns(ref_chosen_per_token=-surprise[0] + 1))
    assert "Little is left to learn" in [one.title for one in advise(better)]


@pytest.mark.parametrize(
    "margins",
    [
        np.append(np.random.default_rng(4).normal(2, 1.6, 1999), -400.0),  # a tenth of them is below -0.05 or so
        np.random.default_rng(5).normal(-300, 100, 2000),
        np.append(np.full(1999, 5.0), -151.0),
    ],
)
def test_the_filter_of_far_pairs_leaves_far_pairs_out(margins):
    told = figures(frame(np.zeros(len(margins), int), margins))
    rule = setting(advise(told), "Read the pairs that the reference ranks most wrongly")
    bound = float(rule.split("> ")[1].split('"')[0])
    dropped = margins <= bound
    assert 0 < dropped.mean() <= 0.01 and bound <= -150 and told["reference"]["far"]["pairs"] == dropped.sum()
    near = advise(figures(frame([0] * 50, np.linspace(-140, 10, 50))))
    assert not [one for one in near if one.title.startswith("Read the pairs")]


def test_a_loss_per_token_has_a_beta_of_its_own():
    """The beta of a loss per token is beta of the sums times the mean length of an answer."""
    longer = figures(frame([20] * 90 + [-20] * 10, np.zeros(100), chosen_tokens=108))
    assert setting(advise(longer), "Length-normalise") == "train: {loss: sigmoid_norm, beta: 10}"
    moving = ObjectiveConfig(beta={"start": 0.2, "end": 0.05, "schedule": "cosine"})
    assert (
        setting(advise(longer, moving), "Length-normalise")
        == "train: {loss: sigmoid_norm, beta: {start: 20, end: 5, schedule: cosine}}"
    )
    assert setting(advise(longer, ObjectiveConfig(loss="sigmoid_norm", beta=5.0)), "Watch the length") is None


def test_the_perplexity_is_of_what_is_told_beside_it():

    def told(times):
        table = frame([0] * 3 * times, [0] * 3 * times).with_columns(
            ref_chosen_per_token=pl.Series([-4.0, -4.0, -1.0] * times),
            ref_chosen_logps=pl.Series([-200.0, -200.0, -50.0] * times),
        )
        return "".join(one.found for one in advise(figures(table)) if one.title.startswith("Fine-tune"))

    assert told(16) == "", "an example of few pairs is no reason to fine-tune"
    assert "4.00 nats a token in the median, and 3.00 over all their tokens (perplexity 20)" in told(17)


def records(count, longer):
    """Make pairs of random words; the chosen answer is the longer one in the first ``longer`` pairs."""
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
    assert doubled.total["duplicates"] == 20 and 'filter: "copy = 0 or contradictory"' in str(doubled.advice)
    tokens = np.array([len(row) for row in tokenised(few)["chosen_ids"].to_pylist()])
    assert "Fine-tune on the chosen answers first" in titles(audited(few, chosen=-4.0 * tokens))
    assert "Cut less" in titles(audited(few, max_length=40))


def test_votes_are_no_contradictions():
    """Three votes for A and one for B prefer A; one vote for each is a contradiction."""
    few = records(200, 100)
    turned = [record | {"chosen": record["rejected"], "rejected": record["chosen"]} for record in few]
    votes = audited(few * 3 + turned)
    assert votes.total["contradictory"] == 800 and votes.total["contradictory_evenly"] == votes.total["duplicates"] == 0
    assert not {"Remove contradictions", "Remove copies"} & set(titles(votes))
    for even, count in ((audited(few + turned[:3]), 6), (audited(few + few[:3] + turned[:3] * 2), 12)):
        assert even.total["contradictory_evenly"] == count
        rule = PairFilter(setting(even.advice, "Remove contradictions").split('"')[1])
        assert pairs_to_keep(rule, even.frame.to_arrow()).sum() == 197


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


def test_the_audit_is_of_the_tokens_that_count(tmp_path):
    """The last two tokens of a chosen answer count, and the last three of a rejected one."""
    pairs, last = records(30, 15), {"chosen": 2, "rejected": 3}

    def weigh(side, row, tokens):
        return [0] * (tokens - last[side]) + [1] * last[side]

    audit, plain = audited(pairs, weigh=weigh, counted="answer"), audited(pairs)
    every = plain.total["counted"]
    assert (audit.total["counted"], audit.total["uncounted"]) == (30 * 5, every - 30 * 5)
    assert audit.total["length"]["difference"]["mean"] == -1 and audit.total["tokens"]["chosen"]["most"] == 2
    assert audit.total["surprise"]["chosen"]["median"] == pytest.approx(1, abs=0.1), "nats a token that counts"
    assert audit.total["surprise"]["chosen_perplexity"] == pytest.approx(math.e, abs=0.2)
    said = f"tokens that count (answer): 150 of {every:,} tokens of the completions ({150 / every:.0%}); lengths and"
    assert summary_lines(audit)[0].startswith(f"audit: {said}")
    storage = Storage(str(tmp_path))
    write_audit(audit, storage)
    page = storage.read("audit.html").decode()
    assert f"<p>T{said[1:]}" in page and f"<td>150 of {every:,}</td>" in page
    first = audit.extremes[0]["pairs"][0]
    assert (
        f"chosen 2 of {2 + first['chosen_uncounted']}, rejected 3 of {3 + first['rejected_uncounted']} tokens count;" in page
    )
    write_audit(plain, storage)
    page = storage.read("audit.html").decode()
    assert "that count" not in page and "tokens count" not in page and "that count" not in summary_lines(plain)[0]


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
    evil = [
        {
            "prompt": "p <img src=x onerror=alert(1)>",
            "chosen": f" <script>alert({number})</script></div></details>\u202e",
            "rejected": f' {"long " * number} & "quoted" https://example.com/{"w" * 200}',
        }
        for number in range(1, 60)
    ]
    write_audit(audited(evil), Storage(str(place)))
    return place / "audit.html"


def test_text_of_the_data_is_no_markup(page):
    text = page.read_text()
    assert "<script" not in text and "<img" not in text and "&lt;script&gt;" in text and "\u202e" not in text
    assert "http://" not in text.replace("http://www.w3.org", "") and len(text) < 600_000
    json.loads(page.with_name("audit.json").read_text())


def test_scores_beside_pairs_have_a_row(page):
    text = page.read_text()
    assert "<td>3, 1 of 1,234 (score_chosen, &lt;b&gt;score_rejected)</td>" in text
    assert json.loads(page.with_name("audit.json").read_text())["scores"]["tiny"]["tied"] == 1


def test_intervals_of_the_page_are_those_of_the_figures(page):
    """A share near 0 or 1 has bounds at unequal distances: one half-width would name shares below 0 % or above 100 %."""
    length = json.loads(page.with_name("audit.json").read_text())["total"]["length"]
    for name in ("chosen_longer", "rule_accuracy"):
        value = length[name]
        told = f"{value['share']:.1%} ({value['low']:.1%} to {value['high']:.1%})"
        assert told in page.read_text() and 0 <= value["low"] < value["high"] <= 1, told


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("dark", [False, True])
def test_page_in_a_browser(page, dark):
    document, complaints = look(page, dark=dark)
    assert complaints == [] and document.count("<svg") == 4 and "alert" in document
    assert document.count("<details>") == document.count("</details>") > 4
    content, window = widths(page, 360, dark)
    assert content <= window <= 360
