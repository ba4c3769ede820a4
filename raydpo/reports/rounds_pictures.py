"""Pictures of on-policy rounds: success against drift, every figure over the rounds, and the seconds of each stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raydpo.pages.plot import BAD, GOOD, SERIES, Picture
from raydpo.reports.curves import Curve, bars_picture, curves_picture, points
from raydpo.reports.paths import Path, Spot, path_picture
from raydpo.reports.rounds_findings import starts, within
from raydpo.reports.tables import Row, Table, number
from raydpo.rundir.read_rounds import RoundsRecord

__all__ = ["cost_pictures", "rounds_curves", "seconds_part"]

STAGES = {"sample": SERIES[0], "score": SERIES[1], "pair": SERIES[6], "train": SERIES[2], "measure": SERIES[3]}
SHARES = {"ylim": (-0.02, 1.02)}
BOTH: tuple[tuple[str, str, str, dict[str, Any], str], ...] = (
    ("Reward", "reward", "reward", {}, "Mean weighted sum of the reward functions."),
    ("Length", "tokens", "tokens", {}, "Mean length of an answer, with the token that ends it."),
    ("Cut answers", "cut", "share", SHARES, "Share of answers that reach max_tokens without an end."),
    ("Different answers", "distinct", "share", SHARES, "Share of different answers to a prompt, mean over prompts."),
    ("First token", "entropy", "nats", {}, "Entropy of the first token among the answers to a prompt, mean over prompts."),
    ("Errors", "errors", "answers", {}, "Answers on which a reward function failed."),
)
"""(title, figure, label of the y axis, options of ``curves_picture``, caption) of figures of both kinds of answers."""
MIXED = "Share of the prompts of a round whose answers have different rewards. The others are tied and make no pair."
RATIOS = (
    "Log-prob under the policy minus the reference's, in the last step of the round. Rejected answers that sink further and "
    "further are a sign of old pairs."
)
LOSS = "With the initial model as reference, later rounds do not begin at ln 2: the policy has moved already."
CACHE = (
    "Share of the completions to score whose log-probs under the reference were in the cache. Fresh answers are not there, "
    "unless the policy repeats itself."
)
DUELS = (
    " A judge compares training answers with each other, and held-out ones with the initial model's: the two levels do not "
    "compare."
)


def cost_pictures(record: RoundsRecord) -> list[Picture]:
    """Draw success against drift, and both over the rounds. A picture without any value is left out."""
    rows, n = record.rounds, record.setting("rounds.measure.n")
    success = _picture(
        "Success",
        "Held out: after the round, with bars of one standard error over prompts. Training answers: of the policy with "
        f"which the round begins.{_duels(record)}",
        [
            *_both(rows, "success", "eval_success_se"),
            points(rows, "eval_success_greedy", "held out, greedy", SERIES[2]),
            points(rows, "eval_any", f"held out, any of {n}", SERIES[3]),
        ],
        "share",
        **SHARES,
    )
    drift = _picture(
        "Drift",
        "KL(policy || model), estimated on the policy's own held-out answers, with bars of one standard error.",
        [
            points(rows, "eval_drift_initial", "from the initial model", GOOD, error="eval_drift_initial_se"),
            points(rows, "eval_drift_previous", "from the round before", BAD, error="eval_drift_previous_se"),
        ],
        "nats an answer",
        level=0.0,
    )
    return [picture for picture in (_frontier(record), success, drift) if picture is not None]


def _frontier(record: RoundsRecord) -> Picture | None:
    spots = [
        Spot(
            row["eval_drift_initial"],
            row["eval_success"],
            row.get("eval_drift_initial_se"),
            row.get("eval_success_se"),
            f"{row['round']}",
            f"round {row['round']}: success {within(row['eval_success'], row.get('eval_success_se'), '.3f')}, drift "
            f"{within(row['eval_drift_initial'], row.get('eval_drift_initial_se'))} nats an answer",
            f"round-{row['round']}",
        )
        for row in record.rounds
        if row.get("eval_success") is not None and row.get("eval_drift_initial") is not None
    ]
    caption = "The number at a mark is its round, 0 the start. Up and to the left is better: more success for less drift."
    path = Path(record.name, GOOD, False, spots)
    return path_picture("Success and drift", caption, [path], "drift from initial, nats an answer", "held-out success")


def rounds_curves(record: RoundsRecord) -> list[Picture]:
    """Draw the figures over the rounds. A picture without any value is left out."""
    rows = record.rounds
    mixed = [points(rows, "mixed", "mixed", GOOD), points(rows, "any", "with a success", SERIES[3], dashed=True)]
    replayed = any(row.get("replayed") for row in rows)
    pairs = [points(rows, "pairs", "pairs", GOOD), points(rows, "replayed", "replayed", BAD) if replayed else None]
    wanted = [row | {"hits": (row.get("cache_hits") or 0) / row["wanted"]} for row in rows if row.get("wanted")]
    sides = [points(rows, f"{side}_log_ratio", side, colour) for side, colour in (("chosen", GOOD), ("rejected", BAD))]
    losses = [points(rows, f"{at}_loss", f"{at} step", colour) for at, colour in (("first", BAD), ("last", GOOD))]
    pictures = [
        *(
            _picture(title, caption + (_duels(record) if key == "reward" else ""), _both(rows, key), ylabel, **more)
            for title, key, ylabel, more, caption in BOTH
            if key != "errors" or any((row.get("errors") or 0) + (row.get("eval_errors") or 0) for row in rows)
        ),
        _picture("Each reward function", "Mean over the held-out answers that it applies to.", _functions(record), "value"),
        _picture("Mixed prompts", MIXED, mixed, "share of prompts", **SHARES),
        _picture("Pairs", "Pairs that the round trains on, with those of earlier rounds.", pairs, "pairs"),
        _picture("Log-ratios", RATIOS, sides, "nats", level=0.0),
        _picture("Loss", LOSS, losses, "loss"),
        _picture("Found in the cache", CACHE, [points(wanted, "hits", "hits", GOOD)], "share", **SHARES),
    ]
    return [picture for picture in pictures if picture is not None]


def _duels(record: RoundsRecord) -> str:
    """What to say of rewards if a judge's duels are part of them."""
    return DUELS if any(one.duels and one.weight for one in record.rewards) else ""


def _functions(record: RoundsRecord) -> list[Curve | None]:
    """Curves of the reward functions on held-out answers; none if there is one function, which is the reward."""
    unused = {reward.name for reward in record.rewards if reward.weight == 0}
    rows = [{"round": row["round"]} | (row.get("eval_rewards") or {}) for row in record.rounds]
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name != "round"]
    return [
        points(
            rows,
            name,
            f"{name}, measured only" if name in unused else name,
            SERIES[place % len(SERIES)],
            dashed=name in unused,
        )
        for place, name in enumerate(names)
        if len(names) > 1
    ]


def _both(rows: Sequence[dict[str, Any]], key: str, error: str | None = None) -> list[Curve | None]:
    """Curves of a figure of held-out answers and of training answers."""
    return [
        points(rows, f"eval_{key}", "held out", GOOD, error=error),
        points(rows, key, "training answers", BAD, dashed=True),
    ]


def _picture(title: str, caption: str, curves: Sequence[Curve | None], ylabel: str, **options: Any) -> Picture | None:
    return curves_picture(title, caption, curves, ylabel, unit="round", **options)


def seconds_part(record: RoundsRecord) -> dict[str, Any] | None:
    """Seconds of each stage, as a table and as bars, and a sentence about starts."""
    rows = [{"round": row["round"]} | (row.get("seconds") or {}) for row in record.rounds]
    stages = [*STAGES, *dict.fromkeys(name for row in rows for name in row if name not in STAGES and name != "round")]
    stages = [name for name in stages if any(row.get(name) is not None for row in rows)]
    if not stages:
        return None
    colours = STAGES | {name: SERIES[4] for name in stages if name not in STAGES}
    heads = [Row(f"round {row['round']}", [number(row.get(name), ",.1f") for name in stages]) for row in rows]
    table = Table("Seconds", ("", *stages), heads)
    curves = [points(rows, name, name, colours[name]) for name in stages]
    lost, total = starts(record)
    told = None
    if total:
        told = (
            f"{lost / total:.0%} of the time of the rounds went into training stages that did not train: starts of "
            "processes, loading of models, and the reference's log-probs."
        )
    picture = bars_picture("Time of a round", "Seconds of each stage, stacked.", curves, "seconds", "round")
    return {"table": table, "picture": picture, "starts": told}
