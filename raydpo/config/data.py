"""Section ``data``: preferences, and how they become token ids."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from raydpo.config.section import Float, Int, PathOrUri, Section
from raydpo.config.uri import is_uri

__all__ = ["COMPRESSION_SUFFIXES", "DATA_SUFFIXES", "DataConfig", "EvalConfig", "SourceConfig", "as_sources",
           "source_name"]

DATA_SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet")
"""Of files of preferences."""
COMPRESSION_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
"""That may follow one of these."""


class SourceConfig(Section):
    """One file, directory, URI or hub data set of preferences."""

    path: PathOrUri
    """jsonl, json or parquet (also .gz, .zst, .bz2, .xz), a directory of such files, any URI that pyarrow or fsspec
    opens, or the name of a data set on the Hugging Face hub."""
    name: str | None = None
    """Name of the source in counts and metrics; null = the file's stem."""
    weight: Float = Field(1.0, gt=0)
    """How often an epoch passes over this source: 0.5 takes half of its pairs (others each epoch), 2 takes all twice."""
    split: str = "train"
    """Split of a hub data set; ignored by files."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Maps our column names to the file's, for example {chosen: good_answer, rejected: bad_answer}."""
    limit: Int | None = Field(None, ge=1)
    """Reads only the first so many records."""


class EvalConfig(Section):
    """The held-out pairs."""

    path: PathOrUri | None = None
    """A file of held-out pairs (anything a source can be)."""
    fraction: Float | None = Field(None, gt=0, lt=1)
    """Or a share of the training pairs, split off by prompt: the same prompt is never on both sides."""
    split: str = "test"
    """Split of a hub data set; ignored by files."""
    columns: dict[str, str] | None = None
    """Column map of the held-out file; null = that of the training sources, where they agree on one."""

    @model_validator(mode="after")
    def _check(self) -> EvalConfig:
        if self.path is not None and self.fraction is not None:
            raise ValueError(f"path ({self.path}) and fraction ({self.fraction}) contradict each other; keep one")
        return self


def as_sources(value: Any) -> Any:
    """A bare path, or a list of paths and sections, as a list of sections."""
    entries = value if isinstance(value, (list, tuple)) else [value]
    return [{"path": entry} if isinstance(entry, str) else entry for entry in entries]


def _as_eval(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class DataConfig(Section):
    """Preferences and how they become token ids."""

    train: Annotated[tuple[SourceConfig, ...], BeforeValidator(as_sources)] = Field(min_length=1)
    """One or more sources; a bare path works too."""
    eval: Annotated[EvalConfig | None, BeforeValidator(_as_eval)] = None
    """Held-out pairs; null = none."""
    max_length: Int = Field(1024, ge=2)
    """Longest prompt + completion, in tokens. It also decides the rotary frequencies of a model whose frequencies depend on
    a length (longrope, dynamic)."""
    truncation: Literal["keep_start", "drop"] = "keep_start"
    """What becomes of a longer one: its completion is cut at the end, or the pair is dropped."""
    fraction: Float = Field(1.0, gt=0, le=1)
    """Share of the training prompts that are used, with all their pairs: how much does more data help? Decided by the
    content of each prompt, so a smaller share is part of every larger one. Held-out pairs are left alone."""
    fraction_seed: Int = Field(0, ge=0)
    """Another seed, other prompts. Without effect while fraction is 1."""
    shuffle: bool = True
    """false = every epoch in file order, for comparisons."""
    filter: str | None = None
    """A condition that training pairs must meet, an SQL expression over the fields of the audit, for example
    'chosen_tokens < 1024 and ref_margin > -20'. See raydpo/data/facts.py for the fields. Held-out pairs are left alone."""
    weight_column: str | None = None
    """A column of the records with the weight of each pair in the loss, a number from 0 up; null = all the same."""
    margin_column: str | None = None
    """A column with how much better the chosen completion is, a number in units of reward: the loss wants that much more."""
    chat_template: str | None = None
    """A Jinja chat template, or the path of one, in place of the tokenizer's."""
    max_malformed: Float = Field(0.01, ge=0, le=1)
    """Largest share of malformed records of a source; more is an error."""
    max_dropped: Float = Field(0.1, ge=0, le=1)
    """Largest share of well-formed pairs of a source that length may drop; more is an error."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        names = [source_name(source) for source in self.train]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two sources are both named {sorted(twice)[0]!r}; give each its own name")
        return self


def source_name(source: SourceConfig) -> str:
    """The name a source goes by in counts and metrics."""
    if source.name is not None:
        return source.name
    stem = (source.path.partition("?")[0] if is_uri(source.path) else source.path).rstrip("/").rsplit("/", 1)[-1]
    for suffix in (*COMPRESSION_SUFFIXES, *DATA_SUFFIXES):
        stem = stem.removesuffix(suffix)
    return stem
