"""A set made in this process: the same rows whatever the pieces, only missing blocks, no set of a refused source."""

import gzip
import json
import pickle
import re
import time

import fsspec
import pyarrow as pa
import pytest
from making import SIZES, content, write
from samples import text

from raydpo.data.marks import ANSWER, ASSISTANT, LAST_TURN, MARK_COLUMNS
from raydpo.data.records import read_records
from raydpo.errors import DataError
from raydpo.tokens import build, identity, reader
from raydpo.tokens.build import make_set, worth_ray
from raydpo.tokens.store import TokenSet

CHAT = {
    "prompt": [{"role": "user", "content": "sky?"}],
    "chosen": [{"role": "assistant", "content": "blue"}],
    "rejected": [{"role": "assistant", "content": "green"}],
}
REPEATING = {"prompt": "What colour?", "chosen": "What colour? the sky is blue", "rejected": "What colour? green grass"}
MIXED = [
    *(text(number) for number in range(20)),
    *(CHAT | {"prompt": [{"role": "user", "content": f"sky {number}?"}]} for number in range(5)),
    "",
    "{broken",
    {"prompt": "p", "answers": ["a", "b", "c"], "scores": [1, 2, 3]},
    {"prompt": "p" * 50, "chosen": "a", "rejected": "a"},
    text(3),
    text(99, source="x", other=1),
]


def make(kit, data, cache=None, **given):
    token_set = kit.set(data, cache)
    make_set(token_set, data.train[0], data, kit.tokeniser(), **given)
    return token_set


@pytest.mark.parametrize("records", [MIXED, [REPEATING] * 30, [REPEATING, *MIXED]], ids=["mixed", "repeating", "not all"])
def test_rows_do_not_depend_on_pieces(kit, tmp_path, monkeypatch, records):
    data, found = kit.data(write(tmp_path / "a.jsonl", records), max_malformed=0.5), {}
    for name, sizes in SIZES.items():
        monkeypatch.setattr(reader, "PIECE_SIZES", sizes)
        token_set = make(kit, data, cache=name)
        found[name] = content(token_set)
    # All records in one call of the maker, as for data in memory.
    maker = kit.recipe(token_set, data).maker(kit.tokeniser())
    read = list(read_records(data.train[0]))
    rows = maker.decided(*maker.decide(read)).make(read)
    assert found["4 MB"][0] == rows.light.drop_columns("file").to_pylist() and found["4 MB"][2] == rows.tokens.to_pylist()
    assert found["4 MB"][3] == rows.account.to_state()
    assert found["one line"] == found["7 lines"] == found["300 bytes"] == found["4 MB"]
    assert found["4 MB"][4]["take_off"] == (records == [REPEATING] * 30)


def test_marks_do_not_depend_on_pieces(kit, tmp_path, monkeypatch):
    said = [{"role": "assistant", "content": "<think>hm</think> blue"}, {"role": "user", "content": "why?"}]
    turns = CHAT | {"chosen": [*said, {"role": "assistant", "content": "so", "weight": 0.5}]}
    data, found = kit.data(write(tmp_path / "a.jsonl", [*MIXED, *[turns] * 3]), max_malformed=0.5, train_on="answer"), {}
    for name, sizes in SIZES.items():
        monkeypatch.setattr(reader, "PIECE_SIZES", sizes)
        token_set = make(kit, data, cache=name)
        found[name] = content(token_set)
    assert found["one line"] == found["7 lines"] == found["300 bytes"] == found["4 MB"]
    before = pa.total_allocated_bytes()
    light = token_set.light().light
    assert pa.total_allocated_bytes() <= before, "columns are read where the index is mapped"
    assert [(field.name, field.type) for field in light.schema][-4:] == list(MARK_COLUMNS)
    assert pickle.loads(pickle.dumps(light)).equals(light)
    assert light["chosen_factors"][-1].as_py() == [1, 1, 1, 0.5, 0.5]
    assert light["rejected_marks"][-1].as_py()[0] == ASSISTANT | LAST_TURN | ANSWER
    plain = kit.set(kit.data(data.train[0].path)).identity.to_dict()
    assert token_set.identity.to_dict() == plain | {"marks": True}, "a set without marks has the identity that it had"


def test_only_missing_blocks_are_made(kit, tmp_path, monkeypatch):
    data = kit.data(write(tmp_path / "a.jsonl", MIXED * 3), max_malformed=0.5)
    monkeypatch.setattr(reader, "PIECE_SIZES", SIZES["7 lines"])
    wanted = content(make(kit, data, cache="whole"))
    made, commit = [], TokenSet.commit

    def commit_some(self, span, rows):
        if len(made) in stops:
            stops.remove(len(made))
            raise KeyboardInterrupt
        made.append(span)
        return commit(self, span, rows)

    monkeypatch.setattr(TokenSet, "commit", commit_some)
    stops = {3, 5}
    for sizes in ("7 lines", "300 bytes"):  # the second command cuts otherwise
        monkeypatch.setattr(reader, "PIECE_SIZES", SIZES[sizes])
        with pytest.raises(KeyboardInterrupt):
            make(kit, data)
        assert kit.set(data).complete() is None
    first, last = kit.set(data).blocks()[0], kit.set(data).blocks()[-1]
    kit.set(data).storage.delete(f"sets/{kit.set(data).digest}/index/{first.index}")
    monkeypatch.setattr(reader, "PIECE_SIZES", SIZES["7 lines"])
    token_set = make(kit, data)
    assert content(token_set) == wanted
    assert made.count(first.span) == 2 and made.count(last.span) == 1
    lines = [line for span in made for line in range(span.start, span.stop)]
    assert len(lines) == len(MIXED) * 3 + first.span.stop - first.span.start, "each line once, but for the lost block"


@pytest.mark.parametrize("how", ["read to its end", "interrupted"])
def test_a_source_that_changes_is_refused(how, kit, tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [text(number) for number in range(400)])
    data, commit, before = kit.data(path), TokenSet.commit, path.read_text()
    monkeypatch.setattr(reader, "PIECE_SIZES", SIZES["7 lines"])
    monkeypatch.setattr(build, "FIRST_RECORDS", 7)
    wanted = content(make(kit, data, cache="whole"))

    def change(self, span, rows):
        path.write_text(before.replace("sky", "sea"))
        if how == "interrupted" and span.start > 300:
            raise KeyboardInterrupt
        return commit(self, span, rows)

    token_set = kit.set(data)
    refused = {
        "read to its end": (DataError, "a.jsonl changed while it was read; run the command"),
        "interrupted": (KeyboardInterrupt, "^$"),
    }
    error, told = refused[how]
    with monkeypatch.context() as patch, pytest.raises(error, match=told):
        patch.setattr(TokenSet, "commit", change)
        make_set(token_set, data.train[0], data, kit.tokeniser())
    assert token_set.complete() is None
    path.write_text(before)
    assert kit.set(data).digest == token_set.digest and content(make(kit, data)) == wanted, "nothing of the other content"


def test_a_source_whose_store_tells_nothing_is_made(kit, monkeypatch):
    path = f"/build-{time.time_ns()}/a.jsonl"
    lines = "".join(json.dumps(text(number)) + "\n" for number in range(30))
    fsspec.filesystem("memory").pipe(path, lines.encode())
    monkeypatch.setattr(identity, "content_version", lambda filesystem, path: None)
    assert make(kit, kit.data(f"memory:/{path}")).complete().pairs == 30


def test_errors_of_the_source_are_those_of_reading_it(kit, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "PIECE_SIZES", SIZES["7 lines"])
    lines = "".join(json.dumps(text(number)) + "\n" for number in range(30)).encode()
    for name, stored, columns in (
        ("empty.jsonl", b"\n\n", {}),
        ("cut.jsonl.gz", gzip.compress(lines)[:-9], {}),
        ("mapped.jsonl", lines, {"tools": "functions"}),
    ):
        (tmp_path / name).write_bytes(stored)
        data = kit.data({"path": str(tmp_path / name), "columns": columns})
        with pytest.raises(DataError) as wanted:
            list(read_records(data.train[0]))
        for _ in range(2):  # the second time, most blocks are there
            with pytest.raises(DataError, match=f"^{re.escape(str(wanted.value))}$"):
                make(kit, data)
            assert kit.set(data).complete() is None


def test_what_is_certain_to_be_refused_is_refused_early(kit, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "PIECE_SIZES", SIZES["7 lines"])
    good = [text(number) for number in range(800)]
    data = kit.data(write(tmp_path / "bad.jsonl", [*good[:7], *["{broken"] * 200, *good[:100]]))
    told = []
    sentence = r"data bad: (\d+) of \d+ records are malformed, more than data.max_malformed"
    with pytest.raises(DataError, match=sentence) as raised:
        make(kit, data, progress=told.append)
    assert int(re.match(sentence, str(raised.value))[1]) < 60 and len(told) < 10
    # Looked at by itself the beginning is bad, and bytes say that little follows; counted, the share is allowed.
    data = kit.data(write(tmp_path / "late.jsonl", ["{" + "x" * 20_000] * 7 + good))
    assert make(kit, data).complete().facts["records"] == 807


def test_a_template_that_loses_texts_is_refused_early(kit, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "PIECE_SIZES", SIZES["7 lines"])
    template = "{% for message in messages if message['role'] != 'system' %}<s>{{ message['content'] }}</s>{% endfor %}"
    records = [CHAT | {"prompt": [{"role": "system", "content": f"be {n}"}, *CHAT["prompt"]]} for n in range(300)]
    data, told = kit.data(write(tmp_path / "a.jsonl", records), chat_template=template), []
    token_set = kit.set(data)
    tokeniser = kit.tokeniser()
    tokeniser.tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"the chat template leaves out .* data.max_lost \(0.1\) allows fewer"):
        make_set(token_set, data.train[0], data, type(tokeniser)(tokeniser.tokenizer), progress=told.append)
    assert len(told) < 12


def test_an_own_reader_gives_the_records(kit, tmp_path):
    path = write(tmp_path / "a.jsonl", [text(number) for number in range(30)])
    data = kit.data({"path": str(path), "columns": {"prompt": "nowhere"}})

    def own(source):
        for record in read_records(source.model_copy(update={"columns": {}})):
            if record.row % 2:
                yield record

    rows, labels, *_ = content(make(kit, data, reader=own))
    assert [row["row"] for row in rows] == list(range(1, 31, 2)) and set(labels) == {"a.jsonl"}


def test_worth_ray_counts_bytes(tmp_path, monkeypatch):
    from raydpo.config import SourceConfig

    (tmp_path / "a.jsonl").write_bytes(b"x" * 1000)
    (tmp_path / "b.jsonl.gz").write_bytes(b"x" * 1000)
    for threshold, wanted in ((1001, [False, True]), (4001, [False, False]), (1000, [True, True])):
        monkeypatch.setattr(build, "WORTH_BYTES", threshold)
        assert [worth_ray(SourceConfig(path=str(tmp_path / name))) for name in ("a.jsonl", "b.jsonl.gz")] == wanted


def test_blocks_of_a_content_that_was_replaced_since_are_made_again(kit, tmp_path, monkeypatch):
    """As after a kill: the file was overwritten while it was read, and then came back as it was."""
    monkeypatch.setattr(reader, "PIECE_SIZES", SIZES["7 lines"])
    mine, other = [text(number) for number in range(30)], [text(number + 100) for number in range(30)]
    data = kit.data(write(tmp_path / "a.jsonl", mine))
    token_set = kit.set(data)  # the identity is that of the first content
    write(tmp_path / "a.jsonl", other)
    with monkeypatch.context() as patch:
        patch.setattr(build._Making, "_changed", lambda self: False)
        made = build._Making(token_set, data.train[0], data, read_records)
        maker = kit.recipe(token_set, data).maker(kit.tokeniser()).decided(False, 0)
        for piece in list(made.reading)[:2]:
            build._make(token_set, maker, build._Parsed(piece, {}))
    assert len(token_set.blocks()) == 2
    time.sleep(0.02)
    write(tmp_path / "a.jsonl", mine)
    found = content(make(kit, data))
    assert found[0] == content(make(kit, data, cache="fresh"))[0]
