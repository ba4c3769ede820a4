"""Log-probs of any pairs by the policy as it is, over all ranks: for held-out evaluation and for the gate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from raydpo.config import TrainConfig
from raydpo.data.plan import MicroBatch, split_over_ranks
from raydpo.losses import PairLogps, preference_loss
from raydpo.model.layout import Layout
from raydpo.prefetch import prefetch
from raydpo.training.engine import PolicyEngine
from raydpo.training.metrics import PairSums
from raydpo.training.pairs import TrainingPairs

__all__ = ["Comparison", "compare", "evaluate", "pair_logps"]


def pair_logps(pairs: TrainingPairs, rows: Sequence[int], policy_logps: torch.Tensor) -> PairLogps:
    """Sums over completions of ``policy_logps``, the flat [N] log-probs of the layout of ``pairs.groups(rows)``."""
    device = policy_logps.device
    index = np.asarray(rows)
    lengths = torch.from_numpy(np.stack([pairs.chosen_tokens[index], pairs.rejected_tokens[index]], 1).ravel()
                               .astype(np.int64)).to(device, non_blocking=True)
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths, output_size=len(policy_logps))
    # In float64: the margin is a small difference of sums of hundreds of nats.
    sums = torch.zeros(len(lengths), dtype=torch.float64, device=device).index_add(0, owner, policy_logps.double())
    chosen, rejected = sums.view(-1, 2).unbind(1)
    tokens = lengths.view(-1, 2).double().unbind(1)
    return PairLogps(chosen, rejected, torch.from_numpy(pairs.ref_chosen[index]).to(device),
                     torch.from_numpy(pairs.ref_rejected[index]).to(device), *tokens)


def evaluate(engine: PolicyEngine, pairs: TrainingPairs, train: TrainConfig, tokens_per_batch: int) -> dict[str, float]:
    """Metrics over all ``pairs``, each prefixed ``eval_``; the same on every rank."""
    sums = PairSums(pairs.source_names, engine.device)
    with engine.evaluating():
        for batch, layout in _my_batches(engine, pairs, range(len(pairs)), tokens_per_batch):
            logps = pair_logps(pairs, batch.pairs, engine.logps(layout))
            if batch.counts and engine.leads:
                loss = preference_loss(train.loss, logps, beta=train.beta, label_smoothing=train.label_smoothing)
                sums.add(loss, logps, torch.from_numpy(pairs.sources[list(batch.pairs)]).long().to(engine.device))
    engine.sum_over_ranks(sums.values)
    return {f"eval_{name}": value for name, value in sums.metrics().items()}


def _my_batches(engine: PolicyEngine, pairs: TrainingPairs, rows: Sequence[int],
                tokens_per_batch: int) -> Iterator[tuple[MicroBatch, Layout]]:
    plan = split_over_ranks(rows, pairs.shapes, world_size=engine.replicas, tokens_per_batch=tokens_per_batch,
                            layout=engine.module.method.layout)
    return prefetch(plan[engine.replica], lambda batch: (batch, engine.lay_out(pairs.groups(batch.pairs))))


@dataclass(frozen=True)
class Comparison:
    """Policy against stored reference, by pair: arrays [pairs], in nats.

    Attributes:
        token_gap: largest absolute difference of a single token.
        mean_gap: mean absolute difference of a token.
        chosen_gap, rejected_gap: difference of the sums over the completion; 0 if the policy is the reference.
    """

    rows: np.ndarray
    token_gap: np.ndarray
    mean_gap: np.ndarray
    chosen_gap: np.ndarray
    rejected_gap: np.ndarray


def compare(engine: PolicyEngine, pairs: TrainingPairs, rows: Sequence[int], tokens_per_batch: int) -> Comparison:
    """Score ``rows`` with the policy as it is and compare token by token; the same result on every rank."""
    rows = list(rows)
    place = {row: index for index, row in enumerate(rows)}
    gaps = torch.zeros(4, len(rows), dtype=torch.float64, device=engine.device)
    with engine.evaluating():
        for batch, layout in _my_batches(engine, pairs, rows, tokens_per_batch):
            flat = engine.logps(layout).double().cpu().numpy()
            completions = iter(np.split(flat, np.cumsum(layout.lengths)[:-1]))
            for row in batch.pairs if batch.counts and engine.leads else ():
                live = next(completions), next(completions)
                gap_chosen, gap_rejected = (ours - stored for ours, stored in zip(live, pairs.reference(row), strict=True))
                if not pairs.has_tokens(row):  # only sums were imported: their difference, spread evenly over the tokens
                    gap_chosen, gap_rejected = (
                        np.full(len(ours), (ours.sum() - total) / len(ours)) for ours, total in
                        zip(live, (pairs.ref_chosen[row], pairs.ref_rejected[row]), strict=True))
                every = np.abs(np.concatenate([gap_chosen, gap_rejected]))
                # Written by the one rank that owns the pair; the sum over ranks fills in the others'.
                gaps[:, place[row]] = torch.tensor([every.max(), every.mean(), gap_chosen.sum(), gap_rejected.sum()])
    return Comparison(np.array(rows), *engine.sum_over_ranks(gaps).cpu().numpy())
