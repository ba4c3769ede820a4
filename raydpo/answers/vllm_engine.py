"""Answers by vLLM: greedy, or sampled with vLLM's own random numbers.

vLLM pins another torch and transformers than raydpo runs with. So it runs in a process of its own, with the Python of an
environment of its own (``evaluate.vllm_python``). The process belongs to the Ray actor that asks it, has the GPUs of that
actor and ends with it. Ray could run the whole actor in that environment (``py_executable``), which would then need Ray,
raydpo and this version of Python, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from raydpo.answers.draws import Draw, uniforms
from raydpo.errors import ConfigError, RaydpoError, one_line
from raydpo.model.files import adapter_files, model_files
from raydpo.model.limits import PARTS
from raydpo.reference.identity import on_this_machine, proved_here
from raydpo.reference.score import ReferenceSpec

__all__ = ["check_servable", "engine_settings", "lora_request", "open_vllm", "sampling_settings", "unservable"]

BATCHED_TOKENS = 4096
"""Tokens of a step of vLLM on a CPU, at least."""
MEMORY = {"cuda": 0.9, "cpu": 0.25}
"""Share of a device's memory that vLLM takes where one worker has the device, for the model, activations, keys and values. A
CPU's memory also holds everything else that runs on the node."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks of adapters that vLLM 0.32 has kernels for (vllm/config/lora.py). It rounds a rank up to the next."""


def check_servable(
    quantization: str | None,
    rope_length: int | None,
    adapter: Mapping[str, Any] | None,
    section: str = "evaluate",
    engine: str = "vllm",
) -> None:
    """Refuse a model that vLLM would not compute as raydpo does.

    Args:
        quantization: as in ``ReferenceSpec``. rope_length: as in its identity. adapter: content of
            adapter_config.json.
        section: section of the configuration with ``engine``, for messages.
        engine: engine that is set there, vllm or ray.

    Raises:
        ConfigError: if the model is quantized by bitsandbytes, its rotary frequencies depend on data.max_length, or vLLM
            does not load such an adapter.
    """
    why = unservable(quantization, rope_length, adapter)
    if why is None:
        return
    fix = ""
    if quantization is None and rope_length is None:  # then it is the adapter
        merged = "evaluate final/merged" if section == "evaluate" else "begin with a model that the adapter is merged into"
        fix = f"{merged} (train.merge_adapter=true), or "
    raise ConfigError(f"{section}.engine {engine} {why}; {fix}set {section}.engine=transformers")


def unservable(quantization: str | None, rope_length: int | None, adapter: Mapping[str, Any] | None) -> str | None:
    """Return why vLLM would not compute a model as raydpo does, as what follows "vLLM" in a sentence; None if it would.

    Args:
        quantization, rope_length, adapter: as for ``check_servable``.
    """
    if quantization is not None:
        return f"cannot quantize as the training did ({quantization})"
    if rope_length is not None:
        return "sets the rotary frequencies of this model by its own length limit, not by data.max_length"
    if adapter is None:
        return None
    odd = [f"{name} {adapter[name]}" for name in ("use_dora", "modules_to_save", "lora_bias") if adapter.get(name)]
    if adapter["peft_type"] != "LORA":
        odd = [f"peft_type {adapter['peft_type']}"]
    elif _rank(adapter) > RANKS[-1]:
        odd.append(f"rank {_rank(adapter)}")
    if odd:
        return f"does not load an adapter with {', '.join(odd)}"
    if tensors := adapter.get("target_parameters"):  # github.com/vllm-project/vllm/pull/41384
        return f"ignores adapters on tensors of experts in many releases (target_parameters {', '.join(sorted(tensors))})"
    return None


def _rank(adapter: Mapping[str, Any]) -> int:
    """Return the largest rank in an adapter_config.json."""
    return max(1, adapter["r"], *(adapter.get("rank_pattern") or {}).values())


def engine_settings(spec: ReferenceSpec, positions: int) -> dict[str, Any]:
    """Return keyword arguments of vLLM's engine for the model of ``spec``, on this machine.

    Args:
        positions: as of ``open_vllm``.
    """
    settings: dict[str, Any] = {
        "model": spec.path,
        "dtype": spec.identity.dtype,
        "trust_remote_code": spec.trust_remote_code,
        "max_model_len": positions,
        "generation_config": "vllm",  # ignores settings in the model's directory, such as a repetition penalty
        "skip_tokenizer_init": True,  # token ids in, token ids out
    }
    if any(name in model_files(spec.path, spec.trust_remote_code).config for name in PARTS):
        # A package, of which only the text model is asked: vLLM then loads no other part and needs no processor.
        settings["limit_mm_per_prompt"] = {"image": 0, "video": 0, "audio": 0}
    if spec.adapter is not None:
        rank = _rank(adapter_files(spec.adapter).config)
        settings |= {"enable_lora": True, "max_lora_rank": next(size for size in RANKS if size >= rank)}
    return settings


def sampling_settings(
    prompts: Sequence[np.ndarray], draws: Sequence[Draw | None], max_tokens: int, stop: Sequence[int]
) -> list[dict[str, Any]]:
    """Return keyword arguments of ``vllm.SamplingParams`` for each answer, which has a seed of its own."""
    # ignore_eos: only ``stop`` ends an answer, not what the model's own files name as its end.
    same = {"max_tokens": max_tokens, "stop_token_ids": list(stop), "ignore_eos": True, "detokenize": False}
    return [
        same
        | (
            {"temperature": 0.0}
            if draw is None
            else {"temperature": draw.temperature, "top_p": draw.top_p, "seed": _seed(draw, prompt)}
        )
        for prompt, draw in zip(prompts, draws, strict=True)
    ]


def lora_request(spec: ReferenceSpec) -> dict[str, Any] | None:
    """Return keyword arguments of ``vllm.lora.request.LoRARequest`` for the adapter of ``spec``; None if it has none.

    vLLM keeps adapters by their number, and does not look whether the files behind it are others. So the number and the name
    come from the digest of the model's identity.
    """
    if spec.adapter is None:
        return None
    digest = spec.identity.digest
    number = int.from_bytes(hashlib.blake2b(digest.encode(), digest_size=8).digest(), "little") % (2**31 - 1) + 1
    return {"lora_name": f"policy-{digest}", "lora_int_id": number, "lora_path": spec.adapter}


def open_vllm(
    spec: ReferenceSpec,
    max_tokens: int,
    stop: Sequence[int],
    *,
    python: str | None,
    positions: int,
    memory_share: float,
    device: str,
    section: str = "evaluate",
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Callable[[Sequence[np.ndarray], Sequence[Draw | None]], list[np.ndarray]]:
    """Load the model and return a function that answers prompts as ``transformers_engine.answer_all`` does.

    Args:
        python: Python with vLLM; None = this one.
        positions: tokens of the longest prompt and its longest answer. Memory for keys and values of one such sequence must
            be there, so vLLM's default, what the model was made for, would not fit on many GPUs.
        memory_share: as ``Resources.memory_share``.
        device: ``cuda`` or ``cpu``.
        section: section of the configuration with ``engine`` and ``vllm_python``, for messages.
        environment: environment variables of vLLM, besides those of this process.

    Raises:
        ConfigError: as ``check_servable``; or if vLLM cannot be imported.
        ModelError: if the files on this machine are another model.
        RaydpoError: if vLLM cannot load the model. The function raises it if vLLM fails, or its process ends.
    """
    spec = on_this_machine(spec)
    adapter = None if spec.adapter is None else adapter_files(spec.adapter).config
    check_servable(spec.quantization, spec.identity.rope_length, adapter, section)
    settings = engine_settings(spec, positions) | {"gpu_memory_utilization": MEMORY[device] * memory_share}
    if device == "cpu":
        settings["enforce_eager"] = True  # compiling takes longer than the answers
        # vLLM 0.32 fails on a CPU where a sampled answer with a seed has its prompt read in two steps.
        settings |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(BATCHED_TOKENS, positions)}
    with proved_here(spec):
        process = _Process(python, device, section, environment)
        process.ask({"engine": settings})
        if adapter is not None:  # vLLM reads an adapter when it is first asked for it
            process.ask({"load": lora_request(spec)})

    def answer(prompts: Sequence[np.ndarray], draws: Sequence[Draw | None]) -> list[np.ndarray]:
        request = {
            "prompts": [prompt.tolist() for prompt in prompts],
            "sampling": sampling_settings(prompts, draws, max_tokens, stop),
            "adapter": lora_request(spec),
        }
        found = process.ask(request)["answers"]
        return [np.array(ids, np.int32) for ids in found]

    return answer


def _seed(draw: Draw, prompt: np.ndarray) -> int:
    return int(uniforms(draw, prompt, 1)[0] * 2**31)


def _end(process: subprocess.Popen[str]) -> None:
    """End a process, and wait until the system has taken its memory back."""
    process.kill()
    process.wait()


class _Process:
    """The process of ``vllm_process``, which ends with this object."""

    def __init__(self, python: str | None, device: str, section: str, more: Mapping[str, str]) -> None:
        self.python, self.section = python or sys.executable, section
        # Without its second process, vLLM tells what failed, and gives the same samples each time.
        environment = os.environ | dict(more) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
        if device == "cpu":  # each worker on a node would bind its threads to the same first cores
            environment |= {"OMP_NUM_THREADS": str(torch.get_num_threads()), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
            environment.pop(name, None)  # they name this environment
        try:
            self.process = subprocess.Popen(
                # -I: with neither this file's directory nor $PYTHONPATH, whose modules would hide those of vLLM
                [self.python, "-I", str(Path(__file__).with_name("vllm_process.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                env=environment,
            )
        except OSError as error:
            raise ConfigError(
                f"cannot start {section}.vllm_python {self.python} on {platform.node()}: {error.strerror}"
            ) from None
        weakref.finalize(self, _end, self.process)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return the reply.

        Raises:
            ConfigError: if the program is no Python, or cannot import vLLM.
            RaydpoError: if vLLM fails, or its process ends.
        """
        given, replies = self.process.stdin, self.process.stdout
        assert given is not None and replies is not None
        try:
            print(json.dumps(request), file=given, flush=True)
            line = replies.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RaydpoError(
                f"vLLM's process on {platform.node()} ended with status {self.process.wait()} (-9: the machine ran out of "
                "memory); the log of the Ray worker has what it wrote"
            )
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        where = f"{self.python} on {platform.node()}"
        if not isinstance(reply, dict):
            raise ConfigError(
                f"{self.section}.vllm_python {where} replied {one_line(line, 100)!r}; expected a JSON object of raydpo's "
                "program for vLLM. Set it to the Python of an environment with vLLM"
            )
        error = reply.get("error")
        if error is None:
            return reply
        if error.startswith(("ImportError", "ModuleNotFoundError")):
            raise ConfigError(
                f"{self.section}.engine is vllm, which {where} cannot import ({one_line(error, 300)}); set "
                f"{self.section}.vllm_python to the Python of an environment that has it, or "
                f"{self.section}.engine=transformers"
            )
        raise RaydpoError(f"vLLM failed on {platform.node()}: {one_line(error, 500)}")
