"""Figures worked out by hand for made-up measurements, and what counts as a difference between two sides."""

import dataclasses
import json
import math

import pytest

from raydpo.benchmark.compare import Measured, best_tries, disagreements, figures, paired_ratio, whole
from raydpo.benchmark.job import Result
from raydpo.benchmark.tables import _line, how, markdown, summary_row, tables

GIB = 2**30
PAIRS, PER_STEP = 8, 2
WORKLOAD = {
    "pairs": PAIRS,
    "order": "file",
    "prompt_tokens": 80,
    "completion_tokens": 400,
    "longest": 40,
    "widths": [30, 40, 30, 40, 60, 80, 60, 80],
    "tokens": [60] * 4 + [120] * 4,
}
NAME = "8 pairs, file"


def result(steps=(), **values):
    same = {
        "step_seconds": list(steps),
        "losses": [0.6931, 0.68, 0.67, 0.66][: len(steps)],
        "chosen_logps": [-50.0] * len(steps),
        "rejected_logps": [-60.0] * len(steps),
    }
    return Result(**(same | values))


def measured(side, what, found, seconds=100.0, tree=4.0, trials=()):
    return Measured(
        side=side,
        what=what,
        pairs=PAIRS,
        order="file",
        steps=PAIRS // PER_STEP,
        pairs_per_step=PER_STEP,
        command=f"jobs/benchmark.py --parts {what}",
        date="2026-11-29T01:00:00+0000",
        seconds=seconds,
        tree_bytes=int(tree * GIB),
        load=0.1,
        result=found,
        trials=list(trials),
    )


REFERENCE = {"ref_chosen": [-100.0] * PAIRS, "ref_rejected": [-200.0] * PAIRS}


def of_trl(what, batch, steps, seconds=100.0, reference=8.0, recompute=False, pairs=PAIRS, gib=4.0):
    facts = {"batch": batch, "reference_batch": batch, "recompute": recompute, "positions": 1000, "fused": True}
    facts |= {"forward_passes": 8 // batch, "largest_pass": 80 * batch}
    scored = {name: values[:pairs] for name, values in REFERENCE.items()}
    found = result(steps, reference_seconds=reference, facts=facts, peak_bytes=gib * GIB, **scored)
    return measured("trl", what, found, seconds, gib)


def of_raydpo(what, steps, seconds=50.0, **values):
    facts = {"phases": {"read": 5.0, "first step": 20.0}, "startup_seconds": {"ray": 4.0}, "largest_pass": 100} | values.pop(
        "facts", {}
    )
    return measured("raydpo", what, result(steps, peak_bytes=2 * GIB, facts=facts, **values), seconds, 3.0)


def by_key(*all_of_them):
    return {each.key: each for each in all_of_them}


@pytest.fixture
def found():
    return by_key(
        of_trl("try", 1, [9.0, 4.0, 4.0], reference=9.0, gib=2.0),
        of_trl("try", 2, [9.0, 8.0, 8.0], reference=7.0, gib=8.0),
        of_trl("try", 1, [9.0, 5.0, 5.0], reference=9.0, recompute=True, gib=1.0),
        measured("kernel", "score", result(reference_seconds=1.0, **REFERENCE)),
        measured("kernel", "train", result([1.0, 1.0, 2.0, 2.0])),
        of_raydpo("score", [], reference_seconds=2.0),
        of_raydpo("train", [3.0, 2.0, 2.0, 4.0]),
        of_raydpo("run", [3.0, 2.0, 2.0, 4.0], seconds=60.0),
        of_trl("run", 1, [9.0, 4.0, 8.0, 12.0], seconds=120.0),
    )


@pytest.fixture
def record(found):
    settings = {"model": "models/small", "dtype": "float32", "lora": 16, "pairs_per_step": 2, "max_length": 64}
    return {
        "baseline": "TRL 1.16.0",
        "machine": "a processor, 2 cores",
        "versions": {"torch": "2.13"},
        "settings": settings,
        "workloads": {NAME: WORKLOAD},
        "measured": {key: dataclasses.asdict(each) for key, each in found.items()},
        "figures": figures(found, {NAME: WORKLOAD}, exact=True),
    }


def test_ratios_are_those_of_the_commands_with_ray_against_trls_fastest(found):
    assert [each.result.facts["batch"] for each in best_tries(each for each in found.values() if each.what == "try")] == [
        1,
        2,
    ]
    (point,) = figures(found, {NAME: WORKLOAD}, exact=True)["points"]
    assert point["step"]["ratio"] == paired_ratio([9.0, 4.0, 8.0, 12.0], [3.0, 2.0, 2.0, 4.0]) == 3.0
    assert point["step"]["over_kernel"] == 2.0 and point["step"]["kernel"]["seconds"] == 2.0
    assert point["reference"]["ratio"] == 8.0 / 2.0
    assert point["job"] == {
        "raydpo": {
            "seconds": 60.0,
            "extrapolated": 0,
            "phases": {"read": 5.0, "first step": 20.0},
            "startup_seconds": {"ray": 4.0},
        },
        "trl": {"seconds": 120.0, "extrapolated": 0, "measured_steps": 4},
        "ratio": 2.0,
    }
    assert point["commands"]["train"]["phases"]["first step"] == 20.0


def test_a_measurement_is_the_same_after_json(found):
    again = {key: Measured.read(dataclasses.asdict(each)) for key, each in found.items()}
    assert again == found and all(each.key == key for key, each in again.items()) and len(found) == 9


def test_what_was_not_measured_is_in_proportion_to_positions_and_marked(found, record):
    # Two of four steps: 2 * (40 + 40) padded positions a step of a batch of two, then twice as many.
    trl = of_trl("run", 2, [9.0, 4.0], seconds=120.0, reference=10.0, pairs=4)
    assert whole(trl, WORKLOAD).seconds == 120.0 + 2 * 10.0 + 2 * 2 * 4.0 and whole(trl, WORKLOAD).extrapolated == 2
    one_at_a_time = of_trl("run", 1, [9.0, 4.0], seconds=120.0, reference=10.0, pairs=4)
    assert whole(one_at_a_time, WORKLOAD).seconds == 120.0 + 2 * 10.0 + 2 * 2 * 4.0
    ours = of_raydpo("run", [3.0, 2.0], seconds=60.0)
    assert whole(ours, WORKLOAD).seconds == 60.0 + 2 * 2 * 2.0, "all pairs were scored"
    assert whole(found["raydpo run, 8 pairs, file"], WORKLOAD).extrapolated == 0

    assert not any("~" in cell for table in tables(record) for row in table.rows for cell in row)
    assert not any("extrapolated" in line for line in how(record))
    found |= by_key(trl)
    shown = record | {"figures": figures(found, {NAME: WORKLOAD}, exact=True)}
    (job,) = (table for table in tables(shown) if table.title == "Whole job")
    assert job.rows == [(NAME, "60.0 s", "~156 s", "2.60")] and "2 of TRL's steps measured" in job.remark
    (reference,) = (table for table in tables(shown) if table.title.startswith("Reference"))
    assert reference.rows[0][-2].startswith("~")
    assert "~: extrapolated" in markdown(shown) and "~156 s" in summary_row(shown)


def test_a_sweep_is_compared_with_five_runs_of_trl(found):
    trials = [result([3.0, 2.0]) for _ in range(5)]
    found |= by_key(
        measured("raydpo", "sweep", result(facts={"at_once": 2, "phases": {}}), 200.0, trials=trials),
        of_trl("again", 1, [9.0, 4.0, 8.0, 12.0], seconds=80.0, reference=0.1),
    )
    (point,) = figures(found, {NAME: WORKLOAD}, exact=True)["points"]
    # Three rounds of two trials at a time, each with two more steps of twice the tokens.
    assert point["sweep"]["raydpo"]["seconds"] == 200.0 + 3 * 2 * 2 * 2.0 and point["sweep"]["raydpo"]["extrapolated"] == 10
    assert point["sweep"]["trl"]["seconds"] == 120.0 + 4 * 80.0 and point["sweep"]["trl_reuses_reference"]
    trials[1].losses[1] = 0.71
    (problem,) = figures(found, {NAME: WORKLOAD}, exact=True)["problems"]
    assert "loss of step 2 is 0.71 with raydpo (sweep) and 0.68 with trl (again)" in problem


def test_memory_is_compared_at_positions_alike_and_at_each_sides_best(found, record):
    alike, best = figures(found, {NAME: WORKLOAD}, exact=True)["memory"]
    assert (alike["trl"]["batch"], alike["trl"]["largest_pass"], alike["raydpo"]["largest_pass"]) == (1, 80, 100)
    assert alike["share_peak_bytes"] == 2 / 2 and alike["share_tree_bytes"] == 3 / 2
    assert best["trl"]["batch"] == 1
    found["raydpo train, 8 pairs, file"].result.facts["largest_pass"] = 200
    alike, best = figures(found, {NAME: WORKLOAD}, exact=True)["memory"]
    assert (alike["trl"]["batch"], best["trl"]["batch"]) == (2, 1)
    (shown,) = (table for table in tables(record) if table.title == "Peak memory")
    assert [row[2:4] for row in shown.rows[:2]] == [("100", "no"), ("80", "no")]
    side = record["figures"]["memory"][0]["trl"]
    side["peak_bytes"] = side["tree_bytes"] + 2**30
    (shown,) = (table for table in tables(record) if table.title == "Peak memory")
    assert shown.rows[1][4] == shown.rows[1][5], "samples that missed the peak are not below it"


def test_a_start_up_below_zero_is_not_told(record):
    def remark(*seconds):
        point = record["figures"]["points"][0]
        sizes = ((8, seconds[0]), (80, seconds[1]))
        record["figures"]["points"] = [point | {"pairs": n, "job": point["job"] | {"trl": {"seconds": s}}} for n, s in sizes]
        return _line(record, "trl", "TRL")

    assert remark(20.0, 92.0) == "TRL: 12 s and 1.00 s a pair."
    assert remark(5.0, 77.0) == ""


def test_how_says_who_ran_with_ray(record):
    ours, kernel, trl, both, *_ = how(record)
    assert "raydpo:" in ours and "with the Ray that it starts" in ours
    assert "kernel:" in kernel and "without Ray" in kernel
    assert "TRL 1.16.0, 1 x 2" in trl and "adamw_torch_fused" in trl and "small, float32" in both
    heads = [column for table in tables(record) for column in table.columns]
    assert not [column for column in heads if "kernel" in column and "Ray" not in column and "raydpo /" not in column]


def test_a_page_has_machine_dates_versions_and_commands(record):
    page = markdown(record)
    assert "| raydpo train | 5.0 s |  |  |  | 20.0 s | 50.0 s | ray 4.0 |" in page
    for words in (
        "a processor, 2 cores; 2026-11-29; torch 2.13",
        "python jobs/benchmark.py --parts run",
        "| 2 x 1 | no | 160 |",
    ):
        assert words in page
    row = summary_row(record)
    assert row.count("|") == 3 and "8 pairs: a step 2.0 s against 8.0 s, " in row
    assert row.count("memory") == 1 and "GiB with Ray's processes, " in row
    more = json.loads(json.dumps(record))
    more["figures"]["points"].insert(0, more["figures"]["points"][0] | {"pairs": 4, "step": {}})
    assert summary_row(more) == row, "of several sizes the largest is told"


def test_equal_sides_agree(found):
    assert figures(found, {NAME: WORKLOAD}, exact=True)["problems"] == []


@pytest.mark.parametrize(
    ("field", "values", "words"),
    [
        ("losses", [0.6935, 0.68, 0.67, 0.66], "loss of step 1"),
        ("losses", [0.6931, 0.68, 0.672, 0.66], "loss of step 3"),
        ("losses", [0.6931, math.nan, 0.67, 0.66], "loss of step 2"),
        ("chosen_logps", [-50.1] * 4, "chosen completions of the first"),
        ("ref_rejected", [-200.0] * 6 + [-200.01, -200.0], "that of pair 7 is -200 with kernel"),
        ("ref_rejected", [-200.0] * 6 + [math.nan, -200.0], "1 rejected completions differ"),
    ],
)
def test_sides_that_do_not_compute_the_same_have_no_ratios(found, field, values, words):
    setattr(found["trl run, 8 pairs, file"].result, field, values)
    shown = figures(found, {NAME: WORKLOAD}, exact=True)
    assert len(shown["problems"]) == 1 and words in shown["problems"][0] and NAME in shown["problems"][0]
    (point,) = shown["points"]
    assert not any("ratio" in point[part] for part in ("step", "reference", "job", "sweep"))
    assert not any("share_peak_bytes" in row for row in shown["memory"])


def test_every_batch_size_of_trl_must_compute_the_same(found):
    found["trl try 2, 8 pairs, file"].result.losses[1] = 0.7
    assert "loss of step 2" in figures(found, {NAME: WORKLOAD}, exact=True)["problems"][0]


def test_bfloat16_rounds_more_but_not_any_more(found):
    ours, theirs = found["kernel score, 8 pairs, file"], found["trl run, 8 pairs, file"]

    def problems(gap):
        theirs.result.ref_chosen = [-100.0 + gap] * PAIRS
        theirs.result.losses = [0.6931, 0.5, 0.4, 0.3]
        return disagreements(ours, theirs, WORKLOAD, exact=False)

    assert problems(2.0) == [] and len(problems(5.0)) == 1  # of 60 and 120 tokens a pair
