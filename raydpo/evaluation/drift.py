"""Drift of a policy: KL(policy || reference), estimated on the policy's own samples.

Samples are drawn at temperature 1 from the whole vocabulary. A sample that was cut at max_tokens counts with the tokens it
has, so the estimate is the divergence of answers of at most max_tokens tokens. There are two unbiased estimators:

- the mean of log pi(y|x) - log ref(y|x), with log-probs by the scorer of the caches;
- the mean of the sum over positions of KL(pi(.|x, y_<t) || ref(.|x, y_<t)), exact from whole distributions
  (Rao-Blackwellised: Amini et al. 2025, arXiv 2504.10637). Its variance is lower and it is never negative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from raydpo.cluster.resources import Resources
from raydpo.data.interval import mean, ratio, standard_error
from raydpo.model.layout import PromptGroup
from raydpo.model.logps import LogpModel
from raydpo.model.partition import Partition, whole
from raydpo.reference.identity import on_this_machine
from raydpo.reference.score import ReferenceSpec, Scorer
from raydpo.reference.team import TeamScorer, refuse_quantized

__all__ = ["ExactSteps", "exact_steps", "measure_drift"]

TOKENS_PER_BATCH = 4096
"""Number of positions in a forward pass of the exact steps."""
CHUNK = 2**24
"""Most probabilities of a distribution that are computed at a time, in float64 for both models: 128 MiB a tensor."""


def measure_drift(
    log_ratios: np.ndarray, tokens: np.ndarray, prompts: np.ndarray, steps: np.ndarray | None
) -> dict[str, Any]:
    """Estimate KL(policy || reference) of an answer and of a token, in nats.

    The standard error is that of the mean over prompts; for a single prompt, that of the mean over its samples.

    Args:
        log_ratios: log pi - log ref of each sampled answer, [samples].
        tokens: number of tokens of each answer, [samples]. prompts: number of its prompt, [samples].
        steps: sum of the exact divergences at the positions of each answer, [samples], or None.
    """

    def by_prompt(values: np.ndarray) -> np.ndarray:
        numbers, inverse = np.unique(prompts, return_inverse=True)
        if len(numbers) == 1:
            return values
        return np.bincount(inverse, values) / np.bincount(inverse)

    def estimate(values: np.ndarray) -> dict[str, Any]:
        values = by_prompt(values.astype(np.float64))
        return {"kl": mean(values), "std_error": standard_error(values), "kl_per_token": ratio(values, lengths)}

    lengths = by_prompt(tokens.astype(np.float64))
    exact = None if steps is None else estimate(steps)
    return estimate(log_ratios) | {"samples": len(log_ratios), "rao_blackwell": exact}


@dataclass(frozen=True, kw_only=True)
class ExactSteps:
    """Work that turns ``prompt_ids`` and ``answer_ids`` into ``divergence``, float64, nats an answer."""

    policy: ReferenceSpec
    reference: ReferenceSpec

    @property
    def identity(self) -> dict[str, Any]:
        return {"exact steps": 1, "policy": self.policy.identity.digest, "reference": self.reference.identity.digest}

    def open(self, device: str) -> Callable[[pa.Table], pa.Table]:
        both = _Both(on_this_machine(self.reference), policy=on_this_machine(self.policy), device=device)
        return lambda rows: _divergences(both, rows)

    def open_team(self, resources: Resources) -> Callable[[pa.Table], pa.Table]:
        policy, reference = on_this_machine(self.policy), on_this_machine(self.reference)
        refuse_quantized(policy)
        where = {"device": resources.device, "partition": Partition(resources.partition, resources.offload)}
        team = TeamScorer(reference, work=_Both, policy=policy, threads=resources.threads, **where)
        return lambda rows: _divergences(team, rows)


def _divergences(both: _Both | TeamScorer, rows: pa.Table) -> pa.Table:
    sides = zip(rows["prompt_ids"].to_pylist(), rows["answer_ids"].to_pylist(), strict=True)
    groups = [PromptGroup(np.array(one, np.int32), (np.array(other, np.int32),)) for one, other in sides]
    return pa.table({"divergence": both.score(groups)})


class _Both:
    """Policy and reference on one device, or this process's part of both.

    Args:
        spec: the reference. The rest: as ``Scorer``.
    """

    def __init__(
        self,
        spec: ReferenceSpec,
        *,
        policy: ReferenceSpec,
        device: str,
        partition: Partition = Partition(),  # noqa: B008 (frozen)
        group: None = None,
    ) -> None:
        how = {"device": device, "tokens_per_batch": TOKENS_PER_BATCH, "partition": partition}
        self.device, self._divided = torch.device(device), partition.active
        self.policy, self.reference = Scorer(policy, **how).model, Scorer(spec, **how).model

    def score(self, groups: Sequence[PromptGroup]) -> np.ndarray:
        """Divergence of each answer, float64 [groups]. Each process of a team computes some of them."""
        if not self._divided:
            return np.array([exact_steps(self.policy, self.reference, group, self.device) for group in groups])
        found = np.zeros(len(groups))
        short = PromptGroup(groups[0].prompt[:1], (groups[0].completions[0][:1],))  # computed for its gathers alone
        share = range(dist.get_rank(), len(groups), dist.get_world_size())
        for turn in range(-(-len(groups) // dist.get_world_size())):
            index = share[turn] if turn < len(share) else None
            value = exact_steps(self.policy, self.reference, short if index is None else groups[index], self.device)
            if index is not None:
                found[index] = value
        together = torch.from_numpy(found).to(self.device)
        dist.all_reduce(together)  # only one process has each value, so the sum is exact
        return together.cpu().numpy()


@torch.no_grad()
def exact_steps(policy: LogpModel, reference: LogpModel, group: PromptGroup, device: torch.device) -> float:
    """Sum KL(policy || reference) of the next token over the positions of one answer, nats."""
    hidden = [model.hidden(model.lay_out([group]).to(device)) for model in (policy, reference)]
    size = max(1, CHUNK // policy.vocabulary)
    total = 0.0
    with whole(policy.head), whole(reference.head):
        for start in range(0, len(hidden[0]), size):
            log_pi, log_ref = (
                model.log_distribution(states[start : start + size]).double()
                for model, states in zip((policy, reference), hidden, strict=True)
            )
            # A token of probability 0 under the policy adds 0; the product would be NaN.
            total += float(torch.where(log_pi == -torch.inf, 0.0, log_pi.exp() * (log_pi - log_ref)).sum())
    return total
