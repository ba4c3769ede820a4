"""Figures of a round from its tables alone: keys of ``rundir.rounds.ROUNDS_SCHEMA``.

Answers to one prompt are not independent, so standard errors are over prompts. An answer without a reward is no success. A
figure of nothing is None.

Where only a judge's duels reward, the success is the win rate: the answers of two equal policies
have 0.5, and how many are above it says nothing. Answers without a verdict are left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpo.config.rewards import only_duels
from raydpo.config.rounds import RoundsConfig
from raydpo.data.index import as_values
from raydpo.data.interval import by_group, standard_error
from raydpo.data.ragged import Ragged, digests
from raydpo.errors import DataError
from raydpo.rounds.pairing import aligned, id_prefix, is_cut
from raydpo.rundir.rounds import GREEDY

__all__ = ["held_out_figures", "pair_figures", "sampled_figures"]


def sampled_figures(prompts: pa.Table, samples: pa.Table, scores: pa.Table, rounds: RoundsConfig) -> dict[str, Any]:
    """Return the figures of the answers that a round trains on: ``prompts`` to ``entropy``.

    Args:
        prompts: rows of ``PROMPT_SCHEMA``, of which some were answered.
        samples, scores: rows of ``SAMPLE_SCHEMA`` and ``SCORE_SCHEMA`` of the same answers, in any order.

    Raises:
        DataError: if an answer has no score or no prompt.
    """
    samples, scores = aligned(samples, scores)
    unknown = set(samples["prompt_id"].unique().to_pylist()) - set(prompts["prompt_id"].to_pylist())
    if unknown:
        raise DataError(
            f"the samples hold answers to {len(unknown):,} prompts that are not in the table of prompts, such as "
            f"{min(unknown).hex()}; it is not of these rounds"
        )
    found = _answer_figures(samples, scores, rounds)
    known = scores["reward"].is_valid().to_numpy()
    groups, rewards = _groups(samples), scores["reward"].to_numpy()
    low, high = np.full(found["prompts"], np.inf), np.full(found["prompts"], -np.inf)
    np.minimum.at(low, groups[known], rewards[known])
    np.maximum.at(high, groups[known], rewards[known])
    found["mixed"] = _share(int((high > low).sum()), found["prompts"])
    found["ties"] = int(((high == low) & (np.bincount(groups[known], minlength=found["prompts"]) > 1)).sum())
    return found


def held_out_figures(held_out: pa.Table, rounds: RoundsConfig) -> dict[str, Any]:
    """Return the figures of the answers to held-out prompts: ``eval_prompts`` to ``eval_drift_previous_se``.

    All but ``eval_success_greedy`` and ``eval_errors`` are of sampled answers; errors are of greedy ones, too. The drift is
    the mean of ``log_ratio``, which estimates KL(policy || initial model) since the policy drew the answers; None if an
    answer lacks it. That from the policy before the round is the mean of ``log_ratio_previous``.

    Args:
        held_out: rows of ``HELD_OUT_SCHEMA``.
    """
    greedy = pc.equal(held_out["sample"], GREEDY)
    alone, sampled = held_out.filter(greedy), held_out.filter(pc.invert(greedy))
    found = {f"eval_{name}": value for name, value in _answer_figures(sampled, sampled, rounds).items()}
    groups = _groups(sampled)
    values = _values(sampled, rounds)
    known = ~np.isnan(values)
    found["eval_success_se"] = _error(values[known], np.unique(groups[known], return_inverse=True)[1])
    found["eval_success_greedy"] = _known_mean(_values(alone, rounds))
    found["eval_errors"] = held_out["error"].length() - held_out["error"].null_count
    for name, column in (("initial", "log_ratio"), ("previous", "log_ratio_previous")):
        ratios = sampled[column]
        measured = len(ratios) > 0 and not ratios.null_count
        found[f"eval_drift_{name}"] = _mean(ratios.to_numpy()) if measured else None
        found[f"eval_drift_{name}_se"] = _error(ratios.to_numpy(), groups) if measured else None
    return found


def pair_figures(pairs: pa.Table, number: int) -> dict[str, int]:
    """Return the figures ``pairs`` and ``replayed`` of the pairs of round ``number``."""
    new = int(pc.sum(pc.starts_with(pairs["pair_id"], id_prefix(number))).as_py() or 0)
    return {"pairs": len(pairs), "replayed": len(pairs) - new}


def _answer_figures(samples: pa.Table, scores: pa.Table, rounds: RoundsConfig) -> dict[str, Any]:
    """The figures that both kinds of answers have, given the scores in the order of the answers."""
    groups, ids = _groups(samples), samples["answer_ids"]
    count, prompts = len(samples), int(groups.max(initial=-1)) + 1
    right = _successes(scores, rounds)
    wins = np.bincount(groups[right], minlength=prompts)
    sizes = np.bincount(groups, minlength=prompts)
    _, distinct = np.unique(np.stack([groups.astype(np.uint64), digests(ids)]), axis=1, return_index=True)
    return {
        "prompts": prompts,
        "answers": count,
        "reward": _mean(scores["reward"].drop_null().to_numpy()),
        "rewards": _by_function(scores),
        "success": _known_mean(_values(scores, rounds)),
        "any": _share(int((wins > 0).sum()), prompts),
        "errors": len(scores) - scores["error"].null_count,
        "unknown": scores["reward"].null_count,
        "cut": _mean(is_cut(samples).to_numpy()),
        "tokens": _mean(Ragged.of(ids).lengths),
        "distinct": _mean(np.bincount(groups[distinct], minlength=prompts) / sizes),
        "entropy": _mean(_entropies(groups, ids, prompts)),
    }


def _groups(samples: pa.Table) -> np.ndarray:
    """Number of the prompt of each answer, from 0, int64 [answers]."""
    return np.unique(as_values(samples["prompt_id"]), return_inverse=True)[1]


def _successes(scores: pa.Table, rounds: RoundsConfig) -> np.ndarray:
    """Which answers are a success, bool [answers]."""
    return pc.fill_null(pc.greater(scores["reward"], rounds.measure.success), False).to_numpy()


def _values(scores: pa.Table, rounds: RoundsConfig) -> np.ndarray:
    """What each answer adds to the success, float64 [answers]: 1 or 0; of duels the share that it won, NaN if unknown."""
    if not only_duels(rounds.rewards):
        return _successes(scores, rounds).astype(float)
    rewards = pc.fill_null(scores["reward"], float("nan")).to_numpy()
    return rewards / sum(one.weight for one in rounds.rewards)


def _by_function(scores: pa.Table) -> dict[str, float | None]:
    """Mean of each function over the answers with a value of it; None if there is none."""
    values: dict[str, list[float]] = {}
    for parts in scores["parts"].to_pylist():
        for name, value in parts or ():
            each = values.setdefault(name, [])
            if value is not None:
                each.append(value)
    return {name: _mean(np.array(each)) for name, each in sorted(values.items())}


def _entropies(groups: np.ndarray, ids: pa.ChunkedArray, prompts: int) -> np.ndarray:
    """Entropy of the first token among the answers of each prompt, nats, float64 [prompts]."""
    first = Ragged.of(ids)
    tokens = np.array([int(first[row][0]) if len(first[row]) else -1 for row in range(len(first))], np.int64)
    cases, counts = np.unique(np.stack([groups, tokens]), axis=1, return_counts=True)
    sizes = np.bincount(groups, minlength=prompts)
    shares = counts / sizes[cases[0]]
    return np.bincount(cases[0], -shares * np.log(shares), minlength=prompts)


def _error(values: np.ndarray, groups: np.ndarray) -> float | None:
    """Standard error of the mean of values over prompts, by the delta method; None for fewer than two prompts."""
    if not len(values):
        return None
    sums, sizes = by_group(values, groups)
    error = standard_error(sums - values.mean() * sizes)
    return None if error is None else error / float(sizes.mean())


def _mean(values: np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _known_mean(values: np.ndarray) -> float | None:
    return _mean(values[~np.isnan(values)])


def _share(count: int, total: int) -> float | None:
    return count / total if total else None
