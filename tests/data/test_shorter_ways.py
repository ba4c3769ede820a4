"""The shorter ways to token ids give the ids, remarks and errors of the plain one."""

from __future__ import annotations

import random

import pytest
from by_the_book import by_the_book
from templates import calling, say, tokenizer_for, tool
from test_forms import TEMPLATES

from raydpo.data.messages import Malformed
from raydpo.data.preference import Preference
from raydpo.data.tokenise import Tokeniser

TEXTS = [
    "the sky is blue", "What's it?\n\nI'll say: \xe9l\xe8ve!", "grass", "4", " padded ", "\u4e2d\u6587\u3002",
    "\U0001f600 e\u0301", "a </s> b", "<s>user", "<think>\nhm\n</think>\n\nyes", "no</think>", "<think></think>x", "",
    "<|im_end|>", "system", "x\n", "tab\tand\xa0space", "it\u2019s \u201cfine\u201d \u2014 really\u2026", "1234567",
    "\u017f\u212a", "<|eot|>", "ab ab abab",
]  # fmt: skip
KINDS = ["byte level", "bos", "llama3", "metaspace", "strips", "unigram", "bytes of words", "eos"]


def tokenizer_of(template, kind):
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = tokenizer_for(template, bos=kind == "bos")
    backend = tokenizer.backend_tokenizer
    if kind == "llama3":
        pattern = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    if kind == "strips":
        tokenizer.add_tokens([AddedToken("sky", lstrip=True, rstrip=True, normalized=False)])
    if kind == "eos":
        backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    if kind in ("metaspace", "bytes of words", "unigram"):
        signs = sorted({*"".join(TEXTS), *map(chr, range(32, 127)), "\u2581", "\n"})
        if kind == "unigram":
            model = models.Unigram([(sign, -2.0) for sign in ("<unk>", *signs, "\u2581the", "blue")], 0, False)
        else:
            vocab = {sign: number for number, sign in enumerate(("<unk>", *signs, "th", "the"))}
            model = models.BPE(vocab, [("t", "h"), ("th", "e")], unk_token="<unk>")
        other = Tokenizer(model)
        other.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if kind == "metaspace" else "always")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=other, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
        )
    return tokenizer


def preferences(seed, count):
    draw = random.Random(seed)

    def text():
        return " ".join(draw.choices(TEXTS, k=draw.choice((1, 1, 2, 3))))

    for _ in range(count):
        kind = draw.random()
        if kind < 0.2:
            yield Preference(text() or "x", f"{text()}a", f"{text()}b")
            continue
        roles = draw.choice((["user"], ["system", "user"], ["user", "assistant", "user"]))
        prompt = [say(role, text()) for role in roles]
        chosen, rejected = [say("assistant", f"{text()}a")], [say("assistant", text())]
        more = {}
        if kind < 0.3:
            rejected, more = calling(arguments={"zone": text()}), {"tools": [tool("clock")]}
        elif kind < 0.4:
            chosen = [say("assistant", text(), reasoning_content=text())]
        elif kind < 0.5:
            prompt[-1] = say("user", [{"type": "text", "text": text()}, {"type": "text", "text": "2"}])
        elif kind < 0.6:
            more = {"template_kwargs": {"enable_thinking": False}}
        elif kind < 0.7:
            chosen = [*chosen, say("user", text()), say("assistant", text())]
        yield Preference(prompt, chosen, rejected, **more)


def told(tokeniser, given):
    found = []
    for start in range(0, len(given), 40):
        for ids, remarks in tokeniser.encode_noted(given[start : start + 40]):
            found.append((str(ids) if isinstance(ids, Malformed) else [part.tolist() for part in ids], remarks))
    return found, tokeniser.merged


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["CHATML", "LLAMA", "MISTRAL", "GEMMA", "THINKING"])
def test_ids_remarks_and_errors_are_those_of_the_plain_way(name, kind):
    tokenizer = tokenizer_of(TEMPLATES[name], kind)
    given = list(preferences(f"{name} {kind}", 200))
    short = Tokeniser(tokenizer)
    assert told(short, given) == told(by_the_book(tokenizer), given)
    whole = kind in ("metaspace", "strips")
    assert bool(short._segments[True]._token_ids) != whole
    assert (short._segments[True]._words is None) == (kind in ("metaspace", "strips", "unigram", "bytes of words"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_template(name):
    tokenizer = tokenizer_of(TEMPLATES[name], "byte level")
    given = list(preferences(name, 150))
    assert told(Tokeniser(tokenizer), given) == told(by_the_book(tokenizer), given)
