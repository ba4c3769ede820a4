"""Reward models that score batches: the scores are those of single sequences, and a model that padding changes is told."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from test_wins import make_classifier
from tiny import make_tokenizer, preferences

from raydpo.answers import classifier as batching
from raydpo.answers.classifier import Classifier
from raydpo.answers.reward import RewardModel

VOCABULARY = 300
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_labels": 1,
}
GQA = {"num_key_value_heads": 1, "max_position_embeddings": 128}
PROBES = [[7, 8], [9, 10, 11, 12, 13], [40, 41, 42, *range(50, 80)], [5] * 60]
FAMILIES = {
    "llama": GQA | {"pad_token_id": 0},
    "qwen3": GQA | {"pad_token_id": 299, "head_dim": 16},
    "llama without padding": GQA | {"pad_token_id": None},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "pad_token_id": None},
    "bert": {"max_position_embeddings": 128},
    "roberta": {"max_position_embeddings": 130, "pad_token_id": 1},
    "deberta-v2": {
        "max_position_embeddings": 128,
        "relative_attention": True,
        "position_buckets": 32,
        "pos_att_type": ["p2c", "c2p"],
    },
    "modernbert": {
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "global_attn_every_n_layers": 2,
        "local_attention": 16,
    },
}


def made(family, dtype=torch.float32):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(5)
    config = AutoConfig.for_model(family.split()[0], **SIZES | FAMILIES[family])
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():  # initial weights are so small that all tokens are alike
            if weight.dim() > 1:
                weight.mul_(4)
    return model.to(dtype)


def rows(count, low=1, high=90, seed=1):
    random = np.random.default_rng(seed)
    return [random.integers(2, VOCABULARY, random.integers(low, high)).tolist() for _ in range(count)]


@torch.no_grad()
def singly(model, sequences):
    """Scores by definition: one sequence at a time, without padding."""
    return np.array([float(model(input_ids=torch.tensor([row])).logits[0, 0]) for row in sequences])


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_batches_are_those_of_single_sequences(family):
    model, sequences = made(family), rows(70)
    expected = singly(model, sequences)
    scorer = Classifier(model, PROBES)
    assert scorer.alone is None and np.std(expected) > 0.01
    np.testing.assert_allclose(scorer.scores(sequences), expected, atol=2e-5 * np.abs(expected).max())


def test_bfloat16():
    model, sequences = made("qwen3", torch.bfloat16), rows(40)
    expected, scorer = singly(model, sequences), Classifier(model, PROBES)
    assert scorer.alone is None
    np.testing.assert_allclose(scorer.scores(sequences), expected, atol=0.05 * np.abs(expected).max())


def test_a_model_without_padding_is_scored_at_its_last_token_whatever_that_is():
    """Any id may end a sequence. The one that pads must not be among them."""
    model = made("llama without padding")
    sequences = [[*row, last] for last, row in zip(range(60), rows(60), strict=True)]
    expected, scorer = singly(model, sequences), Classifier(model, PROBES)
    assert scorer.alone is None
    np.testing.assert_allclose(scorer.scores(sequences), expected, atol=2e-5 * np.abs(expected).max())


def test_a_sequence_alone_is_not_read_with_the_padding_of_a_batch_before():
    """Id 0 is "!" in the vocabularies of GPT-2, Llama 3 and Qwen: many answers end with it."""
    model = made("gpt2")
    (expected,), scorer = singly(model, [[7, 8, 9, 0]]), Classifier(model, PROBES)
    scorer.scores([[5, 6], [7, 8]])
    assert scorer.scores([[7, 8, 9, 0]]) == pytest.approx([expected], rel=1e-5)


def test_a_text_that_ends_with_the_padding_token_keeps_its_score():
    """Many reward models pad with the token that ends every answer."""
    model = made("llama")
    sequences = [[*row, 0] for row in rows(20)]
    expected, scorer = singly(model, sequences), Classifier(model, PROBES)
    assert scorer.alone is None
    np.testing.assert_allclose(scorer.scores(sequences), expected, atol=2e-5 * np.abs(expected).max())


class Careless(torch.nn.Module):
    """A classifier with a fault that only padding shows."""

    def __init__(self, fault):
        super().__init__()
        self.inner, self.fault = made("llama"), fault
        self.config = self.inner.config

    @property
    def device(self):
        return self.inner.device

    def forward(self, input_ids, attention_mask=None):
        if self.fault == "refuses" and len(input_ids) > 1:
            raise ValueError("Cannot handle batch sizes > 1")
        if self.fault == "no mask":
            attention_mask = None
        hidden = self.inner.model(input_ids, attention_mask=attention_mask).last_hidden_state
        if self.fault == "last position":
            return type("Output", (), {"logits": self.inner.score(hidden[:, -1])})
        if self.fault == "mean of all":
            return type("Output", (), {"logits": self.inner.score(hidden.mean(1))})
        if self.fault == "NaN":
            return type("Output", (), {"logits": self.inner.score(hidden.mean(1)) * (torch.nan if len(hidden) > 1 else 1)})
        return self.inner(input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("last position", "padding changes its scores (by "),
        ("mean of all", "padding changes its scores (by "),
        ("NaN", "padding changes its scores (by nan"),
        ("refuses", "it refuses padded batches (ValueError: Cannot handle batch sizes > 1)"),
    ],
)
def test_a_model_that_padding_changes_scores_one_sequence_at_a_time(fault, said):
    model = Careless(fault)
    scorer, sequences = Classifier(model, PROBES), rows(9)
    assert scorer.alone.startswith(said)
    assert scorer.scores(sequences).tolist() == singly(model, sequences).tolist()


def test_a_causal_model_may_ignore_the_mask_of_padding_behind_its_text():
    assert Classifier(Careless("no mask"), PROBES).alone is None


def test_batches_hold_similar_lengths_and_few_positions(monkeypatch):
    monkeypatch.setattr(batching, "BATCH_ROWS", 4)
    lengths = [3, 50, 40, 200, 3, 3, 3, 3, 30]
    found = list(batching._batches(lengths, 100))
    assert found == [[3], [1, 2], [8, 0, 4], [5, 6, 7]] and list(batching._batches([], 100)) == []


def test_equal_answers_have_equal_scores_and_one_that_cannot_be_scored_is_its_own_error(tmp_path):
    """The order of rows and copies of them change nothing."""
    work = RewardModel.at(str(make_classifier(tmp_path, labels=1)), "float32", False)
    records = preferences(12, high=8)
    prompts, answers = [json.dumps(one["prompt"][-20:]) for one in records], [one["chosen"] for one in records]
    prompts, answers = [*prompts, prompts[3], json.dumps(""), json.dumps("")], [*answers, answers[3], "sky " * 300, ""]
    found = work.open("cpu")(pa.table({"prompt": prompts, "answer": answers})).to_pylist()
    assert [one["error"] is None for one in found] == [True] * 13 + [False] * 2
    assert "the reward model takes at most 128" in found[13]["error"] and "have no token" in found[14]["error"]
    assert found[3] == found[12] and all(one["alone"] is None for one in found)
    assert all(one["seconds"] > 0 for one in found[:13]) and found[13]["score"] is None
    other = work.open("cpu")(pa.table({"prompt": prompts[::-1], "answer": answers[::-1]})).to_pylist()
    assert [one["score"] for one in other[::-1]] == pytest.approx([one["score"] for one in found], nan_ok=True)


@pytest.mark.parametrize("name", ["vocab.txt", "spm.model", "sentencepiece.bpe.model", "added_tokens.json"])
def test_another_vocabulary_is_another_reward_model(tmp_path, name):
    """Those of BERT and DeBERTa may have no tokenizer.json."""
    make_classifier(tmp_path, labels=1)
    found = []
    for text in (None, "[PAD]\na\nb\n", "[PAD]\nb\na\n"):
        if text is not None:
            (tmp_path / name).write_text(text)
        found.append(json.dumps(RewardModel.at(str(tmp_path), "float32", False).identity))
    assert len(set(found)) == 3


def test_scores_do_not_depend_on_the_side_on_which_its_tokenizer_pads(tmp_path):
    from transformers import AutoTokenizer

    make_classifier(tmp_path, labels=1)
    table = pa.table({"prompt": [json.dumps("The sky is"), json.dumps("Why")], "answer": [" blue and green", "?"]})
    found = []
    for side in ("right", "left"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        tokenizer.padding_side = side
        tokenizer.save_pretrained(tmp_path)
        found.append(RewardModel.at(str(tmp_path), "float32", False).open("cpu")(table)["score"].to_pylist())
    assert found[0] == found[1] and len(make_tokenizer()("Why?")["input_ids"]) > 1
