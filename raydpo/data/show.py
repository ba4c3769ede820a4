"""Show pairs in the terminal exactly as the model sees them, and which of their tokens count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import RenderableType
from rich.text import Text

from raydpo.data.counting import token_weights
from raydpo.data.lists import starts_of_table
from raydpo.data.select import COUNT_COLUMNS, LABEL, LIST_COLUMNS
from raydpo.data.tokenise import Tokeniser

__all__ = ["render_pairs"]

_STYLES = {"chosen": ("green", "green underline"), "rejected": ("red", "red underline")}
_NO_LOSS = ("dim", "dim")
_SPECIAL = " reverse"
_FACTS = "cyan"
_ALONE = {1: ("chosen", "desirable"), -1: ("rejected", "undesirable")}
"""Side and name of the completion of a row with a label."""
_LONGEST_CHARACTER = 4
"""Bytes, and so at most tokens, of one character."""


def render_pairs(table: pa.Table, tokeniser: Tokeniser, count: int, *, coloured: bool = True) -> Iterator[RenderableType]:
    """The first ``count`` pairs, or ranked lists, of a table of ``pairs.PAIR_SCHEMA``, as rich renderables.

    The prompt is dim (no loss). Completion tokens that count are coloured (loss), every second one underlined to show where
    one ends; those that do not count are dim. Where weights other than 0 and 1 occur, each run of tokens begins with its
    weight, such as ``[x0.1]``. Special tokens are spelled out, in reverse video. Control characters are escaped, so that
    data cannot control the terminal.

    Args:
        coloured: whether the output shows colours. If not, each run of tokens of a completion of which not everything counts
            is on lines of its own, below one that says how many tokens it has and how much they count.
    """
    starts = starts_of_table(table)
    first = table.slice(0, count if starts is None else int(starts[: count + 1][-1]))
    for number, row in enumerate(first.to_pylist()):
        if starts is None or number in starts:
            yield from _begin(row, tokeniser.tokenizer)
        for side, name in _completions(row):
            weights = token_weights(first, side, number)
            masked = COUNT_COLUMNS[0] in row and bool((weights != 1).any())
            dim = coloured and not weights.all()
            told = _facts(row, side, weights if masked else None) + (", the others are dim" if masked and dim else "")
            text = _heading(name, f"{told}, key {row[f'{side}_key'].hex()}")
            yield text.append_text(_completion(row, side, weights if masked else None, tokeniser.tokenizer, coloured))


def _begin(row: dict[str, Any], tokenizer: Any) -> Iterator[RenderableType]:
    """The name of a pair or of a ranked list, and its prompt."""
    yield Text(_visible(f"\n{row['pair_id']}  (source {row['source']}, weight {row['weight']:g})"), style="bold")
    if LIST_COLUMNS[0] in row:
        yield Text("a ranked list, the best completion has place 1", style=_FACTS)
    ids = row["prompt_ids"]
    yield _heading("prompt", f"{len(ids)} tokens, no loss").append_text(_tokens(ids, [], tokenizer, _NO_LOSS))


def _completions(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Side and name of each completion of a row: two, or the one that has a label or is the last of a ranked list."""
    if row.get(LABEL):
        return [_ALONE[row[LABEL]]]
    sides = [side for side in _STYLES if side == "chosen" or row[f"{side}_full"] or LIST_COLUMNS[0] not in row]
    if LIST_COLUMNS[0] in row:
        return [(side, f"place {row[f'{side}_rank'] + 1}") for side in sides]
    return [(side, side) for side in sides]


def _heading(name: str, facts: str) -> Text:
    return Text().append(f"{name:<9} {facts}\n", style=_FACTS)


def _facts(row: dict[str, Any], side: str, weights: np.ndarray | None) -> str:
    used, full = len(row[f"{side}_ids"]), row[f"{side}_full"]
    told = f"{used} tokens" + (f" of {full}, TRUNCATED: the last {full - used} are not used" if full > used else "")
    if weights is not None:
        told += f", {int((weights > 0).sum())} count"
        told += "" if _plain(weights) else f" with weights that sum to {weights.sum(dtype=np.float64):.6g}"
    return told


def _plain(weights: np.ndarray) -> bool:
    """Whether each token counts once or not at all."""
    return bool(np.isin(weights, (0, 1)).all())


def _completion(row: dict[str, Any], side: str, weights: np.ndarray | None, tokenizer: Any, coloured: bool) -> Text:
    """The tokens of a completion.

    Args:
        weights: of each token; None = all count alike.
    """
    ids, before = row[f"{side}_ids"], row["prompt_ids"][-1:]  # decode in context: see ``_tokens``
    if weights is None:
        return _tokens(ids, before, tokenizer, _STYLES[side])
    text, plain = Text(), _plain(weights)
    starts = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist()]
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        weight = float(weights[start])
        run = _tokens(ids[start:stop], before, tokenizer, _STYLES[side] if weight else _NO_LOSS)
        if not coloured:
            text.append("" if not start or text.plain.endswith("\n") else "\n")
            text.append(f"  -- {_run(stop - start, weight)}\n", style=_FACTS)
        elif not plain:
            text.append(f"[x{weight:g}]", style=_FACTS)
        text.append_text(run)
        before = ids[stop - 1 : stop]
    return text


def _run(tokens: int, weight: float) -> str:
    many = "1 token" if tokens == 1 else f"{tokens} tokens"
    if not weight:
        return f"{many} that do{'es' if tokens == 1 else ''} not count:"
    if tokens == 1:
        return f"{many} that counts{'' if weight == 1 else f' {weight:g}'}:"
    return f"{many} that count{'' if weight == 1 else f' {weight:g} each'}:"


def _tokens(ids: Sequence[int], before: Sequence[int], tokenizer: Any, styles: tuple[str, str]) -> Text:
    """Runs of tokens whose bytes form whole characters, in alternating styles.

    Args:
        before: the token before ``ids``: some tokenizers drop the space before the first token they decode.
    """
    special = set(tokenizer.all_special_ids)
    text = Text()
    pending: list[int] = []
    shown = 0
    for position, token in enumerate(ids):
        pending.append(token)
        piece = _decoded(tokenizer, list(before), pending)
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
