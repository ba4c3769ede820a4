"""Checks that a model's files hold every weight of its architecture.

A missing weight would be initialised with random numbers, different ones in each process. Before a run starts,
``check_weights`` reads only the headers of the files and compares them with a model on the meta device, in about a second.
At loading, ``refuse_gaps`` and ``load_adapter`` check what transformers and PEFT report.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raydpo.errors import FilesError, one_line, some_of
from raydpo.model.files import ModelFiles, adapter_files, model_files, read_header
from raydpo.model.package import auto_class
from raydpo.model.quantized import (
    certain_gaps,
    is_known,
    plain_tensors,
    refuse_lack_of_layers,
    refuse_parts_of_experts,
    refuse_plain_weights,
    take_quantization,
)
from raydpo.model.targets import without_false_warnings

__all__ = ["ADAPTER_NAME", "check_weights", "compare_headers", "load_adapter", "refuse_foreign_head", "refuse_gaps"]

ADAPTER_NAME = "default"
"""PEFT's name of a model's adapter, also part of the names of its tensors."""

# PEFT imports bitsandbytes where it is installed, which then warns of missing kernels even if nothing is quantized.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

_FOREIGN_HEAD = re.compile(r"For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|MaskedLM)")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
"""torch dtype by name in safetensors. Tensors of others are compared by name and shape only."""

_OF_LORA = re.compile(r"\.(lora_\w+|base_layer|modules_to_save|original_module)(\.|$)")
"""Part of a name that PEFT gives to weights of a model with an adapter that was not merged."""
_HARMLESS = re.compile(
    r"inv_freq|freqs|rotary|(cos|sin)_cached|mask|position_ids|_extra_state|num_batches_tracked"
    r"|(^|\.)(attn|attention)\.bias$|\.([kqv]|kv|input|output)_scale$"
)
"""Part of a name of a tensor in a layer that no result depends on: tables that are computed anew, scales of a cache."""


def check_weights(
    path: str | Path, *, adapter: str | None = None, trust_remote_code: bool = False, classifier: bool = False
) -> list[str]:
    """Check that the files of a model, and of its adapter, hold all weights of the architecture. Reads only their headers.

    As ``compare_headers``; nothing is refused that only loading can check.

    Args:
        classifier: check a sequence classifier instead of a causal language model.

    Returns:
        Warnings about tensors that no part of the model uses.

    Raises:
        ModelError: as ``compare_headers``.
    """
    return compare_headers(path, adapter=adapter, trust_remote_code=trust_remote_code, classifier=classifier) or []


def compare_headers(
    path: str | Path, *, adapter: str | None = None, trust_remote_code: bool = False, classifier: bool = False
) -> list[str] | None:
    """Compare names, in both directions, and shapes in the headers of a model and its adapter with the architecture.

    Weights stored quantized are checked by name, see ``raydpo.model.quantized``; their values are checked when they are
    loaded, since that needs the packages of the device.

    Args:
        classifier: check a sequence classifier instead of a causal language model.

    Returns:
        Warnings about tensors that no part of the model uses; None if the model or its adapter cannot be made without
        weights, or without packages that only the workers have.

    Raises:
        ModelError: if config.json describes no such model, if weights are missing, have another shape, or are no real
            numbers, or if layers of the model have weights that it does not use.
    """
    files = model_files(path, trust_remote_code)
    if adapter is not None:
        adapter_files(adapter)
    headers: dict[str, dict[str, Any]] = {}
    for file in files.weights:
        headers |= read_header(file)[1]
    empty = _empty_model(files, classifier, trust_remote_code)
    if empty is None:
        return None
    quantization = take_quantization(empty.config, files.config)
    refuse_parts_of_experts(path, headers)
    if quantization is not None:
        refuse_lack_of_layers(path, empty, headers)
        refuse_plain_weights(path, headers, quantization)
        stored = plain_tensors(empty, headers, quantization)
    else:
        stored = {
            name: torch.empty(tensor["shape"], dtype=DTYPES.get(tensor["dtype"], torch.float32), device="meta")
            for name, tensor in headers.items()
        }
    try:
        with without_report():  # transformers' loader, for its renamed, converted and tied weights
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
        return None
    if quantization is not None:
        found = certain_gaps(found, headers, quantization)
    refuse_gaps(path, found)
    if quantization is not None and not is_known(quantization):
        return None
    numbers = {name for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    packed = sorted(name for name in numbers & stored.keys() if not stored[name].is_floating_point())
    if packed and quantization is None:
        dtype = headers[packed[0]]["dtype"]
        if DTYPES[dtype].is_complex:
            raise FilesError(
                f"{path}: {some_of(packed)} in its files are complex numbers ({dtype}), and loading would drop their "
                "imaginary parts; save the model again with real weights"
            )
        raise FilesError(
            f"{path}: {some_of(packed)} in its files are integers ({dtype}), as a quantized model "
            "stores them, and its config.json has no quantization_config; give the config.json that belongs to the weights"
        )
    unused = sorted(found["unexpected_keys"])
    _refuse_more_layers(path, model, unused)
    if quantization is None and not files.runs_code:
        _refuse_unused(files, model, unused)
    compared = True
    if adapter is not None:
        try:
            load_adapter(model, adapter, low_cpu_mem_usage=True)
        except FilesError:
            raise
        except ImportError:  # a package that only the workers have
            compared = False
        except Exception as error:
            compared = False
            if not files.runs_code:
                raise FilesError(
                    f"the adapter {adapter} does not fit the model: PEFT cannot add it ({type(error).__name__}: "
                    f"{one_line(error, 300)}); give the adapter_config.json that belongs to its weights"
                ) from None
    unused = [name for name in unused if quantization is None]  # other programs store scales beside the weights
    if not compared:
        return None
    return [f"{path}: {some_of(unused)} in its files belong to no part of the model and are not used"] if unused else []


def _refuse_more_layers(path: str | Path, model: nn.Module, unused: list[str]) -> None:
    """Refuse unused weights that differ from used ones in the number of the layer only: the model would be cut."""
    layers = model.config.get_text_config()
    count = getattr(layers, "num_hidden_layers", None)
    used = {re.sub(r"\d+", "#", name) for name in model.state_dict()} if unused else set()
    more = [name for name in unused if re.search(r"\d", name) and re.sub(r"\d+", "#", name) in used]
    if getattr(layers, "num_nextn_predict_layers", None):  # layers behind the last one, that predict further tokens
        more = []
    if more or (isinstance(count, int) and count < 1):
        what = f"hold {some_of(more)}, weights of layers that it leaves out" if more else "would not be used"
        raise FilesError(
            f"{path}/config.json describes a model of {count} layers (num_hidden_layers), but its files {what}; give the "
            "config.json that belongs to the weights"
        )


def _refuse_unused(files: ModelFiles, model: nn.Module, unused: list[str]) -> None:
    """Refuse unused weights in layers of the model: the same files gave other outputs in the model they were trained in."""
    homes = {name.rpartition(".")[0] for name, _ in model.named_parameters()} - {""}
    layers = {found[0] for name in homes if (found := _LAYER.match(name))}
    prefix = getattr(model, "base_model_prefix", "")

    def is_inside(name: str) -> bool:
        layer = _LAYER.match(name)
        return name.rpartition(".")[0] in homes or (layer is not None and layer[0] in layers)

    inside = [
        name
        for name in unused
        if not _HARMLESS.search(name) and (is_inside(name) or (prefix and is_inside(f"{prefix}.{name}")))
    ]
    if inside:  # biases of zeros are left by conversions from architectures that have biases
        zero = _zero_biases(files, inside)
        inside = [name for name in inside if name not in zero]
    if inside:
        raise FilesError(
            f"{files.directory}: {some_of(inside)} in its files would not be used, although they belong to layers of the "
            f"{type(model).__name__} that its config.json describes, so its outputs would be others than in training; give "
            "the config.json that belongs to the weights"
        )


_LAYER = re.compile(r".*?\.\d+\.")
"""Beginning of a name up to the number of the layer."""


def _zero_biases(files: ModelFiles, names: list[str]) -> set[str]:
    """Those of ``names`` that are biases of zeros."""
    zero = set()
    for file in files.weights:
        data, header = read_header(file)
        for name in header.keys() & {name for name in names if name.endswith("bias")}:
            start, end = header[name]["data_offsets"]
            with open(file, "rb") as stream:
                stream.seek(data + start)
                if not any(stream.read(end - start)):
                    zero.add(name)
    return zero


def _empty_model(files: ModelFiles, classifier: bool, trust_remote_code: bool) -> nn.Module | None:
    """The model that config.json describes, without weights; None if only the workers can make it.

    Raises:
        ModelError: if it describes no model of that kind.
    """
    import transformers
    from transformers import AutoConfig, AutoModelForSequenceClassification

    path, wanted = files.directory, "a sequence classifier" if classifier else "a causal language model"
    if not classifier:
        refuse_foreign_head(files)
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        if getattr(config, "is_encoder_decoder", False) and not classifier:
            raise FilesError(f"{path} is an encoder-decoder model; raydpo trains decoder-only (causal) language models")
        auto = AutoModelForSequenceClassification if classifier else auto_class(config)
        with torch.device("meta"):  # only to learn its class, which may be the directory's own code
            return auto.from_config(config, trust_remote_code=trust_remote_code)
    except (FilesError, ImportError) as error:
        if isinstance(error, FilesError):
            raise
        return None
    except Exception as error:
        if files.runs_code:  # it may need real weights or packages of the workers; loading checks again
            return None
        why = one_line(error, 300)
        if "Unrecognized configuration class" in why:
            why = f"it describes a {type(config).__name__.removesuffix('Config')} model"
        code = ", or set model.trust_remote_code if the model brings its own code" if "auto_map" in files.config else ""
        raise FilesError(
            f"{path}/config.json describes no model that transformers {transformers.__version__} can make as {wanted} "
            f"({why}); give the config.json that belongs to the weights{code}"
        ) from None


def refuse_foreign_head(files: ModelFiles) -> None:
    """Refuse a model of another task, such as a reward model, as a language model. With tied embeddings it lacks no weight.

    Raises:
        ModelError: naming the architecture.
    """
    foreign = [name for name in files.config.get("architectures") or () if _FOREIGN_HEAD.search(str(name))]
    if foreign:
        raise FilesError(
            f"{files.directory} is a {foreign[0]} (architectures in its config.json), a model with the head of another "
            "task, and a causal language model is expected; give the language model that it was made from"
        )


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
            + (f" and {len(found['mismatched_keys']) - 1:,} more" if len(found["mismatched_keys"]) > 1 else "")
            + "; give the config.json that belongs to the weights"
        )
    missing, unused = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    of_lora = [name for name in unused if _OF_LORA.search(name)]
    if of_lora:
        raise FilesError(
            f"the files of {path} hold weights of an adapter that was not merged, which would not be used: "
            f"{some_of(of_lora)}; merge the adapter (PEFT's merge_and_unload) and save the model again, or save the adapter "
            "alone and name it in model.adapter"
        )
    if missing:
        fix = "fetch or save the model again"
        if len(missing) == 1 and re.search(r"(lm_head|embed_out)\.weight$", missing[0]):
            fix += (
                ", or set tie_word_embeddings to true in its config.json if the head is the embedding, as in models that "
                "are saved without one"
            )
        if missing == ["score.weight"] and set(unused) <= {"lm_head.weight"}:
            fix = "they seem to be a causal language model; a reward model is one that was trained as a sequence classifier"
        elif unused:
            fix = (
                f"they hold {some_of(unused)}, which no part of the model takes: if these are the same weights under "
                "other names, save the model again with save_pretrained"
            )
        raise FilesError(f"the files of {path} lack {some_of(missing)}, which would be random numbers; {fix}")


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
        with without_false_warnings():
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
    wrong = [f"its files lack {some_of(missing)}, which would be random numbers"] if missing else []
    wrong += [f"they hold {some_of(unused)}, which no part of the model takes"] if unused else []
    if wrong:
        raise FilesError(f"the adapter {adapter} does not fit the model: {' and '.join(wrong)}")
    return adapted


@contextlib.contextmanager
def without_report() -> Iterator[None]:
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
