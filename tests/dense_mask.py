"""Attention over a prefix tree from its definition, as a dense mask: a token sees its path, itself, and earlier tokens of
its node, within its window."""

import numpy as np
import torch

from raydpo.model.tree import PrefixTree

HEADS, KEY_HEADS = 4, 2


def tree(seed=0, longest=40):
    rng = np.random.default_rng(seed)
    system = rng.integers(0, 50, 9)
    prompts = [np.concatenate([system, rng.integers(0, 50, length)]) for length in (5, longest)]
    return PrefixTree.build(
        [np.concatenate([prompt, rng.integers(0, 50, length)]) for prompt in prompts for length in (1, 7, 30)], min_saved=1
    )


def tensors(tree, size=8, key_heads=KEY_HEADS):
    torch.manual_seed(0)
    return [torch.randn(1, heads, len(tree.token_ids), size, requires_grad=True) for heads in (HEADS, key_heads, key_heads)]


def assert_same(found, expected, arguments, tolerance=1e-5):
    """Equal values, and equal gradients of ``arguments``."""
    assert torch.allclose(found, expected, atol=tolerance)
    weights = torch.randn_like(expected)
    gradients = (torch.autograd.grad((each * weights).sum(), arguments) for each in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=tolerance)


def by_definition(tree, query, key, value, window=None, softcap=None, scaling=None, sinks=None):
    """[1, T, heads, size], see ``attention.tree_attention``."""
    sees = torch.zeros(len(tree.token_ids), len(tree.token_ids), dtype=torch.bool)
    for node in tree.nodes:
        positions = np.concatenate([np.arange(start, start + length) for start, length in node.with_path])
        for place in range(node.depth, node.depth + node.length):
            first = 0 if window is None else max(0, place + 1 - window)
            sees[positions[place], positions[first : place + 1]] = True
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~sees, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:-1], 1)], -1)
    return (torch.softmax(scores, -1)[..., : len(sees)] @ value).transpose(1, 2)
