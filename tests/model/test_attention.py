"""Each implementation of attention against a dense mask made from the definition, and which of them a model may use."""

import dataclasses

import pytest
import torch
from dense_mask import HEADS, assert_same, by_definition, tensors, tree

from raydpo.model import by_node, varlen
from raydpo.model.attention import Demand, available_bodies, lacking_kernels, tree_attention, watch_demands, why_not
from raydpo.model.segments import Segments

CUDA = torch.device("cuda")
PLAIN = Demand(heads=32, key_heads=8, size=128, dtype=torch.bfloat16, scaling=0.1)


@pytest.mark.parametrize("settings", [{}, {"sliding_window": 6}], ids=str)
@pytest.mark.parametrize("more", [{}, {"softcap": 2.0}, {"s_aux": torch.linspace(-1, 1, HEADS)}], ids=str)
def test_node_by_node_is_the_definition(settings, more):
    pack = tree()
    arguments = tensors(pack)
    terms = {"window": settings.get("sliding_window"), "softcap": more.get("softcap"), "sinks": more.get("s_aux")}
    found, _ = tree_attention(torch.nn.Module(), *arguments, None, segments=Segments.of(pack, "sdpa"), **settings, **more)
    assert_same(found, by_definition(pack, *arguments, **terms), arguments)


def test_long_nodes_are_cut_into_blocks_of_queries(monkeypatch):
    pack = tree(longest=150)
    arguments = tensors(pack)
    expected = by_definition(pack, *arguments)
    monkeypatch.setattr(by_node, "QUERY_BLOCK", 32)
    segments = Segments.of(pack, "sdpa")
    found, _ = tree_attention(torch.nn.Module(), *arguments, None, segments=segments)
    assert torch.allclose(found, expected, atol=1e-5)
    assert max(mask.shape[0] for mask in segments.memo.values()) <= 32


def test_what_no_body_computes_is_an_error():
    pack = tree()
    arguments = tensors(pack)
    with pytest.raises(ValueError, match="without the layout"):
        tree_attention(torch.nn.Module(), *arguments, None)
    with pytest.raises(ValueError, match="mask or dropout"):
        tree_attention(torch.nn.Module(), *arguments, torch.zeros(1), segments=Segments.of(pack, "sdpa"))


@pytest.mark.parametrize("body", ["varlen", "flash"])
def test_a_layer_that_a_variable_length_kernel_lacks_is_computed_node_by_node(body):
    """Also a layer that the model did not show when the body was chosen."""
    pack = tree()
    arguments, sinks = tensors(pack), torch.linspace(-1, 1, HEADS)
    found, _ = tree_attention(torch.nn.Module(), *arguments, None, segments=Segments.of(pack, body), s_aux=sinks)
    assert torch.allclose(found, by_definition(pack, *arguments, sinks=sinks), atol=1e-5)
    if body == "varlen":
        found, _ = tree_attention(torch.nn.Module(), *arguments, None, segments=Segments.of(pack, body), softcap=2.0)
        assert torch.allclose(found, by_definition(pack, *arguments, softcap=2.0), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "bodies", "told"),
    [
        ({}, ("flash", "varlen", "flex", "sdpa"), None),
        ({"softcap": 50.0}, ("flash", "flex", "sdpa"), "no soft cap"),
        ({"sinks": True}, ("flex", "sdpa"), "no attention sinks"),
        ({"dtype": torch.float32}, ("flex", "sdpa"), "attention computes in float32"),
        ({"size": 192, "value_size": 128}, ("flex", "sdpa"), "head size 192 and values 128"),
        ({"size": 20}, ("flex", "sdpa"), "head size 20"),
    ],
    ids=str,
)
def test_bodies_that_a_model_may_use(change, bodies, told, monkeypatch):
    monkeypatch.setattr(varlen, "flash_kernel", lambda: print)
    other = dataclasses.replace(PLAIN, **change)
    assert available_bodies(CUDA, [PLAIN, other]) == bodies
    assert available_bodies(torch.device("cpu"), [other]) == ("sdpa",)
    assert why_not("varlen", other) is None if told is None else told in why_not("varlen", other)


def test_bodies_without_their_kernels(monkeypatch):
    monkeypatch.setattr(varlen, "flash_kernel", lambda: "flash_attn cannot be imported (x)")
    assert available_bodies(CUDA, [PLAIN]) == ("varlen", "flex", "sdpa")
    capped = dataclasses.replace(PLAIN, softcap=50.0)
    assert available_bodies(CUDA, [PLAIN, capped]) == ("flex", "sdpa")
    monkeypatch.setattr(varlen, "torch_kernel", lambda: "torch 2.10 has no scale")
    assert available_bodies(CUDA, [PLAIN]) == ("flex", "sdpa")
    assert why_not("varlen", PLAIN) == "torch 2.10 has no scale"


def test_kernels_that_a_machine_lacks_are_told(monkeypatch):
    """Not of a model that none computes, and not if one is there."""
    capped, sinking = (dataclasses.replace(PLAIN, **change) for change in ({"softcap": 50.0}, {"sinks": True}))
    monkeypatch.setattr(varlen, "flash_kernel", lambda: "no flash_attn")
    assert lacking_kernels([PLAIN]) == [] and lacking_kernels([PLAIN, capped]) == ["no flash_attn"]
    monkeypatch.setattr(varlen, "torch_kernel", lambda: "torch 2.10 has no scale")
    assert lacking_kernels([PLAIN]) == ["torch 2.10 has no scale", "no flash_attn"]
    assert lacking_kernels([PLAIN, sinking]) == []


def test_what_layers_ask_is_watched():
    pack = tree()
    arguments, sinks = tensors(pack), torch.zeros(HEADS)
    segments = Segments.of(pack, "sdpa")
    with watch_demands() as found:
        tree_attention(torch.nn.Module(), *arguments, None, segments=segments, sliding_window=6, softcap=3.0)
        tree_attention(torch.nn.Module(), *arguments, None, segments=segments, scaling=0.5, s_aux=sinks)
    tree_attention(torch.nn.Module(), *arguments, None, segments=segments, scaling=0.25)
    shape = {"heads": 4, "key_heads": 2, "size": 8, "dtype": torch.float32}
    assert found == {
        Demand(**shape, scaling=8**-0.5, window=6, softcap=3.0),
        Demand(**shape, scaling=0.5, sinks=True),
    }
