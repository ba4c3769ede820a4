"""Answers by transformers: greedy, or sampled from the whole distribution of the model.

A sampled token is the one at which the cumulative distribution passes its random number from ``draws.uniforms``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from raydpo.answers.draws import Draw, uniforms
from raydpo.errors import ConfigError

__all__ = ["answer_all"]


@torch.no_grad()
def answer_all(
    model: Any,
    prompts: Sequence[np.ndarray],
    draws: Sequence[Draw | None],
    *,
    max_tokens: int,
    stop: Sequence[int],
    batch: int,
) -> list[np.ndarray]:
    """Answer each prompt: token ids, int32, including the end token; never empty.

    Args:
        model: a transformers causal LM, or a PEFT model around one.
        draws: how each answer is sampled; None = greedily.

    Raises:
        ConfigError: if prompt and answer would exceed the model's positions.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    longest = max(map(len, prompts))
    for limit, which in (
        (
            getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None),
            "of the model; lower it, or data.max_length",
        ),
        (
            getattr(causal_lm, "rope_limit", None),
            "for which data.max_length sets the rotary frequencies of the model; lower evaluate.max_tokens, or raise "
            "data.max_length for scoring, training and evaluation alike",
        ),
    ):
        if limit is not None and longest + max_tokens > limit:
            raise ConfigError(
                f"evaluate.max_tokens {max_tokens} after a prompt of {longest} tokens is more than the "
                f"{limit} positions {which}"
            )
    # The model's directory may hold settings such as a repetition penalty or top-k, which would change the distribution.
    causal_lm.generation_config = GenerationConfig()
    # Attention masks left padding, but a recurrent state would include it.
    size = 1 if getattr(causal_lm, "_is_stateful", False) else batch
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    answers: list[np.ndarray] = [np.empty(0, np.int32)] * len(prompts)
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        found = _answer_batch(causal_lm, [prompts[row] for row in rows], [draws[row] for row in rows], max_tokens, stop)
        for row, answer in zip(rows, found, strict=True):
            answers[row] = answer
    return answers


def _answer_batch(
    causal_lm: Any, prompts: list[np.ndarray], draws: list[Draw | None], max_tokens: int, stop: Sequence[int]
) -> list[np.ndarray]:
    width, pad = max(map(len, prompts)), stop[0] if stop else 0
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, width - len(prompt) :] = 1
    device = causal_lm.device
    end = list(stop) or None
    whole = causal_lm.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        logits_processor=[_ReadOff(prompts, draws, max_tokens, width, device)] if any(draws) else None,
        generation_config=GenerationConfig(do_sample=False, max_new_tokens=max_tokens, pad_token_id=pad, eos_token_id=end),
    )
    return [_until_stop(row, stop) for row in whole[:, width:].cpu().numpy()]


def _until_stop(ids: np.ndarray, stop: Sequence[int]) -> np.ndarray:
    ends = np.flatnonzero(np.isin(ids, stop))
    return (ids[: ends[0] + 1] if len(ends) else ids).astype(np.int32)


class _ReadOff(LogitsProcessor):
    """Keeps one token in the logits [B, V] of each sampled row: the one at which the cumulative distribution passes its
    random number.

    Computes in float64: in a vocabulary of 150,000 most tokens are too unlikely for a sum in float32.
    """

    def __init__(
        self, prompts: Sequence[np.ndarray], draws: Sequence[Draw | None], steps: int, width: int, device: torch.device
    ) -> None:
        self.width = width
        drawn = zip(prompts, draws, strict=True)
        numbers = [np.full(steps, np.nan) if draw is None else uniforms(draw, prompt, steps) for prompt, draw in drawn]
        self.numbers = torch.from_numpy(np.stack(numbers)).to(device)  # [B, steps]
        self.greedy = torch.tensor([draw is None for draw in draws], device=device)[:, None]
        temperatures = [1.0 if draw is None else draw.temperature for draw in draws]
        self.temperatures = torch.tensor(temperatures, dtype=torch.float64, device=device)[:, None]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative = (scores.double() / self.temperatures).softmax(-1).cumsum(-1)
        wanted = self.numbers[:, input_ids.shape[1] - self.width, None].nan_to_num() * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, wanted, right=True).clamp_max(scores.shape[1] - 1)
        return torch.where(self.greedy, scores, torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0))
