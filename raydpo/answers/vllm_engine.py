"""Answers by vLLM: greedy, or sampled with vLLM's own random numbers. No test runs this module, since the tests have no
GPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from raydpo.answers.draws import Draw, uniforms
from raydpo.errors import ConfigError
from raydpo.reference.identity import on_this_machine, proved_here
from raydpo.reference.score import ReferenceSpec

__all__ = ["open_vllm"]


def open_vllm(
    spec: ReferenceSpec, max_tokens: int, stop: Sequence[int]
) -> Callable[[Sequence[np.ndarray], Sequence[Draw | None]], list[np.ndarray]]:
    """Load the model and return a function that answers prompts as ``transformers_engine.answer_all`` does.

    Raises:
        ConfigError: if vLLM is not installed, the model is quantized by bitsandbytes, or its rotary frequencies depend on
            data.max_length.
        ModelError: if the files on this machine are another model.
    """
    spec = on_this_machine(spec)
    if spec.quantization is not None:
        raise ConfigError(
            f"evaluate.engine vllm cannot quantize as the training did ({spec.quantization}); set "
            "evaluate.engine=transformers"
        )
    if spec.identity.rope_length is not None:
        raise ConfigError(
            "evaluate.engine vllm sets the rotary frequencies of this model by its own length limit, not by "
            "data.max_length; set evaluate.engine=transformers"
        )
    try:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        raise ConfigError(
            f"evaluate.engine is vllm, which cannot be imported here ({error}); install it, or set "
            "evaluate.engine=transformers"
        ) from None
    rank = {} if spec.adapter is None else {"enable_lora": True, "max_lora_rank": _rank(spec.adapter)}
    # generation_config="vllm" ignores settings in the model's directory, such as a repetition penalty.
    with proved_here(spec):
        model = LLM(
            spec.path, dtype=spec.identity.dtype, trust_remote_code=spec.trust_remote_code, generation_config="vllm", **rank
        )
    lora = None if spec.adapter is None else LoRARequest("policy", 1, spec.adapter)

    def answer(prompts: Sequence[np.ndarray], draws: Sequence[Draw | None]) -> list[np.ndarray]:
        settings = [
            SamplingParams(
                max_tokens=max_tokens,
                stop_token_ids=list(stop),
                detokenize=False,
                temperature=0.0 if draw is None else draw.temperature,
                seed=None if draw is None else int(uniforms(draw, prompt, 1)[0] * 2**31),
            )
            for prompt, draw in zip(prompts, draws, strict=True)
        ]
        found = model.generate(
            [{"prompt_token_ids": prompt.tolist()} for prompt in prompts], settings, lora_request=lora, use_tqdm=False
        )
        return [np.array(one.outputs[0].token_ids, np.int32) for one in found]

    return answer


def _rank(adapter: str) -> int:
    """Return the smallest rank that vLLM supports and that is at least the adapter's."""
    rank = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    return next(size for size in (8, 16, 32, 64, 128, 256, 320, 512, rank) if size >= rank)
