"""Adapters on mixtures of experts: which weights get them, and everything that reads them afterwards."""

import re

import pytest
import ray
import torch
import yaml
from architectures import MORE_MIXTURES, make_random
from definition import VOCAB, by_definition, groups
from peft import PeftModel
from tiny import make_model, preferences, write_preferences

from raydpo.cli.entry import main
from raydpo.config import LoraSettings, ModelConfig
from raydpo.errors import ModelError
from raydpo.model.load import add_lora
from raydpo.model.memory.anatomy import Anatomy
from raydpo.model.memory.ledger import trained_numbers
from raydpo.model.mixture import expert_blocks
from raydpo.model.targets import adapted_layers, told_adapters
from raydpo.model.weights import load_adapter

FUSED = ["mixtral", "phimoe", "ernie4_5_moe", "qwen3_moe", "gpt_oss", "qwen3_next", "lfm2_moe", *MORE_MIXTURES]
PARTS = {
    "ernie4_5_moe": "attention, experts, shared experts",
    "qwen3_next": "attention, experts, shared experts",
    "qwen2_moe": "attention, experts, shared experts",
    "llama4_text": "attention, experts, shared experts",
    "deepseek_v3": "attention, feed-forward, experts, shared experts",
    "glm4_moe": "attention, feed-forward, experts, shared experts",
    "lfm2_moe": "attention, feed-forward, experts, other layers",
}
"""What all-linear reaches, where it is not attention and experts."""


def adapted(name, move=0.0, **settings):
    """A mixture with adapters, whose second factors are random if ``move`` is not 0."""
    model = add_lora(make_random(name, VOCAB), LoraSettings(**{"r": 2} | settings), 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_B" in key and move:
                value.normal_(std=move)
    return model


def scores(model):
    with torch.no_grad():
        return torch.cat([by_definition(model, group, one) for group in groups()[:2] for one in group.completions])


def kept(model):
    return {key: value for key, value in model.state_dict().items() if "lora_" in key}


@pytest.mark.parametrize("name", FUSED)
def test_all_linear_reaches_everything_but_the_router(name):
    base = make_random(name, VOCAB)
    head, blocks = base.get_output_embeddings(), expert_blocks(base)
    routers = {each for block in blocks for each in block.routers}
    linear = {key for key, module in base.named_modules() if isinstance(module, torch.nn.Linear) and module is not head}
    tensors = {f"{key}.{short}" for block in blocks for key in block.experts for short, value in
               base.get_submodule(key).named_parameters() if value.ndim == 3}  # fmt: skip
    model = adapted(name)
    found = {f"{key}.{getattr(layer, 'parameter_name', 'weight')}" for key, layer in adapted_layers(model)}
    assert found == {f"{key}.weight" for key in linear - routers} | tensors
    assert told_adapters(model) == f"adapters: {PARTS.get(name, 'attention, experts')}; spared: router"


@pytest.mark.parametrize(
    "settings", [{}, {"exclude_modules": r".*experts"}, {"target_modules": ("q_proj", "down_proj")}], ids=str
)
@pytest.mark.parametrize("name", FUSED)
def test_the_plan_counts_what_peft_makes(name, settings):
    model = ModelConfig(path="m", lora=LoraSettings(**{"r": 3} | settings))
    anatomy = Anatomy.of_model(make_random(name, VOCAB))
    try:
        made = add_lora(make_random(name, VOCAB), model.lora, 0)
    except ModelError as error:
        with pytest.raises(ModelError, match=re.escape(str(error))):
            trained_numbers(anatomy, model)
        return
    assert trained_numbers(anatomy, model) == [value.numel() for value in made.parameters() if value.requires_grad]


@pytest.mark.parametrize("name", FUSED)
def test_adapters_on_experts_start_as_the_base_learn_and_are_read_again(name, tmp_path):
    """A saved adapter is whole for raydpo and for PEFT alone; merged, it is the same function."""
    before = scores(make_random(name, VOCAB))
    assert torch.equal(scores(adapted(name)), before), "step 0 is the base"
    model = adapted(name, move=0.3)
    wanted = scores(model)
    assert not torch.allclose(wanted, before, atol=1e-2)
    torch.cat([by_definition(model, group, one) for group in groups() for one in group.completions]).sum().backward()
    without = [key for key, value in model.named_parameters() if value.requires_grad and not value.grad.abs().sum()]
    assert not without
    model.save_pretrained(tmp_path)
    again = load_adapter(make_random(name, VOCAB), str(tmp_path)).eval()
    assert kept(again).keys() == kept(model).keys()
    assert all(torch.equal(value, kept(model)[key]) for key, value in kept(again).items())
    assert told_adapters(again) == told_adapters(model)
    other = PeftModel.from_pretrained(make_random(name, VOCAB), str(tmp_path)).eval()
    for each in (again, other, model.merge_and_unload()):
        assert torch.allclose(scores(each), wanted, atol=1e-5)


def test_the_router_and_the_experts_can_be_chosen():
    assert (
        told_adapters(adapted("qwen3_moe", target_parameters=("mlp.gate.weight",))) == "adapters: attention, experts, router"
    )
    assert told_adapters(adapted("phimoe", target_parameters=("router.weight",))) == "adapters: attention, experts, router"
    spared = adapted("deepseek_v3", exclude_modules=("experts",))
    assert told_adapters(spared) == "adapters: attention, feed-forward, shared experts; spared: experts, router"
    only = adapted("gpt_oss", target_modules=(), target_parameters=("mlp.experts.down_proj",))
    assert told_adapters(only) == "adapters: experts; spared: attention, router"
    assert told_adapters(adapted("llama")) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_parameters": ("experts.w1",)}, r"target_parameters: 'experts\.w1' is no parameter"),
        ({"exclude_modules": ("expert",)}, "exclude_modules: 'expert' matches no module"),
        ({"exclude_modules": ("experts",), "target_modules": ("q_proj", "down_proj")}, "drop one, or set target_modules"),
        ({"dora": True}, r"model\.lora\.dora=false, or spare the experts with model\.lora\.exclude_modules=\[experts\]"),
        ({"target_modules": ("gate_proj",)}, "without also targeting up_proj"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(settings, said):
    with pytest.raises(ModelError, match=said):
        adapted("qwen3_moe", **settings)
    with pytest.raises(ModelError, match=said):
        lora = LoraSettings(r=2, **settings)
        trained_numbers(Anatomy.of_model(make_random("qwen3_moe", VOCAB)), ModelConfig(path="m", lora=lora))


def test_settings_that_do_not_fit_end_a_command_before_anything_starts(tmp_path, capsys):
    make_model(tmp_path / "model", "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    write_preferences(tmp_path / "a.jsonl", preferences(8))
    tree = {"output": str(tmp_path / "out"), "model": {"path": str(tmp_path / "model")}}
    tree["data"] = {"train": [{"path": str(tmp_path / "a.jsonl")}]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    for lora, said in (
        ("{dora: true}", "model.lora.dora=false, or spare the experts"),
        ("{exclude_modules: [expert]}", "exclude_modules: 'expert' matches no module"),
    ):
        assert main(["train", str(tmp_path / "run.yaml"), f"model.lora={lora}"]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert not ray.is_initialized()
