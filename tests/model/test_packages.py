"""Text models in packages with other parts: loaded whole, scored as text; gradients and adapters on the text alone."""

import json

import numpy as np
import pytest
import torch
from packages import AUDIO, FAMILIES, make_package
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer
from transformers import AutoModelForMultimodalLM

from raydpo.config import LoraSettings, ModelConfig
from raydpo.model.cost import ModelCost
from raydpo.model.layout import PromptGroup
from raydpo.model.load import add_lora, load_causal_lm
from raydpo.model.logps import LogpModel
from raydpo.model.memory.anatomy import OTHER, Anatomy
from raydpo.model.memory.ledger import trained_numbers
from raydpo.model.package import backbone_of, other_modules, other_parameters
from raydpo.model.selfcheck import check_training_mode, choose_layout, logps_by_definition, small_copy
from raydpo.model.weights import check_weights

CPU = torch.device("cpu")
NO_TREE = {"llama4"}
"""Families whose attention is in chunks."""


def group():
    rng = np.random.default_rng(3)
    prompt, *completions = (rng.integers(3, 200, size).astype(np.int32) for size in (30, 12, 7))
    return PromptGroup(prompt, tuple(completions))


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A function from a family to its package, which is made once."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = make_package(tmp_path_factory.mktemp("packages") / family, family)
        return made[family]

    return make


@pytest.mark.parametrize("family", [*FAMILIES, *AUDIO])
def test_a_package_is_loaded_whole_and_scored_as_its_own_class_computes(family, package):
    path = package(family)
    assert check_weights(path) == []
    model = load_causal_lm(path, "float32", rope_length=None)
    own = AutoModelForMultimodalLM.from_pretrained(path)
    assert type(model) is type(own)
    loaded, stored = model.state_dict(), own.state_dict()
    assert loaded.keys() == stored.keys() and all(torch.equal(loaded[name], stored[name]) for name in stored)
    ours = LogpModel(model)
    report = choose_layout(ours, CPU)
    if family in NO_TREE:
        assert report.method.layout == "padded", report.line
    else:
        assert report.method.layout in ("tree", "packed"), report.line
    with torch.no_grad():
        wanted = logps_by_definition(own, group(), CPU)
    assert np.abs(np.concatenate(ours.score([group()], CPU)[0]) - wanted).max() < 5e-6
    check_training_mode(ours, CPU)


@pytest.mark.parametrize("family", [*FAMILIES, *AUDIO])
def test_no_other_part_than_the_text_model_trains_or_gets_adapters(family, package):
    model = load_causal_lm(package(family), "float32", rope_length=None)
    others = list(other_parameters(model))
    text = list(backbone_of(model).parameters())
    assert others and all(not each.requires_grad for each in others) and all(each.requires_grad for each in text)
    assert not {id(each) for each in others} & {id(each) for each in text}
    parts = other_modules(model)
    assert any("vis" in name or "audio" in name for name in parts) and not any("language_model" in name for name in parts)
    for targets in ("all-linear", ("q_proj", "v_proj", "o_proj", "q_b_proj", "qkv", "fc1")):
        policy = add_lora(
            load_causal_lm(package(family), "float32", rope_length=None), LoraSettings(r=2, target_modules=targets), 0
        )
        trained = [name.removeprefix("base_model.model.") for name, each in policy.named_parameters() if each.requires_grad]
        assert trained and not [name for name in trained if name.startswith(tuple(f"{part}." for part in parts))]


@pytest.mark.parametrize("family", [*FAMILIES, *AUDIO])
def test_sizes_count_the_other_parts_as_loaded_and_not_as_computing(family, package):
    path = package(family)
    anatomy, cost = Anatomy.of(path), ModelCost.of(path)
    model = load_causal_lm(path, "float32", rope_length=None)
    others = sum(each.numel() for each in other_parameters(model))
    assert anatomy.parameters == sum(each.numel() for each in model.parameters())
    assert sum(each.numel for each in anatomy.weights if each.place == OTHER) == others > 0
    assert sum(trained_numbers(anatomy, ModelConfig(path=str(path)))) == anatomy.parameters - others
    assert anatomy.layers == model.config.get_text_config().num_hidden_layers
    stored = {name: value.numel() for name, value in load_file(path / "model.safetensors").items()}
    assert cost.parameters == sum(stored.values())
    text = json.loads((path / "config.json").read_text())["text_config"]
    alone = {name: size for name, size in stored.items() if name not in _others_in_files(model, stored)}
    assert cost.active == ModelCost.of_sizes(alone, text).active


def _others_in_files(model, names):
    """Names in the files of weights beside the text model, by the parts of the model that have the same last names."""
    parts = [part.removeprefix("model.") for part in other_modules(model)]
    return {name for name in names if name.removeprefix("model.").startswith(tuple(parts))}


def test_a_package_may_be_named_by_its_text_model_alone(package, tmp_path):
    """As transformers saves the text model of Qwen3.5 on request: another architecture, the same files."""
    path = package("qwen3_5")
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3_5ForCausalLM"]}))
    alone, whole = (load_causal_lm(each, "float32", rope_length=None) for each in (tmp_path, path))
    assert type(alone).__name__ == "Qwen3_5ForCausalLM" and not list(other_parameters(alone))
    both = [LogpModel(each).score([group()], CPU)[0] for each in (alone, whole)]
    assert all(np.array_equal(one, other) for one, other in zip(*both, strict=True))


def test_an_older_package_has_the_entries_of_its_text_model_beside_those_of_its_parts(package, tmp_path):
    """Qwen2.5-VL came so."""
    path = package("qwen2_5_vl")
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    (tmp_path / "config.json").write_text(json.dumps(text | config))
    old, new = (load_causal_lm(each, "float32", rope_length=None) for each in (tmp_path, path))
    both = [LogpModel(each).score([group()], CPU)[0] for each in (old, new)]
    assert all(np.array_equal(one, other) for one, other in zip(*both, strict=True))
    assert ModelCost.of(tmp_path) == ModelCost.of(path) and Anatomy.of(tmp_path).parameters == Anatomy.of(path).parameters


@pytest.mark.parametrize("family", ["gemma4", "gemma3n_text"])
def test_a_second_table_of_embeddings_is_read_by_ids_on_a_float32_stream(family, package, tmp_path, monkeypatch):
    """From embeddings alone, Gemma 3n would leave the table out, and Gemma 4 compare each with the whole vocabulary."""
    if family == "gemma4":
        path = package(family)
    else:
        per_layer = {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "laurel_rank": 8, "sliding_window": 16}
        per_layer |= {"vocab_size_per_layer_input": len(make_tokenizer()), "activation_sparsity_pattern": None}
        path = make_model(tmp_path / family, family, layers=5, **per_layer)
    model = load_causal_lm(path, "bfloat16", rope_length=None)
    ours = LogpModel(model)
    given, own = [], ours.backbone.get_per_layer_inputs
    monkeypatch.setattr(ours.backbone, "get_per_layer_inputs", lambda ids, *more: given.append(ids) or own(ids, *more))
    report = choose_layout(ours, CPU)
    assert report.method.layout == "tree" and ours.float32_stream, report.line
    assert given and all(ids is not None for ids in given)


def test_a_small_copy_has_one_layer_in_each_other_part(package):
    model = load_causal_lm(package("gemma3"), "bfloat16", rope_length=None)
    copy = small_copy(model, 2).causal_lm
    assert len(copy.model.vision_tower.encoder.layers) == 1 < len(model.model.vision_tower.encoder.layers)


def test_a_placeholder_of_an_image_in_the_data_is_no_fault_of_a_layout(package):
    """Gemma 4's own class embeds padding in its place, and its text model the token."""
    model = load_causal_lm(package("gemma4"), "float32", rope_length=None)
    ids = np.array([5, 6, model.config.image_token_id, 7, 8, 9, 10, 11], np.int32)
    assert choose_layout(LogpModel(model), CPU, rows=[PromptGroup(ids, (ids, ids[::-1]))]).method.layout == "tree"
