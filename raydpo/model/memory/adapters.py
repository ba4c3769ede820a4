"""Adapters that PEFT would put on a model, counted on torch's meta device: PEFT itself makes them there, without memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from raydpo.config import LoraSettings
from raydpo.errors import ConfigError, reason
from raydpo.model.memory.anatomy import REST, Anatomy, Weight

__all__ = ["Adapter", "Adapters", "Trained", "adapters_of"]


class Trained(Protocol):
    """What of a policy trains, and how the rest is stored: ``config.ModelConfig`` or ``policy.engine.PolicySpec``."""

    @property
    def lora(self) -> LoraSettings | None: ...

    @property
    def adapter(self) -> str | None: ...

    @property
    def quantization(self) -> str | None: ...

    @property
    def freeze(self) -> tuple[str, ...]: ...

    @property
    def fused(self) -> bool: ...

    @property
    def adapts(self) -> bool: ...


@dataclass(frozen=True)
class Adapter:
    """The adapter of one weight.

    Attributes:
        weight: what it changes. rank: of its low-rank product; 0 if it is no such product.
        dora: whether it has a magnitude of its own.
        folded: whether each pass computes the changed weight as a whole, as for experts that are one tensor.
    """

    weight: Weight
    rank: int
    dora: bool = False
    folded: bool = False

    @property
    def name(self) -> str:
        """Last part of the name of the adapted module."""
        return self.weight.module.rpartition(".")[2]


@dataclass(frozen=True)
class Adapters:
    """All adapters of a model.

    Attributes:
        on: those of single weights, in the order of the model.
        trained: place and numbers of each parameter that trains, in the model's order.
        line: which parts of a mixture they are on, see ``model.targets.told_adapters``.
    """

    on: tuple[Adapter, ...]
    trained: tuple[tuple[int, int], ...]
    line: str | None = None


def adapters_of(anatomy: Anatomy, model: Trained) -> Adapters:
    """What ``model.lora`` or ``model.adapter`` puts on the model of ``anatomy``.

    Raises:
        ModelError: if ``model.lora`` does not fit the model.
        ConfigError: if ``model.adapter`` has no adapter_config.json that PEFT can use.
    """
    from raydpo.model.targets import adapted_layers, adapted_model, told_adapters

    with torch.device("meta"):
        if model.lora is not None:
            quantized = model.quantization is not None
            adapted = adapted_model(anatomy.empty(), model.lora, quantized=quantized, low_cpu_mem_usage=True)
        else:
            adapted = _with_existing(anatomy.empty(), model.adapter)
    weights = {weight.name: weight for weight in anatomy.weights}
    found = [_adapter(name, layer, weights) for name, layer in adapted_layers(adapted)]
    places = {name.rpartition(".")[0]: weight.place for name, weight in weights.items()}
    trained = tuple(
        (_place(name, places), value.numel()) for name, value in adapted.named_parameters() if value.requires_grad
    )
    return Adapters(tuple(each for each in found if each is not None), trained, told_adapters(adapted))


def _with_existing(empty: nn.Module, directory: str | None) -> nn.Module:
    from peft import PeftConfig, get_peft_model

    try:
        config = PeftConfig.from_pretrained(str(directory))
        config.inference_mode = False
        return get_peft_model(empty, config, low_cpu_mem_usage=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"model.adapter {directory!r} has no adapter_config.json of PEFT that fits this model, which the memory depends "
            f"on: {reason(error)}"
        ) from None


def _adapter(name: str, layer: Any, weights: dict[str, Weight]) -> Adapter | None:
    parameter = getattr(layer, "parameter_name", "weight")
    weight = weights.get(f"{name}.{parameter}")
    if weight is None:  # such as a tied head, which the anatomy counts as the embedding
        return None
    ranks, magnitudes = getattr(layer, "r", {}), getattr(layer, "lora_magnitude_vector", {})
    rank = next(iter(ranks.values()), 0) if isinstance(ranks, dict) else 0
    return Adapter(weight, rank, dora=bool(len(magnitudes)), folded=len(weight.shape) == 3)


def _place(name: str, places: dict[str, int]) -> int:
    """Place of the weight that an adapter's parameter belongs to."""
    home = name.removeprefix("base_model.model.").replace(".base_layer", "")
    while home and home not in places:
        home = home.rpartition(".")[0]
    return places.get(home, REST)
