"""Quantized models whose files lack weights are refused by the names in their headers."""

import json
import shutil

import pytest
import torch
from architectures import ARCHITECTURES, make_random
from safetensors.torch import load_file, save_file

from raydpo.errors import FilesError
from raydpo.model.weights import check_weights

VOCABULARY = 96
KEPT = ("embed", "wte", "wpe", "lm_head", "norm", "router", "gate.weight", "conv1d")


def gptq(name, value):
    stem, rows, columns = name.removesuffix(".weight"), *value.shape
    return {
        f"{stem}.qweight": torch.zeros(max(1, columns // 8), rows, dtype=torch.int32),
        f"{stem}.qzeros": torch.zeros(1, max(1, rows // 8), dtype=torch.int32),
        f"{stem}.scales": torch.zeros(1, rows, dtype=torch.float16),
        f"{stem}.g_idx": torch.zeros(columns, dtype=torch.int32),
    }


def bitsandbytes(name, value):
    return {
        name: torch.zeros(max(1, value.numel() // 2), 1, dtype=torch.uint8),
        f"{name}.absmax": torch.zeros(4, dtype=torch.uint8),
        f"{name}.nested_absmax": torch.zeros(1),
        f"{name}.quant_map": torch.zeros(16),
        f"{name}.nested_quant_map": torch.zeros(256),
        f"{name}.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8),
    }


def fp8(name, value):
    return {name: value.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}


def compressed(name, value):
    stem, rows, columns = name.removesuffix(".weight"), *value.shape
    return {
        f"{stem}.weight_packed": torch.zeros(rows, max(1, columns // 8), dtype=torch.int32),
        f"{stem}.weight_scale": torch.zeros(rows, 1, dtype=torch.bfloat16),
        f"{stem}.weight_shape": torch.tensor([rows, columns]),
    }


def other(name, value):
    """A format that is not known: only what no format quantizes keeps its name."""
    return {f"{name.removesuffix('.weight')}.codes": torch.zeros(3, dtype=torch.int16), f"{name}_book": torch.zeros(2, 2)}


FORMATS = {
    "gptq": gptq,
    "awq": gptq,
    "bitsandbytes": bitsandbytes,
    "fp8": fp8,
    "compressed-tensors": compressed,
    "aqlm": other,
}


def quantized(directory, method, keep=KEPT):
    """The saved model with its matrices stored as ``method`` does."""
    tensors = load_file(directory / "model.safetensors")
    stored = {}
    for name, value in tensors.items():
        plain = value.dim() != 2 or not name.endswith(".weight") or any(part in name for part in keep)
        stored |= {name: value} if plain else FORMATS[method](name, value)
    write(directory, stored)
    config = json.loads((directory / "config.json").read_text())
    settings = {"quant_method": method, "bits": 4}
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return directory


def write(directory, tensors):
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def without(directory, part):
    """Take the tensors whose names contain ``part`` out of the files."""
    tensors = load_file(directory / "model.safetensors")
    left = {name: value for name, value in tensors.items() if part not in name}
    assert left.keys() != tensors.keys()
    write(directory, left)
    return directory


def saved(name, directory):
    make_random(name, VOCABULARY).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_whole_quantized_models_pass(name, tmp_path):
    for number, method in enumerate(FORMATS):
        directory = quantized(saved(name, tmp_path / f"{number}"), method)
        assert check_weights(directory) == [], method


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for method in FORMATS:
        quantized(saved("llama", folder / method), method)
    return folder


@pytest.fixture
def model(models, tmp_path):
    return lambda method: shutil.copytree(models / method, tmp_path / "model")


@pytest.mark.parametrize("method", FORMATS)
@pytest.mark.parametrize(
    ("part", "told"),
    [
        (".layers.1.", r"lack all weights of 1 of its 2 layers \(model\.layers\.1\), which would be random numbers"),
        ("layers.1.input_layernorm", r"lack model\.layers\.1\.input_layernorm\.weight, which would be random numbers"),
        ("model.norm", r"lack model\.norm\.weight, which would be random"),
        ("embed_tokens", r"lack model\.embed_tokens\.weight, which"),
        (".layers.0.mlp.up_proj", r"lack model\.layers\.0\.mlp\.up_proj\.weight, which"),
        ("mlp.up_proj", r"lack model\.layers\.0\.mlp\.up_proj\.weight, model\.layers\.1\.mlp\.up_proj\.weight, which"),
        ("lm_head", r"lack lm_head\.weight, which"),
    ],
)
def test_weights_that_a_quantized_model_lacks(method, part, told, model):
    directory = without(model(method), part)
    if method == "aqlm" and not any(each in part for each in ("layers.1.", "norm", "embed")):
        assert check_weights(directory) == []  # a weight that may be there under any name
        return
    with pytest.raises(FilesError, match=told):
        check_weights(directory)


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "fp8"])
def test_values_without_their_scales_are_not_taken_for_the_weight(method, model):
    """Scales alone are no weight."""
    directory, (beginning, end) = model(method), {"gptq": (".q_proj.", "qweight")}.get(method, (".q_proj.", ".weight"))
    tensors = load_file(directory / "model.safetensors")
    write(directory, {name: value for name, value in tensors.items() if not (beginning in name and name.endswith(end))})
    with pytest.raises(FilesError, match=r"lack model\.layers\.0\.self_attn\.q_proj\.weight, model\.layers\.1\."):
        check_weights(directory)


def test_names_that_another_tool_prefixed(model):
    directory = model("gptq")
    tensors = load_file(directory / "model.safetensors")
    write(directory, {f"module.{name}": value for name, value in tensors.items()})
    with pytest.raises(FilesError, match=r"lack lm_head\.weight.*they hold module\.lm_head\.weight.*under other names"):
        check_weights(directory)


def test_layers_that_are_quantized_in_part_are_whole(tmp_path):
    """A layer may keep its plain weights (modules_to_not_convert)."""
    for number, method in enumerate(FORMATS):
        directory = quantized(
            saved("llama", tmp_path / f"{number}"), method, keep=(*KEPT, "layers.0.mlp", "layers.1.self_attn")
        )
        assert check_weights(directory) == []


def test_scales_of_the_cache_and_layers_behind_the_last_are_no_fault(tmp_path):
    directory = quantized(saved("llama", tmp_path / "model"), "fp8")
    tensors = load_file(directory / "model.safetensors")
    more = {f"model.layers.{layer}.self_attn.{kind}_scale": torch.ones(1) for layer in (0, 1) for kind in "kv"}
    further = {name.replace(".1.", ".2."): value.clone() for name, value in tensors.items() if ".layers.1." in name}
    write(directory, tensors | more)
    assert check_weights(directory) == []
    write(directory, tensors | more | further)
    with pytest.raises(FilesError, match=r"describes a model of 2 layers .*weights of layers that it leaves out"):
        check_weights(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    assert check_weights(directory) == []


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_a_bias_that_is_missing(method, tmp_path):
    directory = quantized(saved("qwen2", tmp_path / "model"), method)
    assert check_weights(directory) == []
    with pytest.raises(FilesError, match=r"lack model\.layers\.1\.self_attn\.k_proj\.bias, which"):
        check_weights(without(directory, "layers.1.self_attn.k_proj.bias"))


def test_plain_weights_that_are_called_quantized(tmp_path):
    directory = saved("llama", tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(FilesError, match=r"says that the weights are quantized \(gptq\), but its files hold no qweight"):
        check_weights(directory)


def test_a_norm_of_another_shape(model):
    directory = model("gptq")
    tensors = load_file(directory / "model.safetensors")
    write(directory, tensors | {"model.norm.weight": torch.ones(48)})
    with pytest.raises(FilesError, match=r"another shape .*model\.norm\.weight is \[48\] in its files and \[32\]"):
        check_weights(directory)


@pytest.mark.parametrize("method", [None, "gptq", "fp8", "bitsandbytes"])
def test_experts(method, tmp_path):
    """One expert, or one weight of an expert, is missing."""
    for part, told in (
        (".layers.1.block_sparse_moe.experts.3.", r"mlp\.experts\.\w+ is \[3, .*\] in its files and \[4, "),
        (".layers.1.block_sparse_moe.experts.3.w1.", r"lack model\.layers\.1\.\w+\.experts\.3\.w1\.weight, of experts that"),
    ):
        directory = saved("mixtral", tmp_path / told[:3])
        if method is not None:
            quantized(directory, method)
        assert check_weights(directory) == []
        with pytest.raises(FilesError, match=told):
            check_weights(without(directory, part))


def test_what_bitsandbytes_saves(tmp_path):
    """The names are those that transformers writes."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain = saved("llama", tmp_path / "plain")
    for name, settings in (
        ("4bit", {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}),
        ("8bit", {"load_in_8bit": True}),
    ):
        model = AutoModelForCausalLM.from_pretrained(
            plain, quantization_config=BitsAndBytesConfig(**settings), device_map={"": "cpu"}
        )
        model.save_pretrained(tmp_path / name)
        assert check_weights(tmp_path / name) == []
        with pytest.raises(FilesError, match=r"lack model\.layers\.0\.mlp\.up_proj\.weight, which"):
            check_weights(without(tmp_path / name, ".layers.0.mlp.up_proj"))
