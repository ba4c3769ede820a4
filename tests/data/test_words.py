"""Words tokenised one by one give the ids of the whole text, for each kind of split that tokenizers have."""

from __future__ import annotations

import random

import numpy as np
import pytest
from samples import make_tokenizer

from raydpo.data import words
from raydpo.data.words import Words

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"""
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def backend_of(kind: str):
    from tokenizers import Regex, normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, Sequence, Split, Whitespace

    def splits(*patterns, behaviour="isolated"):
        steps = [Split(Regex(pattern), behaviour) for pattern in patterns]
        return Sequence([*steps, ByteLevel(add_prefix_space=False, use_regex=False)])

    backend = make_tokenizer().backend_tokenizer
    if kind == "nfc":
        backend.normalizer = normalizers.NFC()
    if kind == "lower case":
        backend.normalizer = normalizers.Lowercase()
    if kind == "dropout":
        backend.model.dropout = 0.1
    backend.pre_tokenizer = {
        "llama3": lambda: splits(LLAMA3),
        "o200k": lambda: splits(O200K),
        "deepseek": lambda: splits(r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK),
        "digits": lambda: Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
        "prefix space": lambda: ByteLevel(add_prefix_space=True),
        "metaspace": lambda: Metaspace(),
        "words": lambda: Whitespace(),
        "removed": lambda: splits(LLAMA3, behaviour="removed"),
        "lookbehind": lambda: splits(r"(?<=a)b|\p{L}+"),
        "any number": lambda: splits(r"\p{N}{1,3}+|\p{L}+"),
        "other property": lambda: splits(r"\p{Han}+|\p{L}+"),
        "word signs": lambda: splits(r"\w+"),
        "none": lambda: ByteLevel(add_prefix_space=False, use_regex=False),
    }.get(kind, lambda: ByteLevel(add_prefix_space=False))()
    return backend


KNOWN = ["plain", "nfc", "llama3", "o200k", "deepseek", "digits"]
OTHERS = [
    "lower case", "dropout", "prefix space", "metaspace", "words", "removed", "lookbehind", "any number", "other property",
    "word signs", "none",
]  # fmt: skip


@pytest.mark.parametrize("kind", KNOWN)
def test_ids_are_those_of_the_tokenizer(kind):
    backend, draw = backend_of(kind), random.Random(kind)
    found, signs = Words.of(backend), [*words._characters(), "'s", "'LL", "  ", "\n\n", "the sky", " blue", "1234"]
    for _ in range(600):
        pool = signs if draw.random() < 0.5 else "ab AB1 '.s\n\t\r!"
        text = "".join(draw.choices(pool, k=draw.randint(0, 40)))
        ids = backend.encode(text, add_special_tokens=False).ids
        assert np.frombuffer(found.encode(text), "<i4").tolist() == ids, text


@pytest.mark.parametrize("kind", OTHERS)
def test_tokenizers_that_split_otherwise_are_not_taken(kind):
    assert Words.of(backend_of(kind)) is None


@pytest.mark.parametrize("part", [*(f"'{end}|" for end in ("s", "t", "re", "ve", "m", "ll", "d")), r"\s+(?!\S)|", " ?"])
def test_a_split_that_differs_is_not_taken(monkeypatch, part):
    assert part in words._GPT2
    monkeypatch.setattr(words, "_GPT2", words._GPT2.replace(part, "", 1))
    assert Words.of(backend_of("plain")) is None


@pytest.mark.parametrize(
    "text",
    [
        "\u4e2d\u6587",
        "\U0001f600",
        "e\u0301",
        "a\u00a0b",
        "\u2028",
        "\u017f",
        "\u212a",
        "a\x1cb",
        "\x00",
        "\u00aa",
        "\u0e01",
    ],
)
def test_other_characters_are_left_to_the_tokenizer(text):
    assert Words.of(backend_of("plain")).encode(f"the sky {text}") is None


def test_the_texts_that_are_tried_have_no_other_characters():
    assert not set("".join(words._TRIED)) - words._characters().keys()


def test_only_so_many_words_are_kept(monkeypatch):
    monkeypatch.setattr(words, "_MOST_WORDS", 10)
    backend = backend_of("plain")
    found = Words.of(backend)
    for number in range(40):
        text = f"the sky x{number} {'z' * 200}"
        assert np.frombuffer(found.encode(text), "<i4").tolist() == backend.encode(text, add_special_tokens=False).ids
        assert len(found._known) < 20 and max(map(len, found._known)) < 100
