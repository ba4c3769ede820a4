"""Modules that ZeRO-3 must gather as a whole, on every rank alike.

DeepSpeed gathers the weights of a module when it is called, and sums gradients when each is computed: all ranks must call
the same modules in the same order. A list of experts is not called so, since the tokens of each rank choose among them. A
*leaf module* (DeepSpeed's name) is gathered and reduced as one, and its experts without tokens get gradients of zero.
"""

from __future__ import annotations

from torch import nn

from raydpo.model.mixture import expert_blocks

__all__ = ["set_leaf_modules"]


def set_leaf_modules(model: nn.Module) -> list[str]:
    """Mark the leaf modules of ``model``, before ``deepspeed.initialize`` with ZeRO-3. Returns their names.

    These are blocks with a list of experts, and PEFT's layers on parameters, such as the tensors of fused experts: these
    layers read weights of their children without calling them (peft 0.21, ``tuners/lora/layer.py``, ParamWrapper). Other
    mixtures compute all experts in one module and need none.
    """
    homes = [block.name for block in expert_blocks(model) if block.listed and _is_called(block.module)]
    wrappers = [
        name for name, module in model.named_modules() if type(module).__name__ in ("ParamWrapper", "FusedParamWrapper")
    ]
    leaves: list[str] = []
    for name in sorted({*homes, *wrappers}):  # an outer module comes before what is in it
        if not any(name.startswith(f"{outer}.") for outer in leaves[-1:]):
            leaves.append(name)
            model.get_submodule(name)._z3_leaf = True  # type: ignore[assignment]  # as deepspeed.utils.set_z3_leaf_module
    return leaves


def _is_called(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward
