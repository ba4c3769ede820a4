"""Objectives of the policy alone, without a reference.

Each is a pure function of (log-probs, settings, beta) that returns one loss per pair, [B].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from raydpo.config import ObjectiveConfig
from raydpo.losses.margin import smoothed_logistic
from raydpo.losses.pairs import PairLogps

__all__ = ["cpo", "orpo", "sft", "simpo"]

CERTAIN = -1e-7
"""Upper bound of the mean log-prob in ``orpo``: at 0, which rounding may give, the odds are infinite."""


def simpo(logps: PairLogps, s: ObjectiveConfig, beta: float) -> Tensor:
    """SimPO (Meng et al., arXiv 2405.14734, eq. 6): ``-log sigmoid(r_w - r_l - simpo_gamma)``, where a reward is ``beta``
    times the mean log-prob per token. A pair's own margin adds to ``simpo_gamma``."""
    difference = logps.chosen / logps.chosen_tokens - logps.rejected / logps.rejected_tokens
    wanted = s.simpo_gamma if logps.margins is None else s.simpo_gamma + logps.margins
    return smoothed_logistic(beta * difference - wanted, s.label_smoothing)


def cpo(logps: PairLogps, s: ObjectiveConfig, beta: float) -> Tensor:
    """CPO (Xu et al., arXiv 2401.08417, eq. 3): ``-log sigmoid(beta * (log pi(y_w|x) - log pi(y_l|x)))`` plus ``cpo_alpha``
    times ``sft``."""
    logits = beta * (logps.chosen - logps.rejected)
    preference = smoothed_logistic(logits if logps.margins is None else logits - logps.margins, s.label_smoothing)
    return preference + s.cpo_alpha * sft(logps, s, beta)


def orpo(logps: PairLogps, s: ObjectiveConfig, beta: float) -> Tensor:
    """ORPO (Hong et al., arXiv 2403.07691, eq. 6): ``sft`` plus ``beta`` times -log sigmoid of the log odds ratio, odds of
    mean probabilities per token. The paper's lambda is ``beta``. The likelihood covers the completion; TRL's also the
    prompt."""
    chosen, rejected = logps.chosen / logps.chosen_tokens, logps.rejected / logps.rejected_tokens
    chosen, rejected = chosen.clamp(max=CERTAIN), rejected.clamp(max=CERTAIN)
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return sft(logps, s, beta) - beta * F.logsigmoid(log_odds)


def sft(logps: PairLogps, s: ObjectiveConfig, beta: float) -> Tensor:
    """Negative log-likelihood of chosen completions, in nats per token of the step: added to ``sigmoid``, it is the
    objective of RPO (arXiv 2404.19733, eq. 1).

    A pair's loss is its sum divided by the mean length, so that the mean over pairs is the mean over tokens. An undesirable
    completion alone has no loss.
    """
    chosen, tokens = logps.chosen, logps.chosen_tokens
    if logps.sides is not None:
        chosen, tokens = (torch.where(logps.sides[0], each, 0) for each in (chosen, tokens))
    mean = tokens.mean() if logps.mean_chosen_tokens is None else logps.mean_chosen_tokens
    return -chosen / (mean or 1)  # the mean is 0 if no row of the step has a chosen completion


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact on both sides of -ln 2."""
    small = x > -0.6931471805599453
    near, far = torch.where(small, x, -1.0), torch.where(small, -1.0, x)  # each branch has a finite gradient everywhere
    return torch.where(small, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))
