"""Section ``sweep``: which settings to try, and how trials are compared and stopped."""

from __future__ import annotations

import math
from typing import Any

from pydantic import ConfigDict, Field, model_validator

from raydpo.config.section import Float, Int, Section

__all__ = ["DrawConfig", "RandomConfig", "StopEarlyConfig", "SweepConfig"]


class DrawConfig(Section):
    """How a random search draws one setting: exactly one of the three keys."""

    uniform: tuple[Float, Float] | None = None
    """[low, high]: uniform between two numbers."""
    log_uniform: tuple[Float, Float] | None = None
    """[low, high], above 0: uniform in the logarithm, so that all orders of magnitude are equally likely."""
    choice: tuple[Any, ...] | None = Field(default=None, min_length=1)
    """One of these values."""

    @model_validator(mode="after")
    def _check(self) -> DrawConfig:
        given = {name: value for name, value in self if value is not None}
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(given) or 'nothing'} given, expected one of uniform: [low, high], "
                "log_uniform: [low, high], choice: [...]"
            )
        name, value = next(iter(given.items()))
        if name != "choice" and value[0] >= value[1]:
            raise ValueError(f"{name} is [{value[0]:g}, {value[1]:g}]; the first number must be below the second")
        if name == "log_uniform" and value[0] <= 0:
            raise ValueError(f"log_uniform is [{value[0]:g}, {value[1]:g}]; both must be above 0")
        return self

    def at(self, place: float) -> Any:
        """Return the value at ``place`` in [0, 1). Numbers are rounded to three significant digits, which the trial's name
        shows. A bound replaces a number that rounding would take beyond it."""
        if self.uniform is not None:
            low, high = self.uniform
            return min(max(float(f"{low + place * (high - low):.3g}"), low), high)
        if self.log_uniform is not None:
            low, high = self.log_uniform
            drawn = math.exp(math.log(low) + place * (math.log(high) - math.log(low)))
            return min(max(float(f"{drawn:.3g}"), low), high)
        assert self.choice is not None  # exactly one of the three is set, see _check
        return self.choice[int(place * len(self.choice))]


class RandomConfig(Section):
    """Random search (Bergstra & Bengio 2012). Every other key is a key of the configuration, and its value says how it is
    drawn, for example ``train.lr: {log_uniform: [1.0e-7, 1.0e-5]}``."""

    # pydantic reads the type of additional keys from this attribute, in exactly this form.
    __pydantic_extra__: dict[str, DrawConfig] = Field(init=False)  # pyright: ignore[reportIncompatibleVariableOverride]
    model_config = ConfigDict(extra="allow")

    samples: Int = Field(ge=1)
    """Number of trials. A larger number keeps the first ones unchanged."""
    seed: Int = Field(default=0, ge=0)
    """Seed of the draws. The seed of the trainings is train.seed."""

    @property
    def draws(self) -> dict[str, DrawConfig]:
        """How each key of the configuration is drawn."""
        return dict(self.__pydantic_extra__)


class StopEarlyConfig(Section):
    """Successive halving (arXiv 1502.07943). Trials pause after ``grace`` steps, and after 2, 4, 8, ... times as many. Each
    time, only the better ones continue. All trials are compared at the same step, so neither their order nor interruptions
    change which of them stop."""

    metric: str | None = None
    """Metric of the held-out evaluation to compare trials by; null = sweep.metric."""
    grace: Int = Field(ge=1)
    """Steps before the first comparison; a multiple of train.eval_every."""
    keep: Float = Field(default=0.5, gt=0, lt=1)
    """Share of the trials that continue. The number of trials is rounded up."""


class SweepConfig(Section):
    """Trials of one sweep: one of ``grid``, ``list`` and ``random``. Keys are full keys of the configuration."""

    grid: dict[str, tuple[Any, ...]] | None = None
    """Values by key, for example {train.beta: [0.05, 0.1], train.lr: [1.0e-6, 5.0e-7]}: every combination is a trial."""
    list: tuple[dict[str, Any], ...] | None = None
    """Settings of each trial, for example [{train.beta: 0.1, train.lr: 1.0e-6}, {train.loss: ipo}]."""
    random: RandomConfig | None = None
    """Trials with random settings."""
    metric: str = "eval_rewards/accuracies"
    """Metric of the last held-out evaluation to rank trials by. If trials differ in beta, loss or settings of the loss, the
    scales of losses and reward margins differ, so these metrics are refused."""
    stop_early: StopEarlyConfig | None = None
    """Stop the worse trials early; null = train all of them to the end."""
    at_once: Int | None = Field(default=None, ge=1)
    """Number of trials that train at the same time; null = as many as fit on the cluster."""
    evaluate: bool = False
    """Evaluate each finished trial by section evaluate, and evaluate it again if that section has changed. The sweep's page
    then also compares drift and length of answers."""

    @model_validator(mode="after")
    def _check(self) -> SweepConfig:
        given = [name for name in ("grid", "list", "random") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(given) or 'neither grid, list nor random'} given; a sweep has one of "
                "grid, list and random, for example grid: {train.beta: [0.05, 0.1, 0.3]}"
            )
        if not (self.grid or self.list or (self.random and self.random.draws)):
            raise ValueError(f"{given[0]} varies nothing; name a key, for example train.beta")
        empty = [key for key, values in (self.grid or {}).items() if not values]
        if empty:
            raise ValueError(f"grid.{empty[0]} has no values")
        return self

    def varies(self, key: str) -> bool:
        """Whether trials may differ in a key of the configuration, or in a section above it."""
        settings = self.list or (self.grid or {}, self.random.draws if self.random else {})
        return any(f"{key}.".startswith(f"{name}.") for one in settings for name in one)

    @property
    def stop_metric(self) -> str | None:
        """Metric by which trials are stopped early; None without ``stop_early``."""
        return None if self.stop_early is None else self.stop_early.metric or self.metric
