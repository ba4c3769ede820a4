"""Show pairs in the terminal exactly as the model sees them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from rich.console import RenderableType
from rich.text import Text

from raydpo.data.tokenise import Tokeniser

__all__ = ["render_pairs"]

_STYLES = {"prompt": ("dim", "dim"), "chosen": ("green", "green underline"), "rejected": ("red", "red underline")}
_SPECIAL = " reverse"
_LONGEST_CHARACTER = 4
"""Bytes, and so at most tokens, of one character."""


def render_pairs(table: pa.Table, tokeniser: Tokeniser, count: int) -> Iterator[RenderableType]:
    """The first ``count`` pairs of a table of ``pairs.PAIR_SCHEMA``, as rich renderables.

    The prompt is dim (no loss). Completion tokens are coloured (loss), every second one underlined to show where one ends.
    Special tokens are spelled out, in reverse video. Control characters are escaped, so that data cannot control the
    terminal.
    """
    for row in table.slice(0, count).to_pylist():
        yield Text(_visible(f"\n{row['pair_id']}  (source {row['source']}, weight {row['weight']:g})"), style="bold")
        yield _part("prompt", row, tokeniser, f"{len(row['prompt_ids'])} tokens, no loss")
        for side in ("chosen", "rejected"):
            used, full = len(row[f"{side}_ids"]), row[f"{side}_full"]
            cut = f" of {full}, TRUNCATED: the last {full - used} are not used" if full > used else ""
            yield _part(side, row, tokeniser, f"{used} tokens{cut}, key {row[f'{side}_key'].hex()}")


def _part(name: str, row: dict[str, Any], tokeniser: Tokeniser, facts: str) -> Text:
    text = Text().append(f"{name:<9} {facts}\n", style="cyan")
    # Decode in context: some tokenizers drop the space before the first token.
    before = row["prompt_ids"][-1:] if name != "prompt" else []
    return text.append_text(_tokens(row[f"{name}_ids"], before, tokeniser.tokenizer, _STYLES[name]))


def _tokens(ids: list[int], before: list[int], tokenizer: Any, styles: tuple[str, str]) -> Text:
    """Runs of tokens whose bytes form whole characters, in alternating styles."""
    special = set(tokenizer.all_special_ids)
    text = Text()
    pending: list[int] = []
    shown = 0
    for position, token in enumerate(ids):
        pending.append(token)
        piece = _decoded(tokenizer, before, pending)
        if piece.endswith("\N{REPLACEMENT CHARACTER}") and position + 1 < len(ids) and len(pending) < _LONGEST_CHARACTER:
            continue  # part of a character that the next token completes
        style = styles[shown % 2] + (_SPECIAL if token in special else "")
        text.append(_visible(piece), style=style)
        before, pending, shown = pending[-1:], [], shown + 1
    return text


def _decoded(tokenizer: Any, before: list[int], ids: list[int]) -> str:
    def decode(part: list[int]) -> str:
        return tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    context, whole = decode(before), decode(before + ids)
    return whole[len(context) :] if before and whole.startswith(context) else decode(ids)


def _visible(text: str) -> str:
    """``text`` with control and format characters escaped, except newlines and tabs."""
    return "".join(char if char in "\n\t" or char.isprintable() else char.encode("unicode_escape").decode() for char in text)
