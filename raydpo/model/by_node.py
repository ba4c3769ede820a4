"""Attention over a prefix tree node by node, with SDPA or in plain torch. It runs on any device and knows every feature.

Shapes: T = positions, A = query heads, G = key heads, D = head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from raydpo.model.segments import Segments, Terms
from raydpo.model.tree import TreeNode

__all__ = ["QUERY_BLOCK", "WHOLE_BLOCKS", "attend", "attend_exactly"]

QUERY_BLOCK = 512
"""Most queries of one SDPA call. It bounds the rows of the mask, and blocks of a long node skip the keys after them."""
WHOLE_BLOCKS = 32, 512
"""Multiples to which queries and keys are padded when a CPU computes a bfloat16 model. Attention is float32 there, since its
kernels are faster. They sum over blocks of 512 keys, and in another order for a smaller block. Then a few results round to
bfloat16 differently, and after 30 layers most log-probs differ, by 0.02 nats on average. With whole blocks a token's
log-prob is the same bit for bit in every layout; scoring takes 1.3 times as long."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, Terms], Tensor]
"""Attention of some queries to some keys, with a mask."""


def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments, terms: Terms) -> Tensor:
    """Attention of each token to its path and itself, node by node.

    Args:
        query: [R, A, T, D]; key, value: [R, G, T, D], of R rows with the same tree.

    Returns:
        [R, T, A, D].
    """
    plain = terms.softcap is None and terms.sinks is None and query.shape[-1] == value.shape[-1]
    return _by_node(_sdpa if plain else _by_scores, query, key, value, segments, terms)


def attend_exactly(query: Tensor, key: Tensor, value: Tensor, segments: Segments, terms: Terms) -> Tensor:
    """The same without a fused kernel, from scores in float32 or better. The standard that kernels are compared with."""
    return _by_node(_by_scores, query, key, value, segments, terms)


def _by_node(attend_some: Attend, query: Tensor, key: Tensor, value: Tensor, segments: Segments, terms: Terms) -> Tensor:
    dtype = query.dtype
    whole = query.device.type == "cpu" and dtype == torch.bfloat16
    if whole:  # see WHOLE_BLOCKS
        query, key, value = query.float(), key.float(), value.float()
    blocks = [
        (number, first, min(first + QUERY_BLOCK, node.length))
        for number, node in enumerate(segments.nodes)
        for first in range(0, node.length, QUERY_BLOCK)
    ]
    # Split once: with slices, each node's gradient would be a tensor of all T positions.
    queries = query.split([last - first for _, first, last in blocks], dim=2)
    starts, lengths = [node.start for node in segments.nodes], [node.length for node in segments.nodes]
    keys, values = (dict(zip(starts, tensor.split(lengths, dim=2), strict=True)) for tensor in (key, value))
    outputs = []
    for own, (number, first, last) in zip(queries, blocks, strict=True):
        node = segments.nodes[number]
        pad_queries, pad_keys = (
            (-size % multiple if whole else 0)
            for size, multiple in zip((last - first, node.depth + last), WHOLE_BLOCKS, strict=True)
        )
        mask = _mask(segments, number, first, last, terms.window, pad_queries, pad_keys, query)
        own = F.pad(own, (0, 0, 0, pad_queries)) if pad_queries else own
        out = attend_some(own, _along(keys, node, last, pad_keys), _along(values, node, last, pad_keys), mask, terms)
        outputs.append(out[:, :, : last - first])
    return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype)


def _along(pieces: dict[int, Tensor], node: TreeNode, last: int, pad: int) -> Tensor:
    """Keys or values on the path to a node and in it up to ``last``: [1, G, depth + last + pad, D].

    Args:
        pieces: [1, G, length, D] of each node, by its start.
    """
    seen = [pieces[start] for start, _ in node.path]
    own = pieces[node.start]
    seen.append(own if last == node.length else own.narrow(2, 0, last))
    if pad:
        seen.append(own.new_zeros(*own.shape[:2], pad, own.shape[3]))
    return seen[0] if len(seen) == 1 else torch.cat(seen, dim=2)


def _mask(
    segments: Segments,
    number: int,
    first: int,
    last: int,
    window: int | None,
    pad_queries: int,
    pad_keys: int,
    query: Tensor,
) -> Tensor | None:
    """Mask of queries ``first`` to ``last`` of a node: 0 or minus infinity in the dtype of ``query``, with padding,
    [last - first + pad_queries, depth + last + pad_keys]. None means plain causal."""
    node = segments.nodes[number]
    start, stop = node.depth + first, node.depth + last
    if window is not None and window >= stop:
        window = None
    if start == 0 and window is None and not pad_keys:
        return None
    key = (number, first, window)
    if key not in segments.memo:  # computed once for all layers
        rows = torch.arange(start, stop + pad_queries, device=query.device)
        columns = torch.arange(stop + pad_keys, device=query.device)
        back = rows[:, None] - columns
        hidden = back < 0 if window is None else (back < 0) | (back >= window)
        hidden[last - first :] = False  # a padded query with no key would give NaN, also in the backward pass
        segments.memo[key] = torch.where(hidden, -math.inf, 0.0).to(query.dtype)
    return segments.memo[key]


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, terms: Terms) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.is_cuda and mask is not None:
        # With a mask, CUDA's fused kernels need as many key heads as query heads.
        repeats = query.shape[1] // key.shape[1]
        key, value, grouped = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), False
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=terms.scaling, enable_gqa=grouped
    )


def _by_scores(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, terms: Terms) -> Tensor:
    """Attention in plain torch with scores in float32 or better, for soft caps, sinks and values of another head size."""
    repeats = query.shape[1] // key.shape[1]
    key, values = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(-1, -2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * terms.scaling
    if terms.softcap is not None:
        scores = torch.tanh(scores / terms.softcap) * terms.softcap
    if mask is None:
        mask = torch.full(scores.shape[-2:], -math.inf, device=scores.device).triu(1)
    scores = scores + mask
    if terms.sinks is not None:
        sink = terms.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, sink], -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
    return weights.to(values.dtype) @ values
