"""The chat template of a tokenizer: what it can read, and messages in the form that it reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date, datetime
from functools import cached_property
from typing import Any

from raydpo.config.data import PINNED_DATE
from raydpo.data.forms import Forms
from raydpo.data.messages import Malformed, Message

__all__ = ["ChatTemplate"]

PARTS_JOINED, TEXT_AS_PARTS = "content parts, joined to text", "text, given as a content part"
PARTS_OF_TEXT = "content parts of text, given with type 'text'"
ARGUMENTS_AS_OBJECT, ARGUMENTS_AS_TEXT = (
    "arguments of calls in JSON text, given as objects",
    "arguments of calls, given as JSON text",
)
CALL_AS_TOOL_CALL, FUNCTION_AS_TOOL = "function_call, given as tool_calls", "role 'function', given as 'tool'"
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
_USER: Message = {"role": "user", "content": "x"}


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
        self._arguments: str | None = None
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
            content = _ONE if isinstance(messages[place]["content"], str) else [{"type": "text", "text": _ONE}]
            probe = [*messages[:place], messages[place] | {"content": content}, *messages[place + 1 :]]
            rendered = self._tried(probe, tools=tools, **kwargs)
            self._written[key] = not rendered or _ONE.lower() in rendered.lower()
        return self._written[key]

    def fits(self, messages: list[Message]) -> bool:
        """Whether the template reads ``messages`` as they are, as far as a quick look tells."""
        for message in messages:
            if type(message.get("content")) is not str or message["role"] not in self._reads_text or "tool_calls" in message:
                return False
            if "function_call" in message:
                return False
        return True

    def fitted(self, messages: list[Message], changes: set[str]) -> list[Message]:
        """``messages`` as the template reads them. Adds what was changed to ``changes``.

        Raises:
            Malformed: if content is parts that are not all text, and the template takes text only.
        """
        return [self._fitted(message, changes) for message in messages]

    def _fitted(self, message: Message, changes: set[str]) -> Message:
        if self._translates_calls:
            message = self._with_tool_calls(message, changes)
        content, role = message.get("content"), message["role"]
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
        return message

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
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or "arguments" not in function:
            return call
        arguments, form = function["arguments"], self._form_of_arguments()
        if form == "object" and isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments.strip() else {}
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

    # -- what the template reads ------------------------------------------------------------------------------------------

    def _tried(self, messages: list[Message], **kwargs: Any) -> str:
        """The rendering of a probe, empty if the template refuses it."""
        try:
            return self.render(messages, **kwargs)
        except Exception:  # templates raise what their authors wrote
            return ""

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
            text = self._tried([*before, {"role": role, "content": content}, *after])
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

    def _call(self, arguments: Any) -> str:
        """A conversation with one call of these arguments, as rendered, empty if the template refuses all such probes."""
        call = {"id": "callprobe", "type": "function", "function": {"name": "probe", "arguments": arguments}}
        said: Message = {"role": "assistant", "tool_calls": [call]}
        got: Message = {"role": "tool", "tool_call_id": "callprobe", "name": "probe", "content": "y"}
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
            "template cannot take"
        )
    return parts  # the result of a tool may be any JSON
