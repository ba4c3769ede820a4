"""Optimizers: torch's AdamW, AdamW with its first moment in bfloat16, and bitsandbytes' AdamW (8 bits, paged)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from raydpo.config import TrainConfig
from raydpo.config.train import ROUNDED_PIECE
from raydpo.errors import ModelError

__all__ = ["RoundedAdamW", "make_optimizer", "no_steps"]


def make_optimizer(trainable: Sequence[Tensor], train: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """Make the optimizer that ``train`` asks for.

    Raises:
        ConfigError: if ``train.optimizer`` does not run on ``device``, or cannot count so many numbers.
        ModelError: if bitsandbytes is missing.
    """
    workers = dist.get_world_size() if dist.is_initialized() else 1
    train.check_numbers([getattr(one, "ds_numel", None) or one.numel() for one in trainable], workers)
    common = {"lr": train.lr, "weight_decay": train.weight_decay, "betas": (0.9, 0.999), "eps": 1e-8}
    if train.optimizer == "adamw":
        if train.optimizer_states == "bfloat16":
            return RoundedAdamW(trainable, **common)
        # DeepSpeed updates one flat tensor of all weights. Without ``fused``, AdamW allocates two more of that size a step.
        return torch.optim.AdamW(trainable, fused=True, **common)
    train.check_device(device.type)
    try:
        import bitsandbytes.optim as theirs
    except ImportError as error:
        raise ModelError(
            f"train.optimizer {train.optimizer} needs bitsandbytes: {error}; pip install 'raydpo[quantization]'"
        ) from None
    kind = {"adamw_8bit": theirs.AdamW8bit, "paged_adamw": theirs.PagedAdamW, "paged_adamw_8bit": theirs.PagedAdamW8bit}
    return kind[train.optimizer](trainable, **common)


@contextlib.contextmanager
def no_steps(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Make ``optimizer.step`` do nothing within the block.

    DeepSpeed 0.19.8 calls it while it wraps an optimizer, to allocate the moments: ``initialize_optimizer_states`` in
    ``runtime/fp16/unfused_optimizer.py``, for ZeRO 0 in bfloat16. That call decays the weights, and counts as a step:
    the first update is then 0.74 times as long as it should be.
    """
    optimizer.step = lambda *_: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        del optimizer.step


class RoundedAdamW(torch.optim.AdamW):
    """AdamW whose first moment is kept in bfloat16 and computed with in float32.

    The first moment is rounded to nearest, not at random, so that a repeated step gives the same. It moves by 1/10 of its
    distance to the gradient, so rounding, of at most 0.4 %, leaves it within 4 % of its float32 value under a constant
    gradient.

    The second moment stays in float32. In each step it moves by 1/1000 of its distance to the squared gradient, and bfloat16
    would round this change to zero: under a constant gradient, a second moment in bfloat16 stops at a quarter of its value.

    Attributes:
        MOMENTS: precision of each moment.
    """

    MOMENTS: ClassVar = {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.float32}

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        """One step; ``closure`` is not supported."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    for kind, dtype in self.MOMENTS.items():
                        state[kind] = torch.zeros_like(parameter, dtype=dtype)
                state["step"] += 1
                count = float(state["step"])
                tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
                parts = (tensor.view(-1).split(ROUNDED_PIECE) for tensor in tensors)
                for weight, gradient, exp_avg, exp_avg_sq in zip(*parts, strict=True):
                    gradient = gradient.float()
                    first = exp_avg.float().lerp_(gradient, 1 - beta1)
                    exp_avg.copy_(first)
                    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                    scale = (exp_avg_sq / (1 - beta2**count)).sqrt_().add_(group["eps"])
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.addcdiv_(first, scale, value=-group["lr"] / (1 - beta1**count))
