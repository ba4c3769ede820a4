"""Metrics over pairs, under TRL's names, as sums that add up over micro-batches and ranks.

All sums are one float64 vector: a step needs one all-reduce, and metrics do not depend on which rank computed which pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from raydpo.data.interval import effective_count
from raydpo.losses import PairLogps, PreferenceLoss
from raydpo.losses.listwise import comparisons
from raydpo.losses.pairs import TIE

__all__ = ["PairSums"]

_OF = {
    "loss": "pairs",
    "rewards/chosen": "chosen",
    "rewards/rejected": "rejected",
    "rewards/margins": "both",
    "rewards/accuracies": "judged",
    "logps/chosen": "chosen",
    "logps/rejected": "rejected",
    "logps/accuracies": "both",
    "logps/chosen_fell": "chosen",
    "length/chosen": "chosen",
    "length/rejected": "rejected",
}
"""Metrics that are means, and the number of rows that each is a mean over."""
_COUNTS = ("pairs", "chosen", "rejected", "both", "judged")
"""Numbers of rows: all, those with a chosen, a rejected, and both completions, and those that are right or wrong. Of ranked
lists, ``pairs`` counts the lists."""
_FIELDS = (
    *_COUNTS,
    *_OF,
    "logratio/chosen",
    "logratio/rejected",
    "difference",
    "difference_sq",
    "margin_sq",
    "product",
    "drift",
    "samples",
)
"""Names of the sums; ``product`` is margin times difference of lengths, ``samples`` the completions that drift is the sum
over."""
_AGAINST_REFERENCE = ("logps/chosen_fell", "logratio/chosen_per_token", "logratio/rejected_per_token")
_OF_A_SOURCE = ("loss", "rewards/margins", "rewards/accuracies")
_SOURCE_FIELDS = (*_COUNTS, *_OF_A_SOURCE, "rewards/chosen", "rewards/rejected")


class PairSums:
    """Sums over pairs of everything a metric needs.

    Args:
        source_names: names of the sources; more than one adds metrics for each.
        reference: whether the reference's log-probs are known; without them, metrics against it are left out.
        drift: whether to measure the drift that the loss estimates.
        prompts: number of distinct prompts, if ``add`` gets the prompt of each pair. Then the effective number of pairs is
            measured too, which a standard error of the accuracy needs.
    """

    def __init__(
        self,
        source_names: Sequence[str],
        device: torch.device,
        *,
        reference: bool = True,
        drift: bool = False,
        prompts: int = 0,
    ) -> None:
        self.reference, self.drift, self.prompts = reference, drift, prompts
        self.source_names = list(source_names)
        self._end = len(_FIELDS) + len(_SOURCE_FIELDS) * len(self.source_names)
        self.values = torch.zeros(self._end + 2 * prompts, dtype=torch.float64, device=device)

    def add(self, loss: PreferenceLoss, logps: PairLogps, sources: Tensor, prompts: Tensor | None = None) -> None:
        """Add a micro-batch of B pairs; ``sources`` and ``prompts`` are int [B]. Copies nothing to the host.

        Of ranked lists, all pairs of a list are added of which one is ranked above the other, and the list's loss.
        """
        if logps.lists is not None:
            return self._add_lists(loss, logps, sources, prompts)
        margins = (loss.chosen_rewards - loss.rejected_rewards).double()
        difference = (logps.chosen_tokens - logps.rejected_tokens).double()
        chosen, rejected = logps.chosen.detach().double(), logps.rejected.detach().double()
        chosen_logratio, rejected_logratio = chosen - logps.ref_chosen.double(), rejected - logps.ref_rejected.double()
        alike = (chosen_logratio - rejected_logratio).abs() <= TIE * (logps.chosen_tokens + logps.rejected_tokens)
        wins = torch.where(alike, 0.5, _wins(margins))
        every = torch.ones_like(margins)
        columns = {
            "pairs": every,
            "chosen": every,
            "rejected": every,
            "both": every,
            "judged": every,
            "loss": loss.losses.detach().double(),
            "rewards/chosen": loss.chosen_rewards.double(),
            "rewards/rejected": loss.rejected_rewards.double(),
            "rewards/margins": margins,
            "rewards/accuracies": wins,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            "logps/accuracies": _wins(chosen - rejected),
            "logps/chosen_fell": (chosen_logratio < -TIE * logps.chosen_tokens).double(),
            "length/chosen": logps.chosen_tokens.double(),
            "length/rejected": logps.rejected_tokens.double(),
            "logratio/chosen": chosen_logratio,
            "logratio/rejected": rejected_logratio,
            "difference": difference,
            "difference_sq": difference**2,
            "margin_sq": margins**2,
            "product": margins * difference,
            "drift": chosen_logratio + rejected_logratio,
            "samples": 2 * every,
        }
        if logps.sides is not None:
            columns |= _of_own_sides(columns, logps, loss.threshold)
            wins = columns["rewards/accuracies"]
        self.values[: len(_FIELDS)] += torch.stack([columns[name].sum() for name in _FIELDS])
        by_source = self.values[len(_FIELDS) : self._end].view(len(_SOURCE_FIELDS), -1)
        for row, name in enumerate(_SOURCE_FIELDS):
            by_source[row].index_add_(0, sources, columns[name])
        if prompts is not None:
            by_prompt = self.values[self._end :].view(2, -1)
            by_prompt[0].index_add_(0, prompts, columns["judged"])
            by_prompt[1].index_add_(0, prompts, wins)

    def _add_lists(self, loss: PreferenceLoss, logps: PairLogps, sources: Tensor, prompts: Tensor | None) -> None:
        better, worse = comparisons(logps)
        rows = better // 2

        def compared(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
            both = torch.stack([chosen, rejected], 1).flatten()
            return both[better], both[worse]

        rewards = compared(loss.chosen_rewards, loss.rejected_rewards)
        pairs = PairLogps(
            *compared(logps.chosen.detach(), logps.rejected.detach()),
            *compared(logps.ref_chosen, logps.ref_rejected),
            *compared(logps.chosen_tokens, logps.rejected_tokens),
        )
        of_pairs = None if prompts is None else prompts[rows]
        self.add(PreferenceLoss(torch.zeros_like(rewards[0]), *rewards), pairs, sources[rows], of_pairs)
        # The loss is of lists, not of the pairs in them.
        begin = torch.cat([torch.ones(1, dtype=torch.bool), logps.lists[1:] != logps.lists[:-1]])
        self._count("pairs", -torch.ones_like(rewards[0], dtype=torch.float64), sources[rows])
        self._count("pairs", begin.double().to(self.values.device), sources)
        self._count("loss", loss.losses.detach().double(), sources)

    def _count(self, name: str, values: Tensor, sources: Tensor) -> None:
        """Add ``values`` to a sum that each source has, too; both are [B]."""
        self.values[_FIELDS.index(name)] += values.sum()
        by_source = self.values[len(_FIELDS) : self._end].view(len(_SOURCE_FIELDS), -1)
        by_source[_SOURCE_FIELDS.index(name)].index_add_(0, sources, values)

    def metrics(self) -> dict[str, float]:
        """Means over all pairs added; after an all-reduce, over all ranks.

        ``rewards/accuracies`` is the share of pairs whose implicit reward prefers the chosen completion. A tie counts one
        half, so a policy that equals the reference has 0.5. ``logps/accuracies`` is the share of pairs whose chosen
        completion has the higher log-prob under the policy. ``logps/chosen_fell`` is the share whose chosen log-prob is
        below the reference's. ``length/margin_correlation`` is Pearson's correlation of margin and chosen minus rejected
        tokens. ``kl`` is the estimate of the drift, in nats a completion, at least 0, as TRL logs it.

        Of ranked lists, all pairs of a list count of which one is ranked above the other; ``loss`` is a mean over lists.

        With completions that are alone, figures of chosen and rejected completions are means over those that are there, and
        ``rewards/margins`` is the difference of their mean rewards, as in TRL. A completion alone is right if its reward is
        on the side of the loss's threshold that its label says. What nothing is known of is left out.

        With prompts also: numbers of ``pairs`` and ``prompts``, and ``effective_pairs``, how many independent pairs
        would measure the accuracy as precisely (``data.interval.effective_count``).
        """
        total = dict(zip(_FIELDS, self.values[: len(_FIELDS)].tolist(), strict=True))
        pairs = total["pairs"]
        row = _means(total, _OF)
        for side in ("chosen", "rejected"):
            if total[f"length/{side}"]:
                row[f"logratio/{side}_per_token"] = total[f"logratio/{side}"] / total[f"length/{side}"]
        if total["both"]:
            row["length/margin_correlation"] = _correlation(total)
        if not self.reference:
            row = {name: value for name, value in row.items() if name not in _AGAINST_REFERENCE}
        if self.drift:
            row["kl"] = max(0.0, total["drift"] / max(1.0, total["samples"]))
        if len(self.source_names) > 1:
            by_source = self.values[len(_FIELDS) : self._end].view(len(_SOURCE_FIELDS), -1).tolist()
            for index, name in enumerate(self.source_names):
                one = {field: column[index] for field, column in zip(_SOURCE_FIELDS, by_source, strict=True)}
                row |= {f"{name}/{metric}": each for metric, each in _means(one, _OF_A_SOURCE).items()}
        if self.prompts:
            sizes, wins = self.values[self._end :].view(2, -1).cpu().numpy()
            seen = sizes > 0
            # Of ranked lists, these are the pairs that are compared, which are more.
            row |= {"pairs": max(pairs, total["both"]), "prompts": float(seen.sum())}
            row["effective_pairs"] = effective_count(wins[seen], sizes[seen])
        return row


def _of_own_sides(columns: Mapping[str, Tensor], logps: PairLogps, threshold: Tensor | float | None) -> dict[str, Tensor]:
    """The columns of rows of which some lack a side: 0 where a metric is not of that row."""
    (chosen, rejected), labels = logps.sides, logps.labels
    both = chosen & rejected
    masks = {"pairs": torch.ones_like(chosen), "chosen": chosen, "rejected": rejected, "both": both}
    own = torch.where(chosen, columns["logratio/chosen"], columns["logratio/rejected"])
    tokens = torch.where(chosen, logps.chosen_tokens, logps.rejected_tokens)
    above = own - (0.0 if threshold is None else threshold)
    sides = torch.where(above.abs() <= TIE * tokens, 0.5, ((above > 0) == chosen).double())
    alone = torch.zeros_like(both) if threshold is None or labels is None else labels != 0
    masks["judged"] = both | alone
    wins = torch.where(alone, sides, columns["rewards/accuracies"])
    found = {name: torch.where(masks[of], columns[name], 0.0) for name, of in _OF.items() if name != "rewards/accuracies"}
    found |= {
        f"logratio/{side}": torch.where(masks[side], columns[f"logratio/{side}"], 0.0) for side in ("chosen", "rejected")
    }
    of_pairs = ("difference", "difference_sq", "margin_sq", "product")
    found |= {name: torch.where(both, columns[name], 0.0) for name in of_pairs}
    found |= {name: mask.double() for name, mask in masks.items()}
    found["rewards/accuracies"] = torch.where(masks["judged"], wins, 0.0)
    samples = logps.drift_samples
    found["samples"] = samples[0].double() + samples[1].double()
    found["drift"] = sum(
        torch.where(there, columns[f"logratio/{side}"], 0.0)
        for there, side in zip(samples, ("chosen", "rejected"), strict=True)
    )
    return found


def _means(total: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """The metrics ``names`` of sums, without those that no row has."""
    row = {name: total[name] / total[_OF[name]] for name in names if total[_OF[name]]}
    if total["both"] < total["pairs"]:
        row.pop("rewards/margins", None)
        if total["chosen"] and total["rejected"]:
            sides = (total[f"rewards/{side}"] / total[side] for side in ("chosen", "rejected"))
            row["rewards/margins"] = next(sides) - next(sides)
    return row


def _wins(margins: Tensor) -> Tensor:
    """1 where positive, 1/2 where zero up to rounding (``TIE``), 0 where negative."""
    return (torch.sign(margins) * (margins.abs() > TIE) + 1) / 2


def _correlation(total: dict[str, float]) -> float:
    """Pearson's correlation of margin and length difference; 0 if one of them varies by no more than rounding."""
    n, margins = total["both"], total["rewards/margins"]
    covariance = total["product"] - margins * total["difference"] / n
    margin_variance = total["margin_sq"] - margins**2 / n
    difference_variance = total["difference_sq"] - total["difference"] ** 2 / n
    if margin_variance <= n * TIE**2 or difference_variance <= 1e-12:
        return 0.0
    return covariance / (margin_variance * difference_variance) ** 0.5
