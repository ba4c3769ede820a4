"""The columns of a record of prompts that reward functions get, as JSON."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Collection, Mapping
from datetime import date, datetime, time
from typing import Any

from raydpo.data.messages import Notes
from raydpo.rewards.call import ARGUMENTS

__all__ = ["as_json", "other_columns"]

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
_AS_TEXT = "dates and times are given to reward functions as text"
_AS_BASE64 = "bytes are given to reward functions as text in base64"
_NOT_FINITE = "warning: numbers that are not finite (NaN, Infinity) are given to reward functions as null"


def other_columns(record: Mapping[str, Any], used: Collection[str]) -> tuple[str, tuple[str, ...]]:
    """Return the columns of ``record`` beside its prompt as a JSON object, and how they were changed.

    Args:
        used: columns that hold the prompt.
    """
    notes: Notes = {}
    given = {name: value for name, value in record.items() if name not in used}
    for name in ARGUMENTS:
        if name in given:
            del given[name]
            notes[
                f"warning: the column {name!r} is not given to reward functions, which have an argument of this name; "
                "rename it with the source's 'columns' if they need it"
            ] = None
    text = as_json(given, notes)
    return text, tuple(notes)


def as_json(value: Any, notes: Notes) -> str:
    """Return ``value`` as JSON, and add to ``notes`` what JSON cannot hold."""
    try:
        return _encode(value)
    except (TypeError, ValueError):
        return _encode(_plain(value, notes))


def _plain(value: Any, notes: Notes) -> Any:
    """``value`` made of what JSON has."""
    if isinstance(value, float) and not math.isfinite(value):
        notes[_NOT_FINITE] = None
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(entry, notes) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, notes) for entry in value]
    if isinstance(value, bytes):
        notes[_AS_BASE64] = None
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, (date, datetime, time)):
        notes[_AS_TEXT] = None
        return value.isoformat()
    notes[f"warning: values of type {type(value).__name__} are given to reward functions as text"] = None
    return str(value)
