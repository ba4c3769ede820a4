"""What makes a set another one, and what does not."""

import dataclasses
import json
import os
import shutil
import time

import fsspec
import pytest
from s3_server import s3_server
from tiny import preferences, write_preferences

from raydpo.config import DataConfig
from raydpo.data.tokenise import Tokeniser, load_tokenizer
from raydpo.errors import DataError
from raydpo.storage import content
from raydpo.storage.files import Storage
from raydpo.tokens import identity
from raydpo.tokens.identity import SetIdentity


@pytest.fixture
def place(tmp_path, tiny_llama):
    """A directory with a tokenizer and a directory of two files of pairs."""
    (tmp_path / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tiny_llama / name).exists():
            shutil.copy(tiny_llama / name, tmp_path / "tokenizer")
    (tmp_path / "data").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        write_preferences(tmp_path / "data" / name, preferences(5, seed=ord(name[0])))
    return tmp_path


def of(place, path=None, load=None, source=None, **settings):
    data = DataConfig(train=[{"path": str(path or place / "data"), **(source or {})}], **settings)
    directory = place / "tokenizer"

    def loaded():
        tokenizer = load_tokenizer(str(directory), chat_template=data.chat_template)
        return Tokeniser(tokenizer, data.template_date)

    return SetIdentity.of(data.train[0], data, directory, load or loaded)


def overwrite_keeping_times(file):
    """Other content of the same size and mtime, as ``cp -p`` leaves it."""
    stat, data = file.stat(), bytearray(file.read_bytes())
    data[20] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)


def append(file):
    file.write_text(file.read_text() + '{"prompt": "p", "chosen": "c", "rejected": "r"}\n')


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


CHANGES = {
    "one byte, same size and time": (lambda place: overwrite_keeping_times(place / "data/a.jsonl"), "file a.jsonl"),
    "a line appended": (lambda place: append(place / "data/b.jsonl"), "file b.jsonl"),
    "a file renamed": (lambda place: (place / "data/a.jsonl").rename(place / "data/c.jsonl"), "files"),
    "files in another order": (
        lambda place: [
            (place / "data" / one).rename(place / "data" / other)
            for one, other in (("a.jsonl", "x"), ("b.jsonl", "a.jsonl"), ("x", "b.jsonl"))
        ],
        "file a.jsonl",
    ),
    "a file of another split": (
        lambda place: write_preferences(place / "data/test.jsonl", preferences(2)),
        "choice of a.jsonl",
    ),
    "the tokenizer": (lambda place: edit(place / "tokenizer/tokenizer.json", "{", "{ "), "tokenizer files tokenizer.json"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_changed_files_are_another_set(what, place):
    before = of(place)
    change, field = CHANGES[what]
    change(place)
    after = of(place)
    assert after.digest != before.digest and after != before
    differences = after.differences(before)
    assert any(line.startswith(f"{field}: ") and " here, " in line and line.endswith(" there") for line in differences), (
        differences
    )


SETTINGS = {
    "template": ({"chat_template": "{{ messages }}{{ eos_token }}"}, {}, "tokenizer template"),
    "columns": ({}, {"columns": {"chosen": "good"}}, "columns chosen"),
    "limit": ({}, {"limit": 3}, "limit of the source"),
    "weight_column": ({"weight_column": "w"}, {}, "data.weight_column"),
    "margin_column": ({"margin_column": "m"}, {}, "data.margin_column"),
    "special_tokens": ({"special_tokens": "refuse"}, {}, "data.special_tokens"),
    "very long pairs": ({"max_length": 10_001}, {}, "most characters of a pair, by data.max_length"),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_settings_that_decide_rows_make_another_set(what, place):
    settings, source, field = SETTINGS[what]
    one, other = of(place), of(place, source=source, **settings)
    assert one.digest != other.digest
    assert any(line.startswith(f"{field}: ") for line in other.differences(one)), other.differences(one)


def test_what_selection_decides_makes_no_other_set(place):
    one = of(place)
    settings = {
        "max_length": 10_000,
        "truncation": "drop",
        "filter": "chosen_tokens < 9",
        "fraction": 0.5,
        "fraction_seed": 3,
    }
    settings |= {"shuffle": False, "max_malformed": 0.5, "eval": {"fraction": 0.2}, "template_date": "2020-01-01"}
    other = of(place, source={"name": "other", "weight": 2.0, "split": "train"}, **settings)
    assert other == one and other.digest == one.digest and other.differences(one) == []
    shutil.copytree(place / "data", place / "elsewhere")
    assert of(place, place / "elsewhere").digest == one.digest, "the same files in another place"


def test_the_date_counts_where_the_template_writes_it(place):
    template = "{{ strftime_now('%d %b') }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    dates = [of(place, chat_template=template, template_date=day) for day in ("2024-07-26", "2020-01-01")]
    assert dates[0].digest != dates[1].digest
    assert "tokenizer template_date: 2024-07-26 here, 2020-01-01 there" in dates[0].differences(dates[1])


def test_a_touch_costs_one_hash_and_nothing_else_is_read_twice(place, monkeypatch):
    one, read, loaded = of(place), [], []
    piece = content._piece_digest
    monkeypatch.setattr(content, "_piece_digest", lambda path, start: read.append(path.name) or piece(path, start))
    assert of(place, load=lambda: loaded.append(1)).digest == one.digest and read == loaded == []
    os.utime(place / "data/a.jsonl", (1, 1))
    assert of(place, load=lambda: loaded.append(1)).digest == one.digest and read == ["a.jsonl"] and loaded == []


def test_a_file_is_hashed_in_pieces_and_each_byte_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(content, "_PIECE", 10)
    found = set()
    for number, data in enumerate((b"0123456789" * 3, b"0123456789" * 3 + b"x", b"0123456789" * 2 + b"012345678x", b"")):
        file = tmp_path / str(number)
        file.write_bytes(data)
        found.add(content.file_digest(file))
    assert len(found) == 4
    (tmp_path / "copy").write_bytes(b"0123456789" * 3)
    assert content.file_digest(tmp_path / "copy") in found


def test_versions_and_code_of_the_tokenizer_count(place, monkeypatch):
    one = of(place)
    monkeypatch.setattr(identity, "versions", lambda *names: tuple(f"{name} 0.0" for name in names))
    assert any(line.startswith("tokenizer versions transformers: 0.0 here") for line in of(place).differences(one))
    monkeypatch.undo()
    monkeypatch.setattr(identity, "RECIPE", 3)
    monkeypatch.setattr(Tokeniser, "encode", lambda self, preferences: [preferences[0].prompt])
    assert any(line.startswith("tokenizer probe: ") for line in of(place).differences(one))


def test_trusted_code_is_run_each_time(place):
    data, loaded = DataConfig(train=[{"path": str(place / "data")}]), []

    def load():
        loaded.append(1)
        return Tokeniser(load_tokenizer(str(place / "tokenizer")))

    for trusted in (False, False, True, True):
        SetIdentity.of(data.train[0], data, place / "tokenizer", load, trust_remote_code=trusted)
    assert len(loaded) == 3


def test_a_file_that_changes_while_it_is_hashed_is_refused(place, monkeypatch):
    def slowly(path):
        append(path)
        return "0" * 64

    monkeypatch.setattr(identity, "file_digest", slowly)
    with pytest.raises(DataError, match=r"a.jsonl changed while it was read; run the command again"):
        of(place)


def test_it_survives_json(place):
    one = of(place, source={"limit": 3, "columns": {"chosen": "good"}})
    back = SetIdentity.from_dict(json.loads(json.dumps(one.to_dict())), one.path)
    assert back == one and back.digest == one.digest and len(one.digest) == 32


def test_a_store_with_etags(place):
    with s3_server() as server:
        pairs = Storage(server.uri("pairs"))
        data = (place / "data/a.jsonl").read_bytes()
        pairs.write("a.jsonl", data)
        one = of(place, server.uri("pairs/a.jsonl"))
        assert of(place, server.uri("pairs/a.jsonl")) == one and one.warnings() == []
        assert one.files[0].content.startswith("etag ") and one.files[0].size == len(data)
        pairs.write("a.jsonl", data)
        assert of(place, server.uri("pairs/a.jsonl")).digest == one.digest, "the same content, stored again"
        pairs.write("a.jsonl", data[:-2] + b" }")
        other = of(place, server.uri("pairs/a.jsonl"))
        assert other.digest != one.digest and "file a.jsonl: " in other.differences(one)[0]


def test_a_store_without_them_is_told_apart_by_time(place):
    store = fsspec.filesystem("memory")
    path = f"/sets-{time.time_ns()}/a.jsonl"
    store.pipe(path, (place / "data/a.jsonl").read_bytes())
    one = of(place, f"memory:/{path}")
    assert of(place, f"memory:/{path}") == one
    (line,) = one.warnings()
    assert line.startswith("warning: the store of memory://") and "by size and time alone" in line
    store.pipe(path, (place / "data/a.jsonl").read_bytes())
    assert of(place, f"memory:/{path}").digest != one.digest


def test_a_store_that_tells_nothing_gives_no_false_hit(place, monkeypatch):
    store = fsspec.filesystem("memory")
    path = f"/sets-{time.time_ns()}/a.jsonl"
    store.pipe(path, (place / "data/a.jsonl").read_bytes())
    monkeypatch.setattr(identity, "content_version", lambda filesystem, path: None)
    one, other = of(place, f"memory:/{path}"), of(place, f"memory:/{path}")
    assert one.digest != other.digest and "tokenised again by each command" in one.warnings()[0]


def test_a_hub_data_set_by_its_downloads_or_fingerprint(place, monkeypatch):
    import datasets

    stored = datasets.Dataset.from_list([{"prompt": "p", "chosen": "c", "rejected": "r"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: stored)
    one = of(place, "org/prefs")
    assert of(place, "org/prefs") == one and one.files[0].name == "org/prefs[train]"
    stored.info.download_checksums = {"hf://datasets/org/prefs@abc/a.parquet": {"num_bytes": 5}}
    two = of(place, "org/prefs")
    stored.info.download_checksums = {"hf://datasets/org/prefs@abd/a.parquet": {"num_bytes": 5}}
    assert len({one.digest, two.digest, of(place, "org/prefs").digest}) == 3
    assert of(place, "org/prefs", source={"split": "test"}).digest != of(place, "org/prefs").digest


def test_a_source_that_is_not_there(place):
    with pytest.raises(DataError, match="there is no file"):
        of(place, place / "nowhere.jsonl")


def test_marks_that_one_of_two_sets_has_are_told_in_words(place):
    plain = of(place)
    told = plain.differences(dataclasses.replace(plain, marks=True))
    assert told == ["marks of the parts of completions, by data.train_on: none here, yes there"]
