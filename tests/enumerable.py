"""A world small enough to list: all prompts, all responses, a known reward, and expected preferences.

Shapes: X = prompts, Y = responses to each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from raydpo.config import ObjectiveConfig
from raydpo.losses import Objective, PairLogps

X, Y = 3, 5


@dataclass(frozen=True)
class World:
    """Attributes: each [X, Y], float64.

    reference: log-probs of the reference.
    rewards: true rewards, in units of Bradley-Terry logits.
    drawn: probability that a response is drawn for a comparison; pairs are two independent draws.
    lengths: tokens of the responses.
    """

    reference: Tensor
    rewards: Tensor
    drawn: Tensor
    lengths: Tensor

    @classmethod
    def random(cls, seed: int = 0) -> World:
        random = torch.Generator().manual_seed(seed)

        def normal() -> Tensor:
            return torch.randn(X, Y, generator=random, dtype=torch.float64)

        return cls(
            normal().log_softmax(1), normal(), normal().softmax(1), torch.randint(1, 6, (X, Y), generator=random).double()
        )

    @property
    def preferences(self) -> Tensor:
        """Probability that the first response of a pair is preferred to the second, [X, Y, Y]: Bradley-Terry."""
        return torch.sigmoid(self.rewards[:, :, None] - self.rewards[:, None, :])

    def expected_loss(
        self, policy: Tensor, settings: ObjectiveConfig, flipped: float = 0.0, margins_of: Tensor | None = None
    ) -> Tensor:
        """The objective's expectation over prompts, drawn pairs and preferences.

        Args:
            policy: log-probs, normalised or not.
            flipped: share of labels that are recorded reversed.
            margins_of: a reward of each response; its differences are the margins of the pairs.
        """
        preferred = (1 - flipped) * self.preferences + flipped * (1 - self.preferences)
        chance = (self.drawn[:, :, None] * self.drawn[:, None, :] * preferred / X).flatten()

        def sides(values: Tensor) -> tuple[Tensor, Tensor]:
            return (values[:, :, None].expand(X, Y, Y).flatten(), values[:, None, :].expand(X, Y, Y).flatten())

        margins = None if margins_of is None else torch.sub(*sides(margins_of))
        logps = PairLogps(*sides(policy), *sides(self.reference), *sides(self.lengths), weights=chance, margins=margins)
        return Objective(settings)(logps, settings.beta).losses.sum()

    def minimiser(self, settings: ObjectiveConfig, flipped: float = 0.0, margins_of: Tensor | None = None) -> Tensor:
        """Policy [X, Y] (probabilities) with the smallest expected loss, found from the reference as start."""
        logits = self.reference.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [logits],
            max_iter=2000,
            tolerance_grad=1e-13,
            tolerance_change=1e-18,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.expected_loss(logits.log_softmax(1), settings, flipped, margins_of)
            loss.backward()
            return loss

        optimizer.step(closure)
        return logits.detach().softmax(1)

    def tilted(self, rewards: Tensor, beta: float) -> Tensor:
        """Maximum of reward minus beta times KL divergence: ``ref * exp(r / beta) / Z``."""
        return (self.reference + rewards / beta).softmax(1)

    def normalised(self, probability: Callable[[Tensor], Tensor], highest: Tensor) -> Tensor:
        """``probability(c)`` for the c of each prompt, [X, 1], at which it sums to 1. It must increase with c and sum to
        more than 1 at ``highest``."""
        low, high = highest - 1e3, highest.clone()
        for _ in range(200):
            middle = (low + high) / 2
            above = probability(middle).sum(1, keepdim=True) > 1
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return probability((low + high) / 2)


def total_variation(one: Tensor, other: Tensor) -> float:
    """KL divergence of the prompt where it is largest."""
    return float(0.5 * (one - other).abs().sum(1).max())
