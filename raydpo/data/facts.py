"""Facts about each pair that need no model: lengths, copies, and stored log-probs of the reference. Used by filters and the
audit."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpo.config.filter import FACTS
from raydpo.data.counting import counted_tokens, counts
from raydpo.data.index import KeyIndex, as_bytes
from raydpo.data.ragged import digests, tokens_in_use
from raydpo.data.select import LABEL

__all__ = ["LENGTH_BINS", "digests_of", "pair_facts", "prompt_numbers", "with_reference"]

_TYPES = {"bool": pa.bool_(), "float64": pa.float64(), "int8": pa.int8(), "int64": pa.int64(), "string": pa.string()}
_SIDES = ("chosen", "rejected")


def pair_facts(pairs: pa.Table, ref_chosen: np.ndarray | None = None, ref_rejected: np.ndarray | None = None) -> pa.Table:
    """Table of the columns of ``config.filter.FACTS``, one row per pair.

    Args:
        pairs: rows of ``data.pairs.PAIR_SCHEMA``.
        ref_chosen, ref_rejected: sums of the reference's log-probs over the tokens that count, each times its weight, nats,
            float64 [pairs], NaN where unknown. Without them the columns of ``config.filter.REFERENCE_FACTS`` are null.
    """
    prompt, *used = (tokens_in_use(pairs, name).astype(np.int64) for name in ("prompt", *_SIDES))
    chosen, rejected = (counted_tokens(pairs, side).astype(np.int64) for side in _SIDES)
    full = [pairs[f"{side}_full"].to_numpy().astype(np.int64) for side in _SIDES]
    label = pairs[LABEL].to_numpy() if LABEL in pairs.column_names else np.zeros(pairs.num_rows, np.int8)
    alone = (used[0] == 0) | (used[1] == 0)
    copies, copy, opposites = _copies(pairs)
    columns = {
        "pair_id": pairs["pair_id"],
        "source": pairs["source"],
        "label": label,
        "prompt_tokens": prompt,
        "chosen_tokens": chosen,
        "rejected_tokens": rejected,
        "length_difference": pa.array(chosen - rejected, mask=alone if alone.any() else None),
        "chosen_uncounted": used[0] - chosen,
        "rejected_uncounted": used[1] - rejected,
        "chosen_cut": full[0] - used[0],
        "rejected_cut": full[1] - used[1],
        "copies": copies,
        "copy": copy,
        "opposites": opposites,
        "contradictory": opposites > 0,
        "prompt_pairs": _uses(digests_of(pairs, "prompt")),
        "answer_pairs": _answer_pairs(pairs),
        "chosen_weights": counts(pairs, "chosen"),
        "rejected_weights": counts(pairs, "rejected"),
    }
    kinds = {name: _TYPES[kind] for name, (kind, _) in FACTS.items()}
    nothing = pa.nulls(pairs.num_rows, pa.float64())  # one array for all columns of the reference
    facts = pa.table({name: columns.get(name, nothing) for name in kinds}).cast(pa.schema(kinds))
    return facts if ref_chosen is None or ref_rejected is None else with_reference(facts, ref_chosen, ref_rejected)


def with_reference(facts: pa.Table, ref_chosen: np.ndarray, ref_rejected: np.ndarray) -> pa.Table:
    """Rows of ``pair_facts`` with their columns of the reference. Arguments as there, for these rows."""
    unknown = np.isnan(ref_chosen) | np.isnan(ref_rejected)
    lacking = {
        side: unknown | ((facts[f"{side}_tokens"].to_numpy() == 0) & (facts[f"{side}_uncounted"].to_numpy() == 0))
        for side in _SIDES
    }
    lacking["margin"] = lacking["chosen"] | lacking["rejected"]
    with np.errstate(invalid="ignore"):  # the missing side of a completion alone: 0 nats, 0 tokens
        reference = {
            "ref_chosen_logps": ref_chosen,
            "ref_rejected_logps": ref_rejected,
            "ref_margin": ref_chosen - ref_rejected,
            "ref_chosen_per_token": ref_chosen / facts["chosen_weights"].to_numpy(),
            "ref_rejected_per_token": ref_rejected / facts["rejected_weights"].to_numpy(),
        }
    for name, values in reference.items():
        column = pa.array(values, pa.float64(), mask=lacking[name.split("_")[1]])
        facts = facts.set_column(facts.column_names.index(name), name, column)
    return facts


def prompt_numbers(pairs: pa.Table) -> np.ndarray:
    """Number of each pair's prompt among the distinct prompts, int64 [pairs]."""
    return np.unique(digests_of(pairs, "prompt"), return_inverse=True)[1]


def _answer_pairs(pairs: pa.Table) -> np.ndarray:
    uses = _uses(np.concatenate([digests_of(pairs, side) for side in _SIDES]))
    uses[np.concatenate([tokens_in_use(pairs, side) for side in _SIDES]) == 0] = 0  # no answer at all
    return uses.reshape(2, -1).max(0)


def digests_of(pairs: pa.Table, part: str) -> np.ndarray:
    """``digests`` of the ids in use of each pair, uint64 [pairs]. Reads tokens only of pairs that are cut, if the table has
    the digests before truncation (``select.PLACE_SCHEMA``).

    Args:
        part: prompt, chosen or rejected.
    """
    ids = pairs[f"{part}_ids"]
    if f"{part}_hash" not in pairs.column_names:
        return digests(ids)
    found = pairs[f"{part}_hash"].to_numpy()
    if part != "prompt":
        cut = np.flatnonzero(pc.list_value_length(ids).to_numpy() < pairs[f"{part}_full"].to_numpy())
        if len(cut):
            found = found.copy()
            found[cut] = digests(ids, cut)
    return found


def _uses(digests: np.ndarray) -> np.ndarray:
    """Number of occurrences of each digest, int64 [rows]."""
    _, inverse, counts = np.unique(digests, return_inverse=True, return_counts=True)
    return counts[inverse]


def _copies(pairs: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count, for each pair, the pairs with the same tokens, its number among them, and the pairs with chosen and rejected
    swapped."""
    keys = [as_bytes(pairs[f"{side}_key"]) for side in ("chosen", "rejected")]
    lengths = [pc.list_value_length(pairs[f"{side}_ids"]).to_numpy().astype(np.int32) for side in ("chosen", "rejected")]
    index = KeyIndex()
    index.add((np.concatenate(keys), np.concatenate(lengths), 0))
    chosen, rejected = (index.find(each) for each in keys)
    code, opposite = (one * np.int64(2 * len(chosen)) + two for one, two in ((chosen, rejected), (rejected, chosen)))
    distinct, inverse, counts = np.unique(code, return_inverse=True, return_counts=True)
    order = np.argsort(inverse, kind="stable")
    number = np.empty(len(code), np.int64)
    number[order] = np.arange(len(code)) - np.repeat(np.cumsum(counts) - counts, counts)
    place = np.minimum(np.searchsorted(distinct, opposite), max(0, len(distinct) - 1))
    return counts[inverse], number, np.where(distinct[place] == opposite, counts[place], 0)


LENGTH_BINS = (-100, -25, 0, 1, 26, 101)
"""Left edges of the bins of length difference, tokens: much shorter, shorter, slightly shorter, equal, ..."""
