"""Computes the figures of an audit from token lengths and cached log-probs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl

from raydpo.data.facts import LENGTH_BINS
from raydpo.data.interval import Interval, mean_by_group, share, share_by_group
from raydpo.data.separation import placements

__all__ = ["LABELS", "counts", "counts_by_source", "figures", "named", "pairs_of", "quantiles", "separation", "signed"]

QUANTILES = {
    "least": 0,
    "p01": 0.01,
    "p10": 0.1,
    "p25": 0.25,
    "median": 0.5,
    "p75": 0.75,
    "p90": 0.9,
    "p99": 0.99,
    "most": 1,
}
FAR_MARGIN = -150
"""Highest reference margin, nats, at which the advised filter may cut."""
FAR_SHARE = 0.01
"""Largest share of pairs that the advised filter removes for their margin. Of fewer than 100 pairs it may remove one."""

LABELS = {"desirable": (1, "chosen"), "undesirable": (-1, "rejected")}
"""Labels, their values in column ``label``, and the side whose facts are those of such a completion."""
PAIR = pl.col("length_difference").is_not_null()
"""Whether a row has two completions."""


def _label_counts() -> pl.Expr:
    """Count completions with labels by what needs no reference: an object for each label."""

    def of(value: int, side: str) -> pl.Expr:
        mine = pl.col("label") == value
        kinds = {
            "all": mine,
            "copies": mine & (pl.col("copy") > 0) & ~pl.col("contradictory"),
            "both_labels": mine & pl.col("contradictory"),
            "both_labels_evenly": mine & pl.col("contradictory") & (pl.col("opposites") == pl.col("copies")),
            "empty": mine & (pl.col(f"{side}_tokens") <= 1),
            "truncated": mine & (pl.col(f"{side}_cut") > 0),
        }
        return pl.struct(**{name: which.sum() for name, which in kinds.items()})

    return pl.struct(**{label: of(*each) for label, each in LABELS.items()})


_COUNTS = {
    "all_pairs": PAIR.sum(),
    "duplicates": (PAIR & (pl.col("copy") > 0) & ~pl.col("contradictory")).sum(),
    "contradictory": (PAIR & pl.col("contradictory")).sum(),
    "contradictory_evenly": (PAIR & pl.col("contradictory") & (pl.col("opposites") == pl.col("copies"))).sum(),
    "shared_prompt": (PAIR & (pl.col("prompt_pairs") > pl.col("copies"))).sum(),
    "shared_answer": (PAIR & (pl.col("answer_pairs") > pl.col("copies"))).sum(),
    "empty": pl.struct(**{side: (PAIR & (pl.col(f"{side}_tokens") <= 1)).sum() for side in ("chosen", "rejected")}),
    "truncated": pl.struct(**{side: (PAIR & (pl.col(f"{side}_cut") > 0)).sum() for side in ("chosen", "rejected")}),
    "counted": (pl.col("chosen_tokens") + pl.col("rejected_tokens")).sum(),
    "uncounted": (pl.col("chosen_uncounted") + pl.col("rejected_uncounted")).sum(),
    "labels": _label_counts(),
}


def counts(frame: pl.DataFrame) -> dict[str, Any]:
    """Count pairs by what needs no reference. ``frame`` has columns of ``config.filter.FACTS``."""
    return frame.select(**_COUNTS).row(0, named=True)


def counts_by_source(frame: pl.DataFrame) -> dict[str, dict[str, Any]]:
    """``counts`` of the pairs of each source, in order of their first pairs."""
    found = frame.group_by("source", maintain_order=True).agg(**_COUNTS)
    return {row.pop("source"): row for row in found.iter_rows(named=True)}


def figures(frame: pl.DataFrame, counted: dict[str, Any] | None = None) -> dict[str, Any]:
    """Compute all figures of the pairs in ``frame``.

    Shares have 95 % intervals that take prompts as independent, not pairs. Log-probs are in nats. Surprise is -log-prob per
    token. Lengths and log-probs are of the tokens that count. ``counted`` and ``uncounted`` are numbers of tokens of
    completions. A figure is None if there are too few pairs for it.

    Args:
        frame: has the columns of ``config.filter.FACTS`` and ``prompt``, the number of the prompt. Completions alone are
            left out, see ``labels.by_label``.
        counted: ``counts`` of the pairs that ``frame`` is a sample of; None if it has them all.
    """
    counted = counts(frame) if counted is None else counted
    pairs = pairs_of(frame)
    scored = pairs.filter(pl.col("ref_margin").is_not_null())
    return {
        "pairs": pairs.height,
        "not_scored": pairs.height - scored.height,
        "tokens": {name: quantiles(pairs[f"{name}_tokens"].to_numpy()) for name in ("prompt", "chosen", "rejected")},
        "length": _length(pairs),
        "reference": _reference(scored),
        "length_and_reference": _length_and_reference(scored),
        "surprise": _surprise(scored),
        **{name: value for name, value in counted.items() if name != "labels"},
    }


def pairs_of(frame: pl.DataFrame) -> pl.DataFrame:
    """The rows with two completions. Where all have, nothing is copied."""
    return frame.filter(PAIR) if frame["length_difference"].null_count() else frame


def separation(one: np.ndarray, two: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
    """Estimate the probability that a value of ``two`` exceeds one of ``one`` (Mann-Whitney); a tie counts one half.

    Args:
        one, two: values of the chosen and the rejected answers, [pairs].
        prompts: number of the prompt of each pair, [pairs].
    """
    if not len(one):
        return named(share(0, 0), 0.0, 0)
    # ``above``: share of ``two`` that exceeds each value of ``one``. ``below``: share of ``one`` that each value of ``two``
    # exceeds. The error of the estimate is that of a mean of their sums, up to terms that vanish as the number of pairs
    # grows (DeLong et al. 1988, doi 10.2307/2531595).
    above, below = 1 - placements(one, two), placements(two, one)
    auc = float(below.mean())
    found = mean_by_group(above + below - auc, prompts)
    if found["low"] == found["high"]:  # no variance: complete separation, all equal, or one prompt
        found = share_by_group(below, prompts)
    low, high = (bound if bound is None else min(1.0, max(0.0, bound)) for bound in (found["low"], found["high"]))
    return named({"value": auc, "low": low, "high": high}, auc * len(one), len(one))


def _share(values: np.ndarray, frame: pl.DataFrame) -> dict[str, Any]:
    """Mean of ``values`` with its interval; ``values`` has one number from 0 to 1 for each pair of ``frame``."""
    values = values.astype(float)
    return named(share_by_group(values, frame["prompt"].to_numpy()), float(values.sum()), len(values))


def named(found: Interval, count: float, total: int) -> dict[str, Any]:
    """An interval as the audit stores it, of ``count`` among ``total``."""
    return {"share": found["value"], "low": found["low"], "high": found["high"], "count": count, "of": total}


def _length(frame: pl.DataFrame) -> dict[str, Any]:
    difference = frame["length_difference"].to_numpy()
    longer, shorter = difference > 0, difference < 0
    better = "longer" if longer.sum() >= shorter.sum() else "shorter"
    return {
        "chosen_longer": _share(longer, frame),
        "chosen_shorter": _share(shorter, frame),
        "equal": int((difference == 0).sum()),
        "difference": quantiles(difference),
        # The accuracy of a judge that looks at lengths only; a tie counts one half.
        "rule": better,
        "rule_accuracy": _share(_wins(difference if better == "longer" else -difference), frame),
    }


def _reference(scored: pl.DataFrame) -> dict[str, Any]:
    margin = scored["ref_margin"].to_numpy()
    per_token = (scored["ref_chosen_per_token"] - scored["ref_rejected_per_token"]).to_numpy()
    bound = min(FAR_MARGIN, int(np.floor(np.quantile(margin, FAR_SHARE)))) if len(margin) else FAR_MARGIN
    return {
        "right_by_sum": _share(_wins(margin), scored),
        "right_per_token": _share(_wins(per_token), scored),
        "margin": quantiles(margin),
        "far": {"bound": bound, "pairs": int((margin <= bound).sum())},
    }


def _wins(values: np.ndarray) -> np.ndarray:
    return (np.sign(values) + 1) / 2


def _length_and_reference(scored: pl.DataFrame) -> dict[str, Any]:
    difference, margin = scored["length_difference"].to_numpy().astype(float), scored["ref_margin"].to_numpy()
    if len(margin) < 3 or not difference.std() or not margin.std():
        return {"pearson": None, "spearman": None, "slope": None, "bins": _by_bin(scored)}
    ranks = [scored[name].rank().to_numpy() for name in ("length_difference", "ref_margin")]
    return {
        "pearson": float(np.corrcoef(difference, margin)[0, 1]),
        "spearman": float(np.corrcoef(*ranks)[0, 1]),
        "slope": float(np.polyfit(difference, margin, 1)[0]),
        "bins": _by_bin(scored),
    }


def _by_bin(scored: pl.DataFrame) -> list[dict[str, Any]]:
    """Share of the pairs that the reference ranks right, in each bin of length difference."""
    difference = scored["length_difference"].to_numpy()
    bins = []
    for low, high in pairwise([-np.inf, *LENGTH_BINS, np.inf]):
        inside = scored.filter(pl.Series((difference >= low) & (difference < high), dtype=pl.Boolean))
        bins.append(
            {
                "from": None if np.isinf(low) else int(low),
                "to": None if np.isinf(high) else int(high) - 1,
                "pairs": inside.height,
                "right": _share(_wins(inside["ref_margin"].to_numpy()), inside),
            }
        )
    return bins


def _surprise(scored: pl.DataFrame) -> dict[str, Any]:
    values = {side: -scored[f"ref_{side}_per_token"].to_numpy() for side in ("chosen", "rejected")}
    result: dict[str, Any] = {side: quantiles(each) for side, each in values.items()}
    for side in values:
        tokens = float(scored[f"{side}_weights"].sum())
        nats = -float(scored[f"ref_{side}_logps"].sum())
        result[f"{side}_perplexity"] = float(np.exp(min(nats / tokens, 700.0))) if tokens else None
    return result | {"separation": separation(values["chosen"], values["rejected"], scored["prompt"].to_numpy())}


def signed(median: float) -> str:
    """A median of whole numbers with its sign, such as ``+2`` or ``-0.5``, which lies between two of them."""
    return f"{median:+,.1f}".removesuffix(".0")


def quantiles(values: np.ndarray) -> dict[str, float] | None:
    """Mean of the values and their ``QUANTILES``; None without values."""
    if not len(values):
        return None
    return {"mean": float(values.mean())} | {name: float(np.quantile(values, at)) for name, at in QUANTILES.items()}
