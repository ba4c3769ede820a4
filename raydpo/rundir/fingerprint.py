"""Flatten and compare the settings of runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["changed_settings", "flatten_settings"]


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings that differ, as ``key: old -> new``."""
    # Through JSON, as the stored side was.
    now = json.loads(json.dumps(dict(now)))
    changed = (key for key in sorted({*before, *now}) if before.get(key) != now.get(key))
    return [f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed]


def flatten_settings(tree: Mapping[str, Any], prefix: str = "", *, lists: bool = False) -> dict[str, Any]:
    """Flatten a nested configuration to keys such as ``train.beta``; with ``lists`` also ``data.train.0.path``."""
    found: dict[str, Any] = {}
    for name, below in tree.items():
        if lists and isinstance(below, list) and below and isinstance(below[0], dict):
            below = {str(index): each for index, each in enumerate(below)}
        nested = isinstance(below, dict) and below
        found |= flatten_settings(below, f"{prefix}{name}.", lists=lists) if nested else {f"{prefix}{name}": below}
    return found
