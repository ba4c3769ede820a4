"""Columns beside a pair: the system message, what may belong to the prompt or to an answer, and what is not read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from raydpo.data.messages import Notes, Text, content_text, from_text, names_media, role_of

__all__ = ["BESIDE", "PROMPTS", "asking", "look_beside", "may_be_prompt", "possible_prompts"]

PROMPTS = ("context", "question", "instruction", "query", "problem", "history", "input")
"""Columns that hold the prompt if there is no column of that name."""
BESIDE = (*PROMPTS, "passage", "passages", "document", "documents", "docs", "background", "evidence", "knowledge")
"""Columns of which even one word may belong to the prompt."""
_SYSTEM = re.compile(r"sys(tem)?([_\- ]?(prompt|message|instructions?|text|content))?", re.IGNORECASE)
"""Columns whose text is a system message."""
_ASKING = {"prompt", "question", "ask", "task", "request", "query", "instruction", "problem"}
"""Words in names of columns that may be the prompt though another one was read as such."""
_LAST_OF_META = frozenset({
    "id", "ids", "uuid", "hash", "source", "dataset", "data_source", "subset", "split", "category", "topic", "type",
    "task", "domain", "subject", "lang", "language", "license", "author", "user", "date", "timestamp", "url", "name",
    "tag", "tags", "label", "labels", "model", "generator", "annotator", "turns", "comment", "note",
})  # fmt: skip
"""Last words of names of columns that describe a record and are no part of it."""
_ANY_OF_META = frozenset({
    "id", "meta", "metadata", "model", "models", "judge", "judges", "judgement", "judgment", "verdict", "preference",
    "preferences", "annotation", "annotations", "annotator", "rating", "ratings", "score", "scores", "reward", "rewards",
    "feedback", "critique", "critiques", "rationale", "explanation", "justification", "evaluation", "safety", "quotes",
    "generator", "winner", "labels", "license", "timestamp", "info",
})  # fmt: skip
"""Words anywhere in such names."""
_LAST_OF_ANSWERS = frozenset({
    "answer", "answers", "response", "responses", "completion", "completions", "output", "outputs", "generation",
    "generations", "candidate", "candidates", "chosen", "rejected", "target", "truth", "solution", "gold",
})  # fmt: skip
"""Last words of names of columns and fields that hold further answers."""
_FIELDS_OF_META = frozenset(("role", "from", "type", "key", "format", "index", "title_id"))


def look_beside(
    record: Mapping[str, Any], present: tuple[str, ...], used: tuple[str, ...], read: tuple[Text, ...], notes: Notes
) -> tuple[str | None, tuple[str, ...]]:
    """Return the text of the system column, or None; and the columns that hold data and are neither read nor warned of.

    A column is warned of if it holds a text that the model does not read, unless its name says that it describes the record
    or holds further answers.

    Args:
        used: columns that were read.
        read: the prompt, and the answer or answers.
    """
    systems, beside, others = _sorted(present, used)
    system = _system(record, systems, notes) if systems else None
    texts: list[str] = []
    for name in beside:
        if record[name]:
            texts = texts or [*_said(read[0])]
            chat = not isinstance(read[0], str)
            if any(not _occurs(text, texts, chat and turn) for text, turn in _leaves(record[name])):
                notes[
                    f"warning: {name!r} is not read, though it may belong to the prompt: write it into the prompt, or drop "
                    "the column"
                ] = None
    unused = []
    warned = [note for note in notes if note.startswith("warning: ")]
    for name, describes in others:
        value = record[name]
        if not (isinstance(value, (str, list, dict, bytes)) and value):
            continue
        if not describes and not any(repr(name) in note for note in warned):
            if names_media(value):
                notes[
                    f"warning: {name!r} is not read, though it names an image, audio or video: only text is read. Remove "
                    "the records that need it, or drop the column"
                ] = None
                continue
            if _unread(value, read):
                notes[
                    f"warning: {name!r} is not read, though its text may belong to the prompt or to an answer: write it "
                    "there, or drop the column"
                ] = None
                continue
        unused.append(name)
    return system, tuple(unused)


@lru_cache(maxsize=4096)
def _sorted(
    present: tuple[str, ...], used: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[str, bool], ...]]:
    """The columns of a system message, those that may belong to the prompt, and the others, each with whether it describes
    the record."""
    systems = tuple(filter(_SYSTEM.fullmatch, present))
    beside = tuple(name for name in present if name.lower() in BESIDE and name not in used)
    return systems, beside, tuple((name, _describes(name)) for name in _others(present, used))


@lru_cache(maxsize=4096)
def _others(present: tuple[str, ...], used: tuple[str, ...]) -> tuple[str, ...]:
    known = {"prompt", "chosen", "rejected", "tools", "chat_template_kwargs", *used}
    return tuple(
        name for name in present if name not in known and name.lower() not in BESIDE and not _SYSTEM.fullmatch(name)
    )


def _words(name: str) -> list[str]:
    """The words of a name, without a number or a letter at its end."""
    words = re.findall(r"[^\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    while len(words) > 1 and (len(words[-1]) == 1 or words[-1].isdecimal()):
        words.pop()
    return words


@lru_cache(maxsize=4096)
def _describes(name: str) -> bool:
    """Whether the name of a column or field says that it is no part of a prompt or of the answers of a pair."""
    words = _words(name)
    if not words:
        return False
    last = words[-1].rstrip("0123456789")
    return (
        name.lower() in _FIELDS_OF_META
        or last in _LAST_OF_META
        or last in _LAST_OF_ANSWERS
        or not _ANY_OF_META.isdisjoint(words)
    )


def _system(record: Mapping[str, Any], names: tuple[str, ...], notes: Notes) -> str | None:
    """The text of the first column with a system message. Notes name the others that say something else."""
    found: dict[str, str] = {}
    for name in names:
        text = _system_text(record[name])
        if text is not None:
            found[name] = text
        elif record[name] and not (isinstance(record[name], str) and not record[name].strip()):
            notes[
                f"warning: {name!r} is not read, since it is neither text nor one system message: write it as one text"
            ] = None
    first, *others = found or [None]
    for name in others:
        if found[name].strip() not in found[first]:
            notes[f"warning: {name!r} is not read, since {first!r} is: write both into one column"] = None
    return None if first is None else found[first]


def _system_text(value: Any) -> str | None:
    """The text of a system message: text, a message, or a list of one of them."""
    if isinstance(value, str):
        said = from_text(value) if value[:1] in ("[", "{") else None
        return (value if value.strip() else None) if said is None else _system_text(said)
    if isinstance(value, list):
        return _system_text(value[0]) if len(value) == 1 else None
    if isinstance(value, Mapping) and role_of(value) in ("system", "developer"):
        text = content_text({"content": value.get("content", value.get("value"))})
        return text if text.strip() else None
    return None


def _said(text: Text) -> Iterator[str]:
    """All texts of a prompt or an answer."""
    if isinstance(text, str):
        yield text
        return
    for message in text:
        content = message.get("content")
        yield content if type(content) is str else content_text(message)
        for name in message:
            if name not in ("role", "content"):
                yield from (leaf for leaf, _ in _leaves(message[name]))


def _leaves(value: Any, depth: int = 0) -> Iterator[tuple[str, bool]]:
    """All texts inside ``value`` but those of fields that describe it, each with whether it is one of several turns."""
    if isinstance(value, str):
        if value.strip():
            yield value.strip(), depth > 1
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            if not isinstance(name, str) or not _describes(name):
                yield from _leaves(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _leaves(entry, depth + 1)


def _occurs(part: str, texts: Iterable[str], whole: bool = False) -> bool:
    """Whether ``part`` stands in one of ``texts``, without regard to white space.

    Args:
        whole: a single word must be all of a text.
    """
    if whole and len(part.split(maxsplit=1)) < 2:
        return any(part == text.strip() for text in texts)
    if any(part in text for text in texts):
        return True
    bare = "".join(part.split())
    return any(bare in "".join(text.split()) for text in texts)


def _unread(value: Any, read: tuple[Text, ...]) -> bool:
    """Whether ``value`` holds a text of several words that the model does not read."""
    if isinstance(value, list) and len(value) > 1 and role_of(value[-1]) == "assistant":
        value = value[:-1]  # another answer
    wanted = [leaf for leaf, _ in _leaves(value) if len(leaf.split(maxsplit=1)) > 1]
    if not wanted:
        return False
    texts = [text for part in read for text in _said(part)]
    lost = [leaf for leaf in wanted if not _occurs(leaf, texts)]
    # A text that holds all of the prompt and of an answer is the pair in another form.
    prompt, *answers = ([said.strip() for said in _said(part)] for part in read)
    return any(
        not (all(said in leaf for said in prompt) and any(all(said in leaf for said in answer) for answer in answers))
        for leaf in lost
    )


# -- which column is the prompt -------------------------------------------------------------------------------------------


def may_be_prompt(value: Any) -> bool:
    """Whether ``value`` is a text or a list of messages."""
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, list) and bool(value) and all(role_of(message) is not None for message in value)


def possible_prompts(record: Mapping[str, Any], present: tuple[str, ...]) -> tuple[str, ...]:
    """Return the columns of unknown names that hold messages, or a text of several words, and so may be the prompt."""
    return tuple(
        name
        for name in _others(present, ())
        if may_be_prompt(record[name])
        and not (isinstance(record[name], str) and len(record[name].split(maxsplit=1)) < 2)
        and name.lower().replace("-", "_").rsplit("_", 1)[-1] not in _LAST_OF_META
    )


def asking(record: Mapping[str, Any], present: tuple[str, ...], one_word: bool) -> list[str]:
    """Return columns that may be the prompt though another was read as such: their names say so, or that one holds one
    word."""
    found = []
    for name in _others(present, ()):
        words = _words(name) or [name]
        if words[-1] in _LAST_OF_META and words != ["task"]:
            continue
        several = isinstance(record[name], str) and len(record[name].split(maxsplit=1)) > 1
        named = words != ["task"] and not _ASKING.isdisjoint(words) and may_be_prompt(record[name])
        if named or (one_word and several):
            found.append(name)
    return found
