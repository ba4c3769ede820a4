"""Section ``data``: preference pairs, and how they become token ids."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal, Protocol

from pydantic import BeforeValidator, Field, model_validator

from raydpo.config.counting import TrainOn, train_on_text
from raydpo.config.section import Float, Int, PathOrUri, Section
from raydpo.storage.uri import is_uri

__all__ = [
    "COMPRESSION_SUFFIXES",
    "DATA_SUFFIXES",
    "PINNED_DATE",
    "DataConfig",
    "EvalConfig",
    "SourceConfig",
    "as_sources",
    "bare_suffix",
    "source_name",
]

DATA_SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet", ".arrow")
"""File suffixes that are read as preference data, in capitals too."""
COMPRESSION_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
"""Suffixes of compressed files, after one of ``DATA_SUFFIXES``."""
PINNED_DATE = date(2024, 7, 26)
"""What a chat template that writes today's date is told: the day that Llama's own template falls back on."""


class SourceConfig(Section):
    """One file, directory, URI or hub data set of preference pairs."""

    path: PathOrUri
    """jsonl, json, parquet or arrow (also .gz, .zst, .bz2, .xz), a directory of such files or of save_to_disk, any URI that
    pyarrow or fsspec opens, or the name of a data set on the Hugging Face hub."""
    name: str | None = None
    """Name of the source in counts and metrics; null = the file's stem."""
    weight: Float = Field(default=1.0, gt=0)
    """Uses of each pair in an epoch: 0.5 uses half of the pairs (the other half in the next epoch), 2 uses all of them
    twice."""
    split: str = "train"
    """Split of a hub data set, and of a directory whose files name their split; ignored by single files."""
    subset: str | None = None
    """Configuration of a hub data set, or a directory below ``path``; null = the only one."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Maps our column names to the file's, for example {chosen: good_answer, rejected: bad_answer}."""
    limit: Int | None = Field(default=None, ge=1)
    """Number of records to read; null = all."""
    train_on: TrainOn | None = None
    """Which tokens of this source's completions count, as data.train_on; null = as set there."""


class EvalConfig(Section):
    """Held-out pairs: a file of their own, or a share of the training pairs."""

    path: PathOrUri | None = None
    """A file of held-out pairs (anything a source can be)."""
    fraction: Float | None = Field(default=None, gt=0, lt=1)
    """Share of the training pairs to hold out. The split is by prompt: no prompt is on both sides."""
    split: str = "test"
    """Split of a hub data set, and of a directory whose files name their split; ignored by single files."""
    subset: str | None = None
    """Configuration of a hub data set, or a directory below ``path``; null = the only one."""
    columns: dict[str, str] | None = None
    """Column map of the held-out file; null = that of the training sources, if they all have the same."""
    train_on: TrainOn | None = None
    """Which tokens of held-out completions count, as data.train_on; null = those that count in training. Set it where
    trials of a sweep train on different tokens, so that all are measured on the same ones."""

    @model_validator(mode="after")
    def _check(self) -> EvalConfig:
        if self.path is not None and self.fraction is not None:
            raise ValueError(f"path ({self.path}) and fraction ({self.fraction}) contradict each other; keep one")
        if self.path is None and "path" not in self.model_fields_set:  # null replaces the path of a base configuration
            self.refuse_idle(("split", "subset", "columns"), "without path, the held-out file; drop it, or set path")
        return self


def as_sources(value: Any) -> list[Any]:
    """Convert a path, or a list of paths and sections, to a list of sections."""
    entries = value if isinstance(value, (list, tuple)) else [value]
    return [{"path": entry} if isinstance(entry, str) else entry for entry in entries]


def _as_eval(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class DataConfig(Section):
    """Preference pairs, and how they become token ids."""

    train: Annotated[tuple[SourceConfig, ...], BeforeValidator(as_sources)] = ()
    """One or more sources, or a single path. Only rounds have none: they make their pairs."""
    eval: Annotated[EvalConfig | None, BeforeValidator(_as_eval)] = None
    """Held-out pairs; null = none."""
    max_length: Int = Field(default=1024, ge=2)
    """Longest prompt + completion, in tokens. It also sets the rotary frequencies of models for which they depend on the
    length (longrope, dynamic)."""
    truncation: Literal["keep_start", "drop"] = "keep_start"
    """What to do with a longer pair: cut the end of its completion, or drop the pair."""
    fraction: Float = Field(default=1.0, gt=0, le=1)
    """Share of the training prompts to use, with all their pairs; for measuring how much more data helps. A hash of each
    prompt decides, so a smaller share is part of every larger one. Held-out pairs are not affected."""
    fraction_seed: Int = Field(default=0, ge=0)
    """Seed for the choice of prompts. Needs fraction."""
    shuffle: bool = True
    """Shuffle the pairs of each epoch. false = file order, for comparisons."""
    filter: str | None = None
    """Condition on training pairs, an SQL expression over the fields of the audit, for example
    'chosen_tokens < 1024 and ref_margin > -20'. The fields are in raydpo/config/filter.py. Held-out pairs are not
    filtered."""
    weight_column: str | None = None
    """Column with the weight of each pair in the loss, a number of at least 0; null = equal weights."""
    margin_column: str | None = None
    """Column with a margin of each pair, in units of the reward, that the loss requires between chosen and rejected."""
    train_on: TrainOn = "completion"
    """Which tokens of a completion count in the loss: completion (all of them), assistant (what the assistant writes, not
    tool results and user turns between), last_turn (its last turn alone), answer (without the reasoning), reasoning, or a
    list with weights such as [{answer: 1.0}, {reasoning: 0.1}]. It never needs another score: the cache holds every
    token."""
    spans_column: str | None = None
    """Column with spans of the completions that count, and their weights; null = none. Tokens outside of them do not
    count."""
    ranked: Literal["pairs", "lists"] = "pairs"
    """What a record with several ranked completions becomes: all pairs of them, or one list for a loss over lists, such as
    plackett_luce."""
    chat_template: str | None = None
    """Jinja chat template, or path of a file with one; null = the tokenizer's."""
    template_date: date = PINNED_DATE
    """The day that a chat template is told instead of today, so that a completion scored today is found tomorrow."""
    special_tokens: Literal["warn", "refuse"] = "warn"
    """What to do with a record whose texts spell special tokens of the tokenizer: warn, or count it as malformed."""
    max_lost: Float = Field(default=0.1, ge=0, le=1)
    """Largest share of pairs of a source of which the chat template may leave out a text; more is an error. A template that
    does not fit leaves out a text of nearly every pair. Not counted: tools, tool calls and thoughts of the prompt, which a
    template leaves out at inference, too, and thoughts of earlier turns."""
    max_malformed: Float = Field(default=0.01, ge=0, le=1)
    """Largest share of malformed records in a source; more is an error."""
    max_dropped: Float = Field(default=0.1, ge=0, le=1)
    """Largest share of pairs of a source that may be dropped for their length, or because no token of theirs counts; more
    is an error."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        names = [source_name(source) for source in self.train]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two sources are both named {sorted(twice)[0]!r}; give each its own name")
        own = [source.train_on for source in self.train]
        # Where sources differ, it says what counts in pairs that are only measured.
        measures = any(one != own[0] for one in own) and (self.eval is None or self.eval.train_on is None)
        if self.train_on != "completion" and None not in own and not measures:
            raise ValueError(
                f"data.train_on {train_on_text(self.train_on)!r} has no effect: each source has its own train_on; drop "
                "it, or theirs"
            )
        for name in ("weight_column", "margin_column"):
            if self.spans_column is not None and self.spans_column == getattr(self, name):
                raise ValueError(
                    f"data.spans_column and data.{name} are both {self.spans_column!r}, but one column holds spans and the "
                    "other a number; name a column for each"
                )
        return self


class _Named(Protocol):
    """A source of pairs or of prompts."""

    path: str
    name: str | None


def source_name(source: _Named) -> str:
    """Name of a source in counts and metrics."""
    if source.name is not None:
        return source.name
    stem = (source.path.partition("?")[0] if is_uri(source.path) else source.path).rstrip("/").rsplit("/", 1)[-1]
    bare = bare_suffix(stem)
    suffix = next((suffix for suffix in DATA_SUFFIXES if bare.endswith(suffix)), "")
    return stem[: len(bare) - len(suffix)]


def bare_suffix(name: str) -> str:
    """Return a file's name in lower case, without the suffix of a compressed file."""
    name = name.lower()
    for suffix in COMPRESSION_SUFFIXES:
        name = name.removesuffix(suffix)
    return name
