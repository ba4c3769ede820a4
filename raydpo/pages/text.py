"""Text of data and models, made safe and short enough for a page."""

from __future__ import annotations

import re

__all__ = ["shown"]


MOST_CHARACTERS = 1200
# C0 and C1 controls except line feed and tab, marks that change the direction of text, zero-width and tag characters.
_HIDDEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def shown(text: str, keep_end: bool = False) -> str:
    """Make invisible and direction-changing characters visible, and leave out the middle of a long text."""
    if len(text) > MOST_CHARACTERS:
        head = MOST_CHARACTERS // (4 if keep_end else 2)
        tail = MOST_CHARACTERS - head
        text = f"{text[:head]} [... {len(text) - head - tail:,} characters left out ...] {text[-tail:]}"
    return _HIDDEN.sub(lambda found: f"\u27e8U+{ord(found[0]):04X}\u27e9", text)
