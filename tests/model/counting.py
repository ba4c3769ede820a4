"""Counts of kernels, of the bytes that they read and write, and of the bytes kept for a backward pass, on tensors without data.

They stand for a GPU's work and its memory; they are not measurements. What torch compiles counts as one kernel that reads each
input and writes each output once.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from raydpo.config import LoraSettings
from raydpo.model import head, kernels
from raydpo.model.fused import find_parts, switch
from raydpo.model.layout import Method, PromptGroup
from raydpo.model.load import add_lora
from raydpo.model.logps import LogpModel

HEAVY = ("mm", "addmm", "bmm", "_varlen", "flash", "attention", "embedding")
"""Parts of the names of operations that are no elementwise work of a layer."""


@dataclass
class Work:
    """Kernels, and bytes by operation."""

    kernels: int = 0
    bytes: Counter[str] = field(default_factory=Counter)

    @property
    def elementwise(self) -> int:
        return sum(count for name, count in self.bytes.items() if not any(each in name for each in HEAVY))


class Count(TorchDispatchMode):
    """Adds up the work of every operation of aten that is not a view, and of compiled functions."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()
        self.quiet = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        if not self.quiet and not func.is_view and name not in ("empty", "empty_like", "new_empty", "detach", "_unsafe_view"):
            # The written tensor of an operation in place is among its arguments: read and written.
            self.add(name, (args, kwargs), result)
        return result

    def add(self, name, read, written):
        self.work.kernels += 1
        self.work.bytes[name] += bytes_of(read) + bytes_of(written)

    @contextlib.contextmanager
    def compiled(self) -> Iterator[None]:
        """Count each call of a ``Kernel`` as one."""
        counter, call = self, kernels.Kernel.__call__

        def counted(kernel, *arguments):
            before, counter.quiet = counter.quiet, True
            try:
                result = call(kernel, *arguments)
            finally:
                counter.quiet = before
            counter.add("compiled" + kernel.function.__name__, arguments, result)
            return result

        with mock.patch.object(kernels.Kernel, "__call__", counted):
            yield


def bytes_of(tree) -> int:
    return sum(each.numel() * each.element_size() for each in tree_leaves(tree) if isinstance(each, torch.Tensor))
