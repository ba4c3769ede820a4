"""The figures of an audit: what lengths and cached log-probs alone say of the pairs of a source."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl

from raydpo.evaluation.interval import share

__all__ = ["LENGTH_BINS", "figures", "overlap", "wilson"]

LENGTH_BINS = (-100, -25, 0, 1, 26, 101)
"""Left edges of the bins of length difference: much shorter, shorter, a little shorter, equal, a little longer, ..."""
SURPRISE_BINS = 60


def figures(frame: pl.DataFrame) -> dict[str, Any]:
    """All figures of the pairs in ``frame``, whose columns are ``data.facts.FACTS``. Shares come with 95 % intervals.

    Log-probs are nats; surprise is -log-prob a token. None stands for what cannot be computed of so few pairs.
    """
    scored = frame.filter(pl.col("ref_margin").is_not_null())
    difference = frame["length_difference"].to_numpy()
    return {
        "pairs": frame.height, "not_scored": frame.height - scored.height,
        "tokens": {name: _quantiles(frame[f"{name}_tokens"].to_numpy()) for name in ("prompt", "chosen", "rejected")},
        "length": _length(difference),
        "reference": _reference(scored),
        "length_and_reference": _length_and_reference(scored),
        "surprise": _surprise(scored),
        "duplicates": int((frame["copy"] > 0).sum()), "contradictory": int(frame["contradictory"].sum()),
        "shared_prompt": int((frame["prompt_pairs"] > frame["copies"]).sum()),
        "shared_answer": int((frame["answer_pairs"] > frame["copies"]).sum()),
        "empty": {side: int((frame[f"{side}_tokens"] <= 1).sum()) for side in ("chosen", "rejected")},
        "truncated": {side: int((frame[f"{side}_cut"] > 0).sum()) for side in ("chosen", "rejected")},
    }


def wilson(count: float, total: int) -> dict[str, Any]:
    """A share and its 95 % interval, see ``evaluation.interval.share``."""
    found = share(count, total)
    return {"share": found["value"], "low": found["low"], "high": found["high"], "count": count, "of": total}


def overlap(one: np.ndarray, two: np.ndarray) -> dict[str, float | None]:
    """How alike two samples are distributed.

    ``coefficient``: the area that their histograms share, 1 if equal, 0 if apart. ``auc``: probability that a value of
    ``two`` exceeds one of ``one``, ties half (Mann-Whitney); 0.5 if nothing tells them apart.
    """
    if not len(one) or not len(two):
        return {"coefficient": None, "auc": None}
    edges = np.histogram_bin_edges(np.concatenate([one, two]), SURPRISE_BINS)
    shares = [np.histogram(values, edges)[0] / len(values) for values in (one, two)]
    ordered = np.sort(one)
    below = (np.searchsorted(ordered, two, "left") + np.searchsorted(ordered, two, "right")) / 2
    return {"coefficient": float(np.minimum(*shares).sum()), "auc": float(below.mean() / len(one))}


def _length(difference: np.ndarray) -> dict[str, Any]:
    longer, shorter = int((difference > 0).sum()), int((difference < 0).sum())
    ties = len(difference) - longer - shorter
    better = "longer" if longer >= shorter else "shorter"
    return {
        "chosen_longer": wilson(longer, len(difference)), "chosen_shorter": wilson(shorter, len(difference)), "equal": ties,
        "difference": _quantiles(difference),
        # What a judge reaches who sees nothing but lengths and tosses a coin where they are equal.
        "rule": better, "rule_accuracy": wilson(max(longer, shorter) + ties / 2, len(difference)),
    }


def _reference(scored: pl.DataFrame) -> dict[str, Any]:
    margin = scored["ref_margin"].to_numpy()
    per_token = (scored["ref_chosen_per_token"] - scored["ref_rejected_per_token"]).to_numpy()
    return {"right_by_sum": wilson(_wins(margin), len(margin)), "right_per_token": wilson(_wins(per_token), len(margin)),
            "margin": _quantiles(margin)}


def _wins(values: np.ndarray) -> float:
    return float((values > 0).sum() + (values == 0).sum() / 2)


def _length_and_reference(scored: pl.DataFrame) -> dict[str, Any]:
    difference, margin = scored["length_difference"].to_numpy().astype(float), scored["ref_margin"].to_numpy()
    if len(margin) < 3 or not difference.std() or not margin.std():
        return {"pearson": None, "spearman": None, "slope": None, "bins": _by_bin(difference, margin)}
    ranks = [scored[name].rank().to_numpy() for name in ("length_difference", "ref_margin")]
    return {"pearson": float(np.corrcoef(difference, margin)[0, 1]), "spearman": float(np.corrcoef(*ranks)[0, 1]),
            "slope": float(np.polyfit(difference, margin, 1)[0]), "bins": _by_bin(difference, margin)}


def _by_bin(difference: np.ndarray, margin: np.ndarray) -> list[dict[str, Any]]:
    """How often the reference is right among pairs of about the same length difference: what is left when length is
    known."""
    edges = [-np.inf, *LENGTH_BINS, np.inf]
    bins = []
    for low, high in pairwise(edges):
        inside = (difference >= low) & (difference < high)
        bins.append({"from": None if np.isinf(low) else int(low), "to": None if np.isinf(high) else int(high) - 1,
                     "pairs": int(inside.sum()), "right": wilson(_wins(margin[inside]), int(inside.sum()))})
    return bins


def _surprise(scored: pl.DataFrame) -> dict[str, Any]:
    values = {side: -scored[f"ref_{side}_per_token"].to_numpy() for side in ("chosen", "rejected")}
    result: dict[str, Any] = {side: _quantiles(each) for side, each in values.items()}
    for side in values:
        tokens = int(scored[f"{side}_tokens"].sum())
        nats = -float(scored[f"ref_{side}_logps"].sum())
        result[f"{side}_perplexity"] = float(np.exp(min(nats / tokens, 700.0))) if tokens else None
    return result | {"overlap": overlap(values["chosen"], values["rejected"])}


def _quantiles(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    return {"mean": float(values.mean())} | {name: float(np.quantile(values, share)) for name, share in (
        ("least", 0.0), ("p10", 0.1), ("p25", 0.25), ("median", 0.5), ("p75", 0.75), ("p90", 0.9), ("p99", 0.99),
        ("most", 1.0))}
