"""Section ``sweep``: many trainings against one cache, and how they are chosen."""

from __future__ import annotations

import math
from typing import Any

from pydantic import ConfigDict, Field, model_validator

from raydpo.config.section import Float, Int, Section

__all__ = ["DrawConfig", "RandomConfig", "StopEarlyConfig", "SweepConfig"]


class DrawConfig(Section):
    """How a random search draws one setting. One of the three."""

    uniform: tuple[Float, Float] | None = None
    """Evenly between two numbers."""
    log_uniform: tuple[Float, Float] | None = None
    """Between two numbers above 0, evenly in their logarithm: every order of magnitude is as likely."""
    choice: tuple[Any, ...] | None = Field(None, min_length=1)
    """One of these values."""

    @model_validator(mode="after")
    def _check(self) -> DrawConfig:
        given = {name: value for name, value in self if value is not None}
        if len(given) != 1:
            raise ValueError(f"{' and '.join(given) or 'nothing'} given, expected one of uniform: [low, high], "
                             "log_uniform: [low, high], choice: [...]")
        name, value = next(iter(given.items()))
        if name != "choice" and value[0] >= value[1]:
            raise ValueError(f"{name} is [{value[0]:g}, {value[1]:g}]; the first number must be below the second")
        if name == "log_uniform" and value[0] <= 0:
            raise ValueError(f"log_uniform is [{value[0]:g}, {value[1]:g}]; numbers above 0 have logarithms")
        return self

    def at(self, place: float) -> Any:
        """The value at ``place`` in [0, 1). Numbers have three significant digits: the trial's name tells all of them."""
        if self.choice is not None:
            return self.choice[int(place * len(self.choice))]
        if self.uniform is not None:
            low, high = self.uniform
            return float(f"{low + place * (high - low):.3g}")
        low, high = map(math.log, self.log_uniform)
        return float(f"{math.exp(low + place * (high - low)):.3g}")


class RandomConfig(Section):
    """Random search (Bergstra & Bengio 2012): beside the keys below, any configuration key and how it is drawn, for example
    ``train.lr: {log_uniform: [1.0e-7, 1.0e-5]}``."""

    # A class attribute of pydantic: the type of the keys that are not fields.
    __pydantic_extra__: dict[str, DrawConfig] = Field(init=False)
    model_config = ConfigDict(extra="allow")

    samples: Int = Field(ge=1)
    """Trials. With more of them the first ones stay the same."""
    seed: Int = Field(0, ge=0)
    """Of the draws; not of the trainings, whose seed is train.seed."""

    @property
    def draws(self) -> dict[str, DrawConfig]:
        """By configuration key."""
        return dict(self.__pydantic_extra__)


class StopEarlyConfig(Section):
    """Successive halving (arXiv 1502.07943): trials pause after ``grace`` steps and after 2, 4, 8, ... times as many, and
    each time only the better ones go on. All are measured at the same step, so what is stopped depends on the trials alone,
    not on which of them ran first or was interrupted."""

    metric: str | None = None
    """Of the held-out evaluation; null = sweep.metric."""
    grace: Int = Field(ge=1)
    """Steps before the first such choice; a multiple of train.eval_every."""
    keep: Float = Field(0.5, gt=0, lt=1)
    """Share of the trials that goes on, rounded up."""


class SweepConfig(Section):
    """Trials of one sweep: one of ``grid``, ``list`` and ``random``. Keys are those of the configuration, in full."""

    grid: dict[str, tuple[Any, ...]] | None = None
    """Values by key, for example {train.beta: [0.05, 0.1], train.lr: [1.0e-6, 5.0e-7]}: every combination is a trial."""
    list: tuple[dict[str, Any], ...] | None = None
    """Settings of each trial, for example [{train.beta: 0.1, train.lr: 1.0e-6}, {train.loss: ipo}]."""
    random: RandomConfig | None = None
    """So many trials at random."""
    metric: str = "eval_rewards/accuracies"
    """Of the last held-out evaluation, by which trials are ranked. Losses and reward margins are refused where trials differ
    in beta, loss or its settings: each has a scale of its own."""
    stop_early: StopEarlyConfig | None = None
    """Stop the trials that are behind; null = train all to the end."""
    at_once: Int | None = Field(None, ge=1)
    """Trials that train at the same time; null = as many as the cluster holds."""
    evaluate: bool = False
    """Measure each trial when it has come to its end, as section evaluate says, and again where that has changed: drift and
    length of its answers are axes of the sweep's page."""

    @model_validator(mode="after")
    def _check(self) -> SweepConfig:
        given = [name for name in ("grid", "list", "random") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"{' and '.join(given) or 'neither grid, list nor random'} given; a sweep has one of "
                             "grid, list and random, for example grid: {train.beta: [0.05, 0.1, 0.3]}")
        if not (self.grid or self.list or (self.random and self.random.draws)):
            raise ValueError(f"{given[0]} varies nothing; name a key, for example train.beta")
        empty = [key for key, values in (self.grid or {}).items() if not values]
        if empty:
            raise ValueError(f"grid.{empty[0]} has no values")
        return self

    @property
    def stop_metric(self) -> str | None:
        """By which trials are stopped early; None if none are."""
        return None if self.stop_early is None else self.stop_early.metric or self.metric
