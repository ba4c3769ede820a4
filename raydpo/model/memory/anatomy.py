"""The parameters of a model by name and layer, and the widths of its layers, from its config.json.

transformers builds the model on torch's meta device, where tensors have a shape and no memory. So every architecture that
transformers knows is supported, and no weights are read.
"""

from __future__ import annotations

import json
import math
import re
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raydpo.errors import FilesError, reason
from raydpo.model.cost import ModelCost, first
from raydpo.model.head import SOFTCAPS
from raydpo.model.mixture import expert_blocks
from raydpo.model.package import auto_class, other_parameters
from raydpo.model.router import lacks_router_loss

__all__ = ["Anatomy", "Weight", "model_cost"]

EMBEDDING, HEAD, REST, OTHER = -1, -2, -3, -4
"""Places of weights outside the layers. REST: the last norm and anything else. OTHER: parts of a package beside its text
model (``model.package``), such as a vision tower: they are loaded, and compute nothing."""


@dataclass(frozen=True)
class Weight:
    """One parameter tensor.

    Attributes:
        place: number of its decoder layer, or EMBEDDING, HEAD, REST, OTHER.
        linear: whether it is the matrix of a linear layer other than the head. These are quantized.
    """

    name: str
    shape: tuple[int, ...]
    place: int
    linear: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def module(self) -> str:
        """Name of its module."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Sizes that decide how much memory a training needs.

    Attributes:
        weights: all parameters. A tied head counts once, as the embedding.
        layers, hidden, vocabulary: number of layers, hidden width, vocabulary size.
        query_width, key_width: heads times head size, of queries and of keys.
        inner: width of the feed-forward part for one token; in a mixture, of its active experts together.
        experts_used: experts of a mixture that compute a token; 0 without a mixture.
        routed: router logits of a position, in all layers; 0 for a model without router loss.
        gated: whether that part multiplies two projections (such as SwiGLU).
        tied: whether head and embedding share one weight.
        softcap: whether logits are capped, which needs a second chunk of them.
    """

    weights: tuple[Weight, ...]
    layers: int
    hidden: int
    vocabulary: int
    query_width: int
    key_width: int
    inner: int
    gated: bool
    tied: bool
    softcap: bool = False
    experts_used: int = 0
    routed: int = 0
    source: tuple[type, Any] | None = field(default=None, repr=False, compare=False)

    def empty(self) -> nn.Module:
        """The model without weights, on the meta device."""
        assert self.source is not None
        kind, config = self.source
        with torch.device("meta"):
            return kind(deepcopy(config))

    @property
    def parameters(self) -> int:
        return sum(weight.numel for weight in self.weights)

    @classmethod
    def of(cls, directory: str | Path, trust_remote_code: bool = False) -> Anatomy:
        """Read from a directory with a config.json.

        Raises:
            FilesError: if there is no config.json, or it does not describe a causal language model.
        """
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(str(directory), trust_remote_code=trust_remote_code)
            with torch.device("meta"):
                model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            raise FilesError(f"cannot tell the sizes of the model in {directory}: {reason(error)}") from None
        return cls.of_model(model)

    @classmethod
    def of_loaded(cls, model: Any) -> Anatomy:
        """The same for a transformers causal LM that is loaded: its weights may be quantized, partitioned or adapted."""
        with torch.device("meta"):
            return cls.of_model(type(model)(deepcopy(model.config)))

    @classmethod
    def of_model(cls, model: Any) -> Anatomy:
        """Read from a transformers causal LM, on any device."""

        def read(*names: str, default: int | None = None) -> int:
            return first(lambda name: getattr(config, name, None), *names, default=default)

        config = model.config.get_text_config()
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        tied = head is not None and (
            head.weight is embedding.weight or bool(getattr(model.config, "tie_word_embeddings", False))
        )
        modules = {name: module for name, module in model.named_modules() if module is not head}
        linear = {f"{name}.weight" for name, module in modules.items() if isinstance(module, nn.Linear)}
        beside = {id(parameter) for parameter in other_parameters(model)}
        weights = []
        for name, parameter in model.named_parameters():
            owner = model.get_submodule(name.rpartition(".")[0])
            if owner is head and tied:
                continue
            place = EMBEDDING if owner is embedding else HEAD if owner is head else _layer(name)
            place = OTHER if id(parameter) in beside else place
            weights.append(Weight(name, tuple(parameter.shape), place, name in linear))
        heads = read("num_attention_heads", "n_head", "n_heads", default=0)
        hidden = read("hidden_size", "n_embd", "d_model")
        size = _head_size(config) or hidden // max(1, heads)
        inners = "moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"
        inner = read(*inners, default=4 * hidden)
        experts_used = routed = 0
        if blocks := expert_blocks(model):
            if lacks_router_loss(model.config) is None:
                routed = sum(_experts_scored_by(model.get_submodule(block.routers[0])) for block in blocks)
            experts_used = read("num_experts_per_tok", "top_k", "moe_k", default=1)
            inner *= experts_used
        return cls(
            weights=tuple(weights),
            layers=1 + max((weight.place for weight in weights), default=-1),
            hidden=hidden,
            vocabulary=config.vocab_size,
            query_width=heads * size,
            key_width=read("num_key_value_heads", default=heads) * size,
            inner=inner,
            gated=any(re.search(r"gate_proj|gate_up|\.w3\.", each.name) for each in weights if each.place != OTHER),
            tied=tied,
            softcap=any(getattr(config, name, None) for name in SOFTCAPS),
            experts_used=experts_used,
            routed=routed,
            source=(type(model), model.config),
        )


def model_cost(directory: str | Path, trust_remote_code: bool = False) -> ModelCost:
    """Compute cost of the model in ``directory``, from the headers of its weights or, without weights, from config.json.

    Raises:
        ModelError: if there is neither.
    """
    if any(Path(directory).glob("*.safetensors")):
        return ModelCost.of(directory)
    weights = Anatomy.of(directory, trust_remote_code).weights
    config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    sizes, others = {weight.name: weight.numel for weight in weights}, [each.name for each in weights if each.place == OTHER]
    return ModelCost.of_sizes(sizes, config.get("text_config", config), others)


def _head_size(config: Any) -> int | None:
    """The head size of a text model's configuration; the largest, where layers differ (Gemma 4)."""
    layers = getattr(config, "per_layer_config", None)
    return max((getattr(layer, "head_dim", None) or 0 for layer in layers or [config]), default=0) or None


def _experts_scored_by(router: nn.Module) -> int:
    """Rows of its matrix: a router has fewer experts than inputs."""
    return next(min(weight.shape) for weight in router.parameters(recurse=False) if weight.dim() == 2)


def _layer(name: str) -> int:
    found = re.search(r"\.(?:layers|h|blocks|block)\.(\d+)\.", name)
    return int(found[1]) if found else REST
