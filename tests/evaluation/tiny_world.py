"""A world small enough to be enumerated: a vocabulary of five, answers of at most three tokens, two random models."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch

VOCABULARY, STOP, LONGEST = 5, 0, 3


@dataclass(frozen=True)
class World:
    policy: Any
    reference: Any


def make_world(seed: int, distance: float = 0.5) -> World:
    """A random model and another whose weights differ by noise of that share."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=STOP,
        pad_token_id=STOP,
    )
    torch.manual_seed(seed)
    models = [AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval() for _ in range(2)]
    with torch.no_grad():
        for reference, policy in zip(models[0].parameters(), models[1].parameters(), strict=True):
            if reference.dim() > 1:
                reference.mul_(12)  # initial weights are so small that all tokens are alike
            policy.copy_(reference + distance * reference.std(correction=0) * torch.randn_like(reference))
    return World(policy=models[1], reference=models[0])


def sequences() -> list[tuple[int, ...]]:
    """All possible answers: ended by the end token, or cut at the longest."""
    found = []
    for length in range(1, LONGEST + 1):
        for ids in product(range(VOCABULARY), repeat=length):
            if STOP not in ids[:-1] and (ids[-1] == STOP or length == LONGEST):
                found.append(ids)
    return found


@torch.no_grad()
def exact_log_probs(model: Any, prompt: np.ndarray, answers: list[tuple[int, ...]]) -> np.ndarray:
    """Log-probs by definition, one sequence at a time, float64."""
    found = []
    for answer in answers:
        ids = torch.tensor([prompt.tolist() + list(answer)])
        logps = model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        found.append(float(logps.gather(1, torch.tensor(answer)[:, None]).sum()))
    return np.array(found)
