"""Input and output of an objective. Shapes: B = pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["TIE", "PairLogps", "PreferenceLoss", "mean_over"]


@dataclass(frozen=True)
class PairLogps:
    """Summed log-probs of B pairs in nats, and their completions' lengths in tokens. Each field is [B].

    Sums and lengths are over the tokens that count, each with its weight (``data.train_on``). Fields with a default are set
    if an objective needs them.

    Attributes:
        chosen, rejected: of the policy; only these and their tails have a gradient.
        ref_chosen, ref_rejected: of the reference; zeros if nothing was scored.
        chosen_tail, rejected_tail, ref_chosen_tail, ref_rejected_tail: of the tokens beyond the length of the pair's shorter
            completion.
        weights: factor of each pair's loss.
        margins: how much better the chosen completion is, in units of reward.
        mean_chosen_tokens: mean number of tokens of the step's chosen completions.
        reward_mean: running mean of the rewards of all completions so far.
        labels: int8; 0 = a pair, 1 = a desirable completion alone, in ``chosen``; -1 = an undesirable one alone, in
            ``rejected``. Its other side has no tokens, or is the mismatched completion by which KTO estimates the drift.
            None = all are pairs.
        lists: int64, number of the ranked list that a row belongs to; a list of N completions is (N + 1) // 2 neighbouring
            rows, best first. The last row of an odd list has a rejected side without tokens. None = no lists.
        chosen_ranks, rejected_ranks: int32, place of each completion in its list, equal for ties; -1 for a side without
            tokens. They and ``lists`` may stay on the CPU, and should, since it decides there what is compared.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    chosen_tail: Tensor | None = None
    rejected_tail: Tensor | None = None
    ref_chosen_tail: Tensor | None = None
    ref_rejected_tail: Tensor | None = None
    weights: Tensor | None = None
    margins: Tensor | None = None
    mean_chosen_tokens: float | None = None
    reward_mean: float = 0.0
    labels: Tensor | None = None
    lists: Tensor | None = None
    chosen_ranks: Tensor | None = None
    rejected_ranks: Tensor | None = None

    @property
    def count(self) -> int:
        """Number of pairs, or of ranked lists."""
        return len(self.chosen) if self.lists is None else 1 + int((self.lists[1:] != self.lists[:-1]).sum())

    @property
    def chosen_logratio(self) -> Tensor:
        """log pi(y_w|x) - log ref(y_w|x)."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_logratio(self) -> Tensor:
        """log pi(y_l|x) - log ref(y_l|x)."""
        return self.rejected - self.ref_rejected

    @property
    def sides(self) -> tuple[Tensor, Tensor] | None:
        """Which rows have a chosen and which a rejected completion of their own, bool [B] each; None = all have both."""
        if self.labels is None and self.lists is None:
            return None
        return self._there(self.labels)

    @property
    def drift_samples(self) -> tuple[Tensor, Tensor]:
        """Masks of the chosen and of the rejected completions by which the drift of the policy is estimated, bool [B] each.
        A pair gives both completions, a row with one completion gives the mismatched one."""
        return self._there(None if self.labels is None else -self.labels)

    def _there(self, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Which chosen and which rejected completions have tokens, without the other sides of rows with these labels."""
        chosen, rejected = self.chosen_tokens > 0, self.rejected_tokens > 0
        return (chosen, rejected) if labels is None else (chosen & (labels >= 0), rejected & (labels <= 0))

    @property
    def drift(self) -> Tensor:
        """Mean log-ratio of the ``drift_samples``: a scalar, nats a completion, without gradient. 0 without samples."""
        chosen, rejected = self.chosen_logratio.detach(), self.rejected_logratio.detach()
        if self.labels is None and self.lists is None:
            return torch.cat((chosen, rejected)).mean()
        return mean_over(torch.cat((chosen, rejected)), torch.cat(self.drift_samples))

    def with_light_tails(self, alpha: float) -> PairLogps:
        """LD-DPO (arXiv 2409.06411): weight ``alpha`` for tokens beyond the length of the shorter completion.

        Raises:
            ValueError: if a tail is None.
        """

        def light(logps: Tensor, tail: Tensor | None) -> Tensor:
            if tail is None:
                raise ValueError("ld_alpha needs the log-probs of the tails: set the four fields *_tail of PairLogps")
            return logps - (1 - alpha) * tail

        return replace(
            self,
            chosen=light(self.chosen, self.chosen_tail),
            rejected=light(self.rejected, self.rejected_tail),
            ref_chosen=light(self.ref_chosen, self.ref_chosen_tail),
            ref_rejected=light(self.ref_rejected, self.ref_rejected_tail),
        )


def mean_over(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the ``values`` where ``mask``, a scalar; 0 if there are none."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


@dataclass(frozen=True)
class PreferenceLoss:
    """Loss and implicit rewards of B pairs, each [B]. The loss of a ranked list is the sum over its rows. Rewards are the
    quantities that the loss compares (length-normalised if it normalises), without gradient.

    Attributes:
        threshold: log-ratio in nats above which the loss takes a completion that is alone for desirable, a scalar; None
            without a reference.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    threshold: Tensor | float | None = None


TIE = 1e-5
"""Differences of rewards, and of log-ratios in nats a token, that are smaller than this count as ties. It is the rounding
error of float32 sums in nats, and of rewards if beta is 1."""
