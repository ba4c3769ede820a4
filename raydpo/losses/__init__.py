"""The objectives as pure functions of log-probs. One entry of ``LOSSES`` is one value of ``train.loss``.

Shapes: B = pairs. Everything is float32, one value per pair; nothing here averages over the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

__all__ = ["LOSSES", "PairLogps", "PreferenceLoss", "hinge", "ipo", "preference_loss", "sigmoid", "sigmoid_norm"]


@dataclass(frozen=True)
class PairLogps:
    """Summed log-probs of B pairs in nats, and their completions' lengths in tokens. Each field is [B]."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def chosen_logratio(self) -> Tensor:
        """log pi(y_w|x) - log ref(y_w|x)."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_logratio(self) -> Tensor:
        """log pi(y_l|x) - log ref(y_l|x)."""
        return self.rejected - self.ref_rejected


@dataclass(frozen=True)
class PreferenceLoss:
    """The loss and the implicit rewards of B pairs, each [B]. Rewards are those the loss compares (length-normalised
    where it normalises), and carry no gradient."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def sigmoid(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """DPO (Rafailov et al., arXiv 2305.18290, eq. 7): ``-log sigmoid(beta * margin)``.

    With ``label_smoothing`` e, conservative DPO (Mitchell, "A note on DPO with noisy preferences", 2023):
    ``-(1 - e) log sigmoid(beta * margin) - e log sigmoid(-beta * margin)``.
    """
    logits = beta * margin
    if not label_smoothing:
        return -F.logsigmoid(logits)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def hinge(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """SLiC (Zhao et al., arXiv 2305.10425) as RSO writes it (arXiv 2309.06657): ``max(0, 1 - beta * margin)``."""
    return F.relu(1 - beta * margin)


def ipo(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """IPO (Azar et al., arXiv 2310.12036, eq. 17): ``(margin - 1 / (2 beta))^2``, on log-ratios per token as TRL does."""
    return (margin - 1 / (2 * beta)) ** 2


def sigmoid_norm(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Length-normalised DPO (Tulu 3, arXiv 2411.15124, eq. 6): ``sigmoid`` on log-ratios per token."""
    return sigmoid(margin, beta, label_smoothing)


LOSSES: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "sigmoid": sigmoid, "hinge": hinge, "ipo": ipo, "sigmoid_norm": sigmoid_norm,
}
PER_TOKEN = frozenset({"ipo", "sigmoid_norm"})
"""Losses that compare log-ratios per token of the completion instead of sums over it."""


def preference_loss(name: str, logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> PreferenceLoss:
    """The loss called ``name`` for each pair.

    The margin is (log pi(y_w|x) - log ref(y_w|x)) - (log pi(y_l|x) - log ref(y_l|x)), in nats, or per token.
    """
    chosen, rejected = logps.chosen_logratio, logps.rejected_logratio
    if name in PER_TOKEN:
        chosen, rejected = chosen / logps.chosen_tokens, rejected / logps.rejected_tokens
    return PreferenceLoss(LOSSES[name](chosen - rejected, beta, label_smoothing),
                          beta * chosen.detach(), beta * rejected.detach())
