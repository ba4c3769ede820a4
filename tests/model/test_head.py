"""The vocabulary projection in chunks: exact, with gradients, in bounded memory."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from architectures import COMMON, make_random
from definition import VOCAB, by_definition, groups
from peft import LoraConfig, get_peft_model

from raydpo.config import LoraSettings
from raydpo.model import head
from raydpo.model.layout import lay_out
from raydpo.model.load import add_lora
from raydpo.model.logps import LogpModel
from raydpo.model.selfcheck import choose_layout


def make(name):
    return make_random(name, VOCAB)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "transform",
    [head.LogitTransform(), head.LogitTransform(0.3), head.LogitTransform(1.0, 2.0), head.LogitTransform(0.7, 3.0)],
)
def test_gradients_are_autograds_whether_the_head_learns_or_not(transform, bias, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_BYTES", {"cpu": 4 * 50 * 3})
    torch.manual_seed(0)
    linear = torch.nn.Linear(16, 50, bias=bias)
    states, targets, weights = torch.randn(11, 16) * 3, torch.randint(50, (11,)), torch.randn(11)

    def logps_and_gradients(logps_of):
        hidden = states.clone().requires_grad_()
        logps = logps_of(hidden)
        inputs = [hidden, *(parameter for parameter in linear.parameters() if parameter.requires_grad)]
        return [logps, *torch.autograd.grad((logps * weights).sum(), inputs)]

    def by_definition(hidden):
        logits = linear(hidden) * transform.scale
        if transform.softcap is not None:
            logits = transform.softcap * torch.tanh(logits / transform.softcap)
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    for learns, fused in itertools.product((True, False), (False, True)):
        linear.requires_grad_(learns)
        options = transform, True, False, fused
        found = logps_and_gradients(
            lambda hidden, options=options: head._ChunkedLogps.apply(hidden, linear.weight, linear.bias, targets, *options)
        )
        expected = logps_and_gradients(by_definition)
        assert len(found) == (2 + learns + learns * bias)
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapter on the head"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_the_sum_of_squares_is_told_beside_and_has_no_gradient(fused, name, adapted, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_BYTES", {"cpu": 4 * VOCAB * 3})
    model = make(name)
    if adapted:
        model = add_lora(model, LoraSettings(r=4, target_modules=["q_proj", "lm_head"]), seed=0)
    module = LogpModel(model)
    gradients = []
    module.head.fused = fused
    for asked in (False, True):
        found = module(lay_out(groups()), **({"log_sum_sq": True} if asked else {}))
        logps = found[0] if asked else found
        gradients.append(
            torch.autograd.grad(logps.sum(), [one for one in module.parameters() if one.requires_grad], allow_unused=True)
        )
    assert not found[1].requires_grad and torch.equal(logps, module(lay_out(groups())))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other) if one is not None else other is None
    wanted = []
    for group in groups():
        for completion in group.completions:
            ids = torch.from_numpy(np.concatenate([group.prompt, completion]).astype(np.int64))[None]
            wanted.append(model(input_ids=ids, use_cache=False).logits[0, len(group.prompt) - 1 : -1].float().softmax(-1))
    assert torch.allclose(found[1], torch.cat(wanted).square().sum(-1).log(), atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_chunks_change_nothing(name, monkeypatch):
    results = []
    for rows in (10_000, 3):
        monkeypatch.setattr(head, "CHUNK_BYTES", {"cpu": 4 * VOCAB * rows})
        model = make(name)
        layout = lay_out(groups())
        logps = LogpModel(model)(layout)
        logps.sum().backward()
        results.append((logps.detach(), model.get_output_embeddings().weight.grad))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-6)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-5)


@pytest.mark.parametrize(
    ("vocabulary", "rows"), [(128_256, 2048), (32_000, 2048), (151_936, 1664), (262_144, 1024), (10_000_000, 128)]
)
def test_a_chunk_on_a_gpu_has_whole_tiles(vocabulary, rows):
    assert head.chunk_rows(vocabulary, "cuda") == rows
    assert head.chunk_rows(vocabulary, "cpu") == max(1, 2**24 // vocabulary)


@pytest.mark.parametrize("release", ["none", "no out_dtype", "only bfloat16 sums", "does nothing"])
def test_the_weights_gradient_is_summed_by_the_product_where_it_can(release, monkeypatch):
    """Stand-ins for ``torch.addmm`` of a GPU: of today, and of older releases, with which a product is made and added."""
    calls = []

    def addmm(total, left, right, *, out_dtype, out):
        assert out is total and out_dtype == torch.float32
        if release == "no out_dtype":
            raise TypeError("addmm() got an unexpected keyword argument 'out_dtype'")
        if release == "only bfloat16 sums" and total.dtype != right.dtype:
            raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")
        calls.append(1)
        if release == "does nothing":
            return out
        return out.add_(left.float() @ right.float())

    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(head, "_on_gpu", lambda device: True)
    head._adds_in_place.cache_clear()
    torch.manual_seed(0)
    total, left, right = torch.ones(5, 6), torch.randn(5, 7).bfloat16(), torch.randn(7, 6).bfloat16()
    expected = total + left.float() @ right.float()
    head._add_product(total, left, right)
    head._adds_in_place.cache_clear()
    assert torch.allclose(total, expected, atol=0.05)
    assert (len(calls) == 2) is (release == "none")
    assert torch.allclose(total, expected, atol=1e-5) is (release == "none")


def test_the_chunk_bounds_the_memory(monkeypatch):
    """The head never allocates a [tokens, vocabulary] tensor; its largest tensor is one chunk."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            is_weight = isinstance(result, torch.Tensor) and tuple(result.shape) == (COMMON["hidden_size"], VOCAB)
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (VOCAB,) and not is_weight:
                largest = max(largest, result.numel())
            return result

    monkeypatch.setattr(head, "CHUNK_BYTES", {"cpu": 4 * VOCAB * 5})
    model = LogpModel(make("llama"))
    layout = lay_out(groups())
    with Watch():
        model(layout).sum().backward()
    assert len(layout.targets) > 50 and 0 < largest <= 5 * VOCAB


def test_lora_on_the_head_gets_its_gradient():
    model = add_lora(make("llama"), LoraSettings(r=4, alpha=8, target_modules=["lm_head", "q_proj"]), seed=0)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_B" in key:
                value.normal_(std=0.1)
    group = groups()[0]
    inner = model.get_base_model()
    wanted = torch.cat([by_definition(inner, group, one) for one in group.completions])
    wanted.sum().backward()
    gradients = {key: value.grad.clone() for key, value in model.named_parameters() if value.requires_grad}
    model.zero_grad(set_to_none=True)
    layout = lay_out([group])
    logps = LogpModel(model)(layout)
    assert torch.allclose(logps, wanted, atol=2e-5)
    logps.sum().backward()
    for key, value in model.named_parameters():
        if value.requires_grad:
            assert torch.allclose(value.grad, gradients[key], atol=1e-4), key


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
    ids=str,
)
def test_an_adapter_on_the_head_keeps_the_float32_stream(settings):
    """Otherwise its hidden states would be rounded, unlike those of a model without an adapter on the head."""
    plain, adapted = (
        LogpModel(model.bfloat16()) for model in (make("llama"), get_peft_model(make("llama"), LoraConfig(r=4, **settings)))
    )
    for model in (plain, adapted):
        choose_layout(model, torch.device("cpu"))
    layout = plain.lay_out(groups())
    assert adapted.float32_stream and torch.equal(plain.hidden(layout), adapted.hidden(layout))
    assert torch.isfinite(adapted(layout)).all()


PEAK = """
import sys

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from raydpo.model.budget import reset_peak_memory, used_memory
from raydpo.model.layout import Method, PromptGroup
from raydpo.model.logps import LogpModel

dtype = getattr(torch, sys.argv[1])
with torch.no_grad():
    model = LogpModel(LlamaForCausalLM(LlamaConfig(
        vocab_size=150_000, hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=4096, tie_word_embeddings=True)).to(dtype).eval())
    model.use(Method("tree", "sdpa"))
    ids = np.arange(4096)
    layout = model.lay_out([PromptGroup(ids[:1], (ids[1:],))])
    scoring = sys.argv[2] == "scoring"
    if not scoring:
        model._parts = (*model._parts[:2], lambda hidden, targets: hidden.sum())
        model._parts[-1].weight_dtype = dtype
    reset_peak_memory(torch.device("cpu"))
    model(layout)
    print(used_memory(torch.device("cpu")))
"""


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_scoring_needs_little_more_memory_than_the_forward_without_logits(dtype):
    """At 4,096 tokens and a vocabulary of 150,000, where all logits at once would be 2.5 GB."""
    peaks = [
        float(subprocess.run([sys.executable, "-c", PEAK, dtype, what], capture_output=True, text=True, check=True).stdout)
        for what in ("scoring", "no logits")
    ]
    assert peaks[0] < 1.3 * peaks[1], [f"{peak / 2**20:.0f} MiB" for peak in peaks]
