"""Modules that ZeRO-3 must gather as a whole, on every rank alike.

DeepSpeed gathers the weights of a module when it is called, and sums gradients when each is computed: all ranks must call
the same modules in the same order. A list of experts is not called so, since the tokens of each rank choose among them. A
*leaf module* (DeepSpeed's name) is gathered and reduced as one, and its experts without tokens get gradients of zero.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from raydpo.model.mixture import expert_blocks

__all__ = ["set_leaf_modules"]


def set_leaf_modules(model: nn.Module) -> list[str]:
    """Mark the leaf modules of ``model``, before ``deepspeed.initialize`` with ZeRO-3. Returns their names.

    These are blocks with a list of experts, and layers that read weights of their children without calling them: PEFT's on
    parameters, such as the tensors of fused experts (peft 0.21, ``tuners/lora/layer.py``, ParamWrapper), and those with a
    convolution, such as Mamba's, whose kernels take its weight (transformers 5.23, ``models/jamba/modeling_jamba.py``).
    Other mixtures compute all experts in one module and need none.
    """
    homes = [block.name for block in expert_blocks(model) if block.listed and _is_called(block.module)]
    wrappers = [
        name for name, module in model.named_modules() if type(module).__name__ in ("ParamWrapper", "FusedParamWrapper")
    ]
    convolving = [name for name, module in model.named_modules() if any(map(_is_convolution, module.children()))]
    for name in convolving:
        model.get_submodule(name).register_forward_pre_hook(_by_position, with_kwargs=True)
    leaves: list[str] = []
    for name in sorted({*homes, *wrappers, *convolving}):  # an outer module comes before what is in it
        if not any(name.startswith(f"{outer}.") for outer in leaves[-1:]):
            leaves.append(name)
            model.get_submodule(name)._z3_leaf = True  # type: ignore[assignment]  # as deepspeed.utils.set_z3_leaf_module
    return leaves


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(getattr(module, "base_layer", module), nn.Conv1d)


def _by_position(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pass the first argument by position. DeepSpeed 0.19 looks for the end of a module's backward pass at its positional
    arguments only (``zero/parameter_offload.py``), and reduces the gradients of a leaf module then (``zero/stage3.py``)."""
    _, first, *_ = inspect.signature(type(module).forward).parameters  # self, hidden states
    if not args and first in kwargs:
        kwargs = dict(kwargs)
        args = (kwargs.pop(first),)
    return args, kwargs


def _is_called(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward
