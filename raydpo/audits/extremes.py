"""Selects the pairs most worth reading, by kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from raydpo.pages.text import shown

__all__ = ["COUNT", "extremes"]

COUNT = 20
"""Largest number of pairs shown of each kind."""

KINDS = {
    "The reference is most wrong, by sum": "lowest margin: swapped, broken or hard pairs",
    "The reference is most wrong, per token": "lowest margin per token, which does not grow with length",
    "The reference is most sure": "highest margin: nothing to learn, or a rejected answer that is not text",
    "Most surprising chosen": "or desirable: least likely tokens: another language, code, noise",
    "Most surprising rejected": "or undesirable: least likely tokens: such an answer teaches little",
    "Chosen much longer": "largest length difference",
    "Chosen much shorter": "largest length difference in the other direction",
    "Contradictory": "another pair has chosen and rejected swapped, or the same completion has the other label",
    "Copies": "the pairs that occur most often",
    "Shared prompts": "prompts with the most pairs",
    "Shared answers": "the same answer in many pairs",
    "Cut most": "answers that lost the most tokens to data.max_length",
    "Near empty": "answers of three tokens or fewer",
}
"""The kinds of pairs, and what each of them shows."""


def _ranks(f: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rank of each pair, [pairs], by kind: the lowest is shown first, NaN = not of this kind."""
    longer = f["length_difference"].astype(float)
    cut, tokens = np.maximum(f["chosen_cut"], f["rejected_cut"]), (f["chosen_tokens"], f["rejected_tokens"])
    short = np.where(np.isnan(longer), np.maximum(*tokens), np.minimum(*tokens))  # NaN: there is one completion
    return {
        "The reference is most wrong, by sum": f["ref_margin"],
        "The reference is most wrong, per token": f["ref_chosen_per_token"] - f["ref_rejected_per_token"],
        "The reference is most sure": -f["ref_margin"],
        "Most surprising chosen": f["ref_chosen_per_token"],
        "Most surprising rejected": f["ref_rejected_per_token"],
        "Chosen much longer": -longer,
        "Chosen much shorter": longer,
        "Contradictory": np.where(f["contradictory"], 0.0, np.nan),
        "Copies": np.where((f["copies"] > 1) & (f["copy"] == 0), -f["copies"], np.nan),
        "Shared prompts": np.where(f["prompt_pairs"] > 1, -f["prompt_pairs"], np.nan),
        "Shared answers": np.where(f["answer_pairs"] > 1, -f["answer_pairs"], np.nan),
        "Cut most": np.where(cut > 0, -cut, np.nan),
        "Near empty": np.where(short <= 3, short, np.nan),
    }


def extremes(
    facts: pa.Table, pairs: pa.Table, rows: np.ndarray, decode: Callable[[list[list[int]]], list[str]]
) -> list[dict[str, Any]]:
    """Select up to ``COUNT`` pairs of each kind, with their facts and with texts that are safe to show.

    Args:
        facts: rows of ``data.facts.pair_facts``. rows: the rows of ``pairs`` that they are about.
        decode: turns the token ids of many completions into texts.
    """
    columns = {name: facts[name].to_numpy() for name in facts.column_names if name not in ("pair_id", "source")}
    found = []
    for title, ranks in _ranks(columns).items():
        ranks = np.asarray(ranks, float)
        first = np.argsort(ranks, kind="stable")[:COUNT]  # NaN sorts last
        first = first[~np.isnan(ranks[first])]
        if len(first):
            texts = pairs.select(["prompt_ids", "chosen_ids", "rejected_ids"]).take(pa.array(rows[first]))
            of, shown_pairs = int((~np.isnan(ranks)).sum()), _shown(facts.take(pa.array(first)), texts, decode)
            found.append({"title": title, "about": KINDS[title], "of": of, "pairs": shown_pairs})
    return found


def _shown(facts: pa.Table, ids: pa.Table, decode: Callable[[list[list[int]]], list[str]]) -> list[dict[str, Any]]:
    """The rows of ``facts``, each with the texts of the same row of ``ids``."""
    texts = {name: decode(ids[f"{name}_ids"].to_pylist()) for name in ("prompt", "chosen", "rejected")}
    return [
        row | {name: shown(texts[name][number], keep_end=name == "prompt") for name in texts}
        for number, row in enumerate(facts.to_pylist())
    ]
