"""What every block is given: the device, random models and data, and the limits of its figures."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from raydpo.data.shapes import LayoutName
from raydpo.data.simulate import amounts
from raydpo.estimate.cards import known_peak
from raydpo.gpu.limits import Limits
from raydpo.gpu.shape import Shape
from raydpo.gpu.timing import seconds
from raydpo.model.attention import Demand, available_bodies
from raydpo.model.cost import ModelCost
from raydpo.model.layout import PromptGroup, shapes_of
from raydpo.model.memory.anatomy import Anatomy
from raydpo.model.segments import Body

__all__ = ["World", "amount_of"]


@dataclass
class World:
    """A device and what is computed on it.

    Attributes:
        dtype: precision of weights and compute.
        folder: local directory for files of the check, removed at its end.
        measured: rates for plans, see ``Report.measured``.
    """

    device: torch.device
    shape: Shape
    limits: Limits
    folder: Path
    dtype: torch.dtype = torch.bfloat16
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @functools.cached_property
    def gemm(self) -> float:
        """Operations per second of a large product, measured."""
        size = self.shape.matrix
        left, right = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2))
        return 2 * size**3 / seconds(lambda: left @ right, self.device)

    @property
    def peak(self) -> float:
        """Operations per second of the data sheet, else of a large product."""
        return self.sheet_peak or self.gemm

    @property
    def sheet_peak(self) -> float | None:
        """Operations per second of the data sheet, or None if the device is not in ``estimate.cards``."""
        return known_peak(torch.cuda.get_device_name(self.device)) if self.cuda else None

    def model(self, layers: int, *, vocabulary: int | None = None, dtype: torch.dtype | None = None) -> nn.Module:
        """A random causal LM of the shape, in evaluation mode, on the device. Every call gives the same weights."""
        return _random_model(self.shape, layers, vocabulary or self.shape.vocabulary, self.device, dtype or self.dtype)

    def anatomy(self, layers: int, vocabulary: int) -> Anatomy:
        """Sizes of ``model`` with these sizes, for the plan of its memory."""
        return Anatomy.of_model(_empty(self.shape, layers, vocabulary, "meta", self.dtype))

    def cost(self, layers: int) -> ModelCost:
        """Floating point operations of ``model`` with so many layers."""
        sizes = {weight.name: weight.numel for weight in self.anatomy(layers, self.shape.vocabulary).weights}
        shape = self.shape
        entries = {"hidden_size": shape.hidden, "vocab_size": shape.vocabulary, "num_hidden_layers": layers}
        return ModelCost.of_sizes(sizes, entries | {"num_attention_heads": shape.heads, "head_dim": shape.head_size})

    def bodies(self) -> tuple[Body, ...]:
        """Bodies of attention that can run the shape here, the fastest first."""
        return available_bodies(self.device, [Demand(size=self.shape.head_size, dtype=self.dtype)])

    @functools.cached_property
    def files(self) -> Path:
        """Directory of a random model with ``few`` layers and the small vocabulary, as safetensors."""
        path = self.folder / "model"
        self.model(self.shape.few, vocabulary=self.shape.small_vocabulary).save_pretrained(str(path))
        return path

    def pairs(self, count: int, *, spread: float = 0.0, seed: int = 0) -> list[PromptGroup]:
        """Random pairs (chosen, rejected) of the shape's lengths.

        Args:
            spread: sigma of a log-normal factor on each length; 0 = all pairs have the same lengths.
        """
        rng = np.random.default_rng(seed)

        def tokens(length: int) -> np.ndarray:
            factor = np.clip(rng.lognormal(0, spread), 0.25, 2.0) if spread else 1.0
            return rng.integers(0, self.shape.small_vocabulary, max(2, round(length * factor))).astype(np.int32)

        return [
            PromptGroup(tokens(self.shape.pair[0]), tuple(tokens(length) for length in self.shape.pair[1:]))
            for _ in range(count)
        ]

    def pairs_of(self, positions: int, **options: Any) -> list[PromptGroup]:
        """As many pairs of the shape's lengths as fit in ``positions``, at least one."""
        return self.pairs(max(1, positions // sum(self.shape.pair)), **options)


def _random_model(shape: Shape, layers: int, vocabulary: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A Llama of random weights (normal, 0.02), made on ``device``: a second for 5 GB on a GPU, with no copy on the host."""
    model = _empty(shape, layers, vocabulary, device, dtype)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02, generator=generator)
            else:
                parameter.fill_(1.0)
    return model.eval()


def _empty(shape: Shape, layers: int, vocabulary: int, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head_size,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def amount_of(groups: Sequence[PromptGroup], layout: LayoutName) -> np.ndarray:
    """Positions, query-key pairs and predictions of one pass over ``groups``: float [3]."""
    return amounts([range(len(groups))], shapes_of(groups), layout)
