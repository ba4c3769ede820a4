"""What tests need to make sets of small sources."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from samples import make_tokenizer

from raydpo.config import DataConfig
from raydpo.data.pieces import Sizes
from raydpo.data.tokenise import Tokeniser, load_tokenizer
from raydpo.storage.files import Storage
from raydpo.tokens.block import decode_tokens
from raydpo.tokens.build import Recipe
from raydpo.tokens.identity import SetIdentity
from raydpo.tokens.store import BLOCKS, TokenSet

SIZES = {
    "one line": Sizes(first=1, most=1, lines=1, first_lines=1),
    "7 lines": Sizes(first=1 << 22, most=1 << 22, lines=7, first_lines=7),
    "300 bytes": Sizes(first=300, most=300, lines=1000, first_lines=1000),
    "4 MB": Sizes(first=1 << 22, most=1 << 22, lines=1 << 20, first_lines=1 << 20),
}


@dataclass
class Kit:
    """A tokenizer and a cache in a directory."""

    root: Path
    cache: str = "cache"

    def __post_init__(self):
        if not (self.root / "tokenizer").exists():
            make_tokenizer().save_pretrained(self.root / "tokenizer")

    def tokeniser(self):
        return Tokeniser(load_tokenizer(str(self.root / "tokenizer")))

    def data(self, source, **settings):
        return DataConfig(train=[source] if isinstance(source, dict) else str(source), **settings)

    def set(self, data, cache=None):
        directory = self.root / "tokenizer"
        identity = SetIdentity.of(data.train[0], data, directory, self.tokeniser)
        return TokenSet(Storage(str(self.root / (cache or self.cache))), identity)

    def recipe(self, token_set, data):
        return Recipe.of(token_set.identity, data, str(self.root / "tokenizer"))


def write(path, records):
    """Records, or whole lines, as JSON lines."""
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records))
    return path


def content(token_set):
    """All rows of a set, and its account, without what depends on where blocks end."""
    whole = token_set.complete()
    light = token_set.light(whole.blocks)
    tokens = []
    for block in whole.blocks:
        data = token_set.storage.read(f"{token_set.directory}/{BLOCKS}/{block.file}")
        tokens += decode_tokens(block, token_set.digest, data).to_pylist()
    labels = [light.labels[file] for file in light.light["file"].to_pylist()]
    account = light.account.to_state()
    return light.light.drop_columns("file").to_pylist(), labels, tokens, account, whole.facts
