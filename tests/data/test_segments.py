"""Texts tokenised piece by piece have the ids that they have as a whole."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from samples import make_tokenizer

from raydpo.data import segments
from raydpo.data.segments import Segments, any_of
from raydpo.data.words import Words
from raydpo.errors import FilesError

TOKENS = ["<|user|>", "<|user|><x>", "<x>", "</s>", "<|im|>", "<q>", "cat"]
WORDS = [
    "the sky",
    " is",
    "blue ",
    "\n",
    " ",
    "  ",
    "e",
    "\u0301",
    "<",
    "|",
    "<|user",
    "|>",
    "x>",
    "s",
    "\u00e9",
    "\U0001f600",
    *TOKENS,
]


def ids(found):
    return [np.frombuffer(each, "<i4").tolist() for each in found]


def tokenizer_of(kind):
    from tokenizers import AddedToken, normalizers, pre_tokenizers

    tokenizer = make_tokenizer()
    backend = tokenizer.backend_tokenizer
    if kind.startswith("metaspace"):
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(prepend_scheme=kind.split()[1]), backend.pre_tokenizer]
        )
    if kind == "prefix space":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    if kind == "normalised":
        backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Prepend("_"), normalizers.Strip()])
    options = {"strips": {"rstrip": True}, "left": {"lstrip": True}, "words": {"single_word": True}}.get(kind, {})
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False, **options) for token in TOKENS[:3]])
    tokenizer.add_tokens(["<q>", "cat"])
    tokenizer.add_tokens([AddedToken("<|im|>", special=False, normalized=False)])
    if kind == "spelled":
        tokenizer.split_special_tokens = True
    return tokenizer


KINDS = {
    "plain": True,
    "prefix space": True,
    "normalised": True,
    "metaspace always": True,
    "metaspace never": True,
    "metaspace first": False,
    "strips": False,
    "left": False,
    "words": False,
    "spelled": False,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("words", [False, True])
def test_ids_are_those_of_the_whole_text(monkeypatch, kind, words):
    monkeypatch.setattr(segments, "_COMPARED", 0)
    monkeypatch.setattr(segments, "_EVERY", 1 << 60)
    tokenizer, lengths = tokenizer_of(kind), []

    def encode(texts):
        lengths.extend(map(len, texts))
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    draw = random.Random(kind)
    prompts = ["".join(draw.choices(WORDS, k=draw.randint(0, 12))) for _ in range(300)]
    texts = [prompt + answer for prompt in prompts for answer in ("", "".join(draw.choices(WORDS, k=5)), "the sky")]
    pieces = Segments(tokenizer, Words.of(tokenizer.backend_tokenizer) if words else None, encode)
    found = pieces.encode(texts)
    assert (sum(lengths) < 0.7 * sum(map(len, texts))) == KINDS[kind]
    assert ids(found) == tokenizer(texts, add_special_tokens=False)["input_ids"]


def test_the_pattern_finds_the_longest_text():
    draw = random.Random(1)
    for _ in range(200):
        tokens = {"".join(draw.choices("<|>ab.", k=draw.randint(1, 4))) for _ in range(draw.randint(1, 12))}
        plain = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
        text = "".join(draw.choices("<|>ab.", k=60))
        assert re.findall(any_of(tokens), text) == plain.findall(text)
    many = [f"<unused{number}>" for number in range(6000)]
    assert re.fullmatch(any_of(many), "<unused5999>") and not re.fullmatch(any_of(many), "<unused6000>")
    assert any_of([]) == ""


def test_each_distinct_piece_is_tokenised_once_for_a_batch():
    tokenizer, asked = make_tokenizer(), []

    def encode(texts):
        asked.append(list(texts))
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    pieces = Segments(tokenizer, None, encode)
    texts = [f"<s>system\nBe kind.</s><s>user\n{number}</s><s>assistant\n" for number in range(30)]
    pieces.encode(texts)
    asked.clear()
    pieces.encode([text + answer for text in texts for answer in ("", "a</s>", "b</s>")])
    (once,) = asked
    assert sorted(once) == sorted(
        ["system\nBe kind.", "assistant\n", "assistant\na", "assistant\nb", *(f"user\n{number}" for number in range(30))]
    )


def test_a_tokenizer_that_differs_on_the_first_texts_gets_whole_texts():
    tokenizer = make_tokenizer()

    def encode(texts):  # depends on what stands before
        return [[len(text)] for text in texts]

    pieces = Segments(tokenizer, None, encode)
    for texts in (["a<s>b", "c"], ["d<s>e"] * 3):
        assert ids(pieces.encode(texts)) == encode(texts)


@pytest.mark.parametrize(("single", "adds"), [("<s> $A </s>", (1, 1)), ("$A </s>", (0, 1)), ("$A", (0, 0))])
def test_tokens_that_the_tokenizer_adds_stand_around_each_text(monkeypatch, single, adds):
    from tokenizers import processors

    monkeypatch.setattr(segments, "_COMPARED", 0)
    monkeypatch.setattr(segments, "_EVERY", 1 << 60)
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )
    texts = ["the sky", "", "the sky is blue</s>", "<s>", "\u00e9 \u4e2d\u6587 x"]
    pieces = Segments(
        tokenizer,
        None,
        lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"],
        lambda texts: tokenizer(texts)["input_ids"],
    )
    assert ids(pieces.encode(texts)) == tokenizer(texts)["input_ids"]
    assert (len(pieces._before) // 4, len(pieces._after) // 4) == adds


def test_a_later_text_that_differs_is_an_error(monkeypatch):
    monkeypatch.setattr(segments, "_EVERY", 100)
    tokenizer, wrong = tokenizer_of("plain"), [False]

    def encode(texts):
        return [
            [*ids, 7] if wrong[0] and len(texts) == 1 else ids
            for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        ]

    pieces = Segments(tokenizer, None, encode)
    pieces.encode([f"the sky {number}" for number in range(99)])
    wrong[0] = True
    with pytest.raises(FilesError, match="other ids for a whole text than for its pieces: 'sky 3'"):
        pieces.encode(["sky 1", "sky 2", "sky 3"])
