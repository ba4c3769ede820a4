"""Flatten and compare the settings of runs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_DIGEST = re.compile("[0-9a-f]{16,}")

TRAINING_PAIRS = "data.train (pairs)"
"""The key of a fingerprint that holds the digest of the training pairs."""

__all__ = ["TRAINING_PAIRS", "changed_settings", "flatten_settings"]


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any], words: Mapping[str, str] | None = None) -> list[str]:
    """Settings that differ, as ``key: old -> new``, or ``key has changed`` if both are digests.

    Args:
        words: what to say in place of that, by key.
    """
    # Through JSON, as the stored side was.
    now = json.loads(json.dumps(dict(now)))
    changed = (key for key in sorted({*before, *now}) if before.get(key) != now.get(key))
    words = words or {}
    return [words[key] if key in words else _change(key, before.get(key), now.get(key)) for key in changed]


def _change(key: str, before: Any, now: Any) -> str:
    if all(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (before, now)):
        return f"{key} has changed"
    return f"{key}: {before!r} -> {now!r}"


def flatten_settings(tree: Mapping[str, Any], prefix: str = "", *, lists: bool = False) -> dict[str, Any]:
    """Flatten a nested configuration to keys such as ``train.beta``; with ``lists`` also ``data.train.0.path``, but the list
    of a ``train_on`` stays one value."""
    found: dict[str, Any] = {}
    for name, below in tree.items():
        if lists and name != "train_on" and isinstance(below, list) and below and isinstance(below[0], dict):
            below = {str(index): each for index, each in enumerate(below)}
        nested = isinstance(below, dict) and below
        found |= flatten_settings(below, f"{prefix}{name}.", lists=lists) if nested else {f"{prefix}{name}": below}
    return found
