"""Texts that note what is asked of them, and what is made of them, as Python expressions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["MARK", "METHODS", "Message", "Parts", "Trace", "Traced", "Untraceable", "code_of", "joined"]

MARK = "\ue0f5raydpo\ue0f6"
"""What a traced text holds in memory, so that it is found where C code read it without asking."""
_CHANGES = (
    "strip", "lstrip", "rstrip", "lower", "upper", "capitalize", "title", "replace", "removeprefix", "removesuffix",
)  # fmt: skip
"""Methods of a text that give a text, and never fail."""
_QUESTIONS = ("startswith", "endswith", "isdigit", "isspace", "isalpha", "isalnum", "isupper", "islower", "find", "count")
METHODS = frozenset((*_CHANGES, *_QUESTIONS, "split", "rsplit"))
"""Methods of a text that are followed."""


class Untraceable(Exception):
    """A template uses a text in a way that is not followed."""


class Trace:
    """What a template asked of texts, as Python expressions of them, and the answers."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.failed = False

    def fail(self, *_: Any, **__: Any) -> Any:
        self.failed = True
        raise Untraceable

    def asked(self, code: str, found: Any) -> Any:
        self.answers[code] = found
        return found


class Traced(str):
    """A text of a conversation, or one made from them. Whatever is asked of it is noted."""

    __slots__ = ("parts", "text", "trace")

    def __new__(cls, trace: Trace, text: str, *parts: str) -> Traced:
        """Args:
        text: the text itself; as a ``str`` the object is a mark.
        parts: expressions of which the text is the sum.
        """
        self = super().__new__(cls, MARK)
        self.trace, self.text, self.parts = trace, text, parts
        return self

    @property
    def code(self) -> str:
        return f"({' + '.join(self.parts)})"

    def _given(self, *values: Any) -> str:
        """The arguments of a method as code."""
        return ", ".join(code_of(self.trace, value) for value in values)

    def __str__(self) -> str:
        return self

    def __add__(self, other: Any) -> Traced:
        return joined(self.trace, (self, other))

    def __radd__(self, other: Any) -> Traced:
        return joined(self.trace, (other, self))

    def __bool__(self) -> bool:
        return self.trace.asked(f"bool{self.code}", bool(self.text))

    def __len__(self) -> int:
        return self.trace.asked(f"len{self.code}", len(self.text))

    def __contains__(self, part: Any) -> bool:
        return self.trace.asked(f"{self._given(part)} in {self.code}", _text(part) in self.text)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, str):
            return False
        return self.trace.asked(f"{self.code} == {self._given(other)}", self.text == _text(other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __getitem__(self, place: Any) -> Traced:
        if not isinstance(place, slice) or any(type(end) not in (int, type(None)) for end in _ends(place)):
            self.trace.fail()
        start, stop, step = _ends(place)
        return Traced(self.trace, self.text[place], f"{self.code}[{start}:{stop}:{step}]")

    def split(self, *given: Any) -> Parts:
        return Parts(self, "split", given)

    def rsplit(self, *given: Any) -> Parts:
        return Parts(self, "rsplit", given)


class Parts:
    """The parts of a traced text that was split, of which the first and the last may be taken."""

    def __init__(self, whole: Traced, method: str, given: tuple[Any, ...]) -> None:
        if any(type(each) is Traced for each in given):
            whole.trace.fail()
        self._whole, self._code = whole, f"{whole.code}.{method}({whole._given(*given)})"
        self._parts = getattr(whole.text, method)(*given)
        self._has_ends = bool(given) and given[0] is not None  # white space alone has no parts

    def __len__(self) -> int:
        return self._whole.trace.asked(f"len({self._code})", len(self._parts))

    def __getitem__(self, place: Any) -> Traced:
        end = self._has_ends and place in (0, -1)
        if type(place) is not int or not (end or -len(self) <= place < len(self)):
            self._whole.trace.fail()
        return Traced(self._whole.trace, self._parts[place], f"{self._code}[{place}]")

    def _fail(self, *_: Any) -> Any:
        self._whole.trace.fail()

    __iter__ = __contains__ = __eq__ = __str__ = __repr__ = __add__ = __radd__ = __reversed__ = _fail
    __hash__ = _fail  # type: ignore[assignment]


def _define_others() -> None:
    """Give traced texts the methods of texts: those that are followed, and for all others one that fails."""

    def change(name: str) -> Callable[..., Traced]:
        def method(self: Traced, *given: Any) -> Traced:
            return Traced(self.trace, getattr(self.text, name)(*given), f"{self.code}.{name}({self._given(*given)})")

        return method

    def question(name: str) -> Callable[..., Any]:
        def method(self: Traced, *given: Any) -> Any:
            return self.trace.asked(f"{self.code}.{name}({self._given(*given)})", getattr(self.text, name)(*given))

        return method

    def failing(self: Traced, *given: Any, **named: Any) -> Any:
        self.trace.fail()

    for name in _CHANGES:
        setattr(Traced, name, change(name))
    for name in _QUESTIONS:
        setattr(Traced, name, question(name))
    needed = {"__class__", "__new__", "__init__", "__getattribute__", "__setattr__", "__init_subclass__", "__subclasshook__"}
    for name in {*dir(str), "__rmod__", "__rmul__", "__reversed__", "__hash__"} - needed - vars(Traced).keys() | {
        "__hash__"
    }:
        setattr(Traced, name, failing)


_define_others()


class Message(dict[str, Any]):
    """A message, of which the fields are not listed, since their order may be another one."""

    def __init__(self, trace: Trace, role: str, content: Traced) -> None:
        super().__init__(role=role, content=content)
        self._trace = trace

    def _fail(self, *_: Any) -> Any:
        self._trace.fail()

    __iter__ = items = keys = values = __repr__ = __str__ = __or__ = __ror__ = __eq__ = __reversed__ = copy = _fail
    __hash__ = None  # type: ignore[assignment]


def _ends(place: slice) -> tuple[Any, Any, Any]:
    return place.start, place.stop, place.step


def _text(value: str) -> str:
    return value.text if type(value) is Traced else value


def code_of(trace: Trace, value: Any) -> str:
    """A value as code: a traced text, or what is written as Python writes it."""
    if type(value) is Traced:
        return value.code
    if type(value) is tuple:
        return f"({''.join(f'{code_of(trace, each)}, ' for each in value)})"
    if type(value) not in (str, int, bool, type(None)) or (type(value) is str and MARK in value):
        trace.fail()
    return repr(value)


def joined(trace: Trace, values: Iterable[Any]) -> Any:
    """The sum of texts."""
    values = list(values)
    if all(type(value) is str for value in values):
        return "".join(values)
    parts: list[str] = []
    for value in values:
        if type(value) not in (str, Traced):
            trace.fail()
        parts += value.parts if type(value) is Traced else [code_of(trace, value)] if value else []
    return Traced(trace, "".join(map(_text, values)), *parts)
