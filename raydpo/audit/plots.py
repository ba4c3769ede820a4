"""The pictures of an audit."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from raydpo.pages.plot import BAD, GOOD, INK, PALE, figure, svg

__all__ = ["plots"]

BINS = 48
TRENDS = 16


def plots(frame: pl.DataFrame, figures: dict[str, Any]) -> list[dict[str, str]]:
    """Title, SVG and caption of each picture of the pairs in ``frame``."""
    difference = frame["length_difference"].to_numpy()
    pictures = [_differences(difference, figures)]
    scored = frame.filter(pl.col("ref_margin").is_not_null())
    if scored.height > 1:
        pictures += [_surprises(scored, figures), _margin_by_length(scored, figures), _right_by_length(figures)]
    return pictures


def _within(values: np.ndarray, share: float = 0.005) -> np.ndarray:
    """Evenly spaced bins over all but the outermost values, which would flatten the picture."""
    low, high = np.quantile(values, [share, 1 - share])
    return np.linspace(low, high if high > low else low + 1, BINS + 1)


def _differences(difference: np.ndarray, figures: dict[str, Any]) -> dict[str, str]:
    low, high = (int(np.quantile(difference, share)) for share in (0.005, 0.995))
    width = max(1, -(-(high - low) // BINS))  # whole tokens, or the bars would form a comb
    edges = np.arange(low, high + width + 1, width) - 0.5
    counts, _ = np.histogram(np.clip(difference, edges[0], edges[-1]), edges)
    centres = (edges[:-1] + edges[1:]) / 2
    with figure() as (made, axes):
        axes.bar(centres, counts, width, color=[BAD if centre < 0 else GOOD for centre in centres])
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set(xlabel="chosen longer by, tokens", ylabel="pairs")
    length = figures["length"]
    return _picture(made, "Length difference", f"The chosen answer is longer in {length['chosen_longer']['share']:.1%} of "
                                               "the "
                    f"pairs, shorter in {length['chosen_shorter']['share']:.1%}; the median difference is "
                    f"{length['difference']['median']:+.0f} tokens. Values beyond the edges are in the outermost bars.")


def _surprises(scored: pl.DataFrame, figures: dict[str, Any]) -> dict[str, str]:
    values = {side: -scored[f"ref_{side}_per_token"].to_numpy() for side in ("chosen", "rejected")}
    edges = _within(np.concatenate(list(values.values())))
    with figure() as (made, axes):
        for (side, each), colour in zip(values.items(), (GOOD, BAD), strict=True):
            density, _ = np.histogram(each, edges, density=True)
            axes.stairs(density, edges, color=colour, linewidth=1.6, label=side)
        axes.set(xlabel="surprise, nats a token", ylabel="density")
        axes.legend()
    surprise = figures["surprise"]
    return _picture(made, "Surprise of the reference", f"Median {surprise['chosen']['median']:.2f} nats a token for chosen, "
                    f"{surprise['rejected']['median']:.2f} for rejected answers; of two at random the rejected one "
                    f"surprises more in {surprise['separation']['share']:.0%}. The further right, the less the model itself "
                    "would write this.")


def _margin_by_length(scored: pl.DataFrame, figures: dict[str, Any]) -> dict[str, str]:
    difference, margin = scored["length_difference"].to_numpy(), scored["ref_margin"].to_numpy()
    # Bins of equally many pairs: as small a picture for millions of pairs as for hundreds.
    order = np.argsort(difference, kind="stable")
    groups = [each for each in np.array_split(order, TRENDS) if len(each)]
    centres = [np.median(difference[each]) for each in groups]
    low, middle, high = np.array([np.quantile(margin[each], [0.1, 0.5, 0.9]) for each in groups]).T
    with figure() as (made, axes):
        axes.fill_between(centres, low, high, color=PALE, alpha=0.45, linewidth=0, label="80 % of pairs")
        axes.plot(centres, middle, color=GOOD, linewidth=1.6, label="median")
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set(xlabel="chosen longer by, tokens", ylabel="reference margin, nats")
        axes.legend()
    both = figures["length_and_reference"]
    tied = "" if both["slope"] is None else (f" {both['slope']:+.2f} nats for each token that the chosen answer is longer, "
                                             f"correlation {both['pearson']:.2f} (rank correlation {both['spearman']:.2f}).")
    return _picture(made, "Margin and length", "Sums of log-probs fall with every token: the reference's margin mostly "
                                               "tells "
                    f"which answer is shorter.{tied}")


def _right_by_length(figures: dict[str, Any]) -> dict[str, str]:
    bins = [each for each in figures["length_and_reference"]["bins"] if each["pairs"]]
    names = [_bin_name(each) for each in bins]
    shares = np.array([each["right"]["share"] for each in bins])
    spread = np.abs(np.array([[each["right"]["low"], each["right"]["high"]] for each in bins]).T - shares)
    with figure() as (made, axes):
        axes.bar(range(len(bins)), shares, 0.7, color=PALE, yerr=spread, error_kw={"ecolor": INK, "elinewidth": 1.0})
        axes.axhline(0.5, color=INK, linewidth=0.8, linestyle="--")
        axes.set(ylim=(0, 1), xlabel="chosen longer by, tokens", ylabel="ranked right")
        axes.set_xticks(range(len(bins)), names, fontsize=7.5)
        axes.grid(False, axis="x")
    return _picture(made, "Ranked right, by length", "How often the reference gives the chosen answer the higher log-prob, "
                                                     "among "
                    "pairs of about the same length difference, with 95 % intervals. Far from the middle it is length that "
                    "decides.")


def _bin_name(each: dict[str, Any]) -> str:
    if each["from"] is None:
        return f"< {each['to'] + 1}"
    if each["to"] is None:
        return f"> {each['from'] - 1}"
    return str(each["from"]) if each["from"] == each["to"] else f"{each['from']}\n…{each['to']}"


def _picture(made: Any, title: str, caption: str) -> dict[str, str]:
    return {"title": title, "svg": svg(made, title, caption), "caption": caption}
