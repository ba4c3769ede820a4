"""Block 1: every body of attention against its definition in float64, in values and gradients, and its speed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raydpo.errors import one_line
from raydpo.gpu.figures import Findings
from raydpo.gpu.timing import seconds
from raydpo.gpu.world import World, amount_of
from raydpo.model.attention import Demand, available_bodies, tree_attention
from raydpo.model.segments import Segments
from raydpo.model.tree import MIN_SAVED, PrefixTree

__all__ = ["definition", "kernels", "run_body", "three_levels"]

KEY_HEADS = 2
LAYOUTS = 20
"""Micro-batches of different shapes with which FlexAttention's recompilations are counted."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes and options of one call. heads: query heads a key head."""

    head_size: int
    heads: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    @property
    def kind(self) -> str:
        """Cases of one kind share a figure."""
        options = {"window": self.window, "softcap": self.softcap, "sinks": self.sinks or None}
        return next((name for name, value in options.items() if value is not None), f"d{self.head_size}")


CASES = [
    *(Case(head_size=size, heads=heads) for size in (64, 128, 256) for heads in (1, 4, 8)),
    Case(head_size=128, heads=4, window=24),
    Case(head_size=128, heads=4, softcap=50.0),
    Case(head_size=128, heads=4, sinks=True),
]
COMPILED_CASES = [case for case in CASES if case.head_size == 128 and case.heads == 4]
"""For FlexAttention, which compiles a kernel for each case, some seconds each."""


def kernels(world: World, found: Findings) -> None:
    """Compare all bodies that can run here, then time them; what is compiled comes last."""
    tree = three_levels()
    cases = CASES if world.cuda else COMPILED_CASES
    errors: dict[tuple[str, Case], float] = {}
    bodies = available_bodies(world.device, [Demand(size=128, dtype=world.dtype)])
    for body in sorted(bodies, key=lambda one: (one == "flex", one != "sdpa")):
        kinds: dict[str, list[tuple[float, float]]] = {}
        for case in COMPILED_CASES if body == "flex" else cases:
            name = f"{body}.{case.kind}"
            try:
                error, what = _worst_error(world, tree, body, case)
            except Exception as refused:
                if isinstance(refused, torch.OutOfMemoryError):
                    raise
                found.fact(f"{name}.runs", False, f"attention by {body}, {case.kind}: {_short(refused)} (1 = runs)")
                continue
            errors[body, case] = error
            most = world.limits.body
            if body != "sdpa" and ("sdpa", case) in errors:
                most = min(most, max(world.limits.body_ratio * errors["sdpa", case], 1e-6))
            kinds.setdefault(case.kind, []).append((error, most))
            if error > most:
                found.note(f"{body}: worst in {what}, {case}")
        for kind, each in kinds.items():
            error, most = max(each, key=lambda pair: pair[0] / pair[1])
            says = f"attention by {body}, {_told(kind)}: largest relative error of values and gradients"
            found.at_most(f"{body}.{kind}.error", error, most, says)
    exact, wrong = _planted(world, tree)
    found.at_least(
        "planted.first_token", _relative(wrong, exact), 0.05, "error that a mask aligned to the first key would show"
    )
    _speed(world, found, bodies)
    if "flex" in bodies:
        _recompilations(world, found)


def three_levels(seed: int = 0) -> PrefixTree:
    """A system prompt, two prompts after it, three completions after each. The first prompt is longer than any window."""
    rng = np.random.default_rng(seed)
    system = rng.integers(0, 50, 33)
    prompts = [np.concatenate([system, rng.integers(0, 50, length)]) for length in (70, 9)]
    return PrefixTree.build(
        [np.concatenate([prompt, rng.integers(0, 50, length)]) for prompt in prompts for length in (1, 17, 64)], MIN_SAVED
    )


def definition(
    tree: PrefixTree,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    aligned_to_first: bool = False,
) -> Tensor:
    """Attention over the tree from its definition, [1, T, A, D] in the precision of ``query``.

    Shapes: query [1, A, T, D]; key, value [1, G, T, D]; sinks [A].

    Args:
        aligned_to_first: compute the fault instead that kernels have whose causal mask begins at the first key.
    """
    sees = torch.zeros(len(tree.token_ids), len(tree.token_ids), dtype=torch.bool)
    for node in tree.nodes:
        along = np.concatenate([np.arange(start, start + length) for start, length in node.with_path])
        for row in range(node.length):
            last = row if aligned_to_first else node.depth + row
            first = 0 if window is None else max(0, last + 1 - window)
            sees[node.start + row, along[first : last + 1]] = True
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~sees.to(scores.device), -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2)


def _tensors(world: World, positions: int, head_size: int, heads: int, key_heads: int = KEY_HEADS) -> list[Tensor]:
    generator = torch.Generator(world.device).manual_seed(0)
    return [
        torch.randn(1, each, positions, head_size, generator=generator, device=world.device).to(world.dtype).requires_grad_()
        for each in (heads * key_heads, key_heads, key_heads)
    ]


def _worst_error(world: World, tree: PrefixTree, body: Any, case: Case) -> tuple[float, str]:
    """Largest relative error of output and gradients, and where it is."""
    tensors = _tensors(world, len(tree.token_ids), case.head_size, case.heads)
    sinks = torch.linspace(-1, 1, tensors[0].shape[1], device=world.device) if case.sinks else None
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    options = {"window": case.window, "softcap": case.softcap, "sinks": sinks}
    wanted = definition(tree, *exact, **options)
    out = run_body(tree, *tensors, body, case, sinks)
    weights = torch.randn(wanted.shape, generator=torch.Generator(world.device).manual_seed(1), device=world.device)
    gradients = torch.autograd.grad((out * weights.to(out.dtype)).sum(), tensors)
    expected = torch.autograd.grad((wanted * weights.to(out.dtype).double()).sum(), exact)
    found = {"values": _relative(out, wanted)}
    found |= {f"d{name}": _relative(ours, theirs) for name, ours, theirs in zip("qkv", gradients, expected, strict=True)}
    worst = max(found, key=lambda name: found[name] if np.isfinite(found[name]) else np.inf)
    return found[worst], worst


def run_body(
    tree: PrefixTree, query: Tensor, key: Tensor, value: Tensor, body: Any, case: Case, sinks: Tensor | None
) -> Tensor:
    """Attention of one body as a layer calls it, [1, T, A, D]; arguments as of ``definition``."""
    out, _ = tree_attention(
        nn.Module(),
        query,
        key,
        value,
        None,
        segments=Segments.of(tree, body).to(query.device),
        sliding_window=case.window,
        softcap=case.softcap,
        s_aux=sinks,
    )
    return out


def _planted(world: World, tree: PrefixTree) -> tuple[Tensor, Tensor]:
    """The definition, and the same with the mask aligned to the first key."""
    tensors = [tensor.detach().double() for tensor in _tensors(world, len(tree.token_ids), 64, 1)]
    return definition(tree, *tensors), definition(tree, *tensors, aligned_to_first=True)


def _speed(world: World, found: Findings, bodies: tuple[Any, ...]) -> None:
    """Operations per second of the forward pass of each body at the shape's second pass of scoring."""
    shape = world.shape
    groups = world.pairs_of(shape.passes[1])
    tree = PrefixTree.build([sequence for group in groups for sequence in group.sequences], MIN_SAVED)
    heads = shape.heads // shape.key_heads
    query, key, value = _tensors(world, len(tree.token_ids), shape.head_size, heads, shape.key_heads)
    flops = 4.0 * shape.heads * shape.head_size * amount_of(groups, "tree")[1]
    peak = world.sheet_peak
    for body in sorted(bodies, key=lambda one: one == "flex"):
        segments = Segments.of(tree, body).to(world.device)
        call = partial(tree_attention, nn.Module(), query, key, value, None, segments=segments)
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
        query, key, value = _tensors(world, len(tree.token_ids), world.shape.head_size, 4)
        with torch.no_grad():
            tree_attention(nn.Module(), query, key, value, None, segments=Segments.of(tree, "flex").to(world.device))
        before = compiled() if before is None else before
    count = compiled() - (before or 0)
    found.at_most(
        "flex.recompiles", count, world.limits.recompiles, f"compilations of flex after the first, {LAYOUTS} layouts"
    )


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def _told(kind: str) -> str:
    return f"head size {kind[1:]}" if kind[1:].isdigit() else kind


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error, 120)}"
