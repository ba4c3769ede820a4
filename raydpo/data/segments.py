"""Tokenises rendered conversations piece by piece, so that what many of them hold is tokenised once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from raydpo.data.words import Words
from raydpo.errors import FilesError

__all__ = ["Segments", "any_of"]

_COMPARED = 30
"""First texts that are also tokenised whole, to compare."""
_EVERY = 500
"""Afterwards one of so many texts is."""
_PROBE = "x"
Encode = Callable[[list[str]], list[list[int]]]


class Segments:
    """Splits texts at special tokens, and tokenises each distinct piece of a batch once, where possible word by word.

    A tokenizer splits a text at its added tokens before all else, and treats the pieces one by one. The prompt of a pair
    stands in three texts, and the words that a template writes in all texts. Ids are those of the whole texts: where the
    tokenizer treats the beginning of a text otherwise than the rest, or differs on the first texts, all are taken whole.
    """

    def __init__(self, tokenizer: Any, words: Words | None, encode: Encode, whole: Encode | None = None) -> None:
        """Args:
        words: the tokenizer's words, if it has such.
        encode: ids of each text, without special tokens that the tokenizer adds.
        whole: ids of each text, with those that it adds before and after, if they are wanted.
        """
        self._encode, self._whole = encode, whole or encode
        self._before = self._after = b""
        self._token_ids = _tokens_to_split_at(tokenizer)
        self._words: Words | None = None
        self._compared = self._since = 0
        if self._token_ids:
            self._split = re.compile(f"({any_of(self._token_ids)})").split
            # Other added tokens are found within the pieces.
            if all(str(token) in self._token_ids for token in tokenizer.added_tokens_decoder.values()):
                self._words = words
            if whole is not None:
                self._find_added()

    def encode(self, texts: list[str]) -> list[bytes]:
        """The ids of each text, as the bytes of little-endian int32.

        Raises:
            FilesError: if a later text differs, after the first ones did not.
        """
        if not self._token_ids:
            return self._taken_whole(texts)
        pieces = [self._split(text) for text in texts]
        known: dict[str, bytes] = {"": b""} | {token: _bytes([number]) for token, number in self._token_ids.items()}
        missing = dict.fromkeys(piece for each in pieces for piece in each if piece not in known)
        if self._words is not None:
            encode = self._words.encode
            known.update((piece, ids) for piece in missing if (ids := encode(piece)) is not None)
            missing = [piece for piece in missing if piece not in known]
        missing = list(missing)
        known.update(zip(missing, map(_bytes, self._encode(missing) if missing else []), strict=True))
        found = [b"".join([self._before, *map(known.__getitem__, each), self._after]) for each in pieces]
        if self._compared < _COMPARED:
            compared = texts[: _COMPARED - self._compared]
            self._compared += len(compared)
            if self._taken_whole(compared) != found[: len(compared)]:
                self._token_ids = {}
                return self._taken_whole(texts)
        self._since += len(texts)
        if self._since >= _EVERY:
            self._since = 0
            if self._taken_whole(texts[-1:]) != found[-1:]:
                raise FilesError(
                    f"the tokenizer gives other ids for a whole text than for its pieces: {texts[-1][:200]!r}; this is a "
                    "fault of raydpo. Please report it with the name of the tokenizer"
                )
        return found

    def _taken_whole(self, texts: list[str]) -> list[bytes]:
        return [_bytes(ids) for ids in self._whole(texts)] if texts else []

    def _find_added(self) -> None:
        """Find what the tokenizer adds before and after a text; where that cannot be told, texts are taken whole."""
        (bare,), (full,) = self._encode([_PROBE]), self._whole([_PROBE])
        places = [place for place in range(len(full)) if full[place : place + len(bare)] == bare]
        if len(places) == 1 and bare:
            self._before, self._after = _bytes(full[: places[0]]), _bytes(full[places[0] + len(bare) :])
        else:
            self._token_ids = {}


def _bytes(ids: list[int]) -> bytes:
    return np.array(ids, "<i4").tobytes()


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
