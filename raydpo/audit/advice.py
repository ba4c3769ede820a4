"""Plain advice from the figures of an audit: each with the figure that led to it and the setting that follows it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raydpo.config import LOSSES, BetaSchedule, ObjectiveConfig

__all__ = ["Advice", "advise", "length_normalised"]

LENGTH_RULE = 0.55
"""Accuracy of the length-only rule from which on length is worth a warning: DPO finds the cheapest feature that ranks the
data (Park et al. 2024, arXiv 2403.19159), and 5 points above a coin are cheap."""
LENGTH_RULE_STRONG = 0.6
FAR_SURPRISE = 3.0
"""Nats a token of the chosen answers, median: an instruct model's own answers lie below 1, human text it can follow between
1.5 and 2.5. Above 3 the answers are another kind of text than the model writes."""
SOME = 0.01
"""Share of pairs from which on a fault is worth a line."""
NOT_MUCH_TO_LEARN = 0.9


@dataclass(frozen=True)
class Advice:
    """One thing to do: what was found, why it matters, and the lines of configuration that do it, if there are any."""

    title: str
    found: str
    why: str
    setting: str | None = None


def advise(figures: dict[str, Any], objective: ObjectiveConfig | None = None) -> list[Advice]:
    """Advice for all pairs together, the most important first; empty if nothing stands out.

    Args:
        figures: of ``measure.figures``. objective: that the pairs are to be trained with; None = the default one.
    """
    objective = objective or ObjectiveConfig()
    found: list[Advice] = []
    pairs = figures["pairs"]
    length, reference, surprise = figures["length"], figures["reference"], figures["surprise"]
    rule, rule_low = length["rule_accuracy"]["share"], length["rule_accuracy"]["low"]
    if rule_low is not None and rule_low > 0.5 and rule >= LENGTH_RULE:
        strong = rule >= LENGTH_RULE_STRONG and not (isinstance(objective.loss, str) and objective.loss in LOSSES
                                                     and LOSSES[objective.loss].per_token)
        tokens = sum(figures["tokens"][side]["mean"] for side in ("chosen", "rejected")) / 2
        found.append(Advice(
            "Length-normalise" if strong else "Watch the length",
            f"'The {length['rule']} answer is better' is right for {rule:.1%} of the pairs (95 % interval from "
            f"{rule_low:.1%}); the chosen answer is longer in {length['chosen_longer']['share']:.1%}, by "
            f"{length['difference']['median']:+.0f} tokens in the median.",
            f"The cheapest thing to learn from these pairs is to write {length['rule']} answers." + (
                f" The loss per token takes that away. Its beta is that of sums, {objective.beta_text}, times the mean "
                f"length of an answer, {tokens:.0f} tokens." if strong else
                " Compare length/margin_correlation of the run with the correlation here."),
            f"train: {{loss: sigmoid_norm, beta: {length_normalised(objective.beta, tokens)}}}" if strong else None))
    chosen = surprise["chosen"]
    if chosen and chosen["median"] > FAR_SURPRISE:
        perplexity = surprise["chosen_perplexity"]
        found.append(Advice(
            "Fine-tune on the chosen answers first",
            f"The chosen answers cost the reference {chosen['median']:.2f} nats a token in the median, and "
            f"{math.log(perplexity):.2f} over all their tokens (perplexity {perplexity:.0f}).",
            "They are another kind of text than the model writes. DPO then mostly lowers the rejected ones, and the "
            "likelihood of the chosen falls with them; a supervised epoch on the chosen answers, as the new policy and "
            "reference, closes the gap."))
    even = figures["contradictory_evenly"]
    if even:
        found.append(Advice(
            "Remove contradictions",
            f"{even:,} of {pairs:,} pairs ({even / pairs:.1%}) say A over B as often as others say B over A.",
            "They cancel out and keep the loss up. Votes of which one side has more stay: the loss fits their share.",
            'data: {filter: "opposites != copies"}'))
    for kind, count, why, setting in (
            ("Remove copies", figures["duplicates"], "A pair that comes several times weighs several times, and may be held "
             "out and trained on at once. Votes that differ on a pair are no copies.",
             'data: {filter: "copy = 0 or contradictory"}'),
            ("Look at empty answers", max(figures["empty"].values()), "An answer of nothing but its end teaches to stop.",
             'data: {filter: "chosen_tokens > 1 and rejected_tokens > 1"}'),
            ("Cut less", max(figures["truncated"].values()), "A cut answer has no end: the policy learns answers that go "
             "on, and its length counts for less than it is.", "data: {max_length: ...}, or data: {truncation: drop}")):
        if count and count >= SOME * pairs:
            found.append(Advice(kind, f"{count:,} of {pairs:,} pairs ({count / pairs:.1%}).", why, setting))
    # By their sums short answers alone may be ranked right, so that of a token must be, too.
    by_sum, per_token = reference["right_by_sum"], reference["right_per_token"]
    if by_sum["low"] is not None and min(by_sum["low"], per_token["low"]) > NOT_MUCH_TO_LEARN:
        found.append(Advice(
            "Little is left to learn", f"The reference already ranks {by_sum['share']:.1%} of the pairs right, and "
            f"{per_token['share']:.1%} per token.",
            "Most pairs only push further what the model does already; the ones it ranks wrong are where it can learn.",
            f'data: {{filter: "ref_margin < {reference["margin"]["median"]:.0f}"}}'))
    far = reference["far"]
    if far["pairs"]:
        found.append(Advice(
            "Read the pairs that the reference ranks most wrongly",
            f"The lowest margin of the reference is {reference['margin']['least']:.0f} nats, the first percentile "
            f"{reference['margin']['p01']:.0f}.",
            "Far out there are broken, swapped and merely very long answers; the list below shows them. The filter leaves "
            f"out {far['pairs']:,} of {pairs:,} pairs.",
            f'data: {{filter: "ref_margin > {far["bound"]}"}}'))
    return found


def length_normalised(beta: float | BetaSchedule | Mapping[str, Any], tokens: float) -> str:
    """The beta of a loss per token that pulls as strongly as ``beta`` does on sums over answers of ``tokens``, as YAML: a
    beta multiplies nats, or nats a token."""
    if isinstance(beta, BetaSchedule):
        beta = beta.model_dump(mode="json")
    if isinstance(beta, Mapping):
        told = {key: value if isinstance(value, str) else length_normalised(value, tokens) for key, value in beta.items()}
        return "{" + ", ".join(f"{key}: {value}" for key, value in told.items()) + "}"
    return f"{float(f'{beta * tokens:.2g}'):g}"  # 100, not 1e+02
