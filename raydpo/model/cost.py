"""Floating point operations of a model, from its files. Loads neither torch nor weights."""

from __future__ import annotations

import math
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
        hidden, vocabulary, layers: hidden width, vocabulary size, number of layers.
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
        sizes = {name: math.prod(tensor["shape"]) for name, tensor in tensors.items()}
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
        heads = first(config.get, "num_attention_heads", "n_head", "n_heads")
        text = {name: size for name, size in sizes.items() if name not in others}
        tables = sum(size for name, size in text.items() if any(part in name for part in _TABLES))
        experts = sum(size for name, size in text.items() if ".experts." in name)
        count = config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts") or 1
        idle = experts * (1 - min(config.get("num_experts_per_tok") or count, count) / count)
        return cls(
            parameters=sum(sizes.values()),
            active=int(sum(text.values()) - tables - idle),
            hidden=hidden,
            vocabulary=vocabulary,
            layers=first(config.get, "num_hidden_layers", "n_layer", "n_layers"),
            attention_width=heads * (config.get("head_dim") or hidden // heads),
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
    "embed_tokens.", "wte.", "wpe.", "word_embeddings.", "embed_in.", "embed_positions.", "lm_head.", "embed_out.",
    "output_embeddings.",
)  # fmt: skip


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
