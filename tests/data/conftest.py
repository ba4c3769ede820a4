"""A tokenizer with merges that cross words, and a writer of record files."""

from __future__ import annotations

import json

import pytest
from samples import make_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def tokeniser(tokenizer):
    from raydpo.data.tokenise import Tokeniser

    return Tokeniser(tokenizer)


@pytest.fixture
def write(tmp_path):
    """Writes records as JSON lines and returns the path."""

    def write_lines(records, name="prefs.jsonl"):
        path = tmp_path / name
        path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))
        return str(path)

    return write_lines
