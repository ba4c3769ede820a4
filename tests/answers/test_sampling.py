"""Sampled answers: their frequencies, what selects their random numbers, and the blocks that they are stored in."""

import math
import os

import numpy as np
import pytest
import torch
from tiny_world import LONGEST, STOP, VOCABULARY, make_world, sequences

from raydpo.answers.answering import Answering
from raydpo.answers.draws import ROWS, Draw, answer_rows, rows_of_block
from raydpo.answers.transformers_engine import answer_all
from raydpo.cluster.resources import Resources
from raydpo.cluster.work import do_work, stored_name
from raydpo.reference.identity import identify
from raydpo.reference.score import ReferenceSpec
from raydpo.storage.files import Storage

DRAWS, CERTAIN = 2000, 0.999
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10], [11, 12]]
NAMES = (
    "evaluation/5369f0c44051490fd993c961d35e1267.parquet",
    "evaluation/1b0fe08ca78a5eafa9d116d9f75d9b1c.parquet",
)


@torch.no_grad()
def probabilities(model, prompt, temperature, top_p):
    """Return the probability of each sequence by definition: one step of one sequence at a time."""
    found = []
    for answer in sequences():
        chance = 1.0
        for place, token in enumerate(answer):
            logits = model(torch.tensor([[*prompt, *answer[:place]]])).logits[0, -1].double()
            chances = (logits / temperature).softmax(-1).tolist()
            kept, mass = set(), 0.0
            for best in sorted(range(VOCABULARY), key=lambda one: -chances[one]):
                if mass < top_p:
                    kept.add(best)
                    mass += chances[best]
            chance *= chances[token] / mass if token in kept else 0.0
        found.append(chance)
    return np.array(found)


def band(count, chance):
    """Return the borders of the middle CERTAIN of a binomial distribution."""
    if not 0 < chance < 1:
        return (count * chance,) * 2
    logs = [
        math.lgamma(count + 1)
        - math.lgamma(k + 1)
        - math.lgamma(count - k + 1)
        + k * math.log(chance)
        + (count - k) * math.log1p(-chance)
        for k in range(count + 1)
    ]
    below = np.exp(logs).cumsum()
    return tuple(np.searchsorted(below, ((1 - CERTAIN) / 2, (1 + CERTAIN) / 2)))


@pytest.mark.parametrize("settings", [(1.0, 1.0), (0.6, 1.0), (1.0, 0.7), (1.5, 0.9)])
def test_frequencies_are_the_probabilities(settings):
    """Each count among 2,000 draws lies within the 99.9 % band of its binomial distribution."""
    model, prompt = make_world(0).policy, np.array([1, 3], np.int32)
    temperature, top_p = settings
    draws = [Draw(seed=5, sample=number, temperature=temperature, top_p=top_p) for number in range(DRAWS)]
    answers = answer_all(model, [prompt] * DRAWS, draws, max_tokens=LONGEST, stop=[STOP], batch=500)
    every, expected = sequences(), probabilities(model, prompt, *settings)
    assert expected.sum() == pytest.approx(1)
    counts = dict.fromkeys(every, 0)
    for ids in answers:
        counts[tuple(ids.tolist())] += 1
    bands = [band(DRAWS, chance) for chance in expected]
    assert [ids for ids, (low, high) in zip(every, bands, strict=True) if not low <= counts[ids] <= high] == []
    assert (expected == 0).any() == (top_p < 1), "top_p leaves some out"


def test_rows_and_the_names_of_their_answers():
    """Answers of earlier versions keep their names. Each prompt and sample is there once."""
    rows = answer_rows([[3, 4]], samples=2, seed=5)
    assert rows.schema == ROWS and stored_name({"answers": 1}, rows) == NAMES[0]
    assert stored_name({"answers": 1}, answer_rows([[3, 4]])) == NAMES[1]
    rows = answer_rows(PROMPTS, samples=3, seed=2**62, temperature=0.5, top_p=0.9)
    asked = [(*row["prompt_ids"], row["sample"]) for row in rows.to_pylist()]
    assert asked == [(*ids, sample) for ids in PROMPTS for sample in range(3)]
    assert {(row["seed"], row["temperature"], row["top_p"]) for row in rows.to_pylist()} == {(2**62, 0.5, 0.9)}
    assert [rows_of_block(*sizes) for sizes in ((8, 64), (6, 64), (100, 64), (0, 64))] == [64, 66, 100, 64]


def spec_of(model):
    return ReferenceSpec(path=str(model), adapter=None, identity=identify(model, "float32"))


def answers_of(work, blocks):
    act = work.open("cpu")
    return [act(block)["answer_ids"].to_pylist() for block in blocks]


def test_what_selects_an_answer(tiny_llama):
    """Another seed or number gives another answer, another policy the same random numbers, another order of blocks the same
    answers."""
    work = Answering(spec=spec_of(tiny_llama), max_tokens=6, stop=(2,), batch=8)
    rows = answer_rows(PROMPTS, samples=4, seed=1)
    blocks = [rows.slice(start, 8) for start in (0, 8)]
    found = answers_of(work, blocks)
    assert answers_of(work, blocks[::-1]) == found[::-1]
    every = [tuple(ids) for block in found for ids in block]
    assert len(set(every)) == len(every), "a vocabulary of 512, and each answer with numbers of its own"
    other = answers_of(work, [answer_rows(PROMPTS, samples=4, seed=2)])[0]
    assert not set(every) & {tuple(ids) for ids in other}
    assert answers_of(work, [answer_rows(PROMPTS)]) == answers_of(work, [answer_rows(PROMPTS)])


@pytest.mark.slow
def test_other_workers_and_a_block_that_was_lost(tiny_llama, tmp_path, on_cluster):
    import ray

    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
    try:
        work = Answering(spec=spec_of(tiny_llama), max_tokens=6, stop=(2,), batch=8)
        rows = answer_rows(PROMPTS, samples=6, seed=1)

        def ask(name, workers, block=6):
            seen = []
            resources = Resources(workers=workers, gpus_per_worker=0, threads=1)
            storage, told = Storage(str(tmp_path / name)), {"doing": "answering", "warn": seen.append}
            found = do_work(work, [rows], storage, resources, block=block, progress=lambda *at: seen.append(at), **told)
            return found[0]["answer_ids"].to_pylist(), seen

        one, _ = ask("one", 1)
        assert ask("two", 2)[0] == one
        assert len(one) == 24
        lost = sorted((tmp_path / "one" / "evaluation").iterdir())[1]
        lost.unlink()
        again, seen = ask("one", 2)
        assert again == one and seen == [(0, 6), (6, 6)], "only the block that was lost"
    finally:
        ray.shutdown()
