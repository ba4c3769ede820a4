"""Quantized layers compute in the precision of the model: what reaches attention, gradients, and what does not change."""

import numpy as np
import pytest
import torch
from architectures import make_random
from torch import nn

from raydpo.config import LoraSettings
from raydpo.model import attention, quantized
from raydpo.model.adapter import fuse_adapters
from raydpo.model.layout import Method, PromptGroup
from raydpo.model.load import add_lora, load_causal_lm
from raydpo.model.logps import LogpModel

CPU = torch.device("cpu")
TREE = Method("tree", "sdpa")
KINDS = ["4bit", "8bit"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    make_random("llama", 96).save_pretrained(path)
    return path


def groups():
    rng = np.random.default_rng(0)
    prompt, *completions = (rng.integers(0, 96, size) for size in (21, 9, 14))
    return [PromptGroup(prompt, tuple(completions))]


def load(directory, quantization, dtype="bfloat16", lora=False):
    model = load_causal_lm(directory, dtype, rope_length=None, quantization=quantization)
    if lora:
        model = add_lora(model, LoraSettings(r=4, target_modules="all-linear"), seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    model = LogpModel(fuse_adapters(model))
    model.use(TREE)
    return model


def outputs(model, training=False):
    """Log-probs, and the precision of what each projection and the gated product give and attention gets."""
    seen = {}

    def look(name):
        return lambda _, inputs, out: seen.setdefault(name.rsplit(".", 1)[-1], set()).add(out.dtype)

    hooks = [
        module.register_forward_hook(look(name))
        for name, module in model.named_modules()
        if name.endswith(("_proj", "act_fn"))
    ]
    with attention.watch_demands() as demands:
        logps = model(model.lay_out(groups())) if training else np.concatenate(model.score(groups(), CPU)[0])
    for hook in hooks:
        hook.remove()
    return logps, seen, {demand.dtype for demand in demands}


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_bfloat16_reaches_attention_and_the_gated_product(kind, lora, directory):
    for training in (False, True):
        model = load(directory, kind, lora=lora)
        model.train(training)
        _, seen, values = outputs(model, training)
        assert values == {torch.bfloat16}
        assert len(seen) == 8 and set.union(*seen.values()) == {torch.bfloat16}, seen


def test_without_the_cast_quantized_layers_give_float32(directory, monkeypatch):
    """What bitsandbytes does by itself: if it changes, the cast can go."""
    monkeypatch.setattr("raydpo.model.logps.compute_under_autocast", lambda _: None)
    for kind in KINDS:
        assert outputs(load(directory, kind))[2] == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_adapters_flow_through_quantized_layers(kind, directory):
    """In the direction of those of the plain model, with checkpointing the same as without."""
    found = {}
    for quantization, checkpointing in ((None, False), (kind, False), (kind, True)):
        model = load(directory, quantization, lora=True)
        if checkpointing:
            model.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        model(model.lay_out(groups())).sum().backward()
        gradients = [one.grad.flatten() for one in model.parameters() if one.requires_grad]
        assert len(gradients) == 28 and all(one.isfinite().all() and one.norm() > 0 for one in gradients)
        found[quantization, checkpointing] = torch.cat(gradients).float()
    assert torch.equal(found[kind, False], found[kind, True])
    assert torch.cosine_similarity(found[None, False], found[kind, False], dim=0) > (0.95 if kind == "8bit" else 0.8)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_models_and_layouts(kind, directory):
    """In float32 the cast does nothing. In bfloat16 all layouts agree bit for bit, as of other models."""
    before = outputs(load(directory, kind, "float32"))
    model = load(directory, kind, "float32")
    for module in model.modules():
        module._forward_pre_hooks.clear()
    assert np.array_equal(before[0], outputs(model)[0]) and before[2] == {torch.float32}
    model = load(directory, kind)
    tree = outputs(model)[0]
    model.use(Method("padded"))
    assert np.array_equal(tree, outputs(model)[0])


def test_which_layers_are_quantized(directory):
    class Packed(nn.Module):
        """As of GPTQ and AWQ: packed integers and scales."""

        def __init__(self):
            super().__init__()
            self.in_features = 8
            self.register_buffer("qweight", torch.zeros(1, 8, dtype=torch.int32))
            self.register_buffer("scales", torch.zeros(1, 8, dtype=torch.float16))

        def forward(self, x):
            return x

    class Float8(nn.Linear):
        def __init__(self):
            super().__init__(8, 8, bias=False)
            self.weight = nn.Parameter(self.weight.to(torch.float8_e4m3fn), requires_grad=False)

    stack = nn.ModuleDict({"gptq": Packed(), "fp8": Float8(), "linear": nn.Linear(8, 8), "embedding": nn.Embedding(4, 4)})
    quantized.compute_under_autocast(stack)
    quantized.compute_under_autocast(stack)
    assert {name: len(module._forward_pre_hooks) for name, module in stack.items()} == {
        "gptq": 1,
        "fp8": 1,
        "linear": 0,
        "embedding": 0,
    }
    x = torch.zeros(2, 8)
    assert stack["gptq"](x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert stack["gptq"](x).dtype == torch.bfloat16
    model = load(directory, "4bit", lora=True)
    names = [name for name, module in model.named_modules() if quantized._cast_input in module._forward_pre_hooks.values()]
    assert len(names) == 14 and all(name.endswith("_proj.base_layer") for name in names)
