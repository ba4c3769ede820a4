"""Counts of kernels, of bytes that they read and write, and of bytes kept for a backward pass, on tensors without data.

They stand for a GPU's work and memory; they are not measurements. What torch compiles counts as one kernel that reads each
input and writes each output once.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
from live import like_a_gpu, make_policy, pairs_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig

from raydpo.config import LoraSettings, ModelConfig
from raydpo.model import head, kernels

HEAVY = ("mm", "addmm", "bmm", "_varlen", "flash", "attention", "embedding")
"""Parts of the names of operations that are no elementwise work of a layer."""
FREE = ("device", "empty", "empty_like", "new_empty", "detach", "_unsafe_view")


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
        if not self.quiet and not func.is_view and name not in FREE:
            self.add(name, (args, kwargs), result)
        return result

    def add(self, name, read, written):
        self.work.kernels += 1
        # Only what is picked from a tensor, or changed in it, moves.
        picked = {"gather": lambda: 2 * bytes_of(written), "scatter_add_": lambda: 3 * bytes_of(read[0][-1])}
        self.work.bytes[name] += picked.get(name, lambda: bytes_of(read) + bytes_of(written))()

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


PAIR = (1024, 512, 512)
PAIRS = 3
POSITIONS = PAIRS * sum(PAIR)


@dataclass
class Layer:
    """Bytes of a decoder layer per position: elementwise work of both passes, and what is kept between them; kernels."""

    forward: float
    backward: float
    kept: float
    kernels: tuple[int, int]


def llama_layer(fused: bool, lora: bool) -> Layer:
    """One layer of the shape of Llama 3 8B in bfloat16: what a second layer adds."""
    one, two = (_passes(layers, fused, lora) for layers in (1, 2))
    (f1, b1, k1), (f2, b2, k2) = one, two
    return Layer(
        (f2.elementwise - f1.elementwise) / POSITIONS,
        (b2.elementwise - b1.elementwise) / POSITIONS,
        (k2 - k1) / POSITIONS,
        (f2.kernels - f1.kernels, b2.kernels - b1.kernels),
    )


def _passes(layers: int, fused: bool, lora: bool) -> tuple[Work, Work, int]:
    """Work of the forward and the backward pass, and bytes kept between them."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=4096,
    )
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if not isinstance(tensor._base if tensor._is_view() else tensor, torch.nn.Parameter):
            kept[storage._cdata] = storage
        return tensor

    forward, backward = Count(), Count()
    with like_a_gpu():
        model = make_policy(config, ModelConfig(path="m", lora=LoraSettings(r=16) if lora else None, fused=fused))
        layout = model.lay_out(pairs_of(PAIRS, *PAIR[:2]))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with forward, forward.compiled():
                loss = model(layout).sum()
            with backward, backward.compiled():
                torch.autograd.grad(loss, [each for each in model.parameters() if each.requires_grad])
    return forward.work, backward.work, sum(storage.nbytes() for storage in kept.values())


def llama_head(fused: bool, frozen: bool, predictions: int = 8192) -> tuple[Work, Work]:
    """Work of the forward and the backward pass of the head of Llama 3 8B in bfloat16, as a GPU computes it."""

    def rows(vocabulary, device):
        return chunk_rows(vocabulary, "cuda")

    def project(hidden, weight, bias):
        return torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=torch.float32)

    chunk_rows = head.chunk_rows
    patched = mock.patch.multiple(head, _project=project, _adds_in_place=lambda *_: True, chunk_rows=rows)
    forward, backward = Count(), Count()
    with patched, FakeTensorMode(allow_non_fake_inputs=True):
        weight = torch.empty(128256, 4096, dtype=torch.bfloat16, requires_grad=not frozen)
        hidden = torch.empty(predictions, 4096, requires_grad=True)
        targets = torch.empty(predictions, dtype=torch.int64)
        with forward, forward.compiled():
            loss = head._ChunkedLogps.apply(hidden, weight, None, targets, head.LogitTransform(), True, False, fused).sum()
        with backward, backward.compiled():
            torch.autograd.grad(loss, [each for each in (hidden, weight) if each.requires_grad])
    return forward.work, backward.work
