"""The texts of messages that a rendering must hold, and which of them it does not hold."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from raydpo.data import remarks
from raydpo.data.messages import RESULTS, THOUGHT_PARTS, Message, is_thought
from raydpo.data.remarks import Remark
from raydpo.data.template import TEXT_PARTS

__all__ = [
    "CLOSERS",
    "MARKS",
    "TAG",
    "TAGS",
    "Text",
    "fields_of",
    "found_in",
    "leaves",
    "left_out",
    "pieces_of",
    "reflowed",
    "texts_of",
    "thoughts_of",
    "tool_texts",
    "written_twice",
]

_KNOWN_FIELDS = {"role", "content", "tools", "tool_calls", "function_call", "tool_call_id", "id"}
MARKS = {"weight", "loss_weight", "train", "training", "trainable", "trained", "learn", "loss"}
"""Fields with which other tools say whether a message is trained, and how much it counts: 0 or false if not."""
_IDS = {"type", "id", "index", "tool_use_id", "tool_call_id", "cache_control", "signature"}
"""Keys of content parts that are no text."""
TAGS = (
    *((f"<{name}>", f"</{name}>") for name in ("think", "thinking", "thought", "reasoning", "seed:think")),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel>thought", "<channel|>"),
)
"""How models mark the beginning and the end of a thought in a text."""
_OPENERS = [opener for opener, _ in TAGS]
CLOSERS = [closer for _, closer in TAGS]
"""How they mark its end."""
TAG = re.compile("|".join(map(re.escape, (*_OPENERS, *CLOSERS))))
"""Any of these tags."""
_FEW_WORDS = 2
_CUT = "\x00"
"""Stands where a text was found, so that no other is found there again."""


class Text(NamedTuple):
    """A text that the rendering must hold. ``what`` says where it stands: ``tool calls``, ``content of role 'user'``."""

    what: str
    text: str
    turn: int = 0


def texts_of(message: Message, turn: int, more: list[str]) -> list[Text]:
    """All texts of a message. Adds to ``more`` texts that a rendering may hold, but need not."""
    content, what = message.get("content"), f"content of role {message['role']!r}"
    found: list[Text] = []
    any_json = message["role"] in RESULTS
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            found.append(Text(what, part, turn))
        elif isinstance(part, Mapping):
            is_text, thinks = _is_text(part), part.get("type") in THOUGHT_PARTS
            for key, value in part.items():
                if (not is_text or key == "text" or is_thought(key)) and (key not in _IDS or (any_json and not is_text)):
                    kind = remarks.THOUGHTS if thinks or is_thought(key) else what
                    value = _without_ids(value) if kind == remarks.THOUGHTS else value
                    found += [Text(kind, leaf, turn) for leaf in leaves(value, more)]
    said = " ".join(one.text for one in found)
    within = TAG.search(said) is not None
    thoughts = dict.fromkeys(
        leaf for field in message if is_thought(field) for leaf in leaves(_without_ids(message[field]), more)
    )
    for thought in thoughts:  # content may hold it, too; a word or two stand there by chance
        if thought.strip() not in said or not (within or len(thought.split(maxsplit=_FEW_WORDS)) > _FEW_WORDS):
            found.append(Text(remarks.THOUGHTS, thought, turn))
    tools = _parsed(message.get("tools"))
    for one in tool_texts(tools)[0] if isinstance(tools, list) else []:
        found.append(Text(remarks.TOOLS_INSIDE, one.text, turn))
    calls = message.get("tool_calls")
    calls = list(calls) if isinstance(calls, list) else []
    for call in (*calls, message.get("function_call")):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            values = [function.get("name"), *leaves(_parsed(function.get("arguments")), more)]
            found += [Text(remarks.CALLS, str(value), turn) for value in values if value is not None]
    return [Text(one.what, one.text.strip(), turn) for one in found if one.text.strip()]


def thoughts_of(message: Message) -> list[str]:
    """The texts of the fields and content parts of a message that hold thoughts."""
    parts = (
        [part for part in message["content"] if isinstance(part, Mapping)] if type(message.get("content")) is list else []
    )
    fields = [
        value
        for each in (message, *parts)
        for field, value in each.items()
        if is_thought(field) or (field not in _IDS and each.get("type") in THOUGHT_PARTS)
    ]
    return [leaf.strip() for value in fields for leaf in leaves(_without_ids(value), []) if leaf.strip()]


def written_twice(message: Message, rendered: str) -> list[str]:
    """Thoughts that a field of a message and its content hold, and ``rendered`` twice."""
    content = message.get("content")
    if len(message) == 2 or type(content) is not str or not any(closer in content for closer in CLOSERS):
        return []
    return [each for each in thoughts_of(message) if content.count(each) == 1 and rendered.count(each) > 1]


def _without_ids(value: Any) -> Any:
    """Parts of a thought without what is no text of it."""
    if isinstance(value, list):
        return [_without_ids(part) for part in value]
    if isinstance(value, Mapping):
        return {key: part for key, part in value.items() if key not in _IDS and key not in ("format", "data")}
    return value


def _parsed(arguments: Any) -> Any:
    """Arguments of a call as an object, also if they are JSON text."""
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, (dict, list)) else arguments


def leaves(value: Any, keys: list[str]) -> Iterator[str]:
    """All texts, numbers and truth values inside ``value``. Adds the keys of objects to ``keys``."""
    if isinstance(value, Mapping):
        keys += map(str, value)
        for entry in value.values():
            yield from leaves(entry, keys)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from leaves(entry, keys)
    elif isinstance(value, (str, int, float)):
        yield str(value)


def tool_texts(tools: list[Any]) -> tuple[list[Text], list[str]]:
    """The names of tools, which a rendering must hold, and their other texts, which it may hold."""
    more: list[str] = []
    wanted = []
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        texts = list(leaves(tool, more))
        if isinstance(name, str) and name.strip():
            wanted.append(Text(remarks.TOOLS, name.strip(), -1))
            if name in texts:
                texts.remove(name)
        more += [text.strip() for text in texts if text.strip()]
    return wanted, more


def fields_of(message: Message) -> list[Text]:
    """The texts of fields that few templates read, such as ``name``, each under the name of its field."""
    content = message.get("content")
    others = [(str(key)[:40], message[key]) for key in message.keys() - _KNOWN_FIELDS - MARKS if not is_thought(key)]
    others += [
        (f"{str(key)[:40]} of a content part", value)
        for part in (content if isinstance(content, list) else [])
        if _is_text(part)
        for key, value in part.items()
        if key not in ("text", *_IDS) and not is_thought(key)
    ]
    return [
        Text(key, leaf.strip())
        for key, value in sorted(others, key=lambda field: field[0])
        for leaf in leaves(value, [])
        if leaf.strip()
    ]


def _is_text(part: Any) -> bool:
    """Whether a content part is text. What else it has is said about the text, such as where it was found."""
    return isinstance(part, Mapping) and part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str)


# -- finding them ---------------------------------------------------------------------------------------------------------


def left_out(rendered: str, wanted: Sequence[Text], more: Sequence[str] = ()) -> list[Text]:
    """Those of ``wanted`` that ``rendered`` does not hold.

    Each needs a place of its own: the longest are looked for first, and what was found is taken away. White space does not
    count, nor how JSON or Python spell a text inside quotation marks. A text with a thought may be cut apart at its tags.

    Args:
        more: texts that may be there, too, so that none of ``wanted`` is found inside them.
    """
    rest = "".join(rendered.split())
    lost = []
    again: list[Text] = []
    texts = [*((one.text, one) for one in wanted), *((text, None) for text in more)]
    # Of two equal texts that of a message comes before the name of a tool.
    for text, one in sorted(texts, key=lambda entry: (-len(entry[0]), entry[1] is None or entry[1].what == remarks.TOOLS)):
        place = found_in(rest, text)
        if place is not None:
            rest = rest[: place[0]] + _CUT + rest[place[1] :]
        elif one is not None:
            pieces = pieces_of(one)
            if len(pieces) > 1 or pieces != [one]:
                again += pieces
            else:
                lost.append(one)
    for one in sorted(again, key=lambda piece: len(piece.text), reverse=True):
        place = found_in(rest, one.text)
        if place is None:
            lost.append(one)
        else:
            rest = rest[: place[0]] + _CUT + rest[place[1] :]
    called = {one.text for one in wanted if one.what == remarks.CALLS}
    return [one._replace(what=remarks.NAMES) if one.what == remarks.TOOLS and one.text in called else one for one in lost]


def reflowed(part: str, rendered: str, wanted: Sequence[Text]) -> list[Remark]:
    """A remark for each text that ``rendered`` holds with other white space, but for that at tags of thoughts."""
    found, rest = [], ""
    for one in wanted:
        for piece in pieces_of(one) if one.text not in rendered else []:
            bare = "".join(piece.text.split())
            rest = rest or "".join(rendered.split())
            if bare in rest and not any(form in rendered for form in _forms(piece.text)):
                found.append(Remark(remarks.REFLOWED, f"{one.what} ({part})", piece.text))
    return found


def found_in(rest: str, text: str) -> tuple[int, int] | None:
    """Start and end of ``text`` in ``rest``, which has no white space."""
    for form in _forms(text):
        squeezed = "".join(form.split())
        if not squeezed:
            return 0, 0
        if (place := rest.find(squeezed)) >= 0:
            return place, place + len(squeezed)
    return None


def _forms(text: str) -> Iterator[str]:
    """Ways in which a template may write a text: as it is, within JSON once or twice, within Python, in lower case."""
    yield text
    for ascii_only in (False, True):
        once = json.dumps(text, ensure_ascii=ascii_only)[1:-1]
        yield once
        yield json.dumps(once, ensure_ascii=ascii_only)[1:-1]
    yield repr(text)[1:-1]
    if text in ("True", "False"):
        yield text.lower()
    try:
        yield json.dumps(json.loads(text))  # a number as JSON writes it
    except (ValueError, RecursionError):
        return


def pieces_of(one: Text) -> list[Text]:
    """A text cut apart at the tags of thoughts: what stands before a closing tag is a thought."""
    pieces = []
    start = 0
    for tag in TAG.finditer(one.text):
        what = remarks.THOUGHTS if tag[0] in CLOSERS else one.what
        pieces.append(Text(what, one.text[start : tag.start()].strip(), one.turn))
        start = tag.end()
    pieces.append(Text(one.what, one.text[start:].strip(), one.turn))
    return [piece for piece in pieces if piece.text] if start else [one]
