"""What every block is given: the device, the sizes of a random model, and the limits of its figures."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from raydpo.data.shapes import Shapes
from raydpo.data.simulate import amounts
from raydpo.estimate.cards import known_peak
from raydpo.model.cost import ModelCost
from raydpo.model.layout import PromptGroup, shapes_of
from raydpo.model.logps import LogpModel

__all__ = ["CPU_LIMITS", "GPU_LIMITS", "LLAMA_8B", "TINY", "Limits", "Shape", "World", "random_model"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the random models and of the data.

    Attributes:
        vocabulary: of the models whose speed and memory are measured; ``small_vocabulary``: of the others.
        layers: the two numbers of layers from which figures of ``whole`` layers are extrapolated. few: of other models.
        pair: tokens of a prompt and of two completions.
        passes: positions of a scoring pass whose speed is measured.
        live: positions of a training's micro-batch that is compared with a scoring pass.
        planned: positions of a micro-batch whose memory is compared with the plan.
        matrix: rows and columns of the square matrices whose product is timed.
        host_numbers: numbers that an optimizer on the host updates.
    """

    name: str
    hidden: int
    inner: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    small_vocabulary: int
    layers: tuple[int, int]
    few: int
    whole: int
    pair: tuple[int, int, int]
    passes: tuple[int, ...]
    live: int
    planned: int
    matrix: int
    host_numbers: int


LLAMA_8B = Shape(
    name="llama3-8b",
    hidden=4096,
    inner=14336,
    heads=32,
    key_heads=8,
    head_size=128,
    vocabulary=128_256,
    small_vocabulary=32_000,
    layers=(4, 8),
    few=2,
    whole=32,
    pair=(1024, 512, 512),
    passes=(4096, 16384, 32768),
    live=4096,
    planned=8192,
    matrix=8192,
    host_numbers=500_000_000,
)
TINY = Shape(
    name="tiny",
    hidden=64,
    inner=128,
    heads=4,
    key_heads=2,
    head_size=16,
    vocabulary=384,
    small_vocabulary=256,
    layers=(1, 2),
    few=2,
    whole=4,
    pair=(24, 12, 12),
    passes=(96, 192),
    live=96,
    planned=96,
    matrix=64,
    host_numbers=20_000,
)
"""For a CPU, where only the code is checked and the figures mean nothing."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of the figures. None = the figure is told and not compared.

    Attributes:
        driver: oldest driver that runs the CUDA 13 libraries.
        gemm, attention: least share of the data sheet's peak of a large product, and of attention's forward pass.
        body: largest relative error of attention; body_ratio: the same as a multiple of SDPA's own.
        head32, head16: largest relative error of log-probs and gradients of the head, in float32 and bfloat16.
        gap: mean difference of cached and live log-probs, nats a token. loss: of the first loss from ln 2.
        plan: largest relative difference of planned and measured memory. reserved: reserved through allocated memory.
        room: least and largest peak as a share of the memory that the budget was measured for.
        resumed, resumed8: relative difference of the weights of a resumed run, and of one with 8-bit moments.
        first: least and largest first update, as a share of the learning rate.
        host: nanoseconds that AdamW on the host takes a number; slowdown: of a step with activations on the host.
        fused: gap of fused functions, nats a token.
        bfloat16, layout: mean gap to float32, and between two layouts or bodies, nats a token. cosine: of gradients.
        score, full, lora: goals of the MFU.
    """

    driver: int | None = 580
    gemm: float | None = 0.6
    attention: float | None = 0.25
    body: float = 0.01
    body_ratio: float = 1.5
    head32: float = 1e-5
    head16: float = 4e-3
    gap: float = 0.02
    loss: float = 1e-3
    plan: float | None = 0.08
    reserved: float | None = 1.10
    room: tuple[float, float] | None = (0.70, 0.97)
    resumed: float = 1e-6
    resumed8: float = 1e-3
    first: tuple[float, float] = (0.99, 1.01)
    host: float | None = 1.5
    slowdown: float | None = 1.35
    fused: float = 0.005
    bfloat16: float = 0.02
    layout: float = 0.005
    cosine: float = 0.9999
    recompiles: int = 2
    score: float | None = 0.50
    full: float | None = 0.45
    lora: float | None = 0.42


GPU_LIMITS = Limits()
CPU_LIMITS = Limits(
    driver=None,
    gemm=None,
    attention=None,
    plan=None,
    reserved=None,
    room=None,
    host=None,
    slowdown=None,
    score=None,
    full=None,
    lora=None,
)
"""A CPU has no speed to prove, and torch does not count its memory."""


@dataclass
class World:
    """A device and what is computed on it.

    Attributes:
        dtype: precision of weights and compute.
        folder: local directory for files of the check, removed at its end.
        gemm: operations per second of a large product, once block 0 has measured them.
    """

    device: torch.device
    shape: Shape
    limits: Limits
    folder: Path
    dtype: torch.dtype = torch.bfloat16
    gemm: float | None = None
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def peak(self) -> float | None:
        """Operations per second of the data sheet, else of the largest product measured; None if neither is known."""
        return self.sheet_peak or self.gemm

    @property
    def sheet_peak(self) -> float | None:
        """Operations per second of the data sheet, or None if the device is not in ``estimate.cards``."""
        return known_peak(torch.cuda.get_device_name(self.device)) if self.cuda else None

    def model(self, layers: int, *, vocabulary: int | None = None, dtype: torch.dtype | None = None) -> nn.Module:
        """A random causal LM of the shape, in evaluation mode, on the device. Every call gives the same weights."""
        return random_model(self.shape, layers, vocabulary or self.shape.vocabulary, self.device, dtype or self.dtype)

    @functools.cached_property
    def files(self) -> Path:
        """Directory of a random model with ``few`` layers and the small vocabulary, as safetensors."""
        path = self.folder / "model"
        self.model(self.shape.few, vocabulary=self.shape.small_vocabulary).save_pretrained(str(path))
        return path

    def pairs(self, count: int, *, vocabulary: int | None = None, spread: float = 0.0, seed: int = 0) -> list[PromptGroup]:
        """Random pairs (chosen, rejected) of the shape's lengths.

        Args:
            spread: sigma of a log-normal factor on each length; 0 = all pairs have the same lengths.
        """
        rng = np.random.default_rng(seed)
        most = vocabulary or self.shape.small_vocabulary

        def tokens(length: int) -> np.ndarray:
            factor = np.clip(rng.lognormal(0, spread), 0.25, 2.0) if spread else 1.0
            return rng.integers(0, most, max(2, round(length * factor))).astype(np.int32)

        return [
            PromptGroup(tokens(self.shape.pair[0]), tuple(tokens(length) for length in self.shape.pair[1:]))
            for _ in range(count)
        ]

    def pairs_of(self, positions: int, **options: Any) -> list[PromptGroup]:
        """As many pairs of the shape's lengths as fit in ``positions``, at least one."""
        return self.pairs(max(1, positions // sum(self.shape.pair)), **options)


def random_model(shape: Shape, layers: int, vocabulary: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A Llama of random weights (normal, 0.02), made on ``device``: a second for 5 GB on a GPU, with no copy on the host."""
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
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02, generator=generator)
            else:
                parameter.fill_(1.0)
    return model.eval()


def cost_of(model: LogpModel | nn.Module) -> ModelCost:
    """Floating point operations of a model, from its parameters."""
    causal_lm = model.causal_lm if isinstance(model, LogpModel) else model
    sizes = {name: parameter.numel() for name, parameter in causal_lm.named_parameters()}
    return ModelCost.of_sizes(sizes, causal_lm.config.get_text_config().to_dict())


def amount_of(groups: list[PromptGroup], layout: str) -> np.ndarray:
    """Positions, query-key pairs and predictions of one pass over ``groups``: float [3]."""
    shapes: Shapes = shapes_of(groups)
    return amounts([range(len(groups))], shapes, layout)
