"""Greedy answers of the current policy, to show text before and after training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from raydpo.training.policy.engine import Engine

__all__ = ["greedy_answers"]


def greedy_answers(engine: Engine, prompts: Sequence[np.ndarray], max_tokens: int, stop: Sequence[int]) -> list[list[int]]:
    """Token ids of the answer to each prompt, one prompt at a time. The model's own generation settings are not used.

    All ranks must call it: under ZeRO-3 every token needs the weights of all ranks.
    """
    answers = []
    with engine.evaluating(), engine.module.own_attention():
        for prompt in prompts:
            ids = torch.from_numpy(np.asarray(prompt, dtype=np.int64))[None].to(engine.device)
            whole = engine.module.policy.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                pad_token_id=stop[0] if stop else None,
                eos_token_id=list(stop) or None,
            )
            answers.append(whole[0, len(prompt) :].tolist())
    return answers
