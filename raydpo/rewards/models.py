"""Rewards by models: a reward model that scores answers on Ray, and a judge behind an API."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raydpo.answers.contests import Contest
from raydpo.answers.judge import Judge, judge_contests
from raydpo.answers.rating import HIGHEST, LOWEST, rate
from raydpo.answers.reward import RewardModel
from raydpo.cluster.resources import Resources, dtypes
from raydpo.cluster.work import do_work
from raydpo.config import Config
from raydpo.config.rewards import RewardConfig, duels_of, reward_name
from raydpo.reference.identity import resolve_model
from raydpo.rewards.process import RESULTS
from raydpo.storage.files import Storage

__all__ = ["model_rewards"]

BLOCK = 256
"""Answers that an actor scores and stores together."""
TIE = 0.5
"""Reward of an answer that has no other to be compared with."""

_Asked = tuple[str, str]
"""A prompt as JSON, and an answer."""


def model_rewards(
    reward: RewardConfig,
    answers: pa.Table,
    config: Config,
    storage: Storage,
    resources: Resources | None,
    progress: Callable[[int, int], None],
    warn: Callable[[str], None],
) -> pa.Table:
    """Score answers with a reward model or a judge. Equal answers to a prompt are scored once and have equal rewards.

    The reward is the score of a reward model. Of a judge it lies between 0 and 1: the share of its duels that an answer won,
    a tie counting one half; or (score - 1) / 9. Scores and replies are stored by content, so none is computed twice.

    Args:
        answers: rows of ``task.ANSWERS``.
        storage: storage of the cache.
        resources: workers and devices of a reward model; a judge needs none.
        progress: called with (done, to do).
        warn: called with sentences about damaged files, replies without a verdict, and a model that scores no batches.

    Returns:
        A table of ``RESULTS`` in the order of ``answers``. An answer that cannot be scored has an error.

    Raises:
        RaydpoError: if the model cannot be loaded, the judge cannot be reached, or no answer could be judged.
    """
    rows = list(zip(answers["prompt"].to_pylist(), answers["completion"].to_pylist(), strict=True))
    asked = list(dict.fromkeys(rows))
    started = time.perf_counter()
    if not asked:
        found: list[dict[str, Any]] = []
    elif reward.reward_model is not None:
        assert resources is not None
        found = _by_reward_model(reward.reward_model, asked, config, storage, resources, progress, warn)
    else:
        assert reward.judge is not None
        with Judge(reward.judge, f"judge of the reward {reward_name(reward)}") as judge:
            given = judge, asked, storage, progress, warn
            found = _by_scores(*given) if reward.scale == "score" else _by_duels(reward, *given)
        share = (time.perf_counter() - started) / len(asked)
        found = [{**one, "seconds": share} for one in found]
    of = dict(zip(asked, found, strict=True))
    return pa.Table.from_pylist([of[row] for row in rows], schema=RESULTS)


def _by_reward_model(
    path: str,
    asked: Sequence[_Asked],
    config: Config,
    storage: Storage,
    resources: Resources,
    progress: Callable[[int, int], None],
    warn: Callable[[str], None],
) -> list[dict[str, Any]]:
    _, dtype = dtypes(config)
    work = RewardModel.at(resolve_model(path), dtype, config.model.trust_remote_code)
    rows = pa.table({"prompt": [prompt for prompt, _ in asked], "answer": [answer for _, answer in asked]})
    (scored,) = do_work(work, [rows], storage, resources, block=BLOCK, progress=progress, doing="reward model", warn=warn)
    for why in filter(None, scored["alone"].unique().to_pylist()):
        warn(f"the reward model {path} scores one answer at a time, which is slower: {why}")
    return [
        {"reward": one["score"], "error": one["error"], "details": None, "seconds": one["seconds"] or 0.0}
        for one in scored.to_pylist()
    ]


def _by_scores(
    judge: Judge,
    asked: Sequence[_Asked],
    storage: Storage,
    progress: Callable[[int, int], None],
    warn: Callable[[str], None],
) -> list[dict[str, Any]]:
    found = rate(judge, [(json.loads(prompt), answer) for prompt, answer in asked], storage, progress, warn)
    return [
        {"error": each}
        if isinstance(each, str)
        else {"reward": (each - LOWEST) / (HIGHEST - LOWEST), "details": json.dumps({"score": each})}
        for each in found
    ]


def _by_duels(
    reward: RewardConfig,
    judge: Judge,
    asked: Sequence[_Asked],
    storage: Storage,
    progress: Callable[[int, int], None],
    warn: Callable[[str], None],
) -> list[dict[str, Any]]:
    pairs = list(_duels(asked, reward.opponents))
    contests = [Contest(json.loads(asked[one][0]), asked[one][1], asked[other][1]) for one, other in pairs]
    verdicts, told = judge_contests(judge, contests, storage, progress, warn)
    if lost := int(np.isnan(verdicts).sum()):
        warn(
            f"reward {reward_name(reward)}: {lost:,} of {len(contests):,} duels have no verdict ({told['refused']:,} "
            f"replies had none, {told['failed']:,} requests failed)"
        )
    won: list[list[float]] = [[] for _ in asked]
    for (one, other), verdict in zip(pairs, verdicts.tolist(), strict=True):
        won[one].append(verdict)
        won[other].append(1 - verdict)
    return [_of_duels(judge, np.array(each)) for each in won]


def _of_duels(judge: Judge, shares: np.ndarray) -> dict[str, Any]:
    """Result of one answer from what it won in its duels: 1, 0.5, 0, or NaN without a verdict, [duels]."""
    judged = shares[~np.isnan(shares)]
    if not len(shares):
        return {"reward": TIE, "details": json.dumps({"duels": 0})}
    if not len(judged):
        return {"error": f"the judge {judge.name} gave no verdict in any of its {len(shares)} duels"}
    return {"reward": float(judged.mean()), "details": json.dumps({"duels": len(shares), "judged": len(judged)})}


def _duels(asked: Sequence[_Asked], opponents: int) -> Iterator[tuple[int, int]]:
    """Choose the duels among the different answers to each prompt, as places in ``asked``.

    The answers stand in a circle, in an order that a digest of their texts decides. Each is compared with the next
    ``opponents`` answers, so it has twice as many duels, or one with each other answer if there are fewer.
    """
    by_prompt: dict[str, list[int]] = {}
    for place, (prompt, _) in enumerate(asked):
        by_prompt.setdefault(prompt, []).append(place)
    for prompt, places in by_prompt.items():
        circle = sorted(places, key=lambda place: _order(prompt, asked[place][1]))
        for number in range(duels_of(len(circle), opponents)):
            step, start = divmod(number, len(circle))
            yield circle[start], circle[(start + step + 1) % len(circle)]


def _order(prompt: str, answer: str) -> bytes:
    content = json.dumps([prompt, answer]).encode()
    return hashlib.blake2b(content, digest_size=16, person=b"raydpo-duels-1").digest()
