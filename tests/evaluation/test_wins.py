"""Wins by scores: a user's function, and a reward model."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tokenizer

from raydpo.answers.contests import Contest, by_scores, count_wins, own_scores, win_rate_at_equal_length
from raydpo.answers.reward import RewardModel
from raydpo.errors import ConfigError, ModelError, RaydpoError

CONTESTS = [Contest("p", "longer answer", "short"), Contest("p", "a", "longer"), Contest("p", "same", "same")]


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(body):
        name = f"scores_{abs(hash(body))}"
        (tmp_path / f"{name}.py").write_text(body)
        return name

    return write


def test_own_function(module):
    name = module("def length(prompt, answer):\n    return len(answer)\n")
    verdicts, more = by_scores(*own_scores(f"{name}:length", CONTESTS))
    found = count_wins("length", "greedy", CONTESTS, verdicts, **more)
    assert (found["wins"], found["ties"], found["losses"]) == (1, 1, 1) and found["win_rate"]["value"] == 0.5
    assert found["score_difference"]["value"] == pytest.approx((8 - 5 + 0) / 3)


@pytest.mark.parametrize(
    ("left", "by_length", "longer"), [(0.0, 2.0, 250.0), (0.6, 1.5, -150.0), (0.0, 0.0, 0.0), (1.5, 0.0, 100.0)]
)
def test_what_is_left_of_wins_at_equal_length(left, by_length, longer):
    """The judge prefers length and the answers have grown, so half of the gain in win rate comes from length."""
    random, truth = np.random.default_rng(6), 1 / (1 + np.exp(-left))
    found = []
    for _ in range(800):
        difference = random.normal(longer, 300, 64)
        odds = left + by_length * np.tanh(difference / np.sqrt((difference**2).mean()))
        found.append(win_rate_at_equal_length((random.random(64) < 1 / (1 + np.exp(-odds))).astype(float), difference))
    assert np.mean([one["value"] for one in found]) == pytest.approx(truth, abs=0.02)
    assert 0.93 < np.mean([one["low"] <= truth <= one["high"] for one in found]) < 0.99


def test_length_alone_that_tells_all_is_no_proof():
    difference = np.repeat([100.0, -100.0], 20)
    found = win_rate_at_equal_length((difference > 0).astype(float), difference)
    assert found["value"] == pytest.approx(0.5) and found["low"] < 0.2 and found["high"] > 0.8
    wins = np.array([1.0, 1.0, 1.0, 0.0, 0.5] * 8)
    assert win_rate_at_equal_length(wins, np.zeros(40))["value"] == pytest.approx(0.7, abs=0.01)
    assert win_rate_at_equal_length(wins[:1], np.zeros(1)) == {"value": None, "low": None, "high": None}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ValueError('no')", "ValueError: no"),
        ("return float('nan')", "finite number"),
        ("return 'high'", "'high'"),
        ("return None", "finite number"),
        ("return True", "finite number"),
    ],
)
def test_a_function_that_gives_no_number_is_an_error(body, said, module):
    name = module(f"def score(prompt, answer):\n    {body}\n")
    with pytest.raises(RaydpoError, match=said):
        own_scores(f"{name}:score", CONTESTS)


def test_no_such_function(module):
    name = module("value = 3\n")
    for path in ("nowhere_at_all:score", f"{name}:score", f"{name}:value"):
        with pytest.raises(ConfigError, match=r"evaluate\.score_with"):
            own_scores(path, CONTESTS)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return make_classifier(tmp_path_factory.mktemp("reward"), labels=1)


def make_classifier(directory, labels):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    tokenizer = make_tokenizer()
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        num_labels=labels,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_reward_model(classifier):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    work = RewardModel.at(str(classifier), "float32", False)
    talk = [{"role": "user", "content": "why is the sky blue"}]
    rows = pa.table({"prompt": [json.dumps(talk), json.dumps("why is the sky")], "answer": ["because", " blue"]})
    scores = work.open("cpu")(rows)["score"].to_numpy()
    rendered = tokenizer.apply_chat_template([*talk, {"role": "assistant", "content": "because"}], tokenize=False)
    for text, score in zip((rendered, "why is the sky blue"), scores, strict=True):
        with torch.no_grad():
            expected = model(tokenizer(text, return_tensors="pt")["input_ids"]).logits[0, 0].item()
        assert score == pytest.approx(expected, abs=1e-6)
    assert np.std(scores) > 0
    with pytest.raises(ModelError, match="tokens, but the reward model takes at most 128"):
        work.open("cpu")(pa.table({"prompt": [json.dumps("sky " * 300)], "answer": ["x"]}))


def test_what_is_no_reward_model_is_refused(tiny_llama, tmp_path):
    """A language model would get a head with random weights, and judge with it."""
    with pytest.raises(ModelError, match=r"lack score\.weight, which would be random numbers"):
        RewardModel.at(str(tiny_llama), "float32", False).open("cpu")
    two = make_classifier(tmp_path / "two", labels=2)
    with pytest.raises(ModelError, match="2 outputs; expected one"):
        RewardModel.at(str(two), "float32", False).open("cpu")
    (tmp_path / "two" / "model.safetensors").rename(tmp_path / "two" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        RewardModel.at(str(two), "float32", False)


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("model.safetensors", "is another model than where the run was started"),
        ("chat_template.jinja", "has another tokenizer on"),
    ],
)
def test_rewards_are_never_stored_under_the_name_of_another_model(file, told, classifier, tmp_path):
    ours = shutil.copytree(classifier, tmp_path / "ours")
    work = RewardModel.at(str(ours), "float32", False)
    work.open("cpu")
    if file == "model.safetensors":
        save_file({name: value + 1 for name, value in load_file(ours / file).items()}, ours / file, {"format": "pt"})
    else:
        (ours / file).write_text("another")
    with pytest.raises(ModelError, match=told):
        work.open("cpu")


def test_code_of_a_reward_model_belongs_to_the_identity(classifier, tmp_path):
    ours = shutil.copytree(classifier, tmp_path / "ours")
    assert RewardModel.at(str(ours), "float32", True).identity == RewardModel.at(str(ours), "float32", False).identity
    config = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoModelForSequenceClassification": "modeling_x.X"}})
    )
    assert RewardModel.at(str(ours), "float32", True).identity != RewardModel.at(str(ours), "float32", False).identity


def test_the_tokenizer_belongs_to_the_identity(classifier, tmp_path):
    def identity(path):
        return RewardModel.at(str(path), "float32", False).identity

    other = shutil.copytree(classifier, tmp_path / "other")
    assert identity(other) == identity(classifier)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + "!")
    assert identity(other) != identity(classifier)


def test_a_score_that_is_no_number_is_an_error(classifier, tmp_path):
    ours = shutil.copytree(classifier, tmp_path / "ours")
    tensors = load_file(ours / "model.safetensors")
    tensors["score.weight"].fill_(3e38)  # finite, but no sum of a few is
    save_file(tensors, ours / "model.safetensors", metadata={"format": "pt"})
    act = RewardModel.at(str(ours), "float32", False).open("cpu")
    with pytest.raises(ModelError, match=r"gives the answer ' blue' a score of (nan|-?inf)"):
        act(pa.table({"prompt": [json.dumps("The sky is")], "answer": [" blue"]}))
