"""Loading causal language models: safetensors only, dropout off, adapters added."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from raydpo.errors import ModelError, reason
from raydpo.model.files import model_files
from raydpo.model.package import auto_class, other_parameters
from raydpo.model.rotary import fix_rotary
from raydpo.model.sliced import Progress, load_parts
from raydpo.model.weights import load_adapter, refuse_foreign_head, refuse_gaps

if TYPE_CHECKING:
    from raydpo.config import LoraSettings

__all__ = ["add_lora", "dropout_settings", "freeze_matching", "load_causal_lm", "restore_dropout", "torch_dtype"]


def torch_dtype(name: str) -> torch.dtype:
    """``"float32"`` or ``"bfloat16"`` as torch's dtype."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def load_causal_lm(
    path: str | Path,
    dtype: str,
    *,
    rope_length: int | None,
    adapter: str | None = None,
    quantization: str | None = None,
    train_adapter: bool = False,
    trust_remote_code: bool = False,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> nn.Module:
    """Load a causal LM in evaluation mode, without dropout. An adapter is not merged: the result is then a PEFT model.

    Args:
        path: local directory with config.json and safetensors weights (see ``reference.identity.resolve_model``).
        dtype: ``float32`` or ``bfloat16``, the precision of weights and compute.
        rope_length: see ``model.rotary.rope_length``. None is refused if the model's rotary frequencies depend on a length.
        quantization: ``4bit``, ``8bit`` or None, see ``config.ModelConfig.quantization``.
        train_adapter: leave the adapter's weights trainable.
        progress: see ``model.sliced.Progress``.
        note: called with a line for the user if weights for ZeRO-3 are not read in parts, see ``model.sliced``.

    Raises:
        ModelError: if the directory is missing, holds pickled weights or no causal LM, or if weights of the model or the
            adapter are missing.
    """
    from transformers import AutoConfig
    from transformers.integrations import is_deepspeed_zero3_enabled

    path, device = str(path), torch.device(device)
    # Refuses a directory from which other files would be loaded than were hashed.
    files = model_files(path, trust_remote_code)
    refuse_foreign_head(files)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(f"{path} is an encoder-decoder model; raydpo trains decoder-only (causal) language models")
        for key in dropout_settings(config.to_dict()):
            setattr(config, key, 0.0)
        how: dict[str, Any] = {}
        if quantization is not None:
            how["quantization_config"] = _quantized(quantization, dtype)
        # Weight by weight to the device: weights stored in another precision would first be converted in the host's memory,
        # a whole model for each worker of a machine. Under ZeRO-3, DeepSpeed partitions them instead.
        if quantization is not None or (device.type != "cpu" and not is_deepspeed_zero3_enabled()):
            how["device_map"] = {"": device}
        from_pretrained = functools.partial(
            auto_class(config).from_pretrained,
            path,
            config=config,
            dtype=torch_dtype(dtype),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **how,
        )
        check = functools.partial(refuse_gaps, path)
        if is_deepspeed_zero3_enabled() and quantization is None:
            model = load_parts(from_pretrained, check=check, progress=progress, note=note)
        else:
            with _counted(files.weights, progress):
                model, found = from_pretrained()
            check(found)
        fix_rotary(model, rope_length)
        plain = model
        if adapter is not None:
            own = {id(parameter) for parameter in model.parameters()}
            with _whole_biases(model):
                model = load_adapter(model, adapter, train=train_adapter)
            # Only the adapter is converted. transformers keeps some tensors of the model in float32.
            for parameter in model.parameters():
                if id(parameter) not in own:
                    parameter.data = parameter.data.to(torch_dtype(dtype))
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        if isinstance(error, ModelError) or (isinstance(error, RuntimeError) and not _of_weights(error)):
            raise
        what = f"{path!r} with adapter {adapter!r}" if adapter else repr(path)
        raise ModelError(f"cannot load the model {what}: {reason(error)}") from error
    for parameter in other_parameters(plain):
        parameter.requires_grad_(False)
    for module in model.modules():  # modules may have a probability that is not in the configuration
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.eval()
    return model if quantization is not None else model.to(device)  # bitsandbytes loads to the device itself


@contextlib.contextmanager
def _counted(weights: Sequence[Path], progress: Progress | None) -> Iterator[None]:
    """Call ``progress`` while transformers loads whole weights, by their number."""
    if progress is None:
        yield
        return
    from transformers.utils import logging

    total = sum(file.stat().st_size for file in weights)

    def hook(make: Callable[..., Any], args: tuple[Any, ...], how: dict[str, Any]) -> Any:
        if how.get("desc") != "Loading weights" or not args:
            return make(*args, **how)
        every = list(args[0])

        def counted() -> Iterator[Any]:
            for number, each in enumerate(every):
                progress(total * number // len(every), total)
                yield each
            progress(total, total)

        return make(counted(), *args[1:], **how | {"total": len(every)})

    before = logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


@contextlib.contextmanager
def _whole_biases(model: nn.Module) -> Iterator[None]:
    """Gather biases under ZeRO-3 while an adapter is loaded, since PEFT may copy biases into the model's."""
    shared = [
        parameter for name, parameter in model.named_parameters() if name.endswith("bias") and hasattr(parameter, "ds_id")
    ]
    if not shared:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(shared, modifier_rank=0):
        yield


def _of_weights(error: RuntimeError) -> bool:
    """Whether transformers reports weights that do not fit. Other errors come from memory or devices."""
    return "loading state_dict" in str(error) or "conversion of the weights" in str(error)


def _quantized(quantization: str, dtype: str) -> Any:
    from transformers import BitsAndBytesConfig

    if quantization == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch_dtype(dtype),
        )
    # With a threshold, int8 computes some columns in 16 bits, chosen by all tokens of the batch. Rows would depend on
    # other rows.
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)


def freeze_matching(model: nn.Module, patterns: Sequence[str]) -> None:
    """Turn off the gradient of parameters whose name matches one of the regular expressions (``re.search``).

    Raises:
        ModelError: if an expression matches nothing, or nothing is left to train.
    """
    names = dict(model.named_parameters())
    for pattern in patterns:
        found = [name for name in names if re.search(pattern, name)]
        if not found:
            raise ModelError(
                f"model.freeze: {pattern!r} matches no parameter; the names look like {', '.join(list(names)[:3])}"
            )
        for name in found:
            names[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in names.values()):
        raise ModelError(f"model.freeze {', '.join(patterns)} leaves nothing to train")


def add_lora(model: nn.Module, lora: LoraSettings, seed: int) -> nn.Module:
    """Add new trainable adapters to ``model`` and freeze everything else. Their initial output is zero.

    Raises:
        ModelError: if ``lora`` does not fit the model, such as names that match nothing.
    """
    from raydpo.model.adapter import fuse_adapters
    from raydpo.model.targets import adapted_model

    quantized = any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
    torch.manual_seed(seed)
    return fuse_adapters(adapted_model(model, lora, quantized=quantized))


def dropout_settings(config: dict[str, Any]) -> dict[str, float]:
    """Dropout probabilities above 0 in a model configuration, such as resid_pdrop and attention_dropout."""
    return {
        key: value
        for key, value in config.items()
        if "drop" in key and isinstance(value, float) and value > 0 and not key.startswith("_")
    }


def restore_dropout(config_file: Path, original: dict[str, float]) -> None:
    """Write the original dropout probabilities back to a saved config.json; training only turned them off."""
    if original:
        tree = json.loads(config_file.read_text(encoding="utf-8"))
        config_file.write_text(json.dumps(tree | original, indent=2, sort_keys=True) + "\n", encoding="utf-8")
