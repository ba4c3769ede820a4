"""Which weights of a model get LoRA adapters, in the settings of PEFT.

PEFT's own ``all-linear`` depends on the architecture of a mixture: of Qwen3-MoE it reaches the experts and the router, of
GPT-OSS neither, and of DeepSeek-V3 it loses shared experts and dense layers, whose names it takes for the experts' (peft
0.21, ``utils/transformers_weight_conversion.py``). Here it is the same everywhere: all linear layers and all experts, but no
head and no router.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from raydpo.errors import ModelError, reason
from raydpo.model.mixture import Block, expert_blocks, shape_of
from raydpo.model.package import other_modules

if TYPE_CHECKING:
    from raydpo.config import LoraSettings

__all__ = ["adapted_layers", "adapted_model", "told_adapters", "without_false_warnings"]

_TAKEN = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Names of modules that PEFT takes for parts of experts in mixtures that it knows. Their weights are named as parameters."""

_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_OUTPUT = r"(?:.*\.)?out_proj"


def adapted_model(model: nn.Module, lora: LoraSettings, *, quantized: bool, low_cpu_mem_usage: bool = False) -> nn.Module:
    """Put new adapters on ``model``.

    Args:
        quantized: whether linear layers are quantized, also where ``model`` has no weights.
        low_cpu_mem_usage: PEFT's option of this name, for a model on the meta device.

    Raises:
        ModelError: if the settings do not fit the model.
    """
    from peft import LoraConfig, get_peft_model

    names = [name for name, module in model.named_modules() if _has_matrix(module)]
    try:
        config = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            task_type="CAUSAL_LM",
            use_dora=lora.dora,
            use_rslora=lora.rslora,
            **_targets(model, lora, quantized),
        )
        with without_false_warnings():
            adapted = get_peft_model(model, config, low_cpu_mem_usage=low_cpu_mem_usage)
    except ValueError as error:
        if lora.dora and "use_dora" in str(error):
            raise ModelError(
                "model.lora.dora is true, but PEFT cannot decompose adapters on weights of experts that are one tensor; "
                "set model.lora.dora=false, or spare the experts with model.lora.exclude_modules=[experts]"
            ) from error
        layer = re.search(r"Module '(\w+)' is incompatible", str(error))
        fix = f"; spare these layers with model.lora.exclude_modules=[{layer[1]}]" if layer else ""
        raise ModelError(
            f"model.lora.target_modules {lora.target_modules!r} does not fit this model: {reason(error)}{fix}"
        ) from error
    _refuse_unmet(adapted, names, lora)
    return adapted


@contextlib.contextmanager
def without_false_warnings() -> Iterator[None]:
    """Leave out PEFT's warning that patterns of ranks are ignored: it heeds them for tensors, and looks for modules only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        yield


def _targets(model: nn.Module, lora: LoraSettings, quantized: bool) -> dict[str, Any]:
    """Settings of PEFT's ``LoraConfig`` that name the weights of ``model`` which get adapters."""
    chosen = lora.target_modules
    if chosen == "all-linear":
        lora = _without_refused(model, lora)
    settings: dict[str, Any] = {"target_modules": chosen if isinstance(chosen, str) else list(chosen)}
    if lora.target_parameters:
        settings["target_parameters"] = list(lora.target_parameters)
    others = other_modules(model)
    if others:  # an adapter on a part that never sees an input would not train
        settings["exclude_modules"] = "|".join(filter(None, (_below(others), _as_pattern(lora.exclude_modules))))
    elif lora.exclude_modules:
        excluded = lora.exclude_modules
        settings["exclude_modules"] = excluded if isinstance(excluded, str) else list(excluded)
    blocks = expert_blocks(model) if chosen == "all-linear" else []
    routers = {name for block in blocks for name in block.routers}
    if not blocks:
        return settings
    modules = dict(model.named_modules())
    beside = re.compile(_below(others)) if others else None
    linear = [
        name
        for name in _linear_layers(model)
        if name not in routers and not _is_excluded(name, lora) and not (beside and beside.fullmatch(name))
    ]
    tensors = [
        f"{home}.{short}"
        for block in blocks
        if not block.listed
        for home in block.experts
        if not _is_excluded(home, lora)
        for short, parameter in modules[home].named_parameters(recurse=False)
        if len(shape_of(parameter)) == 3
    ]
    if any(not block.listed for block in blocks):
        taken = [name for name in linear if name.rpartition(".")[2] in _TAKEN]
        linear = [name for name in linear if name not in set(taken)]
        if not quantized:  # a quantized weight cannot be an addend
            tensors += [f"{name}.weight" for name in taken]
    parameters = [name for name, _ in model.named_parameters()]
    settings["target_modules"] = _shortened(linear, modules)
    settings["target_parameters"] = sorted({*lora.target_parameters, *_shortened(tensors, parameters)})
    settings.pop("exclude_modules", None)  # heeded above, also for tensors, which PEFT would not
    if any(name.endswith(".gate_up_proj") for name in tensors):
        # Two projections in one tensor: each at rank r, as PEFT has it.
        settings["rank_pattern"] = {r".*\.gate_up_proj": 2 * lora.r}
        settings["alpha_pattern"] = {r".*\.gate_up_proj": 2 * lora.alpha}
    return settings


def _without_refused(model: nn.Module, lora: LoraSettings) -> LoraSettings:
    """``lora`` without the output projections of Mamba's layers in architectures where PEFT refuses them by name, since a
    kernel may take their weight without calling them (peft 0.21, ``tuners/tuners_utils.py``)."""
    if getattr(model.config, "model_type", None) not in _MAMBA:
        return lora
    excluded = lora.exclude_modules
    both = rf"(?:{excluded})|{_OUTPUT}" if isinstance(excluded, str) else (*excluded, "out_proj")
    return lora.model_copy(update={"exclude_modules": both})


def _refuse_unmet(adapted: nn.Module, base_names: Sequence[str], lora: LoraSettings) -> None:
    """Check that PEFT did what the settings say; it only warns where a name matches nothing.

    Args:
        adapted: the PEFT model. base_names: names of the modules with matrices, before the model was adapted.

    Raises:
        ModelError: naming the setting.
    """
    layers = adapted_layers(adapted)
    parameters = [f"{name}.{layer.parameter_name}" for name, layer in layers if hasattr(layer, "parameter_name")]
    for wish in lora.target_parameters:
        if not any(f".{name}".endswith(f".{wish}") for name in parameters):
            examples = sorted({_end(name) for name, _ in adapted.get_base_model().named_parameters() if "lora_" not in name})
            raise ModelError(
                f"model.lora.target_parameters: {wish!r} is no parameter of this model outside its linear layers; give ends "
                f"of names, such as {', '.join(each.replace('base_layer.', '') for each in examples[:3])}"
            )
    for wish in (lora.exclude_modules,) if isinstance(lora.exclude_modules, str) else lora.exclude_modules:
        if wish and not any(_matches(name, wish, isinstance(lora.exclude_modules, str)) for name in base_names):
            raise ModelError(
                f"model.lora.exclude_modules: {wish!r} matches no module with weights; the names look like "
                f"{', '.join(sorted({_end(name) for name in base_names if name})[-3:])}"
            )
    wrong = [name for name, _ in layers if _is_excluded(name, lora)]
    if wrong:
        raise ModelError(
            f"model.lora.exclude_modules spares {wrong[0]}, and PEFT adapts it all the same, since target_modules or "
            "target_parameters name its weights; drop one, or set target_modules to all-linear"
        )


def adapted_layers(adapted: nn.Module) -> list[tuple[str, nn.Module]]:
    """PEFT's layers with adapters, under the names of the modules they are on in the model itself."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    named = adapted.get_base_model().named_modules()
    return [(name.replace(".base_layer", ""), module) for name, module in named if isinstance(module, BaseTunerLayer)]


def told_adapters(adapted: nn.Module) -> str | None:
    """A line that says which parts of a mixture have adapters and which are spared; None for other models."""
    base = adapted.get_base_model()
    blocks = _blocks_below_adapters(base)
    if not blocks:
        return None
    ends = {base.get_output_embeddings(), *(module for module in base.modules() if isinstance(module, nn.Embedding))}
    there = {
        _kind(name.replace(".base_layer", ""), blocks)
        for name, module in base.named_modules()
        if module not in ends and ".lora_" not in name and _has_matrix(module)
    }
    have = {_kind(name, blocks) for name, _ in adapted_layers(adapted)}
    spared = [kind for kind in _ORDER if kind in there - have]
    line = f"adapters: {', '.join(kind for kind in _ORDER if kind in have)}"
    return f"{line}; spared: {', '.join(spared)}" if spared else line


def _has_matrix(module: nn.Module) -> bool:
    return any(len(shape_of(value)) > 1 for value in module.parameters(recurse=False))


_ORDER = ("attention", "feed-forward", "experts", "shared experts", "router", "other layers")


def _kind(name: str, blocks: Sequence[Block]) -> str:
    """What a module is, by the blocks of experts and by its name."""
    part = next((part for block in blocks if (part := block.part(name))), None)
    if part in ("experts", "router"):
        return part
    if re.search(r"attn|attention", name):
        return "attention"
    if part is not None:
        return part
    return "feed-forward" if re.search(r"mlp|feed_forward|ffn", name) else "other layers"


def _blocks_below_adapters(base: nn.Module) -> list[Block]:
    """The blocks of a model with adapters, with the names that they have without."""
    return [
        Block(
            *(block.name.replace(".base_layer", ""), block.module),
            *(tuple(each.replace(".base_layer", "") for each in names) for names in (block.experts, block.routers)),
            block.listed,
        )
        for block in expert_blocks(base)
    ]


def _linear_layers(model: nn.Module) -> list[str]:
    """Linear layers but the head, as PEFT's ``all-linear`` has them."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head]


def _is_excluded(name: str, lora: LoraSettings) -> bool:
    wishes = lora.exclude_modules
    if isinstance(wishes, str):
        return _matches(name, wishes, True)
    return any(_matches(name, wish, False) for wish in wishes)


def _below(modules: Sequence[str]) -> str:
    """A regular expression for the names of ``modules`` and of all inside them."""
    return rf"({'|'.join(map(re.escape, modules))})(\..*)?"


def _as_pattern(wishes: str | Sequence[str]) -> str:
    """``exclude_modules`` as one regular expression for whole names; empty if there is nothing to exclude."""
    if isinstance(wishes, str) or not wishes:
        return f"({wishes})" if wishes else ""
    return rf"(.*\.)?({'|'.join(map(re.escape, wishes))})"


def _matches(name: str, wish: str, pattern: bool) -> bool:
    """PEFT's rule for ``exclude_modules``."""
    return bool(re.fullmatch(wish, name)) if pattern else f".{name}".endswith(f".{wish}")


def _end(name: str) -> str:
    """A name without its layer."""
    return re.sub(r"^.*?\.\d+\.", "", name)


def _shortened(names: Iterable[str], among: Iterable[str]) -> list[str]:
    """Ends of names that match ``names`` and nothing else in ``among``; whole names where there is no such end."""
    chosen = list(names)
    known = set(chosen)
    ends = {_end(name) for name in chosen}
    unclear = {end for other in among if other not in known for end in _tails(other) & ends}
    return sorted({name if (end := _end(name)) in unclear else end for name in chosen})


def _tails(name: str) -> set[str]:
    """A name, and its ends from each of its parts on."""
    parts = name.split(".")
    return {".".join(parts[at:]) for at in range(len(parts))}
