"""Reward functions: the user's own and the built-in ones, found and identified before anything runs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from raydpo.config import Config
from raydpo.config.rewards import BUILT_IN, RewardConfig, options_of
from raydpo.errors import ConfigError, RaydpoError
from raydpo.rewards.process import described
from raydpo.rewards.sources import built_in_digest

__all__ = ["RewardFunction", "resolve", "reward_settings"]


@dataclass(frozen=True)
class RewardFunction:
    """A reward function that was found: a built-in one, or the user's own.

    Attributes:
        name: ``use`` of its configuration.
        digest: of its source. For a user's own see ``sources.sources_digest``.
        options: settings that its rewards depend on, as plain data for JSON.
        parameters: (name, kind of ``inspect.Parameter``, has a default) of a user's own; None if unknown.
    """

    name: str
    digest: str
    options: dict[str, Any]
    parameters: tuple[tuple[str, str, bool], ...] | None = None


def resolve(reward: RewardConfig) -> RewardFunction:
    """Find the function of a reward with ``use``. A user's module is imported in another process, which then ends.

    Raises:
        ConfigError: if there is no such function, or its module cannot be imported.
    """
    assert reward.use is not None
    options = options_of(reward)
    if reward.use in BUILT_IN:
        return RewardFunction(reward.use, built_in_digest(reward.use), options)
    try:
        about = described(reward)
    except RaydpoError as error:
        named = re.search(r"No module named '([\w.]+)'", str(error))
        missing = named is not None and f"{reward.use.partition(':')[0]}.".startswith(f"{named[1]}.")
        fix = "; its module must be in the working directory or installed" if missing else ""
        raise ConfigError(f"{error}{fix}") from None
    kinds = about["parameters"]
    return RewardFunction(
        reward.use, about["digest"], options, kinds and tuple((name, kind, bool(d)) for name, kind, d in kinds)
    )


def reward_settings(reward: RewardConfig, config: Config) -> dict[str, Any]:
    """Settings that decide a reward, as plain data for JSON: digests of a function's source and options, or of a reward
    model's weights and tokenizer.

    Raises:
        ConfigError: as ``resolve``.
        FilesError, ModelError: if the reward model is not there, or not stored as safetensors.
    """
    told: dict[str, Any] = {"weight": reward.weight}
    if reward.use is not None:
        function = resolve(reward)
        return told | {"use": reward.use, "source": function.digest, "options": dict(function.options)}
    chosen = options_of(reward)
    if reward.reward_model is not None:
        from raydpo.rewards.models import reward_model  # imports torch

        model = reward_model(reward.reward_model, config)
        chosen |= {"weights": model.weights.digest, "tokenizer": model.tokenizer}
    if reward.judge is not None:
        chosen["judge"] = reward.judge.model_dump(mode="json", exclude={"key", "timeout", "retries", "parallel"})
    return told | chosen
