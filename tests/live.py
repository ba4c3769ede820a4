"""Bytes of live tensors, counted without allocating them: the code that trains, on torch's fake tensors.

A fake tensor has a shape, a type and a device, and no memory. So an 8B model is made and computed in a second, and each
operation that a GPU would run is seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raydpo.config import ModelConfig
from raydpo.model import head, kernels
from raydpo.model.fused import find_parts, switch
from raydpo.model.layout import Method, PromptGroup
from raydpo.model.load import add_lora
from raydpo.model.logps import LogpModel

__all__ = ["Live", "like_a_gpu", "make_policy", "pairs_of"]


class Live(TorchDispatchMode):
    """Counts bytes of storages that are alive.

    Attributes:
        now: bytes at present. peak: most bytes since it was last set.
        quiet: whether new tensors are left out, as those within a function that torch compiles.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.quiet = False
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if not self.quiet:
            self.see(out)
        return out

    def see(self, results: Any) -> None:
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


@contextlib.contextmanager
def like_a_gpu() -> Iterator[Live]:
    """Count tensors of fake CPU tensors that are computed as a GPU would: torch without CUDA makes no fake CUDA tensors."""

    def rows(vocabulary: int, _device: str) -> int:
        return chunk_rows(vocabulary, "cuda")

    def project(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # one product with a float32 result
        return hidden.to(weight.dtype).new_empty(len(hidden), len(weight), dtype=torch.float32)

    def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:  # one product that adds to float32
        return None

    def compiled(kernel: kernels.Kernel, *arguments: Any) -> Any:
        live.quiet = True
        try:
            results = kernel.function(*arguments)
        finally:
            live.quiet = False
        live.see(results)
        return results

    chunk_rows, live = head.chunk_rows, Live()
    with contextlib.ExitStack() as stack:
        for name, replacement in (("chunk_rows", rows), ("_project", project), ("_add_product", add_product)):
            stack.enter_context(mock.patch.object(head, name, replacement))
        stack.enter_context(mock.patch.object(kernels.Kernel, "__call__", compiled))
        # PEFT moves new adapters to the device of the weight that they belong to.
        stack.enter_context(mock.patch.object(nn.Module, "to", lambda module, *_, **__: module))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(live)


def make_policy(config: Any, given: ModelConfig, *, recomputes: bool = False) -> LogpModel:
    """A bfloat16 policy in training mode, within ``like_a_gpu``."""
    from transformers import AutoModelForCausalLM

    with contextlib.ExitStack() as stack:
        for name in (name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")):
            stack.enter_context(mock.patch.object(nn.init, name, lambda tensor, *_, **__: tensor))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if given.quantization is not None:
        _quantize(model)
    if given.lora is not None:
        model = add_lora(model, given.lora, seed=0)
        for parameter in model.parameters():
            if parameter.requires_grad:  # as DeepSpeed does
                parameter.data = parameter.data.to(torch.bfloat16)
    policy = LogpModel(model)
    if given.fused:
        with unset_fake_temporarily():  # compares formulas on numbers
            parts = find_parts(policy)
        switch(policy, parts, on=True)
    policy.use(Method("tree", "varlen"))
    if recomputes:
        policy.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return policy.train()


def _quantize(model: nn.Module) -> None:
    """Replace the linear layers by bitsandbytes' in 4 bits, as transformers does while it loads."""
    import bitsandbytes
    from bitsandbytes.functional import quantize_4bit

    how = {"quant_type": "nf4", "compress_statistics": True}
    with unset_fake_temporarily():
        quantize_4bit(torch.ones(64, 64), **how)  # makes a table that the library keeps
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not model.get_output_embeddings():
            with unset_fake_temporarily():  # its class of parameters cannot hold a fake tensor
                layer = bitsandbytes.nn.Linear4bit(
                    module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, device="meta", **how
                )
            packed, state = quantize_4bit(module.weight.data, **how)
            weight = nn.Parameter(packed, requires_grad=False)
            for key, value in (how | {"quant_state": state, "quant_storage": torch.uint8, "blocksize": 64}).items():
                setattr(weight, key, value)
            layer._parameters["weight"], layer.quant_state = weight, state
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer)
    model.is_loaded_in_4bit = True


def pairs_of(count: int, prompt: int, completion: int) -> list[PromptGroup]:
    """Random pairs that share no prefix."""
    rng = np.random.default_rng(0)
    return [
        PromptGroup(rng.integers(0, 9999, prompt), tuple(rng.integers(0, 9999, completion) for _ in range(2)))
        for _ in range(count)
    ]
