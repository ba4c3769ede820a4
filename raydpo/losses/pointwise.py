"""Objectives that judge each completion alone, by its log-ratio to the reference, not the difference of two.

Each is a pure function of (log-probs, settings, beta) that returns one loss per pair, [B]. r_w and r_l are ``beta`` times
the log-ratios of the chosen and the rejected completion; w and u are ``desirable_weight`` and ``undesirable_weight``. A
completion alone has the term of its own side, in full.
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
    """BCO (Jung et al., arXiv 2404.04656) without its reward shift, as in TRL: ``-w log sigmoid(r_w) - u log
    sigmoid(-r_l)``."""
    desirable = -F.logsigmoid(beta * logps.chosen_logratio)
    return _weighed(logps, s, desirable, -F.logsigmoid(-beta * logps.rejected_logratio))


def bco(logps: PairLogps, s: ObjectiveConfig, beta: float) -> Tensor:
    """BCO (Jung et al., arXiv 2404.04656) with its reward shift d, the running mean of the rewards of all completions:
    ``-w log sigmoid(r_w - d) - u log sigmoid(-(r_l - d))``."""
    shift = logps.reward_mean
    desirable = -F.logsigmoid(beta * logps.chosen_logratio - shift)
    return _weighed(logps, s, desirable, -F.logsigmoid(shift - beta * logps.rejected_logratio))


def sppo_hard(logps: PairLogps, s: ObjectiveConfig, beta: float) -> Tensor:
    """SPPO (Wu et al., arXiv 2405.00675, eq. 4.7) with certain preferences: the targets of the log-ratios are plus and minus
    ``1 / (2 beta)``."""
    return (logps.chosen_logratio - 0.5 / beta) ** 2 + (logps.rejected_logratio + 0.5 / beta) ** 2


def apo_zero(logps: PairLogps, s: ObjectiveConfig, beta: float) -> Tensor:
    """APO-zero (D'Oosterlinck et al., arXiv 2408.06266, eq. 7), for chosen completions better than the model's own:
    ``w (1 - sigmoid(r_w)) + u sigmoid(r_l)``. On completions alone it is TRL's ``apo_zero_unpaired``."""
    desirable = 1 - torch.sigmoid(beta * logps.chosen_logratio)
    return _weighed(logps, s, desirable, torch.sigmoid(beta * logps.rejected_logratio))


def apo_down(logps: PairLogps, s: ObjectiveConfig, beta: float) -> Tensor:
    """APO-down (the same, eq. 8), for chosen completions worse than the model's own: ``sigmoid(r_w) + 1 -
    sigmoid(r_w - r_l)``."""
    chosen = beta * logps.chosen_logratio
    return torch.sigmoid(chosen) + 1 - torch.sigmoid(chosen - beta * logps.rejected_logratio)


def kto(logps: PairLogps, s: ObjectiveConfig, beta: float) -> Tensor:
    """KTO (Ethayarajh et al., arXiv 2402.01306, eq. 7): ``w (1 - sigmoid(r_w - z))`` of a desirable completion,
    ``u (1 - sigmoid(z - r_l))`` of an undesirable one. A pair is two labelled examples, and has the mean of both.

    The baseline z is ``beta`` times the policy's drift from the reference, at least 0 (``PairLogps.drift``). Like the paper
    and TRL it is estimated on completions of other prompts where completions are alone, and on the completions themselves
    where they are pairs.
    """
    drift = logps.drift.clamp(min=0)
    desirable = 1 - torch.sigmoid(beta * (logps.chosen_logratio - drift))
    losses = _weighed(logps, s, desirable, 1 - torch.sigmoid(beta * (drift - logps.rejected_logratio)))
    return losses / 2 if logps.labels is None else torch.where(logps.labels == 0, losses / 2, losses)


def _weighed(logps: PairLogps, s: ObjectiveConfig, desirable: Tensor, undesirable: Tensor) -> Tensor:
    """Sum of the weighted losses of the completions that each row has, [B]."""
    terms = s.desirable_weight * desirable, s.undesirable_weight * undesirable
    if logps.sides is not None:
        terms = tuple(torch.where(there, term, 0) for there, term in zip(logps.sides, terms, strict=True))
    return terms[0] + terms[1]
