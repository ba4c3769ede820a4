"""The chat template of a tokenizer: what it can read, and messages in the form that it reads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime
from functools import cached_property
from hashlib import blake2b
from itertools import pairwise
from typing import Any

from raydpo.config.data import PINNED_DATE
from raydpo.data.forms import Forms
from raydpo.data.messages import RESULTS, THOUGHT_PARTS, Malformed, Message, is_thought

__all__ = ["ChatTemplate"]

PARTS_JOINED, TEXT_AS_PARTS = "content parts, joined to text", "text, given as a content part"
PARTS_OF_TEXT = "content parts of text, given with type 'text'"
ARGUMENTS_AS_OBJECT, ARGUMENTS_AS_TEXT = (
    "arguments of calls in JSON text, given as objects",
    "arguments of calls, given as JSON text",
)
CALL_AS_TOOL_CALL, FUNCTION_AS_TOOL = "function_call, given as tool_calls", "role 'function', given as 'tool'"
RESULT_AS_TEXT = "results of tools that are objects, given as JSON text"
CALL_WRAPPED, TOOL_WRAPPED = "calls without 'function', given with it", "tools without 'function', given with it"
NO_ARGUMENTS, IDS = (
    "calls without arguments, given with an empty object",
    "calls and results of tools, given with the ids and names that it asks for",
)
TEXT_PARTS = (None, "text", "input_text", "output_text")
"""Types of content parts that are text."""

_CLOCK = "strftime_now"
"""The only function by which transformers lets a template read the clock."""
_DIRECTIVES = "aAbBcdDeFHhIjklmMnpPrRsStTuUVwWxXyYzZCGg"
_READS_FUNCTION = re.compile(r"""role\W[^{}]*['"]function['"]""")
"""A template that asks whether a role is ``function``."""
_GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
_GIVEN = {
    "messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token",
    "raise_exception", _CLOCK, "system", "role", "content",
}  # fmt: skip
"""Variables that transformers sets, that a column of a record is read into, or that loops of templates set."""
_ONE, _TWO = "raydpoOne", "raydpoTwo"
"""Texts of probes, found in no template."""
_BOTH = f"{_ONE} {_TWO}"
_USER: Message = {"role": "user", "content": "x"}
_ALIKE = {"developer": "system", "ipython": "tool", "environment": "tool"}
"""Roles that few templates write, and those as which the others write the same."""
_THOUGHT_FIELDS = ("reasoning_content", "thinking", "reasoning", "thought")
"""Fields of thoughts that templates read."""
_SHORT_ID = re.compile("[a-zA-Z0-9]{9}")
"""Ids that Mistral's templates take."""


class ChatTemplate:
    """Renders conversations with a tokenizer's chat template.

    Templates differ in what they read: text or lists of parts as content, objects or JSON text as the arguments of calls.
    What a template reads is found once with a few tiny conversations.

    Attributes:
        tokenizer: the transformers tokenizer.
        day: the day that a template is told instead of today.
    """

    def __init__(self, tokenizer: Any, day: date = PINNED_DATE) -> None:
        self.tokenizer = tokenizer
        self.day = day
        self._content: dict[str, str | None] = {}
        self._reads_text: set[str] = set()
        self._roles: dict[str, str] = {}
        self._objects: dict[tuple[str, bool], bool] = {}
        self._arguments: str | None = None
        self._pinned: dict[str, str] = {}
        self._names: dict[str, frozenset[str]] = {}
        self._forms = Forms(tokenizer)
        self._written: dict[tuple[Any, ...], bool] = {}

    @cached_property
    def writes_date(self) -> bool:
        """Whether the template writes today's date unless told another."""
        return _CLOCK in str(self.tokenizer.chat_template or "")

    @cached_property
    def _translates_calls(self) -> bool:
        """Whether the template reads tool calls, and not calls of functions in OpenAI's older form."""
        text = str(self.tokenizer.chat_template or "")
        return "tool_calls" in text and "function_call" not in text

    @cached_property
    def _reads_function(self) -> bool:
        return _READS_FUNCTION.search(str(self.tokenizer.chat_template or "")) is not None

    def reads(self, name: str, tools: list[Any] | None = None) -> bool:
        """Whether the template that is used with ``tools`` reads the variable ``name``."""
        template = self.tokenizer.get_chat_template(None, tools)
        if template not in self._names:
            self._names[template] = _variables(template)
        return name in self._names[template]

    @cached_property
    def options(self) -> frozenset[str]:
        """Names of variables that the template reads and that only its user can set, such as ``enable_thinking``."""
        template = self.tokenizer.chat_template or {}
        texts = template.values() if isinstance(template, Mapping) else [template]
        return frozenset().union(*map(_variables, texts)) - _GIVEN

    def render(self, messages: list[Message], tools: list[Any] | None = None, generate: bool = False, **kwargs: Any) -> str:
        """The text of a conversation; with ``generate`` up to where the assistant begins to answer.

        Raises:
            Exception: whatever the template raises.
        """
        if generate:
            kwargs["add_generation_prompt"] = True
        template = self.tokenizer.get_chat_template(None, tools)
        if self.writes_date:
            template = self._with_pinned_date(template)
        pinned = {"chat_template": template} if self.writes_date else {}

        def by_template() -> str:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, tools=tools, **pinned, **kwargs)

        return by_template() if tools is not None else self._forms.render(template, messages, kwargs, by_template)

    def _with_pinned_date(self, template: str) -> str:
        """``template`` with a clock that stands still at the beginning of ``day``."""
        if template not in self._pinned:
            moment = datetime(self.day.year, self.day.month, self.day.day)
            known = [f"%{flag}{letter}" for flag in ("", "-") for letter in _DIRECTIVES]
            steps = [("%%", "\x00"), *((one, moment.strftime(one)) for one in known), ("%f", "000000"), ("\x00", "%")]
            replaced = "".join(f".replace({json.dumps(old)}, {json.dumps(new)})" for old, new in steps)
            # The template's first line stays as it is: the newline after a block is dropped.
            clock = f"{{% macro {_CLOCK}(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n"
            self._pinned[template] = clock + template
        return self._pinned[template]

    def writes(self, messages: list[Message], place: int, tools: list[Any] | None = None, **kwargs: Any) -> bool:
        """Whether the content of the message at ``place`` is written, which is tried once for each sequence of roles."""
        key = (tuple(message["role"] for message in messages), place, tools is not None, kwargs.get("generate"))
        if key not in self._written:
            content = _ONE if isinstance(messages[place]["content"], str) else [{"type": "text", "text": _ONE}]
            probe = [*messages[:place], messages[place] | {"content": content}, *messages[place + 1 :]]
            rendered = self._tried(probe, tools=tools, **kwargs)
            self._written[key] = not rendered or _ONE.lower() in rendered.lower()
        return self._written[key]

    def fits(self, messages: list[Message]) -> bool:
        """Whether the template reads ``messages`` as they are, as far as a quick look tells."""
        for message in messages:
            if type(message.get("content")) is not str or message["role"] not in self._reads_text:
                return False
            if len(message) > 2 and any(
                key in ("tool_calls", "function_call", "tool_call_id") or is_thought(key) for key in message
            ):
                return False
        return True

    def fitted(self, messages: list[Message], changes: set[str], start: int = 0) -> list[Message]:
        """``messages`` as the template reads them. Adds what was changed to ``changes``.

        Args:
            start: number of messages of the conversation before them.

        Raises:
            Malformed: if content is parts that are not all text, and the template takes text only.
        """
        fitted = [self._fitted(message, changes) for message in messages]
        if any(message.get("tool_calls") or message["role"] in RESULTS for message in fitted):
            if self._wants_short_ids or self._wants_names:
                fitted = _with_ids(fitted, start, _short_id if self._wants_short_ids else str, changes)
        return fitted

    def fitted_tools(self, tools: list[Any] | None, changes: set[str]) -> list[Any] | None:
        """``tools`` as the template reads them. Adds what was changed to ``changes``."""
        if not tools or all(not _is_bare(tool) for tool in tools) or self._reads_bare_tools:
            return tools
        changes.add(TOOL_WRAPPED)
        return [_wrapped_tool(tool) if _is_bare(tool) else tool for tool in tools]

    def _fitted(self, message: Message, changes: set[str]) -> Message:
        if (role := self._role_for(message["role"])) != message["role"]:
            changes.add(f"role {message['role']!r}, given as {role!r}")
            message = message | {"role": role}
        if self._translates_calls:
            message = self._with_tool_calls(message, changes)
        if message["role"] == "assistant":
            message = self._with_thought(message, changes)
        content, role = message.get("content"), message["role"]
        if role in RESULTS and _is_object(content):
            if self._writes_objects(role, content):
                return message
            changes.add(RESULT_AS_TEXT)
            content = json.dumps(content, ensure_ascii=False)
        form = self._form_of_content(role) if isinstance(content, str) or content else "parts"
        if isinstance(content, list) and form != "parts" and (form != "part" or len(content) > 1):
            content = _joined(content, role)
            if isinstance(content, str):
                changes.add(PARTS_JOINED)
        elif isinstance(content, list) and form is not None:
            content = _typed(content)
            if content is not message["content"]:
                changes.add(PARTS_OF_TEXT)
        elif isinstance(content, str) and role not in self._reads_text:
            changes.add(TEXT_AS_PARTS)
        if isinstance(content, str) and role not in self._reads_text:
            content = [{"type": "text", "text": content}]
        if content is not message.get("content"):
            message = message | {"content": content}
        if isinstance(message.get("tool_calls"), list):
            message = message | {"tool_calls": [self._fitted_call(call, changes) for call in message["tool_calls"]]}
        if not message.get("content"):
            if message.get("tool_calls"):
                rest = {key: entry for key, entry in message.items() if key != "content"}
                message = rest | (self._beside_calls if "content" not in message else self._beside_calls_empty)
            elif message.get("function_call"):
                message = {"content": ""} | message
        return message

    def _with_thought(self, message: Message, changes: set[str]) -> Message:
        """A message of the assistant with its thought in the field that the template reads, if it is in another field or in
        content parts, and content has no text but the answer."""
        content = message.get("content")
        parts = [part for part in content if _is_thought_part(part)] if isinstance(content, list) else []
        fields = [key for key in message if is_thought(key) and message[key]]
        if parts and not fields and not self._reads_thought_parts and self._thought_fields:
            thought = "\n\n".join(map(_text_of_thought, parts))
            rest = [part for part in content if not _is_thought_part(part)]  # type: ignore[union-attr]
            message = message | {"content": rest or ""}
        elif len(fields) == 1 and isinstance(message[fields[0]], str) and not parts:
            thought, said = message[fields[0]], content if isinstance(content, str) else json.dumps(content)
            if not self._thought_fields or fields[0] in self._thought_fields or thought.strip() in said or "</" in said:
                return message
            message = {key: entry for key, entry in message.items() if key != fields[0]}
        else:
            return message
        changes.add(f"thoughts, given in the field {self._thought_fields[0]!r}")
        return message | {self._thought_fields[0]: thought}

    def _with_tool_calls(self, message: Message, changes: set[str]) -> Message:
        """A message with the call or the result of a function in OpenAI's older form, as one with those of a tool."""
        call = message.get("function_call")
        if call is not None:
            changes.add(CALL_AS_TOOL_CALL)
            rest = {key: entry for key, entry in message.items() if key != "function_call"}
            function = {"name": call["name"], "arguments": call.get("arguments") or {}}
            return {"content": ""} | rest | {"tool_calls": [{"type": "function", "function": function}]}
        if message["role"] == "function" and not self._reads_function:
            changes.add(FUNCTION_AS_TOOL)
            return message | {"role": "tool"}
        return message

    def _fitted_call(self, call: Any, changes: set[str]) -> Any:
        if isinstance(call, Mapping) and _is_bare(call) and not self._reads_bare_calls:
            changes.add(CALL_WRAPPED)
            function = {key: call[key] for key in ("name", "arguments") if key in call}
            call = {key: call[key] for key in call if key not in function} | {"type": "function", "function": function}
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            return call
        arguments, form = function.get("arguments"), self._form_of_arguments()
        if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
            changes.add(NO_ARGUMENTS)
            return {**call, "function": {**function, "arguments": "{}" if form == "text" else {}}}
        if form == "object" and isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return call
            if not isinstance(arguments, dict):
                return call
            changes.add(ARGUMENTS_AS_OBJECT)
        elif form == "text" and isinstance(arguments, Mapping):
            arguments = json.dumps(arguments, ensure_ascii=False)
            changes.add(ARGUMENTS_AS_TEXT)
        else:
            return call
        return {**call, "function": {**function, "arguments": arguments}}

    def hint(self, messages: list[Message]) -> str:
        """What to change in a conversation that the template refuses, in words; empty if it is not known."""
        roles = [message["role"] for message in messages]
        for role in dict.fromkeys(roles):
            if role in ("user", "assistant") or self._shown(self._role_for(role), _BOTH):
                continue
            if role in ("system", "developer"):
                return "; write the system text into the first user message"
            return f"; set a data.chat_template that takes role {role!r}"
        first = next((message for message in messages if message["role"] not in ("system", "developer")), None)
        if first is not None and first["role"] == "assistant" and not self._tried([_said("assistant"), _USER]):
            return "; begin with a user message"
        for role, following in pairwise(roles):
            if role == following and role in ("user", "assistant"):
                row = [_USER, _USER] if role == "user" else [_USER, _said(role), _said(role)]
                if not self._tried(row):
                    return f"; join messages of role {role!r} that follow one another"
        if "system" in roles[1:] and not self._tried([_USER, _said("assistant"), _said("system"), _USER]):
            return "; it takes a system message only as the first"
        if any(len(message.get("tool_calls") or ()) > 1 for message in messages) and not self._two_calls:
            return "; it takes one call a message: make each a message of its own"
        calls = [call for message in messages for call in message.get("tool_calls") or () if isinstance(call, Mapping)]
        functions = [call["function"] for call in calls if isinstance(call.get("function"), Mapping)]
        if self._form_of_arguments() == "object" and any(
            not isinstance(function.get("arguments", {}), Mapping) for function in functions
        ):
            return "; write arguments of calls as an object, or as its JSON text"
        return ""

    # -- what the template reads ------------------------------------------------------------------------------------------

    def _tried(self, messages: list[Message], **kwargs: Any) -> str:
        """The rendering of a probe, empty if the template refuses it."""
        try:
            return self.render(messages, **kwargs)
        except Exception:  # templates raise what their authors wrote
            return ""

    def _role_for(self, role: str) -> str:
        """The role as which messages of ``role`` are given: another one if the template writes that one only."""
        if role not in self._roles:
            other = _ALIKE.get(role, role)
            self._roles[role] = (
                other if other != role and not self._shown(role, _BOTH) and self._shown(other, _BOTH) else role
            )
        return self._roles[role]

    def _writes_objects(self, role: str, content: Any) -> bool:
        """Whether the template writes content that is such an object, or a list of objects, as JSON."""
        key = role, isinstance(content, list)
        if key not in self._objects:
            probe = {"key": _BOTH}
            self._objects[key] = f'"{_BOTH}"' in self._shown(role, [probe] if key[1] else probe)
        return self._objects[key]

    @cached_property
    def _thought_fields(self) -> tuple[str, ...]:
        """The fields of a message whose thoughts the template writes."""
        return tuple(name for name in _THOUGHT_FIELDS if _ONE in self._answered(_said("assistant") | {name: _ONE}))

    @cached_property
    def _reads_thought_parts(self) -> bool:
        parts = [{"type": "thinking", "thinking": _ONE}, {"type": "text", "text": _TWO}]
        text = self._answered({"role": "assistant", "content": parts})
        return _ONE in text and _TWO in text and not any(word in text for word in ("'thinking'", '"thinking"'))

    @cached_property
    def _reads_bare_tools(self) -> bool:
        tool = {"name": _ONE, "description": _TWO, "parameters": {"type": "object", "properties": {}}}
        return _ONE in self._tried([_USER], tools=[tool])

    @cached_property
    def _reads_bare_calls(self) -> bool:
        return bool(self._call(json.dumps({_ONE: _TWO}), bare=True) or self._call({_ONE: _TWO}, bare=True))

    @cached_property
    def _two_calls(self) -> bool:
        return bool(self._call({_ONE: _TWO}, count=2) or self._call(json.dumps({_ONE: _TWO}), count=2))

    @cached_property
    def _wants_short_ids(self) -> bool:
        """Whether the template takes calls only with ids of nine letters and digits."""
        arguments = {_ONE: _TWO}
        return bool(self._call(arguments)) and not self._call(arguments, name="call_1")

    @cached_property
    def _wants_names(self) -> bool:
        """Whether the template takes the result of a tool only with the name of the tool, or with the id of the call."""
        role = self._role_for("tool")
        before, _ = _around(role, _USER)
        return not self._tried([*before, {"role": role, "content": _BOTH}]) and bool(self._shown(role, _BOTH))

    @cached_property
    def _beside_calls(self) -> Message:
        """The content to give with calls where the data have none: none, an empty text, or null."""
        return self._content_beside_calls(({}, {"content": ""}, {"content": []}, {"content": None}))

    @cached_property
    def _beside_calls_empty(self) -> Message:
        """The same where the data have an empty text."""
        return self._content_beside_calls(({"content": ""}, {}, {"content": []}, {"content": None}))

    def _content_beside_calls(self, choices: Sequence[Message]) -> Message:
        call = {"id": "callprobe", "type": "function", "function": {"name": "probe", "arguments": {_ONE: _TWO}}}
        call = self._fitted_call(call, set())
        for choice in choices:
            text = self._answered({"role": "assistant", "tool_calls": [call]} | choice)
            if _TWO in text and "None" not in text:
                return choice
        return next((choice for choice in choices if self._answered({"role": "assistant"} | choice)), choices[0])

    def _answered(self, message: Message) -> str:
        """The rendering of a conversation with ``message`` as the answer, empty if the template refuses it."""
        users = _USER, _USER | {"content": [{"type": "text", "text": _USER["content"]}]}
        return next(filter(None, (self._tried([user, message]) for user in users)), "")

    def _form_of_content(self, role: str) -> str | None:
        """How the template reads content of ``role``.

        ``text``; ``parts``, a list of any number of parts; ``part``, a list of one part; None if it shows none of them.
        """
        if role not in self._content:
            as_text = self._shown(role, f"{_ONE} {_TWO}")
            as_parts = self._shown(role, [{"type": "text", "text": _ONE}, {"type": "text", "text": _TWO}])
            if as_parts and not _printed(as_parts, as_text):
                self._content[role] = "parts"
            elif not as_text and _reads(self._shown(role, [{"type": "text", "text": f"{_ONE} {_TWO}"}])):
                self._content[role] = "part"
            else:
                self._content[role] = "text" if as_text else None
            if as_text or self._content[role] is None:  # a template that shows nothing is left to the check
                self._reads_text.add(role)
        return self._content[role]

    def _shown(self, role: str, content: Any) -> str:
        """A short conversation with this content, as rendered, if it is shown there whole, else empty."""
        for user in (_USER, _USER | {"content": [{"type": "text", "text": _USER["content"]}]}):
            before, after = _around(role, user)
            more = {"tool_call_id": "callprobe", "name": "probe"} if role in RESULTS else {}
            text = self._tried([*before, {"role": role, "content": content} | more, *after])
            if _ONE in text and _TWO in text:
                return text
        return ""

    def _form_of_arguments(self) -> str:
        """``object`` or ``text`` if the template reads arguments of calls right only so, else ``any``."""
        if self._arguments is None:
            value = {_ONE: _TWO}
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
                if _TWO in (text := self._tried(messages, tools=tools)):
                    return text
        return ""


def _variables(template: str) -> frozenset[str]:
    """The variables that a template reads and does not set first."""
    from jinja2 import Environment, meta
    from jinja2.exceptions import TemplateError

    bare = _GENERATION.sub("", template)  # marks the answer, for transformers only
    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(bare)
        return frozenset(meta.find_undeclared_variables(parsed))
    except TemplateError:  # of an extension that is not known here
        return frozenset(re.findall(r"\w+", template))


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


def _is_object(content: Any) -> bool:
    """Whether the result of a tool is an object or a list of more than texts."""
    if isinstance(content, list):
        return not all(isinstance(part, str) or (isinstance(part, Mapping) and "text" in part) for part in content)
    return isinstance(content, Mapping)


def _is_bare(entry: Any) -> bool:
    """Whether a tool or call has its name beside it, and not in ``function``."""
    return isinstance(entry, Mapping) and "function" not in entry and isinstance(entry.get("name"), str)


def _wrapped_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool with ``function``. Anthropic's ``input_schema`` is what others call ``parameters``."""
    function = {("parameters" if key == "input_schema" else key): entry for key, entry in tool.items() if key != "type"}
    return {"type": "function", "function": function}


def _is_thought_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in THOUGHT_PARTS


def _text_of_thought(part: Mapping[str, Any]) -> str:
    """The text of a content part that is a thought, which may be parts of its own."""
    value = next((part[key] for key in (part["type"], "text", "content") if part.get(key)), "")
    if isinstance(value, list):
        return "".join(str(piece.get("text") or "") if isinstance(piece, Mapping) else str(piece) for piece in value)
    return str(value)


def _with_ids(messages: list[Message], start: int, as_id: Callable[[Any], str], changes: set[str]) -> list[Message]:
    """``messages`` whose calls and results have ids, and results without an id the name of the tool. Such results belong to
    the calls before them, in order."""
    found, waiting = [], {}
    for place, message in enumerate(messages, start):
        new = message
        if isinstance(message.get("tool_calls"), list):
            calls = [
                {**call, "id": as_id(call.get("id") or _short_id(f"{place} {number}"))}
                if isinstance(call, Mapping)
                else call
                for number, call in enumerate(message["tool_calls"])
            ]
            waiting = {call["id"]: (call.get("function") or call).get("name") for call in calls if isinstance(call, Mapping)}
            new = message | {"tool_calls": calls}
        elif message["role"] in RESULTS:
            given = message.get("tool_call_id")
            mine = as_id(given) if given else next(iter(waiting), _short_id(f"{place}"))
            name = waiting.pop(mine, None)
            new = ({"name": name} if name and not given else {}) | message | {"tool_call_id": mine}
        if new != message:
            changes.add(IDS)
        found.append(new)
    return found


def _short_id(name: Any) -> str:
    name = str(name)
    return name if _SHORT_ID.fullmatch(name) else blake2b(name.encode(), digest_size=5).hexdigest()[:9]


def _typed(parts: list[Any]) -> list[Any]:
    """Content parts with type ``text`` for those that are text, as templates ask; ``parts`` itself if all have it."""
    typed = []
    for part in parts:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        elif isinstance(part, Mapping) and part.get("type") != "text" and part.get("type") in TEXT_PARTS and "text" in part:
            part = {**part, "type": "text"}
        typed.append(part)
    return parts if all(new is old for new, old in zip(typed, parts, strict=True)) else typed


def _joined(parts: list[Any], role: str) -> Any:
    """The text of content parts, joined as templates that read parts do, without anything between them."""
    texts = [
        part.get("text")
        if isinstance(part, Mapping) and part.get("type") in TEXT_PARTS
        else part
        if isinstance(part, str)
        else None
        for part in parts
    ]
    if all(isinstance(text, str) for text in texts):
        return "".join(texts)
    if role in ("system", "developer", "user", "assistant"):
        others = sorted(
            {str(part.get("type"))[:40] for part in parts if isinstance(part, Mapping)} - {*map(str, TEXT_PARTS)}
        )
        raise Malformed(
            f"content of role {role!r} has parts other than text ({', '.join(others[:3]) or 'no type'}), which the chat "
            f"template cannot take{_remedy_of_parts(others)}"
        )
    return parts  # the result of a tool may be any JSON


def _remedy_of_parts(kinds: Sequence[str]) -> str:
    """What to do about content parts of these types, in words."""
    if any(kind in THOUGHT_PARTS for kind in kinds):
        return "; write thoughts into the text, in <think> and </think>"
    if any(kind in ("tool_use", "tool_result") for kind in kinds):
        return "; write tool_calls, and results as messages of role 'tool'"
    return "; write their text as parts of type 'text'"
