"""Block 1: every body of attention against its definition, in values and gradients, and its speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydpo.errors import one_line
from raydpo.gpu.figures import Findings
from raydpo.gpu.timing import seconds
from raydpo.gpu.world import World, amount_of
from raydpo.model.attention import Demand, attend, available_bodies, why_not
from raydpo.model.bodycheck import check_tree, errors, inputs, run
from raydpo.model.segments import Body, Segments, Terms
from raydpo.model.tree import MIN_SAVED, PrefixTree, TreeNode

__all__ = ["cases", "definition", "kernels"]

KEY_HEADS = 2
LAYOUTS = 20
"""Micro-batches of different shapes with which FlexAttention's recompilations are counted."""
EXACT = 1e-4
"""Largest relative error of the plain code that bodies are compared with, in float32."""


def _demand(size: int, heads: int, **terms: Any) -> Demand:
    return Demand(size=size, dtype=torch.bfloat16, heads=heads * KEY_HEADS, key_heads=KEY_HEADS, **terms)


CASES: dict[str, list[Demand]] = {
    **{f"d{size}": [_demand(size, heads) for heads in (1, 4, 8)] for size in (64, 128, 256)},
    "window": [_demand(128, 4, window=24)],
    "softcap": [_demand(128, 4, softcap=2.0)],
    "sinks": [_demand(128, 4, sinks=True)],
}
"""What layers ask of attention, by figure: 1, 4 and 8 query heads a key head, and the terms of some architectures."""


def cases(world: World, body: Body) -> dict[str, list[Demand]]:
    """The cases to compare: all of them, or one of a kind for FlexAttention, which compiles a kernel for each, and a CPU."""
    if world.cuda and body != "flex":
        return CASES
    few = {kind: [each for each in CASES[kind] if each.heads == 8] for kind in ("d128", "window", "softcap", "sinks")}
    if world.cuda:
        return few
    return {kind: [replace(each, size=world.shape.head_size) for each in demands] for kind, demands in few.items()}


def kernels(world: World, found: Findings) -> None:
    """Compare all bodies that can run here, then time them; what is compiled comes last."""
    _definition(world, found)
    bodies = available_bodies(world.device, [_demand(128, 4)])
    own: dict[Demand, float] = {}
    for body in sorted(bodies, key=lambda one: (one == "flex", one != "sdpa")):
        for kind, demands in cases(world, body).items():
            fitting = [demand for demand in demands if not world.cuda or why_not(body, demand) is None]
            if not fitting:
                found.note(f"{body}, {kind}: {why_not(body, demands[0])}")
                continue
            try:
                gaps = {demand: errors(body, demand, world.device) for demand in fitting}
            except torch.OutOfMemoryError:
                raise
            except Exception as refused:
                found.fact(f"{body}.{kind}.runs", False, f"attention by {body}, {kind}: {_short(refused)} (1 = runs)")
                continue
            _judge(world, found, body, kind, gaps, own)
    _speed(world, found, bodies)
    if "flex" in bodies:
        _recompilations(world, found)


def _judge(
    world: World, found: Findings, body: Body, kind: str, gaps: dict[Demand, dict[str, float]], own: dict[Demand, float]
) -> None:
    """Add the worst error of the cases of one kind.

    Args:
        gaps: errors of values and gradients by case. own: SDPA's largest by case, which this adds to.
    """
    told = []
    for demand, errors_of in gaps.items():
        worst = max(errors_of, key=lambda name: errors_of[name] if math.isfinite(errors_of[name]) else math.inf)
        most = world.limits.body
        if body == "sdpa":
            own[demand] = errors_of[worst]
        elif demand in own:
            most = min(most, max(world.limits.body_ratio * own[demand], 1e-6))
        error = errors_of[worst]
        told.append((error / most if math.isfinite(error) else math.inf, error, most, worst, demand.heads))
    _, error, most, worst, heads = max(told)
    says = f"attention by {body}, {kind}: largest relative error, in {worst} with {heads // KEY_HEADS} heads a key head"
    found.at_most(f"{body}.{kind}.error", error, most, says)


def definition(
    nodes: Sequence[TreeNode],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Terms,
    *,
    aligned_to_first: bool = False,
) -> Tensor:
    """Attention over a prefix tree from its definition, with one dense mask: [1, T, A, D] in the precision of ``query``.

    Shapes: query [1, A, T, D]; key, value [1, G, T, D].

    Args:
        aligned_to_first: compute the fault instead that kernels have whose causal mask begins at the first key.
    """
    positions = query.shape[2]
    sees = torch.zeros(positions, positions, dtype=torch.bool)
    for node in nodes:
        along = np.concatenate([np.arange(start, start + length) for start, length in node.with_path])
        for row in range(node.length):
            last = row if aligned_to_first else node.depth + row
            first = 0 if terms.window is None else max(0, last + 1 - terms.window)
            sees[node.start + row, along[first : last + 1]] = True
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(-1, -2) * terms.scaling
    if terms.softcap is not None:
        scores = torch.tanh(scores / terms.softcap) * terms.softcap
    scores = scores.masked_fill(~sees.to(scores.device), -torch.inf)
    if terms.sinks is not None:
        column = terms.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1)[..., :positions]
    return (weights @ value).transpose(1, 2)


def _definition(world: World, found: Findings) -> None:
    """Compare the plain code that bodies are compared with with a dense mask in float64, and with a planted fault."""
    tree, worst = check_tree(), 0.0
    for demands in cases(world, "flex").values():
        for demand in demands:
            drawn = inputs(replace(demand, dtype=torch.float32), len(tree.token_ids), world.device)
            plain = run("sdpa", tree, **drawn, window=demand.window, softcap=demand.softcap, exact=True)
            wide = {name: tensor.double() for name, tensor in drawn.items()}
            terms = Terms(
                scaling=demand.size**-0.5, window=demand.window, softcap=demand.softcap, sinks=wide.pop("sinks", None)
            )
            exact = definition(tree.nodes, **wide, terms=terms)
            worst = max(worst, _relative(plain, exact))
            if demand.window is None and demand.softcap is None and not demand.sinks:
                wrong = definition(tree.nodes, **wide, terms=terms, aligned_to_first=True)
                says = "error that a mask aligned to the first key would show"
                found.at_least("planted.first_key", _relative(wrong, exact), 0.05, says)
    says = "plain attention in float32, with which bodies are compared, against float64 and one dense mask"
    found.at_most("definition.error", worst, EXACT, says)


def _speed(world: World, found: Findings, bodies: tuple[Body, ...]) -> None:
    """Operations per second of the forward pass of each body at the shape's second pass of scoring."""
    shape = world.shape
    groups = world.pairs_of(shape.passes[1])
    tree = PrefixTree.build([sequence for group in groups for sequence in group.sequences], MIN_SAVED)
    demand = Demand(size=shape.head_size, dtype=world.dtype, heads=shape.heads, key_heads=shape.key_heads)
    drawn = inputs(demand, len(tree.token_ids), world.device)
    flops = 4.0 * shape.heads * shape.head_size * amount_of(groups, "tree")[1]
    peak = world.sheet_peak
    for body in sorted(bodies, key=lambda one: one == "flex"):
        segments = Segments.of(tree, body).to(world.device)
        call = partial(attend, **drawn, segments=segments, terms=Terms(scaling=shape.head_size**-0.5))
        try:
            with torch.no_grad():
                rate = flops / seconds(call, world.device)
        except Exception as refused:
            found.note(f"speed of {body}: {_short(refused)}")
            continue
        least = None
        if body == "varlen" and peak is not None and world.limits.attention is not None:
            least = world.limits.attention * peak / 1e12
        says = f"attention by {body} at {len(tree.token_ids):,} positions, forward"
        found.at_least(f"{body}.forward_tflops", rate / 1e12, least, says, "TFLOP/s")


def _recompilations(world: World, found: Findings) -> None:
    """How often FlexAttention compiles again over micro-batches of different shapes."""
    from torch._dynamo.utils import counters

    def compiled() -> int:
        return int(counters["stats"]["unique_graphs"])

    before = None
    for number in range(LAYOUTS):
        groups = world.pairs(1 + number % 3, spread=0.5, seed=number)
        tree = PrefixTree.build([sequence for group in groups for sequence in group.sequences], MIN_SAVED)
        drawn = inputs(_demand(world.shape.head_size, 4), len(tree.token_ids), world.device)
        with torch.no_grad():
            run("flex", tree, **drawn)
        before = compiled() if before is None else before
    count = compiled() - (before or 0)
    says = f"compilations of flex after the first, over {LAYOUTS} layouts"
    found.at_most("flex.recompiles", count, world.limits.recompiles, says)


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error, 120)}"
