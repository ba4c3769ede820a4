"""What attention over a prefix tree needs besides queries, keys and values: the tree, and a layer's own terms.

Shapes: T = positions, A = query heads, K = sum over nodes of depth + length, P = positions rounded up for FlexAttention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from raydpo.model.tree import PrefixTree, TreeNode
from raydpo.model.ulysses import SequenceGroup

__all__ = ["BLOCK", "Body", "Segments", "Terms"]

Body = Literal["sdpa", "varlen", "flash", "flex"]
"""Implementation of attention over a tree."""
BLOCK = 128
"""Queries and keys of one block of FlexAttention's mask; the default of its kernels (torch 2.11 to 2.13)."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """How a layer attends, besides its queries, keys and values.

    Attributes:
        scaling: factor on the scores.
        window: tokens that a token sees along its path, itself included; None = all.
        softcap: bound c of the scores: tanh(score / c) * c (Gemma 2, arXiv 2408.00118).
        sinks: [A], a score of each head for attending to nothing (gpt-oss), or None.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True)
class Segments:
    """The prefix tree in the form that attention needs.

    Attributes:
        nodes: nodes of the tree, in order of their start.
        body: implementation to use.
        index: [K], positions of the keys of each node, its path first. Only for variable-length bodies.
        query_ends, key_ends: int32 [nodes + 1], cumulative lengths. Only for variable-length bodies.
        ends, depths: int32 [P]. For each position, the first position after the subtree of its node, and its depth; 0 in the
            padding. Only for FlexAttention.
        group: ranks that share the positions, or None.
        memo: masks that all layers share.
    """

    nodes: tuple[TreeNode, ...]
    body: Body
    index: Tensor | None = None
    query_ends: Tensor | None = None
    key_ends: Tensor | None = None
    ends: Tensor | None = None
    depths: Tensor | None = None
    group: SequenceGroup | None = None
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, tree: PrefixTree, body: Body) -> Segments:
        nodes = tree.nodes
        if body == "sdpa":
            return cls(nodes, body)
        if body == "flex":
            ends = np.repeat(_subtree_ends(nodes), [node.length for node in nodes])
            return cls(nodes, body, ends=_padded(ends), depths=_padded(tree.depths))
        index = np.concatenate([np.arange(start, start + length) for node in nodes for start, length in node.with_path])
        return cls(
            nodes,
            body,
            index=torch.from_numpy(index),
            query_ends=_cumulative([node.length for node in nodes]),
            key_ends=_cumulative([node.depth + node.length for node in nodes]),
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


def _subtree_ends(nodes: tuple[TreeNode, ...]) -> np.ndarray:
    """The first position after the subtree of each node, [nodes]. Nodes are in depth-first order, so a subtree is a run."""
    ends = np.empty(len(nodes), dtype=np.int64)
    open_nodes: list[int] = []
    for number, node in enumerate(nodes):
        while open_nodes and (nodes[open_nodes[-1]].start, nodes[open_nodes[-1]].length) not in node.path:
            ends[open_nodes.pop()] = node.start
        open_nodes.append(number)
    ends[open_nodes] = nodes[-1].start + nodes[-1].length
    return ends


def _padded(values: np.ndarray) -> Tensor:
    """int32 [P] with zeros at the end.

    P is a multiple of ``BLOCK``, two blocks at least: so one compiled kernel fits all trees. Another kernel takes fewer than
    128 queries, and a size of 1 is compiled in.
    """
    found = torch.zeros(max(2, -(-len(values) // BLOCK)) * BLOCK, dtype=torch.int32)
    found[: len(values)] = torch.from_numpy(values)
    return found


def _cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32)
