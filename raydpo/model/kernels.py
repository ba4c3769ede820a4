"""Elementwise functions of a decoder layer and of the vocabulary projection, each with its own backward pass.

Written as separate operations of torch, a norm or a gated activation reads and writes its tensors many times, in float32,
and keeps several of them for the backward pass. Here each is one function of its inputs: it computes in float32, rounds
once, and keeps nothing but its inputs. torch compiles a function for a GPU, which then reads each input and writes each
output about once. On a CPU the functions run as they are written.

Shapes: T = positions, H = hidden size, I = inner size, A = heads, D = head size, C = rows of a chunk, V = vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Activation", "Kernel", "gated", "head_slope", "log_normaliser", "rms_norm", "rotate"]

COMPILED = {"cuda"}
"""Types of devices for which functions are compiled."""

Activation = Literal["silu", "gelu_tanh"]
"""Activation of a gated feed-forward part: SiLU (SwiGLU) or GELU in its tanh form (GeGLU)."""


class Kernel:
    """A function of tensors that runs compiled on a GPU, for any number of positions after one compilation.

    Args:
        fixed: first dimension of the tensors whose size the compiled code knows, as it does those after it. To sum a row
            well it must know the row's width. With another width it is compiled again.
    """

    def __init__(self, function: Callable[..., Any], fixed: int) -> None:
        self.function, self.fixed = function, fixed
        self.__doc__ = function.__doc__

    def __call__(self, *arguments: Any) -> Any:
        if arguments[0].device.type not in COMPILED:
            return self.function(*arguments)
        for tensor in arguments:
            if isinstance(tensor, Tensor):
                for dimension in range(self.fixed, tensor.dim()):
                    torch._dynamo.mark_static(tensor, dimension)
        return self.compiled(*arguments)

    @cached_property
    def compiled(self) -> Callable[..., Any]:
        return torch.compile(self.function, dynamic=True, fullgraph=True)


def _kernel(fixed: int) -> Callable[[Callable[..., Any]], Kernel]:
    return partial(Kernel, fixed=fixed)


def _rows(tensor: Tensor) -> Tensor:
    """[..., H] -> [T, H], without a graph."""
    return tensor.detach().reshape(-1, tensor.shape[-1])


# -- norm -----------------------------------------------------------------------------------------------------------------


@_kernel(fixed=1)
def _norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
    """x / rms(x) * weight, [T, H], in the weight's precision."""
    x = x.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * _scale(weight, plus_one)).to(weight.dtype)


def _norm_grad(grad: Tensor, x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> tuple[Tensor, Tensor]:
    """Gradient of ``x`` [T, H], and the terms [T, H] whose sum over rows is the weight's."""
    grad, wide = grad.float(), x.float()
    root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * root
    scaled = grad * _scale(weight, plus_one)
    return (root * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))).to(x.dtype), grad * normed


@_kernel(fixed=1)
def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
    return _norm_grad(grad, x, weight, eps, plus_one)[0]


@_kernel(fixed=1)
def _norm_backward_with_weight(grad: Tensor, x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> tuple[Tensor, Tensor]:
    grad_x, terms = _norm_grad(grad, x, weight, eps, plus_one)
    return grad_x, terms.sum(0).to(weight.dtype)


def _scale(weight: Tensor, plus_one: bool) -> Tensor:
    return weight.float() + 1 if plus_one else weight.float()


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.constants = eps, plus_one
        return _norm(_rows(x), weight.detach(), eps, plus_one).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        arguments = _rows(grad), _rows(x), weight.detach(), *ctx.constants
        if ctx.needs_input_grad[1]:
            grad_x, grad_weight = _norm_backward_with_weight(*arguments)
        else:
            grad_x, grad_weight = _norm_backward(*arguments), None
        return grad_x.view(x.shape), grad_weight, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
    """Root mean square norm (arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Args:
        x: [..., H], float32 or of the weight's precision. Only this is kept for the backward pass.
        weight: [H]; its precision is the result's.
        plus_one: multiply by 1 + weight, as Gemma does.
    """
    return _RmsNorm.apply(x, weight, eps, plus_one)


# -- gated activation -----------------------------------------------------------------------------------------------------


@_kernel(fixed=3)
def _gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    wide = gate.float()
    active = F.silu(wide) if activation == "silu" else F.gelu(wide, approximate="tanh")
    return (active * up.float()).to(gate.dtype)


@_kernel(fixed=3)
def _gated_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    grad, wide, up = grad.float(), gate.float(), up.float()
    if activation == "silu":
        active, inner = F.silu(wide), torch.ops.aten.silu_backward(grad * up, wide)
    else:
        active = F.gelu(wide, approximate="tanh")
        inner = torch.ops.aten.gelu_backward(grad * up, wide, approximate="tanh")
    return inner.to(gate.dtype), (grad * active).to(gate.dtype)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _gated(gate.detach(), up.detach(), activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        return (*_gated_backward(grad.detach(), gate.detach(), up.detach(), ctx.activation), None)


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """activation(gate) * up (arXiv 2002.05202), all [..., I]. The backward pass computes the activation again."""
    return _Gated.apply(gate, up, activation)


# -- rotary embedding -----------------------------------------------------------------------------------------------------


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Turn each pair of numbers (i, i + D / 2). x [R, T, A, D]; cos, sin [R, T, 1, D]. A sign of -1 transposes the turn."""
    half = x.shape[-1] // 2
    wide = x.float()
    one, other = wide[..., :half], wide[..., half:]
    if sign > 0:
        turned = (one * cos[..., :half] - other * sin[..., :half], other * cos[..., half:] + one * sin[..., half:])
    else:
        turned = (one * cos[..., :half] + other * sin[..., half:], other * cos[..., half:] - one * sin[..., :half])
    return torch.cat(turned, dim=-1).to(x.dtype)


@_kernel(fixed=2)
def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _turn(query, cos, sin, 1), _turn(key, cos, sin, 1)


@_kernel(fixed=2)
def _rotate_back(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _turn(query, cos, sin, -1), _turn(key, cos, sin, -1)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _by_position(_rotate, query, key, cos, sin)

    @staticmethod
    def backward(ctx: Any, query: Tensor, key: Tensor) -> tuple[Tensor | None, ...]:
        return (*_by_position(_rotate_back, query, key, *ctx.saved_tensors), None, None)


def _by_position(kernel: Kernel, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Call ``kernel`` with the heads of a position beside each other, as the projections write and attention reads them."""
    heads = (tensor.detach().transpose(1, 2) for tensor in (query, key))
    query, key = kernel(*heads, cos.detach()[:, :, None], sin.detach()[:, :, None])
    return query.transpose(1, 2), key.transpose(1, 2)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (arXiv 2104.09864) in halves: x * cos + (-second half, first half) * sin.

    Args:
        query, key: [R, A, T, D], with different numbers of heads; the results have their precision.
        cos, sin: float32 [R or 1, T, D].
    """
    return _Rotate.apply(query, key, cos, sin)


# -- vocabulary projection ------------------------------------------------------------------------------------------------


def _transformed(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


@_kernel(fixed=1)
def log_normaliser(logits: Tensor, power: float, scale: float, softcap: float | None) -> Tensor:
    """log sum exp(power * logits) of each row of float32 logits [C, V] after ``head.LogitTransform``: [C]."""
    logits = power * _transformed(logits, scale, softcap)
    # Spelled out in the form that inductor knows and computes while it reads the logits once (torch 2.13,
    # fx_passes/post_grad.py: prepare_softmax_pattern).
    largest = logits.amax(-1, keepdim=True)
    return (torch.log((logits - largest).exp().sum(-1, keepdim=True)) + largest)[:, 0]


@_kernel(fixed=1)
def head_slope(
    logits: Tensor,
    normalisers: Tensor,
    targets: Tensor,
    factors: Tensor,
    scale: float,
    softcap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of each row's log-prob for its float32 logits [C, V], times the row's factor, rounded to ``dtype``.

    Args:
        normalisers, factors: float32 [C]. targets: [C].
    """
    transformed = _transformed(logits, scale, softcap)
    chosen = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    slope = (chosen.float() - torch.exp(transformed - normalisers[:, None])) * factors[:, None]
    if softcap is not None:
        slope = slope * (1 - (transformed / softcap).square())
    return (slope * scale).to(dtype)
