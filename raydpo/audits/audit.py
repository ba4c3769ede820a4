"""An audit: figures over all pairs and by source, advice, and the pairs worth reading."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import polars as pl
import pyarrow as pa

from raydpo.audits.advice import advise
from raydpo.audits.extremes import extremes
from raydpo.audits.labels import by_label, label_lines
from raydpo.audits.measure import counts, counts_by_source, figures, signed
from raydpo.audits.sample import Sample
from raydpo.config import ObjectiveConfig
from raydpo.pages.finding import Finding

__all__ = ["Audit", "audit_pairs", "counted_line", "summary_lines"]


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    Attributes:
        meta: name of the run, model, identity of the reference, version; ``sample``: ``sample.Sample.to_dict``; ``counted``:
            what counts in a completion, in words, None if everything does.
        total, sources: figures of ``measure.figures``, over all pairs and by source; ``labels``: what ``labels.by_label``
            gives for completions with labels.
        identical: pairs left out at loading because chosen and rejected are the same, by source.
        scores: by source with scores beside its pairs, ``data.scores.Contradictions.to_dict`` of all pairs that were loaded.
        advice: the most important first. extremes: lists of pairs worth reading, of the sample.
        frame: the facts that the figures were computed from, for plots; not part of ``to_dict``.
    """

    meta: dict[str, Any]
    total: dict[str, Any]
    sources: dict[str, dict[str, Any]]
    identical: dict[str, int]
    scores: dict[str, dict[str, Any]]
    advice: list[Finding]
    extremes: list[dict[str, Any]]
    frame: pl.DataFrame

    def to_dict(self) -> dict[str, Any]:
        """Return the content of audit.json."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "frame"}
        return fields | {"advice": [dataclasses.asdict(one) for one in self.advice]}


def audit_pairs(
    facts: pa.Table,
    pairs: pa.Table,
    decode: Callable[[list[list[int]]], list[str]],
    sample: Sample,
    *,
    meta: dict[str, Any],
    everything: pa.Table | None = None,
    identical: dict[str, int] | None = None,
    scores: dict[str, dict[str, Any]] | None = None,
    objective: ObjectiveConfig | None = None,
) -> Audit:
    """Audit tokenised pairs and their reference log-probs.

    Args:
        facts: ``data.facts.pair_facts`` of the pairs of ``sample``. everything: of all ``pairs``, if those are more; only
            they tell copies, contradictions, and shared prompts and answers.
        decode: turns the token ids of many completions into texts.
        identical, scores: see ``Audit``. objective: the objective that the pairs will be trained with.
    """
    frame = _frame(facts).with_columns(prompt=sample.prompts)
    counted = frame if everything is None else _frame(everything)
    total = _figures(frame, counts(counted))
    sources = {
        name: _figures(frame.filter(pl.col("source") == name), each) for name, each in counts_by_source(counted).items()
    }
    advice, lists = advise(total, objective), extremes(facts, pairs, sample.rows, decode)
    about = meta | {"sample": sample.to_dict()}
    return Audit(about, total, sources, identical or {}, scores or {}, advice, lists, frame)


def _figures(frame: pl.DataFrame, counted: dict[str, Any]) -> dict[str, Any]:
    """Figures of the pairs in ``frame``, and as ``labels`` those of its completions alone."""
    return figures(frame, counted) | {"labels": by_label(frame, counted["labels"])}


def _frame(facts: pa.Table) -> pl.DataFrame:
    return pl.from_arrow(facts.drop_columns(["pair_id"]))


def counted_line(audit: Audit) -> str:
    """Say which tokens the figures are of, if not of all."""
    counted, total = audit.total["counted"], audit.total["counted"] + audit.total["uncounted"]
    return (
        f"tokens that count ({audit.meta['counted']}): {counted:,} of {total:,} tokens of the completions "
        f"({counted / total:.0%}); lengths and log-probs are of these"
    )


def summary_lines(audit: Audit) -> list[str]:
    """Summarise an audit in a few lines for the terminal."""
    total = audit.total
    length, surprise, reference = total["length"], total["surprise"], total["reference"]
    lines, of_all = [], ""
    if audit.meta.get("counted"):
        lines.append(f"audit: {counted_line(audit)}")
    if drawn := audit.meta["sample"]:
        lines.append(
            f"audit: a sample of {drawn['pairs']:,} of {drawn['of_pairs']:,} pairs, all those of {drawn['prompts']:,} of "
            f"{drawn['of_prompts']:,} prompts, drawn with seed {drawn['seed']} (train.seed); copies, contradictions, shared "
            "prompts and answers, and empty and cut answers are counted over all pairs"
        )
        of_all = f"of all {drawn['of_pairs']:,} pairs: "
    if total["labels"]:
        lines += label_lines(total["labels"])
    if not total["pairs"]:
        return lines + _advice_lines(audit)
    lines.append(
        f"audit: the chosen answer is longer in {length['chosen_longer']['share']:.1%} of {total['pairs']:,} pairs; the "
        f"median difference is {signed(length['difference']['median'])} tokens; '{length['rule']} is better' is right for "
        f"{length['rule_accuracy']['share']:.1%}"
    )
    if surprise["chosen"]:
        lines.append(
            f"audit: the reference ranks {reference['right_by_sum']['share']:.1%} right "
            f"({reference['right_per_token']['share']:.1%} per token); chosen {surprise['chosen']['median']:.2f}, "
            f"rejected {surprise['rejected']['median']:.2f} nats a token in the median"
        )
    found = {
        "copies": total["duplicates"],
        "share a prompt": total["shared_prompt"],
        "share an answer": total["shared_answer"],
        "contradict another pair": total["contradictory"],
        "with chosen = rejected (left out)": sum(audit.identical.values()),
        "empty answers": sum(total["empty"].values()),
        "cut answers": sum(total["truncated"].values()),
    }
    if any(found.values()):
        lines.append(f"audit: {of_all}{', '.join(f'{count:,} {what}' for what, count in found.items() if count)}")
    return lines + _advice_lines(audit)


def _advice_lines(audit: Audit) -> list[str]:
    return [f"advice: {one.title.lower()}: {one.found}{f' ({one.setting})' if one.setting else ''}" for one in audit.advice]
