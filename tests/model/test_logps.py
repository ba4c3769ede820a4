"""Log-probs of completions against the definition: log softmax of the model's logits, one sequence at a time."""

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, HYBRIDS, NO_TREE, make_random
from definition import VOCAB, by_definition, groups

from raydpo.config import LoraSettings
from raydpo.data.shapes import PADDED_MULTIPLE
from raydpo.errors import ModelError
from raydpo.model.layout import Method, PromptGroup, lay_out
from raydpo.model.load import add_lora
from raydpo.model.logps import LogpModel
from raydpo.model.selfcheck import choose_layout

CPU = torch.device("cpu")
TREE, PACKED, PADDED = Method("tree", "sdpa"), Method("packed", "sdpa"), Method("padded")


def make(name, **settings):
    return make_random(name, VOCAB, **settings)


def gradients_of(model):
    return {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("name", [*ARCHITECTURES, *HYBRIDS])
def test_every_layout_is_exact_or_refused(name):
    """Tree = packed = padded = one completion at a time, in values and gradients; layouts that are not exact are refused."""
    model = make(name)
    ours = LogpModel(model)
    report = choose_layout(ours, CPU)
    assert report.method.layout == ("padded" if name in NO_TREE else "tree"), report.line
    own = model.config._attn_implementation
    ours.use(PADDED)
    wanted = torch.cat([by_definition(model, group, one) for group in groups() for one in group.completions])
    weights = torch.linspace(-1, 1, len(wanted))
    (wanted * weights).sum().backward()
    expected = gradients_of(model)
    assert own is not None
    for method in [PADDED] if name in NO_TREE else [TREE, PACKED, PADDED]:
        model.zero_grad(set_to_none=True)
        ours.use(method)
        layout = ours.lay_out(groups())
        logps = ours(layout)
        assert logps.dtype == torch.float32
        assert torch.allclose(logps, wanted, atol=2e-5), method
        (logps * weights).sum().backward()
        found = gradients_of(model)
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            size = gradient.norm().clamp_min(1e-2)  # some are zero except for rounding
            assert (found[key] - gradient).norm() / size < 1e-4, (method, key)


@pytest.mark.parametrize("name", ["bloom", "gptj"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layout_that_is_wrong_cannot_be_forced(name, dtype):
    with pytest.raises(ModelError, match=r"model.layout=tree is wrong .*tree \(sdpa attention\): .*Use model.layout=auto"):
        choose_layout(LogpModel(make(name).to(dtype)), CPU, "tree")


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe"])
def test_bfloat16_is_checked_too(name):
    report = choose_layout(LogpModel(make(name).bfloat16()), CPU)
    assert report.method == TREE, report.line


@pytest.mark.parametrize("layout", ["tree", "packed", "padded"])
def test_a_layout_can_be_forced(layout):
    report = choose_layout(LogpModel(make("llama")), CPU, layout)
    assert report.method.layout == layout and layout in report.line


def test_a_window_outside_the_attention_function_is_found_out():
    """A model that passes no window to attention but masks with one: exact on short rows, wrong on longer ones."""
    model = make("mistral")
    for layer in model.model.layers:
        forward = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, forward=forward, attention=layer.self_attn, **kwargs: without_window(
            attention, forward, *args, **kwargs
        )
    report = choose_layout(LogpModel(model), CPU)
    assert report.method.layout == "padded" and "tree (sdpa attention) refused" in report.line


def without_window(attention, forward, *args, **kwargs):
    config = attention.config
    attention.config = type(config)(**{**config.to_dict(), "sliding_window": None})
    attention.config._attn_implementation = config._attn_implementation
    try:
        return forward(*args, **kwargs)
    finally:
        attention.config = config


@pytest.mark.parametrize("method", [TREE, PACKED, PADDED], ids=str)
def test_gradient_checkpointing_and_adapters_on_every_layer(method):
    gradients = []
    for checkpointing in (False, True):
        model = add_lora(make("qwen3"), LoraSettings(r=4, alpha=8), seed=0)
        with torch.no_grad():
            for key, value in model.named_parameters():
                if "lora_B" in key:
                    value.normal_(std=0.1)
        ours = LogpModel(model)
        ours.use(method)
        if checkpointing:
            ours.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ours.train()
        ours(ours.lay_out(groups())).sum().backward()
        gradients.append({key: value.grad.clone() for key, value in model.named_parameters() if value.requires_grad})
    assert len(gradients[0]) == 2 * 2 * 7
    for key, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0 and torch.allclose(gradient, gradients[1][key], atol=1e-6), key


def test_generation_goes_on_as_before():
    model = make("llama")
    prompt = torch.tensor([[5, 6, 7, 8]])
    plain = model.generate(prompt, max_new_tokens=8, do_sample=False)
    ours = LogpModel(model)
    choose_layout(ours, CPU, "tree")
    with ours.own_attention():
        assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), plain)
    assert ours.method == TREE and model.config._attn_implementation == "raydpo_tree"


def test_an_unknown_transform_of_logits_is_found_out():
    model = make("granite")
    model.config.logits_scaling = 1.0  # what we would read
    model.logits_scaling = 3.0
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits / 3.0
        return output

    model.forward = scaled
    with pytest.raises(ModelError, match="cannot be scored exactly"):
        choose_layout(LogpModel(model), CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_log_prob_does_not_depend_on_its_batch(dtype):
    """Layouts agree bit for bit in bfloat16 on CPUs, so the first loss is ln 2 with any batches."""
    many = groups(shapes=((7, 5, 9), (30, 1, 2), (1, 12, 3), (150, 60, 16), (200, 40, 3), (100, 131, 90), (600, 30, 20)))
    model = make("llama", hidden_size=64, num_hidden_layers=4, max_position_embeddings=1024).to(dtype)
    scores = []
    for method, batch in ((TREE, 7), (TREE, 1), (PACKED, 7), (PACKED, 2)):
        ours = LogpModel(model)
        ours.use(method)
        scores.append(
            np.concatenate(
                [
                    logps
                    for start in range(0, 7, batch)
                    for group in ours.score(many[start : start + batch], CPU)
                    for logps in group
                ]
            )
        )
    for other in scores[1:]:
        assert np.abs(scores[0] - other).max() <= (1e-5 if dtype == torch.float32 else 0.0)


def test_bfloat16_keeps_its_stream_and_logits_in_float32():
    """Log-probs are closer to the float32 model's than those of a plain bfloat16 model."""
    model = make("llama", num_hidden_layers=12, hidden_size=64)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(3.0)
            value.copy_(value.bfloat16())  # so that rounding of the weights does not count
    exact = np.concatenate(
        [by_definition(model, group, one).detach().numpy() for group in groups() for one in group.completions]
    )
    ours = LogpModel(model.bfloat16())
    ours.use(TREE)
    gaps = []
    for ours.float32_stream in (True, False):
        gaps.append(np.abs(np.concatenate([one for group in ours.score(groups(), CPU) for one in group]) - exact).mean())
    assert gaps[0] < 0.9 * gaps[1], gaps


def test_padded_rows_point_at_predictors():
    layout = lay_out([PromptGroup(np.array([10, 11]), (np.array([20, 21]), np.array([30])))])
    assert layout.input_ids.shape == (2, PADDED_MULTIPLE)
    assert layout.positions.tolist() == [1, 2, PADDED_MULTIPLE + 1]
    assert layout.targets.tolist() == [20, 21, 30]
    assert layout.lengths == (2, 1)


def test_a_tree_points_at_predictors():
    shared = np.arange(10, 22)
    layout = lay_out([PromptGroup(shared, (np.array([40, 41]), np.array([50])))], TREE)
    assert layout.input_ids.tolist() == [[*shared, 40, 41, 50]]
    assert layout.position_ids.tolist() == [[*range(12), 12, 13, 12]]
    assert layout.positions.tolist() == [11, 12, 11]  # the last prompt token predicts both first tokens
    assert layout.targets.tolist() == [40, 41, 50]
