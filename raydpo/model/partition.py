"""A model whose weights several processes hold together, each a part of every weight (ZeRO-3).

A weight is gathered from all when the layer that has it computes, and given up after that. Each process computes
micro-batches of its own, and all of them must make equally many passes. With ``offload`` the parts are in the host's memory.
Imports DeepSpeed only where a process group is joined.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from raydpo.model.leaves import set_leaf_modules
from raydpo.model.logps import LogpModel

__all__ = [
    "Partition",
    "float32_names",
    "join_process_group",
    "leave_process_group",
    "partitioned",
    "partitioned_loading",
    "whole",
]

OWN_PAGES = 1 << 20
"""Bytes from which an array on a CPU has pages of its own."""
_M_MMAP_THRESHOLD = -3
"""Number of the parameter in glibc's malloc.h."""
_HELD = -1
"""Stands for the block of ``whole`` among the numbers of modules that use a parameter, which begin at 0."""


@dataclass(frozen=True)
class Partition:
    """Where the weights of a model are.

    Attributes:
        size: processes that hold the weights together, each a part of every weight.
        offload: ``cpu`` = in the host's memory while they are not used; None = on the devices.
    """

    size: int = 1
    offload: Literal["cpu"] | None = None

    @property
    def active(self) -> bool:
        """Whether weights are anywhere else than whole on the device."""
        return self.size > 1 or self.offload is not None


def join_process_group(device: torch.device) -> None:
    """Set up DeepSpeed's communication: nccl on GPUs, gloo on CPUs, or torch.distributed's process group if there is one.

    DeepSpeed 0.19 computes on the GPU with the number LOCAL_RANK (``runtime/engine.py``, ``zero/partition_parameters.py``).
    This is set to that of ``device``: Ray sorts the GPUs of a machine as text, so rank 2 of 11 may have the GPU with id 10.
    """
    if device.index is not None:
        os.environ["LOCAL_RANK"] = str(device.index)
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
    with _without("mlflow"):  # only DeepSpeed's autotuner needs it, and importing it takes as long as DeepSpeed
        import deepspeed

    if device.type == "cpu":
        # Otherwise DeepSpeed compiles a C++ op at start, which takes a minute, fails without a compiler, and is used only by
        # its inference engine. Filling its table of compatible ops would also call compilers, so the table is set here.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    # Before any model is loaded: transformers partitions weights for ZeRO-3 while loading, over DeepSpeed's group.
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")


def leave_process_group() -> None:
    """Leave the process group, so that another one may be joined."""
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and deepspeed.comm.is_initialized():
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
        from deepspeed.runtime.zero.partition_parameters import Init

        # DeepSpeed 0.19 numbers modules and parameters of all models of a process, and compares the numbers of ranks: those
        # of the next group may be new processes.
        DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
        Init.param_id = 0
        deepspeed.comm.destroy_process_group()  # and groups of its own
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def _without(package: str) -> Iterator[None]:
    """Make imports of ``package`` fail within the block, unless it is already imported."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


@contextlib.contextmanager
def partitioned_loading(partition: Partition, dtype: str) -> Iterator[None]:
    """Context in which ``model.load.load_causal_lm`` leaves each process its part of the weights.

    Every process of the group must load the same model, after ``join_process_group``. Does nothing unless ``partition`` is
    active.
    """
    if not partition.active:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    held = HfDeepSpeedConfig(_settings(partition, dtype))  # transformers looks it up, and keeps only a weak reference
    try:
        with _float32_kept() if dtype == "bfloat16" else contextlib.nullcontext():
            yield
    finally:
        del held


@contextlib.contextmanager
def _float32_kept() -> Iterator[None]:
    """Let models that are created within the block keep the parameters of ``float32_names`` in float32.

    DeepSpeed 0.19 gives every parameter one precision (``zero/partition_parameters.py``), and the loader rounds to that.
    """
    from deepspeed.runtime.zero.partition_parameters import Init, restore_init_context, shutdown_init_context
    from transformers import GenerationMixin

    plain = Init._post_init_method

    def after_init(self: Any, module: torch.nn.Module) -> None:
        plain(self, module)
        if not isinstance(module, GenerationMixin):  # a part of a model
            return
        shutdown_init_context()
        try:
            names = float32_names(module)
        finally:
            restore_init_context()
        for name, parameter in module.named_parameters():
            if name in names:
                _widen(parameter)

    Init._post_init_method = after_init
    try:
        yield
    finally:
        Init._post_init_method = plain


def _widen(parameter: Any) -> None:
    """Make a partitioned parameter float32, before it is loaded."""
    part = parameter.ds_tensor
    wide = part.float()
    for name in ("ds_numel", "status", "final_location"):
        setattr(wide, name, getattr(part, name))
    if part.device.type == "cpu" and part.is_pinned():
        wide.data = wide.data.pin_memory()
    parameter.ds_tensor, parameter.data = wide, parameter.data.float()


def float32_names(causal_lm: torch.nn.Module) -> set[str]:
    """Names of the parameters that stay in float32 when the model is loaded in bfloat16 without ZeRO-3: those that its class
    lists, and those that it creates in float32."""
    listed = getattr(causal_lm, "_keep_in_fp32_modules_strict", None) or ()
    pattern = re.compile("|".join(rf"(^|\.){re.escape(name)}($|\.)" for name in listed) or "(?!)")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            empty = type(causal_lm)(causal_lm.config)
    finally:
        torch.set_default_dtype(before)
    return {name for name, parameter in empty.named_parameters() if parameter.dtype == torch.float32 or pattern.search(name)}


def partitioned(model: LogpModel, partition: Partition, dtype: str) -> LogpModel:
    """Make a model that was loaded within ``partitioned_loading`` ready to compute: without gradients, by all processes.

    Returns:
        The model itself. Its ``gathered_bytes`` are the most that a pass takes for weights of other processes.
    """
    import deepspeed
    from deepspeed.utils import set_z3_leaf_module

    model.eval().requires_grad_(False)  # before DeepSpeed, whose hooks for the backward pass are then not used
    set_leaf_modules(model)
    layers = _layers(model)
    for layer in layers:
        set_z3_leaf_module(layer, True)
    layer = max((_count(layer.parameters()) for layer in layers), default=0)
    alone = max(_count([parameter]) for parameter in model.parameters())
    ahead = layer if torch.cuda.is_available() else 0  # CPUs would copy what they compute with
    limits = {
        # The layer in use and the next one; or a table or a head, and the layer beside it.
        "stage3_max_live_parameters": max(layer, alone) + ahead,
        "stage3_prefetch_bucket_size": ahead,
        # A table that is tied to the head is given up in between.
        "stage3_max_reuse_distance": 0,
        # Norms and biases outside layers stay whole, up to half a percent of the weights.
        "stage3_param_persistence_threshold": 100_000,
        "stage3_model_persistence_threshold": _count(model.parameters()) // 200,
    }
    if not ahead:
        _give_back_memory()
    settings = _settings(partition, dtype)
    settings["zero_optimization"] |= limits
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    # Kept, since its end would take the hooks away; not as a module, of which the model is a part.
    model.__dict__["engine"] = engine
    model.__dict__["gathered_bytes"] = limits["stage3_max_live_parameters"] * (2 if dtype == "bfloat16" else 4)
    return model


@contextlib.contextmanager
def whole(module: torch.nn.Module) -> Iterator[None]:
    """Context in which this process has all weights of ``module``, also if they are partitioned: then all processes enter it
    together. How often the module computes within is free."""
    parameters = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        for parameter in parameters:
            parameter.ds_active_sub_modules.add(_HELD)  # the hooks of the module leave them as they are
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.ds_active_sub_modules.discard(_HELD)


def _settings(partition: Partition, dtype: str) -> dict[str, Any]:
    """DeepSpeed's configuration. transformers reads it while the model is loaded, and ``deepspeed.initialize`` again."""
    # Its replacement of torch.nn.functional.linear is for the backward pass, rounds otherwise, and stays in the process.
    zero: dict[str, Any] = {"stage": 3, "memory_efficient_linear": False}
    # Weights of a layer are gathered one by one. In one piece, DeepSpeed 0.19 copies them out of it again, so that a layer
    # takes twice its bytes for a moment (``AllGatherCoalescedHandle.wait`` in ``zero/partition_parameters.py``).
    zero["stage3_allgather_sequential"] = True
    if partition.offload == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def _give_back_memory() -> None:
    """Let the C library return the memory of gathered weights to the system. By default it keeps arrays of up to 32 MiB for
    later ones, which have other sizes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, OWN_PAGES)


def _layers(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of a model: what its outermost lists of modules contain.

    A layer's weights are gathered together. So a layer may use any of them in any order: the weight of a child that it does
    not call, as recurrent layers do, or the experts that its tokens choose, which are others on each process.
    """
    found: list[torch.nn.Module] = []
    for child in module.children():
        is_layer = isinstance(module, torch.nn.ModuleList) and type(child).forward is not torch.nn.Module.forward
        found += [child] if is_layer else _layers(child)
    return found


def _count(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)
