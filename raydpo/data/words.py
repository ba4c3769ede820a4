"""Splits texts into words as a byte-level tokenizer does, and tokenises each distinct word once."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

__all__ = ["Words"]

_MOST_WORDS, _LONGEST = 200_000, 100
"""Words that are kept, and the characters of the longest of them: about 50 MB."""
_RANGES = ((0x20, 0x7E), (0xA1, 0x24F), (0x386, 0x3CE), (0x400, 0x52F), (0x2010, 0x2027), (0x2030, 0x205E), (0x20A0, 0x20AF))
"""Characters of texts that are split here: ASCII, Latin, Greek and Cyrillic letters, punctuation and currencies."""
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What ``ByteLevel`` with ``use_regex`` splits at (tokenizers, src/pre_tokenizers/byte_level.rs)."""
_OTHERWISE = re.compile(r"\\[A-RT-Za-moqu-z0-9]|\\p[^{]|\\p\{\^|[\d,]\}\+|&&|\(\?[<>a-hj-z#-]|ss")
"""Syntax that Python's ``re`` lacks, or reads otherwise than Oniguruma."""
_PROPERTY = re.compile(r"\\p\{(\w+)\}")
_TRIED = (
    "I'm we'll I've you're it's can't he'd WE'LL we'd You'Ve 'tis 'RE don't 'x ' \" she's5 a'b",
    "a1b22c333d4444 5 66 7_8 9.0 1,234 -5 +6 $7 \u20ac8 9%",
    "  two   three    four \t tab\t\ttabs \n line\n\nlines \r\n crlf\r\n\r\n end \n  x\n\n  y  \n",
    "\n",
    " ",
    "  ",
    "x",
    "",
    "!! ?? ... -- :) <b>x</b> a/b c\\d {e} [f] (g) `h` ~i ^j |k| #l @m &n *o* =p; .q ,r !s\n?\r\n/t\n\n//u",
    "\xc9lan na\xefve \u0152UVRE \u01c5 \u01c6 \xdf \u017dlu\u0165ou\u010dk\xfd \u201cquoted\u201d",
    " \u2018single\u2019 \u2013 \u2014 \u2026 \u2030 \u20ac \xbd \xb2 \xb5 \xd7 \xf7 \xbf \xa1 \xab \xbb",
    " \xa9\xae\xb0\xb1 \u03a9\u03bc\u03ad\u03b3\u03b1 \u041f\u0440\u0438\u0432\u0435\u0442,",
    " \u043c\u0438\u0440!\u0401\u0436",
    "CamelCase XMLHttp iOS ABCdef ABC abcDEF aB \xc9'\xc9 \xc9\u2019s \u04452 2\u0445 \xb2x x\xb2 \xbd\xbd \u01c5x",
    "a-b a\u2013b '\xdf '\xe9 \xe9' \u2019\xe9 1\xe9 \xe91 !\xe9 \xe9! \t\xe9 \n\xe9 \xe9\n \xe9 \t\xe9",
)
"""Texts on which our split must be the tokenizer's."""

Split = Callable[[str], list[str]]


class Words:
    """Tokenises texts word by word, and remembers words.

    A byte-level tokenizer splits a text with a regular expression, and tokenises the words one by one with its BPE model.
    Python's ``re`` does the same split many times as fast, for characters of which both know the same.
    """

    def __init__(self, model: Any, split: Split) -> None:
        """Args:
        model: the tokenizer's BPE model, of package tokenizers.
        split: the words of a text.
        """
        self._model, self._split = model, split
        self._known: dict[str, bytes] = {}

    @classmethod
    def of(cls, backend: Any) -> Words | None:
        """The words of a tokenizer of package tokenizers; None if it does not work so, or is not known to."""
        try:
            split = _split_of(backend)
            if split is None or not all(_agrees(backend.pre_tokenizer, split, text) for text in _TRIED):
                return None
            return cls(backend.model, split)
        except Exception:  # forms of later versions
            return None

    def encode(self, text: str) -> bytes | None:
        """Ids of ``text``, little-endian int32; None if it has characters that are not split here."""
        if _other_characters()(text):
            return None
        words = self._split(text)
        try:
            return b"".join(map(self._known.__getitem__, words))
        except KeyError:
            return self._with_new(words)

    def _with_new(self, words: list[str]) -> bytes:
        known = self._known
        if len(known) > _MOST_WORDS:
            known.clear()
        new = set(words).difference(known)
        for word in new:
            known[word] = np.array([token.id for token in self._model.tokenize(_mapped(word))], "<i4").tobytes()
        found = b"".join(map(known.__getitem__, words))
        for word in new:
            if len(word) > _LONGEST:
                del known[word]
        return found


def _split_of(backend: Any) -> Split | None:
    """The split of a tokenizer; None if it is not known to work so."""
    model, steps = backend.model, json.loads(backend.pre_tokenizer.__getstate__())
    # NFC leaves the characters that are split here as they are.
    normalizer = None if backend.normalizer is None else json.loads(backend.normalizer.__getstate__())["type"]
    if type(model).__name__ != "BPE" or normalizer not in (None, "NFC"):
        return None
    if model.dropout or model.end_of_word_suffix or model.continuing_subword_prefix:
        return None
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    if steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    patterns = []
    for step in steps[:-1]:
        if step["type"] == "Digits":
            patterns.append(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
        elif (
            step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]
        ):
            patterns.append(step["pattern"]["Regex"])
        else:
            return None
    if steps[-1]["use_regex"]:
        patterns.append(_GPT2)
    if not patterns or any(map(_OTHERWISE.search, patterns)):
        return None
    first, *others = [_isolating(_translated(pattern)) for pattern in patterns]
    if not others:
        return first

    def split(text: str) -> list[str]:
        words = first(text)
        for other in others:
            words = [part for word in words for part in other(word)]
        return words

    return split


def _isolating(pattern: str) -> Split:
    """A split into what ``pattern`` matches, and what stands between."""
    compiled = re.compile(pattern, re.ASCII)  # of the characters that are split here, only ASCII has white space and digits
    if compiled.groups:
        raise ValueError("groups that capture")

    def split(text: str) -> list[str]:
        words = compiled.findall(text)
        if len("".join(words)) == len(text) and "" not in words:
            return words
        words, end = [], 0
        for match in compiled.finditer(text):
            words += filter(None, (text[end : match.start()], match[0]))
            end = match.end()
        return [*words, text[end:]] if end < len(text) else words

    return split


def _translated(pattern: str) -> str:
    """A regular expression of Oniguruma for Python, with Unicode's properties written out."""
    found, end, within = [], 0, False
    while end < len(pattern):
        character = pattern[end]
        if prop := _PROPERTY.match(pattern, end):
            signs = _signs(prop[1])
            found.append(signs if within else f"[{signs}]" if signs else "(?!)")
            end = prop.end()
            continue
        if character == "\\":
            found.append(pattern[end : end + 2])
            end += 2
            continue
        if within and character == "[":
            raise ValueError("a class within a class")
        within = character == "[" or (within and character != "]")
        found.append(character)
        end += 1
    return "".join(found)


@lru_cache(1)
def _characters() -> dict[str, str]:
    """The characters of texts that are split here, each with its category.

    The category of each is that of Unicode 3.2, so all later versions agree, and NFC leaves it as it is. None but ASCII
    letters are the same as an ASCII letter when case is ignored. Patterns may not have ss, which is the same as a German
    sharp s.
    """
    found = dict.fromkeys("\t\n\r", "Cc")
    for start, stop in _RANGES:
        for sign in map(chr, range(start, stop + 1)):
            category = unicodedata.category(sign)
            stable = category == unicodedata.ucd_3_2_0.category(sign) and unicodedata.is_normalized("NFC", sign)
            folded = sign.casefold()
            alone = sign == "\u00df" or (len(folded) == 1 and folded.isascii() == sign.isascii())
            if (stable and alone and category[0] not in "ZCM" and not unicodedata.combining(sign)) or sign == " ":
                found[sign] = category
    return found


def _signs(prop: str) -> str:
    """Characters with a property such as ``L`` or ``Lu``, for a class of a regular expression."""
    if not re.fullmatch("[LMNPSZC][a-z]?", prop):
        raise ValueError(f"property {prop!r}")
    return "".join(re.escape(sign) for sign, category in _characters().items() if category.startswith(prop))


@lru_cache(1)
def _other_characters() -> Callable[[str], Any]:
    return re.compile(f"[^{''.join(map(re.escape, _characters()))}]").search


@lru_cache(1)
def _signs_of_bytes() -> dict[int, str]:
    """The characters by which byte-level tokenizers write bytes: themselves if they can be seen, others from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + number) for number, byte in enumerate(others)}


def _mapped(word: str) -> str:
    return word.encode().decode("latin-1").translate(_signs_of_bytes())


def _agrees(pre_tokenizer: Any, split: Split, text: str) -> bool:
    return [word for word, _ in pre_tokenizer.pre_tokenize_str(text)] == [_mapped(word) for word in split(text)]
