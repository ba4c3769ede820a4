"""Which token a character belongs to, for tokenizers of several kinds."""

from __future__ import annotations

import numpy as np
import pytest
from samples import SENTENCES, make_tokenizer

from raydpo.data.places import TokenPlaces


def sentencepiece(prepend=False, lower=False):
    """A tokenizer that writes spaces as U+2581 and unknown characters as bytes, as those of Gemma and Llama 2 do."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Lowercase()] if lower else []
    steps += [normalizers.Prepend("\u2581")] if prepend else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        SENTENCES * 4, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    return made


class Slow:
    """What a tokenizer without offsets gives."""

    is_fast = False

    def __init__(self, tokenizer):
        self.tokenizer, self.added_tokens_decoder = tokenizer, {}

    def convert_tokens_to_ids(self, token):
        return None

    def convert_ids_to_tokens(self, ids):
        return ["?" for _ in ids]

    def __call__(self, text, **_):
        return {"input_ids": self.tokenizer(text, add_special_tokens=False)["input_ids"]}


KINDS = {
    "byte-level": make_tokenizer,
    "like Gemma's": sentencepiece,
    "like Llama 2's": lambda: sentencepiece(prepend=True),
    "lower case": lambda: sentencepiece(lower=True),
}
TEXT = "<s>the sky is\n\nblue Because é🙂 天 of  two </s>"


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_belongs_to_the_part_of_its_first_character(kind):
    tokenizer = KINDS[kind]()
    encoded = tokenizer(TEXT, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.array(encoded["input_ids"], np.int32)
    firsts = []
    for start, end in encoded["offset_mapping"]:
        said = TEXT[start:end]
        firsts.append(start + (len(said) - len(said.lstrip()) if said.strip() else 0))
    for skipped in (0, 2, 5):
        place = TokenPlaces(tokenizer).of(TEXT, ids[skipped:], special=False)
        for character in range(len(TEXT) + 1):
            wanted = sum(first < character for first in firsts)
            assert place(character) == max(0, wanted - skipped), (character, TEXT[:character])


def test_without_offsets_parts_begin_with_a_token():
    tokenizer = make_tokenizer()
    ids = np.array(tokenizer(TEXT, add_special_tokens=False)["input_ids"], np.int32)
    place, known = (
        TokenPlaces(Slow(tokenizer)).of(TEXT, ids, special=False),
        TokenPlaces(tokenizer).of(TEXT, ids, special=False),
    )
    found = {character: place(character) for character in range(len(TEXT) + 1)}
    assert all(token in (None, known(character)) for character, token in found.items())
    assert found[0] == 0 and found[len(TEXT)] == len(ids) and found[TEXT.index("</s>")] == len(ids) - 1
    assert None in found.values(), "a place within a token is not known"
    other = TokenPlaces(Slow(tokenizer)).of(TEXT, ids[::-1], special=False)
    assert {other(character) for character in range(len(TEXT))} == {None}, "ids of another text"
