"""Say what a record lacks, by its columns, and which of the forms that are read come near."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import lru_cache

from raydpo.data.messages import CONVERSATIONS
from raydpo.errors import some_of

__all__ = ["lacking", "quoted"]

_FORMS = (
    ("prompt", "chosen", "rejected"),
    ("prompt", "completion", "label"),
    ("messages", "chosen", "rejected"),
    ("prompt", "completions", "scores"),
    ("prompt", "completions", "ranks"),
    ("prompt", "answers (answer, rank)"),
    ("messages", "rejected_response"),
    ("prompt", "response1", "response2", "overall_preference"),
    ("prompt", "response_a", "response_b", "winner"),
    ("prompt", "answer_0", "answer_1", "score_0", "score_1"),
)
_ANSWERS = {"completion", "response", "answer", "output", "text", *CONVERSATIONS}
MOST, LONGEST = 5, 18
"""Names of columns in a reason, and characters of each, so that a reason stays short."""


@lru_cache(maxsize=1024)
def lacking(present: tuple[str, ...], name: str | None = None) -> str:
    """Return what a record with the columns ``present`` lacks, the column ``name`` if given, and the two nearest forms."""
    columns = set(present)
    found = f"found {quoted(present)}" if present else "no column has a value"
    if name is None and not columns & {"chosen", "rejected"}:
        single = columns & _ANSWERS
        if single and (labels := columns & {"label", "labels"}):
            told = quoted([each for each in present if each in single | labels])
            return (
                f"one answer with a label ({told}): if that says whether the answer is good, map the columns to 'prompt', "
                "'completion' and 'label'; otherwise give pairs, a prompt with chosen and rejected"
            )
        if single - {"text"} and not _several_answers(columns - single):
            return (
                "one answer, and neither another to compare it with nor a label: give 'prompt', 'chosen' and 'rejected', or "
                f"'prompt', 'completion' and 'label'; {found}"
            )
    name = name or ("rejected" if "chosen" in columns else "chosen")
    near = sorted(_FORMS, key=lambda form: -_nearness(form, columns))[:2]
    return f"missing column {name!r}, nearest forms: {' or '.join(' + '.join(form) for form in near)}; {found}"


def _several_answers(columns: set[str]) -> bool:
    """Whether names such as ``response_a`` and ``response2`` say that there are several answers."""
    return any(name.rstrip("0123456789_abAB") in ("response", "answer", "output", "completion", "text") for name in columns)


def _nearness(form: tuple[str, ...], columns: set[str]) -> float:
    wanted = [name.split(" ")[0] for name in form]
    best = [max((_likeness(each, name) for name in columns), default=0) for each in wanted]
    return sum(best) / max(len(best), 3)


def _likeness(one: str, other: str) -> float:
    if one == other:
        return 1
    return 0.9 if one in other or other in one else difflib.SequenceMatcher(None, one, other).ratio() / 2


def quoted(names: Iterable[str]) -> str:
    """Return a few of the names, shortened, in quotation marks."""
    return some_of([repr(name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}...") for name in names], MOST)
