"""How far a command goes (``--until``), and when rounds end early."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raydpo.config import Config
from raydpo.config.rounds import STAGES, RoundsConfig, StopConfig
from raydpo.errors import ConfigError

__all__ = ["Goal", "enough", "few_mixed", "goes_on"]


@dataclass(frozen=True)
class Goal:
    """The last stage of a command: number of its round, and its place in ``STAGES``."""

    number: int
    stage: int

    @classmethod
    def of(cls, until: str | None, config: Config) -> Goal:
        """Read ``ROUND`` or ``ROUND.STAGE``; None = the end of the last round.

        Raises:
            ConfigError: if there is no such round or stage.
        """
        last, count = len(STAGES) - 1, config.rounds.count if config.rounds is not None else 0
        if until is None:
            return cls(count, last)
        match = re.fullmatch(r"(\d+)(?:\.(\w+))?", until)
        if match is None or (match[2] is not None and match[2] not in STAGES):
            raise ConfigError(
                f"--until {until!r} is no stage; give a round, such as 2, or a round and one of {', '.join(STAGES)}, such "
                "as 2.score"
            )
        number = int(match[1])
        if number > count:
            raise ConfigError(f"--until {until} is beyond rounds.count {count}; raise rounds.count, or lower it")
        if number == 0 and match[2] not in (None, "measure"):
            raise ConfigError(f"--until {until}: round 0 has only stage measure, the measurement before the first round")
        return cls(number, last if match[2] is None else STAGES.index(match[2]))

    def wants(self, number: int, stage: str) -> bool:
        """Whether the command goes as far as a stage of a round."""
        return (number, STAGES.index(stage)) <= (self.number, self.stage)


def enough(number: int, figures: Mapping[str, Any], stop: StopConfig) -> str | None:
    """Say why no round follows one with these figures, as ``rounds.stop`` says; None if one does."""
    success, drift = figures.get("eval_success"), figures.get("eval_drift_initial")
    if stop.success is not None and success is not None and success >= stop.success:
        return (
            f"round {number}: {success:.1%} success on held-out prompts, which is rounds.stop.success "
            f"({stop.success:g}) or more, so the rounds end here"
        )
    if stop.drift is not None and drift is not None and drift > stop.drift:
        return (
            f"round {number}: the policy is {drift:.2f} nats an answer from the initial model, more than rounds.stop.drift "
            f"({stop.drift:g}), so the rounds end here; the round before is in its own folder"
        )
    return None


def goes_on(number: int, rounds: RoundsConfig, goal: Goal) -> bool:
    """Whether the command samples for the round after ``number``, whatever the measurement of ``number`` will be."""
    return (
        number < (1 if rounds.offline else rounds.count)
        and rounds.stop.success is None
        and rounds.stop.drift is None
        and goal.wants(number + 1, "sample")
    )


def few_mixed(number: int, figures: Mapping[str, Any], stop: StopConfig) -> str | None:
    """Say why a round with these figures is not trained, as ``rounds.stop.mixed`` says; None if it is."""
    mixed = figures.get("mixed")
    if stop.mixed is None or mixed is None or mixed >= stop.mixed:
        return None
    return (
        f"round {number}: {mixed:.1%} of its prompts have answers of different reward, less than rounds.stop.mixed "
        f"({stop.mixed:g}), so there is little to learn and the rounds end here; use other prompts, or set "
        "rounds.stop.mixed to null"
    )
