"""A cache of another reference is never used: for each field of the identity the refusal names the field, both values and
the fix."""

import dataclasses
import io

import numpy as np
import pytest
from tiny import preferences, write_preferences

from raydpo.config import load_config
from raydpo.errors import CacheMissError
from raydpo.pipeline.prepare import Prepared
from raydpo.reference.pairs import join_reference
from raydpo.reference.shards import Wanted
from raydpo.reference.store import ReferenceCache
from raydpo.terminal.console import Console

OTHER = {
    "weights": "e" * 64,
    "architecture": "f" * 64,
    "adapter": "d" * 64,
    "dtype": "bfloat16",
    "quantisation": "nf4",
    "scoring_version": 1,
    "rope_length": 4096,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_llama):
    place = tmp_path_factory.mktemp("refusal")
    write_preferences(place / "a.jsonl", preferences(6))
    config = load_config(
        {
            "output": str(place / "runs"),
            "model": {"path": str(tiny_llama), "dtype": "float32"},
            "data": {"train": str(place / "a.jsonl")},
        }
    )
    return Prepared.of(config, Console(io.StringIO()))


def fill(prepared, identity, uri):
    wanted = list(Wanted(prepared.tables))
    cache = ReferenceCache.open(uri, identity)
    cache.commit([one.key for one in wanted], [np.full(len(one.tokens), -1.0, np.float32) for one in wanted], {})


def test_all_fields_are_tried(prepared):
    assert OTHER.keys() == {field.name for field in dataclasses.fields(prepared.reference.identity)}


@pytest.mark.parametrize("field", OTHER)
def test_refused_with_field_both_values_and_the_command(field, prepared, tmp_path):
    mine = prepared.reference.identity
    fill(prepared, dataclasses.replace(mine, **{field: OTHER[field]}), str(tmp_path))
    with pytest.raises(CacheMissError) as caught:
        join_reference(prepared.sets.train, ReferenceCache.open(str(tmp_path), mine), "training")
    message = str(caught.value)
    values = (str(value)[:16] for value in (getattr(mine, field), OTHER[field]))
    assert f"{field}: " in message and all(value in message for value in values) and "raydpo score" in message
    assert message.count(": ") < 20 and "\n" not in message
    others = [name for name in OTHER if name != field]
    assert not any(f"({name}: " in message or f"; {name}: " in message for name in others), "only what differs is named"


@pytest.mark.parametrize("field", OTHER)
def test_files_moved_into_the_right_directory_are_refused_too(field, prepared, tmp_path):
    mine = prepared.reference.identity
    other = dataclasses.replace(mine, **{field: OTHER[field]})
    fill(prepared, other, str(tmp_path))
    (tmp_path / other.digest).rename(tmp_path / mine.digest)
    with pytest.raises(CacheMissError) as caught:
        join_reference(prepared.sets.train, ReferenceCache.open(str(tmp_path), mine), "training")
    message = str(caught.value)
    assert "made by another reference" in message and f"({field}: " in message and "raydpo score" in message
