"""Runs of rounds side by side: success at equal steps, drift and samples, seeds as one setup, and what can be said."""

import math
import re

import pytest
from made import HOSTILE
from made_rounds import made_rounds
from test_rounds_page import readouts, tables

from raydpo.errors import ConfigError
from raydpo.reports import write_comparison
from raydpo.reports.rounds_arms import AXES, arms_of, common, course_of, statement
from raydpo.rundir.read_rounds import RoundsRecord
from raydpo.storage.files import Storage

STEPS, DRIFT, ANSWERS = AXES.values()


def made(tmp_path, name, success, *, drift=None, seed=0, errors=None, **told):
    figures = {"eval_success": success} | (told.pop("figures", {}))
    if drift:
        figures["eval_drift_initial"] = drift
    figures["eval_success_se"] = errors or [0.03] * len(success)
    figures["eval_drift_initial_se"] = [0.0] * len(success)
    settings = {"train.seed": seed} | told.pop("settings", {})
    return made_rounds(tmp_path, name, rounds=len(success) - 1, figures=figures, settings=settings, **told)


def arms(*directories):
    return arms_of([RoundsRecord.read(Storage(str(directory))) for directory in directories])


@pytest.fixture
def pair(tmp_path):
    on = made(tmp_path, "fresh", [0.2, 0.4, 0.6, 0.84], drift=[0, 0.7, 1.4, 2.1])
    off = made(tmp_path, "fixed", [0.2, 0.41, 0.65, 0.85], drift=[0, 1.0, 3.0, 6.0], settings={"offline": True})
    return on, off


def test_steps_and_answers_add_up_and_offline_rounds_sample_once(pair):
    on, off = ([vars(place) for place in arm.courses[0]] for arm in arms(*pair))
    assert [(place["round"], place["steps"], place["answers"]) for place in on] == [
        (0, 0, 0),
        (1, 8, 320),
        (2, 16, 640),
        (3, 24, 960),
    ]
    assert [(place["steps"], place["answers"]) for place in off] == [(0, 0), (8, 320), (16, 320), (24, 320)]


def test_success_is_read_at_equal_steps_drift_and_answers(pair):
    on, off = arms(*pair)
    assert (on.name, off.name) == ("fresh", "fixed (offline)")
    assert on.at(STEPS, 24).success == 0.84 and not on.at(STEPS, 24).read and on.at(STEPS, 25) is None
    middle = on.at(STEPS, 12)
    assert (middle.success, middle.error, middle.read) == (pytest.approx(0.5), pytest.approx(0.03), True)
    assert off.at(DRIFT, 2.0).success == pytest.approx((0.41 + 0.65) / 2) and on.at(DRIFT, 2.2) is None
    # Of the measurements with equal samples the last counts; between them there is none.
    assert off.at(ANSWERS, 320).success == 0.85 and on.at(ANSWERS, 320).success == 0.4
    assert on.at(ANSWERS, 500) is None and off.at(ANSWERS, 640) is None
    assert [common([on, off], axis) for axis in AXES.values()] == [24, 2.1, 320]


def test_a_drift_that_goes_back_is_read_where_it_comes_first(tmp_path):
    (arm,) = arms(made(tmp_path, "back", [0.2, 0.6, 0.5, 0.7], drift=[0, 2.0, 1.0, 3.0]))
    assert arm.at(DRIFT, 1.5).success == pytest.approx(0.5) and arm.most(DRIFT) == 3.0
    assert arm.at(DRIFT, 1.0).success == 0.5  # measured exactly


def test_the_error_of_the_drift_counts_with_the_slope(tmp_path):
    directory = made_rounds(
        tmp_path,
        "sums",
        rounds=1,
        figures={
            "eval_success": [0.2, 0.6],
            "eval_success_se": [0.03, 0.03],
            "eval_drift_initial": [0.0, 2.0],
            "eval_drift_initial_se": [0.0, 0.2],
        },
    )
    (arm,) = arms(directory)
    assert arm.at(DRIFT, 1.0).error == pytest.approx(math.hypot(0.03, 0.2 * 0.1))  # slope 0.2 a nat, half of the error 0.2
    assert arm.at(DRIFT, 2.0).error == pytest.approx(math.hypot(0.03, 0.2 * 0.2)) and arm.at(STEPS, 8).error == 0.03


def test_the_statement_of_two_runs(pair):
    both = arms(*pair)
    assert statement(both, STEPS) == (
        "At 24 optimizer steps: fresh 0.840 ± 0.030, fixed (offline) 0.850 ± 0.030: no difference can be seen."
    )
    # 0.41 + 0.24 * 1.1 / 2 = 0.542
    assert statement(both, DRIFT) == (
        "At 2.1 nats of drift from the initial model: fresh 0.840 ± 0.030, fixed (offline) 0.542 ± 0.030: fresh is above "
        "fixed (offline) by 0.298 ± 0.042."
    )
    assert statement(both, ANSWERS).startswith(
        "At 320 sampled answers: fresh 0.400 ± 0.030, fixed (offline) 0.850 ± 0.030: fixed"
    )


@pytest.mark.parametrize(("other", "seen"), [(0.5 + 0.084, False), (0.5 + 0.086, True)])
def test_a_difference_counts_from_two_combined_standard_errors(tmp_path, other, seen):
    both = arms(made(tmp_path, "a", [0.2, 0.5]), made(tmp_path, "b", [0.2, other], settings={"count": 9}))
    assert ("no difference can be seen" in statement(both, STEPS)) != seen  # 2 * sqrt(2) * 0.03 = 0.0849


def test_runs_that_differ_in_seeds_are_one_setup(tmp_path):
    on = [made(tmp_path, f"fresh-seed{seed}", [0.2, 0.4, last], seed=seed) for seed, last in enumerate((0.80, 0.84, 0.88))]
    off = [
        made(tmp_path, f"fixed-{seed}", [0.2, 0.4, last], seed=seed, settings={"offline": True})
        for seed, last in enumerate((0.70, 0.78, 0.80))
    ]
    both = arms(*on, *off)
    assert [arm.name for arm in both] == ["fresh (3 seeds)", "fixed (offline, 3 seeds)"]
    value = both[0].at(STEPS, 16)
    assert (value.success, value.error, value.runs) == (pytest.approx(0.84), pytest.approx(0.04 / math.sqrt(3)), 3)
    assert both[0].course[-1].success == pytest.approx(0.84) and both[0].course[-1].success_error == value.error
    # 0.08 is 2.07 combined standard errors, but errors over three seeds need Student's bound: 3.18 at 3 degrees of freedom.
    assert "no difference can be seen" in statement(both, STEPS)
    assert "is above" in statement(
        arms(*on, *(made(tmp_path, f"b{n}", [0.2, 0.4, 0.5 + 0.04 * n], seed=n, step=9) for n in range(3))), STEPS
    )


def test_a_run_of_equal_seeds_is_no_further_seed(tmp_path):
    twice = [made(tmp_path, name, [0.2, 0.5]) for name in ("a", "b")]
    assert [arm.name for arm in arms(*twice)] == ["a", "b"]


def test_seeds_that_do_not_reach_a_place_are_told(tmp_path):
    directories = [
        made(tmp_path, f"s{seed}", [0.2, 0.5, 0.6], drift=[0, 1.0, far], seed=seed) for seed, far in enumerate((1.5, 3.0))
    ]
    other = made(tmp_path, "other", [0.2, 0.5, 0.6], drift=[0, 1.0, 6.0], settings={"train.beta": 0.5})
    write_comparison([str(one) for one in (*directories, other)], tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    drift = page.partition("<h2>At equal drift")[2].partition("</section>")[0]
    assert "(1 of 2 seeds)" not in drift and "reaches 1.5" in drift  # the farthest is where both seeds are
    assert arms(*directories)[0].at(DRIFT, 2.0).runs == 1


def test_what_cannot_be_compared_is_told(tmp_path):
    bare = made(tmp_path, "hot", [0.2, 0.5], figures={"eval_drift_initial": [0.0, None]}, settings={"count": 4})
    other = made(tmp_path, "cool", [0.2, 0.5])
    both = arms(bare, other)
    assert (
        statement(both, DRIFT) == "Success cannot be compared at equal nats of drift from the initial model: hot has none."
    )
    unknown = made(tmp_path, "few", [0.2, 0.9], figures={}, settings={"count": 3}, errors=[None, None])
    assert "whether few and cool differ is not known" in statement(arms(unknown, other), STEPS)


def test_three_runs(tmp_path):
    three = arms(
        *(
            made(tmp_path, name, [0.2, last], settings={"count": n + 2})
            for n, (name, last) in enumerate((("a", 0.5), ("b", 0.52), ("c", 0.9)))
        )
    )
    assert statement(three, STEPS).endswith(
        "c is above a by 0.400 ± 0.042; c is above b by 0.380 ± 0.042; no difference can be seen between the others."
    )


def test_the_page(pair, tmp_path):
    write_comparison([str(one) for one in pair], tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    found = tables(page)
    heads, steps = found["Success at equal optimizer steps"]
    assert heads == ["steps", "fresh", "fixed (offline)"]
    assert steps == {"0": [0.2, 0.2], "8": [0.4, 0.41], "16": [0.6, 0.65], "24": [0.84, 0.85]}
    drift = found["Success at equal nats of drift from the initial model"][1]
    assert (
        list(drift) == ["0", "0.525", "1.05", "1.58", "2.1", "6"] and drift["6"] == [None, 0.85] and ">reaches 2.1<" in page
    )
    assert drift["2.1"][1] == pytest.approx(0.542)
    answers = found["Success at equal sampled answers"][1]
    assert answers == {"0": [0.2, 0.2], "320": [0.4, 0.85], "640": [0.6, None], "960": [0.84, None]}
    runs = found["All runs"][1]
    assert runs["fixed"][1:7] == [3, 24, 320, 0.85, 6.0, 9.25] and runs["fresh"][3] == 960
    curves = readouts(page)["Success and steps"]
    assert curves["unit"] == "step" and curves["curves"][0]["x"] == [0, 8, 16, 24] and curves["curves"][0]["e"] == [0.03] * 4
    said = re.findall(r'data-mark="arm-1-3"[^>]*aria-label="([^"]+)"', page)
    assert said[0].startswith("fixed (offline), round 3: success 0.850 ± 0.030 at 6 nats")
    assert "rounds.offline" in page and "not measured alike" not in page


def test_success_that_is_measured_otherwise_is_told(tmp_path):
    one = made(tmp_path, "a", [0.2, 0.5])
    other = made(tmp_path, "b", [0.2, 0.5], settings={"cut": "keep", "model.path": "org/other"})
    write_comparison([str(one), str(other)], tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    assert "Success is not measured alike: rounds.cut differ" in page and "begin with different models" in page
    assert "different held-out prompts" not in page


def test_names_are_escaped_and_one_run_is_refused(tmp_path):
    one, other = made(tmp_path, "a", [0.2, 0.5], stopped=HOSTILE), made(tmp_path, "b", [0.2, 0.5])
    write_comparison([str(one), str(other)], tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    assert "<img" not in page and "&lt;script&gt;alert(1)" in page
    with pytest.raises(ConfigError, match=r"hold 1 run"):
        write_comparison([str(one)], tmp_path / "out.html")


def test_a_run_under_way(tmp_path):
    directory = made(tmp_path, "a", [0.2, 0.5])
    (directory / "rounds.parquet").unlink()
    other = made(tmp_path, "b", [0.2, 0.5])
    write_comparison([str(directory), str(other)], tmp_path / "out.html")
    assert "cannot be compared at equal optimizer steps: a has none" in (tmp_path / "out.html").read_text()
    assert course_of(RoundsRecord.read(Storage(str(directory)))) == []
