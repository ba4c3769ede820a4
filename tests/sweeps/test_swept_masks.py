"""From files to trained models where not every token counts: one cache for every mask, alone and in a sweep."""

import json
import random
import re

import pyarrow.parquet as pq
import pytest
import yaml
from command import raydpo
from tiny import WORDS

from raydpo.reports.frontier import points_of
from raydpo.rundir.read import SweepRecord
from raydpo.storage.files import Storage

MASKS = ["completion", "last_turn", "answer", "reasoning", [{"answer": 1.0}, {"reasoning": 0.1}]]
NAMES = [f"train_on={mask}" for mask in MASKS[:4]] + ["train_on=answer+0.1reasoning"]


def records(count):
    """Conversations whose completions think, call a tool, and answer."""
    rng = random.Random(0)

    def words():
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(3, 9)))

    def answer():
        first, result, last = (
            f"<think>\n{words()}\n</think>\n\n{words()}",
            words(),
            f"<think>\n{words()}\n</think>\n\n{words()}",
        )
        return [
            {"role": "assistant", "content": first},
            {"role": "tool", "content": result},
            {"role": "assistant", "content": last},
        ]

    return [
        {"prompt": [{"role": "user", "content": words()}], "chosen": answer(), "rejected": answer()} for _ in range(count)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_llama):
    place = tmp_path_factory.mktemp("counted")
    (place / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records(40)))
    tree = {
        "output": str(place / "runs"),
        "cache": {"uri": str(place / "cache")},
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "data": {"train": str(place / "a.jsonl"), "eval": {"fraction": 0.2, "train_on": "assistant"}},
        "train": {"pairs_per_step": 8, "lr": 1e-3, "steps": 3, "tokens_per_batch": 1024},
    }
    (place / "config.yaml").write_text(yaml.safe_dump(tree))
    return place


def run(verb, place, *more, fails=False):
    result = raydpo(verb, place / "config.yaml", *more)
    assert (result.returncode != 0) == fails, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_another_mask_scores_nothing_and_trains(place, on_cluster):
    said = run("run", place, "name=whole")
    assert "scored" in said
    said = run("run", place, "name=answer", "data.train_on=answer")
    assert re.search(r"data a: train_on answer: [\d,]+ of [\d,]+ completion tokens count \(\d+ %\)", said), said
    held, wanted = re.search(r"cache: ([\d,]+) of ([\d,]+) completions were there", said).groups()
    assert held == wanted
    whole, answer = (pq.read_table(place / "runs" / name / "metrics.parquet").to_pylist() for name in ("whole", "answer"))
    assert whole[0]["loss"] == pytest.approx(0.693147, abs=1e-5) and answer[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert answer[0]["length/chosen"] < whole[0]["length/chosen"]
    assert answer[-1]["logps/chosen"] != whole[-1]["logps/chosen"]
    # Other trainers count every token.
    out = place / "out.parquet"
    said = raydpo("cache", "export", place / "config.yaml", out, "data.train_on=answer")
    assert "warning: by data.train_on or data.spans_column not every token counts" in said.stdout + said.stderr
    for row in pq.read_table(out).to_pylist():
        assert row["ref_chosen_logps"] == pytest.approx(sum(row["ref_chosen_token_logps"]), abs=1e-4)
    # A run of this name with another mask is another run.
    said = run("train", place, "name=answer", "data.train_on=reasoning", fails=True)
    assert "pairs differ in the tokens that count" in said, said


@pytest.mark.slow
def test_a_sweep_of_masks_has_one_cache_pass(place, on_cluster):
    grid = json.dumps({"data.train_on": MASKS})
    said = run("sweep", place, "name=masks", f"sweep.grid={grid}")
    found = json.loads((place / "runs" / "masks" / "sweep.json").read_text())
    assert [trial["status"] for trial in found["trials"]] == ["done"] * 5, said
    assert len(re.findall(r"completions were there", said)) == 1
    assert "do not compare" not in said  # all are measured on the same tokens
    assert [trial["name"] for trial in found["trials"]] == NAMES
    _check_page(place / "runs" / "masks", said)
    firsts, lasts = set(), set()
    for trial in found["trials"]:
        rows = pq.read_table(place / "runs" / "masks" / trial["name"] / "metrics.parquet").to_pylist()
        assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
        firsts.add(rows[0]["length/chosen"])
        lasts.add(rows[-1]["loss"])
    assert len(firsts) == len(lasts) == 5


def _check_page(directory, said):
    """The page has held-out accuracy and drift of each mask, and says that they compare."""
    points, page = points_of(SweepRecord.read(Storage(str(directory)))), (directory / "report.html").read_text()
    assert len(points) == 5 and len({point.held_out for point in points}) == 1
    rows = dict(re.findall(r'<th scope="row" data-value="\d+">([^<]*)</th>(.*?)</tr>', page))
    for point in points:
        assert f">{point.accuracy:.3f}</td>" in rows[point.name] and f">{point.moved:.3f}</td>" in rows[point.name]
    assert "on the same tokens of them (assistant)" in page and ">measured on</button>" not in page
    assert "<h3>Accuracy and drift</h3>" in page and ">answer + 0.1 reasoning</td>" in page
    assert "recommended: train_on" in said or "better than a coin" in said
