"""Packages of a language model with other parts, such as the vision tower and projector of a vision-language model.

The text model of a package is trained and scored as any language model. The other parts never see an input, since data hold
text only: they are loaded, so that an export is the whole package again, and neither train nor get adapters.

transformers' ``AutoModelForCausalLM`` knows few packages, and makes some of them without their other parts. So a package is
loaded as the class that its config.json names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

__all__ = [
    "auto_class",
    "backbone_of",
    "other_modules",
    "other_parameters",
    "per_layer_inputs",
    "placeholder_ids",
    "shrink_others",
]

_PLACEHOLDER = re.compile(r"(image|video|audio|vision|media)\w*_(id|index)")
_DEPTHS = re.compile(r"(num_\w*layers|\w*_layers|depth|layers)")


def auto_class(config: Any) -> Any:
    """The Auto class of transformers that loads the language model that ``config`` describes, with all its parts.

    A package may also be named by the class of its text model alone (``architectures`` in config.json). That is loaded then.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )

    package = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(config.model_type)
    alone = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    own_code = not type(config).__module__.startswith("transformers.")
    brings_class = own_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if package is None or brings_class or (alone is not None and package not in (config.architectures or ())):
        return AutoModelForCausalLM
    return AutoModelForMultimodalLM


def backbone_of(causal_lm: nn.Module) -> nn.Module:
    """The model without its head; of a package, its text model."""
    base = getattr(causal_lm, causal_lm.base_model_prefix, None)
    if base is not None and not _is_package(causal_lm):
        return base
    return _innermost(causal_lm) or causal_lm.get_decoder()


def other_modules(causal_lm: nn.Module) -> list[str]:
    """Names of the parts of a package beside its text model, each without the parts inside it. Empty if it is no package."""
    if not _is_package(causal_lm):
        return []
    text = _text_modules(causal_lm)
    found: list[str] = []

    def walk(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if child in text:
                continue
            if any(each in text for each in child.modules()):
                walk(child, f"{prefix}{name}.")
            elif next(child.parameters(), None) is not None:
                found.append(f"{prefix}{name}")

    walk(causal_lm, "")
    return found


def other_parameters(causal_lm: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a package that are not its text model's. None if it is no package."""
    if _is_package(causal_lm):
        text = {id(parameter) for module in _text_modules(causal_lm) for parameter in module.parameters(recurse=False)}
        yield from (parameter for parameter in causal_lm.parameters() if id(parameter) not in text)


def per_layer_inputs(backbone: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
    """What ``backbone`` takes of the token ids beside their embeddings: Gemma 3n and 4 have a second table for all layers.

    Without it, transformers leaves the table out (Gemma 3n), or compares each embedding with those of the whole vocabulary
    to find the ids, in a tensor of [positions, vocabulary, hidden] (Gemma 4).
    """
    if not getattr(backbone, "hidden_size_per_layer_input", None):
        return {}
    return {"per_layer_inputs": backbone.get_per_layer_inputs(input_ids)}


def placeholder_ids(causal_lm: nn.Module) -> list[int]:
    """Token ids at which a package expects an image, audio or a video in place of a text's token."""
    entries = vars(causal_lm.config).items() if _is_package(causal_lm) else ()
    return [value for name, value in entries if _PLACEHOLDER.fullmatch(name) and isinstance(value, int)]


def shrink_others(config: Any) -> None:
    """Leave one layer in each part of a package beside its text model, for a copy that computes text only."""
    text = config.get_text_config()
    for part in vars(config).values():
        if part is text or not hasattr(part, "model_type"):
            continue
        for name, value in vars(part).copy().items():
            if _DEPTHS.fullmatch(name) and isinstance(value, int) and value > 1:
                setattr(part, name, 1)


def _is_package(causal_lm: nn.Module) -> bool:
    return causal_lm.config.get_text_config() is not causal_lm.config


def _text_modules(causal_lm: nn.Module) -> set[nn.Module]:
    """All modules of the text model, the embedding and the head."""
    parts = backbone_of(causal_lm), causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    return {module for part in parts if part is not None for module in part.modules()}


def _innermost(causal_lm: nn.Module) -> nn.Module | None:
    """The innermost model that has the embedding and no head. Wrappers around it only put images among the embeddings."""
    from transformers import PreTrainedModel

    embedding, found = causal_lm.get_input_embeddings(), None
    for module in causal_lm.modules():
        if isinstance(module, PreTrainedModel) and module is not causal_lm and module.get_output_embeddings() is None:
            found = module if any(each is embedding for each in module.modules()) else found
    return found
