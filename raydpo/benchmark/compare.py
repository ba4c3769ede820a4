"""Compare what raydpo and TRL measured: whether their numbers agree, and how much faster one was. All functions are pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import numpy as np

from raydpo.benchmark.job import Result
from raydpo.data.shapes import Shapes
from raydpo.data.simulate import amounts
from raydpo.estimate.plan import FORWARD, operations
from raydpo.model.cost import ModelCost

__all__ = ["Measurement", "disagreements", "fastest", "figures", "median_ratio", "ratios"]

PAIR_NATS, TOKEN_NATS = 1e-3, 1e-5
"""float32: the log-probs of a completion may differ by the first number (nats), or by the second times the completion tokens
of its pair, whichever is larger. Rounding was a tenth of the first with a trained model of 30 layers."""
LOSS, LATER_LOSS = 1e-5, 1e-4
"""float32: tolerances of the first loss and of later losses. Rounding was 1e-8 and 1e-6 in ten steps."""
BFLOAT16_TOKEN_NATS = 0.05
"""bfloat16: mean difference allowed over the pairs, in nats a token."""
BFLOAT16_LOSS = 0.02
"""bfloat16: tolerance of the first loss. Later losses are not compared, since the weights round differently by then."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Everything measured for one workload.

    Attributes:
        names, shapes: ids and lengths of the pairs.
        score, train: raydpo's two processes.
        cached, online: TRL's processes with the reference computed before training or at every step, each the ``fastest``
            of those tried. online is None if it was skipped.
        tried: TRL's processes at every batch size, under the same names.
        model: sizes of the model. lora: whether adapters were trained.
        peak: peak operations a second of the device, or None if unknown.
        warmup: first steps that are not counted.
    """

    names: Sequence[str]
    shapes: Shapes
    score: Result
    train: Result
    cached: Result
    online: Result | None = None
    dtype: str
    model: ModelCost
    lora: bool
    peak: float | None
    pairs_per_step: int
    warmup: int
    tried: Mapping[str, Sequence[Result]] = field(default_factory=dict)

    @property
    def sides(self) -> dict[str, Result]:
        """The processes that trained, by name."""
        sides = {"raydpo": self.train, "cached": self.cached, "online": self.online}
        return {name: result for name, result in sides.items() if result is not None}

    def rows(self, step: int) -> range:
        """Row numbers of a step's pairs."""
        return range(step * self.pairs_per_step, min((step + 1) * self.pairs_per_step, len(self.names)))

    def amount(self, rows: Sequence[int]) -> np.ndarray:
        """Token positions, query-key pairs and predicted tokens that these pairs need, each prompt counted once; [3]."""
        return amounts([[row] for row in rows], self.shapes, "tree")


def disagreements(measured: Measurement) -> tuple[list[str], dict[str, float]]:
    """Compare the reference's log-probs of every pair, the policy's in the first step, and the losses: of all steps in
    float32, of the first step in bfloat16.

    Returns:
        One sentence for each difference larger than rounding; and the largest difference of each kind, by name.
    """
    exact = measured.dtype == "float32"
    tokens = measured.shapes.tokens
    problems, gaps = _reference_problems(measured, exact)
    for name, theirs in measured.sides.items():
        if name == "raydpo":
            continue
        rows = measured.rows(0)
        allowed = max(PAIR_NATS, TOKEN_NATS * tokens[rows].max()) if exact else BFLOAT16_TOKEN_NATS * tokens[rows].mean() / 2
        for half in ("chosen", "rejected"):
            one, other = (getattr(side, f"{half}_logps")[0] for side in (measured.train, theirs))
            gaps[f"first_{half}_logps_{name}"] = abs(one - other)
            if not abs(one - other) <= allowed:
                problems.append(
                    f"the policy's log-probs of the {half} completions of the first step are {one:.6g} on "
                    f"average with raydpo and {other:.6g} with TRL ({name}; tolerance {allowed:.2g})"
                )
        pairs = list(zip(measured.train.losses, theirs.losses, strict=True))
        gaps[f"loss_{name}"] = max(abs(one - other) for one, other in pairs)
        gaps[f"first_loss_{name}"] = abs(pairs[0][0] - pairs[0][1])
        for number, (one, other) in enumerate(pairs if exact else pairs[:1]):
            allowed = BFLOAT16_LOSS if not exact else LATER_LOSS if number else LOSS
            if not abs(one - other) <= allowed:
                problems.append(
                    f"the loss of step {number + 1} is {one:.6g} with raydpo and {other:.6g} with TRL "
                    f"({name}; tolerance {allowed:g})"
                )
                break
    return problems, gaps


def _reference_problems(measured: Measurement, exact: bool) -> tuple[list[str], dict[str, float]]:
    gaps, excess, values = {}, [], []
    lengths = measured.shapes.tokens
    for half in ("chosen", "rejected"):
        ours, theirs = (np.array(getattr(side, f"ref_{half}")) for side in (measured.score, measured.cached))
        gap = np.abs(ours - theirs)
        allowed = np.maximum(PAIR_NATS, TOKEN_NATS * lengths)
        gaps |= {f"reference_{half}_worst": float(gap.max()), f"reference_{half}_per_token": float((gap / lengths).mean())}
        # NaN counts as the largest difference.
        excess.append(np.nan_to_num(gap / allowed, nan=np.inf))
        values.append((ours, theirs))
    per_token = sum(gaps[f"reference_{half}_per_token"] for half in ("chosen", "rejected"))
    worst = np.stack(excess)
    equal = worst.max() <= 1 if exact else per_token <= BFLOAT16_TOKEN_NATS
    gaps["reference_per_token"] = per_token
    if equal:
        return [], gaps
    side, row = np.unravel_index(worst.argmax(), worst.shape)
    wrong = int((worst > 1).any(0).sum())
    told = f"{wrong} pairs differ" if exact else f"pairs differ by {per_token:.2g} nats a token on average"
    return [
        f"the reference's log-probs are not the same: {told}; of pair {measured.names[row]} the "
        f"{('chosen', 'rejected')[side]} completion has {values[side][0][row]:.6g} with raydpo and "
        f"{values[side][1][row]:.6g} with TRL"
    ], gaps


def fastest(tried: Sequence[Result], warmup: int) -> Result:
    """The process with the shortest median step, of several that did the same work at different batch sizes.

    Its reference pass is replaced by the shortest of all, since the batch size of that pass is a separate setting.
    """
    best = min(tried, key=lambda result: median(result.step_seconds[warmup:]))
    if best.reference_seconds is None:
        return best
    return replace(best, reference_seconds=min(result.reference_seconds for result in tried))


def median_ratio(theirs: Sequence[float], ours: Sequence[float], warmup: int) -> float:
    """Median over steps of TRL's seconds divided by ours. Paired: both sides have the same pairs in each step."""
    return median(other / mine for other, mine in zip(theirs[warmup:], ours[warmup:], strict=True))


def figures(measured: Measurement) -> dict[str, Any]:
    """Seconds, rates and memory of each side, not compared.

    Tokens are real tokens: each prompt token of a pair counts once, padding does not count. MFU uses the fewest operations
    that the pairs need (``Measurement.amount``), the same for each side: one forward pass to score, three times that to
    train, or twice with frozen weights (still three times for attention, which has no weights).
    """
    rows = range(len(measured.names))
    factors = (2.0, 3.0, 2.0) if measured.lora else (3.0, 3.0, 3.0)
    found: dict[str, Any] = {
        "reference_pass": {
            name: _rate(measured, rows, result.reference_seconds, FORWARD)
            for name, result in (("raydpo", measured.score), ("cached", measured.cached))
        },
        "train_step": {},
    }
    for name, result in measured.sides.items():
        counted = list(enumerate(result.step_seconds))[measured.warmup :]
        rates = [_rate(measured, measured.rows(step), seconds, factors) for step, seconds in counted]
        found["train_step"][name] = {
            key: None if rates[0][key] is None else median(rate[key] for rate in rates) for key in rates[0]
        }
    found["memory"] = {name: {"bytes": result.peak_bytes} for name, result in measured.sides.items()}
    scoring, training = measured.score.peak_bytes, measured.train.peak_bytes
    found["memory"]["raydpo"] = {"bytes": max(scoring, training), "scoring_bytes": scoring, "training_bytes": training}
    ours = measured.train.facts.get("largest_pass")
    found["memory_alike"] = {"raydpo": {"bytes": training, "largest_pass": ours}} | {
        name: {"bytes": near.peak_bytes, "largest_pass": near.facts["largest_pass"]}
        for name, tried in measured.tried.items()
        for near in [min(tried, key=lambda result: abs(math.log(result.facts["largest_pass"] / ours)))]
    }
    found["tried"] = {name: [_of_try(result, measured.warmup) for result in tried] for name, tried in measured.tried.items()}
    return found


def ratios(measured: Measurement) -> dict[str, dict[str, float | None]]:
    """How many times as fast raydpo is; for memory, raydpo's share of TRL's. None where TRL's side was skipped.

    Meaningful only if ``disagreements`` found none.
    """
    found = figures(measured)
    scoring = found["reference_pass"]

    def steps(other: Result | None) -> float | None:
        return None if other is None else median_ratio(other.step_seconds, measured.train.step_seconds, measured.warmup)

    def memory(part: str) -> dict[str, float | None]:
        taken = {side: each["bytes"] for side, each in found[part].items()}
        sides = (("ratio", "online"), ("ratio_vs_cached", "cached"))
        return {key: taken["raydpo"] / taken[side] if side in taken else None for key, side in sides}

    return {
        "reference_pass": {"ratio": scoring["cached"]["seconds"] / scoring["raydpo"]["seconds"]},
        "train_step": {"ratio_vs_cached": steps(measured.cached), "ratio_vs_online": steps(measured.online)},
        "memory": memory("memory"),
        "memory_alike": memory("memory_alike"),
    }


def _of_try(result: Result, warmup: int) -> dict[str, Any]:
    found = {key: result.facts[key] for key in ("pairs_per_pass", "forward_passes", "positions", "largest_pass")}
    found |= {"step_seconds": median(result.step_seconds[warmup:]), "reference_seconds": result.reference_seconds}
    return found | {"bytes": result.peak_bytes}


def _rate(measured: Measurement, rows: Sequence[int], seconds: float, factors: Sequence[float]) -> dict[str, float | None]:
    amount = measured.amount(rows)
    # In the tree layout the positions are the real tokens.
    return {
        "seconds": seconds,
        "pairs_per_second": len(rows) / seconds,
        "tokens_per_second": float(amount[0]) / seconds,
        "mfu": None if measured.peak is None else operations(amount, measured.model, factors) / seconds / measured.peak,
    }
