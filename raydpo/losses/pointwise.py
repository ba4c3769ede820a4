"""Objectives that judge each completion alone, by its log-ratio to the reference, not the difference of two.

Each is a pure function of (log-probs, settings, beta) that returns one loss per pair, [B]. r_w and r_l are ``beta`` times
the log-ratios of the chosen and the rejected completion.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from raydpo.config import ObjectiveConfig
from raydpo.losses.pairs import PairLogps

__all__ = ["apo_down", "apo_zero", "bco", "bco_pair", "kto", "nca_pair", "sppo_hard"]


def nca_pair(logps: PairLogps, s: ObjectiveConfig, beta: float) -> Tensor:
    """NCA (Chen et al., arXiv 2402.05369) for pairs:
    ``-log sigmoid(r_w) - (log sigmoid(-r_w) + log sigmoid(-r_l)) / 2``."""
    chosen, rejected = beta * logps.chosen_logratio, beta * logps.rejected_logratio
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(logps: PairLogps, s: ObjectiveConfig, beta: float) -> Tensor:
    """BCO (Jung et al., arXiv 2404.04656) without its reward shift, as in TRL: ``-log sigmoid(r_w) - log sigmoid(-r_l)``."""
    return -F.logsigmoid(beta * logps.chosen_logratio) - F.logsigmoid(-beta * logps.rejected_logratio)


def bco(logps: PairLogps, s: ObjectiveConfig, beta: float) -> Tensor:
    """BCO (Jung et al., arXiv 2404.04656) with its reward shift d, the running mean of the rewards of all completions:
    ``-log sigmoid(r_w - d) - log sigmoid(-(r_l - d))``."""
    shift = logps.reward_mean
    return -F.logsigmoid(beta * logps.chosen_logratio - shift) - F.logsigmoid(shift - beta * logps.rejected_logratio)


def sppo_hard(logps: PairLogps, s: ObjectiveConfig, beta: float) -> Tensor:
    """SPPO (Wu et al., arXiv 2405.00675, eq. 4.7) with certain preferences: the targets of the log-ratios are plus and minus
    ``1 / (2 beta)``."""
    return (logps.chosen_logratio - 0.5 / beta) ** 2 + (logps.rejected_logratio + 0.5 / beta) ** 2


def apo_zero(logps: PairLogps, s: ObjectiveConfig, beta: float) -> Tensor:
    """APO-zero (D'Oosterlinck et al., arXiv 2408.06266, eq. 7), for chosen completions better than the model's own:
    ``1 - sigmoid(r_w) + sigmoid(r_l)``."""
    return 1 - torch.sigmoid(beta * logps.chosen_logratio) + torch.sigmoid(beta * logps.rejected_logratio)


def apo_down(logps: PairLogps, s: ObjectiveConfig, beta: float) -> Tensor:
    """APO-down (the same, eq. 8), for chosen completions worse than the model's own: ``sigmoid(r_w) + 1 -
    sigmoid(r_w - r_l)``."""
    chosen = beta * logps.chosen_logratio
    return torch.sigmoid(chosen) + 1 - torch.sigmoid(chosen - beta * logps.rejected_logratio)


def kto(logps: PairLogps, s: ObjectiveConfig, beta: float) -> Tensor:
    """KTO (Ethayarajh et al., arXiv 2402.01306, eq. 7) on both completions, each as a labelled example: the mean of
    ``desirable_weight * (1 - sigmoid(r_w - z))`` and ``undesirable_weight * (1 - sigmoid(z - r_l))``.

    The baseline z is ``beta`` times the policy's drift from the reference, without gradient: the mean log-ratio of all
    completions of the step, at least 0. The paper and TRL estimate it on completions of other prompts, whose log-probs would
    need a second reference pass.
    """
    chosen, rejected = logps.chosen_logratio, logps.rejected_logratio
    drift = torch.cat((chosen, rejected)).detach().mean().clamp(min=0)
    return (
        s.desirable_weight * (1 - torch.sigmoid(beta * (chosen - drift)))
        + s.undesirable_weight * (1 - torch.sigmoid(beta * (drift - rejected)))
    ) / 2
