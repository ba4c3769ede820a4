"""Tokenises rendered conversations piece by piece, so that what many of them hold is tokenised once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["Segments", "any_of"]

_COMPARED = 30
"""Texts that are also tokenised whole, to compare."""
Encode = Callable[[list[str]], list[list[int]]]


class Segments:
    """Splits texts at special tokens, and tokenises each distinct piece of a batch once.

    A tokenizer splits a text at its added tokens before all else, and treats the pieces one by one. The prompt of a pair
    stands in three texts, and the words that a template writes in all texts. Ids are those of the whole texts: where the
    tokenizer treats the beginning of a text otherwise than the rest, or differs on the first texts, all are taken whole.
    """

    def __init__(self, tokenizer: Any, encode: Encode) -> None:
        """Args:
        encode: ids of each text, without special tokens that the tokenizer adds.
        """
        self._encode = encode
        self._token_ids = _tokens_to_split_at(tokenizer)
        self._split = re.compile(f"({any_of(self._token_ids)})").split
        self._compared = 0

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text."""
        if not self._token_ids:
            return self._encode(texts)
        pieces = [self._split(text) for text in texts]
        known: dict[str, list[int]] = {"": []} | {token: [number] for token, number in self._token_ids.items()}
        missing = list(dict.fromkeys(piece for each in pieces for piece in each if piece not in known))
        known.update(zip(missing, self._encode(missing) if missing else [], strict=True))
        found = []
        for each in pieces:
            ids: list[int] = []
            for piece in each:
                ids += known[piece]
            found.append(ids)
        if self._compared < _COMPARED:
            compared = texts[: _COMPARED - self._compared]
            self._compared += len(compared)
            if self._encode(compared) != found[: len(compared)]:
                self._token_ids = {}
                return self._encode(texts)
        return found


def any_of(texts: Iterable[str]) -> str:
    """A pattern of the longest of ``texts``, quick for the thousands of tokens that some tokenizers have."""
    by_first: dict[str, list[str]] = {}
    ends = False
    for text in texts:
        if text:
            by_first.setdefault(text[0], []).append(text)
        else:
            ends = True
    options = []
    for alike in by_first.values():
        low, high = min(alike), max(alike)
        same = next((place for place, (one, other) in enumerate(zip(low, high, strict=False)) if one != other), len(low))
        start = low[:same]
        options.append(re.escape(start) + (any_of(text[len(start) :] for text in alike) if len(alike) > 1 else ""))
    return f"(?:{'|'.join(options)})" + ("?" if ends else "") if options else ""


def _tokens_to_split_at(tokenizer: Any) -> dict[str, int]:
    """Tokens at which the tokenizer itself splits any text first, with their ids; none if it may do otherwise."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(tokenizer, "split_special_tokens", False):
        return {}
    steps = [step.__getstate__() for step in (backend.normalizer, backend.pre_tokenizer) if step is not None]
    if any(b'"first"' in bytes(step) for step in steps):  # adds a space to the first piece only
        return {}
    added = tokenizer.added_tokens_decoder
    raw = {str(token): number for number, token in added.items() if not token.normalized}
    plain = {text: number for text, number in raw.items() if not (added[number].lstrip or added[number].rstrip)}
    # Tokens that overlap others, or that count only as whole words, are found otherwise than by their text.
    if raw.keys() != plain.keys() or any(token.single_word for token in added.values()):
        return {}
    return plain
