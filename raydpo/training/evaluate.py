"""Log-probs of pairs under the current policy, over all ranks: for held-out evaluation, the gate and whole-step losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from raydpo.config import ObjectiveConfig
from raydpo.data.plan import MicroBatch, split_over_ranks
from raydpo.data.prefetch import prefetch
from raydpo.data.separation import effective_auc
from raydpo.losses import Objective, ObjectiveState, PairLogps
from raydpo.model.layout import Layout
from raydpo.training.metrics import PairSums
from raydpo.training.pairs import TrainingPairs, send
from raydpo.training.policy.engine import StepEngine
from raydpo.training.router import RouterLoss

__all__ = ["AllPairLogps", "Comparison", "Gaps", "compare", "evaluate", "pair_logps", "reference_logps"]

_OF_THE_POLICY = ("chosen", "rejected", "chosen_tail", "rejected_tail", "weights")
"""Fields of ``PairLogps`` that only the rank that computes a pair knows. The weights are WPO's times the data's."""


def reference_logps(
    pairs: TrainingPairs,
    rows: Sequence[int] | np.ndarray,
    config: ObjectiveConfig,
    device: torch.device | str = "cpu",
    mean_chosen_tokens: float | None = None,
) -> PairLogps:
    """Log-probs of ``rows`` under a policy that equals the reference, with the fields that the objective needs.

    Args:
        mean_chosen_tokens: mean over the step; None = mean over ``rows``.
    """
    index = np.asarray(rows)

    def at(values: np.ndarray | None) -> Tensor | None:
        return None if values is None else send(np.asarray(values[index], np.float64), device)

    chosen, rejected = at(pairs.ref_chosen), at(pairs.ref_rejected)

    def ranks(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values[index])  # on the CPU, where it is decided which completions are compared

    tails: Sequence[Tensor | None] = (None, None)
    lists = {}
    if pairs.starts is not None:
        # A list that occurs twice among the rows is two lists.
        lists = {"lists": torch.from_numpy(np.cumsum(pairs.begin(index)))}
        lists |= {"chosen_ranks": ranks(pairs.chosen_ranks), "rejected_ranks": ranks(pairs.rejected_ranks)}
    if config.ld_alpha is not None:
        tails = [send(side, device) for side in pairs.reference_tails(index)]
    return PairLogps(
        chosen,
        rejected,
        chosen,
        rejected,
        at(pairs.chosen_counted),
        at(pairs.rejected_counted),
        *tails,
        *tails,
        weights=at(pairs.pair_weights),
        margins=at(pairs.pair_margins),
        mean_chosen_tokens=pairs.mean_chosen_tokens(index) if mean_chosen_tokens is None else mean_chosen_tokens,
        labels=None if pairs.labels is None else send(pairs.labels[index], device),
        **lists,
    )


def pair_logps(
    engine: StepEngine,
    layout: Layout,
    pairs: TrainingPairs,
    rows: Sequence[int],
    config: ObjectiveConfig,
    mean_chosen_tokens: float | None = None,
    seen: Callable[[Tensor], None] | None = None,
    routed: Callable[[Tensor], None] | None = None,
) -> PairLogps:
    """Log-probs of ``rows`` under the policy, with gradient in training mode. ``layout`` is the micro-batch of these rows.

    Shapes: N = completion tokens, chosen and rejected of each pair in turn.

    Args:
        mean_chosen_tokens: mean over the step; None = mean over ``rows``.
        seen: called with the log-probs of the tokens [N].
        routed: called with the router loss of a mixture of experts [], which is computed only for it.
    """
    asked = {"log_sum_sq": config.use_weighting, "router_loss": routed is not None}
    found = engine.logps(layout, **{name: True for name, wish in asked.items() if wish})
    logps_N, *more = found if any(asked.values()) else (found,)
    if routed is not None:
        routed(more.pop())
    if seen is not None:
        seen(logps_N)
    device, index = logps_N.device, np.asarray(rows)
    both = np.stack([pairs.chosen_tokens[index], pairs.rejected_tokens[index]], 1).ravel().astype(np.int64)
    lengths = send(both, device)
    owner_N = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths, output_size=len(logps_N))
    weights_N = send(pairs.weights_of(index), device) if pairs.masked else None

    def totals(values_N: Tensor) -> Tensor:
        # float64: the margin is a small difference of sums of hundreds of nats.
        return torch.zeros(len(lengths), dtype=torch.float64, device=device).index_add(0, owner_N, values_N.double())

    def sums(values_N: Tensor) -> tuple[Tensor, Tensor]:
        values_N = values_N if weights_N is None else values_N.double() * weights_N
        return totals(values_N).view(-1, 2).unbind(1)

    logps = reference_logps(pairs, rows, config, device, mean_chosen_tokens)
    chosen, rejected = sums(logps_N)
    logps = dataclasses.replace(logps, chosen=chosen, rejected=rejected)
    if config.ld_alpha is not None:
        # Number of the tokens before this one in its completion, of those that count.
        before_N, sizes = torch.arange(len(logps_N), device=device), lengths
        if weights_N is not None:
            counted_N = (weights_N > 0).long()
            before_N, sizes = counted_N.cumsum(0) - counted_N, totals(counted_N).long()
        place_N = before_N - (sizes.cumsum(0) - sizes)[owner_N]
        shared = sizes.view(-1, 2).amin(1)
        if logps.labels is not None:  # a completion alone has no tail
            shared = torch.where(logps.labels == 0, shared, sizes.max())
        shared = shared.repeat_interleave(2)
        chosen, rejected = sums(logps_N * (place_N >= shared[owner_N]))
        logps = dataclasses.replace(logps, chosen_tail=chosen, rejected_tail=rejected)
    if more:
        # WPO (Zhou et al., arXiv 2406.11827, eq. 2): mean probability of a token that counts under the policy, divided by
        # the probability that two draws from the policy agree at that token.
        chosen, rejected = sums((logps_N - more[0]).detach())
        means = chosen / logps.chosen_tokens, rejected / logps.rejected_tokens
        if logps.sides is not None:
            means = tuple(torch.where(there, mean, 0) for there, mean in zip(logps.sides, means, strict=True))
        weights = torch.exp(means[0] + means[1])
        logps = dataclasses.replace(logps, weights=weights if logps.weights is None else weights * logps.weights)
    return logps


class AllPairLogps:
    """The log-probs of ``rows``, in their order, from all ranks; without gradient.

    A row that occurs twice is computed twice, and gets the mean of both.
    """

    def __init__(
        self, engine: StepEngine, pairs: TrainingPairs, rows: Sequence[int] | np.ndarray, config: ObjectiveConfig
    ) -> None:
        self._engine, self._pairs, self._config, self._rows = engine, pairs, config, rows
        self._distinct, self._places = np.unique(rows, return_inverse=True)
        self._found = torch.zeros(len(_OF_THE_POLICY) + 1, len(self._distinct), dtype=torch.float64, device=engine.device)

    def compute(self, batches: Iterable[tuple[MicroBatch, Layout]], router: RouterLoss | None = None) -> None:
        """Compute this rank's micro-batches. Adds their router losses to ``router``."""
        with self._engine.evaluating():
            for batch, layout in batches:
                routed = None if router is None else partial(router.add, batch, layout)
                logps = pair_logps(self._engine, layout, self._pairs, batch.pairs, self._config, routed=routed)
                if batch.counts and self._engine.is_leader:
                    one = torch.ones_like(logps.chosen)
                    columns = [one if (value := getattr(logps, name)) is None else value for name in _OF_THE_POLICY]
                    place = send(np.searchsorted(self._distinct, batch.pairs), self._engine.device)
                    self._found.index_add_(1, place, torch.stack([*columns, one]))

    def join(self) -> PairLogps:
        """Combine the results of all ranks. All ranks call it, and get the same."""
        known = reference_logps(self._pairs, self._rows, self._config, self._engine.device)
        found = self._engine.sum_over_ranks(self._found)
        values = (found[:-1] / found[-1])[:, torch.from_numpy(self._places).to(self._engine.device)]
        unknown = () if self._config.ld_alpha is not None else ("chosen_tail", "rejected_tail")
        if not self._config.use_weighting and known.weights is None:
            unknown += ("weights",)
        fields = {name: value for name, value in zip(_OF_THE_POLICY, values, strict=True) if name not in unknown}
        return dataclasses.replace(known, **fields)


def evaluate(
    engine: StepEngine,
    pairs: TrainingPairs,
    objective: Objective,
    beta: float,
    memory: ObjectiveState,
    tokens_per_batch: int,
    *,
    as_reference: bool = False,
) -> dict[str, float]:
    """Metrics over all ``pairs``, with prefix ``eval_``; the same on every rank. A whole-step objective sees them as one
    step.

    Of completions with labels also ``rewards/auc``, and ``effective_labels``: how many independent completions would measure
    it as precisely. With a router loss also ``aux_loss``, where something is computed.

    Args:
        as_reference: the policy is the reference, so its log-probs are the stored ones, and nothing is computed. WPO, which
            needs more than log-probs, computes them all the same.
    """
    config, rows = objective.config, np.arange(len(pairs))
    sums = PairSums(
        pairs.source_names,
        engine.device,
        reference=pairs.has_reference,
        drift=config.estimates_drift,
        prompts=int(pairs.prompts.max()) + 1,
    )
    batches = _my_batches(engine, pairs, rows.tolist(), tokens_per_batch)

    def add(logps: PairLogps, of: Sequence[int] | np.ndarray) -> None:
        prompts = send(pairs.prompts[np.asarray(of)], engine.device)
        sums.add(objective(logps, beta, memory), logps, pairs.source_of(of, engine.device), prompts)

    apart: dict[str, float] = {}

    def add_all(logps: PairLogps) -> None:  # on every rank, so nothing is to be summed
        add(logps, rows)
        apart.update(_labels_apart(pairs, logps))

    router = None if as_reference and not config.use_weighting else RouterLoss.asked(engine, config)
    if as_reference and not config.use_weighting:
        add_all(reference_logps(pairs, rows, config, engine.device))
    elif objective.whole_step or pairs.labels is not None:
        everything = AllPairLogps(engine, pairs, rows, config)
        everything.compute(batches, router)
        add_all(everything.join())
    else:
        mean_chosen_tokens = pairs.mean_chosen_tokens(rows)
        with engine.evaluating():
            for batch, layout in batches:
                routed = None if router is None else partial(router.add, batch, layout)
                logps = pair_logps(engine, layout, pairs, batch.pairs, config, mean_chosen_tokens, routed=routed)
                if batch.counts and engine.is_leader:
                    add(logps, batch.pairs)
        engine.sum_over_ranks(sums.values)
    if router is not None:
        engine.sum_over_ranks(router.values)
        apart |= router.metrics()
    return {f"eval_{name}": value for name, value in (sums.metrics() | apart).items()}


def _labels_apart(pairs: TrainingPairs, logps: PairLogps) -> dict[str, float]:
    """How well log-ratios tell desirable from undesirable completions that are alone (``data.separation``); empty without
    both, or without a reference."""
    if pairs.labels is None or not pairs.has_reference:
        return {}
    logratios = np.where(
        pairs.labels > 0, *(each.cpu().numpy() for each in (logps.chosen_logratio, logps.rejected_logratio))
    )
    value, count = effective_auc(logratios, pairs.labels, pairs.prompts)
    return {} if value is None else {"rewards/auc": value, "effective_labels": count}


def _my_batches(
    engine: StepEngine, pairs: TrainingPairs, rows: Sequence[int], tokens_per_batch: int
) -> Iterator[tuple[MicroBatch, Layout]]:
    plan = split_over_ranks(
        pairs.items_of(rows).tolist(),
        pairs.shapes_of,
        world_size=engine.replicas,
        tokens_per_batch=tokens_per_batch,
        layout=engine.module.method.layout,
        starts=pairs.starts,
    )
    return prefetch(plan[engine.replica], lambda batch: (batch, engine.lay_out(pairs.groups(batch.pairs))))


@dataclass(frozen=True)
class Comparison:
    """Difference of policy and stored reference by pair: arrays [pairs], in nats.

    Attributes:
        token_gap: largest absolute difference of a single token.
        mean_gap: mean absolute difference of a token.
        chosen_gap, rejected_gap: difference of the sums over the completion; 0 if the policy is the reference.
        chosen_tail_gap, rejected_tail_gap: the same for the tokens beyond the length of the shorter completion.

    The first two compare every token; the others those that count, each with its weight.
    """

    rows: np.ndarray
    token_gap: np.ndarray
    mean_gap: np.ndarray
    chosen_gap: np.ndarray
    rejected_gap: np.ndarray
    chosen_tail_gap: np.ndarray
    rejected_tail_gap: np.ndarray


class Gaps:
    """Collects the differences of policy and stored reference for distinct ``rows``, from the micro-batches of all ranks.

    A row that is computed twice, on one rank or two, gets the mean of both.
    """

    def __init__(self, engine: StepEngine, pairs: TrainingPairs, rows: Sequence[int] | np.ndarray) -> None:
        self._engine, self._pairs, self._rows = engine, pairs, np.asarray(rows)
        self._place = {int(row): index for index, row in enumerate(self._rows)}
        self._found = torch.zeros(7, len(self._rows), dtype=torch.float64, device=engine.device)

    def add(self, batch: MicroBatch, layout: Layout, logps_N: Tensor) -> None:
        """Add a micro-batch: the policy's log-probs of its N completion tokens, chosen and rejected of each pair in turn."""
        if not (batch.counts and self._engine.is_leader):
            return
        pairs = self._pairs
        completions = iter(np.split(logps_N.detach().double().cpu().numpy(), np.cumsum(layout.lengths)[:-1]))
        for row in batch.pairs:
            live = next(completions), next(completions)
            weights = np.split(pairs.weights_of([row]), [len(live[0])])
            gap_chosen, gap_rejected = (ours - stored for ours, stored in zip(live, pairs.reference(row), strict=True))
            if not pairs.has_tokens(row):  # of one side only the sum was imported: spread differences evenly over the tokens
                gap_chosen, gap_rejected = (
                    np.full(len(ours), (ours @ each - total) / (each.sum() or 1))  # no tokens: 0
                    for ours, each, total in zip(
                        live, weights, (pairs.ref_chosen[row], pairs.ref_rejected[row]), strict=True
                    )
                )
            every = np.abs(np.concatenate([gap_chosen, gap_rejected]))
            gap_chosen, gap_rejected = (
                gaps[each > 0] * each[each > 0] for gaps, each in zip((gap_chosen, gap_rejected), weights, strict=True)
            )
            pair = pairs.labels is None or not pairs.labels[row]
            shared = min(len(gap_chosen), len(gap_rejected)) if pair else len(every)
            sums = [each.sum() for each in (gap_chosen, gap_rejected, gap_chosen[shared:], gap_rejected[shared:])]
            self._found[:, self._place[row]] += torch.tensor([every.max(), every.mean(), *sums, 1.0]).to(self._found)

    def join(self) -> Comparison:
        """Combine the results of all ranks. All ranks call it, and get the same."""
        found = self._engine.sum_over_ranks(self._found).cpu().numpy()
        return Comparison(self._rows, *(found[:-1] / found[-1]))


def compare(engine: StepEngine, pairs: TrainingPairs, rows: Sequence[int], tokens_per_batch: int) -> Comparison:
    """Compute ``rows`` with the current policy and compare it with the reference token by token; the same on every rank."""
    gaps = Gaps(engine, pairs, rows)
    with engine.evaluating():
        for batch, layout in _my_batches(engine, pairs, list(rows), tokens_per_batch):
            gaps.add(batch, layout, engine.logps(layout))
    return gaps.join()
