"""The page of on-policy rounds: every figure is that of the files, texts are escaped, and missing files are told."""

import json
import math
import re

import pyarrow.parquet as pq
import pytest
from made import HOSTILE, made_run
from made_rounds import made_rounds

from raydpo.cli import main
from raydpo.errors import RaydpoError
from raydpo.reports.rounds import HELD_OUT, TRAINING, rounds_page, rounds_status
from raydpo.reports.run import run_page
from raydpo.rundir.read import RunRecord
from raydpo.rundir.read_rounds import RoundsRecord
from raydpo.storage.files import Storage


def record(directory):
    return RoundsRecord.read(Storage(str(directory)))


def tables(page):
    """Label -> (headings, head of a row -> data-values of its cells, None for a dash)."""
    found = {}
    for label, body in re.findall(r'aria-label="([^"]+)"><table.*?>(.*?)</table>', page, re.DOTALL):
        heads = re.findall(r'<th scope="col">(?:<button type="button">)?(.*?)(?:</button>)?</th>', body)
        rows = re.findall(r'<th scope="row"[^>]*>(.*?)</th>(.*?)</tr>', body, re.DOTALL)
        cells = {head: re.findall(r'<td(?: data-value="([^"]*)")?', row) for head, row in rows}
        found[label] = (heads, {head: [float(each) if each else None for each in row] for head, row in cells.items()})
    return found


def readouts(page):
    found = re.findall(r"data-readout='(.*?)'>\s*<h3>(.*?)</h3>", page, re.DOTALL)
    return {title: json.loads(text.replace("&#39;", "'")) for text, title in found}


def test_every_figure_of_the_tables_is_that_of_the_parquet_files(tmp_path):
    directory = made_rounds(tmp_path, "sums")
    rows = pq.read_table(directory / "rounds.parquet").to_pylist(maps_as_pydicts="strict")
    page = rounds_page(record(directory))
    found = tables(page)
    for label, figures, of in (("Held-out prompts", HELD_OUT, rows), ("Training answers and pairs", TRAINING, rows[1:])):
        heads, cells = found[label]
        assert heads == ["", *("start" if row["round"] == 0 else f"round {row['round']}" for row in of)]
        assert cells == {heading: [row[key] for row in of] for heading, key, *_ in figures}
    assert found["Seconds"][1]["round 2"] == [
        rows[2]["seconds"][stage] for stage in ("sample", "score", "pair", "train", "measure")
    ]
    assert ">0.800 ± 0.033<" in page and ">2.10 ± 0.15<" in page  # success and drift of the last round
    # Every figure of the schema but the identities is on the page.
    shown = {key for _, key, *_ in HELD_OUT + TRAINING} | {error for *_, error in HELD_OUT if error}
    assert set(rows[0]) - shown == {"round", "policy", "reference", "rewards", "eval_rewards", "seconds"}


def test_missing_figures_are_told_and_no_empty_page_is_made(tmp_path):
    directory = made_rounds(tmp_path, "sums")
    ledger = json.loads((directory / "rounds.json").read_text())
    ledger["rounds"] = [{"round": 0, "figures": {"eval_success": 0.5}}]
    (directory / "rounds.json").write_text(json.dumps(ledger))
    record(directory)
    (directory / "rounds.parquet").unlink()
    with pytest.raises(RaydpoError, match=r"rounds.parquet is missing; run 'raydpo rounds' again, which writes it"):
        record(directory)


def test_a_page_says_that_duels_of_training_and_held_out_answers_differ(tmp_path):
    judge = {"judge": {"url": "http://h/v1", "model": "m"}}
    said, win_rate = "the two levels do not compare", "Success is the win rate"
    for name, rewards, times in (
        ("duels", [judge], 2),
        ("score", [judge | {"scale": "score"}], 0),
        ("measured", [{"use": "math"}, judge | {"weight": 0}], 0),
    ):
        directory = made_rounds(tmp_path, name, settings={"rewards": rewards})
        page = rounds_page(record(directory))
        assert len(re.findall(f"<figcaption[^>]*>[^<]*{said}", page)) == times, name
        assert (win_rate in page) is (name == "duels")


def test_pictures_show_the_figures_over_the_rounds(tmp_path):
    rewards = [{"use": "math"}, {"use": "regex", "pattern": "7", "weight": 0, "name": "brief"}]
    parts = {"math": [0.2, 0.4, 0.6, 0.8], "brief": [0.5, 0.5, 0.4, 0.6]}
    directory = made_rounds(tmp_path, "sums", settings={"rewards": rewards}, parts=parts)
    rows = pq.read_table(directory / "rounds.parquet").to_pylist(maps_as_pydicts="strict")
    drawn = readouts(rounds_page(record(directory)))
    success = {one["name"]: one for one in drawn["Success"]["curves"]}
    assert drawn["Success"]["unit"] == "round"
    assert success["held out"]["y"] == pytest.approx([row["eval_success"] for row in rows])
    assert success["held out"]["e"] == pytest.approx([row["eval_success_se"] for row in rows])
    assert success["training answers"]["x"] == [1, 2, 3] and "e" not in success["training answers"]
    assert set(success) == {"held out", "training answers", "held out, greedy", "held out, any of 4"}
    functions = {one["name"]: one["y"] for one in drawn["Each reward function"]["curves"]}
    assert functions == {"math": parts["math"], "brief, measured only": parts["brief"]}
    assert drawn["Found in the cache"]["curves"][0]["y"] == pytest.approx([0, 1 / 48, 2 / 48], abs=1e-5)
    assert [one["name"] for one in drawn["Time of a round"]["curves"]] == ["sample", "score", "pair", "train", "measure"]
    wanted = ["Success", "Drift", "Reward", "Length", "Log-ratios", "Loss", "Pairs"]
    assert not {*wanted, "Cut answers", "Different answers", "First token", "Mixed prompts"} - set(drawn)
    assert "Errors" not in drawn  # there are none


def test_marks_of_the_frontier_tell_their_round(tmp_path):
    page = rounds_page(record(made_rounds(tmp_path, "sums")))
    said = re.findall(r'class="mark" data-mark="round-(\d)"[^>]*aria-label="([^"]+)"', page)
    assert said[2] == ("2", "round 2: success 0.600 ± 0.032, drift 1.40 ± 0.10 nats an answer") and len(said) == 4


def test_answers_of_a_prompt_stand_side_by_side(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3 + 4?"}]
    directory = made_rounds(tmp_path, "sums", prompt=messages, answer="x" * 500)
    page = rounds_page(record(directory))
    ids = sorted(row["prompt_id"] for row in pq.read_table(directory / "prompts.parquet").to_pylist())
    assert re.findall(r"Held-out prompt (\w+):", page) == [one.hex()[:8] for one in ids[:4]]
    assert "system: Be brief.\nuser: What is 3 + 4?" in page
    first = page.partition("<summary>Held-out prompt")[2].partition("</details>")[0]
    assert re.findall(r"<h3>(.*?)</h3>", first) == ["start", "round 1", "round 2", "round 3"]
    assert "greedy, reward 2.00, 5 tokens" in first and "sampled, reward 2.00, 6 tokens" in first
    # A long answer is cut, and its title has all of it.
    assert f'title="{"x" * 500} (2, 0)">{"x" * 400} [... 107 more characters]</div>' in first


def test_what_is_not_a_number_is_a_dash(tmp_path):
    figures = {"eval_reward": [0.2, math.nan, 0.6, math.inf], "eval_drift_initial": [0.0, -0.001, 1.4, 2.1]}
    page = rounds_page(record(made_rounds(tmp_path, "sums", figures=figures)))
    assert tables(page)["Held-out prompts"][1]["reward"] == [0.2, None, 0.6, None]
    assert "nan" not in page.lower() and "Infinity" not in page and "inf<" not in page
    assert ">0.00 ± 0.05<" in page  # and not -0.00


def test_many_rounds_are_thinned(tmp_path):
    page = rounds_page(record(made_rounds(tmp_path, "long", rounds=11)))
    first = page.partition("<summary>Held-out prompt")[2].partition("</details>")[0]
    assert re.findall(r"<h3>(.*?)</h3>", first) == ["start", "round 2", "round 4", "round 7", "round 9", "round 11"]


def test_texts_of_models_and_data_are_escaped(tmp_path):
    errors, figures = {2: f"math: ValueError: {HOSTILE}"}, {"errors": [None, 0, 1, 0]}
    directory = made_rounds(
        tmp_path, "x", prompt=HOSTILE, answer=HOSTILE + "\u202e\x1b", errors=errors, stopped=HOSTILE, figures=figures
    )
    page = rounds_page(record(directory))
    assert "<img" not in page and page.count("alert(1)") == page.count("&lt;script&gt;alert(1)")
    assert page.count("<script>") == 2 and "\u202e" not in page and "⟨U+202E⟩" in page and "\x1b" not in page


def test_the_state_is_told(tmp_path):
    sums = made_rounds(tmp_path, "sums", stopped="round 3: 240 of 240 answers right, nothing to learn")
    said = rounds_status(record(sums))
    assert "Ended early after 3 rounds. round 3: 240 of 240 answers right, nothing to learn" in said
    made_rounds(tmp_path, "two", rounds=2, settings={"count": 5})
    assert "Finished: 2 rounds." in rounds_status(record(tmp_path / "two"))
    (tmp_path / "two" / "rounds.json").write_text(json.dumps({"status": "failed", "why": "math failed on 9 of 10 answers."}))
    said = rounds_status(record(tmp_path / "two"))
    assert "Not finished: 2 of 5 rounds are over. The last command failed: math failed on 9 of 10 answers. The same" in said


def test_a_round_that_ended_the_run_before_it_trained(tmp_path):
    """It has figures of its answers, and none of a training or a measurement."""
    directory = made_rounds(tmp_path, "sums", stopped="all right")
    made = record(directory)
    last = made.rounds[-1]
    for key in last:
        if key.startswith("eval_") or key in (
            "pairs",
            "steps",
            "first_loss",
            "last_loss",
            "wanted",
            "cache_hits",
            "seconds",
        ):
            last[key] = None
    (directory / "round-003" / "held_out.parquet").unlink()
    (directory / "round-003" / "train" / "summary.json").unlink()
    page = rounds_page(made)
    assert "Ended early after 2 rounds. all right" in page
    heads, cells = tables(page)["Held-out prompts"]
    assert heads[-1] == "round 3" and cells["success"] == [0.2, 0.4, pytest.approx(0.6), None]


def test_pages_of_rounds_under_way(tmp_path):
    directory = made_rounds(tmp_path, "sums")
    for name in ("round-003/held_out.parquet", "prompts.parquet", "round-001/scores.parquet", "config.yaml"):
        (directory / name).unlink()
    assert "the prompt is not in prompts.parquet" in rounds_page(record(directory))
    (directory / "rounds.parquet").unlink()
    (directory / "rounds.json").write_text(json.dumps({"status": "running", "why": None}))
    page = rounds_page(record(directory))
    assert "Nothing is measured yet" in page and "No round is over yet" in page


def test_a_damaged_file_is_named(tmp_path):
    directory = made_rounds(tmp_path, "sums")
    (directory / "round-001" / "held_out.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(RaydpoError, match=r"round-001/held_out.parquet cannot be read"):
        rounds_page(record(directory))
    (directory / "rounds.json").write_text("[]")
    with pytest.raises(RaydpoError, match=r"rounds.json is not a record of rounds"):
        record(directory)


def test_reward_functions_and_an_unsafe_sandbox_are_named(tmp_path):
    rewards = [
        {"use": "code", "unsafe": True, "weight": 0.5},
        {"reward_model": "org/judge-7b", "weight": 0},
    ]
    parts = {"code": [0.1, 0.2, 0.3, 0.4], "judge-7b": [0.5, 0.5, 0.5, 0.5]}
    errors = {1: "code: TimeoutError: 5 s\njudge-7b: OSError: no", 3: "code: TimeoutError: 5 s"}
    figures = {"errors": [None, 1, 0, 1]}
    directory = made_rounds(tmp_path, "x", settings={"rewards": rewards}, parts=parts, errors=errors, figures=figures)
    page = rounds_page(record(directory))
    assert tables(page)["Reward functions"][1] == {"code": [None, 0.5, 0.1, 0.4, 2.0], "judge-7b": [None, 0, 0.5, 0.5, 1.0]}
    assert ">code, without a sandbox<" in page and ">reward model org/judge-7b<" in page
    assert "Answers run without a sandbox" in page


def test_the_command_and_the_training_of_a_round(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    directory = made_rounds(tmp_path, "sums")
    assert main(["report", str(directory)]) == 0 and "Rounds sums" in (directory / "report.html").read_text()
    assert main(["report", str(directory), str(made_rounds(tmp_path, "more"))]) == 0
    assert "2 runs of rounds compared" in (tmp_path / "comparison.html").read_text()
    assert main(["report", str(directory), str(made_run(tmp_path, "pairs", steps=5))]) == 2
    assert "runs of rounds compare with each other only" in capsys.readouterr().err
    # The page of a round's training does not ask for held-out pairs, which rounds refuse.
    run = made_run(tmp_path, "train", steps=5, held_out=0)
    config = (directory / "config.yaml").read_text()
    (run / "config.yaml").write_text(config)
    page = run_page(RunRecord.read(Storage(str(run))))
    assert (
        "This run is the training of a round" in page and "sample_prompts" not in page.partition("config.yaml, resolved")[0]
    )


def test_the_axis_of_a_single_round_has_whole_numbers(tmp_path):
    """Not "1 1 1 1 1", as fractions of a round would be labelled."""
    page = rounds_page(record(made_rounds(tmp_path, "one", rounds=1)))
    (picture,) = [part for part in page.split("<svg")[1:] if "<title>Pairs</title>" in part]
    assert re.findall(r"<text[^>]*>(.*?)</text>", picture)[:2] == ["1", "round"]
