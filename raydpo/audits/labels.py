"""The figures of completions with labels: what desirable and undesirable ones have in common, and what tells them apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from raydpo.audits.measure import LABELS, named, quantiles
from raydpo.data.interval import share
from raydpo.data.separation import auc_by_group

__all__ = ["ABOUT", "by_label", "label_columns", "label_lines"]


def by_label(frame: pl.DataFrame, counted: dict[str, dict[str, int]]) -> dict[str, Any] | None:
    """Compute the figures of the completions with labels in ``frame``; None if there are none.

    ``longer`` is the probability that a random desirable completion has more tokens than a random undesirable one, and
    ``surprises_more`` that an undesirable one surprises the reference more, per token; see ``data.separation``.

    Args:
        frame: as of ``measure.figures``.
        counted: ``labels`` of what ``measure.counts`` gives of the rows that ``frame`` is a sample of.
    """
    if not any(each["all"] for each in counted.values()):
        return None
    rows = {label: frame.filter(pl.col("label") == value) for label, (value, _) in LABELS.items()}
    scored = {label: each.filter(pl.col(f"ref_{LABELS[label][1]}_per_token").is_not_null()) for label, each in rows.items()}
    tokens = {label: each[f"{LABELS[label][1]}_tokens"].to_numpy() for label, each in rows.items()}
    surprise = {label: -each[f"ref_{LABELS[label][1]}_per_token"].to_numpy() for label, each in scored.items()}
    prompts = pl.concat(list(rows.values())).group_by("prompt").agg(good=pl.col("label").max(), bad=pl.col("label").min())
    both = int(((prompts["good"] > 0) & (prompts["bad"] < 0)).sum())

    def above(values: dict[str, np.ndarray], of: dict[str, pl.DataFrame], one: str, other: str) -> dict[str, Any]:
        both = np.concatenate([values[one], values[other]])
        labels = np.repeat([1, -1], [len(values[one]), len(values[other])])
        auc = auc_by_group(both, labels, pl.concat([of[one]["prompt"], of[other]["prompt"]]).to_numpy())
        return named(auc, (auc["value"] or 0.0) * len(both), len(both))

    return {
        "completions": sum(each.height for each in rows.values()),
        "not_scored": sum(rows[label].height - scored[label].height for label in LABELS),
        **{
            label: counted[label] | {"tokens": quantiles(tokens[label]), "surprise": quantiles(surprise[label])}
            for label in LABELS
        },
        "longer": above(tokens, rows, "desirable", "undesirable"),
        "surprises_more": above(surprise, scored, "undesirable", "desirable"),
        "prompts_with_both": named(share(both, prompts.height), both, prompts.height),
    }


def label_lines(labels: dict[str, Any]) -> list[str]:
    """Summarise what ``by_label`` gives in a few lines for the terminal."""
    good, bad = (labels[label] for label in LABELS)
    line = f"audit: completions with labels: {good['all']:,} desirable and {bad['all']:,} undesirable"
    if good["tokens"] and bad["tokens"]:
        line += (
            f", {good['tokens']['median']:.0f} and {bad['tokens']['median']:.0f} tokens in the median; of two drawn at "
            f"random the desirable one is longer in {labels['longer']['share']:.1%}"
        )
    lines = [line]
    if good["surprise"] and bad["surprise"]:
        lines.append(
            f"audit: desirable {good['surprise']['median']:.2f}, undesirable {bad['surprise']['median']:.2f} nats a token "
            "in the median; of two drawn at random the undesirable one surprises the reference more in "
            f"{labels['surprises_more']['share']:.1%}"
        )
    both = labels["prompts_with_both"]
    told = [f"{both['share']:.1%} of {both['of']:,} prompts have both labels"]
    for name, what in (
        ("copies", "copies"),
        ("both_labels", "also have the other label"),
        ("empty", "empty"),
        ("truncated", "cut"),
    ):
        if count := good[name] + bad[name]:
            told.append(f"{count:,} {what}")
    return [*lines, f"audit: {', '.join(told)}"]


ABOUT = {
    "desirable": "completions with a good label; of a sample, those of all rows",
    "undesirable": "completions with a bad label",
    "length desirable": "median of their tokens",
    "length undesirable": "median of their tokens",
    "desirable longer": "probability that a random desirable completion has more tokens than a random undesirable one",
    "surprise desirable": "median surprise of the reference at desirable completions, nats a token",
    "surprise undesirable": "median surprise at undesirable completions, nats a token",
    "undesirable surprises more": "probability that a random undesirable completion surprises the reference more, per "
    "token, than a random desirable one: 50 % if the reference cannot tell them apart",
    "prompts with both labels": "prompts with a desirable and an undesirable completion",
    "copies of completions": "completions that equal an earlier one of the same label, token by token",
    "with both labels": "completions that also occur with the other label; second number: with both equally often",
    "empty completions": "desirable and undesirable ones that consist of an end token alone",
    "cut completions": "desirable and undesirable ones that were cut to data.max_length",
}
"""Further rows of the table if there are completions with labels, and what each row shows."""


def label_columns(labels: dict[str, Any] | None) -> dict[str, str]:
    """The figures of one source, or of all, as text, by row of the table."""
    if labels is None:
        return dict.fromkeys(ABOUT, "-")

    def median(value: dict[str, float] | None, form: str) -> str:
        return "-" if value is None else format(value["median"], form)

    def chance(value: dict[str, Any]) -> str:
        bounds = "" if value["low"] is None else f" ({value['low']:.1%} to {value['high']:.1%})"
        return "-" if value["share"] is None else f"{value['share']:.1%}{bounds}"

    good, bad = (labels[label] for label in LABELS)
    both = {name: good[name] + bad[name] for name in ("copies", "both_labels", "both_labels_evenly")}
    return {
        "desirable": f"{good['all']:,}",
        "undesirable": f"{bad['all']:,}",
        "length desirable": median(good["tokens"], ".0f"),
        "length undesirable": median(bad["tokens"], ".0f"),
        "desirable longer": chance(labels["longer"]),
        "surprise desirable": median(good["surprise"], ".2f"),
        "surprise undesirable": median(bad["surprise"], ".2f"),
        "undesirable surprises more": chance(labels["surprises_more"]),
        "prompts with both labels": chance(labels["prompts_with_both"]),
        "copies of completions": f"{both['copies']:,}",
        "with both labels": f"{both['both_labels']:,}, {both['both_labels_evenly']:,}",
        "empty completions": f"{good['empty']:,}, {bad['empty']:,}",
        "cut completions": f"{good['truncated']:,}, {bad['truncated']:,}",
    }
