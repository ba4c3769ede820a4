"""Attention over the nodes of a prefix tree, as a function of transformers' attention interface.

A node's tokens attend to the path above the node, and causally to the node itself. The layout is passed to the model's
forward as the keyword ``segments``. So no mask of [T, T] is built, and gradient checkpointing, adapters and ZeRO work
unchanged. Three implementations (bodies) give the same numbers: SDPA node by node (any device), one variable-length call
with unequal query and key lengths (CUDA), and FlexAttention with a block mask (CUDA, where no variable-length kernel fits).

Shapes: T = positions, A = query heads, G = key heads, D = head size, K = sum over nodes of depth + length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydpo.model.tree import PrefixTree, TreeNode
from raydpo.model.ulysses import SequenceGroup, head_shares

__all__ = ["ATTENTION", "Body", "Segments", "available_bodies", "register"]

ATTENTION = "raydpo_tree"
"""Name in transformers' attention interface. No mask function is registered under this name, so no mask is built."""
QUERY_BLOCK = 512
"""Most queries of one SDPA call. It bounds the rows of the mask, and blocks of a long node skip the keys after them."""
WHOLE_BLOCKS = 32, 512
"""Multiples to which queries and keys are padded when a CPU computes a bfloat16 model. Attention is float32 there, since its
kernels are faster. They sum over blocks of 512 keys, and in another order for a smaller block. Then a few results round to
bfloat16 differently, and after 30 layers most log-probs differ, by 0.02 nats on average. With whole blocks a token's
log-prob is the same bit for bit in every layout; scoring takes 1.3 times as long."""

Body = Literal["sdpa", "varlen", "flash", "flex"]
"""Implementation of attention over a tree."""


@dataclass(frozen=True)
class Segments:
    """The prefix tree in the form that attention needs.

    Attributes:
        nodes: nodes of the tree, in order of their start.
        body: implementation to use.
        index: [K], positions of the keys of each node, its path first. Only for variable-length bodies.
        query_ends, key_ends: int32 [nodes + 1], cumulative lengths. Only for variable-length bodies.
        node_of, subtree_end, depths: [T] the node of each position, [nodes] the first node after each node's subtree, [T]
            the depth of each position. Only for FlexAttention.
        group: ranks that share the positions, or None.
        memo: masks that all layers share.
    """

    nodes: tuple[TreeNode, ...]
    body: Body
    index: Tensor | None = None
    query_ends: Tensor | None = None
    key_ends: Tensor | None = None
    node_of: Tensor | None = None
    subtree_end: Tensor | None = None
    depths: Tensor | None = None
    group: SequenceGroup | None = None
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, tree: PrefixTree, body: Body) -> Segments:
        nodes = tree.nodes
        if body == "sdpa":
            return cls(nodes, body)
        if body == "flex":
            # Nodes are in depth-first order, so a subtree is a run of nodes that have its first node on their path.
            ends = np.empty(len(nodes), dtype=np.int64)
            open_nodes: list[int] = []
            for number, node in enumerate(nodes):
                while open_nodes and (nodes[open_nodes[-1]].start, nodes[open_nodes[-1]].length) not in node.path:
                    ends[open_nodes.pop()] = number
                open_nodes.append(number)
            ends[open_nodes] = len(nodes)
            node_of = np.repeat(np.arange(len(nodes)), [node.length for node in nodes])
            return cls(
                nodes,
                body,
                node_of=torch.from_numpy(node_of),
                subtree_end=torch.from_numpy(ends),
                depths=torch.from_numpy(tree.depths),
            )
        index = np.concatenate([np.arange(start, start + length) for node in nodes for start, length in node.with_path])
        return cls(
            nodes,
            body,
            index=torch.from_numpy(index),
            query_ends=_ends([node.length for node in nodes]),
            key_ends=_ends([node.depth + node.length for node in nodes]),
        )

    def to(self, device: torch.device) -> Segments:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Segments:
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Segments:
        changed = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **changed, memo={})

    @property
    def positions(self) -> int:
        """T."""
        return self.nodes[-1].start + self.nodes[-1].length

    @property
    def longest_query(self) -> int:
        return max(node.length for node in self.nodes)

    @property
    def longest_key(self) -> int:
        return max(node.depth + node.length for node in self.nodes)


def available_bodies(device: torch.device, dtype: torch.dtype, head_size: int) -> tuple[Body, ...]:
    """Bodies that can run on ``device``, the fastest first. The self-check (``model.selfcheck``) decides."""
    if device.type != "cuda":
        return ("sdpa",)
    bodies: list[Body] = []
    if dtype in (torch.bfloat16, torch.float16) and head_size <= 256:
        if _flash_varlen() is not None:
            bodies.append("flash")
        if _torch_varlen() is not None:
            bodies.append("varlen")
    return (*bodies, "flex", "sdpa")


def register() -> None:
    """Register ``ATTENTION`` with transformers. Safe to call repeatedly."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, tree_attention)


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention function that transformers calls in each layer.

    Args:
        query: [1, A, T, D]; key, value: [1, G, T, D]. If a group of ranks shares the positions, T is this rank's part. The
            body ``sdpa`` also takes several rows of the same tree in place of 1.
        segments: the layout, as passed to the model's forward.
        sliding_window: tokens that a token sees along its path, itself included.
        softcap: bound of the scores (Gemma 2). s_aux: attention sinks [A] (gpt-oss).

    Returns:
        [1, T, A, D], and None in place of attention weights.

    Raises:
        ValueError: if the architecture does not pass the layout on, or uses a mask or dropout.
    """
    if segments is None:
        raise ValueError(f"{type(module).__name__} was called without the layout of the prefix tree")
    if attention_mask is not None or dropout:
        raise ValueError(f"{type(module).__name__} uses a mask or dropout of its own")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Rotary embeddings in float32 return float32 queries and keys.
    query, key = query.to(value.dtype), key.to(value.dtype)
    group = segments.group
    if group is not None:
        query_heads, key_heads = query.shape[1], key.shape[1]
        query, key, value = group.to_heads(query, key, value, segments.positions)
        if s_aux is not None:
            mine = head_shares(query_heads, key_heads, group.size)[group.rank].queries
            s_aux = s_aux[mine.start : mine.stop]
    body = segments.body
    if s_aux is not None or (softcap is not None and body in ("varlen", "sdpa")) or query.shape[-1] != value.shape[-1]:
        attend = partial(_scores_attention, scaling=scaling, softcap=softcap, sinks=s_aux)
        out = _by_node(attend, query, key, value, segments, sliding_window)
    elif body == "sdpa":
        out = _by_node(partial(_sdpa, scaling=scaling), query, key, value, segments, sliding_window)
    elif body == "flex":
        out = _flex(query, key, value, segments, scaling, sliding_window, softcap)
    else:
        out = _varlen(query, key, value, segments, scaling, sliding_window, softcap)
    return (out if group is None else group.to_positions(out, query_heads, key_heads)), None


def _by_node(attend: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, window: int | None) -> Tensor:
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
        mask = _mask(segments, number, first, last, window, pad_queries, pad_keys, query)
        own = F.pad(own, (0, 0, 0, pad_queries)) if pad_queries else own
        out = attend(own, _along(keys, node, last, pad_keys), _along(values, node, last, pad_keys), mask)
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


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.is_cuda and mask is not None:
        # With a mask, CUDA's fused kernels need as many key heads as query heads.
        repeats = query.shape[1] // key.shape[1]
        key, value, grouped = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), False
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )


def _scores_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention in plain torch with float32 scores, for soft caps, sinks and values of another head size."""
    repeats = query.shape[1] // key.shape[1]
    key, values = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.transpose(-1, -2)).float() * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.full(scores.shape[-2:], -math.inf, device=scores.device).triu(1)
    scores = scores + mask
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, sink], -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
    return weights.to(values.dtype) @ values


class _Gather(torch.autograd.Function):
    """rows[index]. The gradients of a shared prefix, one per branch, are summed in float32."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.like = rows.shape, rows.dtype
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        shape, dtype = ctx.like
        total = torch.zeros(shape, dtype=torch.float32, device=grad.device)
        return total.index_add_(0, index, grad.float()).to(dtype), None


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """All nodes in one call. The kernels align the causal mask to the last key, so queries see the whole path."""
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    keys, values = (_Gather.apply(tensor, segments.index) for tensor in rows[1:])
    ends = segments.query_ends, segments.key_ends, segments.longest_query, segments.longest_key
    arguments = rows[0].contiguous(), keys, values, *ends
    around = (-1 if window is None else window - 1, 0)
    if segments.body == "flash":
        capped = {} if softcap is None else {"softcap": softcap}
        return _flash_varlen()(*arguments, softmax_scale=scaling, causal=True, window_size=around, **capped)[None]
    grouped = query.shape[1] != key.shape[1]
    return _torch_varlen()(*arguments, scale=scaling, window_size=around, enable_gqa=grouped)[None]


def _flex(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask

    node_of, subtree_end, depths = segments.node_of, segments.subtree_end, segments.depths

    def visible(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        above = (node_of[k] <= node_of[q]) & (node_of[q] < subtree_end[node_of[k]]) & (depths[k] <= depths[q])
        return above if window is None else above & (depths[q] - depths[k] < window)

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return torch.tanh(score / softcap) * softcap

    if window not in segments.memo:
        positions = query.shape[2]
        segments.memo[window] = create_block_mask(visible, None, None, positions, positions, device=query.device)
    options = {"scale": scaling, "score_mod": None if softcap is None else capped}
    grouped = query.shape[1] != key.shape[1]
    out = _compiled_flex()(query, key, value, block_mask=segments.memo[window], enable_gqa=grouped, **options)
    return out.transpose(1, 2)


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # Uncompiled it builds scores of [T, T]; with static shapes it would compile for every micro-batch.
    return torch.compile(flex_attention, dynamic=True)


@cache
def _flash_varlen() -> Any:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


@cache
def _torch_varlen() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def _ends(lengths: list[int]) -> Tensor:
    return torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32)
