"""Pairs of better and worse answers to the prompts of a round."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpo.config.rounds import RoundsConfig
from raydpo.data.keys import completion_key
from raydpo.data.pairs import PAIR_SCHEMA
from raydpo.data.ragged import Ragged
from raydpo.errors import DataError
from raydpo.rundir.rounds import CUT, SCORE_SCHEMA, TRAIN
from raydpo.terminal.console import Console

__all__ = ["ROUND_PAIR_SCHEMA", "aligned", "final_rewards", "id_prefix", "is_cut", "make_pairs", "no_pairs", "with_replay"]

ROUND_PAIR_SCHEMA = pa.schema(
    [
        *PAIR_SCHEMA,
        ("prompt_id", pa.binary(16)),
        ("good", pa.int32()),  # number of the chosen sample
        ("bad", pa.int32()),
        ("reward_good", pa.float64()),
        ("reward_bad", pa.float64()),
    ]
)
"""Columns of the pairs of a round. ``pair_id`` is ``r001:ROW:GOOD-BAD`` with round, row of the prompt's record, and samples;
``r001:SOURCE:ROW:GOOD-BAD`` if there are several sources, besides a file of held-out prompts."""


@dataclass(frozen=True)
class _Answer:
    """An answer that may be in a pair."""

    sample: int
    reward: float
    ids: bytes
    text: str
    cut: bool

    def same_as(self, other: _Answer) -> bool:
        """Whether both say the same and end alike. A cut answer differs from one that says the same and ends."""
        return self.ids == other.ids or (self.text == other.text and self.cut == other.cut)


def final_rewards(samples: pa.Table, scored: pa.Table, rounds: RoundsConfig) -> pa.Table:
    """Return rows of ``rundir.rounds.SCORE_SCHEMA``: what reward functions say, after ``rounds.cut``.

    With zero, the reward of a cut answer is at most 0; an unknown one stays unknown. With drop it stays, and ``make_pairs``
    passes over the answer.

    Args:
        samples: rows of ``SAMPLE_SCHEMA``.
        scored: rows of ``rewards.apply.SCORES`` of the same answers, in the same order.

    Raises:
        ValueError: if these are not as many, or a reward is not finite.
    """
    if len(samples) != len(scored):
        raise ValueError(f"{len(scored):,} rewards of {len(samples):,} answers")
    rewards = scored["reward"].cast(pa.float64())
    if pc.any(pc.invert(pc.is_finite(rewards))).as_py():
        raise ValueError("a reward is not a finite number; reward functions that return one have failed")
    if rounds.cut == "zero":
        # Not 0 where the reward is below or unknown: among negative rewards a cut answer would be the best one.
        rewards = pc.if_else(is_cut(samples), pc.min_element_wise(rewards, 0.0, skip_nulls=False), rewards)
    columns = {name: samples[name] for name in ("prompt_id", "sample")} | {"reward": rewards}
    columns |= {name: scored[name] for name in SCORE_SCHEMA.names if name not in columns}
    return pa.table({name: columns[name] for name in SCORE_SCHEMA.names}).cast(SCORE_SCHEMA)


def id_prefix(number: int) -> str:
    """Return what the ids of the pairs that round ``number`` makes begin with, such as ``r001:``."""
    return f"r{number:03d}:"


def make_pairs(prompts: pa.Table, samples: pa.Table, scores: pa.Table, rounds: RoundsConfig, number: int) -> pa.Table:
    """Return the pairs of round ``number``, rows of ``ROUND_PAIR_SCHEMA``. The order of the given rows does not matter.

    Chosen is better than rejected by more than ``pairs.margin``. Answers without a reward are in no pair, nor cut ones with
    ``cut: drop``. Two answers with the same tokens or the same text make no pair, whatever their rewards; but one that is
    cut and one that ends may. Among equal rewards the lowest sample comes first. Completions are the ids as sampled: a cut
    one has no end token.

    Args:
        prompts: rows of ``PROMPT_SCHEMA``.
        samples, scores: rows of ``SAMPLE_SCHEMA`` and ``SCORE_SCHEMA`` of the same answers.

    Raises:
        DataError: if an answer is to a held-out prompt or to none of ``prompts``, or has no score.
    """
    places = _places(prompts, samples, number)
    answers = _by_prompt(samples, scores, rounds)
    several = len(pc.unique(prompts["source"].filter(pc.equal(prompts["split"], TRAIN)))) > 1
    used = prompts.take(pa.array([places[key] for key in answers], pa.int64()))
    order = np.lexsort((used["row"].to_numpy(), np.array(used["source"].to_pylist(), str))) if answers else []
    keys = list(answers)
    asked = Ragged.of(used["prompt_ids"])
    sources, rows = used["source"].to_pylist(), used["row"].to_pylist()
    found: list[dict[str, Any]] = []
    for place in map(int, order):
        ids, key, source, row = asked[place], keys[place], sources[place], rows[place]
        for good, bad in _chosen(answers[key], rounds):
            chosen, rejected = (np.frombuffer(one.ids, np.int32) for one in (good, bad))
            name = f"{source}:{row}" if several else str(row)
            found.append(
                {
                    "pair_id": f"{id_prefix(number)}{name}:{good.sample}-{bad.sample}",
                    "source": source,
                    "weight": 1.0,
                    "prompt_ids": ids,
                    "chosen_ids": chosen,
                    "rejected_ids": rejected,
                    "chosen_key": completion_key(ids, chosen),
                    "rejected_key": completion_key(ids, rejected),
                    "chosen_full": len(chosen),
                    "rejected_full": len(rejected),
                    "prompt_id": key,
                    "good": good.sample,
                    "bad": bad.sample,
                    "reward_good": good.reward,
                    "reward_bad": bad.reward,
                }
            )
    columns = {name: [pair[name] for pair in found] for name in ROUND_PAIR_SCHEMA.names}
    return pa.table(columns, schema=ROUND_PAIR_SCHEMA)


def _chosen(answers: Sequence[_Answer], rounds: RoundsConfig) -> list[tuple[_Answer, _Answer]]:
    """The pairs of the answers to one prompt, (better, worse) each."""
    if rounds.pairs.choose == "best_worst":
        return _best_worst(answers, rounds.pairs.margin)
    best_first = sorted(answers, key=lambda one: (-one.reward, one.sample))
    worst_first = sorted(answers, key=lambda one: (one.reward, one.sample))
    used: set[int] = set()
    pairs: list[tuple[_Answer, _Answer]] = []
    for good in best_first:
        if len(pairs) == rounds.pairs.per_prompt:
            break
        if good.sample in used:
            continue
        for bad in worst_first:
            if good.reward - bad.reward <= rounds.pairs.margin:
                break
            if bad.sample not in used and not good.same_as(bad):
                pairs.append((good, bad))
                used |= {good.sample, bad.sample}
                break
    return pairs


def _best_worst(answers: Sequence[_Answer], margin: float) -> list[tuple[_Answer, _Answer]]:
    """The pair with the largest difference, or none if that is not above ``margin``."""
    best: tuple[float, int, int] | None = None
    pair: list[tuple[_Answer, _Answer]] = []
    for good in answers:
        for bad in answers:
            difference = good.reward - bad.reward
            if difference > margin and not good.same_as(bad):
                rank = (-difference, good.sample, bad.sample)
                if best is None or rank < best:
                    best, pair = rank, [(good, bad)]
    return pair


def aligned(samples: pa.Table, scores: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Return both tables in order of prompt and sample, so that the rows of both are of the same answers.

    Raises:
        DataError: if they are of different answers.
    """
    samples, scores = (table.sort_by([("prompt_id", "ascending"), ("sample", "ascending")]) for table in (samples, scores))
    if any(not samples[name].equals(scores[name]) for name in ("prompt_id", "sample")):
        raise DataError(
            f"the {len(scores):,} scores are not those of the {len(samples):,} answers; delete the scores, and run again"
        )
    return samples, scores


def _by_prompt(samples: pa.Table, scores: pa.Table, rounds: RoundsConfig) -> dict[bytes, list[_Answer]]:
    """The answers that may be in pairs, by prompt and in order of their samples. Prompts come in order of their ids."""
    samples, scores = aligned(samples, scores)
    keys, numbers = (samples[name].to_pylist() for name in ("prompt_id", "sample"))
    use = pc.is_valid(scores["reward"])
    if rounds.cut == "drop":
        use = pc.and_(use, pc.invert(is_cut(samples)))
    ids, rewards = Ragged.of(samples["answer_ids"]), scores["reward"].to_pylist()
    texts, cut = samples["answer"].to_pylist(), is_cut(samples).to_pylist()
    answers: dict[bytes, list[_Answer]] = {}
    for place in np.flatnonzero(use.to_numpy()).tolist():
        content = ids[place].astype(np.int32, copy=False).tobytes()
        one = _Answer(numbers[place], rewards[place], content, texts[place], cut[place])
        answers.setdefault(keys[place], []).append(one)
    return answers


def _places(prompts: pa.Table, samples: pa.Table, number: int) -> dict[bytes, int]:
    """Row of each training prompt, by its id. Refuses answers to other prompts."""
    splits = prompts["split"].to_pylist()
    places = {key: place for place, key in enumerate(prompts["prompt_id"].to_pylist()) if splits[place] == TRAIN}
    others = {key for key in samples["prompt_id"].unique().to_pylist() if key not in places}
    if others:
        raise DataError(
            f"the samples of round {number} hold answers to {len(others):,} prompts that are held out or not among the "
            f"prompts, such as {min(others).hex()}; such answers are never trained on: delete the samples of this round, "
            "and run again"
        )
    return places


def is_cut(samples: pa.Table) -> pa.ChunkedArray:
    """Return which answers were cut at ``rounds.sample.max_tokens``, bool [answers]."""
    return pc.equal(samples["end"], CUT)


# ---- replay


def with_replay(
    pairs: pa.Table, earlier: Sequence[pa.Table], rounds: RoundsConfig, number: int, console: Console | None = None
) -> pa.Table:
    """Return ``pairs`` and, behind them, pairs of earlier rounds, so that these are the share ``rounds.replay`` of all.

    Which ones depends on ``sample.seed``, the round and the ids of the pairs alone. No two replayed pairs, and no replayed
    and new one, have the same prompt and completions.

    Args:
        earlier: the pairs of earlier rounds, which may hold replayed ones, too.
        console: where it is said if there are fewer than wanted.
    """
    wanted = round(len(pairs) * rounds.replay / (1 - rounds.replay))
    if not wanted:
        return pairs
    known = {tuple(keys) for keys in zip(*(pairs[name].to_pylist() for name in _KEYS), strict=True)}
    ranked: list[tuple[bytes, int]] = []
    pool = pa.concat_tables([pairs.slice(0, 0), *earlier])
    seed = struct.pack("<QQ", rounds.sample.seed, number)
    for place, pair_id in enumerate(pool["pair_id"].to_pylist()):
        digest = hashlib.blake2b(seed + pair_id.encode(), digest_size=16, person=b"raydpo-replay-1")
        ranked.append((digest.digest(), place))
    keys = list(zip(*(pool[name].to_pylist() for name in _KEYS), strict=True))
    taken: list[int] = []
    for _, place in sorted(ranked):
        if len(taken) == wanted:
            break
        if keys[place] not in known:
            known.add(keys[place])
            taken.append(place)
    if len(taken) < wanted and number > 1 and console is not None:
        console.say(
            f"round {number}: rounds.replay {rounds.replay:g} asks for {wanted:,} pairs of earlier rounds, but there are "
            f"only {len(taken):,} that are not among the {len(pairs):,} new ones; all of these are used"
        )
    return pa.concat_tables([pairs, pool.take(pa.array(taken, pa.int64()))]).combine_chunks()


_KEYS = ("chosen_key", "rejected_key")

# ---- a round without pairs

Why = Literal["right", "wrong", "tied", "unknown"]
"""Why a round has no pair."""


def no_pairs(samples: pa.Table, scores: pa.Table, rounds: RoundsConfig) -> tuple[Why, str]:
    """Return why these answers make no pair, as a word and as a sentence that says what to change."""
    answers = [one for each in _by_prompt(samples, scores, rounds).values() for one in each]
    total, known = len(samples), len(answers)
    threshold = rounds.measure.success
    right = sum(one.reward > threshold for one in answers)
    cut = int(pc.sum(is_cut(samples)).as_py() or 0)
    if not known or (right == known and 2 * known < total):  # a few right answers say nothing about the others
        few, others = f"none of {total:,} answers", "them"
        if known:
            few, others = f"only {known:,} of {total:,} answers, all right,", "the others"
        if rounds.cut == "drop" and cut:
            return "unknown", (
                f"{few} can be in a pair: {cut:,} are cut at {rounds.sample.max_tokens} tokens (rounds.cut is drop) and "
                f"{total - known - cut:,} have no reward; raise rounds.sample.max_tokens, or set rounds.cut to zero"
            )
        return "unknown", (
            f"{few} can be in a pair: no reward function applies to {others}, or one failed; correct "
            "rounds.rewards, or the columns of the prompts that they read"
        )
    apart = f", and {total - known:,} more are in no pair" if known < total else ""
    if right == known:
        return "right", (
            f"{right:,} of {known:,} answers are right (reward above {threshold:g}){apart}, so there is nothing to learn; "
            "stop here, or use harder prompts"
        )
    if not right:
        if rounds.cut == "zero" and 2 * cut >= total:
            most = rounds.sample.max_tokens
            fix = f"{cut:,} are cut and so worth at most 0 (rounds.cut): raise rounds.sample.max_tokens ({most})"
        else:
            n = rounds.sample.n
            fix = f"use easier prompts, raise rounds.sample.n ({n}), or begin with a model that was trained for the task"
        return "wrong", (
            f"none of {known:,} answers is right (reward above {threshold:g}){apart}, and no prompt has answers that differ "
            f"by more than rounds.pairs.margin ({rounds.pairs.margin:g}); {fix}"
        )
    return "tied", (
        f"{right:,} of {known:,} answers are right (reward above {threshold:g}){apart}, but no prompt has answers that "
        f"differ by more than rounds.pairs.margin ({rounds.pairs.margin:g}); raise rounds.sample.n ({rounds.sample.n}) or "
        "rounds.per_round, lower rounds.pairs.margin, or use prompts of medium difficulty"
    )
