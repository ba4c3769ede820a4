"""The pairs and random models that are measured: the same every time, and as a run would read them."""

import numpy as np
import pytest
import torch
from tiny import make_tokenizer, preferences, write_preferences

from raydpo.benchmark import workload
from raydpo.errors import DataError


def test_random_pairs_depend_on_the_arguments_alone():
    table = workload.synthetic(16, 100, (1, 4), 512, seed=3)
    assert table == workload.synthetic(16, 100, (1, 4), 512, seed=3)
    assert table != workload.synthetic(16, 100, (1, 4), 512, seed=4)


def test_random_pairs_have_the_wanted_shape():
    for (prompt, completion), tokens in (((1, 4), (20, 80)), ((4, 1), (80, 20))):
        table = workload.synthetic(400, 100, (prompt, completion), 512, seed=0)
        for name, mean in zip(workload.IDS, (tokens[0], tokens[1], tokens[1]), strict=True):
            lengths = np.array([len(ids) for ids in table[name].to_pylist()])
            assert lengths.mean() == pytest.approx(mean, rel=0.05)
            assert lengths.min() >= round(0.75 * mean) and lengths.max() <= round(1.25 * mean)


def test_statistics():
    table = workload.synthetic(5, 50, (1, 1), 512, seed=0)
    lengths = [[len(ids) for ids in table[name].to_pylist()] for name in workload.IDS]
    prompts, chosen, rejected = (np.array(each) for each in lengths)
    found = workload.statistics(table, 2)
    longest = prompts + np.maximum(chosen, rejected)
    assert found["positions"] == {
        "tree": (prompts + chosen + rejected).sum(),
        "packed": (2 * prompts + chosen + rejected).sum(),
        "padded": 4 * max(longest[:2]) + 4 * max(longest[2:4]) + 2 * longest[4],
    }
    assert found["longest"] == longest.max()


def test_file_gives_the_first_pairs_in_order(tmp_path, tiny_llama):
    records = preferences(12)
    file = write_preferences(tmp_path / "pairs.jsonl", records)
    table = workload.of_file(str(file), 8, str(tiny_llama), 512)
    tokenizer = make_tokenizer()
    assert [tokenizer.decode(ids) for ids in table["prompt_ids"].to_pylist()] == [one["prompt"] for one in records[:8]]
    with pytest.raises(DataError, match="12 usable pairs, fewer than --pairs 13"):
        workload.of_file(str(file), 13, str(tiny_llama), 512)


@pytest.mark.parametrize("tied", [False, True])
def test_random_model_loads_and_is_made_once(tmp_path, tied):
    from raydpo.model.load import load_causal_lm

    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "tie_word_embeddings": tied,
    }
    directory, state = tmp_path / "model", torch.get_rng_state()
    workload.write_random_llama(directory, shape, torch.device("cpu"))
    stamp = (directory / "model.safetensors").stat().st_mtime_ns
    workload.write_random_llama(directory, shape, torch.device("cpu"))
    assert (directory / "model.safetensors").stat().st_mtime_ns == stamp
    assert torch.equal(torch.get_rng_state(), state)
    model = load_causal_lm(directory, "bfloat16", rope_length=None)
    assert model.config.architectures == ["LlamaForCausalLM"]
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            assert float(weight.detach().float().std()) == pytest.approx(0.02, rel=0.1), name
        else:
            assert (weight == 1).all(), name
