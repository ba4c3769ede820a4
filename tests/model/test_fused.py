"""Fused functions: the formulas and gradients of the plain modules, chosen by trying, and refused where they differ."""

import functools

import pytest
import torch
from architectures import make_random
from definition import VOCAB, by_definition, groups
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from raydpo.config import LoraSettings
from raydpo.model import fused, head, kernels
from raydpo.model.layout import PADDED, Method
from raydpo.model.load import add_lora, load_causal_lm
from raydpo.model.logps import LogpModel

CPU = torch.device("cpu")
TREE = Method("tree", "sdpa")


def make(name, method=TREE, dtype=torch.bfloat16, lora=False):
    model = make_random(name, VOCAB).to(dtype)
    if lora:
        model = add_lora(model, LoraSettings(r=4), seed=0)
        for key, value in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(value, std=0.05)
    module = LogpModel(model)
    module.use(method)
    return module


def logps_and_gradients(model):
    found = model(model.lay_out(groups()))
    inputs = [each for each in model.parameters() if each.requires_grad]
    return [found.detach(), *torch.autograd.grad(found.sum(), inputs)]


def distance(one, other):
    """Norm of the difference relative to the norm."""
    one, other = one.detach(), other.detach()
    return float((one.float() - other.float()).norm() / other.float().norm().clamp_min(1e-12))


def change(found, plain):
    """Norm of the difference of all tensors, relative to the norm of ``plain``."""
    total = torch.nn.utils.get_total_norm
    return float(total([one.float() - other.float() for one, other in zip(found, plain, strict=True)])) / float(
        total([each.float() for each in plain])
    )


# -- functions ------------------------------------------------------------------------------------------------------------


def rms(x, weight, plus_one):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * (weight + plus_one)


def turned(query, key, cos, sin):
    def turn(x):
        half = x.shape[-1] // 2
        return x * cos[:, None] + torch.cat((-x[..., half:], x[..., :half]), -1) * sin[:, None]

    return torch.cat((turn(query), turn(key)), 1)


FUNCTIONS = {
    "norm": (
        lambda x, weight: kernels.rms_norm(x, weight, 1e-5, False),
        lambda x, weight: rms(x, weight, 0),
        ((2, 5, 16), (16,)),
    ),
    "norm of Gemma": (
        lambda x, weight: kernels.rms_norm(x, weight, 1e-5, True),
        lambda x, weight: rms(x, weight, 1),
        ((7, 16), (16,)),
    ),
    "SwiGLU": (
        lambda gate, up: kernels.gated(gate, up, "silu"),
        lambda gate, up: torch.nn.functional.silu(gate) * up,
        ((1, 9, 12), (1, 9, 12)),
    ),
    "GeGLU": (
        lambda gate, up: kernels.gated(gate, up, "gelu_tanh"),
        lambda gate, up: torch.nn.functional.gelu(gate, approximate="tanh") * up,
        ((1, 9, 12), (1, 9, 12)),
    ),
    "rotary": (
        lambda query, key: torch.cat(kernels.rotate(query, key, *ANGLES), 1),
        lambda query, key: turned(query, key, *ANGLES),
        ((2, 4, 5, 8), (2, 2, 5, 8)),
    ),
}
ANGLES = torch.randn(2, 1, 5, 8, generator=torch.Generator().manual_seed(1))


def by_name(name, dtype=torch.float32):
    """(fused, plain) values and gradients of one function; the plain ones in float32."""
    function, definition, shapes = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    results = []
    for compute, precision in ((function, dtype), (definition, torch.float32)):
        inputs = [each.to(precision).requires_grad_() for each in numbers]
        out = compute(*inputs)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        results.append([out, *torch.autograd.grad((out * weights).sum(), inputs)])
    return results


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_are_those_of_the_formula(name):
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
        found, expected = by_name(name, dtype)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == dtype and distance(one, other) <= tolerance


def test_a_norm_takes_the_float32_stream_to_bfloat16_and_back():
    x, weight = torch.randn(6, 16, requires_grad=True), torch.ones(16, dtype=torch.bfloat16, requires_grad=True)
    out = kernels.rms_norm(x, weight, 1e-5, False)
    saved = out.grad_fn.saved_tensors
    assert saved[0] is x and saved[1] is weight and len(saved) == 2
    out.sum().backward()
    assert (out.dtype, x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    frozen = kernels.rms_norm(x, weight.detach(), 1e-5, False)
    assert torch.equal(torch.autograd.grad(frozen.sum(), x)[0], x.grad)


@pytest.mark.slow
def test_compiled_functions_equal_plain_ones_at_any_length(monkeypatch):
    """With inductor's backend for CPUs, which makes C++ of the same graphs as Triton of them on a GPU."""
    monkeypatch.setattr(kernels, "COMPILED", {"cpu"})
    for dtype in (torch.float32, torch.bfloat16):
        with compilations(most=1):
            for length in (9, 17, 33):
                for name, arguments in kernel_inputs(length, dtype).items():
                    kernel = getattr(kernels, name)
                    for one, other in zip(each(kernel(*arguments)), each(kernel.function(*arguments)), strict=True):
                        assert one.dtype == other.dtype and one.shape == other.shape
                        assert distance(one, other) <= (1e-6 if one.dtype == torch.float32 else 1e-3), (name, length)


def each(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.slow
def test_a_compiled_model_is_the_model_and_is_compiled_once(monkeypatch):
    """Norms four times: of the stream and of heads, and both again in the small copy's float32, which no GPU computes."""
    model = make("qwen3")
    plain = logps_and_gradients(model)
    assert fused.find_parts(model)  # tries each class
    monkeypatch.setattr(kernels, "COMPILED", {"cpu"})
    with compilations(most=4):
        line = fused.fuse_layers(model, CPU)
        assert line.startswith("fused: feed-forward, norms, rotary; "), line
        assert 0 < change(logps_and_gradients(model), plain) < 0.05
        for seed in range(3):
            model(model.lay_out(groups(seed, ((11 + seed, 5, 9 + seed),)))).sum().backward()


def compilations(most):
    """Forget what was compiled. To compile a function more than ``most`` times is then an error."""
    torch._dynamo.reset()
    return torch._dynamo.config.patch(recompile_limit=most, fail_on_recompile_limit_hit=True)


def kernel_inputs(length, dtype):
    generator = torch.Generator().manual_seed(length)

    def numbers(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(dtype)

    norm = numbers(length, 32, dtype=torch.float32), numbers(32), 1e-5, False
    inner = numbers(1, length, 48), numbers(1, length, 48)
    heads = numbers(1, length, 4, 8), numbers(1, length, 2, 8)
    angles = numbers(1, length, 1, 8, dtype=torch.float32), numbers(1, length, 1, 8, dtype=torch.float32)
    logits = numbers(length, 50, dtype=torch.float32)
    rows = numbers(length, dtype=torch.float32), torch.randint(50, (length,), generator=generator)
    return {
        "_norm": norm,
        "_norm_backward": (numbers(length, 32), *norm),
        "_norm_backward_with_weight": (numbers(length, 32), *norm),
        "_gated": (*inner, "silu"),
        "_gated_backward": (numbers(1, length, 48), *inner, "silu"),
        "_rotate": (*heads, *angles),
        "_rotate_back": (*heads, *angles),
        "log_normaliser": (logits, 1.0, 0.7, 30.0),
        "head_slope": (logits, *rows, numbers(length, dtype=torch.float32), 0.7, 30.0, dtype),
    }


# -- models ---------------------------------------------------------------------------------------------------------------

KNOWN = {
    "llama": {"norms", "feed-forward", "rotary"},
    "llama-tied": {"norms", "feed-forward", "rotary"},
    "qwen2": {"norms", "feed-forward", "rotary"},
    "qwen3": {"norms", "feed-forward", "rotary"},
    "mistral": {"norms", "feed-forward", "rotary"},
    "gemma2": {"norms", "feed-forward", "rotary"},
    "gemma3_text": {"norms", "feed-forward", "rotary"},
    "olmo2": {"norms", "feed-forward", "rotary"},
    "granite": {"norms", "feed-forward", "rotary"},
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_model_is_fused_and_equal(name):
    model = make(name)
    assert {each.part for _, each in fused.find_parts(model)} == KNOWN[name]
    plain = logps_and_gradients(model)
    line = fused.fuse_layers(model, CPU)
    assert line.startswith(f"fused: {', '.join(sorted(KNOWN[name]))}; "), line
    found = logps_and_gradients(model)
    assert (found[0] - plain[0]).abs().mean() < 0.02 and not torch.equal(found[0], plain[0])
    assert change(found[1:], plain[1:]) < 0.05


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "cohere", "gpt_oss", "mamba", "phi3"])
def test_a_model_of_another_form_stays_as_it_is(name):
    model = make(name, PADDED)
    classes = [type(module) for module in model.modules()]
    line = fused.fuse_layers(model, CPU)
    assert line.startswith("fused: nothing; ") and "form" in line
    assert classes == [type(module) for module in model.modules()] and not model.head.fused


def test_a_float32_model_stays_as_it_is():
    assert "bfloat16" in fused.fuse_layers(make("llama", dtype=torch.float32), CPU)


def test_names_weights_and_generation_stay():
    model, (group, *_) = make("llama"), groups()

    def outside():
        with model.own_attention():
            return list(model.causal_lm.state_dict()), by_definition(model.causal_lm, group, group.completions[0])

    before = outside()
    fused.fuse_layers(model, CPU)
    after = outside()
    assert model.head.fused and before[0] == after[0] and torch.equal(before[1], after[1])
    assert type(model.backbone.layers[0].self_attn).__name__ == "LlamaAttention"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_and_recomputation_get_the_same_gradients(checkpointing):
    model = make("qwen3", lora=True)
    if checkpointing:
        model.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    plain = logps_and_gradients(model)
    assert fused.fuse_layers(model, CPU).startswith("fused: feed-forward, norms, rotary; ")
    assert 0 < change(logps_and_gradients(model), plain) < 0.05


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_adapters_on_quantized_layers_get_the_same_gradients(quantization, tmp_path):
    pytest.importorskip("bitsandbytes")
    make_random("llama", VOCAB).save_pretrained(tmp_path)
    model = load_causal_lm(tmp_path, "bfloat16", rope_length=None, quantization=quantization)
    model = LogpModel(add_lora(model, LoraSettings(r=4), seed=0).to(torch.bfloat16))
    model.use(TREE)
    plain = logps_and_gradients(model)
    assert fused.fuse_layers(model, CPU).startswith("fused: feed-forward, norms, rotary; ")
    assert 0 < change(logps_and_gradients(model), plain) < 0.05


def failing(function, *inputs):
    if inputs[0].dtype == torch.bfloat16:
        raise RuntimeError("no compiler")
    return function(*inputs)


FAULTS = {
    "another epsilon": ("_norm", lambda function, x, weight, eps, plus_one: function(x, weight, eps + 0.1, plus_one)),
    "no gradient of a weight": (
        "_norm_backward_with_weight",
        lambda function, *inputs: (function(*inputs)[0], torch.zeros_like(inputs[2])),
    ),
    "a turn that goes forth": ("_rotate_back", lambda _, *inputs: kernels._rotate(*inputs)),
    "an activation's gradient without up": (
        "_gated_backward",
        lambda function, grad, gate, up, activation: function(grad, gate, torch.ones_like(up), activation),
    ),
    "an error of the compiler": ("_gated", failing),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_function_is_refused(fault, monkeypatch):
    name, function = FAULTS[fault]
    model = make("llama")
    fused.find_parts(model)  # tries each class once
    expected = model(model.lay_out(groups()))
    kernel = getattr(kernels, name)
    monkeypatch.setattr(kernel, "function", functools.partial(function, kernel.function))
    line = fused.fuse_layers(model, CPU)
    assert line.startswith("fused: nothing; ") and ("tolerance" in line or "no compiler" in line), line
    monkeypatch.undo()
    assert not model.head.fused and torch.equal(model(model.lay_out(groups())), expected)


class AnotherNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        return self.weight * hidden_states / (hidden_states.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class LimitedGate(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=7) * self.up_proj(x))


class NegatedMLP(LlamaMLP):
    def forward(self, x):
        return self.down_proj(-self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize(("name", "kind"), [("input_layernorm", AnotherNorm), ("mlp", LimitedGate), ("mlp", NegatedMLP)])
def test_a_class_with_another_formula_is_not_taken(name, kind):
    model = make("llama")
    assert fused.find_parts(model)
    getattr(model.backbone.layers[1], name).__class__ = kind
    assert not fused.find_parts(model)


def test_a_module_whose_forward_a_library_has_replaced_is_not_taken():
    model = make("llama")
    norm = model.backbone.layers[1].input_layernorm
    norm.forward = norm.forward
    assert not fused.find_parts(model)


def test_the_head_is_switched(monkeypatch):
    model = make("gemma2")
    calls = []
    monkeypatch.setattr(head, "head_slope", lambda *inputs: calls.append(1) or kernels.head_slope(*inputs))
    logps_and_gradients(model)
    assert not calls
    fused.fuse_layers(model, CPU)
    calls.clear()
    logps_and_gradients(model)
    assert calls
