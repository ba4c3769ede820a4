"""Pairs come from stored sets: each source is looked at once, and a damaged block is made again at once."""

import io
import json

import pytest
from tiny import preferences, write_preferences

from raydpo.config import load_config
from raydpo.pipeline.tokenised import Tokenised
from raydpo.terminal.console import Console
from raydpo.tokens import identity


@pytest.fixture
def read(tmp_path, tiny_llama):
    """Reads the pairs of a configuration. Returns their table and what was told."""
    write_preferences(tmp_path / "a.jsonl", preferences(30, low=3, high=9))
    tree = {
        "output": str(tmp_path / "runs"),
        "model": {"path": str(tiny_llama)},
        "data": {"train": str(tmp_path / "a.jsonl")},
        "cache": {"uri": str(tmp_path / "cache")},
    }
    (tmp_path / "config.json").write_text(json.dumps(tree))
    config = load_config(str(tmp_path / "config.json"), [])

    def read():
        out = io.StringIO()
        table = Tokenised.of(config, Console(out)).sets.train
        return table.to_pylist(), " ".join(out.getvalue().split())

    return read


def test_the_sources_of_a_command_are_identified_once(read, monkeypatch):
    pairs, told = read()
    assert len(pairs) == 30 and "0 held out, tokenised in" in told
    calls, files_of = [], identity.files_of
    monkeypatch.setattr(identity, "files_of", lambda source: calls.append(source) or files_of(source))
    again, told = read()
    assert again == pairs and "tokenised before, read in" in told and len(calls) == 1


def test_a_damaged_block_is_made_again_by_the_same_command(read, tmp_path):
    pairs, _ = read()
    (block,) = tmp_path.glob("cache/sets/*/blocks/*.parquet")
    data = block.read_bytes()
    block.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    again, told = read()
    assert again == pairs and "This command does so now" in told and block.read_bytes() == data
