"""The objective of a run: its terms and weights, the rewards it implies, and its state between steps."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raydpo.config import LOSSES, ObjectiveConfig
from raydpo.errors import ConfigError
from raydpo.losses import listwise, margin, pointwise, reference_free, transport
from raydpo.losses.pairs import PairLogps, PreferenceLoss, mean_over

__all__ = ["FUNCTIONS", "LossFunction", "Objective", "ObjectiveState", "implicit_rewards", "own_sources", "preference_loss"]

LossFunction = Callable[[PairLogps, ObjectiveConfig, float], Tensor]
"""Function from log-probs of B pairs, settings and beta to losses, [B]. A loss by import path is such a function, too."""
FUNCTIONS: dict[str, LossFunction] = {
    name: next(
        getattr(module, name) for module in (margin, pointwise, transport, reference_free, listwise) if hasattr(module, name)
    )
    for name in LOSSES
}
"""The function of each loss in ``config.LOSSES``, by name."""
LEAST_DYNAMIC = 0.01
"""Lower bound of beta under ``dynamic_beta``, as a share of beta. The formula has no bound, and a negative beta would prefer
the rejected completion."""


@dataclass(frozen=True)
class ObjectiveState:
    """State of an objective from earlier steps; kept in checkpoints.

    Attributes:
        rewards, reward_mean: number of completions whose rewards were seen, and their mean (``bco``). Mismatched completions
            do not count.
        margin_mean: moving average of the steps' mean reward margins (``dynamic_beta``).
    """

    rewards: int = 0
    reward_mean: float = 0.0
    margin_mean: float = 0.0


class Objective:
    """``config`` as a function from log-probs to losses and rewards.

    Attributes:
        whole_step: whether a pair's loss depends on the other pairs of its step, which must then be passed together.

    Raises:
        ConfigError: if a user's own loss cannot be imported, or does not return one finite number per pair.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config
        self._functions = {name: FUNCTIONS.get(name) or _imported(name) for name in config.terms}
        own = [function for name, function in self._functions.items() if name not in FUNCTIONS]
        self.whole_step = config.needs_whole_step or any(_mixes_pairs(function, config) for function in own)

    def __call__(self, logps: PairLogps, beta: float, memory: ObjectiveState | None = None) -> PreferenceLoss:
        """Loss and rewards of each of B pairs; if ``whole_step``, these must be all pairs of the step."""
        config = self.config
        if memory is not None:
            logps = dataclasses.replace(logps, reward_mean=memory.reward_mean)
        seen = logps if config.ld_alpha is None else logps.with_light_tails(config.ld_alpha)
        losses = torch.zeros_like(logps.chosen)
        for name, weight in config.terms.items():
            # Terms without a reference, such as sft, see whole completions: ld_alpha applies to comparisons only.
            losses = losses + weight * self._functions[name](seen if config.traits[name].reference else logps, config, beta)
        if logps.weights is not None:
            losses = losses * logps.weights
        return PreferenceLoss(losses, *implicit_rewards(config, seen, beta), self._threshold(seen, beta))

    def _threshold(self, logps: PairLogps, beta: float) -> Tensor | float | None:
        """As ``PreferenceLoss.threshold``. Of a mixture it is that of kto, or else of bco."""
        if not self.config.needs_reference:
            return None
        if self.config.estimates_drift:
            return logps.drift.clamp(min=0)
        return logps.reward_mean / beta if "bco" in self.config.terms else 0.0

    def remember(self, logps: PairLogps, beta: float, memory: ObjectiveState) -> tuple[float, ObjectiveState]:
        """Beta of a step, and the state after it, from the step's log-probs.

        beta-DPO (Wu et al., arXiv 2407.08639): ``beta * (1 + alpha * (M - m))``, where M is the mean reward margin of the
        step at ``beta`` and m is the moving average of earlier steps.
        """
        if self.config.ld_alpha is not None:
            logps = logps.with_light_tails(self.config.ld_alpha)
        chosen, rejected = logps.chosen_logratio.detach(), logps.rejected_logratio.detach()
        margin_mean, sides = memory.margin_mean, logps.sides
        if self.config.dynamic_beta is not None:
            if sides is None:
                found = beta * (chosen - rejected).mean().item()
            else:  # a step without one of both has no margin, and leaves beta as it is
                means = [mean_over(values, there) for values, there in zip((chosen, rejected), sides, strict=True)]
                found = beta * (means[0] - means[1]).item() if all(map(Tensor.any, sides)) else margin_mean
            beta *= max(LEAST_DYNAMIC, 1 + self.config.dynamic_beta * (found - margin_mean))
            kept = self.config.dynamic_beta_momentum
            margin_mean = kept * margin_mean + (1 - kept) * found
        rewards, reward_mean = memory.rewards, memory.reward_mean
        if "bco" in self.config.terms:
            seen = torch.cat((chosen, rejected))
            seen = seen if sides is None else seen[torch.cat(sides)]
            more = len(seen)
            mean = beta * seen.mean().item()
            reward_mean = (rewards * reward_mean + more * mean) / (rewards + more)
            rewards += more
        return beta, ObjectiveState(rewards, reward_mean, margin_mean)


def implicit_rewards(config: ObjectiveConfig, logps: PairLogps, beta: float) -> tuple[Tensor, Tensor]:
    """Rewards of the chosen and the rejected completions, [B] each. For a single loss, the quantities that it compares; for
    a mixture, beta times the log-ratios, as in TRL. That of a side that a row lacks (``PairLogps.sides``) means nothing."""
    chosen, rejected = (
        (logps.chosen_logratio, logps.rejected_logratio) if config.needs_reference else (logps.chosen, logps.rejected)
    )
    if len(config.terms) == 1:
        (traits,) = config.traits.values()
        if "f_divergence_type" in traits.heeds:
            chosen, rejected = (margin.divergence_scores(side, config) for side in (chosen, rejected))
        if traits.per_token:
            chosen, rejected = chosen / logps.chosen_tokens, rejected / logps.rejected_tokens
    return beta * chosen.detach(), beta * rejected.detach()


def preference_loss(
    loss: str | list[Mapping[str, float]], logps: PairLogps, *, beta: float, **settings: Any
) -> PreferenceLoss:
    """Loss and rewards of each of B pairs for the given settings of ``config.ObjectiveConfig``."""
    return Objective(ObjectiveConfig.model_validate({"loss": loss, "beta": beta, **settings}))(logps, beta)


def own_sources(config: ObjectiveConfig) -> dict[str, str]:
    """Digest of the source file of each loss given by import path, because its name does not tell what it computes."""
    return {
        name: hashlib.sha256(Path(inspect.getfile(_imported(name))).read_bytes()).hexdigest()[:32]
        for name in config.terms
        if name not in FUNCTIONS
    }


def _imported(path: str) -> LossFunction:
    """The function ``module:function``, from an installed package or the working directory."""
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"'train.loss' is {path!r}, but {module_name} cannot be imported ({type(error).__name__}: "
            f"{error}); install it, or start in the directory of {module_name.split('.')[0]}.py"
        ) from None
    function: LossFunction | None = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"'train.loss' is {path!r}, but {module.__file__} has no function {name!r}")
    return function


def _mixes_pairs(function: LossFunction, config: ObjectiveConfig) -> bool:
    """Whether a user's own loss gives a pair another value when it is alone; found by calling it on made-up pairs."""
    random = torch.Generator().manual_seed(0)
    fields = [-20 - 10 * torch.rand(4, generator=random, dtype=torch.float64) for _ in range(4)]
    tokens = [
        torch.tensor([5.0, 8.0, 13.0, 21.0], dtype=torch.float64),
        torch.tensor([8.0, 5.0, 21.0, 13.0], dtype=torch.float64),
    ]
    pairs = PairLogps(*fields, *tokens, margins=torch.ones(4, dtype=torch.float64), mean_chosen_tokens=10.0)
    beta = config.beta_at(0, 1)
    try:
        together = function(pairs, config, beta)
        good = together.shape == (4,) and bool(torch.isfinite(together).all())
        alone = [function(_one(pairs, row), config, beta) for row in range(4)]
    except Exception as error:
        raise ConfigError(
            f"'train.loss' {config.loss_text} failed on four made-up pairs ({type(error).__name__}: {error}); "
            "it is called with (raydpo.losses.PairLogps, the settings of train, beta)"
        ) from error
    if not good:
        raise ConfigError(
            f"'train.loss' {config.loss_text} does not give one finite number for each of four made-up pairs, but {together}"
        )
    return not torch.allclose(together, torch.cat(alone), rtol=1e-9, atol=1e-12)


def _one(pairs: PairLogps, row: int) -> PairLogps:
    fields: dict[str, Any] = {field.name: getattr(pairs, field.name) for field in dataclasses.fields(pairs)}
    fields |= {name: value[row : row + 1] for name, value in fields.items() if isinstance(value, Tensor)}
    return PairLogps(**fields)
