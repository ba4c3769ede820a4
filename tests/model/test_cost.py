import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model
from transformers import AutoConfig, AutoModelForCausalLM

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


PUBLISHED = {
    "qwen3_moe": (30.5, 3.3, 2, {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 128,
        "num_experts_per_tok": 8,
    }),
    "mixtral": (46.7, 12.9, 2, {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "gpt_oss": (20.9, 3.6, 1, {"num_hidden_layers": 24, "num_local_experts": 32}),
    "deepseek_v3": (671.0, 37.0, 1, {}),
    "qwen3_next": (80.0, 3.0, 0, {"num_hidden_layers": 48}),
}  # fmt: skip
"""Billions of parameters and of active ones as their authors give them; how many of embedding and head these include;
settings that are not transformers' defaults."""


@pytest.mark.parametrize("kind", PUBLISHED)
def test_active_parameters_are_those_that_authors_publish(kind):
    total, active, tables, settings = PUBLISHED[kind]
    config = AutoConfig.for_model(kind, **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    cost = ModelCost.of_sizes(sizes, config.to_dict())
    assert cost.parameters / 1e9 == pytest.approx(total, rel=0.01)
    counted = (cost.active + tables * cost.hidden * cost.vocabulary) / 1e9
    assert counted == pytest.approx(active, abs=0.5 if float(active).is_integer() else 0.1)
    further = {
        f"model.layers.{config.num_hidden_layers}.mlp.experts.0.up_proj.weight": 10**9,
        "mtp.layers.0.mlp.gate_proj.weight": 10**9,
    }
    assert ModelCost.of_sizes(sizes | further, config.to_dict()) == cost, "layers that predict further tokens are left out"


def test_names_of_experts_and_of_their_numbers():
    config = {"hidden_size": 8, "vocab_size": 9, "num_attention_heads": 2, "num_hidden_layers": 1}
    sizes = {"model.layers.0.self_attn.q_proj.weight": 64}
    for name, more in (
        ("model.layers.0.block_sparse_moe.input_linear.weight", {"num_local_experts": 4, "num_experts_per_tok": 1}),
        ("model.layers.0.mlp.experts.3.up_proj.weight", {"moe_num_experts": 4, "moe_k": 1}),
        ("transformer.blocks.0.ffn.experts.mlp.w1", {"ffn_config": {"moe_num_experts": 4, "moe_top_k": 1}}),
    ):
        assert ModelCost.of_sizes(sizes | {name: 400}, config | more).active == 64 + 100
    shared = {"model.layers.0.shared_mlp.input_linear.weight": 400}
    assert ModelCost.of_sizes(sizes | shared, config | {"num_local_experts": 4, "num_experts_per_tok": 1}).active == 464


def test_two_numbers_in_a_byte_are_two(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"hidden_size": 8, "vocab_size": 9, "num_attention_heads": 2, "num_hidden_layers": 1, "num_local_experts": 2, '
        '"num_experts_per_tok": 1}'
    )
    home = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{home}_blocks": torch.zeros(2, 4, 1, 16), f"{home}_scales": torch.zeros(2, 4, 1)}
    save_file({name: value.to(torch.uint8) for name, value in tensors.items()}, tmp_path / "model.safetensors")
    cost = ModelCost.of(tmp_path)
    assert (cost.parameters, cost.active) == (2 * 4 * 32, 4 * 32)
