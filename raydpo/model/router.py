"""The load-balancing loss of a mixture of experts, which keeps its routers from sending all tokens to few experts.

For each expert: the share of the positions that choose it, times the mean probability that the routers give it, over all
positions and layers together; summed over experts and multiplied by their number (Switch Transformer, arXiv 2101.03961,
eq. 4 to 6, for k experts a token). This is ``load_balancing_loss_func`` of transformers 5, which TRL uses. It is k if all
experts are used alike, and the number of experts if all positions choose the same k.

Shapes: T = positions, E = experts.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raydpo.errors import ConfigError, ModelError
from raydpo.model.ulysses import SequenceGroup

__all__ = ["balance_loss", "chosen_experts", "lacks_router_loss", "router_loss_coef"]

_EXPERTS = ("num_local_experts", "num_experts", "moe_num_experts", "n_routed_experts")


def balance_loss(
    logits: Sequence[Tensor], chosen: int, real_T: Tensor | None = None, group: SequenceGroup | None = None
) -> Tensor:
    """The loss of one micro-batch, float32 [].

    Args:
        logits: router logits of each layer, [T, E] or with more dimensions before the last.
        chosen: k, the experts of a position.
        real_T: which positions are real, bool; None = all. Padding counts for nothing.
        group: ranks that have other positions of the same micro-batch. Each gets the loss of all positions, and the gradient
            of its own: summed over ranks, parameters get the gradient of one loss.
    """
    experts = logits[0].shape[-1]
    counts = logits[0].new_zeros(experts, dtype=torch.float32)
    probabilities = counts
    for layer in logits:
        count, probability = _Routed.apply(layer.reshape(-1, experts), chosen, real_T)
        counts, probabilities = counts + count, probabilities + probability
    if group is not None:
        both = _Summed.apply(torch.stack([counts, probabilities]), group.handle)
        counts, probabilities = both[0].detach(), both[1]
    # Each position of each layer chooses k experts.
    rows = counts.sum() / chosen
    return experts * (counts * probabilities).sum() / rows**2


class _Routed(torch.autograd.Function):
    """How often each expert is chosen and the sum of its probabilities, over the positions of a layer: both [E].

    Keeps only the logits for the backward pass: probabilities in float32 would take twice as much as bfloat16 logits.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, chosen: int, real: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, real)
        probabilities = logits.float().softmax(-1)
        each = probabilities.new_ones(len(logits)) if real is None else real.float()
        summed = probabilities.sum(0) if real is None else (probabilities * each[:, None]).sum(0)
        index = probabilities.topk(chosen, dim=-1).indices.flatten()
        # Whole numbers, so the sum is the same in any order.
        counts = each.new_zeros(logits.shape[-1]).index_add_(0, index, each.repeat_interleave(chosen))
        ctx.mark_non_differentiable(counts)
        return counts, summed

    @staticmethod
    def backward(ctx: Any, _: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, real = ctx.saved_tensors
        probabilities = logits.float().softmax(-1)
        slope = probabilities * (grad - (probabilities * grad).sum(-1, keepdim=True))
        if real is not None:
            slope = slope * real[:, None]
        return slope.to(logits.dtype), None, None


class _Summed(torch.autograd.Function):
    """The sum over a group's ranks; the gradient is that of this rank's part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, handle: Any) -> Tensor:
        whole = part.clone()
        dist.all_reduce(whole, group=handle)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def chosen_experts(causal_lm: nn.Module, logits: Sequence[Tensor]) -> int:
    """The number of experts that a position chooses.

    Args:
        causal_lm: a transformers causal LM.
        logits: what it returned as router logits.

    Raises:
        ModelError: if it returned none.
    """
    if not logits:
        raise ModelError(
            f"{type(causal_lm).__name__} returned no router logits, so it has no router loss; set "
            "train.router_aux_loss_coef to 0"
        )
    own = getattr(causal_lm, "num_experts_per_tok", None)
    return causal_lm.config.get_text_config().num_experts_per_tok if own is None else own


def router_loss_coef(directory: str, wish: float | None, trust_remote_code: bool = False) -> float:
    """The weight of the router loss in the training of a model, 0 if it trains without.

    Args:
        directory: of the model, with its config.json.
        wish: ``train.router_aux_loss_coef``.

    Raises:
        ConfigError: if ``wish`` is above 0 and the model has no such loss.
    """
    if wish == 0:
        return 0.0
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    lacking = lacks_router_loss(config)
    if lacking is None:
        return float(wish if wish is not None else getattr(config.get_text_config(), "router_aux_loss_coef", None) or 0.0)
    if wish is None:
        return 0.0
    raise ConfigError(
        f"train.router_aux_loss_coef is {wish:g}, but {directory} ({config.model_type}) {lacking}; set it to 0 or null"
    )


def lacks_router_loss(config: Any) -> str | None:
    """Why the model of a transformers configuration has no router loss, to follow its name; None if it has one."""
    text = config.get_text_config()
    if not hasattr(text, "output_router_logits"):
        return "is not a mixture of experts that returns router logits"
    experts = next((count for name in _EXPERTS if (count := getattr(text, name, None)) is not None), None)
    if experts is not None and experts < 2:
        return f"has {experts} experts, so nothing is routed"
    package, _, name = type(text).__module__.rpartition(".")
    try:
        modeling = importlib.import_module(f"{package}.{name.replace('configuration_', 'modeling_')}")
    except ImportError:
        return "runs code of its own, of which raydpo knows no router loss"
    if not hasattr(modeling, "load_balancing_loss_func"):
        return (
            "has no load-balancing loss in transformers: such models balance their experts in other ways, most by a bias of "
            "the router that is updated in pre-training"
        )
    return _OTHERWISE.get(text.model_type)


_OTHERWISE = {"doge": "routes by the keys of two tables, and defines another loss over them, which raydpo does not compute"}
"""Models whose module has a load-balancing loss of another definition."""
