"""Checks that a model's files hold every weight of its architecture. A missing one would be random numbers, others in each
process.

There are two checks. Before anything is started, ``check_weights`` reads the headers of the files alone, with a model on the
meta device, in about a second. At loading, ``refuse_gaps`` looks at what transformers and PEFT say that they loaded.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raydpo.errors import FilesError
from raydpo.model.files import adapter_files, model_files, read_header

__all__ = ["ADAPTER_NAME", "check_weights", "load_adapter", "refuse_gaps"]

ADAPTER_NAME = "default"
"""What PEFT calls the adapter of a model, in the names of its tensors, too."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
           "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def check_weights(path: str | Path, *, adapter: str | None = None, trust_remote_code: bool = False,
                  classifier: bool = False) -> list[str]:
    """Look whether the files of a model, and of the adapter on top, hold what its architecture has; no weight is read.

    Weights that are stored quantized are looked at when they are loaded, since that takes the device's own packages.

    Args:
        classifier: as a sequence classifier, not as a causal language model.

    Returns:
        Sentences that warn of tensors that no part of the model takes.

    Raises:
        ModelError: naming the weights that are missing or of another shape.
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
    stored = {name: torch.empty(tensor["shape"], dtype=_DTYPES[tensor["dtype"]], device="meta")
              for name, tensor in headers.items()}
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        with torch.device("meta"):  # for its class alone, which may be one of the directory's own code
            empty = auto.from_config(config, trust_remote_code=trust_remote_code)
        with _without_report():  # transformers' own way of loading, with its renamings, conversions, ties and exceptions
            model, found = type(empty).from_pretrained(
                None, config=empty.config, state_dict=stored, dtype=torch.float32, device_map={"": "meta"},
                output_loading_info=True, ignore_mismatched_sizes=True)
    except Exception:  # code of its own that needs real weights, or packages of the workers: loading looks again
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
    """Refuse a model whose files do not hold all of it.

    Args:
        found: the loading info of transformers, under ``ignore_mismatched_sizes``.

    Raises:
        ModelError: naming the weights that are missing or of another shape.
    """
    if found["mismatched_keys"]:
        name, stored, wanted = min(found["mismatched_keys"])
        raise FilesError(f"{path} has weights of another shape than its config.json describes: {name} is {list(stored)} in "
                         f"its files and {list(wanted)} in the model"
                         + _more(len(found["mismatched_keys"]) - 1) + "; give the config.json that belongs to the weights")
    missing, unused = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing:
        raise FilesError(f"the files of {path} lack {_some(missing)}, which would be random numbers" + (
            f"; they hold {_some(unused)}, which no part of the model takes: if these are the same weights under other "
            "names, save the model again with save_pretrained" if unused else "; fetch or save the model again"))


def load_adapter(model: nn.Module, adapter: str, *, train: bool = False, low_cpu_mem_usage: bool = False) -> nn.Module:
    """``model`` with the PEFT adapter in directory ``adapter`` on top.

    Args:
        train: leave its weights trainable.
        low_cpu_mem_usage: as PEFT means it; for a model on the meta device.

    Raises:
        ModelError: if PEFT does not know it, or it is of another model: weights that it lacks, has too many, or that have
            another shape.
    """
    from peft import PeftModel

    adapter_files(adapter)
    try:
        adapted = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False, is_trainable=train,
                                            torch_device="cpu", low_cpu_mem_usage=low_cpu_mem_usage)
        # PEFT warns at most, and keeps what it found to itself unless an adapter is loaded where one is already.
        found = adapted.load_adapter(adapter, ADAPTER_NAME, is_trainable=train, autocast_adapter_dtype=False,
                                     torch_device="cpu", low_cpu_mem_usage=low_cpu_mem_usage)
    except KeyError as error:  # of modules_to_save
        raise FilesError(f"the adapter {adapter} does not fit the model: its files lack {error}") from error
    except RuntimeError as error:
        if "Error(s) in loading state_dict" not in str(error):
            raise
        shapes = re.search(r"size mismatch for (\S+): copying a param with shape torch\.Size\((.*?)\) from checkpoint, the "
                           r"shape in current model is torch\.Size\((.*?)\)", str(error))
        raise FilesError(f"the adapter {adapter} does not fit the model: " + (
            f"{shapes[1]} is {shapes[2]} in its files and {shapes[3]} in the model" if shapes else
            " ".join(str(error).split())[:300])) from error
    # The bank of VB-LoRA is stored once, and each layer has it under a name of its own.
    missing = sorted(name for name in found.missing_keys if ".layers." not in name or "vblora_vector_bank" not in name)
    unused = sorted(found.unexpected_keys)
    if missing or unused:
        raise FilesError(f"the adapter {adapter} does not fit the model: " + " and ".join(filter(None, (
            missing and f"its files lack {_some(missing)}, which would be random numbers",
            unused and f"they hold {_some(unused)}, which no part of the model takes"))))
    return adapted


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """No progress bar of transformers, and no table of what it found: that is told in a sentence."""
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
