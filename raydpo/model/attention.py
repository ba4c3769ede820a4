"""Attention over the nodes of a prefix tree, as a function of transformers' attention interface.

A node's tokens attend to the path above the node, and causally to the node itself. The layout is passed to the model's
forward as the keyword ``segments``. So no mask of [T, T] is built, and gradient checkpointing, adapters and ZeRO work
unchanged. Four implementations (bodies) give the same numbers: SDPA node by node (``model.by_node``, any device), one
variable-length call with unequal query and key lengths, of torch or flash-attn (``model.varlen``, CUDA), and FlexAttention
with a block mask (``model.flex``, CUDA, for what no variable-length kernel computes).

Shapes: T = positions, A = query heads, G = key heads, D = head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from raydpo.model import by_node, flex, varlen
from raydpo.model.segments import Body, Segments, Terms
from raydpo.model.ulysses import head_shares

__all__ = [
    "ATTENTION",
    "Demand",
    "attend",
    "available_bodies",
    "lacking_kernels",
    "register",
    "watch_callers",
    "watch_demands",
    "why_not",
]

ATTENTION = "raydpo_tree"
"""Name in transformers' attention interface. No mask function is registered under this name, so no mask is built."""


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a layer asks of attention, as far as bodies differ in it.

    Attributes:
        size, value_size: head size of queries and keys, and of values if theirs is another one.
        dtype: in which attention computes.
        heads, key_heads: A and G, of all ranks together.
        scaling, window, softcap: see ``Terms``; without ``scaling`` it is 1 / sqrt(D).
        sinks: whether it has attention sinks.
    """

    size: int
    dtype: torch.dtype
    heads: int = 1
    key_heads: int = 1
    value_size: int | None = None
    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


_watching: ContextVar[set[Demand] | None] = ContextVar("watching", default=None)


@contextlib.contextmanager
def watch_demands() -> Iterator[set[Demand]]:
    """Context that collects what the layers ask that compute attention in it."""
    found: set[Demand] = set()
    token = _watching.set(found)
    try:
        yield found
    finally:
        _watching.reset(token)


_called: ContextVar[set[nn.Module] | None] = ContextVar("called", default=None)


@contextlib.contextmanager
def watch_callers() -> Iterator[set[nn.Module]]:
    """Context that collects the modules that compute attention in it."""
    found: set[nn.Module] = set()
    token = _called.set(found)
    try:
        yield found
    finally:
        _called.reset(token)


def why_not(body: Body, demand: Demand) -> str | None:
    """Why ``body`` cannot compute what a layer asks on a CUDA device; None if it can."""
    if body in ("sdpa", "flex"):
        return None
    kernel = _variable_length(body)
    return _unfit(body, demand) or (kernel if isinstance(kernel, str) else None)


def lacking_kernels(demands: Collection[Demand]) -> list[str]:
    """Why no variable-length kernel is there for a model that one could compute, with the remedies; else nothing."""
    bodies: tuple[Body, ...] = ("varlen", "flash")
    fit = [_variable_length(body) for body in bodies if not any(_unfit(body, demand) for demand in demands)]
    return [kernel for kernel in fit if isinstance(kernel, str)] if all(isinstance(kernel, str) for kernel in fit) else []


def _variable_length(body: Body) -> varlen.Kernel | str:
    return varlen.flash_kernel() if body == "flash" else varlen.torch_kernel()


def _unfit(body: Body, demand: Demand) -> str | None:
    """Why the kernel of a variable-length body cannot compute what a layer asks, on any machine; None if it can."""
    if demand.dtype not in (torch.bfloat16, torch.float16):
        return f"attention computes in {str(demand.dtype).removeprefix('torch.')}, the kernel only in bfloat16"
    if demand.value_size is not None:
        return f"queries have head size {demand.size} and values {demand.value_size}"
    if demand.size > 256 or demand.size % 8:
        return f"head size {demand.size} is not a multiple of 8 up to 256"
    if demand.sinks:
        return "the kernel has no attention sinks"
    if demand.softcap is not None and body == "varlen":
        return "torch's kernel has no soft cap"
    return None


def available_bodies(device: torch.device, demands: Collection[Demand]) -> tuple[Body, ...]:
    """Bodies that can compute what all layers ask on ``device``, the fastest first. The self-check decides."""
    if device.type != "cuda":
        return ("sdpa",)
    bodies: tuple[Body, ...] = ("flash", "varlen", "flex", "sdpa")
    return tuple(body for body in bodies if not any(why_not(body, demand) for demand in demands))


def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments, terms: Terms) -> Tensor:
    """Attention of each token to its path and itself, by the body of ``segments``.

    A variable-length body leaves a layer that it cannot compute to the body ``sdpa``.

    Args:
        query: [1, A, T, D]; key, value: [1, G, T, D]. The body ``sdpa`` also takes several rows of the same tree.

    Returns:
        [1, T, A, D].
    """
    if segments.body == "flex":
        return flex.attend(query, key, value, segments, terms)
    unknown = terms.sinks is not None or query.shape[-1] != value.shape[-1]
    if segments.body == "sdpa" or unknown or (segments.body == "varlen" and terms.softcap is not None):
        return by_node.attend(query, key, value, segments, terms)
    return varlen.attend(query, key, value, segments, terms)


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
    if (callers := _called.get()) is not None:
        callers.add(module)
    if segments is None:
        raise ValueError(f"{type(module).__name__} was called without the layout of the prefix tree")
    if attention_mask is not None or dropout:
        raise ValueError(f"{type(module).__name__} uses a mask or dropout of its own")
    terms = Terms(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling, window=sliding_window, softcap=softcap, sinks=s_aux
    )
    # Rotary embeddings in float32 return float32 queries and keys.
    dtype = value.dtype
    if value.is_cuda and torch.is_autocast_enabled("cuda"):
        # A norm of values may return float32, for which there is no variable-length kernel.
        dtype = torch.get_autocast_dtype("cuda")
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    _watch(query, key, value, terms)
    group = segments.group
    if group is None:
        return attend(query, key, value, segments, terms), None
    query_heads, key_heads = query.shape[1], key.shape[1]
    query, key, value = group.to_heads(query, key, value, segments.positions)
    if s_aux is not None:
        mine = head_shares(query_heads, key_heads, group.size)[group.rank].queries
        terms = replace(terms, sinks=s_aux[mine.start : mine.stop])
    return group.to_positions(attend(query, key, value, segments, terms), query_heads, key_heads), None


def _watch(query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> None:
    found = _watching.get()
    if found is not None:
        found.add(
            Demand(
                heads=query.shape[1],
                key_heads=key.shape[1],
                size=query.shape[3],
                value_size=None if value.shape[3] == query.shape[3] else value.shape[3],
                dtype=value.dtype,
                scaling=terms.scaling,
                window=terms.window,
                softcap=terms.softcap,
                sinks=terms.sinks is not None,
            )
        )
