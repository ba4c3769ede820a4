"""Wins by scores: a user's function, and a reward model."""

import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tokenizer

from raydpo.answers.contests import Contest, by_scores, count_wins, own_scores, win_rate_at_equal_length
from raydpo.answers.reward import RewardModel, check_prompts, check_reward_model
from raydpo.errors import ConfigError, FilesError, ModelError, RaydpoError

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
    (refused,) = work.open("cpu")(pa.table({"prompt": [json.dumps("sky " * 300)], "answer": ["x"]})).to_pylist()
    assert refused["score"] is None and "tokens, but the reward model takes at most 128" in refused["error"]


def with_tokens(classifier, directory, tokens, special):
    """A copy of the classifier whose tokenizer has more tokens than its embedding has rows."""
    from transformers import AutoTokenizer

    shutil.copytree(classifier, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if special:
        tokenizer.add_tokens(tokens, special_tokens=True)
        tokenizer.save_pretrained(directory)
    else:
        tree = json.loads((directory / "tokenizer.json").read_text())
        tree["model"]["vocab"] |= {token: len(tokenizer) + number for number, token in enumerate(tokens)}
        (directory / "tokenizer.json").write_text(json.dumps(tree))
    return str(directory)


def test_token_ids_that_a_reward_model_does_not_have(classifier, tmp_path):
    assert check_reward_model(str(classifier), False) == []
    plain = with_tokens(classifier, tmp_path / "plain", ["plainly", "simply"], special=False)
    with pytest.raises(FilesError, match=r"gives token ids up to [\d]+ \('simply'\), but its embedding has [\d]+ rows"):
        check_reward_model(plain, False)
    padded = with_tokens(classifier, tmp_path / "padded", ["<turn>"], special=True)
    (warning,) = check_reward_model(padded, False)
    assert "has 1 special token(s) (<turn>) beyond the " in warning
    act = RewardModel.at(padded, "float32", False).open("cpu")
    rows = pa.table({"prompt": [json.dumps("The sky <turn> is"), json.dumps("The sky is")], "answer": [" blue"] * 2})
    refused, scored = act(rows).to_pylist()
    assert re.search(r"gives token ids up to [\d]+ \('<turn>'\).*give the reward model with the tok", refused["error"])
    assert refused["score"] is None and scored["score"] is not None and scored["error"] is None
    talk = [{"role": "user", "content": "why"}]
    check_prompts(padded, False, ["The sky", talk])
    (tmp_path / "padded" / "chat_template.jinja").write_text("{% for m in messages %}<turn>{{ m['content'] }}{% endfor %}")
    with pytest.raises(FilesError, match=r"\('<turn>'\)"):
        check_prompts(padded, False, ["The sky", talk])
    (tmp_path / "padded" / "chat_template.jinja").unlink()
    with pytest.raises(FilesError, match=r"the reward model \S+padded has no chat template"):
        check_prompts(padded, False, [talk])
    with pytest.raises(FilesError, match="the reward model takes at most 128"):
        check_prompts(str(classifier), False, ["sky " * 300])


def test_outputs_are_counted_before_anything_is_loaded(tmp_path):
    two = make_classifier(tmp_path / "two", labels=2)
    with pytest.raises(FilesError, match=r"has 2 outputs \(num_labels in its config.json\); expected one"):
        check_reward_model(str(two), False)


def test_a_reward_model_that_numbers_positions_behind_its_padding(tmp_path):
    """RoBERTa has 514 rows for 512 tokens."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    tokenizer = make_tokenizer()
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=34, num_labels=1, pad_token_id=1,
    )  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    act = RewardModel.at(str(tmp_path), "float32", False).open("cpu")
    table = pa.table({"prompt": [json.dumps("")], "answer": ["\n" * 32]})
    assert len(tokenizer("\n" * 32)["input_ids"]) == 32 and act(table)["error"].to_pylist() == [None]
    (error,) = act(pa.table({"prompt": [json.dumps("")], "answer": ["\n" * 33]}))["error"].to_pylist()
    assert "have 33 tokens, but the reward model takes at most 32" in error


def test_what_is_no_reward_model_is_refused(tiny_llama, tmp_path):
    """A language model would get a head with random weights, and judge with it."""
    with pytest.raises(ModelError, match=r"lack score\.weight, which would be random numbers"):
        RewardModel.at(str(tiny_llama), "float32", False).open("cpu")
    two = make_classifier(tmp_path / "two", labels=2)
    with pytest.raises(ModelError, match=r"2 outputs .*expected one"):
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
    (found,) = act(pa.table({"prompt": [json.dumps("The sky is")], "answer": [" blue"]})).to_pylist()
    assert found["score"] is None and re.search(r"gives the answer ' blue' a score of (nan|-?inf)", found["error"])
