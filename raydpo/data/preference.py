"""One record of any format as preferences: prompt, chosen and rejected, as text or as messages."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

__all__ = ["Malformed", "Preference", "normalise"]

Message = dict[str, Any]
Text = str | list[Message]
_ROLES = ("system", "developer", "user", "assistant", "tool")
_TURN = re.compile(r"\n\n(Human|Assistant):")


class Malformed(Exception):
    """A record that is no preference; the message is a short reason, the same for all records with the same fault."""


@dataclass(frozen=True)
class Preference:
    """chosen is preferred to rejected as an answer to prompt. All three are text, or all three are lists of messages."""

    prompt: Text
    chosen: Text
    rejected: Text
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompt, str)


def normalise(record: Mapping[str, Any]) -> list[Preference]:
    """The preferences in one record; more than one where it ranks or scores several completions.

    Formats: prompt, chosen, rejected as text; as messages (chosen and rejected may be the text of one assistant message);
    messages with the prompt implicit, as what chosen and rejected have in common; HH-RLHF's transcripts; a prompt with
    ``completions`` and their ranks (lower is better) or scores (higher is better).

    Raises:
        Malformed: with the reason.
    """
    extras = {"tools": _json(record.get("tools"), "tools", list),
              "template_kwargs": _json(record.get("chat_template_kwargs"), "chat_template_kwargs", dict) or {}}
    prompt = record.get("prompt", record.get("context"))
    if record.get("completions") is not None:
        pairs = _ranked(prompt, record)
    else:
        for name in ("chosen", "rejected"):
            if record.get(name) is None:
                raise Malformed(f"missing column {name!r}")
        pairs = [(prompt, record["chosen"], record["rejected"])]
    return [_preference(*pair, extras) for pair in pairs]


def _preference(prompt: Any, chosen: Any, rejected: Any, extras: dict[str, Any]) -> Preference:
    if prompt is None:
        prompt, chosen, rejected = _implicit(chosen, rejected)
    if isinstance(prompt, str):
        if not (isinstance(chosen, str) and isinstance(rejected, str)):
            raise Malformed("prompt is text, but chosen or rejected is not")
        if not prompt:
            raise Malformed("prompt is empty")
    else:
        prompt = _messages(prompt, "prompt")
        if prompt[-1]["role"] == "assistant":
            raise Malformed("the last message of prompt is the assistant's")
        chosen, rejected = (_messages([{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer, name)
                            for answer, name in ((chosen, "chosen"), (rejected, "rejected")))
    for answer, name in ((chosen, "chosen"), (rejected, "rejected")):
        if not _says_something(answer):
            raise Malformed(f"{name} is empty")
    if chosen == rejected:
        raise Malformed("chosen equals rejected")
    return Preference(prompt, chosen, rejected, **extras)


def _implicit(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    if isinstance(chosen, str) and isinstance(rejected, str):
        if not (_TURN.match(chosen) and _TURN.match(rejected)):
            raise Malformed("missing column 'prompt'")
        chosen, rejected = _transcript(chosen), _transcript(rejected)
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        raise Malformed("missing column 'prompt'")
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    # The answers themselves may begin alike (or be a prefix of each other); the prompt ends where the assistant is asked.
    while common and _role(chosen[common - 1]) == "assistant":
        common -= 1
    if not common:
        raise Malformed("chosen and rejected have no prompt in common")
    if common == len(chosen) or common == len(rejected):
        raise Malformed("chosen or rejected has nothing after the prompt")
    return chosen[:common], chosen[common:], rejected[common:]


def _transcript(text: str) -> list[Message]:
    """HH-RLHF's ``\\n\\nHuman: ...\\n\\nAssistant: ...`` as messages."""
    pieces = _TURN.split(text)[1:]
    return [{"role": "user" if speaker == "Human" else "assistant", "content": said.strip()}
            for speaker, said in zip(pieces[::2], pieces[1::2], strict=True)]


def _ranked(prompt: Any, record: Mapping[str, Any]) -> list[tuple[Any, Any, Any]]:
    if prompt is None:
        raise Malformed("missing column 'prompt'")
    answers = list(record["completions"])
    if record.get("scores") is not None:
        order = [-float(score) for score in record["scores"]]
    elif record.get("ranks") is not None:
        order = [float(rank) for rank in record["ranks"]]
    else:
        try:
            if all("rank" in answer for answer in answers):
                order = [float(answer["rank"]) for answer in answers]
            else:
                order = [-float(answer["score"]) for answer in answers]
        except (TypeError, KeyError, ValueError):
            raise Malformed("completions have neither ranks nor scores") from None
    answers = [answer.get("completion", answer.get("content")) if isinstance(answer, Mapping) else answer
               for answer in answers]
    if len(order) != len(answers):
        raise Malformed("completions and their ranks or scores differ in number")
    ranked = sorted(range(len(answers)), key=lambda index: order[index])
    pairs = [(prompt, answers[better], answers[worse]) for better, worse in combinations(ranked, 2)
             if order[better] < order[worse]]
    if not pairs:
        raise Malformed("no completion is better than another")
    return pairs


def _messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise Malformed(f"{name} is neither text nor messages")
    messages = []
    for message in value:
        if not isinstance(message, Mapping) or _role(message) not in _ROLES:
            raise Malformed(f"{name} has a message without a known role")
        if message.get("content") is None and not message.get("tool_calls"):
            raise Malformed(f"{name} has a message without content")
        # Parquet gives every message every field that any message has.
        messages.append({key: entry for key, entry in message.items() if entry is not None})
    return messages


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None


def _says_something(answer: Text) -> bool:
    if isinstance(answer, str):
        return bool(answer.strip())
    return any(message.get("tool_calls") or str(message.get("content", "")).strip() for message in answer)


def _json(value: Any, name: str, kind: type) -> Any:
    """A value that data sets store either as it is or as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError:
            raise Malformed(f"{name} is not valid JSON") from None
    if value is not None and not isinstance(value, kind):
        raise Malformed(f"{name} is not a {kind.__name__}")
    return value or None
