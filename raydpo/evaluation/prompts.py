"""Selects the pairs to measure and the prompts to answer, and reads the prompts as text."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raydpo.config import Config, DataConfig, EvaluateConfig, SourceConfig, check_verb, source_name
from raydpo.data.counting import train_on_of
from raydpo.data.messages import Malformed, Notes, Text
from raydpo.data.pairs import HELD_OUT, held_out_source
from raydpo.data.preference import normalise
from raydpo.data.records import Record, read_records
from raydpo.data.split import held_out, kept, prompt_digest, question_digest
from raydpo.errors import ConfigError
from raydpo.rewards.columns import other_columns

__all__ = [
    "Prompt",
    "choose_prompts",
    "evaluation_data",
    "prompt_records",
    "prompt_texts",
    "reading",
    "sources_of",
    "trained_on",
]


@dataclass(frozen=True)
class Prompt:
    """One distinct prompt: its token ids, int32, and the id of a pair with this prompt."""

    ids: np.ndarray
    pair_id: str


def evaluation_data(config: Config) -> tuple[DataConfig, bool]:
    """Return the section ``data`` to load, and whether its training pairs are measured (True) or its held-out pairs (False).
    In pairs of evaluate.data the same tokens count as in held-out pairs, unless their source says otherwise.

    Raises:
        ConfigError: if there is neither evaluate.data nor data.eval.
    """
    if config.evaluate.data is not None:
        counted = tuple({part: weight} for part, weight in train_on_of(config.data, None).items())
        others = {"train": config.evaluate.data, "eval": None, "filter": None, "train_on": counted}
        return config.data.model_copy(update=others), True
    check_verb(config, "eval")
    return config.data, False


def sources_of(config: Config) -> dict[str, SourceConfig]:
    """Return the sources of the evaluated pairs, by the name with which the ids of the pairs begin."""
    if config.evaluate.data is not None:
        return {source_name(source): source for source in config.evaluate.data}
    if config.data.eval.path is not None:
        return {HELD_OUT: held_out_source(config.data)}
    return {source_name(source): source for source in config.data.train}


def reading(evaluate: EvaluateConfig) -> Any:
    """Return the reader for the records of ``evaluate.data``: it sets subsets as sources, and text as chat if configured."""
    if evaluate.data is None:
        return read_records

    def read(source: SourceConfig) -> Iterator[Record]:
        for record in read_records(source):
            value = record.value
            if value is None:
                yield record
                continue
            if evaluate.chat:
                value = _as_conversation(value)
            subset = None if evaluate.subsets is None else value.get(evaluate.subsets)
            if subset is not None and evaluate.subsets not in ("prompt", "chosen", "rejected"):
                value = {
                    key: entry for key, entry in value.items() if key != evaluate.subsets
                }  # used, so not told as unread
            yield dataclasses.replace(record, value=value, source=None if subset is None else str(subset))

    return read


def _as_conversation(value: dict[str, Any]) -> dict[str, Any]:
    for answers in (("chosen", "rejected"), ("completion",)):
        roles = {"prompt": "user", **dict.fromkeys(answers, "assistant")}
        if all(isinstance(value.get(name), str) for name in roles):
            return value | {name: [{"role": role, "content": value[name]}] for name, role in roles.items()}
    return value


def choose_prompts(pairs: pa.Table, count: int, seed: int) -> list[Prompt]:
    """Choose ``count`` distinct prompts, or all if there are fewer.

    They are those with the lowest digests of content and seed. So the order of a file does not matter, and a file that is
    sorted by topic gives prompts of all topics.
    """
    distinct: dict[tuple[int, ...], str] = {}
    for ids, pair_id in zip(pairs["prompt_ids"].to_pylist(), pairs["pair_id"].to_pylist(), strict=True):
        distinct.setdefault(tuple(ids), pair_id)

    def digest(ids: tuple[int, ...]) -> bytes:
        content = struct.pack("<Q", seed) + np.array(ids, "<u4").tobytes()
        return hashlib.blake2b(content, digest_size=16, person=b"raydpo-prompts-1").digest()

    chosen = sorted(distinct, key=digest)[:count]
    return [Prompt(np.array(ids, np.int32), distinct[ids]) for ids in chosen]


def prompt_texts(prompts: Sequence[Prompt], config: Config) -> list[Text]:
    """Return the prompts as text or messages, as in the data: judges have their own templates."""
    return [text for text, _ in prompt_records(prompts, config, {})]


def prompt_records(prompts: Sequence[Prompt], config: Config, notes: Notes) -> list[tuple[Text, str]]:
    """Return the prompts as text or messages, each with the other columns of its record, a JSON object.

    Args:
        notes: gets what reward functions see of the columns in another form, or not at all.
    """
    wanted: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for place, prompt in enumerate(prompts):
        name, _, rest = prompt.pair_id.rpartition(":")
        row, _, number = rest.partition("#")
        wanted.setdefault((name, int(row)), []).append((place, int(number or 0)))
    found: list[tuple[Text, str]] = [("", "{}")] * len(prompts)
    read = reading(config.evaluate)
    for name, source in sources_of(config).items():
        left = {row for other, row in wanted if other == name}
        for record in read(source) if left else ():
            if record.row in left:
                left.discard(record.row)
                columns, changed = other_columns(record.value or {}, ("prompt",))
                notes |= dict.fromkeys(changed)
                for place, number in wanted[name, record.row]:
                    found[place] = _preference_prompt(record, number), columns
            if not left:
                break
    return found


def trained_on(pairs: pa.Table, config: Config, training: DataConfig) -> int:
    """Count the ``pairs`` evaluated by ``config`` whose prompt is also in the training data of ``training``.

    Pairs that the filter of ``training`` removes count as trained on.

    Raises:
        DataError: if one of the sources cannot be read.
    """
    questions: dict[bytes, bytes] = {}
    for source in training.train:
        for record in read_records(source):
            questions |= {prompt_digest(prompt): question_digest(prompt) for prompt in _prompts(record)}
    digests = list(questions)
    stay = np.ones(len(digests), bool)
    if training.eval is not None and training.eval.fraction is not None:
        stay &= ~held_out(digests, training.eval.fraction)
    if training.fraction < 1:
        stay &= kept(digests, training.fraction, training.fraction_seed)
    known = {questions[digest] for digest, stays in zip(digests, stay, strict=True) if stays}
    asked = {
        f"{name}:{record.row}" + (f"#{number}" if number else "")
        for name, source in sources_of(config).items()
        for record in read_records(source)
        for number, prompt in enumerate(_prompts(record))
        if question_digest(prompt) in known
    }
    return sum(pair_id in asked for pair_id in pairs["pair_id"].to_pylist())


def _prompts(record: Record) -> list[Text]:
    try:
        return [preference.prompt for preference in normalise(record.value or {})]
    except Malformed:
        return []


def _preference_prompt(record: Record, number: int) -> Text:
    try:
        return normalise(record.value or {})[number].prompt
    except (Malformed, IndexError):  # the file has changed since it was loaded
        raise ConfigError(f"{record.where} has changed since the evaluation began; run it again") from None
