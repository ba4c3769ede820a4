"""A body of attention that is wrong is found by itself: in values, in gradients, for each kind of layer of the model."""

import dataclasses
import re

import pytest
import torch
from architectures import make_random
from varlen_releases import have, kernel, torch_2_10

from raydpo.model import bodycheck, by_node, selfcheck, varlen
from raydpo.model.attention import Demand
from raydpo.model.layout import Method
from raydpo.model.logps import LogpModel
from raydpo.model.segments import Segments

CPU = torch.device("cpu")
PLAIN = Demand(heads=4, key_heads=2, size=16, dtype=torch.bfloat16, scaling=0.25)
KINDS = [
    PLAIN,
    dataclasses.replace(PLAIN, window=4096),
    dataclasses.replace(PLAIN, key_heads=4, scaling=1.0),
    dataclasses.replace(PLAIN, softcap=50.0),
    dataclasses.replace(PLAIN, sinks=True, window=128),
    dataclasses.replace(PLAIN, value_size=8),
]


@pytest.fixture(autouse=True)
def forget():
    yield
    varlen.torch_kernel.cache_clear()
    varlen.flash_kernel.cache_clear()


def in_bfloat16(query, key, value, *rest, scale=None, window_size=(-1, -1)):
    return kernel(query, key, value, *rest, scale, window_size)


def to_the_first_key(
    query, key, value, query_ends, key_ends, longest_query, longest_key, *, scale=None, window_size=(-1, -1)
):
    """The causal mask begins at the first key, as SDPA's ``is_causal`` and flash-attn before 2.1 have it."""
    pieces = []
    for (q0, q1), k0 in zip(query_ends.unfold(0, 2, 1).tolist(), key_ends[:-1].tolist(), strict=True):
        ends = [torch.tensor([0, q1 - q0])] * 2
        own = slice(k0, k0 + q1 - q0)
        pieces.append(kernel(query[q0:q1], key[own], value[own], *ends, q1 - q0, q1 - q0, scale, window_size))
    return torch.cat(pieces)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keys):
        return keys.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.02


def with_a_wrong_gradient(query, key, value, *rest, scale=None, window_size=(-1, -1)):
    return kernel(query, Doubled.apply(key), value, *rest, scale, window_size)


def with_a_window_one_longer(query, key, value, *rest, scale=None, window_size=(-1, -1)):
    return kernel(query, key, value, *rest, scale, (window_size[0] + 1 if window_size[0] >= 0 else -1, 0))


@pytest.mark.parametrize("demand", KINDS, ids=lambda demand: f"{demand.window}-{demand.softcap}-{demand.sinks}")
def test_node_by_node_is_right_for_every_kind_of_layer(demand):
    assert bodycheck.why_wrong("sdpa", [demand], CPU) is None
    assert max(bodycheck.errors("sdpa", dataclasses.replace(demand, dtype=torch.float32), CPU).values()) < 1e-5


def test_a_right_kernel_in_bfloat16_is_within_the_limit(monkeypatch):
    have(monkeypatch, "varlen_attn", in_bfloat16)
    found = bodycheck.errors("varlen", PLAIN, CPU)
    assert set(found) == {"values", "gradient of query", "gradient of key", "gradient of value"}
    assert 1e-4 < max(found.values()) < 0.007, found
    assert bodycheck.why_wrong("varlen", KINDS[:3], CPU) is None


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (to_the_first_key, r"values off by (0\.\d|1)"),
        (
            with_a_wrong_gradient,
            r"gradient of key off by 0\.02\d of the norm \(limit 0\.01\) with 4 query and 2 key heads of size",
        ),
        (with_a_window_one_longer, r"values off by .* with 4 query and 2 key heads of size 16, window 40"),
        (lambda *_, **__: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
    ids=["top-left", "gradient", "window", "fails"],
)
def test_a_wrong_kernel_is_refused(wrong, told, monkeypatch):
    have(
        monkeypatch,
        "varlen_attn",
        lambda *args, scale=None, window_size=None: wrong(*args, scale=scale, window_size=window_size),
    )
    assert re.match(told, bodycheck.why_wrong("varlen", KINDS[:2], CPU))


@pytest.mark.parametrize("change", ["window", "softcap", "sinks"])
def test_a_body_that_ignores_what_a_layer_asks_is_refused(change, monkeypatch):
    """Window and soft cap are narrowed for the check: the model's own would change nothing on a small tree."""
    right = by_node.attend
    monkeypatch.setattr(by_node, "attend", lambda *args: right(*args[:4], dataclasses.replace(args[4], **{change: None})))
    for demand in KINDS:
        ignored = bool(getattr(demand, change))
        assert (bodycheck.why_wrong("sdpa", [demand], CPU) is not None) == ignored, demand


def test_the_tree_of_the_check_has_what_a_kernel_may_get_wrong():
    tree = bodycheck.check_tree()
    lengths = [node.length for node in tree.nodes]
    assert len(tree.token_ids) == 816 and min(lengths) == 1 and {len(node.path) for node in tree.nodes} == {0, 1, 2}
    assert Segments.of(tree, "flex").positions % 128


@pytest.mark.parametrize(
    ("found", "body", "told"),
    [
        (in_bfloat16, "varlen", None),
        (with_a_wrong_gradient, "sdpa", "tree (varlen attention) refused, gradient of key off by 0.02"),
        (to_the_first_key, "sdpa", "tree (varlen attention) refused, values off by"),
    ],
    ids=["right", "gradient", "top-left"],
)
def test_the_self_check_refuses_a_wrong_kernel(found, body, told, monkeypatch):
    """With log-probs alone a wrong gradient cannot be seen."""
    have(
        monkeypatch,
        "varlen_attn",
        lambda *args, scale=None, window_size=None: found(*args, scale=scale, window_size=window_size),
    )
    monkeypatch.setattr(selfcheck, "_bodies", lambda *args: (("varlen", "sdpa"), selfcheck._demands(*args)))
    report = selfcheck.choose_layout(LogpModel(make_random("mistral", 96).bfloat16()), CPU)
    assert report.method == Method("tree", body)
    assert told is None or told in report.line
    assert not report.line.startswith("warning: ")


def test_a_gpu_without_a_variable_length_kernel_is_a_warning(monkeypatch):
    have(monkeypatch, "varlen_attn", torch_2_10)
    monkeypatch.setattr(selfcheck, "_bodies", lambda *args: (("sdpa",), selfcheck._demands(*args)))
    line = selfcheck.choose_layout(LogpModel(make_random("llama", 96).bfloat16()), CPU).line
    assert line.startswith("warning: layout: tree (sdpa attention)") and "flash_attn cannot be imported" in line
    assert f"varlen_attn of torch {torch.__version__} has no scale and no window_size; install torch 2.11 or newer" in line
    # Of a model whose layers no such kernel computes, there is nothing to install.
    line = selfcheck.choose_layout(LogpModel(make_random("gpt_oss", 96).bfloat16()), CPU).line
    assert line.startswith("layout: tree (sdpa attention)")
