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
from raydpo.rundir.rounds import GREEDY
from raydpo.storage.files import Storage

__all__ = ["model_rewards", "reward_model"]

BLOCK = 256
"""Answers that an actor scores and stores together."""
TIE = 0.5
"""What an answer wins in a duel that neither wins, and the reward of one that has no other to be compared with."""

_Asked = tuple[str, str]
"""A prompt as JSON, and an answer."""
_Kind = tuple[str, str, bool]
"""The same, and whether the answer is greedy."""


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
    """Score answers with a reward model or a judge. Equal answers to a prompt are scored once and have equal rewards; in
    duels with ``against`` equal sampled ones.

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
    rows: list[tuple[Any, ...]] = list(_rows(answers))
    asked = list(dict.fromkeys(rows))
    started = time.perf_counter()
    if not asked:
        found: list[dict[str, Any]] = []
    elif reward.reward_model is not None:
        assert resources is not None
        found = _by_reward_model(reward.reward_model, asked, config, storage, resources, progress, warn)
    else:
        assert reward.judge is not None
        with Judge(reward.judge, f"reward {reward_name(reward)}: judge") as judge:
            if reward.scale == "score":
                found = _by_scores(judge, asked, storage, progress, warn)
            elif against is None:
                found = _by_duels(reward, judge, asked, storage, progress, warn)
            else:
                asked = rows  # each has opponents of its own
                found = _by_duels_with(reward, judge, answers, against, storage, progress, warn)
        share = (time.perf_counter() - started) / len(asked)
        found = [{**one, "seconds": share} for one in found]
    if asked is not rows:
        of = dict(zip(asked, found, strict=True))
        found = [of[row] for row in rows]
    return pa.Table.from_pylist(found, schema=RESULTS)


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
) -> list[dict[str, Any]]:
    """Results of different answers by duels among those to one prompt."""
    pairs = list(_duels(asked, reward.opponents))
    contests = [(*asked[one], asked[other][1]) for one, other in pairs]
    won: list[list[float]] = [[] for _ in asked]
    for (one, other), verdict in zip(pairs, _verdicts(reward, judge, contests, storage, progress, warn), strict=True):
        won[one].append(verdict)
        won[other].append(1 - verdict)
    return [_of_duels(judge, np.array(each)) for each in won]


def _by_duels_with(
    reward: RewardConfig,
    judge: Judge,
    answers: pa.Table,
    against: pa.Table,
    storage: Storage,
    progress: Callable[[int, int], None],
    warn: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Results of the rows of ``answers`` by duels with those of ``against``."""
    kinds, met = _kinds(answers), _opponents(answers, against, reward.opponents)
    contests = list(
        dict.fromkeys(
            (prompt, answer, other)
            for (prompt, answer, _), others in zip(kinds, met, strict=True)
            for other in others
            if answer != other  # of equal answers nothing is asked
        )
    )
    verdicts = dict(zip(contests, _verdicts(reward, judge, contests, storage, progress, warn), strict=True))
    won: dict[_Kind, list[float]] = {kind: [] for kind in kinds}
    for kind, others in zip(kinds, met, strict=True):
        won[kind] += [verdicts.get((kind[0], kind[1], other), TIE) for other in others]
    return [_of_duels(judge, np.array(won[kind])) for kind in kinds]


def _verdicts(
    reward: RewardConfig,
    judge: Judge,
    contests: Sequence[tuple[str, str, str]],
    storage: Storage,
    progress: Callable[[int, int], None],
    warn: Callable[[str], None],
) -> list[float]:
    """What the first of two different answers wins in each contest: 1, 0.5, 0, or NaN without a verdict."""
    asking = [Contest(json.loads(prompt), one, other) for prompt, one, other in contests]
    verdicts, told = judge_contests(judge, asking, storage, progress, warn)
    if lost := int(np.isnan(verdicts).sum()):
        warn(
            f"reward {reward_name(reward)}: {lost:,} of {len(asking):,} duels have no verdict ({told['refused']:,} "
            f"replies had none, {told['failed']:,} requests failed)"
        )
    return verdicts.tolist()


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


def _circles(asked: Sequence[_Asked]) -> dict[str, list[int]]:
    """Places of the answers to each prompt, in the order of ``_order``."""
    by_prompt: dict[str, list[int]] = {}
    for place, (prompt, _) in enumerate(asked):
        by_prompt.setdefault(prompt, []).append(place)
    return {prompt: sorted(places, key=lambda place: _order(*asked[place])) for prompt, places in by_prompt.items()}


def _kinds(answers: pa.Table) -> list[_Kind]:
    """Prompt and text of each answer, and whether it is greedy. Answers of one kind have equal rewards."""
    numbers = answers["sample"].to_pylist()
    return [(*row, number == GREEDY) for row, number in zip(_rows(answers), numbers, strict=True)]


def _opponents(answers: pa.Table, against: pa.Table, opponents: int) -> list[list[str]]:
    """Choose the answers of another model that each answer meets, by numbers and not by texts: an answer that the other
    model gives, too, would always meet itself.

    A sampled answer meets so many of the other model's samples to its prompt: those with the nearest numbers, half of them
    on each side, and the one with its own number if they are odd. So the same answers win half of their duels with each
    other. A greedy answer meets the greedy one.
    """
    theirs: dict[tuple[str, bool], dict[int, str]] = {}
    for (prompt, text, greedy), number in zip(_kinds(against), against["sample"].to_pylist(), strict=True):
        theirs.setdefault((prompt, greedy), {})[number] = text
    circles = {key: [text for _, text in sorted(each.items())] for key, each in theirs.items()}
    half, odd = divmod(opponents, 2)
    met = []
    for (prompt, _, greedy), number in zip(_kinds(answers), answers["sample"].to_pylist(), strict=True):
        circle = circles.get((prompt, greedy), [])
        some = opponents < len(circle)
        steps = [step for step in range(-half, half + 1) if step or odd] if some else range(len(circle))
        met.append([circle[(number + step) % len(circle)] for step in steps])
    return met


def _order(prompt: str, answer: str) -> bytes:
    content = json.dumps([prompt, answer]).encode()
    return hashlib.blake2b(content, digest_size=16, person=b"raydpo-duels-1").digest()
