"""Comparison of the bodies of attention with its definition, on random numbers, in values and gradients.

The self-check compares log-probs of the whole model, and training is compared with what the same kernels have scored. So a
kernel that is a little wrong in every layer, or only in its gradient, would pass both. Here each body stands alone.

Shapes: T = positions, A = query heads, G = key heads, D = head size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from raydpo.errors import one_line
from raydpo.model import by_node
from raydpo.model.attention import Demand, attend
from raydpo.model.budget import is_out_of_memory
from raydpo.model.segments import Body, Segments, Terms
from raydpo.model.tree import PrefixTree

__all__ = ["LIMITS", "check_tree", "errors", "inputs", "run", "why_wrong"]

LIMITS = {torch.bfloat16: 0.01, torch.float16: 0.01, torch.float32: 1e-3}
"""Largest norm of the difference from the definition, relative to the definition's norm, by precision. A bfloat16 number is
rounded by up to 0.004 of itself, which leaves about 0.003 of the norm; a kernel rounds weights and results. Products of
float32 numbers may be TF32."""
CHECK_WINDOW = 40
"""Most tokens that a sliding window holds here, so that it is shorter than the paths."""
CHECK_SOFTCAP = 2.0
"""Largest bound of the scores here, so that scores reach it."""
SPREAD = 1.5
"""Standard deviation of the scores."""


def check_tree() -> PrefixTree:
    """A tree of 816 positions with two roots and three levels, whose nodes have 1 to 200 tokens and end inside of blocks."""
    rng = np.random.default_rng(0)

    def tokens(size: int) -> np.ndarray:
        return rng.integers(0, 1 << 20, size)

    system, alone = tokens(150), tokens(5)
    prompts = [np.concatenate([system, tokens(size)]) for size in (90, 40)] + [alone]
    sizes = [(1, 200), (17, 130, 9), (12, 162)]
    completions = [(prompt, size) for prompt, of_prompt in zip(prompts, sizes, strict=True) for size in of_prompt]
    return PrefixTree.build([np.concatenate([prompt, tokens(size)]) for prompt, size in completions], min_saved=1)


def run(
    body: Body,
    tree: PrefixTree,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scaling: float | None = None,
    exact: bool = False,
) -> Tensor:
    """Attention of one body over a tree, with gradient.

    Args:
        query: [1, A, T, D]; key, value: [1, G, T, D], on the device to compute on.
        window, softcap, sinks, scaling: see ``model.segments.Terms``; without ``scaling`` it is 1 / sqrt(D).
        exact: compute the definition in place of ``body``, without a fused kernel, in the dtype of the tensors.

    Returns:
        [1, T, A, D].
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    terms = Terms(scaling=scaling, window=window, softcap=softcap, sinks=sinks)
    segments = Segments.of(tree, "sdpa" if exact else body).to(query.device)
    return (by_node.attend_exactly if exact else attend)(query, key, value, segments, terms)


def inputs(demand: Demand, positions: int, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Random ``query``, ``key`` and ``value`` as ``run`` takes them, and ``sinks`` if the layer has them."""
    generator = torch.Generator().manual_seed(seed)
    scaling = demand.size**-0.5 if demand.scaling is None else demand.scaling
    spread, value_size = SPREAD / (scaling * demand.size**0.5), demand.value_size or demand.size
    shapes = {
        "query": (1, demand.heads, positions, demand.size),
        "key": (1, demand.key_heads, positions, demand.size),
        "value": (1, demand.key_heads, positions, value_size),
    } | ({"sinks": (demand.heads,)} if demand.sinks else {})
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    drawn["query"] *= spread
    return {name: tensor.to(device, demand.dtype) for name, tensor in drawn.items()}


@torch.enable_grad()
def errors(body: Body, demand: Demand, device: torch.device, tree: PrefixTree | None = None) -> dict[str, float]:
    """How far a body is from the definition in float32, for a layer like ``demand``, on random numbers.

    Args:
        tree: the tree to compute on; without it ``check_tree()``.

    Returns:
        For ``values``, ``gradient of query``, ``gradient of key``, ``gradient of value``, and ``gradient of sinks`` if there
        are: the norm of the difference, relative to the norm of the definition. NaN if the body gives NaN.
    """
    tree = check_tree() if tree is None else tree
    drawn = inputs(demand, len(tree.token_ids), device)
    asked = {"window": demand.window, "softcap": demand.softcap, "scaling": demand.scaling}
    shape = 1, len(tree.token_ids), demand.heads, demand.value_size or demand.size
    slope = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, demand.dtype)
    results = []
    for exact in (False, True):
        leaves = {name: (one.float() if exact else one).detach().requires_grad_() for name, one in drawn.items()}
        with torch.autocast(device.type, enabled=False):
            out = run(body, tree, **leaves, **asked, exact=exact)
            gradients = torch.autograd.grad(out, list(leaves.values()), slope.to(out.dtype))
        results.append([out.detach(), *gradients])
    names = ["values", *(f"gradient of {name}" for name in drawn)]
    return {name: float((a.float() - b).norm() / b.norm()) for name, a, b in zip(names, *results, strict=True)}


def why_wrong(body: Body, demands: Iterable[Demand], device: torch.device) -> str | None:
    """Where a body is further from the definition than ``LIMITS`` for one of the layers, or fails; None if it is right.

    Windows and soft caps are narrowed, so that they have an effect on the small tree.
    """
    narrowed = {
        replace(
            demand,
            window=None if demand.window is None else min(demand.window, CHECK_WINDOW),
            softcap=None if demand.softcap is None else min(demand.softcap, CHECK_SOFTCAP),
        )
        for demand in demands
    }
    for demand in sorted(narrowed, key=repr):
        try:
            found = errors(body, demand, device)
        except Exception as error:  # a kernel fails in any way on what it does not support
            if is_out_of_memory(error):
                raise
            return f"{type(error).__name__}: {one_line(error, 160)}"
        limit = LIMITS[demand.dtype]
        for name, gap in found.items():
            if not gap <= limit:
                terms = [f"{demand.heads} query and {demand.key_heads} key heads of size {demand.size}"]
                terms += [f"window {demand.window}"] if demand.window is not None else []
                terms += [f"soft cap {demand.softcap:g}"] if demand.softcap is not None else []
                terms += ["sinks"] if demand.sinks else []
                return f"{name} off by {gap:.2g} of the norm (limit {limit:g}) with {', '.join(terms)}"
    return None
