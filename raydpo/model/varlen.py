"""Attention over a prefix tree in one call of a variable-length kernel, torch's or that of the package flash-attn.

The kernel gets each node's queries as one sequence, and the keys of its path and its own as another. It aligns the causal
mask to the last key, so queries see the whole path.

Shapes: T = positions, A = query heads, G = key heads, D = head size, K = sum over nodes of depth + length.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from raydpo.errors import ModelError, one_line
from raydpo.model.segments import Segments, Terms

__all__ = ["Kernel", "attend", "flash_kernel", "gather", "torch_kernel"]

Kernel = Callable[..., Tensor]
"""From terms, queries [T, A, D], keys and values [K, G, D], their ends, and the longest of both, to [T, A, D]."""


def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments, terms: Terms) -> Tensor:
    """Attention of each token to its path and itself.

    Args:
        query: [1, A, T, D]; key, value: [1, G, T, D].

    Returns:
        [1, T, A, D].
    """
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    keys, values = (gather(tensor, segments.index) for tensor in rows[1:])
    ends = segments.query_ends, segments.key_ends, segments.longest_query, segments.longest_key
    kernel = flash_kernel() if segments.body == "flash" else torch_kernel()
    if isinstance(kernel, str):
        raise ModelError(kernel)
    return kernel(terms, rows[0].contiguous(), keys, values, *ends)[None]


def gather(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index]. The gradients of a shared prefix, one per branch, are summed in float32."""
    return _Gather.apply(rows, index)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.like = rows.shape, rows.dtype
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        shape, dtype = ctx.like
        total = torch.zeros(shape, dtype=torch.float32, device=grad.device)
        return total.index_add_(0, index, grad.float()).to(dtype), None


@cache
def torch_kernel() -> Kernel | str:
    """torch's kernel; or why there is none, with the remedy.

    torch 2.10 has no ``scale`` and no ``window_size``, 2.11 has both, 2.12 adds ``enable_gqa`` and ``num_splits``
    (torch/nn/attention/varlen.py of each). Before ``enable_gqa``, nothing compares the numbers of heads on the way to the
    same kernel, which computes with fewer key heads; so they are passed as they are, and ``model.bodycheck`` checks it.
    """
    varlen_attn = _imported("torch.nn.attention.varlen", "varlen_attn")
    if isinstance(varlen_attn, str):
        return f"torch {torch.__version__} has no varlen_attn ({varlen_attn}); install torch 2.11 or newer"
    known = inspect.signature(varlen_attn).parameters
    missing = [name for name in ("scale", "window_size") if name not in known]
    if missing:
        return f"varlen_attn of torch {torch.__version__} has no {' and no '.join(missing)}; install torch 2.11 or newer"
    always: dict[str, Any] = {}
    # One split: a sequence gets the same bits whatever else is in the batch. ROCm's kernel refuses the argument.
    if "num_splits" in known and torch.version.hip is None:
        always["num_splits"] = 1

    def kernel(terms: Terms, query: Tensor, key: Tensor, *others: Any) -> Tensor:
        grouped = {"enable_gqa": query.shape[1] != key.shape[1]} if "enable_gqa" in known else {}
        own = {"scale": terms.scaling, "window_size": _around(terms.window)}
        return varlen_attn(query, key, *others, **own, **grouped, **always)

    return kernel


@cache
def flash_kernel() -> Kernel | str:
    """flash-attn's kernel; or why there is none, with the remedy."""
    flash_attn = _imported("flash_attn", "flash_attn_varlen_func")
    if isinstance(flash_attn, str):
        return f"flash_attn cannot be imported ({flash_attn}); install flash-attn"

    def kernel(terms: Terms, *arguments: Any) -> Tensor:
        capped = {} if terms.softcap is None else {"softcap": terms.softcap}
        own = {"softmax_scale": terms.scaling, "causal": True, "window_size": _around(terms.window)}
        return flash_attn(*arguments, **own, **capped)

    return kernel


def _around(window: int | None) -> tuple[int, int]:
    """Keys before and after its own that a query sees: (-1, 0) = all before."""
    return (-1 if window is None else window - 1), 0


def _imported(module: str, name: str) -> Callable[..., Tensor] | str:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, OSError) as error:  # also a package built for another torch
        return one_line(error, 160)
