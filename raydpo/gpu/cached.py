"""Block 3: log-probs scored in large passes against those of the training's small ones, for each kind of policy."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from raydpo.config import TrainConfig
from raydpo.data.plan import fill_batches
from raydpo.gpu.environment import VARIABLE_LENGTH
from raydpo.gpu.figures import Findings, Skip
from raydpo.gpu.stepping import LORA, needs
from raydpo.gpu.world import World
from raydpo.losses import Objective, PairLogps
from raydpo.model.layout import Method, PromptGroup, shapes_of
from raydpo.model.load import add_lora, load_causal_lm
from raydpo.model.logps import LogpModel
from raydpo.model.selfcheck import check_training_mode
from raydpo.reference.identity import identify
from raydpo.reference.score import ReferenceSpec, Scorer

__all__ = ["cached_is_live"]

PAIRS = 16
MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"new": True},
    "lora_trained": {"adapter": True},
    "qlora_4bit": {"new": True, "quantization": "4bit"},
    "qlora_8bit": {"new": True, "quantization": "8bit"},
}
"""new: adapters whose output is still zero. adapter: random ones, saved and loaded."""


def cached_is_live(world: World, found: Findings) -> None:
    """Score with the reference's own code, then compute the same pairs as a training does."""
    shape = world.shape
    groups = world.pairs(max(2, min(PAIRS, 2 * shape.passes[1] // sum(shape.pair))), spread=0.3)
    dtype = str(world.dtype).removeprefix("torch.")
    for name, mode in MODES.items():
        try:
            needs(*(["peft"] if mode else []), *(["bitsandbytes"] if "quantization" in mode else []))
        except Skip as why:
            found.note(f"{name} skipped: {why}")
            continue
        adapter = _saved_adapter(world, dtype) if "adapter" in mode else None
        loaded = {"adapter": adapter, "quantization": mode.get("quantization")}
        spec = ReferenceSpec(path=str(world.files), identity=identify(world.files, dtype, **loaded), **loaded)
        scorer = Scorer(spec, device=str(world.device), tokens_per_batch=shape.passes[1])
        cached, method = scorer.score(groups), scorer.model.method
        del scorer
        policy = load_causal_lm(spec.path, dtype, rope_length=None, device=world.device, train_adapter=True, **loaded)
        live = _live(world, add_lora(policy, LORA, 0) if mode.get("new") else policy, groups, method)
        del policy
        gc.collect()
        gaps = np.concatenate(
            [np.subtract(*each) for pair in zip(cached, live, strict=True) for each in zip(*pair, strict=True)]
        )
        mean, most = np.abs(gaps).mean(), np.abs(gaps).max()
        found.at_most(f"{name}.mean_gap", mean, world.limits.gap, f"{name}: mean gap of cached and live", "nats a token")
        found.value(f"{name}.max_gap", most, f"{name}: largest gap", "nats")
        loss, noise = _first_loss(groups, cached, live), _noise(gaps, len(groups))
        says = f"{name}: distance of the first loss from ln 2"
        limit = min(world.limits.loss + 4 * noise, world.limits.most_loss)
        found.at_most(f"{name}.first_loss", abs(loss - math.log(2)), limit, says)
        if world.cuda:
            says = f"{name}: attention has a variable-length body, found {method.body} (1 = yes)"
            found.fact(f"{name}.body", method.body in VARIABLE_LENGTH, says)


def _saved_adapter(world: World, dtype: str) -> str:
    """Directory of an adapter of random weights."""
    model = add_lora(load_causal_lm(world.files, dtype, rope_length=None, device=world.device), LORA, 0)
    generator = torch.Generator(world.device).manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01, generator=generator)
    path = world.folder / "adapter"
    model.save_pretrained(str(path))
    return str(path)


def _live(world: World, policy: torch.nn.Module, groups: list[PromptGroup], method: Method) -> list[tuple[np.ndarray, ...]]:
    """Log-probs of micro-batches in training mode, with the graph that a backward pass would need."""
    model = LogpModel(policy)
    model.use(method)
    check_training_mode(model, world.device)
    batches = fill_batches(range(len(groups)), shapes_of(groups), world.shape.live, model.method.layout)
    scored: list[tuple[np.ndarray, ...]] = [()] * len(groups)
    for batch in batches:
        rows = [groups[index] for index in batch]
        layout = model.lay_out(rows).to(world.device)
        with torch.enable_grad():
            logps = model(layout).detach().cpu().numpy()
        pieces = iter(np.split(logps, np.cumsum(layout.lengths)[:-1]))
        for index, group in zip(batch, rows, strict=True):
            scored[index] = tuple(next(pieces) for _ in group.completions)
    return scored


def _first_loss(
    groups: Sequence[PromptGroup], cached: Sequence[tuple[np.ndarray, ...]], live: Sequence[tuple[np.ndarray, ...]]
) -> float:
    """Mean loss of the default objective, with the cached log-probs as the reference's."""

    def sums(scored: Sequence[tuple[np.ndarray, ...]], side: int) -> torch.Tensor:
        return torch.tensor([float(one[side].sum(dtype=np.float64)) for one in scored], dtype=torch.float64)

    tokens = [torch.tensor([float(len(group.completions[side])) for group in groups]) for side in (0, 1)]
    train = TrainConfig()
    logps = PairLogps(*(sums(scored, side) for scored in (live, cached) for side in (0, 1)), *tokens)
    return float(Objective(train)(logps, train.beta_at(0, 1)).losses.mean())


def _noise(gaps: np.ndarray, pairs: int) -> float:
    """Standard error of the mean loss if the gaps [tokens] are independent: the loss's slope is beta / 2 a nat."""
    of_a_pair = math.sqrt(float(np.square(gaps, dtype=np.float64).mean()) * len(gaps) / pairs)
    return TrainConfig().beta_at(0, 1) / 2 * of_a_pair / math.sqrt(pairs)
