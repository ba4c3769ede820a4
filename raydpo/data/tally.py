"""Report on every record: kept, truncated, dropped, malformed, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import date
from typing import Any, NamedTuple

from raydpo.config import DataConfig
from raydpo.data.choices import always_above
from raydpo.data.messages import LITERALS
from raydpo.data.remarks import PROMPT_END, PROMPT_IN_ANSWER, Remarks
from raydpo.data.repeats import Repeats
from raydpo.data.scores import Contradictions
from raydpo.errors import DataError

__all__ = ["DataReport", "Faults", "SourceReport"]

FIRST_PLACES = 3
MOST_REASONS = 10
"""Number of reasons in a message."""
REASON_CHARACTERS = 200
MOST_LISTED = 10


@dataclass
class Faults:
    """Number of faults by reason, and the first few places of each."""

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        if len(reason) > REASON_CHARACTERS:
            reason = f"{reason[: REASON_CHARACTERS - 4]} ..."
        self.counts[reason] += 1
        first = self.places.setdefault(reason, [])
        if len(first) < FIRST_PLACES and where not in first:
            first.append(where)

    def merge(self, other: Faults) -> None:
        """Add the faults of later records."""
        for reason, count in other.counts.items():
            self.counts[reason] += count
            first = self.places.setdefault(reason, [])
            first += [where for where in other.places[reason] if where not in first][: FIRST_PLACES - len(first)]

    def to_state(self) -> list[Any]:
        """All of it for JSON, with its order."""
        return [[reason, count, self.places[reason]] for reason, count in self.counts.items()]

    @classmethod
    def from_state(cls, state: list[Any]) -> Faults:
        counts = Counter({reason: count for reason, count, _ in state})
        return cls(counts, {reason: list(places) for reason, _, places in state})

    @property
    def total(self) -> int:
        return self.counts.total()

    def __str__(self) -> str:
        """``12 missing column 'chosen' (a.jsonl:3, a.jsonl:8, a.jsonl:9, ...); ...``, most frequent first, at most ten."""
        shown = [
            f"{count:,} {reason} ({', '.join(self.places[reason])}{', ...' if count > len(self.places[reason]) else ''})"
            for reason, count in self.counts.most_common(MOST_REASONS)
        ]
        more = len(self.counts) - len(shown)
        return "; ".join([*shown, f"and {more:,} more reasons"] if more else shown)

    def to_dict(self) -> dict[str, Any]:
        return {reason: {"count": count, "first": self.places[reason]} for reason, count in self.counts.most_common()}


class CountedTokens(NamedTuple):
    """Completion tokens of the pairs of a source, and how many of them have a weight above 0.

    Attributes:
        what: what counts, in words.
        idle: the column of spans, if it changes the weight of no token of the source.
    """

    what: str
    tokens: int
    counted: int
    idle: str | None = None

    def __str__(self) -> str:
        share = f" ({self.counted / self.tokens:.0%})".replace("%", " %") if self.tokens else ""
        return f"{self.what}: {self.counted:,} of {self.tokens:,} completion tokens count{share}"


@dataclass
class SourceReport:
    """Report on one source.

    Attributes:
        records: lines or rows read.
        malformed_records: records that gave no pair or a faulty one, because of ``malformed``.
        ranked: whether ranked lists are counted where this says pairs.
        pairs: well-formed pairs; more than records if records rank several completions.
        kept: pairs that are left.
        desirable, undesirable: of these, completions alone with a good and with a bad label.
        truncated: completions (not pairs) that max_length shortened.
        dropped: well-formed pairs that were dropped, by reason.
        duplicates: kept pairs with the same tokens as an earlier one, of any source.
        merged: pairs whose prompt, tokenised alone, is no prefix of prompt and completion.
        several_turns: pairs with a completion that continues beyond the assistant's first turn, where all of it counts.
        remarks: what is odd about well-formed pairs, such as texts that the chat template leaves out.
        files: which files were read, and how.
        understood: records by how they were understood, where they have not the plain form.
        unused: records by columns that were not read.
        repeats: answers that repeat their prompt.
        counted: which tokens of the pairs that are left count; None if all do.
        counted_held_out: the same of the held-out ones, where ``data.eval.train_on`` says it; ``counted`` is then of the
            others.
    """

    name: str
    path: str
    records: int = 0
    malformed_records: int = 0
    pairs: int = 0
    kept: int = 0
    truncated: int = 0
    duplicates: int = 0
    merged: int = 0
    several_turns: int = 0
    desirable: int = 0
    undesirable: int = 0
    malformed: Faults = field(default_factory=Faults)
    dropped: Faults = field(default_factory=Faults)
    scores: Contradictions = field(default_factory=Contradictions)
    remarks: Remarks = field(default_factory=Remarks)
    files: list[str] = field(default_factory=list)
    understood: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    repeats: Repeats = field(default_factory=Repeats)
    ranked: bool = False
    counted: CountedTokens | None = None
    counted_held_out: CountedTokens | None = None

    def merge(self, other: SourceReport) -> None:
        """Add the account of later records of the same source. Name and path stay."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in _PARTS:
            getattr(self, name).merge(getattr(other, name))
        self.files += other.files
        self.understood.update(other.understood)
        self.unused.update(other.unused)

    def to_state(self) -> dict[str, Any]:
        """All of it for JSON, so that ``from_state`` gives an equal report. Unlike in ``to_dict``, every order is kept."""
        return {
            **{name: getattr(self, name) for name in ("name", "path", *_COUNTS)},
            **{name: getattr(self, name).to_state() for name in _PARTS},
            "files": list(self.files),
            "understood": list(map(list, self.understood.items())),
            "unused": list(map(list, self.unused.items())),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> SourceReport:
        """The report that ``to_state`` describes.

        Raises:
            KeyError, TypeError, ValueError: if it is no such state.
        """
        return cls(
            **{name: state[name] for name in ("name", "path", *_COUNTS)},
            **{name: kind.from_state(state[name]) for name, kind in _PARTS.items()},
            files=list(state["files"]),
            understood=Counter(dict(state["understood"])),
            unused=Counter(dict(state["unused"])),
        )

    def lines(self) -> list[str]:
        unit = self.unit
        parts = [f"{self.records:,} records", f"{self._kept()} kept"]
        parts += [
            f"{count:,} {what}"
            for count, what in ((self.truncated, "completions truncated"), (self.duplicates, "exact duplicates kept"))
            if count
        ]
        lines = [f"data {self.name}: {', '.join(parts)}", *self._readings()]
        lines += [] if self.counted is None else [f"data {self.name}: {self.counted}"]
        lines += [] if self.counted_held_out is None else [f"data {self.name}, held out: {self.counted_held_out}"]
        if self.counted is not None and self.counted.idle is not None:
            lines.append(
                f"warning: data {self.name}: data.spans_column is {self.counted.idle!r}, but no span there makes a token "
                "count more or less; correct the column's name, or set it to null if no source has spans"
            )
        if self.dropped.total:
            lines.append(f"data {self.name}: {self.dropped.total:,} {unit} dropped: {self.dropped}")
        if self.malformed.total:
            lines.append(f"warning: data {self.name}: {self.malformed_records:,} malformed records: {self.malformed}")
        if (merged := self.merged - sum(self.remarks.pairs[kind] for kind in (PROMPT_END, PROMPT_IN_ANSWER))) > 0:
            lines.append(
                f"warning: data {self.name}: in {merged:,} {unit} the prompt is tokenised differently alone "
                "and with its completion (tokens merge across the boundary, but no text is left out); "
                "the completion starts where they differ"
            )
        if self.several_turns:
            lines.append(
                f"warning: data {self.name}: in {self.several_turns:,} {unit} a completion continues with user or "
                "tool messages, and their tokens also count in the loss; set data.train_on=assistant to count only what "
                "the assistant writes"
            )
        lines += (f"warning: data {self.name}: {line}" for line in self.scores.lines(self.records))
        return lines + self.remarks.lines(self.name, self.pairs, unit)

    @property
    def unit(self) -> str:
        """What messages call the rows of this source: pairs, lists, or rows if some are completions alone."""
        return "lists" if self.ranked else "rows" if self.desirable or self.undesirable else "pairs"

    def _kept(self) -> str:
        """``3 pairs``, ``3 lists``, ``3 completions with labels (2 desirable, 1 undesirable)``, or both."""
        if self.ranked:
            return f"{self.kept:,} lists"
        alone = self.desirable + self.undesirable
        labels = f"{alone:,} completions with labels ({self.desirable:,} desirable, {self.undesirable:,} undesirable)"
        pairs = f"{self.kept - alone:,} pairs"
        return pairs if not alone else labels if alone == self.kept else f"{pairs} and {labels}"

    def _readings(self) -> list[str]:
        """How files and records were understood, and what was not read."""
        told = list(self.files[:MOST_LISTED])
        if len(self.files) > MOST_LISTED:
            told.append(f"and {len(self.files) - MOST_LISTED:,} more files that are not what their names say")
        told += always_above(self.understood)
        if (literal := self.understood[LITERALS]) and 2 * literal >= self.records:
            told.append(
                f"warning: {literal:,} of {self.records:,} records: {LITERALS}; if that is not what the model should write, "
                "decode them in the file"
            )
        for sign in ("warning: ", ""):
            notes = [
                entry
                for entry in self.understood.most_common()
                if entry[0].startswith("warning: ") == bool(sign) and entry[0] != LITERALS
            ]
            told += [f"{sign}{count:,} records: {note.removeprefix(sign)}" for note, count in notes[:MOST_LISTED]]
            if len(notes) > MOST_LISTED:
                told.append(f"{sign}and {len(notes) - MOST_LISTED:,} more such lines, see the report")
        if self.unused:
            names = [f"{name[:40]!r} ({count:,})" for name, count in self.unused.most_common(MOST_LISTED)]
            rest = len(self.unused) - MOST_LISTED
            told.append(f"columns not read (records): {', '.join(names)}{f' and {rest:,} more' if rest > 0 else ''}")
        told += self.repeats.lines(self.unit)
        return [
            f"{sign}data {self.name}: {each.removeprefix(sign)}"
            for each in told
            for sign in ["warning: " if each.startswith("warning: ") else ""]
        ]

    def check(self, config: DataConfig) -> None:
        """Check that enough is left.

        Raises:
            DataError: if a larger share is malformed or dropped than ``config`` allows, or no pair is left.
        """
        if self.malformed_records > config.max_malformed * self.records:
            raise DataError(
                f"data {self.name}: {self.malformed_records:,} of {self.records:,} records are malformed, more "
                f"than data.max_malformed ({config.max_malformed:g}) allows: {self.malformed}; correct them, "
                "map columns with the source's 'columns', or raise data.max_malformed"
            )
        if self.dropped.total > config.max_dropped * self.pairs:
            uncounted = ["(train_on" in reason for reason in self.dropped.counts]
            remedies = ["raise data.max_length"] * (not all(uncounted)) + ["change data.train_on"] * any(uncounted)
            remedies += ["raise data.max_length if it cuts the tokens that count"] * all(uncounted)
            raise DataError(
                f"data {self.name}: {self.dropped.total:,} of {self.pairs:,} {self.unit} would be dropped at "
                f"data.max_length {config.max_length}, more than data.max_dropped ({config.max_dropped:g}) "
                f"allows: {self.dropped}; {', '.join(remedies)}, or raise data.max_dropped if that is intended"
            )
        if self.remarks.lost > config.max_lost * self.pairs:
            raise DataError(
                f"data {self.name}: {self.remarks.loss(self.pairs, self.unit)}; data.max_lost ({config.max_lost:g}) "
                f"allows fewer; {self.remarks.remedy()}, or raise data.max_lost if that is intended"
            )
        if not self.kept:
            raise DataError(
                f"data {self.name}: none of the {self.records:,} records of {self.path} gives a usable {self.unit[:-1]}"
                + (f": {self.malformed}" if self.malformed.total else "")
                + (f"; dropped: {self.dropped}" if self.dropped.total else "")
            )

    def to_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).to_dict() for name in ("malformed", "dropped", "remarks", "scores")}
        parts |= {"understood": dict(self.understood), "unused": dict(self.unused), "repeats": vars(self.repeats).copy()}
        counted = {name: getattr(self, name) for name in ("counted", "counted_held_out")}
        counted = {name: None if each is None else each._asdict() for name, each in counted.items()}
        return vars(self) | parts | counted


_COUNTS = ("records", "malformed_records", "pairs", "kept", "truncated", "duplicates", "merged", "several_turns")
_PARTS: dict[str, Any] = {
    "malformed": Faults,
    "dropped": Faults,
    "scores": Contradictions,
    "remarks": Remarks,
    "repeats": Repeats,
}


@dataclass
class DataReport:
    """Report on all sources.

    Attributes:
        leaked: pairs of a given held-out file whose prompt is also trained on.
        thinned: training pairs that ``data.fraction`` keeps, and all of them; None if it is 1.
        template_date: the day that the chat template was told instead of today; None if it writes no date.
    """

    sources: list[SourceReport]
    leaked: int = 0
    thinned: tuple[int, int] | None = None
    template_date: date | None = None

    @property
    def unit(self) -> str:
        """What is counted: pairs, ranked lists, or rows if some are completions alone."""
        units = {source.unit for source in self.sources}
        return next((unit for unit in ("lists", "rows") if unit in units), "pairs")

    def lines(self) -> list[str]:
        """A summary for people; lines that begin with ``warning:`` need attention."""
        lines = [line for source in self.sources for line in source.lines()]
        if self.leaked:
            lines.append(
                f"warning: the prompts of {self.leaked:,} held-out {self.unit} are also in the training data; held-out "
                "figures look better than they are"
            )
        if self.thinned is not None:
            lines.append(f"data.fraction: {self.thinned[0]:,} of {self.thinned[1]:,} training {self.unit} are used")
        if self.template_date is not None:
            lines.append(
                f"the chat template writes today's date; it is told {self.template_date} on every day (data.template_date)"
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "leaked": self.leaked,
            "thinned": self.thinned,
            "template_date": None if self.template_date is None else str(self.template_date),
            "sources": [source.to_dict() for source in self.sources],
        }
