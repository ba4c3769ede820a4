"""Compare the settings of two runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["changed_settings"]


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings that differ, as ``key: old -> new``."""
    # Through JSON, as the stored side was.
    now = json.loads(json.dumps(dict(now)))
    return [f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in sorted({*before, *now})
            if before.get(key) != now.get(key)]
