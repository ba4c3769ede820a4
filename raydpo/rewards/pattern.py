"""Reward ``regex``: 1 if a regular expression is found in the answer, else 0.

Expressions are RE2's, whose time is linear in the text: no answer can make one hang. RE2 has no look-around and no
back-references. ``^`` and ``$`` are the beginning and the end of the text, and ``.`` matches no line break. ``(?m)`` and
``(?s)`` at the beginning change that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raydpo.config.rewards import RewardConfig, reward_name
from raydpo.errors import ConfigError, one_line
from raydpo.rewards.sources import answer_text

__all__ = ["check", "column", "make"]


def column(reward: RewardConfig) -> tuple[str, ...]:
    """Columns of the prompts that the function needs: none."""
    return ()


def check(reward: RewardConfig) -> None:
    """Check that RE2 is installed and reads the pattern.

    Raises:
        ConfigError: if not.
    """
    _compiled(reward)


def make(reward: RewardConfig) -> Callable[..., list[float]]:
    """Return the reward function. It searches the whole text of each answer."""
    compiled = _compiled(reward)

    def regex(completions: list[Any], **kwargs: Any) -> list[float]:
        return [float(compiled.search(answer_text(completion)) is not None) for completion in completions]

    return regex


def _compiled(reward: RewardConfig) -> Any:
    try:
        import re2
    except ImportError:
        raise ConfigError(
            f"the reward {reward_name(reward)} needs google-re2, which is not installed; pip install 'raydpo[rewards]'"
        ) from None
    options = re2.Options()
    options.log_errors = False  # it would print to standard error
    try:
        return re2.compile(reward.pattern, options)
    except re2.error as error:
        said = error.args[0].decode(errors="replace") if error.args and isinstance(error.args[0], bytes) else error
        raise ConfigError(
            f"the pattern {reward.pattern!r} of the reward {reward_name(reward)} is not a regular expression of RE2: "
            f"{one_line(said, 200)}; RE2 has no look-around and no back-references"
        ) from None
