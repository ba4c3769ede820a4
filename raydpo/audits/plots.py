"""The pictures of an audit."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from raydpo.audits.measure import LABELS, pairs_of, signed
from raydpo.pages.plot import BAD, GOOD, INK, PALE, Picture, figure, length_bars, svg

__all__ = ["label_plots", "plots"]

BINS = 48
"""Largest number of bars of a histogram."""
TRENDS = 16
"""Number of groups of pairs, of about equal size, whose margins are drawn over length."""


def plots(frame: pl.DataFrame, figures: dict[str, Any]) -> list[Picture]:
    """Draw the pairs in ``frame``. ``figures`` is the result of ``measure.figures`` for them."""
    frame = pairs_of(frame)
    scored = frame.filter(pl.col("ref_margin").is_not_null())
    pictures = [_differences(frame["length_difference"].to_numpy(), figures)]
    if scored.height > 1:
        pictures += [_surprises(scored, figures), _margin_by_length(scored, figures), _right_by_length(figures)]
    return pictures


def _differences(difference: np.ndarray, figures: dict[str, Any]) -> Picture:
    low, high = (int(np.quantile(difference, share)) for share in (0.005, 0.995))
    width = max(1, -(-(high - low) // BINS))  # whole tokens: other widths give some bars one value more than others
    edges = np.arange(low, high + width + 1, width) - 0.5
    counts, _ = np.histogram(np.clip(difference, edges[0], edges[-1]), edges)
    centres = (edges[:-1] + edges[1:]) / 2
    length = figures["length"]
    title = "Length difference"
    caption = (
        f"The chosen answer is longer in {length['chosen_longer']['share']:.1%} of the pairs, shorter in "
        f"{length['chosen_shorter']['share']:.1%}; the median difference is {signed(length['difference']['median'])} "
        "tokens. Values beyond the edges are in the outermost bars."
    )
    with figure() as (made, axes):
        axes.bar(centres, counts, width, color=[BAD if centre < 0 else GOOD for centre in centres])
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set(xlabel="chosen longer by, tokens", ylabel="pairs")
        return Picture(title, svg(made, title, caption), caption)


def _surprises(scored: pl.DataFrame, figures: dict[str, Any]) -> Picture:
    values = {side: -scored[f"ref_{side}_per_token"].to_numpy() for side in ("chosen", "rejected")}
    surprise = figures["surprise"]
    title = "Surprise of the reference"
    caption = (
        f"Median {surprise['chosen']['median']:.2f} nats a token for chosen answers, "
        f"{surprise['rejected']['median']:.2f} for rejected ones. Of two answers drawn at random, the "
        f"rejected one surprises more in {surprise['separation']['share']:.0%} of the draws. The further right, the "
        "less likely the model itself is to write such an answer. The outermost 1 % of the values is not shown."
    )
    return _densities(values, title, caption, "surprise, nats a token")


def _densities(values: dict[str, np.ndarray], title: str, caption: str, label: str) -> Picture:
    """The densities of two kinds of values, the good ones first."""
    # The outermost values would flatten the picture.
    low, high = np.quantile(np.concatenate(list(values.values())), [0.005, 0.995])
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    with figure() as (made, axes):
        for (kind, each), colour in zip(values.items(), (GOOD, BAD), strict=True):
            density, _ = np.histogram(each, edges, density=True)
            axes.stairs(density, edges, color=colour, linewidth=1.6, label=kind)
        axes.set(xlabel=label, ylabel="density")
        axes.legend()
        return Picture(title, svg(made, title, caption), caption)


def label_plots(frame: pl.DataFrame, labels: dict[str, Any]) -> list[Picture]:
    """Draw the completions with labels in ``frame``. ``labels`` is what ``labels.by_label`` gives for them."""
    good, bad = (labels[label] for label in LABELS)
    pictures = []
    for name, title, axis, told in (
        ("tokens", "Length by label", "tokens", "the desirable one is longer in {longer[share]:.0%}"),
        (
            "surprise",
            "Surprise by label",
            "surprise of the reference, nats a token",
            "the undesirable one surprises the reference more in {surprises_more[share]:.0%}",
        ),
    ):
        if good[name] is None or bad[name] is None:
            continue
        caption = (
            f"Median {good[name]['median']:,.4g} for desirable completions, {bad[name]['median']:,.4g} for undesirable "
            f"ones. Of two drawn at random, {told.format(**labels)} of the draws. The outermost 1 % of the values is not "
            "shown."
        )
        values = {}
        for label, (value, side) in LABELS.items():
            mine = frame.filter(pl.col("label") == value)
            column = mine[f"{side}_tokens"] if name == "tokens" else -mine[f"ref_{side}_per_token"].drop_nulls()
            values[label] = column.to_numpy()
        pictures.append(_densities(values, title, caption, axis))
    return pictures


def _margin_by_length(scored: pl.DataFrame, figures: dict[str, Any]) -> Picture:
    difference, margin = scored["length_difference"].to_numpy(), scored["ref_margin"].to_numpy()
    # Bins of equally many pairs keep the picture small for any number of pairs.
    order = np.argsort(difference, kind="stable")
    groups = [each for each in np.array_split(order, TRENDS) if len(each)]
    centres = [np.median(difference[each]) for each in groups]
    low, middle, high = np.array([np.quantile(margin[each], [0.1, 0.5, 0.9]) for each in groups]).T
    both = figures["length_and_reference"]
    title = "Margin and length"
    caption = "A sum of log-probs falls with every token, so the reference's margin mostly shows which answer is shorter."
    if both["slope"] is not None:
        caption += (
            f" It changes by {both['slope']:+.2f} nats for each token that the chosen answer is longer: correlation "
            f"{both['pearson']:.2f}, rank correlation {both['spearman']:.2f}."
        )
    with figure() as (made, axes):
        axes.fill_between(centres, low, high, color=PALE, alpha=0.45, linewidth=0, label="80 % of pairs")
        axes.plot(centres, middle, color=GOOD, linewidth=1.6, label="median")
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set(xlabel="chosen longer by, tokens", ylabel="reference margin, nats")
        axes.legend()
        return Picture(title, svg(made, title, caption), caption)


def _right_by_length(figures: dict[str, Any]) -> Picture:
    bins = [each for each in figures["length_and_reference"]["bins"] if each["pairs"]]
    return length_bars(
        "Ranked right, by length",
        "Share of pairs whose chosen answer has the higher log-prob under the reference, by "
        "difference in length, with 95 % intervals. If the outer bars differ from the middle ones, length decides.",
        bins,
        [{**each["right"], "value": each["right"]["share"]} for each in bins],
        "ranked right",
    )
