"""Answers by vLLM: greedy, or sampled with vLLM's own random numbers.

vLLM pins another torch and transformers than raydpo runs with. So it runs in a process of its own, with the Python of an
environment of its own (``evaluate.vllm_python``). The process belongs to the Ray actor that asks it, has the GPUs of that
actor and ends with it. Ray could run the whole actor in that environment (``py_executable``), which would then need Ray,
raydpo and this version of Python, too.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raydpo.answers.draws import Draw, uniforms
from raydpo.errors import ConfigError, RaydpoError, one_line
from raydpo.model.files import adapter_files, model_files
from raydpo.model.limits import PARTS
from raydpo.reference.identity import on_this_machine, proved_here
from raydpo.reference.score import ReferenceSpec

__all__ = ["check_servable", "open_vllm"]

MEMORY = {"cuda": 0.9, "cpu": 0.25}
"""Share of a device's memory that vLLM takes where one worker has the device, for the model, activations, keys and values. A
CPU's memory also holds everything else that runs on the node."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks of adapters that vLLM 0.32 has kernels for (vllm/config/lora.py). It rounds a rank up to the next."""


def check_servable(quantization: str | None, rope_length: int | None, adapter: Mapping[str, Any] | None) -> None:
    """Refuse a model that vLLM would not compute as raydpo does.

    Args:
        quantization: as in ``ReferenceSpec``. rope_length: as in its identity. adapter: content of
            adapter_config.json.

    Raises:
        ConfigError: if the model is quantized by bitsandbytes, its rotary frequencies depend on data.max_length, or vLLM
            does not load such an adapter.
    """
    why = fix = ""
    if quantization is not None:
        why = f"cannot quantize as the training did ({quantization})"
    elif rope_length is not None:
        why = "sets the rotary frequencies of this model by its own length limit, not by data.max_length"
    elif adapter is not None:
        odd = [f"{name} {adapter[name]}" for name in ("use_dora", "modules_to_save", "lora_bias") if adapter.get(name)]
        if adapter["peft_type"] != "LORA":
            odd = [f"peft_type {adapter['peft_type']}"]
        elif _rank(adapter) > RANKS[-1]:
            odd.append(f"rank {_rank(adapter)}")
        if odd:
            why = f"does not load an adapter with {', '.join(odd)}"
        elif tensors := adapter.get("target_parameters"):  # github.com/vllm-project/vllm/pull/41384
            why = f"ignores adapters on tensors of experts in many releases (target_parameters {', '.join(sorted(tensors))})"
        if why:
            fix = "evaluate final/merged (train.merge_adapter=true), or "
    if why:
        raise ConfigError(f"evaluate.engine vllm {why}; {fix}set evaluate.engine=transformers")


def _rank(adapter: Mapping[str, Any]) -> int:
    """Return the largest rank in an adapter_config.json."""
    return max(1, adapter["r"], *(adapter.get("rank_pattern") or {}).values())


def open_vllm(
    spec: ReferenceSpec,
    max_tokens: int,
    stop: Sequence[int],
    *,
    python: str | None,
    positions: int,
    memory_share: float,
    device: str,
) -> Callable[[Sequence[np.ndarray], Sequence[Draw | None]], list[np.ndarray]]:
    """Load the model and return a function that answers prompts as ``transformers_engine.answer_all`` does.

    Args:
        python: Python with vLLM; None = this one.
        positions: tokens of the longest prompt and its longest answer. Memory for keys and values of one such sequence must
            be there, so vLLM's default, what the model was made for, would not fit on many GPUs.
        memory_share: as ``Resources.memory_share``.
        device: ``cuda`` or ``cpu``.

    Raises:
        ConfigError: as ``check_servable``; or if vLLM cannot be imported.
        ModelError: if the files on this machine are another model.
        RaydpoError: if vLLM cannot load the model. The function raises it if vLLM fails, or its process ends.
    """
    spec = on_this_machine(spec)
    adapter = None if spec.adapter is None else adapter_files(spec.adapter).config
    check_servable(spec.quantization, spec.identity.rope_length, adapter)
    settings: dict[str, Any] = {
        "model": spec.path,
        "dtype": spec.identity.dtype,
        "trust_remote_code": spec.trust_remote_code,
        "max_model_len": positions,
        "gpu_memory_utilization": MEMORY[device] * memory_share,
        "generation_config": "vllm",  # ignores settings in the model's directory, such as a repetition penalty
        "skip_tokenizer_init": True,  # token ids in, token ids out
    }
    if any(name in model_files(spec.path, spec.trust_remote_code).config for name in PARTS):
        # A package, of which only the text model is asked: vLLM then loads no other part and needs no processor.
        settings["limit_mm_per_prompt"] = {"image": 0, "video": 0, "audio": 0}
    if device == "cpu":
        settings["enforce_eager"] = True  # compiling takes longer than the answers
    if adapter is not None:
        settings |= {"enable_lora": True, "max_lora_rank": next(size for size in RANKS if size >= _rank(adapter))}
    with proved_here(spec):
        process = _Process(python, device)
        process.ask({"engine": settings, "adapter": spec.adapter})

    def answer(prompts: Sequence[np.ndarray], draws: Sequence[Draw | None]) -> list[np.ndarray]:
        # ignore_eos: only ``stop`` ends an answer, not what the model's own files name as its end.
        same = {"max_tokens": max_tokens, "stop_token_ids": list(stop), "ignore_eos": True, "detokenize": False}
        sampling = [
            same | ({"temperature": 0.0} if draw is None else {"temperature": draw.temperature, "seed": _seed(draw, prompt)})
            for prompt, draw in zip(prompts, draws, strict=True)
        ]
        found = process.ask({"prompts": [prompt.tolist() for prompt in prompts], "sampling": sampling})["answers"]
        return [np.array(ids, np.int32) for ids in found]

    return answer


def _seed(draw: Draw, prompt: np.ndarray) -> int:
    return int(uniforms(draw, prompt, 1)[0] * 2**31)


class _Process:
    """The process of ``vllm_process``, which ends with this object."""

    def __init__(self, python: str | None, device: str) -> None:
        self.python = python or sys.executable
        # Without its second process, vLLM tells what failed, and gives the same samples each time.
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
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
                f"cannot start evaluate.vllm_python {self.python} on {platform.node()}: {error.strerror}"
            ) from None
        weakref.finalize(self, self.process.kill)

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
        if not isinstance(reply, dict):
            raise ConfigError(
                f"evaluate.vllm_python {self.python} on {platform.node()} replied {one_line(line, 100)!r}; expected a JSON "
                "object of raydpo's program for vLLM. Set it to the Python of an environment with vLLM"
            )
        error = reply.get("error")
        if error is None:
            return reply
        if error.startswith(("ImportError", "ModuleNotFoundError")):
            raise ConfigError(
                f"evaluate.engine is vllm, which {self.python} on {platform.node()} cannot import ({one_line(error, 300)}); "
                "set evaluate.vllm_python to the Python of an environment that has it, or evaluate.engine=transformers"
            )
        raise RaydpoError(f"vLLM failed on {platform.node()}: {one_line(error, 500)}")
