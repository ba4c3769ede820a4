"""Block 10: fused functions of the layers against the plain model, in log-probs, time and memory."""

from __future__ import annotations

import gc
import time
from functools import partial

import numpy as np
import torch

from raydpo.gpu.figures import Findings, Skip
from raydpo.gpu.timing import seconds, wait
from raydpo.gpu.world import World
from raydpo.model.budget import reset_peak_memory, used_memory
from raydpo.model.fused import find_parts, switch
from raydpo.model.layout import Layout, Method, PromptGroup
from raydpo.model.logps import LogpModel

__all__ = ["fusing"]


def fusing(world: World, found: Findings) -> None:
    """Compare log-probs, then time scoring and training passes with and without fused functions."""
    shape = world.shape
    model = LogpModel(world.model(shape.layers[1]))
    model.use(Method("tree", world.bodies()[0]))
    parts = find_parts(model)
    if not parts:
        raise Skip(f"nothing can be fused in {type(model.causal_lm).__name__}")
    groups, trained = world.pairs_of(shape.passes[1]), world.pairs_of(shape.planned)
    layout, layout_trained = (model.lay_out(each).to(world.device) for each in (groups, trained))
    gap, first = _gap(world, model, parts, groups)
    found.at_most("mean_gap", gap, world.limits.fused, "fused against plain, mean gap", "nats a token")
    found.value("compile_s", first, "first fused pass, with its compilation", "s")
    for name, run in (("scoring", partial(_score, model, layout)), ("training", partial(_train, model, layout_trained))):
        times, peaks = [], []
        for on in (False, True):
            switch(model, parts, on)
            model.train(name == "training")
            times.append(seconds(run, world.device, repeats=3, warm_ups=2))
            reset_peak_memory(world.device)
            before = used_memory(world.device)
            run()
            peaks.append(used_memory(world.device) - before)
            gc.collect()
        says = f"{name}, {shape.layers[1]} layers"
        for kind, each in zip(("plain", "fused"), times, strict=True):
            found.value(f"{name}.{kind}_ms", 1000 * each, f"{says}, {kind}", "ms")
        gain = times[0] / times[1] - 1
        if name == "scoring":
            found.goal(f"{name}.gain", gain, world.limits.fused_gain, f"{says}: gain of speed")
        else:
            found.value(f"{name}.gain", gain, f"{says}: gain of speed")
        found.value(f"{name}.memory", peaks[1] / max(peaks[0], 1.0), f"{says}: peak memory, fused through plain")
    switch(model, parts, on=False)


def _gap(world: World, model: LogpModel, parts: object, groups: list[PromptGroup]) -> tuple[float, float]:
    """Mean gap of the log-probs of ``groups``, nats a token, and seconds of the first fused pass."""
    scored = []
    for on in (False, True):
        switch(model, parts, on)
        wait(world.device)
        start = time.perf_counter()
        scored.append(np.concatenate([one for group in model.score(groups, world.device) for one in group]))
        first = time.perf_counter() - start
    return float(np.abs(scored[1] - scored[0]).mean()), first


@torch.no_grad()
def _score(model: LogpModel, layout: Layout) -> None:
    model(layout)


def _train(model: LogpModel, layout: Layout) -> None:
    model(layout).sum().backward()
    for parameter in model.parameters():
        parameter.grad = None
