"""Finds what a chat template does with the texts of a conversation, so that others of its form are written without it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from inspect import signature
from itertools import pairwise
from typing import Any

from raydpo.data.traced import MARK, METHODS, Message, Parts, Trace, Traced, Untraceable, code_of, joined
from raydpo.errors import FilesError

__all__ = ["Forms"]

_TEXT_FILTERS = {"trim", "default", "d", "length", "count", "lower", "upper", "capitalize", "replace", "string"}
"""Filters that use nothing of a text but the methods above."""
_LIST_FILTERS = {"list", "first", "last", "reverse", "items", "map", "select", "reject", "selectattr", "rejectattr"}
_TESTS = {
    "string", "defined", "undefined", "none", "mapping", "number", "integer", "float", "boolean", "true", "false",
    "eq", "equalto", "==", "ne", "!=",
}  # fmt: skip
"""Tests of the kind of a value, or that use its methods only."""

_COMPARED = 2
"""First conversations of each form that are also rendered by the template, to compare."""
_EVERY = 500
"""Afterwards one of so many conversations is."""
_MOST_FORMS, _MOST_ALIKE, _MOST_MESSAGES = 2000, 6, 200
"""Forms that are kept, forms of the same roles, and messages of a conversation that is traced."""
_MOST_FAILED = 50

Form = Callable[[tuple[str, ...]], str | None]
"""The rendering of a conversation with the given contents, or None if the template treats them otherwise."""


class Forms:
    """Renders conversations of messages with nothing but a role and a text, as the chat template of a tokenizer does.

    A template is run as it is at first. When it meets the same roles again, it is also run with texts that note what the
    template does with them. After that, conversations of which it would ask the same things with the same answers are put
    together without it. Where something is not followed or differs, the template is run as always.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._forms: dict[Any, list[list[Any]]] = {}
        self._templates: dict[str, Any] = {}
        self._count = self._failed = self._since = 0
        self._names = _names(tokenizer)
        self._use = self._names is not None

    def render(
        self, template: str, messages: list[dict[str, Any]], options: dict[str, Any], by_template: Callable[[], str]
    ) -> str:
        """The text of a conversation.

        Args:
            template: the text of the template.
            options: other variables, with ``add_generation_prompt``.
            by_template: renders the conversation with the template.

        Raises:
            FilesError: if a later conversation of a form differs, after its first ones did not.
        """
        key = self._key(template, messages, options) if self._use else None
        if key is None:
            return by_template()
        if (forms := self._forms.get(key)) is None:
            if len(self._forms) < _MOST_FORMS:
                self._forms[key] = []
            return by_template()
        contents = tuple([message["content"] for message in messages])
        for each in forms:
            if (text := each[0](contents)) is not None:
                self._since += 1
                if each[1] == 0 and self._since < _EVERY:
                    return text
                return self._compared(each, text, by_template())
        text = by_template()
        if len(forms) < _MOST_ALIKE and self._count < _MOST_FORMS and self._failed < _MOST_FAILED:
            self._learn(forms, template, key[1], contents, options, text)
        return text

    def _key(self, template: str, messages: list[dict[str, Any]], options: dict[str, Any]) -> Any:
        """What forms depend on; None for a conversation that is not traced."""
        for message in messages:
            if len(message) != 2 or type(message.get("content")) is not str or type(message.get("role")) is not str:
                return None
        if len(messages) > _MOST_MESSAGES or not messages:
            return None
        for name, value in options.items():
            if name in self._names or type(value) not in (str, bool, int, type(None)):
                return None
        given = tuple([(name, type(value), value) for name, value in options.items()])
        return template, tuple([message["role"] for message in messages]), given

    def _compared(self, form: list[Any], text: str, rendered: str) -> str:
        if form[1]:
            form[1] -= 1
            self._use = self._use and text == rendered
            return rendered
        self._since = 0
        if text != rendered:
            raise FilesError(
                f"the chat template renders a conversation otherwise than others of its form: {rendered[:200]!r}, expected "
                f"{text[:200]!r}; this is a fault of raydpo. Please report it with the chat template"
            )
        return rendered

    def _learn(
        self,
        forms: list[list[Any]],
        template: str,
        roles: Sequence[str],
        contents: tuple[str, ...],
        options: dict[str, Any],
        text: str,
    ) -> None:
        """Add the form of a conversation that the template renders as ``text``."""
        variables = {"tools": None, "documents": None, "add_generation_prompt": False, **self._tokenizer.special_tokens_map}
        try:
            if template not in self._templates:
                self._templates[template] = _traceable(template)
        except Exception:  # another version of transformers or Jinja
            self._use = False
            return
        form = _trace(self._templates[template], roles, contents, variables | options)
        if form is None:
            self._failed += 1
        elif form(contents) != text:
            self._use = False
        else:
            forms.append([form, _COMPARED])
            self._count += 1


def _names(tokenizer: Any) -> frozenset[str] | None:
    """Names of variables that transformers itself sets or reads; None for a tokenizer that renders otherwise."""
    try:
        from transformers import PreTrainedTokenizerBase
        from transformers.utils.chat_template_utils import render_jinja_template

        kind = type(tokenizer)
        if kind.apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
            return None
        names = signature(kind.apply_chat_template).parameters.keys() | signature(render_jinja_template).parameters.keys()
        return frozenset(names | {"messages"}) - {"add_generation_prompt"}
    except Exception:  # another version of transformers
        return None


def _is_literal(code: str) -> bool:
    return code.startswith(("'", '"'))


def _trace(template: Any, roles: Sequence[str], contents: Sequence[str], variables: Mapping[str, Any]) -> Form | None:
    """How a template renders conversations with these roles, found by rendering one of them.

    A form is used for contents of which all questions that the template asked have the same answers. Then the template goes
    the same way, and its result is the same sum of texts.

    Args:
        template: a chat template, from ``_traceable``.
        variables: what else the template is given.

    Returns:
        The form; None if the template uses contents in a way that is not followed.
    """
    found, environment = Trace(), template.environment
    environment.raydpo_trace = found
    given = [Traced(found, content, f"c[{place}]") for place, content in enumerate(contents)]
    messages = [Message(found, role, content) for role, content in zip(roles, given, strict=True)]
    try:
        whole = joined(found, template.root_render_func(template.new_context({**variables, "messages": messages})))
        if found.failed:
            return None
        parts = whole.parts if type(whole) is Traced else [code_of(found, whole)]
        same = [
            code if answer is True else f"not ({code})" if answer is False else f"{code} == {answer!r}"
            for code, answer in found.answers.items()
        ]
        written = "".join(
            part + (" " if _is_literal(part) and _is_literal(after) else ", ") for part, after in pairwise([*parts, ""])
        )
        return eval(f"lambda c: ''.join(({written})) if {' and '.join(same) or 'True'} else None", {})
    except Exception:  # the template, or Python where the expression is too long
        return None


def _traceable(text: str) -> Any:
    """A chat template, compiled as transformers compiles it, for ``_trace``.

    Raises:
        Exception: whatever goes wrong, such as private names of transformers that are gone.
    """
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.runtime import Macro, Undefined
    from jinja2.visitor import NodeTransformer
    from transformers.utils.chat_template_utils import _compile_jinja_template

    class Operators(NodeTransformer):
        """Gives operators that C code would carry out to functions of ours."""

        def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
            self.generic_visit(node)
            if not any(operand.op in ("in", "notin") for operand in node.ops):
                return node
            if len(node.ops) > 1:
                raise Untraceable
            within = called(node.expr, "raydpo_in", node.ops[0].expr)
            return within if node.ops[0].op == "in" else nodes.Not(within, lineno=node.lineno)

        def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
            self.generic_visit(node)
            return called(nodes.List(node.nodes, lineno=node.lineno), "raydpo_concat")

        def visit_Mod(self, node: nodes.Mod) -> nodes.Node:
            self.generic_visit(node)
            return called(node.left, "raydpo_mod", node.right)

    def called(node: nodes.Expr, name: str, *given: nodes.Expr) -> nodes.Filter:
        return nodes.Filter(node, name, list(given), [], None, None, lineno=node.lineno)

    environment = _compile_jinja_template(text).environment.overlay()
    environment.raydpo_trace = Trace()
    kind = type(environment)

    def fail() -> Any:
        return environment.raydpo_trace.fail()

    def check(value: Any) -> None:
        """Fail if a value is or holds a traced text, or may do so."""
        if isinstance(value, dict):
            for key, entry in dict.items(value):
                check(key)
                check(entry)
        elif type(value) in (list, tuple):
            for entry in value:
                check(entry)
        elif type(value) is str:
            if MARK in value:
                fail()
        elif type(value) not in (int, float, bool, type(None)) and not isinstance(value, Undefined):
            fail()

    def checked(function: Any, first: bool) -> Any:
        """``function``, which fails if it is given a traced text.

        Args:
            first: whether its first argument may be or hold one.
        """
        skipped = hasattr(function, "jinja_pass_arg") + first

        @wraps(function)
        def replaced(*given: Any, **named: Any) -> Any:
            check(list(given[skipped:]))
            check(named)
            return function(*given, **named)

        return replaced

    def within(part: Any, whole: Any) -> bool:
        if type(part) is Traced and type(whole) not in (list, tuple, Traced):
            fail()
        return part in whole

    def concat(values: Iterable[Any]) -> Any:
        return joined(environment.raydpo_trace, values)

    def modulo(left: Any, right: Any) -> Any:
        return left % right if type(left) in (int, float) and type(right) in (int, float) else fail()

    def attribute(value: Any, name: str) -> Any:
        if type(value) in (Traced, Parts):
            return getattr(value, name) if type(value) is Traced and name in METHODS else fail()
        return kind.getattr(environment, value, name)

    def item(value: Any, place: Any) -> Any:
        if type(value) in (Traced, Parts):
            return value[place]
        if type(place) in (Traced, Parts):
            fail()
        return kind.getitem(environment, value, place)

    def call(context: Any, function: Any, *given: Any, **named: Any) -> Any:
        owner = getattr(function, "__self__", None)
        own = {name: value for name, value in named.items() if name not in ("_loop_vars", "_block_vars")}
        if type(owner) is Traced:
            return function(*given, **own)
        if not (isinstance(function, Macro) or isinstance(owner, Extension) or function is environment.globals["namespace"]):
            methods = type(owner) in (str, list, tuple, dict, Message)
            if not methods and function not in (range, environment.globals["raise_exception"]):
                fail()
            if type(owner) is str:
                check(owner)
            check(list(given))
            check(own)
        return kind.call(environment, context, function, *given, **named)

    lists = {*_TEXT_FILTERS, *_LIST_FILTERS}
    environment.filters = {name: checked(each, name in lists) for name, each in environment.filters.items()} | {
        "raydpo_in": within, "raydpo_concat": lambda values: concat(map(str, values)), "raydpo_mod": modulo,
        "random": lambda *_: fail(),
    }  # fmt: skip
    environment.tests = {name: each if name in _TESTS else checked(each, False) for name, each in environment.tests.items()}
    environment.getattr, environment.getitem, environment.call, environment.concat = attribute, item, call, concat
    tree = Operators().visit(environment.parse(text))
    return environment.from_string(tree.set_environment(environment))
