"""Plain advice from the figures of an audit: each with the figure that led to it and the setting that follows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Advice", "advise"]

LENGTH_RULE = 0.55
"""Accuracy of the length-only rule from which on length is worth a warning: DPO finds the cheapest feature that ranks the
data
(Park et al. 2024, arXiv 2403.19159), and 5 points above a coin are cheap."""
LENGTH_RULE_STRONG = 0.6
FAR_SURPRISE = 3.0
"""Nats a token of the chosen answers, median: an instruct model's own answers lie below 1, human text it can follow between
1.5
and 2.5. Above 3 the answers are another kind of text than the model writes."""
SOME = 0.01
"""Share of pairs from which on a fault is worth a line."""
FAR_MARGIN_TOKENS = 1.5
NOT_MUCH_TO_LEARN = 0.9


@dataclass(frozen=True)
class Advice:
    """One thing to do: what was found, why it matters, and the lines of configuration that do it, if there are any."""

    title: str
    found: str
    why: str
    setting: str | None = None


def advise(figures: dict[str, Any]) -> list[Advice]:
    """Advice for all pairs together, the most important first; empty if nothing stands out."""
    found: list[Advice] = []
    pairs = figures["pairs"]
    length, reference, surprise = figures["length"], figures["reference"], figures["surprise"]
    rule, rule_low = length["rule_accuracy"]["share"], length["rule_accuracy"]["low"]
    if rule_low is not None and rule_low > 0.5 and rule >= LENGTH_RULE:
        strong = rule >= LENGTH_RULE_STRONG
        found.append(Advice(
            "Length-normalise" if strong else "Watch the length",
            f"'The {length['rule']} answer is better' is right for {rule:.1%} of the pairs (95 % interval from "
            f"{rule_low:.1%}); the "
            f"chosen answer is longer in {length['chosen_longer']['share']:.1%}, by {length['difference']['median']:+.0f} "
            "tokens "
            "in the median.",
            f"The cheapest thing to learn from these pairs is to write {length['rule']} answers." + (
                "" if strong else " Compare length/margin_correlation of the run with the correlation here."),
            "train: {loss: sigmoid_norm}" if strong else None))
    chosen = surprise["chosen"]
    if chosen and chosen["median"] > FAR_SURPRISE:
        found.append(Advice(
            "Fine-tune on the chosen answers first",
            f"The chosen answers cost the reference {chosen['median']:.2f} nats a token in the median (perplexity "
            f"{surprise['chosen_perplexity']:.0f}).",
            "They are another kind of text than the model writes. DPO then mostly lowers the rejected ones, and the "
            "likelihood of "
            "the chosen falls with them; a supervised epoch on the chosen answers, as the new policy and reference, closes "
            "the gap."))
    for kind, count, why, setting in (
            ("Remove contradictions", figures["contradictory"], "A over B and B over A cancel out and keep the loss up.",
             'data: {filter: "not contradictory"}'),
            ("Remove copies", figures["duplicates"], "A pair that comes several times weighs several times, and may be held "
                                                     "out and "
             "trained on at once.", 'data: {filter: "copy = 0"}'),
            ("Look at empty answers", max(figures["empty"].values()), "An answer of nothing but its end teaches to stop.",
             'data: {filter: "chosen_tokens > 1 and rejected_tokens > 1"}'),
            ("Cut less", max(figures["truncated"].values()), "A cut answer has no end: the policy learns answers that go "
                                                             "on, and its "
             "length counts for less than it is.", "data: {max_length: ...}, or data: {truncation: drop}")):
        if count and (count >= SOME * pairs or kind.startswith("Remove contra")):
            found.append(Advice(kind, f"{count:,} of {pairs:,} pairs ({count / pairs:.1%}).", why, setting))
    right = reference["right_by_sum"]["share"]
    if right is not None and right > NOT_MUCH_TO_LEARN:
        found.append(Advice(
            "Little is left to learn", f"The reference already ranks {right:.1%} of the pairs right.",
            "Most pairs only push further what the model does already; the ones it ranks wrong are where it can learn.",
            f'data: {{filter: "ref_margin < {reference["margin"]["median"]:.0f}"}}'))
    margin = reference["margin"]
    if margin and surprise["rejected"] and margin["least"] < -FAR_MARGIN_TOKENS * 100:
        bound = round(margin["p10"] * 3, -1) if margin["p10"] < 0 else -100
        found.append(Advice(
            "Read the pairs that the reference ranks most wrongly",
            f"The lowest margin of the reference is {margin['least']:.0f} nats, the tenth percentile {margin['p10']:.0f}.",
            "Far out there are broken, swapped and merely very long answers; the list below shows them.",
            f'data: {{filter: "ref_margin > {bound:.0f}"}}'))
    return found
