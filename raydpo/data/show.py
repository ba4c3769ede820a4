"""Pairs in the terminal exactly as the model will see them."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
from rich.console import RenderableType
from rich.text import Text

from raydpo.data.tokenise import Tokeniser

__all__ = ["render_pairs"]

_STYLES = {"chosen": ("green", "green underline"), "rejected": ("red", "red underline")}


def render_pairs(table: pa.Table, tokeniser: Tokeniser, count: int) -> Iterator[RenderableType]:
    """The first ``count`` pairs of a table of ``pairs.PAIR_SCHEMA``.

    The prompt is dim (no loss), completion tokens are coloured (loss), alternately underlined to show where one ends.
    Special tokens are spelled out. Control characters of hostile data are shown, not obeyed.
    """
    for row in table.slice(0, count).to_pylist():
        yield Text(f"\n{row['pair_id']}  (source {row['source']})", style="bold")
        prompt = Text(f"prompt    {len(row['prompt_ids'])} tokens\n", style="cyan")
        prompt.append_text(_tokens(row["prompt_ids"], tokeniser, ("dim", "dim")))
        yield prompt
        for side, styles in _STYLES.items():
            ids, full = row[f"{side}_ids"], row[f"{side}_full"]
            cut = f", cut from {full}" if full > len(ids) else ""
            text = Text(f"{side:<9} {len(ids)} tokens{cut}, key {row[f'{side}_key'].hex()}\n", style="cyan")
            text.append_text(_tokens(ids, tokeniser, styles))
            yield text


def _tokens(ids: list[int], tokeniser: Tokeniser, styles: tuple[str, str]) -> Text:
    """Runs of tokens whose bytes form whole characters, in alternating styles."""
    text = Text()
    pending: list[int] = []
    shown = 0
    for position, token in enumerate(ids):
        pending.append(token)
        piece = tokeniser.tokenizer.decode(pending, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if piece.endswith("\N{REPLACEMENT CHARACTER}") and position + 1 < len(ids) and len(pending) < 4:
            continue  # part of a character that the next token completes
        text.append(_visible(piece), style=styles[shown % 2])
        pending, shown = [], shown + 1
    return text


def _visible(text: str) -> str:
    """Control characters, escape sequences among them, as their Unicode pictures; line ends stay."""
    return "".join(char if char == "\n" or char.isprintable() else
                   chr(0x2400 + ord(char)) if ord(char) < 0x20 else f"\\u{ord(char):04x}" for char in text)
