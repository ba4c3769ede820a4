import shutil

import pytest
from safetensors.torch import load_file, save_file
from tiny import make_model

from raydpo.errors import ModelError
from raydpo.model.cost import ModelCost


def counted(directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory)


def test_of_a_dense_model(tiny_llama):
    """All parameters as torch counts them; active parameters without embedding and head."""
    model, cost = counted(tiny_llama), ModelCost.of(tiny_llama)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    # Two layers of width 64: query and output 64 x 64, key and value 64 x 32, three products of 64 x 128, two norms of 64;
    # and a last norm.
    assert cost.active == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64
    assert (cost.hidden, cost.layers, cost.attention_width) == (64, 2, 64)
    assert cost.vocabulary == model.config.vocab_size
    assert cost.position_flops == 2 * cost.active
    assert cost.look_flops == 2 * 2 * 2 * 64  # multiply and add, score and value, two layers, width 64
    assert cost.prediction_flops == 2 * 64 * cost.vocabulary


def test_tied_head_is_counted_once(tmp_path):
    cost = ModelCost.of(make_model(tmp_path, tie_word_embeddings=True))
    assert cost.parameters == cost.active + 64 * cost.vocabulary


def test_of_a_mixture(tmp_path):
    """Two of four experts compute a token."""
    directory = make_model(tmp_path, "mixtral", num_local_experts=4, num_experts_per_tok=2)
    model, cost = counted(directory), ModelCost.of(directory)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    expert = 3 * 64 * 128
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 2 * 64 + 4 * 64 + 2 * expert  # attention, norms, router, two experts
    assert cost.active == 2 * layer + 64


def test_a_directory_without_a_model(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        ModelCost.of(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        ModelCost.of(tmp_path)


def test_a_second_copy_of_the_weights_is_not_counted(tiny_llama, tmp_path):
    """Some repositories have a second copy of the weights under names that raydpo does not read."""
    directory = shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    save_file({f"other.{name}": tensor for name, tensor in tensors.items()}, directory / "consolidated.safetensors")
    assert ModelCost.of(directory) == ModelCost.of(tiny_llama)
