"""Lists of messages: check them, and read those of other tools (from/value, other roles, JSON text)."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

__all__ = [
    "CONVERSATIONS",
    "ROLES",
    "Malformed",
    "Message",
    "Notes",
    "Text",
    "answer",
    "check_media",
    "content_text",
    "from_text",
    "is_plain",
    "messages",
    "role_of",
    "says_something",
]

Message = dict[str, Any]
"""``role``, ``content`` and further fields."""
Text = str | list[Message]
"""A prompt or an answer: text, or messages."""
Notes = dict[str, None]
"""How a record was understood, one sentence each, in order. Those that begin with ``warning:`` need attention."""
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "environment")
"""Roles of messages that chat templates know."""
CONVERSATIONS = ("messages", "conversations", "conversation")
"""Names of columns that hold a conversation."""
_OTHER_ROLES = {
    **dict.fromkeys(("human", "prompter", "instruction"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "ai", "bot", "model", "chatbot", "bard", "bing"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("observation", "tool_response", "function_response"), "tool"),
}
"""Roles that other tools write, and ours."""
_CALLS = ("function_call", "tool_call")
"""Roles of messages whose text is a call as JSON."""
_MEDIA = {
    **{name: "an image" for word in ("image", "img", "picture", "photo") for name in (word, f"{word}s")},
    **dict.fromkeys(("image_url", "image_urls", "input_image", "image_path", "image_paths", "pixel_values"), "an image"),
    **dict.fromkeys(("image_file", "image_files", "image_bytes", "image_base64"), "an image"),
    **dict.fromkeys(("audio", "audios", "audio_url", "audio_path", "input_audio"), "audio"),
    **dict.fromkeys(("video", "videos", "video_url", "video_path", "input_video"), "a video"),
}
"""Names of columns, of parts and of their types, and what they hold."""
_MEDIA_SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".gif",
    ".webp",
    ".bmp",
    ".tiff",
    ".wav",
    ".mp3",
    ".flac",
    ".ogg",
    ".mp4",
    ".webm",
)
_FILES = {"file": "a file", "input_file": "a file"}
_START = re.compile(r'\s*"?\s*[\[{]')
"""Beginning of JSON that may hold messages."""


class Malformed(Exception):
    """A record that is no valid preference. The message is a short reason, the same for all records with the same fault."""


def check_media(record: Mapping[str, Any], present: tuple[str, ...]) -> None:
    """Refuse a record with images, audio or video in a column of its own.

    Raises:
        Malformed: with the column's name.
    """
    for column, kind in _media_columns(present):
        if isinstance(record[column], (str, bytes, list, dict)) and record[column]:
            raise Malformed(f"column {column!r} holds {kind}, and only text is read")
    for column in present:
        value = record[column]
        if type(value) is list and value:
            value = value[0]
        if type(value) is dict and ("bytes" in value or "path" in value) and _is_file(value):
            raise Malformed(f"column {column!r} holds a file (an image, audio or video), and only text is read")


@lru_cache(maxsize=4096)
def _media_columns(present: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple((column, _MEDIA[column.lower()]) for column in present if column.lower() in _MEDIA)


def _is_file(value: dict[str, Any]) -> bool:
    """Whether a value is a file as columns of type Image and Audio hold it: bytes, or a path of such a file."""
    path = value.get("path")
    return isinstance(value.get("bytes"), bytes) or (
        value.keys() <= {"bytes", "path"} and isinstance(path, str) and path.lower().endswith(_MEDIA_SUFFIXES)
    )


def answer(value: Any, name: str, notes: Notes) -> list[Message]:
    """Messages of an answer. Text and a single message become a list of one."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    return messages([value] if isinstance(value, Mapping) else value, name, notes)


def messages(value: Any, name: str, notes: Notes) -> list[Message]:
    """A list of messages, checked, without fields of messages and parts that are null, with our names of fields and roles.

    Raises:
        Malformed: if it is no list of messages, is empty, or holds images, audio or video.
    """
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise Malformed(f"{name} is neither text nor messages")
    if not value:
        raise Malformed(f"{name} is empty")
    found = []
    for message in value:
        content = message.get("content")
        if type(content) is str and len(message) == 2 and message.get("role") in ROLES and type(message) is dict:
            found.append(message)  # nothing to translate, check or leave out
            continue
        if message.get("role") not in ROLES:
            message = _translated(message, name, notes)
            content = message.get("content")
        if (content is None or len(message) > 2) and message.get("function_call") is not None:
            _check_call(message, name)
        elif not isinstance(content, (str, list)) and not message.get("tool_calls"):
            more = [key[:30] for key, entry in message.items() if entry and key not in ("role", "content")]
            raise Malformed(
                f"{name} has a message without content"
                + (f", only with {', '.join(map(repr, more[:3]))}: write its text into content" if more else "")
            )
        if isinstance(content, list):
            _check_parts(content, name)
            if any(isinstance(part, Mapping) and None in part.values() for part in content):
                message = {**message, "content": [_without_nulls(part) for part in content]}
        if not _MEDIA.keys().isdisjoint(message):
            _check_parts([{key: entry for key, entry in message.items() if key in _MEDIA and entry}], name)
        found.append({key: entry for key, entry in message.items() if entry is not None})
    return found


def _check_call(message: Mapping[str, Any], name: str) -> None:
    """Check the call of a function in OpenAI's older form, which ``ChatTemplate`` gives to templates as a tool call."""
    call = message["function_call"]
    if message.get("tool_calls"):
        raise Malformed(f"{name} has a message with both function_call and tool_calls; write tool_calls alone")
    if not (
        isinstance(call, Mapping)
        and isinstance(call.get("name"), str)
        and isinstance(call.get("arguments"), (str, Mapping, type(None)))
    ):
        raise Malformed(f"{name} has a function_call that is not an object with name and arguments; write tool_calls")


def is_plain(value: Any) -> bool:
    """Whether a value is a list of messages that have a role and text as content, and nothing else."""
    if type(value) is not list or not value:
        return False
    for message in value:
        if (
            type(message) is not dict
            or len(message) != 2
            or type(message.get("content")) is not str
            or message.get("role") not in ROLES
        ):
            return False
    return True


def _translated(message: Mapping[str, Any], name: str, notes: Notes) -> Mapping[str, Any]:
    """A message whose fields or role have the names of another tool."""
    renamed = message.get("role") is None and "from" in message and "value" in message
    role = message["from"] if renamed else message.get("role")
    known = role_of(message)
    if known is None:
        wanted = f"none of {', '.join(ROLES[:5])}"
        if not isinstance(role, str):
            found = ", ".join(repr(key[:30]) for key in sorted(map(str, message))[:5])
            raise Malformed(f"{name} has a message whose role is {wanted}: it has the fields {found}")
        raise Malformed(f"{name} has a message whose role is {wanted}, but {role[:30]!r}")
    if role.lower() in _CALLS:
        content = message["value"] if renamed else message.get("content")
        notes[f"role {role!r} read as tool calls of the assistant"] = None
        calls = _calls(content, f"{name} has a message of role {role!r}")
        rest = {key: entry for key, entry in message.items() if key not in ("from", "value", "role", "content")}
        return {"role": known, "content": "", "tool_calls": calls} | rest
    if renamed:
        notes["messages with 'from' and 'value' read as 'role' and 'content'"] = None
        rest = {key: entry for key, entry in message.items() if key not in ("from", "value", "role")}
        return {"role": known, "content": message["value"]} | rest
    notes[f"role {role!r} read as {known!r}"] = None
    return {**message, "role": known}


def _calls(content: Any, where: str) -> list[dict[str, Any]]:
    """The tool calls in the JSON text of a message whose role says that it is a call, as LLaMA-Factory writes them."""
    try:
        value = json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError):
        value = None
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        raise Malformed(f"{where} that is not JSON of a call, an object with name and arguments; write tool_calls")
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments") or {}}} for call in calls
    ]


def role_of(message: Any) -> str | None:
    """The role of a message of ours or of another tool; None if it is not known."""
    if not isinstance(message, Mapping):
        return None
    role = message.get("role")
    role = message.get("from") if role is None else role
    if not isinstance(role, str):
        return None
    role = role.lower()
    return role if role in ROLES else _OTHER_ROLES.get(role)


def _without_nulls(part: Any) -> Any:
    """A part without fields that are null. Templates ask whether a part has a field ``image``, not what it holds."""
    return {key: entry for key, entry in part.items() if entry is not None} if isinstance(part, Mapping) else part


def _check_parts(parts: list[Any], name: str) -> None:
    for part in parts:
        if not isinstance(part, Mapping):
            continue
        kind = part.get("type")
        held = (_MEDIA | _FILES).get(kind) if isinstance(kind, str) else None
        for key, entry in part.items():
            if held is None and kind != "text" and entry:
                held = _MEDIA.get(key)
        if held is not None:
            raise Malformed(f"{name} has a message with {held}, and only text is read")


def from_text(text: str) -> list[Any] | None:
    """The messages in a text that is nothing but a JSON list of messages, an object ``{"messages": [...]}`` with nothing
    else, or one message; else None.

    JSON within JSON text and a list as Python prints it are read, too.
    """
    if not _START.match(text):
        return None
    value: Any = text
    for _ in range(2):
        if isinstance(value, str):
            value = _parsed(value)
    if isinstance(value, Mapping):
        value = value[next(iter(value))] if len(value) == 1 and value.keys() <= set(CONVERSATIONS) else [value]
    return value if isinstance(value, list) and value and all(map(_is_message, value)) else None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if not re.match(r"\s*\[?\s*\{\s*'", text):
        return None
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def _is_message(value: Any) -> bool:
    return role_of(value) is not None and bool(
        {"content", "tool_calls"} & value.keys() if value.get("role") is not None else "value" in value
    )


def says_something(said: str | list[Message]) -> bool:
    """Whether an answer holds any text, or calls a tool."""
    if isinstance(said, str):
        return bool(said.strip())
    for message in said:
        content = message.get("content")
        if (content.strip() if type(content) is str else _any_content(content)) or (
            message.get("tool_calls") or message.get("function_call")
        ):
            return True
    return False


def _any_content(content: Any) -> bool:
    if not isinstance(content, list):
        return bool(str(content or "").strip())
    return any(
        bool(str(part.get("text") or "").strip()) or part.get("type", "text") != "text" if isinstance(part, dict) else part
        for part in content
    )


def content_text(message: Message) -> str:
    """Return the text of a message, without images and other parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return "" if content is None else str(content)
