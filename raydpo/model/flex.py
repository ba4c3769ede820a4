"""Attention over a prefix tree with torch's FlexAttention: a compiled kernel that skips blocks in which nothing is visible.

It knows soft caps and sinks, which variable-length kernels lack. The block mask is made from the bounds of the nodes.
torch's ``create_block_mask`` evaluates all T x T positions, 12.9 GB at 65,536 positions.

Shapes: T = positions, P = positions rounded up to whole blocks, Q = P / BLOCK, A = query heads, G = key heads, D = head
size.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raydpo.model.segments import BLOCK, Segments, Terms
from raydpo.model.tree import TreeNode

__all__ = ["attend", "block_mask", "visible_blocks"]

MOST_VARIANTS = 32
"""Most kernels that one process compiles, in place of torch's 8: one for each kind of layer (window, soft cap, sinks, head
sizes), with and without gradient, in the check and in the model, of each model of the process. Layouts add none."""


def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments, terms: Terms) -> Tensor:
    """Attention of each token to its path and itself.

    Sinks take part in the softmax without a value: they scale the result by sigmoid(log-sum-exp of the scores - sink).

    Args:
        query: [1, A, T, D]; key, value: [1, G, T, D].

    Returns:
        [1, T, A, D].
    """
    from torch.nn.attention.flex_attention import AuxRequest

    positions, padding = query.shape[2], len(segments.ends) - query.shape[2]
    if padding:
        query, key, value = (F.pad(tensor, (0, 0, 0, padding)) for tensor in (query, key, value))
    if ("flex", terms.window) not in segments.memo:  # made once for all layers
        segments.memo["flex", terms.window] = block_mask(segments, terms.window)
    options: dict[str, Any] = {"scale": terms.scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    if terms.softcap is not None:
        options["score_mod"] = _capped(torch.full((1,), terms.softcap, device=query.device))
    if terms.sinks is not None:
        options["return_aux"] = AuxRequest(lse=True)
    for tensor in (query, key, value):
        # Heads and their sizes are constants of the kernel: a symbol in their place is no valid Triton code
        # (GQA_SHARED_HEADS, torch/_inductor/kernel/flex/flex_attention.py of 2.13).
        for dimension in (0, 1, 3):
            torch._dynamo.mark_static(tensor, dimension)
    with _settings().sizes, _settings().variants:
        out = _kernel()(query, key, value, block_mask=segments.memo["flex", terms.window], **options)
    if terms.sinks is not None:
        out, aux = out
        out = (out * torch.sigmoid(aux.lse - terms.sinks.float()[:, None])[..., None]).to(value.dtype)
    return out[:, :, :positions].transpose(1, 2)


@cache
def _kernel() -> Any:
    """FlexAttention, compiled for all shapes. Uncompiled it builds scores of [P, P]."""
    return _compiled("inductor")


def _compiled(backend: Any) -> Any:
    """FlexAttention, compiled by torch's ``backend``.

    ``fullgraph`` makes it an error to compile more than ``MOST_VARIANTS``. Otherwise torch warns once and goes on with the
    uncompiled function (torch/_dynamo/convert_frame.py, 2.11 to 2.13).
    """
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, backend=backend, dynamic=True, fullgraph=True)


class _Settings(threading.local):
    """torch's settings while the kernel is called. Each thread has its own, since torch 2.11 cannot enter one twice.

    Attributes:
        sizes: torch does not compile in that two sizes are equal which are so by chance, such as the size of a block and the
            number of blocks at 16,384 positions.
        variants: up to ``MOST_VARIANTS`` are compiled. The scale is a constant of the kernel, too.
    """

    def __init__(self) -> None:
        from torch._dynamo import config
        from torch.fx.experimental import _config

        self.sizes = _config.patch(use_duck_shape=False)
        self.variants = config.patch(recompile_limit=MOST_VARIANTS, specialize_float=True)


@cache
def _settings() -> _Settings:
    return _Settings()


def block_mask(segments: Segments, window: int | None) -> Any:
    """torch's ``BlockMask`` of a tree, on the device of ``segments``.

    Args:
        window: tokens that a token sees along its path, itself included; None = all.
    """
    from torch.nn.attention.flex_attention import BlockMask

    device = segments.ends.device
    partial, full = (_in_order(blocks, device) for blocks in visible_blocks(segments.nodes, window))
    if window is None:
        visible = _on_path(segments.ends)
    else:
        visible = _within(segments.ends, segments.depths, torch.full((1,), window, dtype=torch.int32, device=device))
    lengths = len(segments.ends), len(segments.ends)
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=lengths)


# Functions of torch's mask_mod and score_mod. Between micro-batches only the tensors that they close over differ, so torch
# finds the kernel that it has compiled. A number in place of a tensor [1] would be compiled in.


def _on_path(ends: Tensor) -> Any:
    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < ends[key])

    return visible


def _within(ends: Tensor, depths: Tensor, window: Tensor) -> Any:
    def visible(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < ends[key]) & (depths[query] - depths[key] < window[batch])

    return visible


def _capped(softcap: Tensor) -> Any:
    def capped(score: Tensor, batch: Tensor, _head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return torch.tanh(score / softcap[batch]) * softcap[batch]

    return capped


def visible_blocks(nodes: tuple[TreeNode, ...], window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks of queries see part of which blocks of keys, and which see all of it: two bool arrays [Q, Q].

    Counts visible pairs of a query and a key from the bounds of the nodes, in time of Q x (nodes on a path) + Q x Q.
    """
    positions = nodes[-1].start + nodes[-1].length
    count = max(2, -(-positions // BLOCK))
    # Of each run of keys: the block of the queries, the first key and the end, and how many of the queries see each key.
    found: list[tuple[np.ndarray, ...]] = []
    for node in nodes:
        runs = np.array(node.with_path)  # [nodes on the path, 2]
        depths = np.concatenate([[0], np.cumsum(runs[:, 1])])
        # One row for each block with queries of this node, whose depths are first to last (exclusive).
        block = np.arange(node.start // BLOCK, (node.start + node.length - 1) // BLOCK + 1)[:, None]
        first = node.depth + np.maximum(block * BLOCK - node.start, 0)
        last = node.depth + np.minimum((block + 1) * BLOCK - node.start, node.length)
        # Keys that all of them see, and keys before these that only some see. Of the latter at least one pair counts, which
        # is enough: the block is not full. Keys after the first query are in the block itself, which is never full.
        all_from = np.zeros_like(first) if window is None else np.maximum(last - window, 0)
        some_from = all_from if window is None else np.maximum(first - window + 1, 0)
        for start, stop, seen_by in (
            (all_from, first + 1, last - first),
            (some_from, np.minimum(all_from, first + 1), np.ones_like(first)),
        ):
            begin, end = np.maximum(depths[:-1], start), np.minimum(depths[1:], stop)  # [blocks, nodes on the path]
            where = begin < end
            shift = runs[:, 0] - depths[:-1]
            parts = block, begin + shift, end + shift, seen_by
            found.append(tuple(np.broadcast_to(part, where.shape)[where] for part in parts))
    row, begin, end, weight = (np.concatenate(each) for each in zip(*found, strict=True))
    pairs = np.zeros((count, count), dtype=np.int64)
    first_block, last_block = begin // BLOCK, (end - 1) // BLOCK
    alone = first_block == last_block
    np.add.at(pairs, (row, first_block), weight * (np.where(alone, end, (first_block + 1) * BLOCK) - begin))
    np.add.at(pairs, (row[~alone], last_block[~alone]), (weight * (end - last_block * BLOCK))[~alone])
    # Blocks between are seen whole: add where they begin, take away where they end, and sum along the row.
    changes = np.zeros((count, count + 1), dtype=np.int64)
    np.add.at(changes, (row[~alone], first_block[~alone] + 1), (weight * BLOCK)[~alone])
    np.add.at(changes, (row[~alone], last_block[~alone]), -(weight * BLOCK)[~alone])
    pairs += changes.cumsum(1)[:, :-1]
    full = pairs == BLOCK * BLOCK
    return (pairs > 0) & ~full, full


def _in_order(blocks: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """torch's form of a mask of blocks: int32, how many of each row [1, 1, Q], and which ones first [1, 1, Q, Q]."""
    order = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    number = blocks.sum(1, dtype=np.int32)
    return torch.from_numpy(number)[None, None].to(device), torch.from_numpy(order)[None, None].to(device)
