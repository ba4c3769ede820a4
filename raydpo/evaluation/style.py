"""What answers look like, whatever they say: length, repetition, variety, how many were cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from raydpo.evaluation.interval import Interval, by_group, mean_by_group, ratio

__all__ = ["is_cut", "length_growth", "measure_style"]

REPEATED_GRAM = 4


def measure_style(answers: Sequence[np.ndarray], stop: Sequence[int], prompts: np.ndarray) -> dict[str, Any]:
    """Of answers as token ids; ``prompts`` is the number of each answer's prompt.

    ``tokens``: mean length, the end token included, its interval over prompts. ``repetition``: share of the 4-grams of an
    answer that repeat an earlier one of it, mean over answers of 4 tokens or more (seq-rep-4, Welleck et al. 2020, arXiv
    1908.04319).
    ``distinct_1``, ``distinct_2``: distinct tokens and pairs of neighbours by all of them (Li et al. 2016, arXiv
    1510.03055); they fall with the number of answers. ``cut``: share that hit max_tokens.
    """
    grams = [_grams(answer, REPEATED_GRAM) for answer in answers if len(answer) >= REPEATED_GRAM]
    return {
        "tokens": mean_by_group(np.array([len(answer) for answer in answers], float), prompts),
        "repetition": float(np.mean([1 - len(set(each)) / len(each) for each in grams])) if grams else None,
        "distinct_1": _distinct(answers, 1), "distinct_2": _distinct(answers, 2),
        "cut": float(np.mean([is_cut(answer, stop) for answer in answers])) if answers else None}


def length_growth(policy: Sequence[np.ndarray], reference: Sequence[np.ndarray], prompts: np.ndarray) -> Interval:
    """Mean length of the policy's answers over that of the reference's, less 1; ``prompts`` is the number of each answer's
    prompt, and the interval is over prompts.

    It is no mean of ratios: the lengths of two answers to a prompt are nearly independent, so the mean of their ratio is
    above 1 though nothing has grown.
    """
    def lengths(answers: Sequence[np.ndarray]) -> np.ndarray:
        sums, sizes = by_group(np.array([len(answer) for answer in answers], float), prompts)
        return sums / sizes

    grown = ratio(lengths(policy), lengths(reference))
    return {name: None if value is None else value - 1 for name, value in grown.items()}


def is_cut(answer: np.ndarray, stop: Sequence[int]) -> bool:
    """Whether an answer, int [tokens], ended at ``evaluate.max_tokens`` and not with a token of ``stop``."""
    return int(answer[-1]) not in stop


def _grams(answer: np.ndarray, size: int) -> list[tuple[int, ...]]:
    ids = answer.tolist()
    return list(zip(*(ids[start:] for start in range(size)), strict=False))


def _distinct(answers: Sequence[np.ndarray], size: int) -> float | None:
    grams = [gram for answer in answers for gram in _grams(answer, size)]
    return len(set(grams)) / len(grams) if grams else None
