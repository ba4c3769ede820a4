"""Checks that a model's files hold every weight of its architecture.

A missing weight would be initialised with random numbers, different ones in each process. Before a run starts,
``check_weights`` reads only the headers of the files and compares them with a model on the meta device, in about a second.
At loading, ``refuse_gaps`` and ``load_adapter`` check what transformers and PEFT report.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raydpo.errors import FilesError, one_line
from raydpo.model.files import adapter_files, model_files, read_header

__all__ = ["ADAPTER_NAME", "check_weights", "load_adapter", "refuse_gaps"]

ADAPTER_NAME = "default"
"""PEFT's name of a model's adapter, also part of the names of its tensors."""

# PEFT imports bitsandbytes where it is installed, which then warns of missing kernels even if nothing is quantized.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def check_weights(
    path: str | Path, *, adapter: str | None = None, trust_remote_code: bool = False, classifier: bool = False
) -> list[str]:
    """Check that the files of a model, and of its adapter, hold all weights of the architecture. Reads no weights.

    Weights stored quantized are only checked when they are loaded, since that needs the packages of the device.

    Args:
        classifier: check a sequence classifier instead of a causal language model.

    Returns:
        Warnings about tensors that no part of the model uses.

    Raises:
        ModelError: if weights are missing or have another shape.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    files = model_files(path, trust_remote_code)
    if adapter is not None:
        adapter_files(adapter)
    if "quantization_config" in files.config:
        return []
    headers: dict[str, dict[str, Any]] = {}
    for file in files.weights:
        headers |= read_header(file)[1]
    if any(tensor["dtype"] not in _DTYPES for tensor in headers.values()):
        return []
    stored = {
        name: torch.empty(tensor["shape"], dtype=_DTYPES[tensor["dtype"]], device="meta") for name, tensor in headers.items()
    }
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        with torch.device("meta"):  # only to learn its class, which may be the directory's own code
            empty = auto.from_config(config, trust_remote_code=trust_remote_code)
        with _without_report():  # transformers' loader, for its renamed, converted and tied weights
            model, found = type(empty).from_pretrained(
                None,
                config=empty.config,
                state_dict=stored,
                dtype=torch.float32,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception:  # custom code may need real weights or packages of the workers; loading checks again
        return []
    refuse_gaps(path, found)
    if adapter is not None:
        try:
            load_adapter(model, adapter, low_cpu_mem_usage=True)
        except FilesError:
            raise
        except Exception:  # as above
            pass
    unused = sorted(found["unexpected_keys"])
    return [f"{path}: {_some(unused)} in its files belong to no part of the model and are not used"] if unused else []


def refuse_gaps(path: str | Path, found: Mapping[str, Any]) -> None:
    """Refuse a model with missing weights, or weights of another shape.

    Args:
        found: transformers' loading info (``output_loading_info``), with ``ignore_mismatched_sizes``.

    Raises:
        ModelError: naming the weights.
    """
    if found["mismatched_keys"]:
        name, stored, wanted = min(found["mismatched_keys"])
        raise FilesError(
            f"{path} has weights of another shape than its config.json describes: {name} is {list(stored)} in "
            f"its files and {list(wanted)} in the model"
            + _more(len(found["mismatched_keys"]) - 1)
            + "; give the config.json that belongs to the weights"
        )
    missing, unused = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing:
        fix = "fetch or save the model again"
        if unused:
            fix = (
                f"they hold {_some(unused)}, which no part of the model takes: if these are the same weights under other "
                "names, save the model again with save_pretrained"
            )
        raise FilesError(f"the files of {path} lack {_some(missing)}, which would be random numbers; {fix}")


def load_adapter(model: nn.Module, adapter: str, *, train: bool = False, low_cpu_mem_usage: bool = False) -> nn.Module:
    """Put the PEFT adapter in directory ``adapter`` on ``model``.

    Args:
        train: leave the adapter's weights trainable.
        low_cpu_mem_usage: PEFT's option of this name, for a model on the meta device.

    Raises:
        ModelError: if PEFT does not know the adapter, or it does not fit the model: its weights are missing, unknown to the
            model, or of another shape.
    """
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel

    adapter_files(adapter)
    try:
        # PeftModel.from_pretrained only warns of missing weights. This does the same steps and keeps what PEFT reports.
        config = PeftConfig.from_pretrained(adapter)
        config.inference_mode = not train
        kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
        adapted = kind(model, config, ADAPTER_NAME, autocast_adapter_dtype=False, low_cpu_mem_usage=low_cpu_mem_usage)
        found = adapted.load_adapter(
            adapter,
            ADAPTER_NAME,
            is_trainable=train,
            autocast_adapter_dtype=False,
            torch_device="cpu",
            low_cpu_mem_usage=low_cpu_mem_usage,
            key_mapping=getattr(model, "_checkpoint_conversion_mapping", {}),
        )
    except KeyError as error:  # a weight of modules_to_save
        raise FilesError(f"the adapter {adapter} does not fit the model: its files lack {error}") from error
    except RuntimeError as error:
        if "Error(s) in loading state_dict" not in str(error):
            raise
        shapes = re.search(
            r"size mismatch for (\S+): copying a param with shape torch\.Size\((.*?)\) from checkpoint, the "
            r"shape in current model is torch\.Size\((.*?)\)",
            str(error),
        )
        what = one_line(error, 300)
        if shapes:
            what = f"{shapes[1]} is {shapes[2]} in its files and {shapes[3]} in the model"
        raise FilesError(f"the adapter {adapter} does not fit the model: {what}") from error
    # VB-LoRA's bank is stored once, and each layer has it under another name.
    missing = sorted(name for name in found.missing_keys if ".layers." not in name or "vblora_vector_bank" not in name)
    unused = sorted(found.unexpected_keys)
    wrong = [f"its files lack {_some(missing)}, which would be random numbers"] if missing else []
    wrong += [f"they hold {_some(unused)}, which no part of the model takes"] if unused else []
    if wrong:
        raise FilesError(f"the adapter {adapter} does not fit the model: {' and '.join(wrong)}")
    return adapted


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Turn off transformers' progress bar and its report of missing weights; raydpo prints its own."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + _more(len(names) - 3)


def _more(count: int) -> str:
    return f" and {count:,} more" if count > 0 else ""
