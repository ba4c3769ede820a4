"""Which trial of a sweep is recommended, by which figures, and what is not compared."""

import json

import pytest
from made import made_evaluation, made_sweep, made_trials, write_sweep

from raydpo.data.interval import Z95, share_error
from raydpo.reports.frontier import (
    Axis,
    Point,
    drift_axis,
    frontier_pictures,
    length_axis,
    measured_otherwise,
    points_of,
    recommend,
    unbeaten,
    units_of_margin,
)
from raydpo.reports.sweep import recommendation_of, sweep_page
from raydpo.rundir.read import SweepRecord
from raydpo.storage.files import Storage


def read(directory):
    return SweepRecord.read(Storage(str(directory)))


def point(number, accuracy, drift, error=0.02, beta=None):
    low = None if accuracy is None else accuracy - Z95 * error
    return Point(
        f"trial-{number}", f"t{number}", f"beta {beta}", True, beta, accuracy, error, low, None, None, drift, None, None
    )


DRIFT = Axis("drift", lambda one: one.moved)


def test_recommended_is_the_least_drift_within_one_standard_error_of_the_best():
    points = [
        point(0, 0.80, 0.5, beta=0.01),
        point(1, 0.79, 0.2, beta=0.05),
        point(2, 0.785, 0.1, beta=0.1),
        point(3, 0.77, 0.01, beta=1.0),
    ]
    taken = recommend(points, DRIFT)
    assert taken.point is points[2] and "within one standard error (0.020) of the best, 0.800" in taken.reason
    assert recommend([points[0], points[3]], DRIFT).point is points[0]
    assert recommend(points[:1], DRIFT).point is None
    # Equal drift: the larger beta. Equal accuracy of the best: the one that drifts less.
    assert recommend([point(0, 0.8, 0.1, beta=0.1), point(1, 0.8, 0.1, beta=0.2)], DRIFT).point.beta == 0.2
    assert recommend([], DRIFT).point is None
    assert recommend([point(0, 0.8, None)], DRIFT).point is None
    assert "1 trial(s) lack" in recommend([*points, point(4, 0.9, None)], DRIFT).reason


def test_the_line_joins_the_trials_that_no_other_beats():
    points = [point(0, 0.6, 0.1), point(1, 0.5, 0.2), point(2, 0.7, 0.3), point(3, 0.7, 0.4)]
    assert [one.name for one in unbeaten(points, DRIFT, Axis("accuracy", lambda one: one.accuracy))] == ["t0", "t2"]


def test_what_has_learnt_nothing_is_not_recommended():
    """With 100 pairs these accuracies are within chance of 0.5. Such trials drift least, because they have not learnt."""
    points = [
        point(number, accuracy, drift, error=share_error(accuracy, 100), beta=beta)
        for number, (accuracy, drift, beta) in enumerate([(0.5, 0.0, 1.0), (0.53, 0.02, 0.3), (0.545, 0.1, 0.1)])
    ]
    taken = recommend(points, DRIFT)
    assert taken.point is None and "better than a coin by more than chance" in taken.reason and "0.545" in taken.reason
    # Beside one that has learnt, those that have not drop out, though they are within one standard error of it.
    better = point(3, 0.62, 0.4, error=share_error(0.62, 100), beta=0.05)
    near = point(4, 0.575, 0.0, error=share_error(0.575, 100), beta=1.0)
    taken = recommend([*points, better, near], DRIFT)
    assert near.accuracy > better.accuracy - better.error and near.accuracy - 0.5 < Z95 * near.error
    assert taken.point is better and "4 trial(s) are not better than a coin" in taken.reason


def test_accuracies_of_other_pairs_do_not_compare():
    points = [point(0, 0.8, 0.5), point(1, 0.6, 0.1)]
    apart = [Point(**vars(one) | {"held_out": digest}) for one, digest in zip(points, ("a", "b"), strict=True)]
    assert recommend(points, DRIFT).point is points[0]
    taken = recommend(apart, DRIFT)
    assert taken.point is None and "different held-out pairs" in taken.reason
    assert frontier_pictures(apart, None) == [] and len(frontier_pictures(points, None)) == 1


def masked(tmp_path, *settings, digests=None, measured=False):
    """A sweep whose trials train on what ``settings`` of section data say; and its page."""
    trials = made_trials(
        tmp_path,
        {f"t{number}": ({"data.train_on": each["train_on"]}, {"data": each}) for number, each in enumerate(settings)},
    )
    for trial, digest in zip(trials, digests or [None] * len(trials), strict=True):
        (tmp_path / trial["name"] / "run.json").write_text(json.dumps({"held_out": digest}))
        trial["evaluation"] = made_evaluation() | {"protocol": {"pairs": "p", "counted": digest}} if measured else None
    write_sweep(tmp_path, trials)
    return read(tmp_path), sweep_page(read(tmp_path))


ANSWER, ALL = {"train_on": "answer"}, {"train_on": "completion"}
WEIGHTED = {"train_on": [{"answer": 1.0}, {"reasoning": 0.1}]}
YARDSTICK = {"eval": {"fraction": 0.1, "train_on": "completion"}}


@pytest.mark.parametrize("digests", [None, ("a", "b", "c")])
def test_accuracies_of_other_tokens_do_not_compare(digests, tmp_path):
    """Each trial is measured on the tokens that it trains on."""
    sweep, page = masked(tmp_path, ANSWER, ALL, WEIGHTED, digests=digests)
    taken = recommendation_of(sweep)
    assert taken.point is None and "different tokens of the held-out pairs (answer; completion; answer + 0.1" in taken.reason
    assert "data.eval.train_on=completion" in taken.reason and frontier_pictures(points_of(sweep), None) == []
    assert "on the same held-out pairs." not in page
    assert ">measured on</button>" in page and page.count(">answer + 0.1 reasoning</td>") == 2, (
        "the setting, and what is measured"
    )
    assert "The KL divergence compares" not in page


def test_what_counts_in_held_out_pairs_is_one_yardstick(tmp_path):
    """The digests of pairs and of what counts in them are equal."""
    sweep, page = masked(tmp_path, ANSWER | YARDSTICK, ALL | YARDSTICK, WEIGHTED | YARDSTICK, digests=["a"] * 3)
    assert recommendation_of(sweep).point is not None and len(frontier_pictures(points_of(sweep), None)) == 4
    assert (
        "on the same held-out pairs, and on the same tokens of them (completion)." in page
        and ">measured on</button>" not in page
    )
    assert page.count(">answer + 0.1 reasoning</td>") == 1
    partial = {"eval": {"fraction": 0.1, "train_on": "last_turn"}}
    (tmp_path / "more").mkdir()
    _, page = masked(tmp_path / "more", ANSWER | partial, ALL | partial, digests=["a"] * 2)
    assert "on the same held-out pairs, and on the same tokens of them (last_turn)." in page


def test_parts_that_are_the_same_tokens_compare(tmp_path):
    """In answers without reasoning, ``answer`` and ``assistant`` are one. The digest tells."""
    sweep, page = masked(tmp_path, ANSWER, {"train_on": "assistant"}, digests=["a"] * 2)
    assert recommendation_of(sweep).point is not None and ">measured on</button>" not in page


def test_drift_on_whole_answers_compares_whatever_counts(tmp_path):
    sweep, page = masked(tmp_path, ANSWER, ALL, digests=("a", "b"), measured=True)
    assert drift_axis(points_of(sweep)).measured and recommendation_of(sweep).point is None
    assert "The KL divergence compares" in page


def test_all_right_of_twenty_is_no_certainty(tmp_path):
    """20 of 20 at a drift of 5, 19 of 20 at 0.01: the error of a share of 1 is not 0."""
    trials = made_trials(
        tmp_path, {name: ({"train.lr": lr}, {"lr": lr, "held_out": 20}) for name, lr in (("far", 1e-5), ("near", 1e-6))}
    )
    for trial, accuracy, drift in zip(trials, (1.0, 0.95), (5.0, 0.01), strict=True):
        trial["eval"] |= {
            "eval_rewards/accuracies": accuracy,
            "eval_logratio/chosen_per_token": drift,
            "eval_logratio/rejected_per_token": -drift,
        }
    write_sweep(tmp_path, trials)
    taken = recommendation_of(read(tmp_path))
    assert taken.point.name == "near" and points_of(read(tmp_path))[0].error == pytest.approx(share_error(1.0, 20))


@pytest.mark.parametrize(("held_out", "learnt"), [(1, False), (3, False), (4, True), (40, True)])
def test_a_few_pairs_prove_nothing(held_out, learnt, tmp_path):
    """Both trials rank all held-out pairs right. A coin does that with one pair in every second trial, with three in
    every eighth."""
    trials = made_trials(
        tmp_path, {name: ({"train.lr": lr}, {"lr": lr, "held_out": held_out}) for name, lr in (("a", 1e-5), ("b", 1e-6))}
    )
    for trial in trials:
        trial["eval"] |= {"eval_rewards/accuracies": 1.0}
    write_sweep(tmp_path, trials)
    taken = recommendation_of(read(tmp_path))
    assert (taken.point is not None) == learnt, taken.reason
    assert learnt or "No trial is better than a coin by more than chance" in taken.reason


def test_pairs_that_share_prompts_count_as_fewer(tmp_path):
    trials = made_trials(tmp_path, {"a": ({"train.lr": 1e-6}, {"lr": 1e-6}), "b": ({"train.lr": 1e-5}, {"lr": 1e-5})})
    trials[1]["eval"] |= {"eval_effective_pairs": 100.0}
    write_sweep(tmp_path, trials)
    points = points_of(read(tmp_path))
    assert [one.error for one in points] == [
        pytest.approx(share_error(one.accuracy, pairs)) for one, pairs in zip(points, (400, 100), strict=True)
    ]


def test_an_evaluation_of_one_trial_leaves_the_others_comparable(tmp_path):
    directory = made_sweep(tmp_path, steps=20)
    before = recommendation_of(read(directory))
    assert before.point is not None
    place = directory / before.point.name / "evaluation.json"
    place.write_text(json.dumps(made_evaluation(before.point.beta)))
    after, points = recommendation_of(read(directory)), [one for one in points_of(read(directory)) if one.done]
    assert after.point.name == before.point.name and after.reason == before.reason
    assert not drift_axis(points).measured and not length_axis(points).measured
    others = [one.name for one in points if one.name != before.point.name]
    assert [one.name for one in measured_otherwise(points)] == others
    page = sweep_page(read(directory))
    assert f"settings of section evaluate: {'; '.join(others)}" in page and page.count('class="mark"') == 20


def test_drift_by_other_settings_of_the_evaluation_is_not_on_one_axis(tmp_path):
    directory = made_sweep(tmp_path, (0.03, 0.1, 0.3), measured=True, steps=20)
    tree = json.loads((directory / "sweep.json").read_text())

    def axis_of(*protocols):
        for trial, protocol in zip(tree["trials"], protocols, strict=False):
            trial["evaluation"] |= {"protocol": {"max_tokens": 128, "pairs": "abc"} | protocol}
        (directory / "sweep.json").write_text(json.dumps(tree))
        points = [one for one in points_of(read(directory)) if one.done]
        return drift_axis(points).measured, [one.name for one in measured_otherwise(points)]

    assert axis_of({}, {}, {}) == (True, [])
    assert axis_of({}, {}, {"judge": {"model": "x"}}) == (True, []), "a judge does not change the answers"
    assert axis_of({}, {}, {"max_tokens": 512}) == (False, ["beta0.3"])
    assert axis_of({}, {"pairs": "other"}, {"max_tokens": 512})[0] is False


def test_without_log_probs_the_trials_that_are_measured_alike_compare():
    """No held-out pairs while training: evaluations of evaluate.data alone."""
    points = [
        Point(
            f"trial-{number}",
            f"t{number}",
            "",
            True,
            0.1,
            accuracy,
            0.02,
            accuracy - 0.04,
            None,
            kl,
            None,
            None,
            None,
            protocol=protocol,
        )
        for number, (accuracy, kl, protocol) in enumerate(
            [(0.8, 0.3, "a"), (0.79, 0.1, "a"), (0.79, 0.01, "b"), (0.7, None, None)]
        )
    ]
    axis = drift_axis(points)
    assert axis.measured and [axis.read(one) for one in points] == [0.3, 0.1, None, None]
    assert recommend(points, axis).point is points[1]


def test_a_sweep_over_schedules_of_beta_has_a_page(tmp_path):
    """The last evaluation uses the end of the schedule. If a trial stopped earlier, its beta is unknown."""
    schedule = {"start": 0.2, "end": 0.05, "schedule": "linear"}
    trials = made_trials(
        tmp_path, {"moves": ({"train.beta": schedule}, {"beta": schedule}), "stays": ({"train.beta": 0.1}, {"beta": 0.1})}
    )
    write_sweep(tmp_path, [*trials, trials[0] | {"status": "stopped"}])
    points = points_of(read(tmp_path))
    assert [(one.label, one.beta) for one in points] == [("beta 0.2-0.05", 0.05), ("beta 0.1", 0.1), ("beta 0.2-0.05", None)]
    assert points[0].margin == pytest.approx(trials[0]["eval"]["eval_rewards/margins"] / 0.05) and points[2].margin is None
    page = sweep_page(read(tmp_path))
    assert ">0.2-0.05</td>" in page and "{&#39;start" not in page and page.count('class="mark"') == 8


@pytest.mark.parametrize(
    ("losses", "units"),
    [
        (("sigmoid", "hinge"), ["nats"]),
        (("sigmoid_norm", "ipo"), ["nats a token"]),
        (("sigmoid", "sigmoid_norm"), ["nats", "nats a token"]),
        (("sigmoid", "cpo"), ["nats", "nats without a reference"]),
    ],
)
def test_margins_of_different_units_are_not_on_one_axis(losses, units, tmp_path):
    write_sweep(tmp_path, made_trials(tmp_path, {loss: ({"train.loss": loss}, {"loss": loss}) for loss in losses}))
    points = points_of(read(tmp_path))
    assert units_of_margin(points) == units
    titles = [picture.title for picture in frontier_pictures(points, None)]
    assert titles == (
        ["Accuracy and drift", "Margin and drift", "Accuracy and length", "Margin and length"]
        if len(units) == 1
        else ["Accuracy and drift", "Accuracy and length"]
    )
    page = sweep_page(read(tmp_path))
    assert f"margin / beta, {units[0]} " in page if len(units) == 1 else "Margins are left out" in page
    assert (f"{points[1].margin:.2f} {units[-1]}</td>" in page) == (len(units) > 1)


def test_the_recommended_trial_is_among_the_curves_that_are_drawn(tmp_path):
    """16 of 18 trials are drawn."""
    trials = made_trials(
        tmp_path, {f"t{number:02}": ({"train.lr": number * 1e-7}, {"lr": number * 1e-7}) for number in range(1, 19)}, steps=6
    )
    for number, trial in enumerate(trials):
        trial["eval"]["eval_rewards/accuracies"] = 0.9 if number == 17 else 0.7
    write_sweep(tmp_path, trials)
    page = sweep_page(read(tmp_path))
    assert "The curves of 16 of 18 trials are drawn, the recommended one among them" in page
    drawn = page.partition("<h2>Curves</h2>")[2]
    assert "t18" in drawn and "t15" in drawn and "t16" not in drawn and "t17" not in drawn
    write_sweep(tmp_path, trials[:16])
    assert "trials are drawn" not in sweep_page(read(tmp_path))


def test_the_best_is_one_that_has_learnt():
    """A trial with few independent pairs may be ahead by chance."""
    ahead, learnt = point(0, 0.6, 0.1, error=0.06), point(1, 0.52, 0.2, error=0.005)
    taken = recommend([ahead, learnt], DRIFT)
    assert taken.point is learnt and "1 trial(s) are not better than a coin" in taken.reason


def test_accuracies_of_evaluations_on_other_pairs_do_not_compare(tmp_path):
    """Without held-out pairs in training, the accuracy is that of ``raydpo eval``."""
    trials = made_trials(
        tmp_path, {name: ({"data.max_length": length}, {}) for name, length in (("long", 512), ("short", 64))}
    )
    for trial, pairs in zip(trials, ("a", "b"), strict=True):
        trial["eval"] = {}
        found = made_evaluation() | {"protocol": {"pairs": pairs}}
        (tmp_path / trial["name"] / "evaluation.json").write_text(json.dumps(found))
    write_sweep(tmp_path, trials)
    assert [one.held_out for one in points_of(read(tmp_path))] == ["a", "b"]
    assert frontier_pictures(points_of(read(tmp_path)), None) == []


def test_labels_are_compared_by_the_area_under_the_curve(tmp_path):
    """Where nine of ten labels are desirable, the accuracy of a policy that raises everything is 0.9."""
    from raydpo.rundir.read import TrialRecord

    scores = {"rewards/accuracies": 0.9, "effective_pairs": 400.0, "rewards/auc": 0.61, "effective_labels": 150.0}
    moved = {f"logratio/{side}_per_token": 0.1 for side in ("chosen", "rejected")}
    trials = [
        TrialRecord(f"beta={beta}", {"train.beta": beta}, "done", None, 1.0, scores | moved | more, None, None)
        for beta, more in ((0.1, {}), (0.2, {"rewards/auc": 0.5, "rewards/accuracies": 0.95}))
    ]
    points = points_of(SweepRecord("here", "betas", ["train.beta"], {}, trials))
    assert [point.accuracy for point in points] == [0.61, 0.5] and points[0].error == pytest.approx(0.0394, abs=1e-3)
    found = recommend(points, drift_axis(points))
    assert found.point.name == "beta=0.1" and "area under the ROC curve" in found.reason
