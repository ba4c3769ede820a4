"""Each implementation of attention against a dense mask made from the definition."""

import pytest
import torch
import torch.nn.functional as F
from dense_mask import by_definition, tensors, tree

from raydpo.model import attention
from raydpo.model.attention import Segments, tree_attention


def varlen(query, key, value, query_ends, key_ends, longest_query, longest_key, *, scale, window_size, enable_gqa):
    """The CUDA kernel's result in plain torch: segments, a causal mask aligned to the last key, a window."""
    assert longest_query == query_ends.diff().max() and longest_key == key_ends.diff().max() and window_size[1] == 0
    outputs = []
    for (q0, q1), (k0, k1) in zip(query_ends.unfold(0, 2, 1).tolist(), key_ends.unfold(0, 2, 1).tolist(), strict=True):
        back = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None] - torch.arange(k1 - k0)
        sees = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
        outputs.append(
            F.scaled_dot_product_attention(
                *(rows[None].transpose(1, 2) for rows in (query[q0:q1], key[k0:k1], value[k0:k1])),
                attn_mask=sees,
                scale=scale,
                enable_gqa=enable_gqa,
            )[0].transpose(0, 1)
        )
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("body", ["sdpa", "varlen", "flex"])
def test_bodies_are_the_definition(body, window, monkeypatch):
    from torch.nn.attention import flex_attention

    # tests/gpu tests the CUDA kernels. Here only their arguments are tested.
    monkeypatch.setattr(attention, "_torch_varlen", lambda: varlen)
    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention.flex_attention)
    pack = tree()
    arguments = tensors(pack)
    if body == "flex":  # torch has no backward pass of it on CPUs
        arguments = [tensor.detach() for tensor in arguments]
    expected = by_definition(pack, *arguments, window=window)
    found, _ = tree_attention(torch.nn.Module(), *arguments, None, segments=Segments.of(pack, body), sliding_window=window)
    assert torch.allclose(found, expected, atol=1e-5)
    if body != "flex":
        weights = torch.randn_like(expected)
        gradients = torch.autograd.grad((expected * weights).sum(), arguments)
        for ours, theirs in zip(torch.autograd.grad((found * weights).sum(), arguments), gradients, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("settings", [dict(softcap=2.0), dict(softcap=2.0, sliding_window=6)], ids=str)
def test_soft_caps(settings):
    pack = tree()
    arguments = tensors(pack)
    expected = by_definition(pack, *arguments, window=settings.get("sliding_window"), softcap=settings["softcap"])
    found, _ = tree_attention(torch.nn.Module(), *arguments, None, segments=Segments.of(pack, "sdpa"), **settings)
    assert torch.allclose(found, expected, atol=1e-5)


def test_long_nodes_are_cut_into_blocks_of_queries(monkeypatch):
    pack = tree(longest=150)
    arguments = tensors(pack)
    expected = by_definition(pack, *arguments)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 32)
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
