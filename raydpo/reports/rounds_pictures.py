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

__all__ = ["frontier", "rounds_curves", "seconds_part"]

STAGES = {"sample": SERIES[0], "score": SERIES[1], "pair": SERIES[6], "train": SERIES[2], "measure": SERIES[3]}


def frontier(record: RoundsRecord) -> Picture | None:
    """Draw success against drift, a mark for each round; None if no drift is measured."""
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
    n = record.setting("rounds.measure.n")

    def both(key: str, error: str | None = None) -> list[Curve | None]:
        return [
            points(rows, f"eval_{key}", "held out", GOOD, error=error),
            points(rows, key, "training answers", BAD, dashed=True),
        ]

    weights = {reward.name: reward.weight for reward in record.rewards}
    names = list(dict.fromkeys(name for row in rows for name in row.get("eval_rewards") or ()))
    named = [{"round": row["round"]} | (row.get("eval_rewards") or {}) for row in rows]
    functions = [
        points(
            named,
            name,
            f"{name}, measured only" if weights.get(name) == 0 else name,
            SERIES[place % len(SERIES)],
            dashed=weights.get(name) == 0,
        )
        for place, name in enumerate(names)
    ]
    hits = [
        {"round": row["round"], "hits": (row.get("cache_hits") or 0) / row["wanted"]} for row in rows if row.get("wanted")
    ]
    failed = any((row.get("errors") or 0) + (row.get("eval_errors") or 0) for row in rows)
    shares = {"ylim": (-0.02, 1.02)}
    pictures = [
        _picture(
            "Success",
            "Held out: after the round, with bars of one standard error over prompts. Training answers: of the policy with "
            "which the round begins.",
            [
                *both("success", "eval_success_se"),
                points(rows, "eval_success_greedy", "held out, greedy", SERIES[2]),
                points(rows, "eval_any", f"held out, any of {n}", SERIES[3]),
            ],
            "share",
            **shares,
        ),
        _picture("Reward", "Mean weighted sum of the reward functions.", both("reward"), "reward"),
        _picture("Each reward function", "Mean over the held-out answers that it applies to.", functions, "value")
        if len(names) > 1
        else None,
        _picture(
            "Mixed prompts",
            "Share of the prompts of a round whose answers have different rewards. The others are tied and make no pair.",
            [points(rows, "mixed", "mixed", GOOD), points(rows, "any", "any answer succeeds", SERIES[3], dashed=True)],
            "share of prompts",
            **shares,
        ),
        _picture(
            "Pairs",
            "Pairs that the round trains on.",
            [
                points(rows, "pairs", "pairs", GOOD),
                points(rows, "replayed", "of them replayed", BAD) if any(row.get("replayed") for row in rows) else None,
            ],
            "pairs",
        ),
        _picture("Errors", "Answers on which a reward function failed.", both("errors"), "answers") if failed else None,
        _picture("Length", "Mean length of an answer, with the token that ends it.", both("tokens"), "tokens"),
        _picture("Cut answers", "Share of answers that reach max_tokens without an end.", both("cut"), "share", **shares),
        _picture(
            "Different answers",
            "Share of different answers to a prompt, mean over prompts.",
            both("distinct"),
            "share",
            **shares,
        ),
        _picture(
            "First token",
            "Entropy of the first token among the answers to a prompt, mean over prompts. 0: all begin alike.",
            both("entropy"),
            "nats",
        ),
        _picture(
            "Drift",
            "KL(policy || model), estimated on the policy's own held-out answers, with bars of one standard error.",
            [
                points(rows, "eval_drift_initial", "from the initial model", GOOD, error="eval_drift_initial_se"),
                points(rows, "eval_drift_previous", "from the round before", BAD, error="eval_drift_previous_se"),
            ],
            "nats an answer",
            level=0.0,
        ),
        _picture(
            "Log-ratios",
            "Log-prob under the policy minus the reference's, in the last step of the round. Rejected answers that sink "
            "without end are a sign of old pairs.",
            [
                points(rows, "chosen_log_ratio", "chosen", GOOD),
                points(rows, "rejected_log_ratio", "rejected", BAD),
            ],
            "nats",
            level=0.0,
        ),
        _picture(
            "Loss",
            "With the initial model as reference the first loss of a later round is not ln 2: the policy has moved already.",
            [points(rows, "first_loss", "first step", BAD), points(rows, "last_loss", "last step", GOOD)],
            "loss",
        ),
        _picture(
            "Found in the cache",
            "Share of the completions to score whose log-probs under the reference were in the cache. Fresh answers are "
            "not there, unless the policy repeats itself.",
            [points(hits, "hits", "hits", GOOD)],
            "share",
            **shares,
        ),
    ]
    return [picture for picture in pictures if picture is not None]


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
