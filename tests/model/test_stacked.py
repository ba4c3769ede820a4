"""Several sets of adapters on one model against each set alone in PEFT's own layers."""

from dataclasses import replace

import pytest
import torch
from architectures import make_random
from definition import VOCAB, groups
from peft import LoraConfig, get_peft_model

from raydpo.errors import ModelError
from raydpo.model.layout import Method, lay_out
from raydpo.model.logps import LogpModel
from raydpo.model.stacked import AdapterStack, adapter_weights

COUNT = 3


def adapted(**settings):
    """qwen2 has biases in its projections."""
    return get_peft_model(make_random("qwen2", VOCAB),
                          LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", **settings))


def starts(model):
    """Weights of ``COUNT`` adapters that do something, each something else."""
    torch.manual_seed(1)
    return [{name: torch.randn_like(value) * 0.1 for name, value in adapter_weights(model).items()} for _ in range(COUNT)]


def stacked(**settings):
    model = adapted(**settings)
    stack = AdapterStack(model, starts(model))
    return LogpModel(model).train(), stack


def alone(number, method):
    """Log-probs and gradients of one adapter by PEFT."""
    model = adapted()
    start = starts(model)[number]
    for name, parameter in model.named_parameters():
        if name in start:
            parameter.data.copy_(start[name])
    ours = LogpModel(model).train()
    ours.use(method)
    logps = ours(ours.lay_out(groups()))
    (logps * slopes(number, len(logps))).sum().backward()
    return logps.detach(), {name: value.grad for name, value in model.named_parameters() if value.requires_grad}


def slopes(number, size):
    return torch.linspace(-1, 1 + number, size)


@pytest.mark.parametrize("method", [Method("tree", "sdpa"), Method("packed", "sdpa"), Method("padded")], ids=str)
@pytest.mark.parametrize("members", [(0, 1, 2), (0, 2), (1,)], ids=str)
def test_values_and_gradients_are_those_of_each_alone(method, members):
    model, stack = stacked()
    model.use(method)
    with stack.using(members):
        logps = model(lay_out(groups(), method).repeated(len(members))).view(len(members), -1)
        torch.autograd.backward(logps, torch.stack([slopes(number, logps.shape[1]) for number in members]))
    for row, number in enumerate(members):
        wanted, gradients = alone(number, method)
        assert torch.allclose(logps[row], wanted, atol=2e-6)
        assert gradients.keys() == stack.places.keys() and len(gradients) == 2 * 2 * 7
        for name, gradient in gradients.items():
            assert (stack.places[name].of(stack.gradients[number]) - gradient).norm() < 1e-5 * gradient.norm(), name
    for number in {*range(COUNT)} - {*members}:
        assert not stack.gradients[number].any()


def test_copies_in_one_pack_are_the_copies_in_rows():
    """What variable-length kernels get, computed node by node."""
    model, stack = stacked()
    model.use(Method("tree", "sdpa"))
    layout = lay_out(groups(), model.method)
    flat = lay_out(groups(), Method("tree", "varlen")).repeated(COUNT)
    flat = replace(flat, segments=replace(flat.segments, body="sdpa"))
    assert flat.input_ids.shape == (1, COUNT * layout.input_ids.shape[1])
    with torch.no_grad(), stack.using(range(COUNT)):
        assert torch.allclose(model(flat), model(layout.repeated(COUNT)), atol=2e-6)
    for body in ("varlen", "flex"):
        # The copies as the layout of as many groups that share nothing would be: the same places, moved.
        once, thrice = (lay_out(groups(), Method("tree", body)).segments for _ in range(2))
        thrice = thrice.repeated(COUNT)
        size = once.positions
        assert thrice.positions == COUNT * size and thrice.longest_key == once.longest_key
        for name, shift in (("index", size), ("node_of", len(once.nodes)), ("subtree_end", len(once.nodes)), ("depths", 0)):
            one, all_of_them = getattr(once, name), getattr(thrice, name)
            if one is not None:
                assert torch.equal(all_of_them.view(COUNT, -1), one + shift * torch.arange(COUNT)[:, None])
        if body == "varlen":
            for name in ("query_ends", "key_ends"):
                lengths = torch.diff(getattr(once, name))
                assert torch.equal(torch.diff(getattr(thrice, name)), lengths.repeat(COUNT))
                assert getattr(thrice, name)[0] == 0


def test_a_row_that_is_not_finite_spoils_no_other():
    model, stack = stacked()
    with torch.no_grad():
        stack.weights[1].fill_(float("nan"))
    with stack.using(range(COUNT)):
        logps = model(model.lay_out(groups()).repeated(COUNT)).view(COUNT, -1)
        logps.sum().backward()
    assert logps[[0, 2]].isfinite().all() and not logps[1].isfinite().any()
    assert stack.gradients[[0, 2]].isfinite().all() and not stack.gradients[1].isfinite().any()


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["norm"]}], ids=str)
def test_what_is_not_plain_is_refused(settings):
    model = adapted(**settings)
    with pytest.raises(ModelError, match="train the settings one by one"):
        AdapterStack(model, [adapter_weights(model)])
