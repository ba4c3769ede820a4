"""A finding: one thing that the reader of a page should look at."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """What was found, why it matters or what to do, and the lines of configuration that do it, if there are any."""

    title: str
    found: str
    why: str
    setting: str | None = None
