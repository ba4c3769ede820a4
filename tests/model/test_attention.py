"""Each body against a dense mask written from the definition: a token sees its path, itself, and what came before in its
node, as far as its window reaches."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from raydpo.model import attention
from raydpo.model.attention import Segments, tree_attention
from raydpo.model.tree import PrefixTree

HEADS, KEY_HEADS, SIZE = 4, 2, 8


def tree(seed=0, longest=40):
    rng = np.random.default_rng(seed)
    system = rng.integers(0, 50, 9)
    prompts = [np.concatenate([system, rng.integers(0, 50, length)]) for length in (5, longest)]
    return PrefixTree.build([np.concatenate([prompt, rng.integers(0, 50, length)]) for prompt in prompts
                             for length in (1, 7, 30)], min_saved=1)


def tensors(tree, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(1, heads, len(tree.token_ids), SIZE, requires_grad=True) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]


def by_definition(tree, query, key, value, window=None, softcap=None):
    sees = torch.zeros(len(tree.token_ids), len(tree.token_ids), dtype=torch.bool)
    for node in tree.nodes:
        positions = np.concatenate([np.arange(start, start + length) for start, length in node.with_path])
        for place in range(node.depth, node.depth + node.length):
            first = 0 if window is None else max(0, place + 1 - window)
            sees[positions[place], positions[first : place + 1]] = True
    key, value = (tensor.repeat_interleave(HEADS // KEY_HEADS, 1) for tensor in (key, value))
    scores = query @ key.transpose(-1, -2) * SIZE**-0.5
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return (torch.softmax(scores.masked_fill(~sees, -torch.inf), -1) @ value).transpose(1, 2)


def varlen(query, key, value, query_ends, key_ends, longest_query, longest_key, *, scale, window_size, enable_gqa):
    """What the CUDA kernel promises, in plain torch: segments, causal from the last key backwards, a window."""
    assert longest_query == query_ends.diff().max() and longest_key == key_ends.diff().max() and window_size[1] == 0
    outputs = []
    for (q0, q1), (k0, k1) in zip(query_ends.unfold(0, 2, 1).tolist(), key_ends.unfold(0, 2, 1).tolist(), strict=True):
        back = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None] - torch.arange(k1 - k0)
        sees = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
        outputs.append(F.scaled_dot_product_attention(
            *(rows[None].transpose(1, 2) for rows in (query[q0:q1], key[k0:k1], value[k0:k1])), attn_mask=sees, scale=scale,
            enable_gqa=enable_gqa)[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("body", ["sdpa", "varlen", "flex"])
def test_bodies_are_the_definition(body, window, monkeypatch):
    from torch.nn.attention import flex_attention

    # The CUDA kernels themselves are tested where there is CUDA; here, what they are given.
    monkeypatch.setattr(attention, "_torch_varlen", lambda: varlen)
    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention.flex_attention)
    pack = tree()
    arguments = tensors(pack)
    if body == "flex":  # on CPUs torch has no backward of it
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
