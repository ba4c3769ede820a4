"""The content of the pages of finished and unfinished runs, of sweeps and of several runs, and what is refused."""

import io
import json
import math
import re

import numpy as np
import polars as pl
import pytest
import yaml
from made import HOSTILE, made_run, made_sweep

from raydpo.cli.entry import main
from raydpo.data.interval import share_error
from raydpo.errors import ConfigError, RaydpoError
from raydpo.evaluation.display import print_evaluation
from raydpo.reports import write_comparison, write_report
from raydpo.reports.compare import differences, overlaid
from raydpo.reports.curves import POINTS, curve
from raydpo.reports.evaluation import evaluation_part, evaluation_tables
from raydpo.reports.frontier import points_of
from raydpo.reports.run import run_page
from raydpo.reports.sweep import sweep_page
from raydpo.reports.tables import interval, number
from raydpo.reports.write import write_report_or_warn
from raydpo.rundir.read import RunRecord, SweepRecord
from raydpo.rundir.records import to_parquet
from raydpo.storage.files import Storage
from raydpo.terminal.console import Console


def record(directory):
    return RunRecord.read(Storage(str(directory)))


def readouts(page):
    """What the curves of a page show, by title."""
    found = re.findall(r"data-readout='([^']*)'>\s*<h3>([^<]*)</h3>", page)
    return {title: json.loads(values) for values, title in found}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_run(
        tmp_path_factory.mktemp("runs"), "one", sources=("helpful", "harmless"), evaluation=True, prompt=HOSTILE, steps=60
    )


@pytest.fixture(scope="module")
def page(run):
    return run_page(record(run))


def test_the_curves_of_a_run_are_its_metrics(run, page):
    steps, evals = (pl.read_parquet(run / name) for name in ("metrics.parquet", "eval.parquet"))
    loss = readouts(page)["Loss"]["curves"]
    assert [one["name"] for one in loss] == ["training", "held out"]
    assert loss[0]["x"] == list(range(1, 61)) and loss[0]["y"] == pytest.approx(steps["loss"].to_list(), rel=1e-4)
    assert loss[1]["x"] == evals["step"].to_list() and loss[1]["y"] == pytest.approx(evals["eval_loss"].to_list(), rel=1e-4)
    assert {
        "Accuracy",
        "Margin",
        "Rewards",
        "Drift",
        "Log-probs",
        "Lengths",
        "Chosen fell",
        "Margin and length",
        "Gradient norm",
        "Learning rate",
        "Speed",
        "Time of a step",
    } <= set(readouts(page))


def test_a_run_page_tells_configuration_cache_samples_and_evaluation(page):
    for piece in (
        "Finished after 60 steps",
        "14dd257b16e65da53154083de8df6305",
        "32 pairs scored again",
        "sample_prompts: 1",
        "Bees collect nectar from flowers",
        "Calibration",
        "0.740 (0.697 to 0.783)",
        "Accuracy by length",
        "reward model",
        "Drift KL(policy || reference) from 256 samples",
        "≥ 51",
    ):
        assert piece in page, piece


def test_text_of_data_and_models_is_no_markup(page):
    assert "<script>alert" not in page and "<img" not in page and "onerror=alert(2)&gt;" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page) and "url(http" not in page
    assert "script-src 'sha256-" in page and "default-src 'none'" in page


def test_a_page_says_which_tokens_count(page, tmp_path):
    """And what its figures are of, where that is not everything."""
    assert "tokens that count" not in page
    data = {"train_on": [{"answer": 1.0}, {"reasoning": 0.1}]}
    masked = run_page(record(made_run(tmp_path, "a", data=data, steps=5)))
    assert "<dt>tokens that count</dt><dd>answer + 0.1 reasoning</dd>" in masked and "in held-out pairs</dt>" not in masked
    assert "Change of the log-prob against the reference per token that counts." in masked
    assert "Tokens of the answers in the data that count, each with its weight." in masked
    other = run_page(
        record(made_run(tmp_path, "b", data=data | {"eval": {"path": "x/y", "train_on": "completion"}}, steps=5))
    )
    assert "<dt>in held-out pairs</dt><dd>completion</dd>" in other


def test_an_unfinished_run_has_a_page(tmp_path):
    directory = made_run(tmp_path, "going", steps=30, finished=False)
    page = run_page(record(directory))
    assert "Not finished: 30 steps of 30 are recorded" in page and "They are stored at the end of the run" in page
    assert "Not evaluated yet" in page
    (directory / "metrics.parquet").unlink()
    (directory / "eval.parquet").unlink()
    page = run_page(record(directory))
    assert "No step has been recorded yet" in page and "There are no metrics yet" in page
    assert "Nothing is recorded yet" in page and "Nothing stands out" not in page
    assert "No evaluation has been recorded yet" in page and "No step has been timed yet" in page


def test_without_held_out_pairs_the_page_says_how_to_have_some(tmp_path):
    page = run_page(record(made_run(tmp_path, "all", steps=20, held_out=0)))
    assert "This run has no held-out pairs" in page and "fraction: 0.05" in page
    assert [one["name"] for one in readouts(page)["Loss"]["curves"]] == ["training"]


def test_an_evaluation_with_gaps_has_a_page(run, tmp_path):
    evaluation = json.loads((run / "evaluation.json").read_text()) | {
        "generation": None,
        "drift": None,
        "wins": [],
        "samples": [],
    }
    evaluation["preferences"] |= {"by_source": {}, "by_length": []}
    evaluation["preferences"]["total"] |= {"calibration": [], "longer_is_wrong": None, "calibration_error": None}
    directory = made_run(tmp_path, "gaps", steps=20)
    (directory / "evaluation.json").write_text(json.dumps(evaluation))
    page = run_page(record(directory))
    assert "Preferences of held-out pairs" in page and "Calibration</h3>" not in page


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, None), (7, "trained on the prompts of 7 of them"), (None, "not known whether the policy was trained on")],
)
def test_a_page_says_whether_the_pairs_were_trained_on(run, count, said):
    """Unknown is not the same as none."""
    about = evaluation_part(json.loads((run / "evaluation.json").read_text()) | {"trained_on": count}).about
    assert (said in about) if said else "trained" not in about


def test_the_terminal_shows_the_tables_of_the_page(run):
    """Names of judges are printed as they are: neither as markup nor as control sequences."""
    found, out = json.loads((run / "evaluation.json").read_text()), io.StringIO()
    found["wins"][0]["judge"] = "[red]me\x1b[31m"
    found["train_on"] = "answer + 0.1 reasoning"
    print_evaluation(Console(out), found)
    assert "tokens that count: answer + 0.1 reasoning" in out.getvalue()
    assert "measured on the tokens that count: answer + 0.1 reasoning." in evaluation_part(found).about
    preferences, *others = evaluation_tables(found)
    assert len(others) == 3 and all(table.label in out.getvalue() for table in (preferences, *others))
    assert "[red]me\N{REPLACEMENT CHARACTER}[31m" in out.getvalue() and "0.740 (0.697 to 0.783)" in out.getvalue()


def test_the_terminal_says_that_it_leaves_groups_out(run):
    found, outs = json.loads((run / "evaluation.json").read_text()), (io.StringIO(), io.StringIO())
    print_evaluation(Console(outs[0]), found)
    one = next(iter(found["preferences"]["by_source"].values()))
    found["preferences"]["by_source"] = {f"subset {number}": one for number in range(60)}
    print_evaluation(Console(outs[1]), found)
    rows = len(evaluation_tables(found)[0].rows) - 1
    assert f"tokens; the first 50 of {rows}, the page has all" in outs[1].getvalue() and rows > 60
    assert "the page has all" not in outs[0].getvalue()


def test_an_evaluation_alone_has_a_page(run, tmp_path):
    """A directory that holds evaluation.json only."""
    (tmp_path / "evaluation.json").write_bytes((run / "evaluation.json").read_bytes())
    page = run_page(record(tmp_path))
    assert "Preferences of held-out pairs" in page and "There are no metrics yet" in page


def test_a_hundred_thousand_steps_give_a_small_page_that_says_so(tmp_path):
    count = 100_000
    random = np.random.default_rng(0)
    names = ("loss", "rewards/accuracies", "rewards/margins", "grad_norm", "time/step", "time/forward")
    values = {name: random.random(count) for name in names}
    directory = made_run(tmp_path, "long", steps=10)
    (directory / "metrics.parquet").write_bytes(
        to_parquet([{"step": step + 1} | {name: float(values[name][step]) for name in names} for step in range(count)])
    )
    page = run_page(record(directory))
    assert len(page) < 400_000 and "Each point is the mean of 417 steps" in page
    shown = readouts(page)["Loss"]["curves"][0]
    assert len(shown["x"]) <= POINTS and shown["x"][0] == 417 and shown["x"][-1] == count
    assert shown["y"][:2] == pytest.approx([values["loss"][:417].mean(), values["loss"][417:834].mean()], rel=1e-4)


def test_a_thinned_curve_keeps_extremes_and_its_running_mean_is_one():
    values = np.zeros(960)
    values[100] = 50.0
    thin = curve(pl.DataFrame({"step": np.arange(1, 961), "loss": values}), "loss", "training", "#000000")
    assert thin.each == 4 and len(thin.mean) == 240 and thin.high.max() == 50.0 and thin.mean.max() == 12.5
    assert thin.running_mean[25] == pytest.approx(12.5 / 13) and thin.running_mean[0] == 0.0
    few = curve(pl.DataFrame({"step": [1, 2, 3], "loss": [1.0, None, 4.0]}), "loss", "training", "#000000")
    assert few.each == 1 and np.isnan(few.mean[1]) and few.running_mean.tolist() == [1.0, 2.5, 4.0]
    assert curve(pl.DataFrame({"step": [1], "loss": [None]}), "loss", "training", "#000000") is None


def test_a_point_of_a_thinned_curve_stands_for_evaluations_where_the_table_has_them(tmp_path):
    """1,000 evaluations, one every 50 steps: a point is the mean of 5 evaluations, not of 5 steps."""
    directory = made_run(tmp_path, "many", steps=10)
    rows = [{"step": 50 * number, "eval_loss": 1 / (1 + number), "eval_length/chosen": 9.0} for number in range(1000)]
    (directory / "eval.parquet").write_bytes(to_parquet(rows))
    page = run_page(record(directory))
    assert "Each point is the mean of 5 evaluations" in page and "mean of 5 steps" not in page
    (directory / "metrics.parquet").write_bytes(to_parquet([{"step": step, "loss": 0.5} for step in range(1, 1001)]))
    assert "Each point is the mean of 5 steps or 5 evaluations" in run_page(record(directory))
    assert all("5 evaluations" in one.caption for one in overlaid([record(directory)], ["held out"]))


def test_a_step_that_is_not_finite_is_left_out_of_the_curves(tmp_path):
    directory = made_run(tmp_path, "skips", steps=20)
    rows = pl.read_parquet(directory / "metrics.parquet").to_dicts()
    rows[4] |= {"loss": math.nan, "grad_norm": math.inf, "skipped": 1.0}
    (directory / "metrics.parquet").write_bytes(to_parquet(rows))
    page = run_page(record(directory))
    assert readouts(page)["Loss"]["curves"][0]["y"][4] is None and "NaN" not in page and "Infinity" not in page
    assert "1 of 20 steps, the first of them step 5," in page


def test_secrets_of_a_uri_are_not_on_the_page(tmp_path):
    directory = made_run(tmp_path, "secret", steps=5)
    config = yaml.safe_load((directory / "config.yaml").read_text())
    config["cache"]["uri"] = "s3://key:s3cr3t@bucket/cache?session_token=t0ken"
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    page = run_page(record(directory))
    assert "s3://***@bucket/cache" in page and "s3cr3t" not in page and "t0ken" not in page


def test_what_is_no_run_is_refused(tmp_path):
    made_run(tmp_path / "runs", "one", steps=5)
    with pytest.raises(ConfigError, match=r"there is no run at .*below it there are one"):
        write_report(str(tmp_path / "runs"))
    (tmp_path / "runs" / "one" / "eval.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(RaydpoError, match=r"one/eval.parquet cannot be read"):
        write_report(str(tmp_path / "runs" / "one"))
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    with pytest.raises(RaydpoError, match=r"sweep.json is not a record of a sweep"):
        write_report(str(tmp_path / "sweep"))


@pytest.mark.parametrize("measured", [False, True])
def test_a_sweep_page(tmp_path, measured):
    sweep = SweepRecord.read(Storage(str(made_sweep(tmp_path, (0.03, 0.1, 0.3), measured=measured, steps=20))))
    points = points_of(sweep)
    assert [one.beta for one in points] == [0.03, 0.1, 0.3] and [one.kl is not None for one in points] == [measured] * 3
    scores = sweep.trials[1].eval
    assert points[1].margin == pytest.approx(scores["rewards/margins"] / 0.1)
    accuracy = scores["rewards/accuracies"]
    assert points[1].error == pytest.approx(share_error(accuracy, 400))
    page = sweep_page(sweep)
    assert page.count('class="mark"') == 12 and "Never chosen by the loss" in page and "3 done, 1 waiting, 1 failed" in page
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page
    assert ("as a KL divergence" in page) != measured


def test_a_sweep_that_has_just_begun_has_a_page(tmp_path):
    (tmp_path / "sweep.json").write_text(
        json.dumps(
            {
                "raydpo": "0",
                "name": "new",
                "metric": "eval_loss",
                "parameters": ["train.beta"],
                "cache": {},
                "trials": [
                    {
                        "name": "a",
                        "run_dir": str(tmp_path / "a"),
                        "settings": {"train.beta": 0.1},
                        "status": "waiting",
                        "error": None,
                        "steps": 0,
                        "seconds": 0,
                        "eval": None,
                        "evaluation": None,
                    }
                ],
            }
        )
    )
    page = sweep_page(SweepRecord.read(Storage(str(tmp_path))))
    assert "No recommendation" in page and "No trial is done and evaluated yet" in page
    assert "No trial has written metrics yet" in page


def test_a_comparison_shows_where_settings_differ(tmp_path):
    places = [
        made_run(tmp_path, "a", beta=0.1, steps=20),
        made_run(tmp_path, "b", beta=0.5, steps=20, lr=1e-6),
        made_run(tmp_path / "other", "b", beta=0.5, steps=20, finished=False),
    ]
    table = differences([record(place) for place in places])
    assert {row.head: [cell.text for cell in row.cells] for row in table.rows} == {
        "cache.uri": [str(tmp_path / "cache"), str(tmp_path / "cache"), str(tmp_path / "other" / "cache")],
        "train.lr": ["5e-06", "1e-06", "5e-06"],
        "train.beta": ["0.1", "0.5", "0.5"],
    }
    write_comparison([str(place) for place in places], tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    assert "Beta, the loss or its settings differ" in page and "different held-out pairs" not in page
    assert [one["name"] for one in readouts(page)["Accuracy, held out"]["curves"]] == ["a", str(places[1]), str(places[2])]
    with pytest.raises(ConfigError, match="hold 1 run"):
        write_comparison([str(places[0])], tmp_path / "out.html")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"beta": {"start": 0.2, "end": 0.1}}, {"beta": {"start": 0.2, "end": 0.05}}),
        ({"beta": {"start": 0.2, "end": 0.1}}, {"beta": 0.2}),
        ({"loss": [{"sigmoid": 1.0}, {"sft": 0.1}]}, {"loss": [{"sigmoid": 1.0}, {"sft": 0.2}]}),
        ({"lr": 1e-6}, {"lr": 1e-5}),
    ],
)
def test_a_comparison_says_where_losses_do_not_compare(one, other, tmp_path):
    places = [made_run(tmp_path, name, steps=6, **told) for name, told in (("a", one), ("b", other))]
    write_comparison([str(place) for place in places], tmp_path / "out.html")
    assert ("neither loss nor reward margin compares" in (tmp_path / "out.html").read_text()) == ("lr" not in one)


def test_a_comparison_says_that_held_out_pairs_differ(tmp_path):
    places = [made_run(tmp_path, name, steps=6) for name in ("a", "b")]
    for place in places:
        (place / "run.json").write_text(json.dumps({"fingerprint": {}, "held_out": place.name}))
    write_comparison([str(place) for place in places], tmp_path / "out.html")
    assert "measured on different held-out pairs" in (tmp_path / "out.html").read_text()


def test_a_comparison_says_where_tokens_differ(tmp_path):
    """A list with weights is one setting."""
    yardstick = {"eval": {"fraction": 0.1, "train_on": "completion"}}
    settings = {"a": {"train_on": "answer"}, "b": {"train_on": [{"answer": 1.0}, {"reasoning": 0.1}]}}
    for name, data in settings.items():
        made_run(tmp_path, name, data=data, steps=5)
        made_run(tmp_path, f"{name}-alike", data=data | yardstick, steps=5)

    def compared(*names):
        write_comparison([str(tmp_path / name) for name in names], tmp_path / "page.html")
        return (tmp_path / "page.html").read_text()

    page = compared("a", "b")
    assert "on different tokens of their held-out pairs (answer; answer + 0.1 reasoning)" in page
    assert ">data.train_on</th>" in page and ">answer + 0.1 reasoning</td>" in page and "train_on.0" not in page
    assert "train on different tokens (answer; answer + 0.1 reasoning)" in page
    page = compared("a-alike", "b-alike")
    assert "of their held-out pairs" not in page and "train on different tokens" in page
    assert "different tokens" not in compared("a", "a")


def test_a_beta_that_moves_is_told(tmp_path):
    page = run_page(
        record(
            made_run(
                tmp_path,
                "moves",
                steps=12,
                beta={"start": 0.2, "end": 0.05, "schedule": "cosine"},
                loss=[{"sigmoid": 0.8}, {"sft": 0.2}],
            )
        )
    )
    assert "<dd>0.2-0.05 cosine</dd>" in page and "<dd>0.8 sigmoid + 0.2 sft</dd>" in page


def test_the_command(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(run)]) == 0 and (run / "report.html").exists()
    assert main(["report", str(run), str(run)]) == 0 and (tmp_path / "comparison.html").exists()
    assert main(["report", str(run), "--out", "x.html"]) == 2 and main(["report", str(tmp_path / "none")]) == 2
    assert "there is no run at" in capsys.readouterr().err


def test_a_page_that_fails_does_not_fail_the_run(run, monkeypatch):
    said = io.StringIO()
    write_report_or_warn(str(run / "nowhere"), Console(said))
    assert "warning: the report failed (ConfigError: there is no run at" in said.getvalue()


def test_what_rounds_to_zero_has_no_sign():
    assert number(-0.0002).text == "0.000" and number(-0.0008).text == "-0.001" and number(-0.0).text == "0.000"
    assert number(1234, ",.0f").text == "1,234" and number(-0.0004, "+.0%").text == "+0%"
    assert interval({"value": -0.0001, "low": -0.085, "high": -0.0}).text == "0.000 (-0.085 to 0.000)"
