import yaml

from raydpo.config import load_config
from raydpo.rundir.card import model_card
from raydpo.rundir.summary import EVALUATION_TABLE


def test_the_card_tells_what_it_was_made_from_and_nothing_of_the_machine(tiny_llama, tmp_path):
    (tmp_path / "secret-place").mkdir()
    (tmp_path / "secret-place" / "mine.jsonl").write_text("")
    config = load_config(
        {
            "output": str(tmp_path),
            "name": "trial",
            "model": {"path": str(tiny_llama), "lora": {"r": 8}},
            "data": {"train": str(tmp_path / "secret-place" / "mine.jsonl")},
            "train": {"beta": 0.3},
        }
    )
    scores = {key: 0.25 for key, _ in EVALUATION_TABLE}
    card = model_card(
        config,
        {
            "raydpo": "1.0",
            "steps": 1200,
            "pairs_seen": 9600,
            "training_pairs": 4800,
            "gate": "step-0 gate: a | b",
            "reference": {"path": str(tiny_llama), "identity": "abc123"},
            "held_out_pairs": 50,
            "eval_before": scores,
            "eval_after": scores,
        },
    )
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "peft" and "dpo" in front["tags"] and "base_model" not in front
    for told in (
        "# trial",
        "| beta | 0.3 |",
        "LoRA, r 8",
        "`mine.jsonl`, 4,800 pairs",
        "identity `abc123`",
        "1,200",
        "| step-0 gate | a \\| b |",
        "| loss | 0.250 | 0.250 |",
    ):
        assert told in card, told
    assert str(tmp_path) not in card and "secret-place" not in card


def test_a_directory_that_is_named_like_a_model_of_the_hub_is_none(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    summary = {"raydpo": "1.0", "steps": 1, "pairs_seen": 1, "training_pairs": 1, "gate": None, "held_out_pairs": 0}
    summary |= {"reference": {"path": "org/model", "identity": "abc"}, "eval_before": None, "eval_after": None}
    (tmp_path / "a.jsonl").write_text("")

    def base():
        config = load_config({"output": "runs", "model": {"path": "org/model"}, "data": {"train": "a.jsonl"}})
        card = model_card(config, summary)
        assert "| step-0 gate | not run |" in card
        return yaml.safe_load(card.split("---")[1]).get("base_model")

    assert base() == "org/model"
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert base() is None


def test_the_card_of_a_round_names_prompts_rewards_and_the_round_before(tmp_path):
    """As rounds.training sets the configuration of a round: its directory, and the policy of the round before."""
    config = load_config(
        {
            "name": "sums",
            "output": str(tmp_path),
            "model": {"path": "org/model"},
            "rounds": {
                "prompts": "org/sums",
                "rewards": [{"use": "math"}, {"use": "regex", "pattern": "7", "weight": 0}],
                "sample": {"max_tokens": 12},
            },
        }
    )
    before = f"{config.run_dir}/round-001/train/final"
    update = {
        "name": "train",
        "output": f"{config.run_dir}/round-002",
        "model": config.model.model_copy(update={"path": before}),
    }
    summary = {"raydpo": "1.0", "steps": 8, "pairs_seen": 64, "training_pairs": 24, "gate": None, "held_out_pairs": 0}
    summary |= {"reference": {"path": "org/model", "identity": "abc"}, "eval_before": None, "eval_after": None}
    summary["name"] = "sums/round-002"
    card = model_card(config.model_copy(update=update), summary)
    for told in (
        "# sums/round-002",
        "Trained from the policy of `round-001` by",
        "| data | answers to prompts of `org/sums`, 24 pairs |",
        "| rewards | math (weight 1), regex (weight 0) |",
        "| reference | `org/model`, identity `abc` |",
        "answers of the model itself",
    ):
        assert told in card, told
    assert str(tmp_path) not in card and "fixed set" not in card
