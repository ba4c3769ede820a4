"""Answers: greedy ones are the most likely tokens, samples come from the whole distribution, neither knows its batch."""

import shutil

import numpy as np
import pytest
import torch
from tiny import make_model
from tiny_world import LONGEST, STOP, exact_log_probs, make_world, sequences

from raydpo.answers.answering import Answering
from raydpo.answers.draws import Draw, uniforms
from raydpo.answers.transformers_engine import answer_all
from raydpo.errors import ConfigError, ModelError
from raydpo.reference.identity import identify
from raydpo.reference.score import ReferenceSpec

PINNED = [0.9375994637456082, 0.5930678381474375, 0.7977723292791971, 0.7364599058631581]
PROMPTS = [np.array(ids, np.int32) for ids in ([3], [1, 2, 3], [4, 4], [2, 1, 4, 3, 1], [1])]


@pytest.fixture(scope="module")
def world():
    return make_world(0).policy


def answer(model, prompts, draws, batch=4, max_tokens=8):
    return [ids.tolist() for ids in answer_all(model, prompts, draws, max_tokens=max_tokens, stop=[STOP], batch=batch)]


def test_greedy_is_the_most_likely_token_each_time(world):
    found = answer(world, PROMPTS, [None] * len(PROMPTS))
    for prompt, ids in zip(PROMPTS, found, strict=True):
        expected = []
        while len(expected) < 8 and STOP not in expected:
            with torch.no_grad():
                logits = world(torch.tensor([prompt.tolist() + expected])).logits[0, -1]
            expected.append(int(logits.argmax()))
        assert ids == expected


def test_a_sample_depends_on_seed_prompt_and_number_alone(world):
    draws = [Draw(seed=1, sample=number) for number in range(len(PROMPTS))]
    together = answer(world, PROMPTS, draws)
    assert together == answer(world, PROMPTS, draws, batch=1)
    backwards = answer(world, PROMPTS[::-1], draws[::-1], batch=2)
    assert together == backwards[::-1]
    assert together != answer(world, PROMPTS, [Draw(seed=2, sample=number) for number in range(len(PROMPTS))])
    mixed = answer(world, PROMPTS + PROMPTS, [None] * len(PROMPTS) + draws, batch=7)
    assert mixed[len(PROMPTS) :] == together and mixed[: len(PROMPTS)] == answer(world, PROMPTS, [None] * len(PROMPTS))


def test_samples_are_distributed_as_the_model_says(world):
    """The frequencies of all sequences in 4,000 answers of at most three tokens match their probabilities (chi-square)."""
    count, prompt = 4000, np.array([1, 3], np.int32)
    found = answer(world, [prompt] * count, [Draw(seed=5, sample=number) for number in range(count)], 1000, LONGEST)
    times = {}
    for ids in found:
        times[tuple(ids)] = times.get(tuple(ids), 0) + 1
    every = sequences()
    assert set(times) <= set(every)
    expected = count * np.exp(exact_log_probs(world, prompt, every))
    assert expected.sum() == pytest.approx(count)
    common = expected >= 5
    observed = np.array([times.get(ids, 0) for ids in every])
    statistic = ((observed - expected)[common] ** 2 / expected[common]).sum()
    freedom = common.sum()
    assert statistic < freedom + 4 * np.sqrt(2 * freedom), (statistic, freedom)


def test_temperature_sharpens(world):
    cold = answer(world, PROMPTS, [Draw(seed=0, sample=0, temperature=1e-3)] * len(PROMPTS))
    assert cold == answer(world, PROMPTS, [None] * len(PROMPTS))


def test_settings_that_a_model_carries_are_not_the_model(world):
    from transformers import GenerationConfig

    draws = [Draw(seed=3, sample=0)] * len(PROMPTS) + [None] * len(PROMPTS)
    plain = answer(world, PROMPTS * 2, draws)
    world.generation_config = GenerationConfig(
        do_sample=True, top_k=1, repetition_penalty=5.0, max_new_tokens=1, suppress_tokens=[1, 2]
    )
    assert answer(world, PROMPTS * 2, draws) == plain


def test_random_numbers_are_pinned():
    """A change of these numbers would change the answers of every stored evaluation."""
    numbers = uniforms(Draw(seed=1, sample=2), np.array([3, 4], np.int32), 4)
    assert numbers == pytest.approx(PINNED, abs=1e-12)
    assert uniforms(Draw(seed=1, sample=2), np.array([3, 4], np.int32), 2) == pytest.approx(PINNED[:2])


def test_an_answer_beyond_the_positions_is_refused(world):
    with pytest.raises(ConfigError, match=r"evaluate\.max_tokens 64 after a prompt of 5 tokens"):
        answer(world, PROMPTS, [None] * len(PROMPTS), max_tokens=64)


def test_answers_are_never_stored_under_the_name_of_another_model(tiny_llama, tmp_path):
    """The files change after the driver hashed them, for example because a run is trained again while it is evaluated."""
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    work = Answering(
        spec=ReferenceSpec(path=str(model), adapter=None, identity=identify(model, "float32")),
        max_tokens=2,
        stop=(0,),
        batch=2,
    )
    work.open("cpu")
    shutil.copy(make_model(tmp_path / "other", seed=1) / "model.safetensors", model / "model.safetensors")
    with pytest.raises(ModelError, match=r"is another model than where the run was started: weights"):
        work.open("cpu")
