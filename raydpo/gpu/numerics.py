"""Block 11: how far bfloat16 is from float32, and what each choice of precision, attention and layout adds to that."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raydpo.data.plan import fill_batches
from raydpo.errors import one_line
from raydpo.gpu.figures import Findings
from raydpo.gpu.world import World
from raydpo.model.fused import find_parts, switch
from raydpo.model.layout import PADDED, Method, PromptGroup, shapes_of
from raydpo.model.logps import LogpModel

__all__ = ["numerics"]

MICRO_BATCHES = 8
"""Micro-batches whose gradients are summed."""


def numerics(world: World, found: Findings) -> None:
    """Compare log-probs in bfloat16 with those of the same weights in float32, then sums of gradients."""
    shape = world.shape
    layers, vocabulary = shape.layers[0], shape.small_vocabulary
    groups = world.pairs_of(shape.passes[1], spread=0.3)
    model = LogpModel(world.model(layers, vocabulary=vocabulary, dtype=torch.bfloat16))
    exact = LogpModel(world.model(layers, vocabulary=vocabulary, dtype=torch.bfloat16).float())
    exact.use(Method("tree", "sdpa"))
    wanted = _logps(world, exact, groups, shape.live)
    del exact
    gc.collect()
    body = world.bodies()[0]
    model.use(Method("tree", body))
    best = _logps(world, model, groups, shape.passes[1])
    gap = np.abs(best - wanted)
    limits, unit = world.limits, "nats a token"
    found.at_most("bfloat16.mean", gap.mean(), limits.bfloat16, f"bfloat16 with {body} against float32, mean", unit)
    found.value("bfloat16.max", gap.max(), f"bfloat16 with {body} against float32, largest", "nats")
    parts = find_parts(model)
    switch(model, parts, on=True)
    fused = np.abs(_logps(world, model, groups, shape.passes[1]) - wanted).mean()
    switch(model, parts, on=False)
    says = "mean gap of fused functions to float32 through that of plain ones"
    found.at_most("fused.ratio", fused / max(gap.mean(), 1e-9), limits.fused_ratio, says)
    small = _logps(world, model, groups, shape.live)
    says = f"passes of {shape.live:,} against {shape.passes[1]:,} positions, mean gap"
    found.at_most("pass_size", np.abs(small - best).mean(), limits.layout, says, unit)
    for other in world.bodies()[1:]:
        model.use(Method("tree", other))
        try:
            apart = np.abs(_logps(world, model, groups, shape.live) - small).mean()
        except RuntimeError as error:
            found.note(f"{other}: {one_line(error, 120)}")
            continue
        found.at_most(f"body.{other}", apart, limits.layout, f"attention by {other} against {body}, mean gap", unit)
    model.use(PADDED)
    apart = np.abs(_logps(world, model, groups, shape.live) - small).mean()
    found.at_most("padded", apart, limits.layout, "padded rows against the prefix tree, mean gap", unit)
    model.use(Method("tree", body))
    model.float32_stream = False
    plain = np.abs(_logps(world, model, groups, shape.passes[1]) - wanted).mean()
    found.value("bfloat16_stream.mean", plain, "the same with a residual stream in bfloat16, mean gap to float32", unit)
    model.float32_stream = True
    rounded = np.abs(_rounded_head(world, model, groups[:4]) - _logps(world, model, groups[:4], shape.passes[1])).mean()
    found.value("bfloat16_logits.mean", rounded, "logits rounded to bfloat16 against float32 logits, mean gap", unit)
    _sums_of_gradients(world, model, found)


@torch.no_grad()
def _logps(world: World, model: LogpModel, groups: Sequence[PromptGroup], positions: int) -> np.ndarray:
    """Log-probs of all tokens in order, float32 [tokens]."""
    scored: list[tuple[np.ndarray, ...]] = [()] * len(groups)
    for batch in fill_batches(range(len(groups)), shapes_of(groups), positions, model.method.layout):
        for index, logps in zip(batch, model.score([groups[index] for index in batch], world.device), strict=True):
            scored[index] = logps
    return np.concatenate([one for group in scored for one in group])


@torch.no_grad()
def _rounded_head(world: World, model: LogpModel, groups: Sequence[PromptGroup]) -> np.ndarray:
    """Log-probs with logits in bfloat16, as a plain linear layer returns them."""
    layout = model.lay_out(groups).to(world.device)
    weight = model.causal_lm.get_output_embeddings().weight
    logits = model.hidden(layout).to(weight.dtype) @ weight.T
    return logits.float().log_softmax(-1).gather(1, layout.targets[:, None])[:, 0].cpu().numpy()


def _sums_of_gradients(world: World, model: LogpModel, found: Findings) -> None:
    """Gradients of micro-batches summed in bfloat16, as autograd does, against their sum in float32."""
    groups = world.pairs(MICRO_BATCHES, seed=5)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    exact = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    rounded = [torch.zeros_like(parameter) for parameter in parameters]
    for group in groups:
        model(model.lay_out([group]).to(world.device)).sum().backward()
        for parameter, whole, sum_ in zip(parameters, exact, rounded, strict=True):
            if parameter.grad is not None:
                whole += parameter.grad.float()
                sum_ += parameter.grad
                parameter.grad = None
    product, norm, other = _dot(exact, rounded), _dot(exact, exact) ** 0.5, _dot(rounded, rounded) ** 0.5
    says = f"gradients of {MICRO_BATCHES} micro-batches summed in bfloat16 against float32"
    found.at_least("gradients.cosine", product / (norm * other), world.limits.cosine, f"{says}: cosine")
    found.value("gradients.norm", other / norm, f"{says}: ratio of the norms")


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return sum(float((one.double() * other.double()).sum()) for one, other in zip(left, right, strict=True))
