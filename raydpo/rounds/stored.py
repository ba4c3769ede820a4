"""The gate of a round whose policy is not its reference: stored log-probs of earlier rounds against new ones.

The step-0 gate compares the cache with the policy, which is the reference in the first round that has it. In later rounds
the workers that score the new answers also score a few stored ones again. That costs no further load of the model. A round
without new answers loads no reference, and compares nothing: all that it reads was compared or scored by earlier rounds.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from raydpo.data.ragged import Ragged, tokens_in_use
from raydpo.errors import GateError
from raydpo.model.layout import PromptGroup
from raydpo.pipeline.prepare import Prepared
from raydpo.reference.pairs import SIDES, reference_values
from raydpo.training.gate import TOLERANCES

__all__ = ["compare_stored", "groups_of", "stored_pairs"]


def stored_pairs(prepared: Prepared) -> pa.Table:
    """At most ``train.gate_pairs`` of the training pairs whose log-probs the cache holds token by token: half of them have
    the lowest log-probs, where an altered value shows, half are random. Call it before the others are scored."""
    table, train = prepared.sets.train, prepared.config.train
    prepared.cache.refresh()
    sides = reference_values(table, prepared.cache)
    known = np.flatnonzero(np.all([found.known & np.isfinite(found.sums) for found in sides], axis=0))
    means = [found.sums / np.maximum(tokens_in_use(table, side), 1) for side, found in zip(SIDES, sides, strict=True)]
    lowest = known[np.argsort(np.minimum(*means)[known], kind="stable")]
    drawn = np.random.default_rng(train.seed).permutation(known)
    half = train.gate_pairs // 2
    rows = list(dict.fromkeys([*lowest[:half].tolist(), *drawn.tolist()]))[: train.gate_pairs]
    return table.take(pa.array(rows, pa.int64()))


def groups_of(table: pa.Table) -> list[PromptGroup]:
    """The completions of ``table`` as groups to score, pair by pair."""
    columns = [Ragged.of(table[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    return [
        PromptGroup(np.array(columns[0][row], np.int32), tuple(np.array(each[row], np.int32) for each in columns[1:]))
        for row in range(table.num_rows)
    ]


def compare_stored(prepared: Prepared, table: pa.Table, again: np.ndarray) -> str:
    """Compare the stored log-probs of ``table`` with those that were computed again. Returns what was found.

    Args:
        again: log-probs of ``groups_of(table)``, one after another: float32 [tokens].

    Raises:
        GateError: if they differ by more than rounding.
    """
    sides = reference_values(table, prepared.cache)
    identity = prepared.reference.identity
    mean_tolerance, token_tolerance = TOLERANCES[identity.dtype]
    chosen, rejected = (np.split(found.values, found.offsets[1:-1]) for found in sides)
    stored = [np.concatenate(both) for both in zip(chosen, rejected, strict=True)]
    gaps = np.abs(np.concatenate(stored) - again)
    by_pair = np.split(gaps, np.cumsum([len(one) for one in stored])[:-1])
    means, worst = (np.array([of(one) for one in by_pair]) for of in (np.mean, np.max))
    beyond = np.maximum(means / mean_tolerance, worst / token_tolerance)
    first = int(np.argmax(np.where(np.isfinite(beyond), beyond, np.inf)))
    name = table["pair_id"][first].as_py()
    if not beyond[first] <= 1:
        raise GateError(
            f"the cached log-probs are not those of the reference {identity.digest}: scored again, pair {name} differs by "
            f"{means[first]:.3g} nats a token on average and {worst[first]:.3g} at most (tolerance {mean_tolerance:g} and "
            f"{token_tolerance:g} in {identity.dtype}); {table.num_rows} pairs were compared. The cache was altered: delete "
            f"the directory {identity.digest} of {prepared.cache.storage} and run the command again, which scores all again"
        )
    return (
        f"{table.num_rows} pairs that it had scored before were scored again, and differ by {means.mean():.2g} nats a token "
        f"on average, {worst.max():.2g} at most (pair {name})"
    )
