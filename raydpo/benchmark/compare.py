"""Compare what both sides measured: whether their numbers agree, how much faster one was, and what was not measured but
extrapolated. All functions are pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Literal

import numpy as np

from raydpo.benchmark.job import Result

__all__ = ["Measured", "Seconds", "best_tries", "disagreements", "figures", "paired_ratio", "whole"]

PAIR_NATS, TOKEN_NATS = 1e-3, 1e-5
"""float32: the log-probs of a completion may differ by the first number (nats), or by the second times the tokens of its
pair, whichever is larger. Rounding was a tenth of the first with a trained model of 30 layers."""
LOSS, LATER_LOSS = 1e-5, 1e-4
"""float32: tolerances of the first loss and of later losses. Rounding was 1e-8 and 1e-6 in ten steps."""
BFLOAT16_TOKEN_NATS = 0.05
"""bfloat16: mean difference allowed over the pairs, in nats a token."""
BFLOAT16_LOSS = 0.02
"""bfloat16: tolerance of the first loss. Later losses are not compared, since the weights round differently by then."""
WARMUP = 1
"""First steps of a training that no rate counts."""


@dataclass(kw_only=True)
class Measured:
    """One process or command that was measured.

    Attributes:
        side: ``raydpo``: a command as typed, with Ray. ``kernel``: raydpo's scoring and steps without Ray. ``trl``.
        what: score, train, run or sweep; TRL's ``try`` of a batch size, ``run``, and its run ``again`` with another beta.
        pairs, order: its workload.
        steps: optimizer steps of the whole job. ``result`` has fewer if only the first ones were taken.
        seconds: wall clock of the process, from start to end.
        tree_bytes: most memory of the process and all that it started (``watch.Watched``).
        load: load average of the machine when it began.
        trials: the trainings of a sweep, the first with the beta of all other trainings, the second with that of ``again``.
    """

    side: Literal["raydpo", "kernel", "trl"]
    what: str
    pairs: int
    order: str
    steps: int
    pairs_per_step: int
    command: str
    date: str
    seconds: float
    tree_bytes: int
    load: float
    result: Result
    trials: list[Result] = field(default_factory=list)

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Measured:
        """Read it from JSON."""
        results = {"result": Result(**stored["result"]), "trials": [Result(**each) for each in stored["trials"]]}
        return cls(**(dict(stored) | results))

    @property
    def key(self) -> str:
        """Its name in the file of results. A measurement of the same name replaces it."""
        facts = self.result.facts
        batch = f" {facts['batch']}{' recomputed' if facts['recompute'] else ''}" if self.what == "try" else ""
        return f"{self.side} {self.what}{batch}, {self.pairs} pairs, {self.order}"


@dataclass(frozen=True)
class Seconds:
    """A time, and the number of steps that were not measured but extrapolated for it."""

    seconds: float
    extrapolated: int = 0


def whole(measured: Measured, workload: Mapping[str, Any]) -> Seconds:
    """Wall clock of the whole job. Start-up and the first steps are measured; each further step, and TRL's reference pass
    over its pairs, takes time in proportion to its token positions: padded ones on TRL's side.

    Args:
        workload: ``Workload.statistics``.
    """
    facts, one = measured.result.facts, measured.pairs_per_step
    trainings = measured.trials or [measured.result]
    if not trainings[0].step_seconds:
        return Seconds(measured.seconds)
    taken = len(trainings[0].step_seconds)
    if taken >= measured.steps:
        return Seconds(measured.seconds)
    if measured.side == "trl":
        amounts = _padded(workload["widths"], facts["batch"])
        scored = _padded(workload["widths"], facts["reference_batch"])
        reference = measured.result.reference_seconds or 0.0
        more = reference * scored[taken * one :].sum() / scored[: taken * one].sum()
    else:
        amounts, more = np.array(workload["tokens"], float), 0.0
    skip = WARMUP if taken > WARMUP else 0
    # Trials of a sweep train in rounds of so many at a time; the last round may be smaller, but it takes as long.
    rounds = -(-len(trainings) // facts.get("at_once", 1))
    a_training = sum(sum(each.step_seconds[skip:]) for each in trainings) / len(trainings)
    more += rounds * a_training * amounts[taken * one :].sum() / amounts[skip * one : taken * one].sum()
    return Seconds(measured.seconds + float(more), (measured.steps - taken) * len(trainings))


def _padded(widths: Sequence[int], batch: int) -> np.ndarray:
    """Positions that TRL computes for each pair, if ``batch`` pairs share a forward pass; float [pairs]."""
    return np.array([2 * max(widths[i - i % batch : i - i % batch + batch]) for i in range(len(widths))], float)


def disagreements(one: Measured, other: Measured, workload: Mapping[str, Any], *, exact: bool) -> list[str]:
    """Compare the reference's log-probs, where both have them, the policy's in the first step, and the losses: of all steps
    that both took in float32 (``exact``), of the first step in bfloat16.

    Returns:
        One sentence for each difference larger than rounding.
    """
    names = [f"{each.side} ({each.what})" for each in (one, other)]
    tokens = np.array(workload["tokens"], float)
    problems = _reference_problems(one.result, other.result, names, tokens, exact)
    here, there = ((each.trials or [each.result])[0] for each in (one, other))
    if not here.losses or not there.losses:
        return problems
    first = tokens[: one.pairs_per_step]
    allowed = max(PAIR_NATS, TOKEN_NATS * first.max()) if exact else BFLOAT16_TOKEN_NATS * first.mean()
    for half in ("chosen", "rejected"):
        mine, theirs = (getattr(each, f"{half}_logps")[0] for each in (here, there))
        if not abs(mine - theirs) <= allowed:
            problems.append(
                f"the policy's log-probs of the {half} completions of the first step are {mine:.6g} on average with "
                f"{names[0]} and {theirs:.6g} with {names[1]} (tolerance {allowed:.2g})"
            )
    pairs = list(zip(here.losses, there.losses, strict=False))
    for number, (mine, theirs) in enumerate(pairs if exact else pairs[:1]):
        allowed = BFLOAT16_LOSS if not exact else LATER_LOSS if number else LOSS
        if not abs(mine - theirs) <= allowed:
            problems.append(
                f"the loss of step {number + 1} is {mine:.6g} with {names[0]} and {theirs:.6g} with {names[1]} "
                f"(tolerance {allowed:g})"
            )
            break
    return problems


def _reference_problems(one: Result, other: Result, names: Sequence[str], tokens: np.ndarray, exact: bool) -> list[str]:
    if one.ref_chosen is None or other.ref_chosen is None:
        return []
    count = min(len(one.ref_chosen), len(other.ref_chosen))
    tokens = tokens[:count]
    for half in ("chosen", "rejected"):
        mine, theirs = (np.array(getattr(each, f"ref_{half}")[:count]) for each in (one, other))
        gap = np.nan_to_num(np.abs(mine - theirs), nan=np.inf)
        allowed = np.maximum(PAIR_NATS, TOKEN_NATS * tokens)
        wrong = gap > allowed
        if wrong.any() if exact else float((gap / tokens).mean()) > BFLOAT16_TOKEN_NATS:
            row = int((gap / allowed).argmax())
            return [
                f"the reference's log-probs of {int(wrong.sum())} {half} completions differ; that of pair {row + 1} is "
                f"{mine[row]:.6g} with {names[0]} and {theirs[row]:.6g} with {names[1]}"
            ]
    return []


def best_tries(tried: Iterable[Measured]) -> tuple[Measured, Measured]:
    """TRL's fastest settings: the try with the shortest median step, and the one with the shortest reference pass."""
    tried = list(tried)
    return min(tried, key=_median_step), min(tried, key=lambda each: each.result.reference_seconds or math.inf)


def _median_step(measured: Measured) -> float:
    return _median((measured.trials or [measured.result])[0].step_seconds)


def _median(seconds: Sequence[float]) -> float:
    return median(seconds[WARMUP:] or seconds)


def paired_ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Median over the steps that both took of their seconds divided by ours. Both have the same pairs in each step."""
    return _median([other / mine for other, mine in zip(theirs, ours, strict=False)])


def figures(found: Mapping[str, Measured], workloads: Mapping[str, Mapping[str, Any]], *, exact: bool) -> dict[str, Any]:
    """Everything that the measurements say: step, reference pass, job and sweep of each side by workload, TRL's tries and
    the memory. Where sides do not compute the same, ``problems`` says so, and their workload has no ratios."""
    points, problems = [], []
    for name, workload in workloads.items():
        here = {each.key.split(",")[0]: each for each in found.values() if f"{each.pairs} pairs, {each.order}" == name}
        base = here.get("raydpo train") or here.get("raydpo run")
        wrong = [
            f"{name}: {problem}"
            for one, other in _to_compare(here, base)
            for problem in disagreements(one, other, workload, exact=exact)
        ]
        points.append(
            {"workload": name, "pairs": workload["pairs"], "order": workload["order"]} | _point(here, workload, not wrong)
        )
        problems += wrong
    tried = [each for each in found.values() if each.what == "try"]
    return {"points": points, "tried": _tried(tried), "memory": _memory(found, tried, not problems), "problems": problems}


def _to_compare(here: Mapping[str, Measured], base: Measured | None) -> list[tuple[Measured, Measured]]:
    """Pairs of measurements that must agree: every one with ``base``, the kernel's reference pass with TRL's, and the second
    trial of a sweep with TRL's run of the same beta."""
    pairs = [] if base is None else [(base, each) for each in here.values() if each is not base and each.what != "again"]
    if "kernel score" in here:
        pairs += [(here["kernel score"], each) for each in here.values() if each.side == "trl" and each.result.ref_chosen]
    if {"raydpo sweep", "trl again"} <= here.keys():
        sweep = here["raydpo sweep"]
        pairs.append((replace(sweep, trials=sweep.trials[1:]), here["trl again"]))
    return pairs


def _point(here: Mapping[str, Measured], workload: Mapping[str, Any], equal: bool) -> dict[str, Any]:
    """Figures of one workload: seconds of each side, and ratios: how many times as fast as TRL raydpo is (``ratio``), and
    how long it takes relative to its kernel (``over_kernel``)."""
    found: dict[str, Any] = {part: {} for part in ("step", "reference", "job", "sweep", "commands")}
    steps = {side: next((here[name] for name in names if name in here), None) for side, names in _STEPS.items()}
    seconds = {side: each.result.step_seconds for side, each in steps.items() if each is not None}
    found["step"] = {side: vars(Seconds(_median(each))) for side, each in seconds.items()}
    for side, names in _SCORED.items():
        each = next((here[name] for name in names if name in here and here[name].result.reference_seconds), None)
        if each is not None:
            found["reference"][side] = vars(_reference(each.result, workload))
    for verb in ("score", "train", "train again", "run", "sweep"):
        if f"raydpo {verb}" in here:
            each = here[f"raydpo {verb}"]
            told = {name: each.result.facts.get(name, {}) for name in ("phases", "startup_seconds")}
            found["commands"][verb] = vars(whole(each, workload)) | told
    first, again = here.get("trl run"), here.get("trl again")
    for part, verb, theirs in (("job", "run", [first]), ("sweep", "sweep", [first, *[again] * 4])):
        if verb in found["commands"]:
            found[part]["raydpo"] = found["commands"][verb]
        if first is not None and None not in theirs:
            times = [whole(each, workload) for each in theirs if each is not None]
            total = Seconds(sum(each.seconds for each in times), sum(each.extrapolated for each in times))
            found[part]["trl"] = vars(total) | {"measured_steps": len(first.result.step_seconds)}
    for part in ("step", "reference", "job", "sweep"):
        if equal and {"raydpo", "trl"} <= found[part].keys():
            found[part]["ratio"] = found[part]["trl"]["seconds"] / found[part]["raydpo"]["seconds"]
    if "ratio" in found["step"]:
        found["step"]["ratio"] = paired_ratio(seconds["trl"], seconds["raydpo"])
    if {"raydpo", "kernel"} <= seconds.keys():
        found["step"]["over_kernel"] = paired_ratio(seconds["raydpo"], seconds["kernel"])
    if first and again:
        spent = [each.result.reference_seconds or 0.0 for each in (first, again)]
        found["sweep"]["trl_reuses_reference"] = spent[1] < 0.1 * spent[0]
    return found


_STEPS = {"raydpo": ("raydpo train", "raydpo run"), "kernel": ("kernel train",), "trl": ("trl run",)}
_SCORED = {"raydpo": ("raydpo score", "raydpo run"), "kernel": ("kernel score",), "trl": ("trl run",)}


def _reference(result: Result, workload: Mapping[str, Any]) -> Seconds:
    """Seconds of a reference pass over all pairs. TRL may have scored only the first ones."""
    widths = _padded(workload["widths"], result.facts.get("reference_batch", 1))
    scored = len(result.ref_chosen or widths)
    return Seconds((result.reference_seconds or 0.0) * float(widths.sum() / widths[:scored].sum()), len(widths) - scored)


def _tried(tried: Sequence[Measured]) -> list[dict[str, Any]]:
    rows = []
    for each in tried:
        result = each.result
        row = {name: result.facts[name] for name in ("batch", "recompute", "forward_passes", "positions", "largest_pass")}
        row |= {"accumulate": each.pairs_per_step // row["batch"], "steps": len(result.step_seconds)}
        row |= {"step_seconds": _median_step(each), "reference_seconds": result.reference_seconds}
        rows.append(row | {"pairs": len(result.ref_chosen or ())} | _bytes(each))
    return rows


def _memory(found: Mapping[str, Measured], tried: Sequence[Measured], equal: bool) -> list[dict[str, Any]]:
    """Memory of ``raydpo train`` beside TRL's try with positions of a pass nearest to ours, and beside TRL's fastest; each
    side says what it ran."""
    ours = next((each for each in found.values() if (each.side, each.what) == ("raydpo", "train")), None)
    if ours is None or not tried or "largest_pass" not in ours.result.facts:
        return []
    largest = ours.result.facts["largest_pass"]
    plain = [each for each in tried if not each.result.facts["recompute"]]
    near = min(plain, key=lambda each: abs(math.log(each.result.facts["largest_pass"] / largest)))
    rows = []
    for title, theirs in (("positions a pass alike", near), ("each at its fastest", best_tries(tried)[0])):
        row: dict[str, Any] = {"compared": title, "raydpo": _bytes(ours) | {"largest_pass": largest, "recompute": False}}
        row["trl"] = _tried([theirs])[0]
        if equal:
            row |= {f"share_{name}": row["raydpo"][name] / row["trl"][name] for name in _bytes(ours) if row["trl"][name]}
        rows.append(row)
    return rows


def _bytes(measured: Measured) -> dict[str, float]:
    return {"tree_bytes": measured.tree_bytes, "peak_bytes": measured.result.peak_bytes}
