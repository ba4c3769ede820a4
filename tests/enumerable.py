"""A world small enough to list: all prompts, all responses, a known reward, and expected preferences.

Shapes: X = prompts, Y = responses to each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

import torch
import torch.nn.functional as F
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

    def expected_list_loss(self, policy: Tensor, settings: ObjectiveConfig, size: int) -> Tensor:
        """The same for rankings of ``size`` different responses: any ones, equally often, ranked as Plackett and Luce's
        model ranks them by their rewards."""
        orders = torch.tensor(list(permutations(range(Y), size)))  # [orders, size]
        below = self.rewards[:, orders].flip(2).logcumsumexp(2).flip(2)
        chance = (self.rewards[:, orders] - below).sum(2).exp().flatten() / (X * math.comb(Y, size))
        rows = -(-size // 2)

        def sides(values: Tensor) -> tuple[Tensor, Tensor]:
            ranked = F.pad(values[:, orders], (0, 2 * rows - size)).reshape(-1, rows, 2)
            return ranked[:, :, 0].flatten(), ranked[:, :, 1].flatten()

        lists = torch.arange(len(chance)).repeat_interleave(rows)
        ranks = torch.arange(2 * rows).masked_fill(torch.arange(2 * rows) >= size, -1).view(rows, 2).repeat(len(chance), 1)
        logps = PairLogps(
            *sides(policy),
            *sides(self.reference),
            *sides(self.lengths),
            weights=chance.repeat_interleave(rows),
            lists=lists,
            chosen_ranks=ranks[:, 0],
            rejected_ranks=ranks[:, 1],
        )
        return Objective(settings)(logps, settings.beta).losses.sum()

    def minimiser(
        self, settings: ObjectiveConfig, flipped: float = 0.0, margins_of: Tensor | None = None, list_size: int | None = None
    ) -> Tensor:
        """Policy [X, Y] (probabilities) with the smallest expected loss, found from the reference as start.

        Args:
            list_size: completions of a ranked list; None = pairs.
        """
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
            policy = logits.log_softmax(1)
            if list_size is None:
                loss = self.expected_loss(policy, settings, flipped, margins_of)
            else:
                loss = self.expected_list_loss(policy, settings, list_size)
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
