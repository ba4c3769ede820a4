"""K sets of LoRA adapters on one model: rows of K settings pass through the frozen weights together.

The product with a layer's frozen weight is one over all rows; only the low-rank products are told apart, as a batched
product. All sets lie in one flat tensor [K, P] and their gradients in another, so that each set is a single vector to its
optimizer, its gradient norm and an all-reduce.

Shapes: K = sets in all, A = active ones, T = positions of each, I, O = input and output size of a layer, r = rank,
P = weights of one set.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydpo.errors import ModelError

__all__ = ["AdapterStack", "adapter_weights"]


@dataclass(frozen=True)
class Place:
    """Where a weight lies in the vector of its set."""

    name: str
    offset: int
    shape: torch.Size

    def of(self, vector: Tensor) -> Tensor:
        """The weight in a vector [P], or [K, *shape] of [K, P]."""
        return vector.narrow(-1, self.offset, self.shape.numel()).view(*vector.shape[:-1], *self.shape)


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """The trainable weights of a PEFT model by name, copied."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


class AdapterStack:
    """Takes the place of the adapters in a PEFT model.

    Args:
        model: a PEFT model with plain LoRA adapters; its layers compute with the stack from now on.
        starts: weights of each set by name, see ``adapter_weights``.

    Attributes:
        weights, gradients: float32 [K, P].
        places: of every weight in it.

    Raises:
        ModelError: if something else than plain LoRA would train.
    """

    def __init__(self, model: nn.Module, starts: Sequence[Mapping[str, Tensor]]) -> None:
        layers = _plain_layers(model)
        trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        names = {f"{layer}.lora_{side}.{module.active_adapters[0]}.weight" for layer, module in layers.items()
                 for side in "AB"}
        others = sorted(trainable.keys() - names)
        if others or not layers:
            raise ModelError(f"{others[0] if others else 'this model'} is no plain LoRA adapter of a linear layer, and "
                             "nothing else can be trained together; train the settings one by one")
        self.places: dict[str, Place] = {}
        size = 0
        for name, parameter in trainable.items():
            self.places[name] = Place(name, size, parameter.shape)
            size += parameter.numel()
        device = next(iter(trainable.values())).device
        self.weights = torch.empty(len(starts), size, device=device)
        self.gradients = torch.zeros_like(self.weights)
        for vector, start in zip(self.weights, starts, strict=True):
            for name, place in self.places.items():
                place.of(vector).copy_(start[name])
        # A set is one vector, so a layer's weights of all sets are not; that costs nothing where there is no DDP.
        warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
        self.active: tuple[int, ...] = (0,)
        for layer, module in layers.items():
            name = module.active_adapters[0]
            down, up = (self._leaf(f"{layer}.lora_{side}.{name}.weight") for side in "AB")
            module.stacked = _Layer(self, down, up, module.scaling[name])
            module.__class__ = _stacked_class(type(module))
            for parameter in (module.lora_A[name].weight, module.lora_B[name].weight):
                parameter.requires_grad_(False)

    def _leaf(self, name: str) -> Tensor:
        """The weight called ``name`` of all sets, [K, *shape], whose gradient is added up in ``gradients``."""
        leaf = self.places[name].of(self.weights).detach().requires_grad_()
        leaf.grad = self.places[name].of(self.gradients)
        return leaf

    def __len__(self) -> int:
        return len(self.weights)

    @contextlib.contextmanager
    def using(self, numbers: Sequence[int]) -> Iterator[None]:
        """Within the block the model's rows are those of these sets, in equal parts."""
        before, self.active = self.active, tuple(numbers)
        try:
            yield
        finally:
            self.active = before

    def named(self, number: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The weights of one set by name, on the CPU."""
        return {name: place.of(self.weights[number]).to("cpu", dtype, copy=True) for name, place in self.places.items()}


@dataclass(frozen=True)
class _Layer:
    """What a layer needs of the stack: ``down`` [K, r, I] and ``up`` [K, O, r]."""

    stack: AdapterStack
    down: Tensor
    up: Tensor
    scaling: float

    def active(self) -> tuple[Tensor, Tensor]:
        numbers = self.stack.active
        if numbers == tuple(range(len(self.stack))):
            return self.down, self.up
        if len(numbers) == 1:
            return self.down[numbers[0]][None], self.up[numbers[0]][None]
        index = torch.tensor(numbers, device=self.down.device)
        return self.down.index_select(0, index), self.up.index_select(0, index)


class _Stacked(nn.Module):
    """``forward`` of a LoRA layer with a stack, for a subclass of PEFT's."""

    stacked: _Layer

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        down, up = self.stacked.active()
        base = self.base_layer
        if type(base) is nn.Linear:
            # Under autocast a float32 stream meets bfloat16 weights.
            return _StackedProduct.apply(x.to(base.weight.dtype), base.weight, base.bias, down, up, self.stacked.scaling)
        out = base(x)  # quantized
        rows = x.reshape(len(down), -1, x.shape[-1]).to(out.dtype)
        low = torch.bmm(rows, down.to(out.dtype).mT)
        return out + torch.bmm(low, up.to(out.dtype).mT).view(out.shape) * self.stacked.scaling


class _StackedProduct(torch.autograd.Function):
    """``adapter._LoraProduct`` with another pair of factors for each of A equal parts of the rows; [..., I] -> [..., O].

    The factors are float32 whatever the precision of the product, and so are their gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor,
                scaling: float) -> Tensor:
        rows = x.reshape(len(down), -1, x.shape[-1])  # [A, T, I]
        down, up = down.to(x.dtype), up.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            low = torch.bmm(rows, down.mT)  # [A, T, r]
            out = F.linear(rows, weight, bias).baddbmm_(low, up.mT, alpha=scaling)
        ctx.save_for_backward(rows, low, weight, down, up)
        ctx.scaling, ctx.shape = scaling, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, weight, down, up = ctx.saved_tensors
        grad = grad.reshape(len(down), -1, grad.shape[-1]).to(weight.dtype)  # [A, T, O]
        grad_low = torch.bmm(grad, up).mul_(ctx.scaling)  # [A, T, r]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).baddbmm_(grad_low, down).view(ctx.shape)
        return (grad_x, None, None, torch.bmm(grad_low.mT, rows).float(),
                torch.bmm(grad.mT, low).mul_(ctx.scaling).float(), None)


def _plain_layers(model: nn.Module) -> dict[str, nn.Module]:
    """LoRA layers by name that do no more than add a low-rank product to a linear layer."""
    from peft.tuners.lora import LoraLayer

    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and isinstance(module.base_layer, nn.Linear) and len(module.active_adapters) == 1:
            adapter = module.active_adapters[0]
            if adapter in module.lora_A and adapter not in module.lora_variant and module.lora_B[adapter].bias is None:
                layers[name] = module
    return layers


def _stacked_class(kind: type[nn.Module]) -> type[nn.Module]:
    """PEFT's class of a layer, its names and its state; only ``forward`` is another."""
    return type(f"Stacked{kind.__name__}", (_Stacked, kind), {})
