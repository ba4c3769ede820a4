"""Forward and backward pass of a LoRA layer without temporary tensors.

``base(x) + B(A(x)) * scaling``, written as modules, makes two extra tensors of the size of its output, and two more in the
backward pass. That takes a seventh of a training step on a CPU, and extra kernels on a GPU. Here the matrix product itself
adds the low-rank part (``addmm``).

Shapes: T = positions, I, O = input and output size of the layer, r = rank.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["fuse_adapters"]


def fuse_adapters(model: nn.Module) -> nn.Module:
    """Compute each plain LoRA layer of a PEFT model as one function. Other layers stay PEFT's. Returns ``model``."""
    if "peft" not in sys.modules:
        return model  # it has no adapter
    plain, of_parameters, fused, fused_of_parameters = _lora_layers()
    for module in model.modules():
        if type(getattr(module, "base_layer", None)) is not nn.Linear:
            continue
        if type(module) is plain:
            module.__class__ = fused
        elif type(module) is of_parameters and module.parameter_name == "weight":
            module.__class__ = fused_of_parameters
    return model


@functools.cache
def _lora_layers() -> tuple[type[nn.Module], ...]:
    """PEFT's layers and the fused ones. Defined on first use, since importing PEFT takes seconds in every process."""
    from peft.tuners.lora.layer import Linear, ParamWrapper

    class FusedLoraLinear(_Fused, Linear):
        """PEFT's layer with another ``forward``; names and state stay the same."""

    class FusedParamWrapper(_Fused, ParamWrapper):
        """The same for PEFT's layer on the weight of a linear layer (see ``model.targets``), where PEFT adds the product of
        the factors to the weight in each pass."""

    return Linear, ParamWrapper, FusedLoraLinear, FusedParamWrapper


class _Fused(nn.Module):
    """Mixin with ``forward`` of a plain LoRA layer."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self._plain_adapter()
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        # Under autocast the stream is float32 and the weights are bfloat16.
        x = x.to(down.dtype)
        out = _LoraProduct.apply(x, self.base_layer.weight, self.base_layer.bias, down, up, self.scaling[name])
        return out.view(*x.shape[:-1], -1)  # outside the function, whose output models may change in place

    def _plain_adapter(self) -> str | None:
        """Name of the one active adapter if the layer is two products and a sum, else None."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        name = self.active_adapters[0]
        if name not in self.lora_A or name in self.lora_variant or self.lora_B[name].bias is not None:
            return None
        base, down = self.base_layer.weight, self.lora_A[name].weight
        dropout = self.lora_dropout[name]
        if isinstance(dropout, nn.Dropout) and dropout.p and self.training:
            return None
        # ZeRO-3 (ds_id) gathers a module's weight around that module's forward, so PEFT must call the modules.
        return None if base.dtype != down.dtype or base.requires_grad or hasattr(base, "ds_id") else name


class _LoraProduct(torch.autograd.Function):
    """x @ weight.T + bias + (x @ down.T) @ up.T * scaling, with a frozen weight; [..., I] -> [T, O]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            low = F.linear(rows, down)  # [T, r]
            out = F.linear(rows, weight, bias).addmm_(low, up.T, alpha=scaling)
        ctx.save_for_backward(rows, low, weight, down, up)
        ctx.scaling, ctx.shape = scaling, x.shape
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, weight, down, up = ctx.saved_tensors
        grad = grad.to(weight.dtype)
        grad_low = (grad @ up).mul_(ctx.scaling)  # [T, r]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_low, down).view(ctx.shape)
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None  # an adapter may train biases
        return grad_x, None, grad_bias, grad_low.T @ rows, (grad.T @ low).mul_(ctx.scaling), None
