"""Reward functions that score answers: built-in ones, the user's own, reward models and judges."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, Protocol

from pydantic import Field, model_validator

from raydpo.config.judge import JudgeConfig
from raydpo.config.section import Float, Int, PathOrUri, Section

__all__ = [
    "BUILT_IN",
    "RewardConfig",
    "as_rewards",
    "check_names",
    "duels_of",
    "only_duels",
    "options_of",
    "requests_of",
    "reward_name",
]

BUILT_IN = ("math", "json", "regex", "constraints", "code")
"""Names of the built-in reward functions."""
_OPTIONS = {
    "column": ("math", "json", "constraints", "code"),
    "pattern": ("regex",),
    "instructions": ("constraints",),
    "whole": ("json",),
    "unsafe": ("code",),
    "seconds": ("code", "math"),
    "scale": ("judge",),
    "opponents": ("judge",),
}
"""Options, and the reward functions that read them."""


class RewardConfig(Section):
    """One reward function: exactly one of ``use``, ``reward_model`` and ``judge``.

    A function has TRL's interface (``reward_funcs`` of its GRPOTrainer). It gets lists with one entry for each answer, and
    returns a list of numbers; None = it does not apply to this answer.
    """

    use: str | None = None
    """math, json, regex, constraints, code, or module:function of your own."""
    reward_model: PathOrUri | None = None
    """Directory or hub name of a reward model: a sequence classifier with one output."""
    judge: JudgeConfig | None = None
    """Model with an OpenAI-compatible API that judges the answers of a prompt against each other."""
    weight: Float = Field(default=1.0, ge=-1e6, le=1e6)
    """Factor of this function in the sum of all. 0 = it is measured only."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name in tables and pages; null = that of the function or model."""
    timeout: Float = Field(default=60.0, gt=0)
    """Seconds that a function may take for the answers of one block; its answers are then scored one by one, each with as
    much time. math and code also get their seconds for each answer."""
    column: str | None = Field(default=None, min_length=1)
    """Column of the prompts that a built-in function reads: math the right answer (default: answer), json a JSON Schema,
    code the tests (default: tests), constraints the instructions (default: IFEval's instruction_id_list and kwargs)."""
    pattern: str | None = None
    """Regular expression (RE2) for regex: the reward is 1 if it is found in the answer, else 0."""
    instructions: tuple[dict[str, Any], ...] = ()
    """Instructions for constraints that hold for every prompt, such as [{id: 'detectable_format:json_format'}, {id:
    'length_constraints:number_words', num_words: 50, relation: at least}]."""
    whole: bool = True
    """Whether json reads the whole answer; false = a fenced block or the first JSON value in it counts, too."""
    unsafe: bool = False
    """Run code without a sandbox, where the machine allows none. Answers are programs that a model wrote: they then run with
    your rights."""
    seconds: Float = Field(default=5.0, gt=0)
    """Seconds that math and code may take for one answer. code counts seconds of CPU time, for all tests of the answer."""
    scale: Literal["duels", "score"] = "duels"
    """How a judge rewards, from 0 to 1: the share of its duels with other answers to the prompt that an answer won (a tie
    counts one half), or (s - 1) / 9 of a score s from 1 to 10. Answers to held-out prompts have duels with those of the
    initial model."""
    opponents: Int = Field(default=1, ge=1)
    """Number of duels that each answer begins; it is in as many again that others begin. A duel takes two requests, one for
    each order."""

    @property
    def duels(self) -> bool:
        """Whether a judge compares answers in duels."""
        return self.judge is not None and self.scale == "duels"

    @model_validator(mode="before")
    @classmethod
    def _of_name(cls, value: Any) -> Any:
        return {"use": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> RewardConfig:
        given = [name for name in ("use", "reward_model", "judge") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(given) or 'neither use, reward_model nor judge'} given; a reward is one of use (such as "
                "math or my_rewards:politeness), reward_model and judge"
            )
        if self.use is not None and ".py:" in self.use:
            module = self.use.replace(".py:", ":").removeprefix("./").replace("/", ".")
            raise ValueError(f"use {self.use!r} names a file; name its module: {module}")
        if self.use is not None and self.use not in BUILT_IN and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", self.use):
            raise ValueError(
                f"use {self.use!r} is neither built in ({', '.join(BUILT_IN)}) nor of the form module:function, for example "
                "my_rewards:politeness"
            )
        kind = _kind(self)
        for option, readers in _OPTIONS.items():
            if kind not in readers:
                self.refuse_idle([option], f"on {self.use or kind}; drop it, or use {' or '.join(readers)}")
        if self.use is None:
            fix = "set judge.timeout, the seconds of a reply" if self.judge is not None else "drop it"
            self.refuse_idle(["timeout"], f"on {given[0]}; {fix}")
        if self.judge is not None and self.scale == "score":
            self.refuse_idle(["opponents"], "on scale score, which asks about each answer alone; drop it")
        if self.use == "regex" and self.pattern is None:
            raise ValueError("regex needs a pattern, for example pattern: '^(Yes|No)$'")
        if self.use == "constraints" and self.column is not None and self.instructions:
            raise ValueError(f"column ({self.column}) and instructions contradict each other; keep one")
        return self


def as_rewards(value: Any) -> Any:
    """A list of rewards of what may also be a single one, or its name."""
    return [value] if isinstance(value, (str, dict)) else value


def _kind(reward: RewardConfig) -> str:
    """How ``_OPTIONS`` calls this reward: a built-in function by its name, another one by the key that names it."""
    if reward.use is not None and reward.use in BUILT_IN:
        return reward.use
    return next(name for name in ("use", "reward_model", "judge") if getattr(reward, name) is not None)


def options_of(reward: RewardConfig) -> dict[str, Any]:
    """The options that this reward reads, also those with their default value, as plain data for JSON."""
    kind = _kind(reward)
    return reward.model_dump(mode="json", include={option for option, readers in _OPTIONS.items() if kind in readers})


def reward_name(reward: RewardConfig) -> str:
    """Name of a reward function in tables and pages."""
    if reward.name is not None:
        return reward.name
    if reward.use is not None:
        return reward.use.rpartition(":")[2]
    named = reward.reward_model or (reward.judge.model if reward.judge else "")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", named.rstrip("/").rsplit("/", 1)[-1]).strip("-.") or "reward"


def duels_of(answers: int, opponents: int) -> int:
    """Number of duels among so many different answers to a prompt: each begins ``opponents``, but none twice."""
    return min(answers * opponents, answers * (answers - 1) // 2)


class _Reward(Protocol):
    """What ``only_duels`` needs of a reward function, of a configuration or of stored rounds."""

    @property
    def weight(self) -> float: ...

    @property
    def duels(self) -> bool: ...


def only_duels(rewards: Sequence[_Reward]) -> bool:
    """Whether nothing but a judge's duels decides the reward. It then is a win rate, times the weights."""
    weighted = [one for one in rewards if one.weight]
    return bool(weighted) and all(one.duels and one.weight > 0 for one in weighted)


def requests_of(reward: RewardConfig, prompts: int, n: int, against: int | None = None) -> int:
    """Largest number of requests of a reward for ``n`` answers to each of so many prompts. Equal answers save some.

    Args:
        against: number of answers to each prompt that the duels are with; None = among each other.
    """
    if reward.judge is None:
        return 0
    duels = duels_of(n, reward.opponents) if against is None else n * min(reward.opponents, against)
    return prompts * (n if reward.scale == "score" else 2 * duels)


def check_names(rewards: tuple[RewardConfig, ...]) -> None:
    """Refuse two reward functions of one name.

    Raises:
        ValueError: naming it.
    """
    names = [reward_name(one) for one in rewards]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two rewards are both named {twice[0]!r}; give each its own name")
