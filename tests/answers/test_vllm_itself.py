"""vLLM itself: its answers are those of transformers, and adapters are not confused. See ``test_vllm`` for how to run it."""

import os

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_model
from transformers import AutoModelForCausalLM

from raydpo.answers.draws import Draw
from raydpo.answers.transformers_engine import answer_all
from raydpo.answers.vllm_engine import open_vllm
from raydpo.model.load import load_causal_lm
from raydpo.reference.identity import identify
from raydpo.reference.score import ReferenceSpec

REAL = os.environ.get("RAYDPO_VLLM_PYTHON")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(REAL is None, reason="RAYDPO_VLLM_PYTHON names no Python with vLLM"),
]
TOKENS, STOP = 16, (2, 7, 11)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model whose distributions are far from flat. 32 is the smallest head that vLLM has kernels for on a CPU."""
    path = make_model(tmp_path_factory.mktemp("models") / "model", hidden=128)
    sharp = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        sharp.get_output_embeddings().weight.mul_(8)
    sharp.save_pretrained(path)
    return path


def opened(model, adapter=None):
    spec = ReferenceSpec(path=str(model), adapter=adapter, identity=identify(model, "float32", adapter))
    return open_vllm(spec, TOKENS, STOP, python=REAL, positions=64, memory_share=0.2, device="cpu")


def ours(model, prompts, draws, adapter=None):
    loaded = load_causal_lm(model, "float32", adapter=adapter, rope_length=None)
    return answer_all(loaded, prompts, draws, max_tokens=TOKENS, stop=STOP, batch=64)


def prompts(count):
    random = np.random.default_rng(0)
    return [random.integers(3, 256, 4 + number % 20).astype(np.int32) for number in range(count)]


def make_lora(model, folder, seed):
    torch.manual_seed(seed)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")
    )
    adapted.save_pretrained(folder)
    return str(folder)


def same(one, other):
    return np.mean([a.tolist() == b.tolist() for a, b in zip(one, other, strict=True)])


def test_greedy_answers_and_success_of_samples(model):
    """Samples have other random numbers there: compared is how many have a property, here an even second token."""
    answer, greedy = opened(model), prompts(50)
    assert same(answer(greedy, [None] * 50), ours(model, greedy, [None] * 50)) >= 0.95
    for settings in ({}, {"temperature": 0.7}, {"top_p": 0.6}):
        asked = [prompt for prompt in greedy[:10] for _ in range(50)]
        draws = [Draw(seed=3, sample=number % 50, **settings) for number in range(500)]
        theirs, mine = answer(asked, draws), ours(model, asked, draws)
        assert same(theirs, answer(asked, draws)) == 1, "each request has a seed of its own"
        shares = [np.mean([len(ids) > 1 and ids[1] % 2 == 0 for ids in found]) for found in (theirs, mine)]
        error = np.sqrt(sum(share * (1 - share) / 500 for share in shares))
        assert abs(shares[0] - shares[1]) <= 3 * error, (settings, shares)
        assert 0.05 < shares[1] < 0.95
        assert len({tuple(ids) for ids in theirs[:50]}) > 5, "samples of one prompt differ"


def test_more_prompts_than_a_step_reads(model):
    """Sampled answers have seeds, with which vLLM's CPU build cannot read a prompt in two steps."""
    random = np.random.default_rng(1)
    asked = [random.integers(3, 256, 47).astype(np.int32) for _ in range(400)]
    answer, draws = opened(model), [Draw(seed=5, sample=number) for number in range(400)]
    found = answer(asked, draws)
    assert all(1 <= len(ids) <= TOKENS for ids in found)
    alone = [answer([prompt], [draw])[0] for prompt, draw in zip(asked[:40], draws, strict=False)]
    assert same(found[:40], alone) >= 0.95, "other batches may round otherwise"


def test_adapters_one_after_the_other(model, tmp_path):
    """Two adapters are open at once, and each answers as itself."""
    asked, draws = prompts(20), [None] * 20
    paths = [make_lora(model, tmp_path / str(seed), seed) for seed in (1, 2)]
    expected = [ours(model, asked, draws, path) for path in (*paths, None)]
    assert same(expected[0], expected[1]) < 0.5 and same(expected[0], expected[2]) < 0.5
    both = [opened(model, path) for path in paths]
    for number in (0, 1, 0):
        assert same(both[number](asked, draws), expected[number]) >= 0.95
