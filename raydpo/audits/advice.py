"""Turns the figures of an audit into advice: the figure that led to it, and the setting that follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from raydpo.audits.measure import signed
from raydpo.config import ObjectiveConfig
from raydpo.pages.finding import Finding

__all__ = ["advise"]

LENGTH_RULE = 0.55
"""Smallest accuracy of the length-only rule at which the advice mentions length: DPO learns the easiest feature that ranks
the data (Park et al. 2024, arXiv 2403.19159)."""
LENGTH_RULE_STRONG = 0.6
FAR_SURPRISE = 3.0
"""Median surprise of the chosen answers, nats a token, above which fine-tuning first is advised. An instruct model's own
answers are below 1; human text that it can follow is between 1.5 and 2.5."""
FEWEST_SURPRISED = 50
"""Smallest number of scored pairs at which fine-tuning first is advised: fewer are a trial of the tools, not data."""
SOME = 0.01
"""Smallest share of pairs at which a fault is mentioned."""
NOT_MUCH_TO_LEARN = 0.9
"""Share of pairs that the reference already ranks right, above which the advice says so."""


def advise(figures: dict[str, Any], objective: ObjectiveConfig | None = None) -> list[Finding]:
    """Give advice for all pairs together, the most important first. The list is empty if nothing stands out.

    Args:
        figures: of ``measure.figures``, and as ``labels`` those of ``labels.by_label``. objective: what the pairs will be
            trained with; None = the default objective.
    """
    labels = figures.get("labels")
    found = list(_advice(figures, objective or ObjectiveConfig(), labels is not None))
    return found if labels is None else [*found, *_label_advice(labels)]


def _label_advice(labels: dict[str, Any]) -> Iterator[Finding]:
    """Advice for completions with labels."""
    kinds = [labels[name] for name in ("desirable", "undesirable")]
    total = sum(each["all"] for each in kinds)
    counts = {name: sum(each[name] for each in kinds) for name in ("both_labels_evenly", "copies", "empty", "truncated")}
    longer, good = labels["longer"], labels["desirable"]
    low, high = longer["low"], longer["high"]
    if low is not None and (low > 0.5 or high < 0.5) and abs(longer["share"] - 0.5) >= LENGTH_RULE - 0.5:
        word = "longer" if low > 0.5 else "shorter"
        share = longer["share"] if low > 0.5 else 1 - longer["share"]
        yield Finding(
            "Watch the length of desirable completions",
            f"Of a desirable and an undesirable completion drawn at random, the desirable one is {word} in {share:.1%}; the "
            f"medians are {good['tokens']['median']:.0f} and {labels['undesirable']['tokens']['median']:.0f} tokens.",
            f"The easiest thing to learn from these labels is to write {word} completions.",
        )
    if good["surprise"] and good["surprise"]["median"] > FAR_SURPRISE and good["all"] >= FEWEST_SURPRISED:
        yield Finding(
            "Fine-tune on the desirable completions first",
            f"The surprise of the reference at the desirable completions is {good['surprise']['median']:.2f} nats a token "
            "in the median.",
            "The model does not write text of this kind. Train one supervised epoch on the desirable completions first, and "
            "use the result as policy and reference.",
        )
    for kind, name, least, why, setting in (
        (
            "Remove completions with both labels",
            "both_labels_evenly",
            0.0,
            "They are desirable exactly as often as undesirable, so they teach nothing and keep the loss high.",
            'data: {filter: "opposites != copies"}',
        ),
        (
            "Remove copies of completions",
            "copies",
            SOME,
            "Every copy counts, so a completion with copies has more weight.",
            'data: {filter: "copy = 0 or contradictory"}',
        ),
        (
            "Look at empty completions",
            "empty",
            SOME,
            "A desirable one teaches the model to stop.",
            'data: {filter: "chosen_tokens + rejected_tokens > 1"}',
        ),
        (
            "Cut completions less",
            "truncated",
            SOME,
            "A cut completion has no end token, so the policy learns not to stop, and figures of length use the cut length.",
            "data: {max_length: ...}, or data: {truncation: drop}",
        ),
    ):
        if (count := counts[name]) and count >= least * total:
            yield Finding(kind, f"{count:,} of {total:,} completions with labels ({count / total:.1%}).", why, setting)


def _advice(figures: dict[str, Any], objective: ObjectiveConfig, labelled: bool) -> Iterator[Finding]:
    """Advice for pairs. ``labelled``: beside them are completions with labels, which conditions on pairs must let pass."""

    def keep(condition: str) -> str:
        return f'data: {{filter: "{f"label != 0 or ({condition})" if labelled else condition}"}}'

    pairs, all_pairs = figures["pairs"], figures["all_pairs"]
    length, reference, surprise = figures["length"], figures["reference"], figures["surprise"]
    rule, rule_low = length["rule_accuracy"]["share"], length["rule_accuracy"]["low"]
    if rule_low is not None and rule_low > 0.5 and rule >= LENGTH_RULE:
        strong = rule >= LENGTH_RULE_STRONG and not objective.per_token
        tokens = sum(figures["tokens"][side]["mean"] for side in ("chosen", "rejected")) / 2
        yield Finding(
            "Length-normalise" if strong else "Watch the length",
            f"'The {length['rule']} answer is better' is right for {rule:.1%} of the pairs (95 % interval from "
            f"{rule_low:.1%}); the chosen answer is longer in {length['chosen_longer']['share']:.1%} of them; the median "
            f"difference is {signed(length['difference']['median'])} tokens.",
            f"The easiest thing to learn from these pairs is to write {length['rule']} answers."
            + (
                f" A loss per token removes this incentive. Its beta is the present one, {objective.beta_text}, times the "
                f"mean length of an answer, {tokens:.0f} tokens."
                if strong
                else " Compare length/margin_correlation of the run with the correlation here."
            ),
            f"train: {{loss: sigmoid_norm, beta: {objective.beta_per_token(tokens)}}}" if strong else None,
        )
    chosen = surprise["chosen"]
    if chosen and chosen["median"] > FAR_SURPRISE and pairs - figures["not_scored"] >= FEWEST_SURPRISED:
        perplexity = surprise["chosen_perplexity"]
        yield Finding(
            "Fine-tune on the chosen answers first",
            f"The surprise of the reference at the chosen answers is {chosen['median']:.2f} nats a token in the median, and "
            f"{math.log(perplexity):.2f} over all their tokens (perplexity {perplexity:.0f}).",
            "The model does not write text of this kind. DPO then mostly lowers the rejected answers, and the likelihood of "
            "the chosen ones falls with them. Train one supervised epoch on the chosen answers first, and use the result as "
            "policy and reference.",
        )
    even = figures["contradictory_evenly"]
    if even:
        yield Finding(
            "Remove contradictions",
            f"{even:,} of {all_pairs:,} pairs ({even / all_pairs:.1%}) prefer A to B exactly as often as others prefer B to "
            "A.",
            "They cancel out and keep the loss high. The filter keeps pairs where one side has more votes: the loss fits "
            "the share of votes.",
            'data: {filter: "opposites != copies"}',
        )
    for kind, count, why, setting in (
        (
            "Remove copies",
            figures["duplicates"],
            "Every copy counts, so a pair with copies has more weight. Pairs with "
            "votes for both sides are not counted as copies.",
            'data: {filter: "copy = 0 or contradictory"}',
        ),
        (
            "Look at empty answers",
            max(figures["empty"].values()),
            "Such an answer teaches the model to stop.",
            keep("chosen_tokens > 1 and rejected_tokens > 1"),
        ),
        (
            "Cut less",
            max(figures["truncated"].values()),
            "A cut answer has no end token, so the policy learns not to stop, and figures of length use the cut length.",
            "data: {max_length: ...}, or data: {truncation: drop}",
        ),
    ):
        if count and count >= SOME * all_pairs:
            yield Finding(kind, f"{count:,} of {all_pairs:,} pairs ({count / all_pairs:.1%}).", why, setting)
    # Sums favour short answers, so the ranking per token must be right too.
    by_sum, per_token = reference["right_by_sum"], reference["right_per_token"]
    if by_sum["low"] is not None and min(by_sum["low"], per_token["low"]) > NOT_MUCH_TO_LEARN:
        yield Finding(
            "Little is left to learn",
            f"The reference already ranks {by_sum['share']:.1%} of the pairs right, and {per_token['share']:.1%} per token.",
            "Most pairs reinforce what the model does already. It learns from the pairs that it ranks wrong.",
            keep(f"ref_margin < {reference['margin']['median']:.0f}"),
        )
    far = reference["far"]
    if far["pairs"]:
        yield Finding(
            "Read the pairs that the reference ranks most wrongly",
            f"The lowest margin of the reference is {reference['margin']['least']:.0f} nats, the first percentile "
            f"{reference['margin']['p01']:.0f}.",
            "Such pairs are often broken, swapped or very long; the list below shows them. The filter removes "
            f"{far['pairs']:,} of {pairs:,} pairs.",
            keep(f"ref_margin > {far['bound']}"),
        )
