"""The fused LoRA layer against PEFT's layer."""

import pytest
import torch
from architectures import ARCHITECTURES, make_random
from definition import VOCAB, by_definition, groups
from peft import LoraConfig, get_peft_model

from raydpo.model.adapter import fuse_adapters
from raydpo.model.logps import LogpModel


def adapted(**settings):
    """A model with adapters whose output is not zero; qwen2 has biases in its projections."""
    model = make_random("qwen2", VOCAB)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_B" in key:
                value.normal_(std=0.1)
    return model


def logps_and_gradients(model):
    ours = LogpModel(model)
    model.train()  # its dropout, too
    logps = ours(ours.lay_out(groups()))
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    gradients = {key: value.grad for key, value in model.named_parameters() if value.requires_grad}
    assert len(gradients) >= 2 * 2 * 7 and all(gradient.abs().sum() > 0 for gradient in gradients.values())
    return logps.detach(), gradients


def calls_of(monkeypatch):
    """List that records every call of the fused product."""
    from raydpo.model import adapter

    calls = []
    product = adapter._LoraProduct.apply
    monkeypatch.setattr(adapter._LoraProduct, "apply", lambda *args: calls.append(args) or product(*args))
    return calls


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_values_and_gradients_are_pefts(settings, monkeypatch):
    wanted, expected = logps_and_gradients(adapted(**settings))
    calls = calls_of(monkeypatch)
    found, gradients = logps_and_gradients(fuse_adapters(adapted(**settings)))
    assert len(calls) == 2 * 7
    assert torch.allclose(found, wanted, atol=2e-6)
    assert gradients.keys() == expected.keys()
    for key, gradient in expected.items():
        assert (gradients[key] - gradient).norm() < 1e-5 * gradient.norm(), key


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}], ids=str)
def test_what_is_not_plain_stays_pefts(settings, monkeypatch):
    calls = calls_of(monkeypatch)
    results = []
    for fuse in (lambda model: model, fuse_adapters):
        model = fuse(adapted(**settings))
        torch.manual_seed(2)
        results.append(logps_and_gradients(model))
    assert not calls
    assert torch.equal(results[0][0], results[1][0])


TARGETS = ["q_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "x_proj"]


@pytest.mark.parametrize(
    "settings",
    [
        {"bias": "none"},
        {"bias": "lora_only"},
        {"bias": "all", "modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_gradient_is_that_of_peft_and_the_definition(name, settings):
    """Gradients of factors, biases and whole modules, by architecture: fused layers and raydpo's head against PEFT's layers
    and the model's logits."""
    results = []
    for ours in (False, True):
        model = make_random(name, VOCAB)
        try:
            model = get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS, **settings))
        except ValueError as error:
            pytest.skip(str(error))  # the architecture lacks this module, or PEFT does not support it
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        if ours:
            policy = LogpModel(fuse_adapters(model)).train()
            logps = policy(policy.lay_out(groups()))
        else:
            logps = torch.cat([by_definition(model, group, one) for group in groups() for one in group.completions])
        (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
        results.append({key: value.grad for key, value in model.named_parameters() if value.requires_grad})
    expected, found = results
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert (found[key] is None) == (gradient is None), key
        if gradient is not None:
            assert (found[key] - gradient).norm() < 1e-4 * gradient.norm().clamp_min(1e-2), key


def test_adapters_switched_off_or_merged_are_respected():
    model = fuse_adapters(adapted())
    ours = LogpModel(model).eval()
    layout = ours.lay_out(groups())
    with torch.no_grad():
        live = ours(layout)
        with model.disable_adapter():
            base = ours(layout)
        model.merge_adapter()
        merged = ours(layout)
        model.unmerge_adapter()
    assert torch.allclose(merged, live, atol=1e-5) and not torch.allclose(base, live, atol=1e-2)
    assert torch.allclose(base, LogpModel(make_random("qwen2", VOCAB))(layout), atol=1e-6)
