"""A sweep over what counts, from the command line: one cache pass, and a page with accuracy and drift for each mask."""

import json
import random
import re

import pytest
import yaml
from command import raydpo
from tiny import WORDS, write_preferences

from raydpo.reports.frontier import points_of
from raydpo.rundir.read import SweepRecord
from raydpo.storage.files import Storage

MASKS = ["completion", "assistant", "answer", "reasoning", [{"answer": 1.0}, {"reasoning": 0.1}]]
NAMES = [f"train_on={mask}" for mask in MASKS[:4]] + ["train_on=answer+0.1reasoning"]
WITHOUT_REASONING = 3


def conversations(count):
    """Completions of two turns with reasoning, and a user's turn between. The last few have no reasoning."""
    rng = random.Random(0)

    def say(role, said=None):
        words = " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 8)))
        return {"role": role, "content": f"<think>\n{said}\n</think>\n\n{words}" if said else words}

    def turns(number, said):
        said = said if number < count - WITHOUT_REASONING else None
        return [say("assistant", said), say("user"), say("assistant", said)]

    return [
        {"prompt": [say("user")], "chosen": turns(number, "the sky is blue"), "rejected": turns(number, "no no maybe")}
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_llama):
    place = tmp_path_factory.mktemp("masks")
    write_preferences(place / "a.jsonl", conversations(44))
    tree = {
        "output": str(place / "runs"),
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "data": {"train": str(place / "a.jsonl"), "eval": {"fraction": 0.3}},
        "train": {"pairs_per_step": 8, "lr": 1e-3, "steps": 2, "eval_every": 2, "tokens_per_batch": 1024},
    }
    (place / "config.yaml").write_text(yaml.safe_dump(tree))
    return place


def test_five_masks_need_one_pass_and_compare_on_one_yardstick(place, on_cluster):
    grid = f"sweep.grid={json.dumps({'data.train_on': MASKS})}"
    result = raydpo("sweep", place / "config.yaml", "name=masks", grid, "data.eval.train_on=completion")
    assert result.returncode == 0, result.stdout + result.stderr
    said, directory = result.stdout, place / "runs" / "masks"
    record, page = SweepRecord.read(Storage(str(directory))), (directory / "report.html").read_text()
    assert [trial.name for trial in record.trials] == NAMES and [trial.status for trial in record.trials] == ["done"] * 5
    assert said.count("scored in") == 1 and "cache: 0 of 88 completions were there" in said
    points = points_of(record)
    assert len({point.held_out for point in points}) == 1, "what counts in training decides no held-out pair"
    assert all(None not in (point.accuracy, point.moved) for point in points)
    assert len({point.moved for point in points}) == 5, "each mask trains another policy"
    rows = dict(re.findall(r'<th scope="row" data-value="\d+">([^<]*)</th>(.*?)</tr>', page))
    for point in points:
        assert f">{point.accuracy:.3f}</td>" in rows[point.name] and f">{point.moved:.3f}</td>" in rows[point.name]
    assert "<h3>Accuracy and drift</h3>" in page and "different tokens" not in page and "measured on</button>" not in page
    assert ("answer + 0.1 reasoning" in page and "No recommendation" not in page) or "better than a coin" in page
    assert f"{WITHOUT_REASONING} pairs dropped" not in said, "held-out pairs are measured on whole completions"
