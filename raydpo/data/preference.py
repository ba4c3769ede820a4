"""Normalise one record of any format to preferences: prompt, chosen and rejected, as text or as messages."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

__all__ = ["Malformed", "Preference", "as_text", "content_text", "normalise"]

Message = dict[str, Any]
Text = str | list[Message]
_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "environment")
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
# A row must not decide how it is rendered and tokenised; 'chat_template' would even be code.
_RESERVED = frozenset({
    "conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs", "sanitize_control_tokens",
})  # fmt: skip


class Malformed(Exception):
    """A record that is no valid preference. The message is a short reason, the same for all records with the same fault."""


@dataclass(frozen=True)
class Preference:
    """``chosen`` is preferred to ``rejected`` as an answer to ``prompt``. All three are text, or all three are lists of
    messages.

    ``numbers`` are the values of the columns that ``normalise`` was asked for, such as a weight.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    numbers: tuple[float, ...] = ()

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompt, str)

    @property
    def several_turns(self) -> bool:
        """Whether a completion continues beyond the assistant's turn; its user or tool messages are then trained on, too."""
        return self.conversational and any(
            message["role"] != "assistant" for answer in (self.chosen, self.rejected) for message in answer
        )


def normalise(record: Mapping[str, Any], numbers: Sequence[str] = ()) -> list[Preference]:
    """The preferences in one record; several if it ranks or scores several completions.

    Formats: prompt, chosen, rejected as text; as messages (chosen and rejected may be the text of one assistant message, and
    may repeat the prompt); messages whose prompt is implicit, the common start of chosen and rejected; HH-RLHF's
    transcripts; a prompt (or ``context``) with ``completions`` and their ranks (lower is better) or scores (higher is
    better), best pairs first. ``tools`` and ``chat_template_kwargs`` may be JSON text.

    Args:
        numbers: columns with a number for each record, to be returned with its preferences.

    Raises:
        Malformed: with the reason.
    """
    tools = _json(record.get("tools"), "tools", list)
    kwargs = _json(record.get("chat_template_kwargs"), "chat_template_kwargs", dict) or {}
    for key in sorted(_RESERVED & kwargs.keys()):
        raise Malformed(f"chat_template_kwargs must not set {key!r}")
    prompt = record.get("prompt")
    prompt = record.get("context") if prompt is None else prompt
    if record.get("completions") is not None:
        pairs = _ranked(prompt, record)
    else:
        for name in ("chosen", "rejected"):
            if record.get(name) is None:
                raise Malformed(f"missing column {name!r}")
        pairs = [(prompt, record["chosen"], record["rejected"])]
    found = tuple(_number(record, column) for column in numbers)
    return [Preference(*_parts(*pair), tools=tools, template_kwargs=kwargs, numbers=found) for pair in pairs]


def _number(record: Mapping[str, Any], column: str) -> float:
    value = record.get(column)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise Malformed(f"{column!r} is missing or no number")
    return float(value)


def _parts(prompt: Any, chosen: Any, rejected: Any) -> tuple[Text, Text, Text]:
    """Prompt, chosen and rejected, validated, all as text or all as messages."""
    if prompt is None:
        prompt, chosen, rejected = _implicit(chosen, rejected)
    elif isinstance(prompt, str) and (isinstance(chosen, list) or isinstance(rejected, list)):
        prompt, chosen, rejected = _text_beside_messages(prompt, chosen, rejected)
    if isinstance(prompt, str):
        if not prompt.strip():
            raise Malformed("prompt is empty")
        for answer, name in ((chosen, "chosen"), (rejected, "rejected")):
            if not isinstance(answer, str):
                raise Malformed(f"{name} is neither text nor messages")
    else:
        prompt = _messages(prompt, "prompt")
        if prompt[-1]["role"] == "assistant":
            raise Malformed("the last message of prompt is the assistant's")
        chosen, rejected = _answer(chosen, "chosen"), _answer(rejected, "rejected")
        if all(answer[: len(prompt)] == prompt for answer in (chosen, rejected)):
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    for answer, name in ((chosen, "chosen"), (rejected, "rejected")):
        if not _says_something(answer):
            raise Malformed(f"{name} is empty")
        if not isinstance(answer, str) and answer[0]["role"] != "assistant":
            raise Malformed("chosen and rejected do not begin with the assistant after the prompt")
    if chosen == rejected:
        raise Malformed("chosen equals rejected")
    return prompt, chosen, rejected


def _implicit(chosen: Any, rejected: Any) -> tuple[Text, Text, Text]:
    """Split off the common messages as the prompt, like TRL's extract_prompt."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        if not (_TURN.match(chosen) and _TURN.match(rejected)):
            raise Malformed("missing column 'prompt'")
        chosen, rejected = _transcript(chosen), _transcript(rejected)
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        raise Malformed("missing column 'prompt'")
    chosen, rejected = _messages(chosen, "chosen"), _messages(rejected, "rejected")
    if chosen == rejected:
        raise Malformed("chosen equals rejected")
    common, shorter = 0, min(len(chosen), len(rejected))
    while common < shorter and chosen[common] == rejected[common]:
        common += 1
    while common == shorter and common and chosen[common - 1]["role"] == "assistant":
        common = shorter = common - 1  # one is the start of the other: keep its last answer as the completion
    if not common:
        raise Malformed("chosen and rejected have no prompt in common")
    return chosen[:common], chosen[common:], rejected[common:]


def _text_beside_messages(prompt: str, chosen: Any, rejected: Any) -> tuple[Text, Text, Text]:
    """A text prompt beside message lists is the user's message, or repeats one that the lists contain."""
    chosen, rejected = _answer(chosen, "chosen"), _answer(rejected, "rejected")
    if not prompt.strip():
        raise Malformed("prompt is empty")
    if chosen[0]["role"] == "assistant" and rejected[0]["role"] == "assistant":
        return [{"role": "user", "content": prompt}], chosen, rejected
    shared, chosen, rejected = _implicit(chosen, rejected)
    if not any(str(message.get("content")).strip() == prompt.strip() for message in shared):
        raise Malformed("prompt is text that the messages of chosen and rejected do not share")
    return shared, chosen, rejected


def _transcript(text: str) -> list[Message]:
    """HH-RLHF's ``\\n\\nHuman: ...\\n\\nAssistant: ...`` as messages."""
    pieces = _TURN.split(text)[1:]
    return [
        {"role": "user" if speaker == "Human" else "assistant", "content": said.strip()}
        for speaker, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def _ranked(prompt: Any, record: Mapping[str, Any]) -> list[tuple[Any, Any, Any]]:
    """All pairs of completions of strictly different rank."""
    if prompt is None:
        raise Malformed("missing column 'prompt'")
    entries = record["completions"]
    if not isinstance(entries, list) or len(entries) < 2:
        raise Malformed("completions is not a list of two or more")
    places = _places(entries, record)
    answers = [
        next((entry[key] for key in ("completion", "response", "content") if entry.get(key) is not None), None)
        if isinstance(entry, Mapping) and "role" not in entry
        else entry
        for entry in entries
    ]
    best_first = sorted(range(len(answers)), key=places.__getitem__)
    pairs = [
        (prompt, answers[better], answers[worse])
        for better, worse in combinations(best_first, 2)
        if places[better] < places[worse] and answers[better] != answers[worse]
    ]
    if not pairs:
        raise Malformed("no completion is better than another")
    return pairs


def _places(entries: list[Any], record: Mapping[str, Any]) -> list[float]:
    """One number per completion, lower is better."""
    for column, key, sign in (("ranks", "rank", 1), ("scores", "score", -1)):
        values = record.get(column)
        if values is None and all(isinstance(entry, Mapping) and entry.get(key) is not None for entry in entries):
            values = [entry[key] for entry in entries]
        if values is None:
            continue
        if not isinstance(values, Sequence) or len(values) != len(entries):
            raise Malformed(f"completions and {column} differ in number")
        try:
            numbers = [sign * float(value) for value in values]
        except (TypeError, ValueError):
            numbers = [math.nan]
        if any(math.isnan(number) for number in numbers):
            raise Malformed(f"{column} are not all numbers")
        return numbers
    raise Malformed("completions have neither ranks nor scores")


def _answer(value: Any, name: str) -> list[Message]:
    """Messages of an answer. Text and a single message become a list of one."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    return _messages([value] if isinstance(value, Mapping) else value, name)


def _messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise Malformed(f"{name} is neither text nor messages")
    if not value:
        raise Malformed(f"{name} is empty")
    messages = []
    for message in value:
        if message.get("role") not in _ROLES:
            raise Malformed(f"{name} has a message whose role is none of {', '.join(_ROLES[:5])}")
        if not isinstance(message.get("content"), (str, list)) and not message.get("tool_calls"):
            raise Malformed(f"{name} has a message without content")
        messages.append({key: entry for key, entry in message.items() if entry is not None})
    return messages


def _says_something(answer: Text) -> bool:
    if isinstance(answer, str):
        return bool(answer.strip())
    return any(message.get("tool_calls") or str(message.get("content") or "").strip() for message in answer)


def _json(value: Any, name: str, kind: type) -> Any:
    """A value that data sets store either directly or as JSON text; None if empty."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            raise Malformed(f"{name} is not valid JSON") from None
    if value is not None and not isinstance(value, kind):
        raise Malformed(f"{name} is not a JSON {'list' if kind is list else 'object'}")
    return value or None


def as_text(prompt: Text) -> str:
    """Return a prompt as text; a conversation as ``role: content`` paragraphs."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {content_text(message)}" for message in prompt)


def content_text(message: Message) -> str:
    """Return the text of a message, without images and other parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return "" if content is None else str(content)
