"""Reward functions in ``raydpo eval``: their figures, what fails, and that earlier evaluations still compare."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from command import raydpo as command
from test_policy_found import make_adapter
from tiny import make_tokenizer, preferences, write_preferences

import raydpo
from raydpo.config import RewardConfig, load_config
from raydpo.data.interval import mean_by_group, share_by_group
from raydpo.errors import ConfigError
from raydpo.evaluation.prompts import Prompt, choose_prompts, prompt_records
from raydpo.evaluation.rewards import TOTAL, Rewarded, answers_to_score
from raydpo.evaluation.samples import Answers
from raydpo.pipeline.evaluate import _check_columns, pairs_to_evaluate, protocol
from raydpo.pipeline.tokenised import open_tokeniser
from raydpo.rewards.apply import SCORES
from raydpo.terminal.console import Console

FUNCTIONS = """
def length(completions, **kwargs):
    return [len(completion) for completion in completions]


def fails(completions, answer, **kwargs):
    return [1 / (text == right) if right == "none" else None for text, right in zip(completions, answer)]
"""
REWARDS = [
    {"use": "regex", "pattern": "e", "name": "has-e"},
    {"use": "my_rewards:length", "weight": 0.5},
    {"use": "my_rewards:fails", "weight": 0},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_llama):
    """A run whose final/ is an adapter, without the training, and preferences with a column for reward functions."""
    place = tmp_path_factory.mktemp("eval")
    records = preferences(60, high=20)
    for number, record in enumerate(records):
        record["answer"] = "none" if number % 2 else "42"
    write_preferences(place / "a.jsonl", records)
    tree = {
        "name": "run",
        "output": str(place / "runs"),
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "data": {"train": str(place / "a.jsonl"), "eval": {"fraction": 0.3}},
        "evaluate": {"prompts": 6, "max_tokens": 10, "samples": 2, "exact_steps": False, "rewards": REWARDS},
    }
    (place / "config.yaml").write_text(yaml.safe_dump(tree))
    make_adapter(place / "runs" / "run" / "final", tiny_llama)
    (place / "runs" / "run" / "run.json").write_text(json.dumps({"fingerprint": {}}))
    (place / "my_rewards.py").write_text(FUNCTIONS)
    return place


def test_rewards_of_policy_and_reference(place, on_cluster, monkeypatch):
    """The figures are those of samples.parquet, and a function that fails costs its own values only."""
    monkeypatch.chdir(place)
    out = io.StringIO()
    found = raydpo.evaluate(load_config(place / "config.yaml"), Console(out))
    rows = pq.read_table(place / "runs" / "run" / "samples.parquet").to_pylist()
    entries = {(one["name"], one["mode"]): one for one in found["reward_functions"]}
    assert list(entries) == [(name, mode) for mode in ("greedy", "sampled") for name in ("has-e", "length", "fails", TOTAL)]
    for mode in ("greedy", "sampled"):
        drawn = [row for row in rows if row["mode"] == mode]
        order = list(dict.fromkeys(row["pair_id"] for row in drawn))
        prompts = [order.index(row["pair_id"]) for row in drawn]
        has_e = {side: np.array([float("e" in row[side]) for row in drawn]) for side in ("policy", "reference")}
        length = {side: np.array([float(len(row[side])) for row in drawn]) for side in ("policy", "reference")}
        for side in ("policy", "reference"):
            assert entries["has-e", mode][side] == share_by_group(has_e[side], np.array(prompts))
            assert entries["length", mode][side] == mean_by_group(length[side], np.array(prompts))
            total = has_e[side] + 0.5 * length[side]
            assert [row[f"{side}_reward"] for row in drawn] == total.tolist()
            assert entries[TOTAL, mode][side]["value"] == pytest.approx(total.mean())
            assert [dict(row[f"{side}_rewards"])["length"] for row in drawn] == length[side].tolist()
        paired = mean_by_group(length["policy"] - length["reference"], np.array(prompts))
        assert entries["length", mode]["difference"] == paired and paired["low"] < paired["value"] < paired["high"]
        failing = entries["fails", mode]
        errors = {side: sum(row[f"{side}_reward_error"] is not None for row in drawn) for side in ("policy", "reference")}
        assert failing["errors"] == errors and 0 < errors["policy"] < len(drawn)
        assert entries[TOTAL, mode]["errors"] == {"policy": 0, "reference": 0}, "it has no weight"
        assert failing["none"]["policy"] == len(drawn) - errors["policy"] and failing["policy"]["value"] is None
        assert entries["has-e", mode]["errors"] == {"policy": 0, "reference": 0}
    said = out.getvalue()
    assert "reward fails: " in said and "ZeroDivisionError" in said and "the policy's answer 0 to a:" in said
    assert "Rewards of answers by reward functions" in said
    assert "Rewards of answers by reward functions" in (place / "runs" / "run" / "report.html").read_text()

    again = command("eval", "config.yaml", "--json", cwd=place)
    assert again.returncode == 0 and json.loads(again.stdout) == found, again.stderr


def test_what_is_refused_before_anything_starts(place, monkeypatch):
    for rewards, said in (
        ("[{use: math, column: solution}]", "needs the column 'solution' of the prompts, which have"),
        ("[{use: 'my_rewards:gone'}]", "gone"),
        ("[{reward_model: /no/such/model}]", "/no/such/model"),
        (
            "[{judge: {url: 'http://localhost:1/v1', model: m, key: NO_SUCH_KEY}}]",
            "reward m: judge.key is NO_SUCH_KEY",
        ),
    ):
        result = command("eval", "config.yaml", f"evaluate.rewards={rewards}", cwd=place)
        assert result.returncode == 2 and said in result.stderr, result.stderr
        assert "Traceback" not in result.stderr


def test_protocols_of_earlier_evaluations_still_compare(place, monkeypatch):
    """The setting that is now log_ratios was called rewards."""
    monkeypatch.chdir(place)

    def told(**evaluate):
        tree = yaml.safe_load((place / "config.yaml").read_text())
        tree["evaluate"] = {"prompts": 6} | evaluate
        config = load_config(tree)
        reference = type("Spec", (), {"identity": type("Identity", (), {"digest": "d"})})
        return protocol(config, pairs_to_evaluate(config, open_tokeniser(config), Console(io.StringIO()))[0], reference)

    plain = told()
    assert plain["rewards"] is None and set(plain) == EARLIER
    assert told(rewards="sum") == told(log_ratios="sum") == plain | {"rewards": "sum"}
    judge = {"judge": {"url": "http://x/v1", "model": "m", "key": "KEY"}, "name": "j"}
    with_functions = told(rewards=[*REWARDS, judge])
    assert with_functions == plain | {"reward_functions": with_functions["reward_functions"]}
    functions = with_functions["reward_functions"]
    assert functions["has-e"]["options"] == {"pattern": "e"} and "key" not in functions["j"]["judge"]
    (place / "my_rewards.py").write_text(FUNCTIONS.replace("len(completion)", "2 * len(completion)"))
    try:
        assert told(rewards=REWARDS)["reward_functions"]["length"] != functions["length"], "the function was edited"
    finally:
        (place / "my_rewards.py").write_text(FUNCTIONS)


EARLIER = {
    "beta", "exact_steps", "judge", "log_ratios", "max_tokens", "modes", "pairs", "prompts", "reference", "reward_model",
    "samples", "score_with", "seed", "temperature", "engine", "rewards",
} - {"log_ratios"}  # fmt: skip
"""Names in the protocol of an evaluation before there were reward functions."""


def test_a_configuration_of_rounds_needs_pairs_to_evaluate_on(place):
    tree = yaml.safe_load((place / "config.yaml").read_text())
    (place / "prompts.jsonl").write_text('{"prompt": "Why?"}\n')
    tree["data"] = {}
    tree["rounds"] = {"prompts": str(place / "prompts.jsonl"), "rewards": [{"use": "regex", "pattern": "x"}]}
    (place / "rounds.yaml").write_text(yaml.safe_dump(tree))
    result = command("eval", "rounds.yaml", cwd=place)
    assert result.returncode == 2 and "set evaluate.data to a file of preferences" in result.stderr
    assert "raydpo rounds" in result.stderr


def test_answers_are_scored_prompt_by_prompt_and_sorted_back():
    """Answers of a mode are in the order of prompts, and each side keeps its own."""
    tokenizer = make_tokenizer()
    tokeniser = type("T", (), {"tokenizer": tokenizer, "stop_ids": (2,)})
    ids = {
        text: np.array([*tokenizer(text)["input_ids"], 2], np.int32) for text in ("sky", "blue", "red", "cat", "dog", "no")
    }
    prompts = [Prompt(np.array([5, 6], np.int32), "a:1")] * 2 + [Prompt(np.array([7], np.int32), "a:2")] * 2
    policy, reference = (
        [ids[one] for one in ("sky", "blue", "red", "cat")],
        [ids[one] for one in ("dog", "no", "sky", "red")],
    )
    answers = Answers("sampled", prompts, np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), policy, reference, tokeniser)
    table = answers_to_score(answers, [("p", '{"x": 1}'), ([{"role": "user", "content": "q"}], "{}")])
    said = table["completion"].to_pylist()
    assert said == ["sky", "blue", "dog", "no", "red", "cat", "sky", "red"]
    assert table["sample"].to_pylist() == [0, 1, 2, 3] * 2 and len(set(table["prompt_id"].to_pylist()[:4])) == 1
    assert table["columns"].to_pylist()[0] == '{"x": 1}' and json.loads(table["prompt"][7].as_py())[0]["content"] == "q"
    assert table["completion_ids"][2].as_py() == ids["dog"].tolist()
    scored = pa.Table.from_pylist(
        [{"reward": float(len(text)), "parts": [("f", float(len(text)))], "seconds": 0.0} for text in said], SCORES
    )
    found = Rewarded.of(answers, scored)
    assert found.scores["policy"]["reward"].to_pylist() == [3, 4, 3, 3]
    assert found.scores["reference"]["reward"].to_pylist() == [3, 2, 3, 3]
    (figures,) = found.figures([RewardConfig(use="a:f")])
    assert figures["difference"]["value"] == 0.5 and figures["policy"]["value"] == 3.25 and figures["answers"] == 4
    # A function without a weight failed on one answer: the sum is known, and nothing of it is missing.
    errors = pa.array(["g: ValueError: no", *[None] * 7])
    scored = scored.set_column(scored.schema.get_field_index("error"), "error", errors)
    measured = RewardConfig.model_validate({"use": "a:g", "weight": 0})
    total = Rewarded.of(answers, scored).figures([RewardConfig(use="a:f"), measured])[-1]
    assert total["name"] == TOTAL and total["policy"]["value"] == 3.25
    assert total["errors"] == total["none"] == {"policy": 0, "reference": 0}
    # Nor is it why the sum is unknown where no function with a weight applies.
    scored = scored.set_column(0, "reward", pa.array([None, *[1.0] * 7], pa.float64()))
    total = Rewarded.of(answers, scored).figures([RewardConfig(use="a:f"), measured])[-1]
    assert total["errors"] == {"policy": 0, "reference": 0} and total["none"] == {"policy": 1, "reference": 0}
    total = Rewarded.of(answers, scored).figures([RewardConfig(use="a:f"), RewardConfig(use="a:g")])[-1]
    assert total["errors"] == {"policy": 1, "reference": 0} and total["none"] == {"policy": 0, "reference": 0}


def test_nothing_is_rewarded_without_answers(place):
    with pytest.raises(ConfigError, match="rewards has no answers to judge, since prompts is 0"):
        load_config(place / "config.yaml", ["evaluate={prompts: 0, rewards: [{use: regex, pattern: x}]}"])


def test_functions_get_the_columns_of_the_record_of_a_prompt(place, tmp_path):
    tree = yaml.safe_load((place / "config.yaml").read_text())
    records = [{**record, "answer": number, "completions": "x"} for number, record in enumerate(preferences(4, high=5))]
    tree["evaluate"]["data"] = str(write_preferences(tmp_path / "b.jsonl", records))
    config = load_config(tree)
    notes = {}
    asked = [Prompt(np.array([1], np.int32), f"b:{row}") for row in (3, 1)]
    found = prompt_records(asked, config, notes)
    assert [text for text, _ in found] == [records[2]["prompt"], records[0]["prompt"]]
    assert [json.loads(columns)["answer"] for _, columns in found] == [2, 0]
    assert set(json.loads(found[0][1])) == {"chosen", "rejected", "answer"}
    (note,) = notes
    assert "the column 'completions' is not given to reward functions" in note


def test_records_that_a_reward_cannot_read_are_told(place, monkeypatch):
    monkeypatch.chdir(place)
    tree = yaml.safe_load((place / "config.yaml").read_text())
    config = load_config(tree | {"evaluate": {"prompts": 3, "rewards": [{"use": "json", "column": "chosen"}]}})
    pairs = pairs_to_evaluate(config, open_tokeniser(config), Console(io.StringIO()))[0]
    out = io.StringIO()
    _check_columns(choose_prompts(pairs, 3, 0), config, Console(out))
    assert "warning: the reward json cannot read 'chosen' of 3 of 3 evaluated prompt(s) (first: pair " in out.getvalue()
    assert "warning: no reward with a weight applies to any of 3 evaluated prompt(s), such as pair " in out.getvalue()
