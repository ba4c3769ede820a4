"""Quantized weights: the precision that their layers compute in, and checks of the names in files.

The checks also concern weights that are stored one by one. They read headers alone and compare only names, since the stored
tensors have other shapes. The packages that compute with quantized weights are not needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raydpo.errors import FilesError, some_of
from raydpo.model.limits import OTHER_TOWERS

__all__ = [
    "certain_gaps",
    "compute_under_autocast",
    "is_known",
    "plain_tensors",
    "refuse_lack_of_layers",
    "refuse_parts_of_experts",
    "refuse_plain_weights",
    "take_quantization",
]

_KNOWN = ("awq", "auto-round", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", "fp8", "gptq", "mxfp4")
_PACKED = re.compile(r"\.(?:qweight|weight_packed)$|_blocks$")
"""End of a name that holds the values of a weight under another name than the plain one."""
_BESIDE = re.compile(
    r"\.weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+)$"
    r"|\.(?:SCB|weight_format|qzeros|scales|g_idx|perm)$"
    r"|\.(?:weight|input|output|k|v|q|kv)_(?:global_)?(?:scale|scale_inv|scale_ub|zero_point|shape|g_idx)$"
    r"|_scales$|\.activation_scale(?:_inv)?$"
)
"""End of a name that belongs to a quantized weight, such as its scales."""

_EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..+\.weight)$")


def compute_under_autocast(model: nn.Module) -> None:
    """Make quantized layers of ``model`` compute in autocast's precision, as plain linear layers do. Safe to call again.

    Autocast casts the operations of ``nn.Linear``. A quantized layer has its own, and returns the precision of its input
    (bitsandbytes 0.50, nn/modules.py; GPTQ and AWQ likewise), which is float32 on a float32 residual stream. Attention and
    the gated product would then be float32, twice as large, and without a variable-length kernel.
    """
    for module in model.modules():
        if _is_quantized_layer(module) and _cast_input not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_cast_input)


def _is_quantized_layer(module: nn.Module) -> bool:
    """Whether it is a linear layer with weights of bitsandbytes, or whose weights are no floating-point numbers."""
    if not hasattr(module, "in_features") or any(True for _ in module.children()):
        return False
    stored = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return type(module).__module__.startswith("bitsandbytes.") or any(
        tensor.dim() > 1 and (tensor.element_size() == 1 or not tensor.is_floating_point()) for tensor in stored
    )


def _cast_input(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not inputs or not torch.is_autocast_enabled(inputs[0].device.type):
        return None
    return inputs[0].to(torch.get_autocast_dtype(inputs[0].device.type)), *inputs[1:]


def take_quantization(config: Any, entries: Mapping[str, Any]) -> dict[str, Any] | None:
    """Remove from ``config`` how its weights are quantized, so that it describes the plain model.

    Args:
        config: transformers' configuration.
        entries: entries of config.json.

    Returns:
        What was removed; None if nothing is quantized.
    """
    found = entries.get("quantization_config") or entries.get("compression_config")
    for part in (config, config.get_text_config()):
        own = getattr(part, "quantization_config", None)
        if own is not None:
            found = found or (own if isinstance(own, dict) else own.to_dict())
            del part.quantization_config
    return found


def is_known(quantization: Mapping[str, Any]) -> bool:
    """Whether the names of a format are known. Of others, only weights that no format quantizes are checked."""
    return quantization.get("quant_method", "bitsandbytes") in _KNOWN


def plain_tensors(
    empty: nn.Module, headers: Mapping[str, Mapping[str, Any]], quantization: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The tensors of the plain model that the files hold in some form, on the meta device.

    Args:
        empty: the plain model without weights.
        headers: headers of the files.
    """
    wanted = {name: tensor for name, tensor in empty.state_dict().items() if tensor.is_floating_point()}
    if not is_known(quantization):
        # Norms are never quantized, and an embedding has some name. All else may have any.
        norms = {
            f"{name}.{each}"
            for name, module in empty.named_modules()
            if "norm" in type(module).__name__.lower()
            for each, _ in module.named_parameters(recurse=False)
        }
        if not any(re.search("emb|wte|tok", name) for name in headers):
            embedding = empty.get_input_embeddings().weight
            norms |= {name for name, tensor in empty.named_parameters() if tensor is embedding}
        found = {name: list(tensor.shape) for name, tensor in wanted.items() if name not in norms}
        return _made(found | {name: tensor["shape"] for name, tensor in headers.items() if len(tensor["shape"]) == 1})
    packed = _packed(headers)
    plain: dict[str, list[int]] = {}
    for stored, tensor in headers.items():
        if not _BESIDE.search(stored):
            name = _plain_name(stored)
            shape = tensor["shape"]
            if name in packed:
                shape = list(wanted[name].shape) if name in wanted else [1, 1]
            plain[name] = shape
    return _made(plain)


def certain_gaps(
    found: Mapping[str, Any], headers: Mapping[str, Mapping[str, Any]], quantization: Mapping[str, Any]
) -> dict[str, Any]:
    """transformers' loading info for ``plain_tensors``, without what may only be stored in a way that is not known here."""
    packed = _packed(headers)
    own = (".weight", ".bias", ".qweight", ".weight_packed")
    unknown = {name.rpartition(".")[0] for name in headers if not _BESIDE.search(name) and not name.endswith(own)}
    return dict(
        found,
        missing_keys=[name for name in found["missing_keys"] if name.rpartition(".")[0] not in unknown],
        # Shapes are known of weights that are not quantized, and the number of experts is the first of three sizes.
        mismatched_keys=[
            (name, stored, wanted)
            for name, stored, wanted in found["mismatched_keys"]
            if (name in headers and name not in packed) or (len(wanted) == len(stored) == 3 and wanted[0] != stored[0])
        ],
        unexpected_keys=[name for name in found["unexpected_keys"] if is_known(quantization)],
    )


def refuse_lack_of_layers(path: str | Path, empty: nn.Module, names: Iterable[str]) -> None:
    """Refuse files without any weight of a layer, if they have weights of others, whatever the format is.

    Raises:
        FilesError: naming the layers.
    """
    count, names = getattr(empty.config.get_text_config(), "num_hidden_layers", None), list(names)
    for stack, layers in empty.named_modules():
        if not isinstance(layers, nn.ModuleList) or len(layers) != count or OTHER_TOWERS.search(stack):
            continue
        pattern = re.compile(rf"(?:^|\.){re.escape(stack.rsplit('.', 1)[-1])}\.(\d+)\.")
        there = {int(found[1]) for name in names if not OTHER_TOWERS.search(name) and (found := pattern.search(name))}
        lacking = [
            f"{stack}.{number}"
            for number, layer in enumerate(layers)
            if number not in there and any(True for _ in layer.parameters())
        ]
        if there and lacking:
            raise FilesError(
                f"the files of {path} lack all weights of {len(lacking):,} of its {count:,} layers ({some_of(lacking)}), "
                "which would be random numbers; fetch or save the model again"
            )


def refuse_plain_weights(path: str | Path, names: Iterable[str], quantization: Mapping[str, Any]) -> None:
    """Refuse files without any quantized weight under a format that has names of its own for all of them.

    Raises:
        FilesError: naming the format.
    """
    method = quantization.get("quant_method")
    if method in ("awq", "gptq") and not any(name.endswith(".qweight") for name in names):
        raise FilesError(
            f"{path}/config.json says that the weights are quantized ({method}), but its files hold no qweight; give the "
            "config.json that belongs to the weights, or take quantization_config out of it"
        )


def refuse_parts_of_experts(path: str | Path, names: Iterable[str]) -> None:
    """Refuse files that lack one weight of an expert that has others, if experts are stored one by one.

    Raises:
        FilesError: naming the weights.
    """
    experts: dict[str, dict[str, set[str]]] = {}
    for name in names:
        found = None if _BESIDE.search(name) else _EXPERT.match(_plain_name(name))
        if found:
            experts.setdefault(found[1], {}).setdefault(found[3], set()).add(found[2])
    for place, parts in experts.items():
        every = set().union(*parts.values())
        lacking = [f"{place}{number}{part}" for part, there in parts.items() for number in sorted(every - there, key=int)]
        if lacking:
            raise FilesError(
                f"the files of {path} lack {some_of(lacking)}, of experts that they have other weights of; fetch or save "
                "the model again"
            )


def _packed(headers: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Plain names of weights whose stored shape or type is another one."""
    beside = {_BESIDE.sub("", name) for name in headers if _BESIDE.search(name)}
    named = {_plain_name(name) for name in headers if _PACKED.search(name)}
    small = {name for name, tensor in headers.items() if tensor["dtype"] not in ("F32", "F16", "BF16")}
    return named | {f"{name}.weight" for name in beside} | {_plain_name(name) for name in small}


def _plain_name(stored: str) -> str:
    return _PACKED.sub("" if stored.endswith("_blocks") else ".weight", stored)


def _made(shapes: Mapping[str, list[int]]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, dtype=torch.float32, device="meta") for name, shape in shapes.items()}
