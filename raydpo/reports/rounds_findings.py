"""Finds faults of on-policy training in the records of rounds, and says what to do about them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from raydpo.errors import one_line
from raydpo.pages.finding import Finding
from raydpo.pages.text import shown
from raydpo.rundir.read_rounds import RoundsRecord
from raydpo.rundir.rounds import GREEDY

__all__ = ["rounds_findings", "starts", "within"]

LENGTH_CHANGE = 0.25
"""Change of the mean length of held-out answers, a share, from which it is reported."""
ALIKE = 0.5
"""Share of the start's distinct answers: what is left of them is reported from here down."""
ALL_ALIKE = 0.3
"""Share of distinct answers of a prompt that is reported if it was higher at the start."""
FAR = 10.0
"""Drift from the initial model, nats an answer, above which it is reported. At 10 the policy gives its answers about 22,000
times (e^10) the probability that the initial model gives them."""
ERRORS = 2.0
"""Number of standard errors of a difference that chance does not explain."""
GAP = 0.1
"""Rise of the success on training prompts from which a lack of it on held-out prompts is reported."""
MIXED = 0.2
"""Share of the prompts of a round with answers of different reward, below which it is reported."""
CUT, CUT_ROSE = 0.1, 0.05
"""Share of cut held-out answers, and its rise since the start, above which both together are reported."""
MANY_CUT = 0.5
"""Share of cut held-out answers above which it is reported also without a rise."""
STARTS = 0.2
"""Share of the time that starts of processes and the like may take."""


def rounds_findings(record: RoundsRecord) -> list[Finding]:
    """Return what stands out, the most important first."""
    return [
        *_unsafe(record),
        *_hacking(record),
        *_memorised(record),
        *_answers(record),
        *_drift(record),
        *_errors(record),
        *_ties(record),
        *_cache(record),
        *_time(record),
    ]


def within(value: float, error: float | None, form: str = ".2f") -> str:
    """Format a value and its standard error, if it is known: ``0.84 ± 0.05``."""
    return f"{value:z{form}}" if error is None else f"{value:z{form}} ± {error:{form}}"


def starts(record: RoundsRecord) -> tuple[float, float]:
    """Return the seconds of the training stages outside of training, and the seconds of all stages, over all rounds whose
    training has finished. The first are those in which processes start, models load, and the reference scores."""
    lost = total = 0.0
    for row in record.trained:
        seconds = {stage: value for stage, value in (row.get("seconds") or {}).items() if value is not None}
        trained = (record.training(row["round"]) or {}).get("train_seconds")
        if trained is not None and "train" in seconds:
            lost += max(0.0, seconds["train"] - trained)
            total += sum(seconds.values())
    return lost, total


def _ends(record: RoundsRecord, *keys: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the rows of the first and of the last measurement that have all of ``keys``; None if there are not two."""
    rows = [row for row in record.rounds if all(row.get(key) is not None for key in keys)]
    return (rows[0], rows[-1]) if len(rows) > 1 else None


def _before(row: dict[str, Any]) -> str:
    return "before training" if row["round"] == 0 else f"after round {row['round']}"


def _unsafe(record: RoundsRecord) -> Iterator[Finding]:
    names = [reward.name for reward in record.rewards if reward.unsafe]
    if names:
        yield Finding(
            "Answers run without a sandbox",
            f"The reward {', '.join(names)} runs programs that the model wrote with the rights of the user (unsafe: true).",
            "Install bubblewrap, allow user namespaces, and drop unsafe.",
        )


def _hacking(record: RoundsRecord) -> Iterator[Finding]:
    """Find figures of held-out answers that fell, by more than chance explains, while what is trained on rose."""
    ends, rose = _ends(record, "eval_success"), _rise(record)
    if ends is None or rose is None:
        return
    first, last = ends
    fell = []
    rows = [(row["eval_success"], row.get("eval_success_se") or 0.0) for row in (first, last)]
    if rows[0][0] - rows[1][0] > ERRORS * math.hypot(rows[0][1], rows[1][1]):
        fell.append(f"success fell from {within(*rows[0])} to {within(*rows[1])}")
    for reward in record.rewards:
        if reward.weight == 0:
            found = _fall(record, reward.name, first["round"], last["round"])
            if found is not None:
                fell.append(f"{reward.name}, which is measured only, fell from {found[0]:.2f} to {found[1]:.2f}")
    if fell:
        yield Finding(
            "Reward hacking",
            f"{rose}, but on held-out prompts {' and '.join(fell)}.",
            "The policy learns what the reward functions pay for, not what they should measure. Read the answers below. "
            "Then repair what gives the reward that rose, or give a weight to what fell.",
        )


def _rise(record: RoundsRecord) -> str | None:
    """Tell of a rise of what is trained on; None if it did not rise. That is the reward of training answers. Duels among
    them have the mean 0.5 in every round, so where only duels count it is the win rate against the initial model."""
    key = "eval_success" if record.only_duels else "reward"
    rows = [row for row in (record.rounds if record.only_duels else record.trained) if row.get(key) is not None]
    if len(rows) < 2 or rows[-1][key] <= rows[0][key]:
        return None
    if record.only_duels:
        return f"The win rate rose from {rows[0][key]:.2f} {_before(rows[0])} to {rows[-1][key]:.2f} {_before(rows[-1])}"
    return (
        f"The reward of the training answers rose from {rows[0][key]:.2f} in round {rows[0]['round']} to "
        f"{rows[-1][key]:.2f} in round {rows[-1]['round']}"
    )


def _fall(record: RoundsRecord, name: str, first: int, last: int) -> tuple[float, float] | None:
    """Return the mean of a reward function over held-out prompts after two rounds if it fell by more than chance explains:
    by ``ERRORS`` standard errors of the difference over prompts."""
    means = [_by_prompt(record, name, number) for number in (first, last)]
    common = sorted(set(means[0]) & set(means[1]))
    if len(common) < 2:
        return None
    values = np.array([[each[prompt] for prompt in common] for each in means])
    rose = values[1] - values[0]
    if -rose.mean() <= ERRORS * rose.std(ddof=1) / math.sqrt(len(common)):
        return None
    return float(values[0].mean()), float(values[1].mean())


def _by_prompt(record: RoundsRecord, name: str, number: int) -> dict[bytes, float]:
    """Mean of a reward function over the sampled answers to each held-out prompt after a round."""
    table = record.held_out(number)
    values = defaultdict(list)
    for row in [] if table is None else table.select(["prompt_id", "sample", "parts"]).to_pylist():
        value = dict(row["parts"] or ()).get(name)
        if row["sample"] != GREEDY and value is not None and math.isfinite(value):
            values[row["prompt_id"]].append(value)
    return {prompt: sum(each) / len(each) for prompt, each in values.items()}


def _memorised(record: RoundsRecord) -> Iterator[Finding]:
    trained = [row for row in record.trained if row.get("success") is not None]
    ends = _ends(record, "eval_success")
    if ends is None or len(trained) < 2:
        return
    first, last = ends
    learnt, rose = trained[-1]["success"] - trained[0]["success"], last["eval_success"] - first["eval_success"]
    error = ERRORS * math.hypot(*(row.get("eval_success_se") or 0.0 for row in ends))
    if learnt >= GAP and -error <= rose <= error < learnt - rose:  # a fall is told as reward hacking
        yield Finding(
            "Better on training prompts only",
            f"The success of training answers rose from {trained[0]['success']:.2f} in round {trained[0]['round']} to "
            f"{trained[-1]['success']:.2f} in round {trained[-1]['round']}, but on held-out prompts it is "
            f"{within(last['eval_success'], last.get('eval_success_se'))} after round {last['round']} and was "
            f"{within(first['eval_success'], first.get('eval_success_se'))} {_before(first)}.",
            "The policy memorises answers. Add prompts, lower train.steps, or raise train.beta.",
        )


def _answers(record: RoundsRecord) -> Iterator[Finding]:
    if ends := _ends(record, "eval_tokens"):
        first, last = ends
        change = last["eval_tokens"] / first["eval_tokens"] - 1 if first["eval_tokens"] else 0.0
        if abs(change) >= LENGTH_CHANGE:
            shorter = change < 0
            yield Finding(
                f"Answers have become {'shorter' if shorter else 'longer'}",
                f"Held-out answers have {last['eval_tokens']:.1f} tokens on average after round {last['round']}, and had "
                f"{first['eval_tokens']:.1f} {_before(first)} ({change:+.0%}).",
                f"A reward may pay for {'leaving things out' if shorter else 'length'}. Read the answers below; if the "
                "change is not wanted, add a reward function that counts it, or train fewer steps.",
            )
    if ends := _ends(record, "eval_distinct"):
        first, last = ends
        was, now = first["eval_distinct"], last["eval_distinct"]
        if now <= ALIKE * was or now < ALL_ALIKE <= was:
            yield Finding(
                "Answers have become alike",
                f"Of the answers sampled to one held-out prompt {now:.0%} are different after round {last['round']}; "
                f"{_before(first)} {was:.0%} were.",
                "That is right where a prompt has one good answer. Elsewhere raise train.beta, or train fewer steps or "
                "rounds: equal answers make no pairs.",
            )
    if ends := _ends(record, "eval_cut"):
        first, last = ends
        rose = last["eval_cut"] - first["eval_cut"] > CUT_ROSE
        if (last["eval_cut"] > CUT and rose) or last["eval_cut"] > MANY_CUT:
            yield Finding(
                "More answers are cut" if rose else "Most answers are cut",
                f"{last['eval_cut']:.0%} of the held-out answers reach rounds.sample.max_tokens "
                f"({record.setting('rounds.sample.max_tokens')}) without an end after round {last['round']}; "
                f"{_before(first)} {first['eval_cut']:.0%} did.",
                "Raise rounds.sample.max_tokens."
                + (
                    ""
                    if record.setting("rounds.cut") == "zero"
                    else " If answers only ramble, set rounds.cut to zero, so that a cut answer has a reward of at most 0."
                ),
            )


def _drift(record: RoundsRecord) -> Iterator[Finding]:
    rows = [row for row in record.rounds if row.get("eval_drift_initial") is not None]
    if rows and rows[-1]["eval_drift_initial"] > FAR:
        last = rows[-1]
        moving = record.setting("rounds.reference") not in (None, "initial")
        yield Finding(
            "Far from the initial model",
            f"After round {last['round']} the drift is "
            f"{within(last['eval_drift_initial'], last.get('eval_drift_initial_se'), '.1f')} nats an answer.",
            "Raise train.beta, lower train.lr or train.steps, or end the rounds in time with rounds.stop.drift."
            + (" With rounds.reference initial, beta also bounds the drift of all rounds together." if moving else ""),
        )


def _errors(record: RoundsRecord) -> Iterator[Finding]:
    counts = {
        name: [(record.sampled(row, name) or 0) + (row.get(f"eval_{name}") or 0) for row in record.rounds]
        for name in ("errors", "answers")
    }
    greedy = [row.get("eval_prompts") or 0 for row in record.rounds if row.get("eval_success_greedy") is not None]
    failed = [row for row, count in zip(record.rounds, counts["errors"], strict=True) if count]
    if not failed:
        return
    count, of = sum(counts["errors"]), sum(counts["answers"]) + sum(greedy)
    first = next((line for row in failed for line in record.errors(row["round"])), None)
    yield Finding(
        "Reward functions failed",
        f"On {count:,} of {of:,} answers a reward function failed, first in round {failed[0]['round']}"
        + (f": {shown(one_line(first, 300))}" if first else "."),
        "A reward that failed is unknown and not 0. Repair the function; 'raydpo rounds try' runs it on a few answers.",
    )


def _ties(record: RoundsRecord) -> Iterator[Finding]:
    rows = [row for row in record.trained if row.get("mixed") is not None]
    if rows and rows[-1]["mixed"] < MIXED:
        last = rows[-1]
        easy = (last.get("success") or 0.0) > 0.5
        pairs = None if last.get("pairs") is None else last["pairs"] - (last.get("replayed") or 0)
        yield Finding(
            "Few prompts teach anything",
            f"In round {last['round']} the answers to {last['mixed']:.0%} of the prompts had different rewards"
            + ("." if pairs is None else f", which made {pairs:,} pairs."),
            "Answers of equal reward make no pair. "
            + (
                f"{last['success']:.0%} of the answers succeed: use harder prompts, or stop."
                if easy
                else "Raise rounds.sample.n, use easier prompts, or a reward with more than two values."
            ),
        )


def _cache(record: RoundsRecord) -> Iterator[Finding]:
    """Rounds on the answers of the first one, with one reference, need nothing that the first did not score."""
    if not record.setting("rounds.offline") or record.setting("rounds.reference") != "initial":
        return
    missed = [
        row
        for row in record.trained[1:]
        if row.get("wanted") and row.get("cache_hits") is not None and row["cache_hits"] < row["wanted"]
    ]
    if missed:
        yield Finding(
            "The reference scored answers again",
            f"Round {missed[0]['round']} trains on the answers of round 1, but the cache held "
            f"{missed[0]['cache_hits']:,} of {missed[0]['wanted']:,} completions.",
            "Keep cache.uri and the files of the reference in place between rounds.",
        )


def _time(record: RoundsRecord) -> Iterator[Finding]:
    lost, total = starts(record)
    if total and lost > STARTS * total:
        yield Finding(
            "Starts take long",
            f"{lost / total:.0%} of the time of the rounds after the start went into training stages that did not train: "
            "processes started, models were loaded, and the reference scored.",
            "Raise train.steps or rounds.per_round.",
        )
