"""Objectives over ranked lists of completions, and which completions of a list are compared.

Shapes: B = rows, 2B = completions, chosen and rejected of each row in turn, P = comparisons.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from raydpo.config import ObjectiveConfig
from raydpo.data.lists import compared
from raydpo.losses.pairs import PairLogps

__all__ = ["comparisons", "plackett_luce"]


def comparisons(logps: PairLogps) -> tuple[Tensor, Tensor]:
    """Each better completion of a list with each worse one, as places among the completions: int64 [P] each.

    Completions of equal rank are not compared, nor is a side without tokens (rank -1). Without lists, each row is a list of
    two, chosen before rejected.

    Raises:
        ValueError: if there are lists without ranks.
    """
    if logps.lists is None:
        better = torch.arange(len(logps.chosen), device=logps.chosen.device) * 2
        return better, better + 1
    if logps.chosen_ranks is None or logps.rejected_ranks is None:
        raise ValueError("lists need the ranks of their completions: set chosen_ranks and rejected_ranks of PairLogps")
    fields = (logps.lists, logps.chosen_ranks, logps.rejected_ranks)
    better, worse = compared(*(field.cpu().numpy() for field in fields))
    return torch.from_numpy(better).to(logps.chosen.device), torch.from_numpy(worse).to(logps.chosen.device)


def plackett_luce(logps: PairLogps, s: ObjectiveConfig, beta: float) -> Tensor:
    """DPO on rankings, by the model of Plackett (1975, doi 10.2307/2346567) and Luce (1959): the sum over the completions k
    of a list that have others below them of ``-log(exp(s_k) / (exp(s_k) + sum over lower-ranked j of exp(s_j)))``, where s
    is ``beta`` times the log-ratio.

    It is the objective of Rafailov et al. (arXiv 2305.18290, appendix A.3, eq. 18 to 20; LiPO, arXiv 2402.01878, compares it
    with other losses over lists). Completions of equal rank are not compared: neither is in the sum of the other. A list of
    two has the loss ``sigmoid``. The loss of a list is the sum over its rows; each row has the terms of its own completions.
    """
    scores = beta * torch.stack([logps.chosen_logratio, logps.rejected_logratio], 1).flatten()
    better, worse = comparisons(logps)
    below, compared = scores[worse], torch.zeros_like(scores, dtype=torch.bool).index_fill(0, better, True)
    highest = torch.full_like(scores, -torch.inf).scatter_reduce(0, better, below.detach(), "amax")
    highest = highest.masked_fill(~compared, 0.0)
    sums = torch.zeros_like(scores).index_add(0, better, torch.exp(below - highest[better])).masked_fill(~compared, 1.0)
    losses = -F.logsigmoid(scores - highest - torch.log(sums)).masked_fill(~compared, 0.0)
    return losses.view(-1, 2).sum(1)
