"""Answers by transformers: greedy, or sampled from the distribution of the model.

A sampled token is the one at which the cumulative distribution passes its random number from ``draws.uniforms``.

All answers to a prompt share one pass over it: its cache is copied for each of them. An answer that has ended leaves the
batch. The batches depend on the rows of the call alone. So the rows of a stored block give the same answers again, however
many workers there are and in which order they take the blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, LogitsProcessor

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
    section: str = "evaluate",
) -> list[np.ndarray]:
    """Answer each prompt: token ids, int32, including the end token; never empty.

    Args:
        model: a transformers causal LM, or a PEFT model around one.
        draws: how each answer is sampled; None = greedily.
        batch: number of answers that are generated at once.
        section: section of the configuration with ``max_tokens``, for messages.

    Raises:
        ConfigError: if prompt and answer would exceed the model's positions.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    _check_positions(causal_lm, max(map(len, prompts)), max_tokens, section)
    # The model's directory may hold settings such as a repetition penalty or top-k, which would change the distribution.
    causal_lm.generation_config = GenerationConfig()
    # Attention masks left padding, but a recurrent state would include it.
    stateful = getattr(causal_lm, "_is_stateful", False)
    answers: list[np.ndarray] = [np.empty(0, np.int32)] * len(prompts)

    def put(rows: Sequence[int], found: Sequence[np.ndarray]) -> None:
        for row, answer in zip(rows, found, strict=True):
            answers[row] = answer

    try:
        for groups in _batches(prompts, batch, equal_lengths=stateful):
            rows = [row for group in groups for row in group]
            decoding = _Decoding(
                [prompts[row] for row in rows],
                [draws[row] for row in rows],
                [place for place, group in enumerate(groups) for _ in group],
                max_tokens,
                stop,
                causal_lm.device,
                stateful,
            )
            put(
                rows,
                _generate(causal_lm, [prompts[group[0]] for group in groups], max_tokens, stop, custom_generate=decoding),
            )
    except _NotInCache:
        order, size = sorted(range(len(prompts)), key=lambda row: len(prompts[row])), 1 if stateful else batch
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            put(
                rows, _answer_rows(causal_lm, [prompts[row] for row in rows], [draws[row] for row in rows], max_tokens, stop)
            )
    return answers


def _check_positions(causal_lm: Any, longest: int, max_tokens: int, section: str) -> None:
    for limit, which in (
        (
            getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None),
            "of the model; lower it, or data.max_length",
        ),
        (
            getattr(causal_lm, "rope_limit", None),
            f"for which data.max_length sets the rotary frequencies of the model; lower {section}.max_tokens, or raise "
            "data.max_length for scoring, training and evaluation alike",
        ),
    ):
        if limit is not None and longest + max_tokens > limit:
            raise ConfigError(
                f"{section}.max_tokens {max_tokens} after a prompt of {longest} tokens is more than the "
                f"{limit} positions {which}"
            )


def _batches(prompts: Sequence[np.ndarray], batch: int, *, equal_lengths: bool) -> Iterator[list[list[int]]]:
    """Yield batches: for each prompt in it, the rows that are its answers. Short prompts come first.

    Args:
        batch: largest number of rows. A prompt with more answers is in several batches.
        equal_lengths: whether the prompts of a batch must be equally long.
    """
    rows_of: dict[bytes, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(np.ascontiguousarray(prompt, "<u4").tobytes(), []).append(row)
    found: list[list[int]] = []
    for ids in sorted(rows_of, key=len):
        rows = rows_of[ids]
        for start in range(0, len(rows), batch):
            group = rows[start : start + batch]
            full = sum(map(len, found)) + len(group) > batch
            if found and (full or (equal_lengths and len(prompts[found[0][0]]) != len(prompts[group[0]]))):
                yield found
                found = []
            found.append(group)
    if found:
        yield found


def _generate(causal_lm: Any, prompts: Sequence[np.ndarray], max_tokens: int, stop: Sequence[int], **how: Any) -> Any:
    """Call transformers' ``generate`` on left-padded prompts."""
    width, pad = max(map(len, prompts)), stop[0] if stop else 0
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, width - len(prompt) :] = 1
    return causal_lm.generate(
        input_ids=ids.to(causal_lm.device),
        attention_mask=mask.to(causal_lm.device),
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=max_tokens, pad_token_id=pad, eos_token_id=list(stop) or None
        ),
        **how,
    )


class _Choice:
    """Chooses the next tokens of a batch of answers.

    Computes in float64: in a vocabulary of 150,000 most tokens are too unlikely for a sum in float32.
    """

    def __init__(
        self, prompts: Sequence[np.ndarray], draws: Sequence[Draw | None], steps: int, device: torch.device
    ) -> None:
        drawn = zip(prompts, draws, strict=True)
        numbers = [np.zeros(steps) if draw is None else uniforms(draw, prompt, steps) for prompt, draw in drawn]
        self.numbers = torch.from_numpy(np.stack(numbers)).to(device)  # [B, steps]
        self.sampled = torch.tensor([draw is not None for draw in draws], device=device)
        settings = [(1.0, 1.0) if draw is None else (draw.temperature, draw.top_p) for draw in draws]
        self.settings = torch.tensor(settings, dtype=torch.float64, device=device)  # [B, 2]: temperature, top_p
        self.cuts = any(top_p < 1 for _, top_p in settings)

    def __call__(self, logits: Tensor, rows: Tensor, step: int) -> Tensor:
        """Return the tokens number ``step`` of the answers ``rows`` [b], given float32 ``logits`` [b, V]."""
        tokens = logits.argmax(-1)
        places = self.sampled[rows].nonzero()[:, 0]
        if not len(places):
            return tokens
        drawn = rows[places]
        temperatures, top_p = self.settings[drawn].unbind(-1)
        chances = (logits[places].double() / temperatures[:, None]).softmax(-1)
        if self.cuts:
            chances = _nucleus(chances, top_p)
        cumulative = chances.cumsum(-1)
        wanted = self.numbers[drawn, step, None] * cumulative[:, -1:]
        found = torch.searchsorted(cumulative, wanted, right=True).clamp_max(logits.shape[1] - 1)
        tokens[places] = found[:, 0]
        return tokens


def _nucleus(chances: Tensor, top_p: Tensor) -> Tensor:
    """Return ``chances`` [B, V] with 0 for all but the fewest most likely tokens that have the probability ``top_p`` [B]
    together; of equally likely ones those with the lower id first."""
    ordered, ids = chances.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    ordered = ordered.masked_fill((before >= top_p[:, None]) & (top_p < 1)[:, None], 0.0)
    return torch.zeros_like(chances).scatter_(-1, ids, ordered)


class _NotInCache(Exception):
    """The state of the model is not all in a cache whose rows can be copied and dropped."""


class _Decoding:
    """A decoding loop for ``generate``: answers to prompts that are prefilled once, from a batch that answers leave.

    Args:
        prompts, draws: of each answer.
        prompt_of: the row of each answer's prompt in the batch that is prefilled.
        stateful: whether the model has layers with a state, which must then be in the cache.
    """

    def __init__(
        self,
        prompts: Sequence[np.ndarray],
        draws: Sequence[Draw | None],
        prompt_of: Sequence[int],
        max_tokens: int,
        stop: Sequence[int],
        device: torch.device,
        stateful: bool,
    ) -> None:
        self.choice = _Choice(prompts, draws, max_tokens, device)
        self.prompt_of = torch.tensor(prompt_of, device=device)
        self.stop = torch.tensor(list(stop), dtype=torch.long, device=device)
        self.max_tokens, self.stateful = max_tokens, stateful

    def __call__(
        self,
        causal_lm: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **state: Any,
    ) -> list[np.ndarray]:
        """Return the answers. The last three arguments of ``generate`` say what this object knows.

        Raises:
            _NotInCache: if the answers must be generated from prompts of their own.
        """
        inputs = causal_lm.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **state)
        outputs = causal_lm(**inputs, return_dict=True)
        state = causal_lm._update_model_kwargs_for_generation(outputs, state)
        if causal_lm.is_remote_code() or not _holds_all(state, self.stateful):
            raise _NotInCache
        logits, input_ids, state = (
            outputs.logits[:, -1][self.prompt_of],
            input_ids[self.prompt_of],
            _take(state, self.prompt_of),
        )
        alive = torch.arange(len(self.prompt_of), device=input_ids.device)
        answers = input_ids.new_full((len(alive), self.max_tokens), -1)
        with getattr(causal_lm, "_optimize_model_for_decode", contextlib.nullcontext)():
            for step in range(self.max_tokens):
                token = self.choice(logits.float(), alive, step)
                answers[alive, step] = token
                going = (~torch.isin(token, self.stop)).nonzero()[:, 0]
                if step == self.max_tokens - 1 or not len(going):
                    break
                input_ids = torch.cat([input_ids, token[:, None]], 1)
                if len(going) < len(alive):
                    input_ids, state, alive = input_ids[going], _take(state, going), alive[going]
                inputs = causal_lm.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **state)
                outputs = causal_lm(**inputs, return_dict=True)
                state = causal_lm._update_model_kwargs_for_generation(outputs, state)
                logits = outputs.logits[:, -1]
        return [row[row >= 0].astype(np.int32) for row in answers.cpu().numpy()]


def _holds_all(state: dict[str, Any], stateful: bool) -> bool:
    """Whether what the model passes from step to step is a cache of transformers' own layers and tensors [..., B, T].

    A layer with a class of its own may hold tensors that ``reorder_cache`` does not know, and a layer that leaves its part
    of the cache empty may hold its state itself.
    """
    caches = [value for value in state.values() if isinstance(value, Cache)]
    if len(caches) != 1 or type(caches[0]) is not DynamicCache:
        return False
    if any(isinstance(value, Tensor) and value.ndim < 2 for value in state.values()):
        return False
    layers = caches[0].layers
    if any(type(layer).__module__ != DynamicCache.__module__ for layer in layers):
        return False
    if not stateful:
        return True
    held = [
        [*layer.conv_states.values(), *layer.recurrent_states.values()] for layer in layers if hasattr(layer, "conv_states")
    ]
    return bool(held) and all(any(one is not None for one in states) for states in held)


def _take(state: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Return ``state`` of the given rows of the batch, which may repeat."""
    for name, value in state.items():
        if isinstance(value, Cache):
            value.reorder_cache(rows)
        elif isinstance(value, Tensor):
            state[name] = value.index_select(value.ndim - 2, rows)
    return state


def _answer_rows(
    causal_lm: Any, prompts: Sequence[np.ndarray], draws: Sequence[Draw | None], max_tokens: int, stop: Sequence[int]
) -> list[np.ndarray]:
    """Answer with the decoding loop of ``generate``: each answer has a prefill of its own, and stays until the last one."""
    width = max(map(len, prompts))
    read_off = _ReadOff(_Choice(prompts, draws, max_tokens, causal_lm.device), width)
    whole = _generate(causal_lm, prompts, max_tokens, stop, logits_processor=[read_off] if any(draws) else None)
    return [_until_stop(row, stop) for row in whole[:, width:].cpu().numpy()]


def _until_stop(ids: np.ndarray, stop: Sequence[int]) -> np.ndarray:
    ends = np.flatnonzero(np.isin(ids, stop))
    return (ids[: ends[0] + 1] if len(ends) else ids).astype(np.int32)


class _ReadOff(LogitsProcessor):
    """Keeps the chosen token in the logits [B, V] of each row."""

    def __init__(self, choice: _Choice, width: int) -> None:
        self.choice, self.width = choice, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = torch.arange(len(scores), device=scores.device)
        token = self.choice(scores, rows, input_ids.shape[1] - self.width)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)
