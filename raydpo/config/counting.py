"""Which tokens of a completion count: the parts that ``train_on`` names, and their weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator

__all__ = ["EVERYTHING", "MOST_WEIGHT", "PARTS", "TrainOn", "counting_texts", "part_weights", "train_on_text"]

PARTS = {
    "completion": "all tokens of the completion",
    "assistant": "what the assistant writes in all its turns, with the token that ends each of them",
    "last_turn": "the same of the assistant's last turn alone",
    "answer": "the assistant's turns without their reasoning",
    "reasoning": "the reasoning of the assistant's turns, with the tags around it",
}
"""Parts of a completion that can count, and what they are."""
EVERYTHING = "completion"
"""The part that holds all others."""
MOST_WEIGHT = 1e6
"""Largest weight of a part, a span or a message. Their product is kept as float32, which ends at 3.4e38."""


def _as_train_on(value: Any) -> str | tuple[dict[str, float], ...]:
    """Check a value of ``train_on``: the name of a part, or a list of parts with weights, which becomes a tuple."""
    if not isinstance(value, (list, tuple)):
        return _known(value)
    weights: dict[str, float] = {}
    for term in value:
        if not isinstance(term, Mapping) or len(term) != 1:
            raise ValueError(f"{term!r} is not a part with its weight; write {{part: weight}}, such as {{answer: 1.0}}")
        ((name, weight),) = term.items()
        if _known(name) in weights:
            raise ValueError(f"{name!r} is in the list twice; give the sum of its weights")
        try:
            number = math.nan if isinstance(weight, bool) else float(weight)  # YAML takes 1e-2 for text
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not 0 < number <= MOST_WEIGHT:
            raise ValueError(f"the weight of {name!r} is {weight!r}; expected a number above 0, at most {MOST_WEIGHT:,.0f}")
        weights[name] = number
    if not weights:
        raise ValueError("the list is empty; give it parts, such as [{answer: 1.0}, {reasoning: 0.1}]")
    return tuple({name: weight} for name, weight in weights.items())


def _known(name: Any) -> str:
    if not isinstance(name, str) or name not in PARTS:
        raise ValueError(
            f"{name!r} is no part of a completion; expected one of {', '.join(PARTS)}, or a list with weights such as "
            "[{answer: 1.0}, {reasoning: 0.1}]"
        )
    return name


TrainOn = Annotated[str | tuple[dict[str, float], ...], BeforeValidator(_as_train_on)]
"""A value of ``train_on``."""


def part_weights(train_on: str | tuple[dict[str, float], ...]) -> dict[str, float]:
    """Weight of each part that counts, by name. A token counts with the sum of the weights of its parts."""
    if isinstance(train_on, str):
        return {train_on: 1.0}
    return {name: weight for term in train_on for name, weight in term.items()}


def train_on_text(train_on: str | tuple[dict[str, float], ...]) -> str:
    """A value of ``train_on`` in words, such as ``answer + 0.1 reasoning``."""
    return " + ".join(f"{'' if weight == 1 else f'{weight:g} '}{name}" for name, weight in part_weights(train_on).items())


def counting_texts(data: Mapping[str, Any]) -> tuple[str, str | None]:
    """What counts in training pairs and in held-out pairs, in words; None if nothing is held out.

    Args:
        data: a resolved section ``data`` as plain values, such as a run stores. That of an earlier version may lack keys.
    """
    usual, held_out = data.get("train_on") or EVERYTHING, data.get("eval")
    sources = [source.get("train_on") or usual for source in data.get("train") or ()]
    words = list(dict.fromkeys(map(train_on_text, sources))) or [train_on_text(usual)]
    trained, measured = " or ".join(words), None
    if held_out:
        own = held_out.get("train_on") or (usual if held_out.get("path") and len(words) > 1 else None)
        measured = trained if own is None else train_on_text(own)
    within = f" within the spans of {data['spans_column']}" if data.get("spans_column") else ""
    return trained + within, None if measured is None else measured + within
