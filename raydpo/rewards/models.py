"""Rewards by models: a reward model that scores answers on Ray, and a judge behind an API."""

from __future__ import annotations

import bisect
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

__all__ = ["model_rewards", "reward_model"]

BLOCK = 256
"""Answers that an actor scores and stores together."""
TIE = 0.5
"""What an answer wins in a duel that neither wins, and the reward of one that has no other to be compared with."""

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
    against: pa.Table | None = None,
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
        against: rows of ``task.ANSWERS``, the opponents in a judge's duels; None = the other answers of ``answers``.

    Returns:
        A table of ``RESULTS`` in the order of ``answers``. An answer that cannot be scored has an error.

    Raises:
        RaydpoError: if the model cannot be loaded, the judge cannot be reached, or no answer could be judged.
    """
    rows = _rows(answers)
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
            found = _by_scores(*given) if reward.scale == "score" else _by_duels(reward, *given, against)
        share = (time.perf_counter() - started) / len(asked)
        found = [{**one, "seconds": share} for one in found]
    of = dict(zip(asked, found, strict=True))
    return pa.Table.from_pylist([of[row] for row in rows], schema=RESULTS)


def _rows(answers: pa.Table) -> list[_Asked]:
    return list(zip(answers["prompt"].to_pylist(), answers["completion"].to_pylist(), strict=True))


def reward_model(path: str, config: Config) -> RewardModel:
    """Find and identify a reward model.

    Raises:
        FilesError, ModelError: if it is not there, or not stored as safetensors.
    """
    return RewardModel.at(resolve_model(path), dtypes(config)[1], config.model.trust_remote_code)


def _by_reward_model(
    path: str,
    asked: Sequence[_Asked],
    config: Config,
    storage: Storage,
    resources: Resources,
    progress: Callable[[int, int], None],
    warn: Callable[[str], None],
) -> list[dict[str, Any]]:
    work = reward_model(path, config)
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
    against: pa.Table | None,
) -> list[dict[str, Any]]:
    theirs = asked if against is None else list(dict.fromkeys(_rows(against)))
    pairs = list(_duels(asked, reward.opponents) if against is None else _duels_with(asked, theirs, reward.opponents))
    differ = np.array([asked[one] != theirs[other] for one, other in pairs], bool)
    contests = [Contest(json.loads(asked[one][0]), asked[one][1], theirs[other][1]) for one, other in pairs]
    verdicts = np.full(len(pairs), TIE)  # of equal answers nothing is asked
    asking = [contest for contest, differs in zip(contests, differ, strict=True) if differs]
    verdicts[differ], told = judge_contests(judge, asking, storage, progress, warn)
    if lost := int(np.isnan(verdicts).sum()):
        warn(
            f"reward {reward_name(reward)}: {lost:,} of {len(asking):,} duels have no verdict ({told['refused']:,} "
            f"replies had none, {told['failed']:,} requests failed)"
        )
    won: list[list[float]] = [[] for _ in asked]
    for (one, other), verdict in zip(pairs, verdicts.tolist(), strict=True):
        won[one].append(verdict)
        if against is None:
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
    for circle in _circles(asked).values():
        for number in range(duels_of(len(circle), opponents)):
            step, start = divmod(number, len(circle))
            yield circle[start], circle[(start + step + 1) % len(circle)]


def _duels_with(asked: Sequence[_Asked], theirs: Sequence[_Asked], opponents: int) -> Iterator[tuple[int, int]]:
    """Choose the duels of answers with other answers to the same prompt, as places in ``asked`` and ``theirs``: each with
    ``opponents`` of them, the next ones in their circle. An answer that is among them meets itself first."""
    circles = _circles(theirs)
    for place, (prompt, answer) in enumerate(asked):
        circle = circles.get(prompt, [])
        order = [_order(*theirs[other]) for other in circle]
        start = bisect.bisect_left(order, _order(prompt, answer))
        for step in range(min(opponents, len(circle))):
            yield place, circle[(start + step) % len(circle)]


def _circles(asked: Sequence[_Asked]) -> dict[str, list[int]]:
    """Places of the answers to each prompt, in the order of ``_order``."""
    by_prompt: dict[str, list[int]] = {}
    for place, (prompt, _) in enumerate(asked):
        by_prompt.setdefault(prompt, []).append(place)
    return {prompt: sorted(places, key=lambda place: _order(*asked[place])) for prompt, places in by_prompt.items()}


def _order(prompt: str, answer: str) -> bytes:
    content = json.dumps([prompt, answer]).encode()
    return hashlib.blake2b(content, digest_size=16, person=b"raydpo-duels-1").digest()
