"""Answers from a prefill that answers share, in a batch that they leave, are those of transformers' own loop.

Both are ours to choose from: the latter is the way for models whose state is not all in the cache.
"""

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, HYBRIDS, MORE_MIXTURES, make_random
from packages import AUDIO, FAMILIES, make_package
from peft import LoraConfig, get_peft_model

from raydpo.answers import transformers_engine
from raydpo.answers.draws import Draw
from raydpo.answers.transformers_engine import answer_all
from raydpo.model.load import load_causal_lm

VOCABULARY, LONGEST, STOP = 96, 24, (2, 7, 11)
FEW = (
    "llama",
    "gemma2",  # sliding windows, which these answers leave
    "gemma3_text",
    "phi3-longrope",
    "gpt2",  # learned positions
    "bloom",  # ALiBi
    "mixtral",
    "deepseek_v3",  # latent attention
    "mamba",
    "qwen3_next",
    "falcon_h1",  # attention and a state in one layer
    "lfm2",
    "recurrent_gemma",
    "minimax",
    "rwkv",
)
OWN_LOOP = {"recurrent_gemma", "minimax", "rwkv"}
"""Models that keep a state in their modules, or in a cache of their own."""
NO_ANSWERS = {"xlstm", "llama-dynamic"}
"""Its code in transformers 5.23 fails in ``generate`` with these settings; its positions end at 32."""
EVERY = [name for name in [*ARCHITECTURES, *MORE_MIXTURES, *HYBRIDS] if name not in NO_ANSWERS]
PACKAGES = ("gemma3", "qwen2_5_vl")


def questions():
    """Rows of five prompts, two of which are as long: one greedy and three sampled answers to each, in a random order."""
    random = np.random.default_rng(0)
    prompts = [random.integers(3, VOCABULARY - 8, length).astype(np.int32) for length in (5, 3, 9, 20, 5)]
    rows = [(prompt, sample) for prompt in prompts for sample in (None, 0, 1, 7)]
    random.shuffle(rows)
    draws = [sample and Draw(seed=1, sample=sample, temperature=1.0 if sample < 7 else 0.7) for _, sample in rows]
    draws = [
        Draw(seed=1, sample=0, top_p=0.8) if sample == 0 else draw for (_, sample), draw in zip(rows, draws, strict=True)
    ]
    return [prompt for prompt, _ in rows], draws


def both(model, monkeypatch, *, batch=9):
    """Answers by either way, and whether the first way was taken."""
    with torch.no_grad():  # distributions that are neither flat nor certain, and that depend on the whole context
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "vision" not in name:
                parameter.mul_(3)
    prompts, draws = questions()
    settings = {"max_tokens": LONGEST, "stop": STOP, "batch": batch}
    shared = []

    def watched(*told, holds_all=transformers_engine._holds_all):
        shared.append(holds_all(*told))
        return shared[-1]

    monkeypatch.setattr(transformers_engine, "_holds_all", watched)
    ours = [ids.tolist() for ids in answer_all(model, prompts, draws, **settings)]
    monkeypatch.setattr(transformers_engine, "_holds_all", lambda *told: False)
    theirs = [ids.tolist() for ids in answer_all(model, prompts, draws, **settings)]
    return ours, theirs, all(shared)


@pytest.mark.parametrize("name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in EVERY])
def test_every_kind_of_cache(name, monkeypatch):
    ours, theirs, shared = both(make_random(name, VOCABULARY), monkeypatch)
    assert ours == theirs
    assert shared == (name not in OWN_LOOP)
    assert len({tuple(ids) for ids in ours}) > 5


@pytest.mark.parametrize(
    "family", [name if name in PACKAGES else pytest.param(name, marks=pytest.mark.slow) for name in [*FAMILIES, *AUDIO]]
)
def test_packages(family, monkeypatch, tmp_path):
    """The text model of a package may have positions of three dimensions, and keeps none from batch to batch."""
    model = load_causal_lm(make_package(tmp_path / "model", family), "float32", rope_length=None)
    ours, theirs, shared = both(model, monkeypatch)
    assert ours == theirs and shared


def test_an_adapter(monkeypatch):
    torch.manual_seed(0)
    model = get_peft_model(
        make_random("llama", VOCABULARY), LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")
    )
    ours, theirs, shared = both(model.eval(), monkeypatch)
    assert ours == theirs and shared


@pytest.mark.parametrize("batch", [1, 2, 100])
def test_batches_of_any_size(batch, monkeypatch):
    """A prompt with more answers than a batch holds is prefilled for each of its batches."""
    ours, theirs, shared = both(make_random("qwen3", VOCABULARY), monkeypatch, batch=batch)
    assert ours == theirs and shared
