"""Finds what a chat template reads, with a few tiny conversations that it renders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from raydpo.data.messages import RESULTS, Message

__all__ = ["ONE", "Probes"]

ONE = "raydpoOne"
"""Text of probes, found in no template."""
_TWO = "raydpoTwo"
_BOTH = f"{ONE} {_TWO}"
_USER: Message = {"role": "user", "content": "x"}
_ALIKE = {"developer": "system", "ipython": "tool", "environment": "tool"}
"""Roles that few templates write, and those as which the others write the same."""
_THOUGHT_FIELDS = ("reasoning_content", "thinking", "reasoning", "thought")
"""Fields of thoughts that templates read."""


class Probes:
    """What one chat template reads. Each answer is found once, when it is asked for.

    Attributes:
        reads_text: roles of which the template is known to read content as text, or to show none.
    """

    def __init__(self, render: Callable[..., str]) -> None:
        """Args:
        render: renders messages; it raises what the template raises.
        """
        self._render = render
        self.reads_text: set[str] = set()
        self._content: dict[str, str | None] = {}
        self._roles: dict[str, str] = {}
        self._objects: dict[tuple[str, bool], bool] = {}
        self._arguments: str | None = None

    def hint(self, messages: list[Message]) -> str:
        """What to change in a conversation that the template refuses, in words; empty if it is not known."""
        roles = [message["role"] for message in messages]
        for role in dict.fromkeys(roles):
            if role in ("user", "assistant") or self.shown(self.role_for(role), _BOTH):
                continue
            if role in ("system", "developer"):
                return "; write the system text into the first user message"
            return f"; set a data.chat_template that takes role {role!r}"
        first = next((message for message in messages if message["role"] not in ("system", "developer")), None)
        if first is not None and first["role"] == "assistant" and not self.tried([_said("assistant"), _USER]):
            return "; begin with a user message"
        for role, following in pairwise(roles):
            if role == following and role in ("user", "assistant"):
                row = [_USER, _USER] if role == "user" else [_USER, _said(role), _said(role)]
                if not self.tried(row):
                    return f"; join messages of role {role!r} that follow one another"
        if "system" in roles[1:] and not self.tried([_USER, _said("assistant"), _said("system"), _USER]):
            return "; it takes a system message only as the first"
        if any(len(message.get("tool_calls") or ()) > 1 for message in messages) and not self._two_calls:
            return "; it takes one call a message: make each a message of its own"
        calls = [call for message in messages for call in message.get("tool_calls") or () if isinstance(call, Mapping)]
        functions = [call["function"] for call in calls if isinstance(call.get("function"), Mapping)]
        if self.form_of_arguments() == "object" and any(
            not isinstance(function.get("arguments", {}), Mapping) for function in functions
        ):
            return "; write arguments of calls as an object, or as its JSON text"
        return ""

    def tried(self, messages: list[Message], **kwargs: Any) -> str:
        """The rendering of a probe, empty if the template refuses it."""
        try:
            return self._render(messages, **kwargs)
        except Exception:  # templates raise what their authors wrote
            return ""

    def role_for(self, role: str) -> str:
        """The role as which messages of ``role`` are given: another one if the template writes that one only."""
        if role not in self._roles:
            other = _ALIKE.get(role, role)
            self._roles[role] = other if other != role and not self.shown(role, _BOTH) and self.shown(other, _BOTH) else role
        return self._roles[role]

    def writes_objects(self, role: str, content: Any) -> bool:
        """Whether the template writes content that is such an object, or a list of objects, as JSON."""
        key = role, isinstance(content, list)
        if key not in self._objects:
            probe = {"key": _BOTH}
            self._objects[key] = f'"{_BOTH}"' in self.shown(role, [probe] if key[1] else probe)
        return self._objects[key]

    @cached_property
    def thought_fields(self) -> tuple[str, ...]:
        """The fields of a message whose thoughts the template writes."""
        return tuple(name for name in _THOUGHT_FIELDS if ONE in self._answered(_said("assistant") | {name: ONE}))

    @cached_property
    def reads_thought_parts(self) -> bool:
        parts = [{"type": "thinking", "thinking": ONE}, {"type": "text", "text": _TWO}]
        text = self._answered({"role": "assistant", "content": parts})
        return ONE in text and _TWO in text and not any(word in text for word in ("'thinking'", '"thinking"'))

    @cached_property
    def reads_bare_tools(self) -> bool:
        tool = {"name": ONE, "description": _TWO, "parameters": {"type": "object", "properties": {}}}
        return ONE in self.tried([_USER], tools=[tool])

    @cached_property
    def reads_bare_calls(self) -> bool:
        return bool(self._call(json.dumps({ONE: _TWO}), bare=True) or self._call({ONE: _TWO}, bare=True))

    @cached_property
    def _two_calls(self) -> bool:
        return bool(self._call({ONE: _TWO}, count=2) or self._call(json.dumps({ONE: _TWO}), count=2))

    @cached_property
    def wants_short_ids(self) -> bool:
        """Whether the template takes calls only with ids of nine letters and digits."""
        arguments = {ONE: _TWO}
        return bool(self._call(arguments)) and not self._call(arguments, name="call_1")

    @cached_property
    def wants_names(self) -> bool:
        """Whether the template takes the result of a tool only with the name of the tool, or with the id of the call."""
        role = self.role_for("tool")
        before, _ = _around(role, _USER)
        return not self.tried([*before, {"role": role, "content": _BOTH}]) and bool(self.shown(role, _BOTH))

    @cached_property
    def beside_calls(self) -> Message:
        """The content to give with calls where the data have none: none, an empty text, or null."""
        return self._content_beside_calls(({}, {"content": ""}, {"content": []}, {"content": None}))

    @cached_property
    def beside_calls_empty(self) -> Message:
        """The same where the data have an empty text."""
        return self._content_beside_calls(({"content": ""}, {}, {"content": []}, {"content": None}))

    def _content_beside_calls(self, choices: Sequence[Message]) -> Message:
        arguments = json.dumps({ONE: _TWO}) if self.form_of_arguments() == "text" else {ONE: _TWO}
        call = {"id": "callprobe", "type": "function", "function": {"name": "probe", "arguments": arguments}}
        for choice in choices:
            text = self._answered({"role": "assistant", "tool_calls": [call]} | choice)
            if _TWO in text and "None" not in text:
                return choice
        return next((choice for choice in choices if self._answered({"role": "assistant"} | choice)), choices[0])

    def _answered(self, message: Message) -> str:
        """The rendering of a conversation with ``message`` as the answer, empty if the template refuses it."""
        users = _USER, _USER | {"content": [{"type": "text", "text": _USER["content"]}]}
        return next(filter(None, (self.tried([user, message]) for user in users)), "")

    def form_of_content(self, role: str) -> str | None:
        """How the template reads content of ``role``.

        ``text``; ``parts``, a list of any number of parts; ``part``, a list of one part; None if it shows none of them.
        """
        if role not in self._content:
            as_text = self.shown(role, f"{ONE} {_TWO}")
            as_parts = self.shown(role, [{"type": "text", "text": ONE}, {"type": "text", "text": _TWO}])
            if as_parts and not _printed(as_parts, as_text):
                self._content[role] = "parts"
            elif not as_text and _reads(self.shown(role, [{"type": "text", "text": f"{ONE} {_TWO}"}])):
                self._content[role] = "part"
            else:
                self._content[role] = "text" if as_text else None
            if as_text or self._content[role] is None:  # a template that shows nothing is left to the check
                self.reads_text.add(role)
        return self._content[role]

    def shown(self, role: str, content: Any) -> str:
        """A short conversation with this content, as rendered, if it is shown there whole, else empty."""
        for user in (_USER, _USER | {"content": [{"type": "text", "text": _USER["content"]}]}):
            before, after = _around(role, user)
            more = {"tool_call_id": "callprobe", "name": "probe"} if role in RESULTS else {}
            text = self.tried([*before, {"role": role, "content": content} | more, *after])
            if ONE in text and _TWO in text:
                return text
        return ""

    def form_of_arguments(self) -> str:
        """``object`` or ``text`` if the template reads arguments of calls right only so, else ``any``."""
        if self._arguments is None:
            value = {ONE: _TWO}
            as_object, as_text = (self._call(arguments) for arguments in (value, json.dumps(value)))
            takes_object = _TWO in as_object and str(value) not in as_object
            takes_text = json.dumps(value) in as_text
            if takes_object and as_object != as_text:
                self._arguments = "object"
            else:
                self._arguments = "text" if takes_text and not takes_object else "any"
        return self._arguments

    def _call(self, arguments: Any, name: str = "callprobe", bare: bool = False, count: int = 1) -> str:
        """A conversation with a call of these arguments, as rendered, empty if the template refuses all such probes.

        Args:
            name: id of the call.
            bare: whether name and arguments stand beside the id, not in ``function``.
            count: number of calls.
        """
        function = {"name": "probe", "arguments": arguments}
        call = {"id": name, "type": "function"} | (function if bare else {"function": function})
        said: Message = {"role": "assistant", "tool_calls": [call] * count}
        got: Message = {"role": "tool", "tool_call_id": name, "name": "probe", "content": "y"}
        tool = {"type": "function", "function": {"name": "probe", "description": "d", "parameters": {"type": "object"}}}
        probes = [[_USER, said], [_USER, said | {"content": ""}], [_USER, said | {"content": ""}, got]]
        for messages in probes:
            for tools in (None, [tool]):
                if _TWO in (text := self.tried(messages, tools=tools)):
                    return text
        return ""


def _printed(rendered: str, as_text: str = "") -> bool:
    """Whether a template that takes text only has printed a list of parts as Python or JSON does."""
    return any(rendered.count(word) > as_text.count(word) for word in ("'text'", '"text"'))


def _reads(rendered: str) -> bool:
    return bool(rendered) and not _printed(rendered)


def _around(role: str, user: Message) -> tuple[list[Message], list[Message]]:
    """Messages before and after one of ``role`` in a conversation that templates take."""
    if role in ("system", "developer"):
        return [], [user]
    if role == "user":
        return [], []
    if role == "assistant":
        return [user], []
    call = {"id": "callprobe", "type": "function", "function": {"name": "probe", "arguments": {}}}
    return [user, {"role": "assistant", "content": "", "tool_calls": [call]}], []


def _said(role: str) -> Message:
    return {"role": role, "content": "x"}
