"""Text of data and models, made safe and short enough for a page."""

from __future__ import annotations

__all__ = ["shown"]


MOST_CHARACTERS = 1200
# C0 and C1 controls except line feed and tab, marks that change the direction of text, zero-width and tag characters.
_HIDDEN = {
    *range(0x00, 0x09),
    *range(0x0B, 0x20),
    *range(0x7F, 0xA0),
    0x00AD,
    0x061C,
    *range(0x200B, 0x2010),
    *range(0x2028, 0x202F),
    *range(0x2060, 0x2070),
    0xFEFF,
    *range(0xFFF9, 0xFFFC),
    *range(0xE0000, 0xE0080),
}
_VISIBLE = {code: f"\u27e8U+{code:04X}\u27e9" for code in _HIDDEN}


def shown(text: str, keep_end: bool = False) -> str:
    """Make invisible and direction-changing characters visible, and leave out the middle of a long text."""
    if len(text) > MOST_CHARACTERS:
        head = MOST_CHARACTERS // (4 if keep_end else 2)
        tail = MOST_CHARACTERS - head
        text = f"{text[:head]} [... {len(text) - head - tail:,} characters left out ...] {text[-tail:]}"
    return text.translate(_VISIBLE)
