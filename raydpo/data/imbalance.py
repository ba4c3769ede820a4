"""The balance of desirable and undesirable completions."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from raydpo.config import ObjectiveConfig
from raydpo.data.select import LABEL

__all__ = ["label_doubts"]

MOST = 1.33
"""Largest ratio of desirable to undesirable completions, each times its weight, that KTO's paper recommends (arXiv
2402.01306, eq. 8); the least is 1. TRL 1.16 warns outside of this range, too (trainer/kto_trainer.py)."""


def label_doubts(pairs: pa.Table, objective: ObjectiveConfig, run: int | None = None) -> Iterator[str]:
    """Warnings about the labels of training pairs: all of one kind, out of balance for losses that weigh them, or without
    another row to be mismatched with.

    Args:
        pairs: rows of ``select.PAIR_SCHEMA``, with ``select.LABEL`` where completions are alone.
        run: as ``mismatch.mismatched_run``.
    """
    if LABEL not in pairs.column_names:
        return
    labels, uses = pairs[LABEL].to_numpy(), pairs["weight"].to_numpy()
    alone = int((labels != 0).sum())
    if run is not None and min(run, alone) == 1:  # TRL 1.16 refuses batches of one (trainer/kto_trainer.py)
        yield (
            f"train.loss {objective.loss_text} measures the drift on completions of other rows, but "
            + (f"train.pairs_per_step is {run}" if run == 1 else "there is one row with a label")
            + ", so it is that of the row's own completion, whose reward it cancels; "
            + ("set train.pairs_per_step to 2 or more" if run == 1 else "add rows")
        )
    both = (0.5 if objective.estimates_drift else 1.0) * uses[labels == 0].sum()  # kto has the mean of a pair's two terms
    desirable, undesirable = (float(uses[labels == label].sum() + both) for label in (1, -1))
    if not desirable or not undesirable:
        only, other = ("desirable", "avoid") if desirable else ("undesirable", "write instead")
        yield (
            f"all {len(labels):,} completions are {only}, so nothing tells the policy what to {other}; add completions with "
            "the other label, or look whether the column of labels is the right one"
        )
        return
    good, bad = objective.desirable_weight, objective.undesirable_weight
    ratio = good * desirable / (bad * undesirable)
    # As in TRL nothing is said of equal numbers.
    if not {"kto", "apo_zero"} & objective.terms.keys() or desirable == undesirable or _within(ratio):
        return
    least, bound = bad * undesirable / desirable, good * desirable / undesirable
    yield (
        f"{desirable:,.10g} desirable and {undesirable:,.10g} undesirable completions with train.desirable_weight {good:g} "
        f"and train.undesirable_weight {bad:g} are out of balance; set desirable_weight within "
        f"[{least:.2f}, {MOST * least:.2f}], or undesirable_weight within [{bound / MOST:.2f}, {bound:.2f}], not both"
    )


def _within(ratio: float) -> bool:
    """Whether a ratio is in the range, but for the rounding of the bounds that are told."""
    return 1 - 0.01 <= ratio <= MOST + 0.01
