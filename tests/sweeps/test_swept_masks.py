"""From files to trained models where not every token counts: one cache for every mask, alone and in a sweep."""

import json
import random
import re

import pyarrow.parquet as pq
import pytest
import yaml
from command import raydpo
from tiny import WORDS

MASKS = ["completion", "assistant", "last_turn", "answer", "reasoning"]


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
    firsts, lasts = set(), set()
    for trial in found["trials"]:
        rows = pq.read_table(place / "runs" / "masks" / trial["name"] / "metrics.parquet").to_pylist()
        assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
        firsts.add(rows[0]["length/chosen"])
        lasts.add(rows[-1]["loss"])
    assert len(firsts) == len(lasts) == 5
