"""Lists of messages: check them, and read those of other tools (from/value, other roles, JSON text)."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

__all__ = [
    "CONVERSATIONS",
    "LITERALS",
    "MAY_BE_MEANT",
    "PLACEHOLDERS",
    "RESULTS",
    "ROLES",
    "THOUGHT_PARTS",
    "Malformed",
    "Message",
    "Notes",
    "Text",
    "answer",
    "as_written",
    "check_media",
    "content_text",
    "from_text",
    "is_plain",
    "is_thought",
    "messages",
    "names_media",
    "of_columns",
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
RESULTS = ROLES[4:]
"""Those of them whose messages hold the result of a tool, which may be any JSON."""
THOUGHT_PARTS = ("thinking", "reasoning", "thought")
"""Types of content parts that are thoughts."""
_THOUGHT = re.compile(
    r"reasons?|(\w+_)?(reasoning|thinking|thoughts?|rationale|cot|analysis|scratchpad|monologue)"
    r"(_(content|text|details|steps|process|trace))?|reasoning_?content|chain_?of_?thoughts?",
    re.IGNORECASE,
)
"""Fields of a message or part that hold thoughts; data sets and templates use different names."""
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
_MEDIA_WORDS = {
    *_MEDIA, "pic", "pics", "screenshot", "screenshots", "speech", "sound", "voice", "wav", "clip", "frame", "frames",
}  # fmt: skip
"""Words in names of columns that hold such files, or texts about them."""
_INLINE = ("data:image/", "data:audio/", "data:video/")
"""Beginnings of a file within a text."""
PLACEHOLDERS = ("<image>", "<video>", "<audio>", "<|image|>", "<|audio|>", "<|video|>", "<image_1>", "<image 1>")
"""What stands for an image, audio or video in a text."""
_LONGEST_ADDRESS = 500
_LONGEST_LITERAL = 100_000
_FILES = {"file": "a file", "input_file": "a file"}
_LITERAL = re.compile(r"""\s*(?:[\[{"]|array\()""")
_NUMPY = re.compile(r"""\s*array\(\s*\[|\s*\[\{'(?:role|from)'""")
"""Beginning of what JSON or Python writes, and of an array of messages as numpy prints it."""
_MAY_BE_LITERAL = frozenset('[{"')
MAY_BE_MEANT = ("an object or a list", "a text in quotation marks")
"""What ``as_written`` returns for an answer that may be meant so."""
LITERALS = "the answers are JSON or Python literals, read as text with all signs"
"""Note of a record whose answers are such literals. One record may mean it, so it is told if half of a source does."""
_TEXT_FIELDS = {"text", "content", "value", "answer", "response", "output", "completion", "messages", "message"}
_START = re.compile(r'\s*"?\s*[\[{]')
"""Beginning of JSON that may hold messages."""


class Malformed(Exception):
    """A record that is no valid preference. The message is a short reason, the same for all records with the same fault."""


def check_media(record: Mapping[str, Any], present: tuple[str, ...]) -> None:
    """Refuse a record with images, audio or video in a column of its own.

    Raises:
        Malformed: with the column's name.
    """
    exact, near = _media_columns(present)
    for column, kind in exact:
        value = record[column]
        if isinstance(value, (str, bytes, list, dict)) and value and not (isinstance(value, list) and not any(value)):
            raise Malformed(f"column {column!r} holds {kind}, and only text is read")
    for column in near:
        if names_media(record[column], any_address=True):
            raise Malformed(f"column {column!r} holds an image, audio or a video, and only text is read")
    for column in present:
        value = record[column]
        if type(value) is list and value:
            value = value[0]
        if (type(value) is dict and _is_file(value)) or (type(value) is str and value.startswith(_INLINE)):
            raise Malformed(f"column {column!r} holds a file (an image, audio or video), and only text is read")


def names_media(value: Any, any_address: bool = False) -> bool:
    """Whether ``value``, or the first entry of a list, is the path or address of an image, audio or video.

    Args:
        any_address: whether every address on the web counts, whatever it ends with.
    """
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("url", "path") if value.get(key)), None)
    if not isinstance(value, str) or len(value) > _LONGEST_ADDRESS or len(value.split()) != 1:
        return False
    said = value.lower()
    return said.partition("?")[0].endswith(_MEDIA_SUFFIXES) or (any_address and said.startswith(("http://", "https://")))


@lru_cache(maxsize=4096)
def _media_columns(present: tuple[str, ...]) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """Columns whose names say what they hold, and those with such a word in their names."""
    exact = tuple((column, _MEDIA[column.lower()]) for column in present if column.lower() in _MEDIA)
    words = {column: set(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", column).lower())) for column in present}
    return exact, tuple(column for column in present if not _MEDIA_WORDS.isdisjoint(words[column]))


def _is_file(value: dict[str, Any]) -> bool:
    """Whether a value is a file as columns of type Image and Audio hold it: bytes, samples, or a path of such a file; or a
    content part of one."""
    if "bytes" in value or "path" in value:
        path = value.get("path")
        if isinstance(value.get("bytes"), bytes) or (
            value.keys() <= {"bytes", "path"} and isinstance(path, str) and path.lower().endswith(_MEDIA_SUFFIXES)
        ):
            return True
    kind = value.get("type")
    return ("array" in value and "sampling_rate" in value) or (isinstance(kind, str) and kind in _MEDIA)


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
            if content is not None and message["role"] in RESULTS:
                if not isinstance(content, Mapping):
                    message = {**message, "content": json.dumps(content)}
            elif content is None and message["role"] == "assistant" and _thinks(message):
                message = {**message, "content": ""}
            elif content is not None:
                kind = "an object" if isinstance(content, Mapping) else "a number or truth value"
                raise Malformed(f"{name} has a message whose content is {kind}: write it as text")
            else:
                more = [key[:30] for key, entry in message.items() if entry and key not in ("role", "content")]
                raise Malformed(
                    f"{name} has a message without content"
                    + (f", only with {', '.join(map(repr, more[:3]))}: write its text into content" if more else "")
                )
        if "tool_calls" in message:
            message = {**message, "tool_calls": _listed_calls(message["tool_calls"], name)}
        if isinstance(content, list):
            _check_parts(content, name)
            if any(isinstance(part, Mapping) and None in part.values() for part in content):
                message = {**message, "content": [_without_nulls(part) for part in content]}
        if not _MEDIA.keys().isdisjoint(message):
            _check_parts([{key: entry for key, entry in message.items() if key in _MEDIA and entry}], name)
        found.append({key: entry for key, entry in message.items() if entry is not None})
    return found


def _listed_calls(calls: Any, name: str) -> list[Any] | None:
    """Tool calls, which may be JSON text. None if there are none: a template may ask only whether there is a list."""
    if not isinstance(calls, str):
        return calls or None
    if not calls.strip():
        return None
    try:
        calls = json.loads(calls)
    except (ValueError, RecursionError):
        calls = None
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise Malformed(f"{name} has a message whose tool_calls are text that is not a JSON list of calls")
    return calls or None


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


def of_columns(value: Mapping[str, Any]) -> list[Message] | None:
    """Messages in an object of lists, ``{"role": [...], "content": [...]}``; None if it is something else."""
    columns = list(value.values())
    if not ({"role", "from"} & value.keys()) or not all(isinstance(column, list) for column in columns):
        return None
    if not columns[0] or len({len(column) for column in columns}) > 1:
        return None
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


def as_written(said: Text) -> str | None:
    """What JSON or Python wrote instead of a text: "a list of one text", say; "an object or a list" for what may be meant as
    such; None for other texts and for messages with other contents."""
    if not isinstance(said, str):
        contents = [message.get("content") for message in said]
        if len(contents) != 1 or not isinstance(contents[0], str):
            return None
        said = contents[0]
    if not _LITERAL.match(said):
        return None
    numpy = _NUMPY.match(said)
    try:
        value = json.loads(said)
    except (ValueError, RecursionError):
        try:
            with warnings.catch_warnings():  # Python warns of escapes in what may be any text
                warnings.simplefilter("ignore")
                value = ast.literal_eval(said.strip()) if len(said) <= _LONGEST_LITERAL else None
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return "an array" if numpy else None
    if isinstance(value, str):
        return "a text in quotation marks" if said.lstrip()[0] == '"' and said.count('"') == 2 else None
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return "a list of one text"
    if isinstance(value, list) and value and all(isinstance(part, dict) and "text" in part for part in value):
        return "a list of content parts"
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in _TEXT_FIELDS:
        return "an object with one text"
    return "an object or a list" if isinstance(value, (dict, list)) else None


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
            or message["content"][:1] in _MAY_BE_LITERAL
        ):
            return False
    return True


def _translated(message: Mapping[str, Any], name: str, notes: Notes) -> Mapping[str, Any]:
    """A message whose fields or role have the names of another tool."""
    if message.get("role") is None and "from" in message and "value" not in message and "content" in message:
        message = {"from": message["from"], "value": message["content"]} | {
            key: entry for key, entry in message.items() if key not in ("from", "role", "content")
        }
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
    """Whether an answer holds any text or thought, or calls a tool."""
    if isinstance(said, str):
        return bool(said.strip())
    for message in said:
        content = message.get("content")
        if (content.strip() if type(content) is str else _any_content(content)) or (
            message.get("tool_calls") or message.get("function_call") or (len(message) > 2 and _thinks(message))
        ):
            return True
    return False


@lru_cache(1000)
def is_thought(field: Any) -> bool:
    """Whether a field of a message or part holds a thought, by its name."""
    return isinstance(field, str) and _THOUGHT.fullmatch(field) is not None


def _thinks(message: Mapping[str, Any]) -> bool:
    """Whether a field of a message holds a thought."""
    return any(
        is_thought(field) and bool(value.strip() if isinstance(value, str) else value) for field, value in message.items()
    )


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
    if type(content) is str:
        return content
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    if isinstance(content, Mapping):
        return json.dumps(content, ensure_ascii=False)
    return "" if content is None else str(content)
