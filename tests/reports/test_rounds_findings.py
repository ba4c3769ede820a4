"""What the page of rounds warns of: each fault planted in the records of a healthy run is found, and nothing else is."""

import pytest
from made_rounds import made_rounds

from raydpo.reports.rounds_findings import rounds_findings, starts
from raydpo.rundir.read_rounds import RoundsRecord
from raydpo.storage.files import Storage

BRIEF = [{"use": "math"}, {"use": "regex", "pattern": "7", "weight": 0, "name": "brief"}]
HEALTHY = [0.2, 0.4, 0.6, 0.8]


def found(tmp_path, **told):
    """Title -> what was found, and what to do, of a run of three rounds with the given faults."""
    record = RoundsRecord.read(Storage(str(made_rounds(tmp_path, "sums", **told))))
    return {one.title: (one.found, one.why) for one in rounds_findings(record)}


def test_a_healthy_run_has_none(tmp_path):
    assert found(tmp_path) == {}
    assert found(tmp_path, settings={"rewards": BRIEF}, parts={"math": HEALTHY, "brief": [0.5, 0.5, 0.6, 0.6]}) == {}
    assert found(tmp_path, settings={"offline": True}, figures={"cache_hits": [None, 0, 48, 48]}) == {}


@pytest.mark.parametrize(
    ("figures", "title", "said", "advice"),
    [
        (
            {"eval_tokens": [20.1, 18.0, 15.0, 12.3]},
            "Answers have become shorter",
            "Held-out answers have 12.3 tokens on average after round 3, and had 20.1 before training (-39%).",
            "leaving things out",
        ),
        (
            {"eval_tokens": [20.0, 21.0, 22.0, 25.0]},
            "Answers have become longer",
            "Held-out answers have 25.0 tokens on average after round 3, and had 20.0 before training (+25%).",
            "pay for length",
        ),
        (
            {"eval_distinct": [0.9, 0.8, 0.6, 0.45]},
            "Answers have become alike",
            "Of the answers sampled to one held-out prompt 45% are different after round 3; before training 90% were.",
            "raise train.beta",
        ),
        (
            {"eval_distinct": [0.5, 0.5, 0.4, 0.29]},  # not half, but nearly all alike
            "Answers have become alike",
            "Of the answers sampled to one held-out prompt 29% are different after round 3; before training 50% were.",
            "raise train.beta",
        ),
        (
            {"eval_drift_initial": [0.0, 3.0, 7.0, 10.2], "eval_drift_initial_se": [0.0, 0.1, 0.2, 0.4]},
            "Far from the initial model",
            "After round 3 the drift is 10.2 ± 0.4 nats an answer.",
            "rounds.stop.drift",
        ),
        (
            {"eval_success": [0.6, 0.6, 0.5, 0.4]},
            "Reward hacking",
            "The reward of the training answers rose from 0.20 in round 1 to 0.60 in round 3, but on held-out prompts "
            "success fell from 0.60 ± 0.03 to 0.40 ± 0.03.",
            "repair what gives the reward",
        ),
        (
            {"eval_success": [0.3, 0.3, 0.31, 0.32]},
            "Better on training prompts only",
            "The success of training answers rose from 0.20 in round 1 to 0.60 in round 3, but on held-out prompts it is "
            "0.32 ± 0.03 after round 3 and was 0.30 ± 0.03 before training.",
            "Add prompts",
        ),
        (
            {"mixed": [None, 0.6, 0.3, 0.12], "success": [None, 0.05, 0.04, 0.05]}
            | {"pairs": [None, 24, 12, 9], "replayed": [None, 0, 0, 4]},
            "Few prompts teach anything",
            "In round 3 the answers to 12% of the prompts had different rewards, which made 5 pairs.",
            "Raise rounds.sample.n, use easier prompts",
        ),
        (
            {"mixed": [None, 0.6, 0.3, 0.12], "success": [None, 0.3, 0.6, 0.93]},
            "Few prompts teach anything",
            "In round 3 the answers to 12% of the prompts had different rewards, which made 24 pairs.",
            "93% of the answers succeed: use harder prompts",
        ),
        (
            {"eval_cut": [0.05, 0.08, 0.1, 0.16]},
            "More answers are cut",
            "16% of the held-out answers reach rounds.sample.max_tokens (12) without an end after round 3; before training "
            "5% did.",
            "Raise rounds.sample.max_tokens",
        ),
        (
            {"eval_cut": [0.98, 0.98, 1.0, 1.0]},
            "Most answers are cut",
            "100% of the held-out answers reach rounds.sample.max_tokens (12) without an end after round 3; before training "
            "98% did.",
            "Raise rounds.sample.max_tokens",
        ),
    ],
)
def test_a_fault_is_found_and_nothing_else(tmp_path, figures, title, said, advice):
    one = found(tmp_path, figures=figures)
    assert list(one) == [title] and one[title][0] == said and advice in one[title][1]


@pytest.mark.parametrize("cut", ["zero", "keep", "drop"])
def test_no_setting_is_advised_that_is_set(cut, tmp_path):
    (_, advice) = found(tmp_path, figures={"eval_cut": [0.05, 0.08, 0.1, 0.16]}, settings={"cut": cut})[
        "More answers are cut"
    ]
    assert advice.startswith("Raise rounds.sample.max_tokens.") and ("set rounds.cut to zero" in advice) is (cut != "zero")


@pytest.mark.parametrize(
    "figures",
    [
        {"eval_tokens": [20.0, 20.0, 20.0, 15.2]},  # -24 %
        {"eval_tokens": [20.0, 20.0, 20.0, 24.8]},
        {"eval_distinct": [0.9, 0.8, 0.6, 0.46]},
        {"eval_distinct": [0.28, 0.28, 0.28, 0.27]},  # they were alike before
        {"eval_drift_initial": [0.0, 3.0, 12.0, 9.9]},  # it came back
        {"eval_success": [0.6, 0.6, 0.55, 0.53], "success": [None, 0.6, 0.6, 0.6]},  # within two standard errors
        {"eval_success": [0.6, 0.6, 0.5, 0.4], "reward": [None, 0.6, 0.5, 0.4], "success": [None, 0.6, 0.5, 0.4]},
        {"eval_success": [0.3, 0.3, 0.31, 0.32], "success": [None, 0.3, 0.3, 0.38]},
        # Held-out prompts may have learnt as much: 0.08 with a standard error of 0.045, and training answers 0.15.
        {"eval_success": [0.3, 0.3, 0.35, 0.38], "success": [None, 0.3, 0.4, 0.45]},
        {"mixed": [None, 0.1, 0.1, 0.2]},
        {"eval_cut": [0.0, 0.0, 0.0, 0.09]},
        {"eval_cut": [0.3, 0.3, 0.3, 0.34]},
    ],
)
def test_what_is_close_to_a_fault_is_none(tmp_path, figures):
    assert found(tmp_path, figures=figures) == {}


def test_a_reward_that_is_measured_only_and_falls_is_reward_hacking(tmp_path):
    told = {"settings": {"rewards": BRIEF}}
    one = found(tmp_path, parts={"math": HEALTHY, "brief": [0.9, 0.8, 0.7, 0.61]}, **told)
    assert list(one) == ["Reward hacking"]
    assert one["Reward hacking"][0].endswith(
        "but on held-out prompts brief, which is measured only, fell from 0.90 to 0.61."
    )
    # A reward that is trained on may fall.
    weighted = [BRIEF[0], BRIEF[1] | {"weight": 0.1}]
    assert found(tmp_path, settings={"rewards": weighted}, parts={"math": HEALTHY, "brief": [0.9, 0.8, 0.7, 0.61]}) == {}


def test_a_win_rate_that_rises_while_a_measured_reward_falls_is_reward_hacking(tmp_path):
    """Duels among training answers have the mean 0.5 in every round."""
    judge = {"judge": {"url": "http://host:8000/v1", "model": "judge"}}
    told = {"settings": {"rewards": [judge, BRIEF[1]]}, "parts": {"judge": HEALTHY, "brief": [0.9, 0.8, 0.7, 0.61]}}
    flat = {"reward": [None, 0.5, 0.5, 0.5], "success": [None, 0.4, 0.4, 0.4]}
    one = found(tmp_path, figures=flat | {"eval_success": [0.5, 0.6, 0.7, 0.8]}, **told)
    assert list(one) == ["Reward hacking"]
    assert one["Reward hacking"][0] == (
        "The win rate rose from 0.50 before training to 0.80 after round 3, but on held-out prompts brief, which is "
        "measured only, fell from 0.90 to 0.61."
    )
    assert found(tmp_path, figures=flat | {"eval_success": [0.5, 0.5, 0.45, 0.42]}, **told) == {}


def test_a_fall_that_chance_explains_is_none(tmp_path, monkeypatch):
    """Prompts differ in how much the reward changed: the mean fell by 0.03 with a standard error of 0.05."""
    told = {"settings": {"rewards": BRIEF}, "parts": {"math": HEALTHY, "brief": [0.9, 0.9, 0.9, 0.87]}}
    by_prompt = {0: [0.9] * 12, 3: [0.87 + 0.18 * (-1) ** number for number in range(12)]}
    monkeypatch.setattr(
        "raydpo.reports.rounds_findings._by_prompt",
        lambda record, name, number: {bytes([place]): value for place, value in enumerate(by_prompt[number])},
    )
    assert found(tmp_path, **told) == {}
    by_prompt[3] = [0.87 + 0.02 * (-1) ** number for number in range(12)]
    assert list(found(tmp_path, **told)) == ["Reward hacking"]


def test_errors_are_counted_and_the_first_is_told(tmp_path):
    one = found(
        tmp_path,
        figures={"errors": [None, 0, 7, 1], "eval_errors": [0, 0, 2, 0]},
        errors={2: "math: ZeroDivisionError: division by zero"},
    )
    # 3 rounds of 320 answers and 4 measurements of 60 sampled and 12 greedy answers.
    assert one["Reward functions failed"][0] == (
        "On 10 of 1,248 answers a reward function failed, first in round 2: math: ZeroDivisionError: division by zero"
    )
    assert list(one) == ["Reward functions failed"]
    # Offline rounds train on the answers of the first one, which count once.
    one = found(tmp_path, settings={"offline": True}, figures={"errors": [None, 7, 7, 7], "cache_hits": [None, 0, 48, 48]})
    assert one["Reward functions failed"][0] == "On 7 of 608 answers a reward function failed, first in round 1."


def test_offline_rounds_that_score_again_are_told(tmp_path):
    one = found(tmp_path, settings={"offline": True}, figures={"cache_hits": [None, 0, 20, 48]})
    assert one["The reference scored answers again"][0] == (
        "Round 2 trains on the answers of round 1, but the cache held 20 of 48 completions."
    )
    assert found(tmp_path, settings={"offline": True, "reference": "previous"}) == {}  # nothing can hit


def test_starts_are_told_from_a_fifth_of_the_time(tmp_path):
    """A round has 90.5 s, 40 s of them in stage train."""
    one = found(tmp_path, trained_seconds=20.0)
    assert one["Starts take long"][0].startswith("22% of the time of the rounds after the start went into training stages")
    assert "Raise train.steps or rounds.per_round" in one["Starts take long"][1]
    assert found(tmp_path, trained_seconds=22.0) == {}
    record = RoundsRecord.read(Storage(str(tmp_path / "sums")))
    assert starts(record) == (pytest.approx(3 * 18.0), pytest.approx(3 * 90.5))


def test_a_moving_reference_is_told_with_the_drift(tmp_path):
    figures = {"eval_drift_initial": [0.0, 3.0, 7.0, 12.0]}
    told = found(tmp_path, figures=figures, settings={"reference": "previous"})
    assert "With rounds.reference initial" in told["Far from the initial model"][1]
    assert "With rounds.reference" not in found(tmp_path, figures=figures)["Far from the initial model"][1]


def test_one_round_alone_says_nothing_that_needs_two(tmp_path):
    assert found(tmp_path, rounds=1, figures={"reward": [None, 0.9]}) == {}
