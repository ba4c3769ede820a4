"""Objectives of the margin: how much the policy prefers the chosen completion, compared with the reference.

Each is a pure function of (log-probs, settings, beta) that returns one loss per pair, [B].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from raydpo.config import ObjectiveConfig
from raydpo.losses.pairs import PairLogps

__all__ = [
    "discopop",
    "divergence_scores",
    "dpop",
    "exo_pair",
    "hinge",
    "ipo",
    "ipo_sum",
    "margin",
    "robust",
    "sigmoid",
    "sigmoid_norm",
    "smoothed_logistic",
]

LARGEST_EXPONENT = 80.0
"""Largest exponent of the alpha-divergence; float32 overflows beyond it. TRL has the same bound."""


def divergence_scores(logratio: Tensor, s: ObjectiveConfig) -> Tensor:
    """f'(pi / ref) from log(pi / ref), up to a constant that cancels in a margin (f-DPO, arXiv 2309.16240)."""
    alpha = s.f_alpha_divergence_coef - 1
    if s.f_divergence_type == "forward_kl":
        return 1 - torch.exp(-logratio)
    if s.f_divergence_type == "js_divergence":
        return math.log(2) + F.logsigmoid(logratio)
    if s.f_divergence_type == "alpha_divergence" and abs(alpha) >= 1e-6:  # at alpha = 1 it is the reverse KL
        return (torch.exp((alpha * logratio).clamp(max=LARGEST_EXPONENT)) - 1) / alpha
    return logratio


def margin(logps: PairLogps, s: ObjectiveConfig, beta: float, *, per_token: bool = False) -> Tensor:
    """Chosen score minus rejected score, in nats, or nats per token.

    R-DPO (arXiv 2403.19159) adds ``length_penalty / beta`` for each token by which the chosen completion is longer: a
    penalty on tokens. A pair's own margin m requires m / beta more (DPO with an offset, arXiv 2402.10571).
    """
    chosen, rejected = divergence_scores(logps.chosen_logratio, s), divergence_scores(logps.rejected_logratio, s)
    if per_token:
        chosen, rejected = chosen / logps.chosen_tokens, rejected / logps.rejected_tokens
    difference = chosen - rejected
    if s.length_penalty:
        difference = difference + s.length_penalty / beta * (logps.chosen_tokens - logps.rejected_tokens)
    return difference if logps.margins is None else difference - logps.margins / beta


def smoothed_logistic(logits: Tensor, label_smoothing: float) -> Tensor:
    """``-(1 - e) log sigmoid(logits) - e log sigmoid(-logits)``."""
    if not label_smoothing:
        return -F.logsigmoid(logits)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def sigmoid(logps: PairLogps, s: ObjectiveConfig, beta: float) -> Tensor:
    """DPO (Rafailov et al., arXiv 2305.18290, eq. 7): ``-log sigmoid(beta * margin)``.

    With ``label_smoothing`` e, conservative DPO (Mitchell, "A note on DPO with noisy preferences", 2023): ``-(1 - e) log
    sigmoid(beta * margin) - e log sigmoid(-beta * margin)``.
    """
    return smoothed_logistic(beta * margin(logps, s, beta), s.label_smoothing)


def sigmoid_norm(logps: PairLogps, s: ObjectiveConfig, beta: float) -> Tensor:
    """Length-normalised DPO (Tulu 3, arXiv 2411.15124, eq. 6): ``sigmoid`` on log-ratios per token."""
    return smoothed_logistic(beta * margin(logps, s, beta, per_token=True), s.label_smoothing)


def robust(logps: PairLogps, s: ObjectiveConfig, beta: float) -> Tensor:
    """Robust DPO (Chowdhury et al., arXiv 2403.00409): DPO's loss, unbiased if a share e of the labels is flipped.

    ``(-(1 - e) log sigmoid(beta * margin) + e log sigmoid(-beta * margin)) / (1 - 2 e)``
    """
    logits, flipped = beta * margin(logps, s, beta), s.label_smoothing
    return (-(1 - flipped) * F.logsigmoid(logits) + flipped * F.logsigmoid(-logits)) / (1 - 2 * flipped)


def hinge(logps: PairLogps, s: ObjectiveConfig, beta: float) -> Tensor:
    """SLiC (Zhao et al., arXiv 2305.10425) in the form of RSO (arXiv 2309.06657): ``max(0, 1 - beta * margin)``."""
    return F.relu(1 - beta * margin(logps, s, beta))


def ipo(logps: PairLogps, s: ObjectiveConfig, beta: float) -> Tensor:
    """IPO (Azar et al., arXiv 2310.12036, eq. 17): ``(margin - 1 / (2 beta))^2``, on log-ratios per token as in TRL."""
    return (margin(logps, s, beta, per_token=True) - 1 / (2 * beta)) ** 2


def ipo_sum(logps: PairLogps, s: ObjectiveConfig, beta: float) -> Tensor:
    """IPO on sums over tokens, as eq. 17 is written."""
    return (margin(logps, s, beta) - 1 / (2 * beta)) ** 2


def exo_pair(logps: PairLogps, s: ObjectiveConfig, beta: float) -> Tensor:
    """EXO (Ji et al., arXiv 2402.00856, eq. 16): the KL divergence of (q, 1 - q) from the smoothed label (1 - e, e), where
    q = ``sigmoid(beta * margin)`` and e is ``label_smoothing``."""
    logits, epsilon = beta * margin(logps, s, beta), s.label_smoothing
    return torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-epsilon)) + torch.sigmoid(-logits) * (
        F.logsigmoid(-logits) - math.log(epsilon)
    )


def discopop(logps: PairLogps, s: ObjectiveConfig, beta: float) -> Tensor:
    """DiscoPOP (Lu et al., arXiv 2406.08414, eq. 5): ``(1 - g) (-log sigmoid(x)) + g exp(-x)``, where x is ``beta * margin``
    and g = ``sigmoid(x / discopop_tau)``. Found by automatic search; around a margin of 0 the loss rises with the margin."""
    logits = beta * margin(logps, s, beta)
    gate = torch.sigmoid(logits / s.discopop_tau)
    return -F.logsigmoid(logits) * (1 - gate) + torch.exp(-logits) * gate


def dpop(logps: PairLogps, s: ObjectiveConfig, beta: float) -> Tensor:
    """DPO-Positive (Smaug, Pal et al., arXiv 2402.13228): ``-log sigmoid(beta * (margin - dpop_lambda * max(0, log
    ref(y_w|x) - log pi(y_w|x))))``.

    It has a kink where policy and reference agree, so rounding decides which pairs the penalty applies to in the first step.
    """
    fallen = F.relu(-logps.chosen_logratio)
    return -F.logsigmoid(beta * (margin(logps, s, beta) - s.dpop_lambda * fallen))
