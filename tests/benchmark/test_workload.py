"""The pairs and random models that are measured: the same every time, and as both sides would read them."""

import json

import numpy as np
import pytest
import torch
from tiny import make_tokenizer, preferences, write_preferences

from raydpo.benchmark.workload import Workload, random_records, usable_records, write_random_llama
from raydpo.data.plan import BatchPlan
from raydpo.errors import DataError

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}


def test_random_pairs_depend_on_the_arguments_alone_and_have_the_wanted_lengths():
    records = random_records(400, 20, 80, 512, seed=3)
    assert records == random_records(400, 20, 80, 512, seed=3) != random_records(400, 20, 80, 512, seed=4)
    for name, mean in (("prompt", 20), ("chosen", 80), ("rejected", 80)):
        lengths = np.array([len(record[name].split()) for record in records])
        assert lengths.mean() == pytest.approx(mean, rel=0.05)
        assert lengths.min() >= round(0.75 * mean) and lengths.max() <= round(1.25 * mean)


def test_a_random_word_is_a_token_of_the_random_model(tmp_path):
    write_random_llama(tmp_path / "model", SHAPE, torch.device("cpu"))
    records = random_records(8, 10, 20, SHAPE["vocab_size"])
    work = Workload.write(records, str(tmp_path / "model"), 64, "file", tmp_path / "work")
    for record, pair in zip(records, work.table.to_pylist(), strict=True):
        words = {name: [int(word[1:]) for word in record[name].split()] for name in ("prompt", "chosen", "rejected")}
        assert pair["prompt_ids"] == words["prompt"] and pair["chosen_ids"] == [*words["chosen"], 1]


@pytest.mark.parametrize("order", ["file", "shuffled"])
def test_both_sides_have_the_same_pairs_in_the_same_steps(order, tmp_path, tiny_llama):
    records = preferences(12)
    work = Workload.write(records, str(tiny_llama), 512, order, tmp_path)
    plan = BatchPlan(
        lambda rows: work.shapes, np.zeros(12, int), np.ones(1), seed=0, pairs_per_step=4, tokens_per_batch=1000,
        world_size=1, shuffle=order == "shuffled", epochs=1, steps=None,
    )  # fmt: skip
    taken = [records[row] for step in range(3) for row in plan.pairs(step)]
    assert [json.loads(line) for line in work.in_order.read_text().splitlines()] == taken
    assert [json.loads(line) for line in work.file.read_text().splitlines()] == records
    assert (taken == records) == (order == "file")
    found, tokenizer = work.statistics(), make_tokenizer()
    for width, tokens, record in zip(found["widths"], found["tokens"], taken, strict=True):
        prompt, *answers = (len(tokenizer(record[name])["input_ids"]) for name in ("prompt", "chosen", "rejected"))
        assert (width, tokens) == (prompt + max(answers) + 1, prompt + sum(answers) + 2)


def test_file_gives_the_first_pairs_that_fit_uncut(tmp_path, tiny_llama):
    records = preferences(12)
    long = dict(records[3], chosen=" water" * 600)
    chat = {"prompt": [{"role": "user", "content": "why"}], "chosen": "because", "rejected": "no"}
    file = write_preferences(tmp_path / "pairs.jsonl", [*records[:3], long, *records[4:], chat, {"prompt": "no answers"}])
    found = usable_records(str(file), 12, str(tiny_llama), 512)
    assert found[:11] == [*records[:3], *records[4:]]
    assert found[11]["chosen"] == [{"role": "assistant", "content": "because"}], "in one form that TRL reads, too"
    with pytest.raises(DataError, match="12 usable pairs of at most 512 tokens, fewer than --pairs 13"):
        usable_records(str(file), 13, str(tiny_llama), 512)


@pytest.mark.parametrize("tied", [False, True])
def test_random_model_loads_and_is_made_once(tmp_path, tied):
    from raydpo.model.load import load_causal_lm

    shape = SHAPE | {"tie_word_embeddings": tied}
    directory, state = tmp_path / "model", torch.get_rng_state()
    write_random_llama(directory, shape, torch.device("cpu"))
    stamp = (directory / "model.safetensors").stat().st_mtime_ns
    write_random_llama(directory, shape, torch.device("cpu"))
    assert (directory / "model.safetensors").stat().st_mtime_ns == stamp
    assert torch.equal(torch.get_rng_state(), state)
    model = load_causal_lm(directory, "bfloat16", rope_length=None)
    assert model.config.architectures == ["LlamaForCausalLM"]
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            assert float(weight.detach().float().std()) == pytest.approx(0.02, rel=0.1), name
        else:
            assert (weight == 1).all(), name


def test_the_same_pairs_are_not_written_again(tmp_path, tiny_llama):
    """TRL would take a newer file for another one, and compute its reference again."""
    places = []
    for _ in range(2):
        work = Workload.write(preferences(4), str(tiny_llama), 512, "shuffled", tmp_path)
        places.append([(file.read_text(), file.stat().st_mtime_ns) for file in (work.file, work.in_order)])
    assert places[0] == places[1]
    Workload.write(preferences(4, seed=2), str(tiny_llama), 512, "shuffled", tmp_path)
    assert work.in_order.read_text() != places[0][1][0]
