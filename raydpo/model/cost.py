"""Floating point operations of a model, from its files. Loads neither torch nor weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydpo.data.shapes import PositionCost
from raydpo.errors import FilesError
from raydpo.model.files import model_files, read_header
from raydpo.model.limits import OTHER_TOWERS, PARTS

__all__ = ["ModelCost", "first"]


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """Sizes that decide the floating point operations (FLOPs) of a forward pass.

    Attributes:
        parameters: all parameters.
        active: parameters that multiply each token: without embedding and head, without parts of a package beside its text
            model, and in a mixture only the active experts.
        hidden, vocabulary: hidden width, vocabulary size.
        layers: number of layers with attention.
        attention_width: query heads times head size.
    """

    parameters: int
    active: int
    hidden: int
    vocabulary: int
    layers: int
    attention_width: int

    @classmethod
    def of(cls, directory: str | Path) -> ModelCost:
        """Read config.json and the headers of the safetensors files in a Hugging Face model directory.

        Raises:
            FilesError: if the directory lacks either.
        """
        files = model_files(directory)
        tensors: dict[str, Any] = {}
        for file in files.weights:
            tensors |= read_header(file)[1]
        sizes = {name: _numbers(name, tensor) for name, tensor in tensors.items()}
        # Older packages have the entries of their text model beside vision_config.
        packaged = any(isinstance(files.config.get(name), dict) for name in PARTS)
        others = [name for name in sizes if packaged and OTHER_TOWERS.search(name)]
        return cls.of_sizes(sizes, files.config.get("text_config") or files.config, others)

    @classmethod
    def of_sizes(cls, sizes: dict[str, int], config: dict[str, Any], others: Collection[str] = ()) -> ModelCost:
        """Make it from the number of values of each tensor and the entries of config.json.

        Args:
            others: names of tensors of a package that are not of its text model, whose entries ``config`` has.
        """
        hidden = first(config.get, "hidden_size", "n_embd", "d_model")
        vocabulary = first(config.get, "vocab_size")
        attending = _attention_layers(config)
        heads = first(config.get, "num_attention_heads", "n_head", "n_heads", default=None if attending else 0)
        text = {name: size for name, size in sizes.items() if name not in others}
        layers = first(config.get, "num_hidden_layers", "n_layer", "n_layers", "num_blocks")
        # Layers behind the last one predict further tokens (DeepSeek-V3, Qwen3-Next), and transformers leaves them out.
        numbers = {name: re.search(r"^mtp\.|\.layers\.(\d+)\.", name) for name in text}
        beyond = {name for name, found in numbers.items() if found and (found[1] is None or int(found[1]) >= layers)}
        text = {name: size for name, size in text.items() if name not in beyond}
        tables = sum(size for name, size in text.items() if any(part in name for part in _TABLES))
        experts = sum(size for name, size in text.items() if _EXPERTS.search(name))
        mixture = config | (config.get("ffn_config") or {})
        count = first(mixture.get, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", default=1)
        used = first(mixture.get, "num_experts_per_tok", "moe_k", "moe_top_k", "top_k_experts", default=count)
        idle = experts * (1 - min(used, count) / count) if count else 0
        size = config.get("head_dim") or hidden // max(1, heads)
        if config.get("v_head_dim") and config.get("qk_nope_head_dim"):  # latent attention, whose values are narrower
            size = (config["qk_nope_head_dim"] + config["qk_rope_head_dim"] + config["v_head_dim"]) // 2
        return cls(
            parameters=sum(size for name, size in sizes.items() if name not in beyond),
            active=int(sum(text.values()) - tables - idle),
            hidden=hidden,
            vocabulary=vocabulary,
            layers=attending,
            attention_width=heads * size,
        )

    @property
    def work(self) -> PositionCost:
        """Costs relative to those of one token position."""
        position = self.position_flops
        return PositionCost(attention=self.look_flops / position, head=self.prediction_flops / position)

    @property
    def position_flops(self) -> float:
        """FLOPs of one token position in a forward pass, without attention."""
        return 2.0 * self.active

    @property
    def look_flops(self) -> float:
        """FLOPs for one query to attend to one key, summed over layers: one product for the score, one for the value."""
        return 4.0 * self.layers * self.attention_width

    @property
    def prediction_flops(self) -> float:
        """FLOPs of the vocabulary projection of one predicted token."""
        return 2.0 * self.vocabulary * self.hidden


_TABLES = (
    "embed_tokens.", "wte.", "wpe.", "embeddings.", "embed_in.", "embed_positions.", "lm_head.", "embed_out.",
)  # fmt: skip


_EXPERTS = re.compile(r"\.experts\.|(?<!shared_mlp)\.(?:input|output)_linear\.")
"""Tensors of experts; the second form is that of Granite and JetMoE."""


def _numbers(name: str, tensor: dict[str, Any]) -> int:
    """Values of a stored tensor. MXFP4 has two of them in a byte, and scales beside them."""
    if tensor["dtype"] == "U8" and name.endswith(("_blocks", "_scales")):
        return 2 * math.prod(tensor["shape"]) if name.endswith("_blocks") else 0
    return math.prod(tensor["shape"])


def _attention_layers(config: dict[str, Any]) -> int:
    """Number of layers with attention, from the entries of config.json. All layers, unless an entry tells their kinds.

    Raises:
        FilesError: if there is no number of layers.
    """
    kinds = config.get("layer_types") or config.get("layers_block_type")
    if kinds:
        return sum("linear" not in kind and ("attention" in kind or kind == "hybrid") for kind in kinds)
    layers = first(config.get, "num_hidden_layers", "n_layer", "n_layers", "num_blocks")
    if not any(isinstance(config.get(name), int) for name in ("num_attention_heads", "n_head", "n_heads")):
        return 0
    if pattern := config.get("block_types"):  # RecurrentGemma's, repeated over the layers
        return sum("attention" in pattern[layer % len(pattern)] for layer in range(layers))
    if (indices := config.get("attn_layer_indices")) is not None:
        return len(indices)
    if period := config.get("attn_layer_period"):
        return len(range(config.get("attn_layer_offset", 0), layers, period))
    return layers


def first(read: Callable[[str], Any], *names: str, default: int | None = None) -> int:
    """The first of ``names`` that ``read`` gives as an integer, else ``default``.

    Raises:
        FilesError: if there is neither.
    """
    for name in names:
        if isinstance(value := read(name), int):
            return value
    if default is None:
        raise FilesError(
            f"config.json has {'none of ' if len(names) > 1 else 'no '}{', '.join(names)}, which raydpo needs to know the "
            "model's size; is this a causal language model?"
        )
    return default
