"""Records of one completion with a label, good or bad, in place of a pair."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raydpo.data.choices import two_answers
from raydpo.data.messages import CONVERSATIONS, Malformed, Message, Notes, from_text
from raydpo.data.nearest import quoted

__all__ = ["labelled", "split_conversation"]

_TAG = "kto_tag"
"""Name of the label in LLaMA-Factory's data, beside any of the answers."""
_ANSWERS = ("completion", "response", "answer", "output")
"""Columns of the completion. Beside a column ``label``, which may mean anything, only the first is read."""
_RIVALS = ("completions", "answers", "responses", "candidates", "rejected_response", "rejected_messages")
"""Columns beside which a column of messages is no completion."""
_REMEDY = "write true for a good completion and false for a bad one (or 1 and 0)"


def labelled(record: Mapping[str, Any], present: tuple[str, ...], notes: Notes) -> tuple[str, Any, tuple[str, ...]] | None:
    """Find the one completion of a record, and its label.

    Returns:
        ``chosen`` for a good completion or ``rejected`` for a bad one; the completion, a text or messages, or a whole
        conversation that ends with it; and the columns used. None if it is no such record.

    Raises:
        Malformed: if the label is no label, or several columns may be the completion.
    """
    label = next((name for name in (_TAG, "label") if name in record), None)
    if label is None:
        return None
    names = [name for name in _ANSWERS[: len(_ANSWERS) if label == _TAG else 1] if name in present]
    if len(names) > 1 and "completion" not in names:
        raise Malformed(f"each of {quoted(names)} may be the completion: name it with the source's 'columns'")
    conversation = next((name for name in CONVERSATIONS if name in present and record[name]), None)
    if not names and (conversation is None or any(name in present for name in _RIVALS) or two_answers(present)):
        return None
    side = "chosen" if _is_good(record[label], label) else "rejected"
    if label == _TAG:
        notes[f"{label!r} read as the label of one completion"] = None
    if names:
        if names[0] != "completion":
            notes[f"{names[0]!r} read as the completion"] = None
        return side, record[names[0]], (names[0], label)
    notes[f"what the assistant says last in {conversation!r} read as the completion, {label!r} as its label"] = None
    value = record[conversation]
    return side, (from_text(value) or value) if isinstance(value, str) else value, (conversation, label)


def _is_good(value: Any, name: str) -> bool:
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    if value is None:
        found = "null"
    elif isinstance(value, str):
        found = f"the text {value!r}" if len(value) <= 12 else "a text"
    else:
        found = "a number other than 0 and 1" if isinstance(value, (int, float)) else "neither a truth value nor a number"
    raise Malformed(f"{name!r}, the label of one completion, is {found}: {_REMEDY}")


def split_conversation(conversation: list[Message]) -> tuple[list[Message], list[Message]]:
    """A conversation as its prompt and its completion: what the assistant says last, in one message or several.

    Raises:
        Malformed: if it does not end with the assistant, or nothing stands before that.
    """
    start = len(conversation)
    while start and conversation[start - 1]["role"] == "assistant":
        start -= 1
    if start == len(conversation):
        raise Malformed("the last message of a labelled conversation is not the assistant's, so nothing has the label")
    if not start:
        raise Malformed("prompt is empty")
    return conversation[:start], conversation[start:]
