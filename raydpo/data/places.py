"""Finds which token of a completion a character of its text belongs to."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np

from raydpo.data.shapes import common_prefix

__all__ = ["TokenPlaces"]

_BYTE = re.compile("<0x[0-9A-F]{2}>")
_SPACE, _SPACE_OF_BYTES = "\u2581", "\u0120"
"""What stands for a space in the tokens of SentencePiece and of byte-level tokenizers."""
Place = Callable[[int], int | None]
"""The first token of a completion that belongs to what begins at a character, or None if that cannot be told."""


class TokenPlaces:
    """Finds the tokens of a completion by the characters of its text.

    A token at a boundary belongs to the part of its first character that is not white space, and a token of white space to
    the part of its first character. The texts of a completion's tokens, one after another, must be the end of the text. If
    they are not, for instance since the tokenizer changes characters, the fast tokenizer's own places are taken, checked to
    be of the same ids, and else what begins at a character must begin with a token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._byte_level = _has(tokenizer, _SPACE_OF_BYTES) and not _has(tokenizer, _SPACE)
        self._bytes: dict[int, bytes] = {}

    def of(self, text: str, ids: np.ndarray, *, special: bool) -> Place:
        """Places in a completion.

        Args:
            text: the whole text, which ends where the completion ends.
            ids: tokens of the completion, int32 [tokens].
            special: whether the tokenizer adds its special tokens to such a text.
        """
        written = text.encode(errors="surrogatepass")
        pieces = self._texts(ids.tolist())
        if pieces is not None and written.endswith(b"".join(pieces)):
            return _by_bytes(text, written, pieces)
        return self._by_offsets(text, ids, special) or self._by_prefixes(text, ids, special)

    def _texts(self, ids: list[int]) -> list[bytes] | None:
        known = self._bytes
        try:
            return [known[number] for number in ids]
        except KeyError:
            missing = [number for number in dict.fromkeys(ids) if number not in known]
        added = self._tokenizer.added_tokens_decoder
        for number, token in zip(missing, self._tokenizer.convert_ids_to_tokens(missing), strict=True):
            if token is None:
                return None
            known[number] = str(token).encode() if number in added else self._bytes_of(token)
        return [known[number] for number in ids]

    def _bytes_of(self, token: str) -> bytes:
        if self._byte_level:
            try:
                return bytes(map(_byte_level().__getitem__, token))
            except KeyError:  # a token that was added
                return token.encode()
        if _BYTE.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        return token.replace(_SPACE, " ").encode(errors="surrogatepass")

    def _by_offsets(self, text: str, ids: np.ndarray, special: bool) -> Place | None:
        if not getattr(self._tokenizer, "is_fast", False):
            return None
        found = self._tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        if found["input_ids"][-len(ids) :] != ids.tolist():
            return None
        firsts = []
        for start, end in found["offset_mapping"][-len(ids) :]:
            piece = text[start:end]
            blank = len(piece) - len(piece.lstrip())
            # A token that the tokenizer adds has no characters.
            firsts.append(len(text) if start == end == 0 else start + (blank if blank < len(piece) else 0))
        places = np.maximum.accumulate(np.array(firsts))
        return lambda character: int(np.searchsorted(places, character, "left"))

    def _by_prefixes(self, text: str, ids: np.ndarray, special: bool) -> Place:
        def encoded(part: str) -> np.ndarray:
            return np.array(self._tokenizer(part, add_special_tokens=special, verbose=False)["input_ids"], np.int32)

        whole = encoded(text)
        before = len(whole) - len(ids)

        def place(character: int) -> int | None:
            if before < 0 or not np.array_equal(whole[before:], ids):
                return None
            if character >= len(text):
                return len(ids)
            start = encoded(text[:character])
            common = common_prefix(start, whole)
            return max(common - before, 0) if common == len(start) else None

        return place


def _has(tokenizer: Any, token: str) -> bool:
    number = tokenizer.convert_tokens_to_ids(token)
    return number is not None and tokenizer.convert_ids_to_tokens(number) == token


def _by_bytes(text: str, written: bytes, pieces: Sequence[bytes]) -> Place:
    """Places by the bytes of each token."""
    ends = list(accumulate(map(len, pieces)))
    first = len(written) - ends[-1]
    plain = len(written) == len(text)

    def place(character: int) -> int:
        at = (character if plain else len(text[:character].encode(errors="surrogatepass"))) - first
        if at <= 0:
            return 0
        token = bisect_left(ends, at)
        if ends[token] == at:
            return token + 1
        piece = pieces[token].decode(errors="surrogateescape")
        bare = piece.lstrip()
        blank = len(piece[: len(piece) - len(bare)].encode()) if bare else 0
        return token if ends[token] - len(pieces[token]) + blank >= at else token + 1

    return place


@lru_cache(1)
def _byte_level() -> dict[str, int]:
    """Bytes by the characters that stand for them in byte-level tokenizers (GPT-2's ``bytes_to_unicode``)."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(kept)]
    return {chr(byte): byte for byte in kept} | {chr(256 + place): byte for place, byte in enumerate(others)}
