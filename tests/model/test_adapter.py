"""The fused LoRA layer against PEFT's own."""

import pytest
import torch
from architectures import make_random
from definition import VOCAB, groups
from peft import LoraConfig, get_peft_model

from raydpo.model.adapter import fuse_adapters
from raydpo.model.logps import LogpModel


def adapted(**settings):
    """A model with adapters that do something; qwen2 has biases in its projections."""
    model = make_random("qwen2", VOCAB)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_B" in key:
                value.normal_(std=0.1)
    return model


def logps_and_gradients(model):
    ours = LogpModel(model).train()
    logps = ours(ours.lay_out(groups()))
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    gradients = {key: value.grad for key, value in model.named_parameters() if value.requires_grad}
    assert len(gradients) >= 2 * 2 * 7 and all(gradient.abs().sum() > 0 for gradient in gradients.values())
    return logps.detach(), gradients


def calls_of(monkeypatch):
    """How often the fused product is used."""
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
