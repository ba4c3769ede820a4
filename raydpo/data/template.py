"""The chat template of a tokenizer: what it can read, and messages in the form that it reads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from datetime import date, datetime
from functools import cached_property
from hashlib import blake2b
from typing import Any

from raydpo.config.data import PINNED_DATE
from raydpo.data.forms import Forms
from raydpo.data.messages import RESULTS, THOUGHT_PARTS, Malformed, Message, is_thought
from raydpo.data.probes import ONE, Probes

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
_SHORT_ID = re.compile("[a-zA-Z0-9]{9}")
"""Ids that Mistral's templates take."""


class ChatTemplate:
    """Renders conversations with a tokenizer's chat template.

    Templates differ in what they read: text or lists of parts as content, objects or JSON text as the arguments of calls.
    What a template reads is found once with a few tiny conversations.

    Attributes:
        tokenizer: the transformers tokenizer.
        day: the day that a template is told instead of today.
        probes: what the template reads.
    """

    def __init__(self, tokenizer: Any, day: date = PINNED_DATE) -> None:
        self.tokenizer = tokenizer
        self.day = day
        self.probes = Probes(self.render)
        self._pinned: dict[str, str] = {}
        self._generating: dict[str, bool] = {}
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

    def generated(
        self, messages: list[Message], tools: list[Any] | None = None, **kwargs: Any
    ) -> tuple[str, list[tuple[int, int]]] | None:
        """The text of a conversation, and the parts of it inside ``{% generation %}`` of the template; None if it has none.

        Raises:
            Exception: whatever the template raises.
        """
        template = self.tokenizer.get_chat_template(None, tools)
        if template not in self._generating:
            self._generating[template] = _GENERATION.search(template) is not None
        if not self._generating[template]:
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, parts = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=self._with_pinned_date(template) if self.writes_date else template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
            **kwargs,
        )
        return texts[0], parts[0]

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
            content = ONE if isinstance(messages[place]["content"], str) else [{"type": "text", "text": ONE}]
            probe = [*messages[:place], messages[place] | {"content": content}, *messages[place + 1 :]]
            rendered = self.probes.tried(probe, tools=tools, **kwargs)
            self._written[key] = not rendered or ONE.lower() in rendered.lower()
        return self._written[key]

    def fits(self, messages: list[Message]) -> bool:
        """Whether the template reads ``messages`` as they are, as far as a quick look tells."""
        reads_text = self.probes.reads_text
        for message in messages:
            if type(message.get("content")) is not str or message["role"] not in reads_text:
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
        if not any(message.get("tool_calls") or message["role"] in RESULTS for message in fitted):
            return fitted
        if self.probes.wants_short_ids or self.probes.wants_names:
            return _with_ids(fitted, start, _short_id if self.probes.wants_short_ids else str, changes)
        return fitted

    def fitted_tools(self, tools: list[Any] | None, changes: set[str]) -> list[Any] | None:
        """``tools`` as the template reads them. Adds what was changed to ``changes``."""
        if not tools or all(not _is_bare(tool) for tool in tools) or self.probes.reads_bare_tools:
            return tools
        changes.add(TOOL_WRAPPED)
        return [_wrapped_tool(tool) if _is_bare(tool) else tool for tool in tools]

    def _fitted(self, message: Message, changes: set[str]) -> Message:
        if (role := self.probes.role_for(message["role"])) != message["role"]:
            changes.add(f"role {message['role']!r}, given as {role!r}")
            message = message | {"role": role}
        if self._translates_calls:
            message = self._with_tool_calls(message, changes)
        if message["role"] == "assistant":
            message = self._with_thought(message, changes)
        content, role = message.get("content"), message["role"]
        if role in RESULTS and _is_object(content):
            if self.probes.writes_objects(role, content):
                return message
            changes.add(RESULT_AS_TEXT)
            content = json.dumps(content, ensure_ascii=False)
        form = self.probes.form_of_content(role) if isinstance(content, str) or content else "parts"
        if isinstance(content, list) and form != "parts" and (form != "part" or len(content) > 1):
            content = _joined(content, role)
            if isinstance(content, str):
                changes.add(PARTS_JOINED)
        elif isinstance(content, list) and form is not None:
            content = _typed(content)
            if content is not message["content"]:
                changes.add(PARTS_OF_TEXT)
        elif isinstance(content, str) and role not in self.probes.reads_text:
            changes.add(TEXT_AS_PARTS)
        if isinstance(content, str) and role not in self.probes.reads_text:
            content = [{"type": "text", "text": content}]
        if content is not message.get("content"):
            message = message | {"content": content}
        if isinstance(message.get("tool_calls"), list):
            message = message | {"tool_calls": [self._fitted_call(call, changes) for call in message["tool_calls"]]}
        if not message.get("content"):
            if message.get("tool_calls"):
                rest = {key: entry for key, entry in message.items() if key != "content"}
                message = rest | (self.probes.beside_calls if "content" not in message else self.probes.beside_calls_empty)
            elif message.get("function_call"):
                message = {"content": ""} | message
        return message

    def _with_thought(self, message: Message, changes: set[str]) -> Message:
        """A message of the assistant with its thought in the field that the template reads, if it is in another field or in
        content parts, and content has no text but the answer."""
        content = message.get("content")
        parts = [part for part in content if _is_thought_part(part)] if isinstance(content, list) else []
        fields = [key for key in message if is_thought(key) and message[key]]
        if any("text" in part for part in parts) and not self.probes.thought_fields:
            raise Malformed(_refused_parts("assistant", parts))  # it would write them as a part of the answer
        if parts and not fields and not self.probes.reads_thought_parts and self.probes.thought_fields:
            thought = "\n\n".join(map(_text_of_thought, parts))
            rest = [part for part in content if not _is_thought_part(part)]  # type: ignore[union-attr]
            message = message | {"content": rest or ""}
        elif len(fields) == 1 and isinstance(message[fields[0]], str) and not parts:
            thought, said = message[fields[0]], content if isinstance(content, str) else json.dumps(content)
            if (
                not self.probes.thought_fields
                or fields[0] in self.probes.thought_fields
                or thought.strip() in said
                or "</" in said
            ):
                return message
            message = {key: entry for key, entry in message.items() if key != fields[0]}
        else:
            return message
        changes.add(f"thoughts, given in the field {self.probes.thought_fields[0]!r}")
        return message | {self.probes.thought_fields[0]: thought}

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
        if isinstance(call, Mapping) and _is_bare(call) and not self.probes.reads_bare_calls:
            changes.add(CALL_WRAPPED)
            function = {key: call[key] for key in ("name", "arguments") if key in call}
            call = {key: call[key] for key in call if key not in function} | {"type": "function", "function": function}
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            return call
        arguments, form = function.get("arguments"), self.probes.form_of_arguments()
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
        raise Malformed(_refused_parts(role, parts))
    return parts  # the result of a tool may be any JSON


def _refused_parts(role: str, parts: list[Any]) -> str:
    """What to say of content with parts that are not text."""
    kinds = sorted({str(part.get("type"))[:40] for part in parts if isinstance(part, Mapping)} - {*map(str, TEXT_PARTS)})
    remedy = "write their text as parts of type 'text'"
    if any(kind in THOUGHT_PARTS for kind in kinds):
        remedy = "write thoughts into the text, in <think> and </think>"
    elif any(kind in ("tool_use", "tool_result") for kind in kinds):
        remedy = "write tool_calls, and results as messages of role 'tool'"
    return (
        f"content of role {role!r} has parts other than text ({', '.join(kinds[:3]) or 'no type'}), which the chat template "
        f"cannot take; {remedy}"
    )
