"""No input ends in a traceback: each is read, or refused with status 2 and one short message, within seconds."""

import bz2
import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tiny import make_tokenizer

from raydpo.cli.entry import main

PAIR = {"prompt": "What is ice?", "chosen": " Frozen water.", "rejected": " Nothing."}
LINE = json.dumps(PAIR) + "\n"
TURN = [{"role": "user", "content": "What is ice?"}]
SAYS = {"chosen": [{"role": "assistant", "content": "b"}], "rejected": [{"role": "assistant", "content": "c"}]}
NOISE = bytes((index * index * 31 + index * 17 + 5) % 256 for index in range(4000))


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


FILES = {
    "empty.jsonl": "",
    "blank.jsonl": "\n \n",
    "empty.parquet": "",
    "empty.jsonl.gz": "",
    "noise.jsonl": NOISE,
    "noise.json": NOISE,
    "noise.parquet": b"PAR1" + NOISE + b"PAR1",
    "noise.arrow": NOISE,
    "noise.jsonl.gz": NOISE,
    "noise.jsonl.zst": NOISE,
    "noise.jsonl.xz": NOISE,
    "noise.jsonl.bz2": NOISE,
    "truncated.jsonl": (LINE * 9)[:-20],
    "truncated.jsonl.gz": gzip.compress(LINE.encode() * 900)[:-20],
    "truncated.jsonl.bz2": bz2.compress(LINE.encode() * 900)[:-20],
    "a page.jsonl": "<!DOCTYPE html><html>404</html>\n",
    "nul.jsonl": LINE + "\x00\x00\n" + LINE,
    "utf-16.jsonl": (LINE * 3).encode("utf-16"),
    "utf-16.json": json.dumps([PAIR]).encode("utf-16"),
    "latin-1.jsonl": json.dumps(PAIR | {"chosen": " café"}, ensure_ascii=False).encode("latin-1"),
    "mixed encodings.jsonl": LINE.encode()
    + json.dumps(PAIR | {"chosen": "é"}, ensure_ascii=False).encode("latin-1")
    + b"\n",
    "byte order mark.jsonl": b"\xef\xbb\xbf" + LINE.encode() * 2,
    "deep.jsonl": '{"prompt":' + "[" * 100_000 + "]" * 100_000 + "}\n",
    "deep.json": "[" * 100_000,
    "deep content.jsonl": '{"prompt":[{"role":"user","content":'
    + "[" * 900
    + "]" * 900
    + '}],"chosen":"a","rejected":"b"}\n',
    "long name.jsonl": json.dumps({"x" * 300_000: 1}) + "\n",
    "many columns.jsonl": json.dumps({f"column{number}": 1 for number in range(2000)}) + "\n",
    "not finite.jsonl": '{"prompt": NaN, "chosen": Infinity, "rejected": 1e999}\n',
    "long number.jsonl": '{"prompt": ' + "9" * 5000 + ', "chosen": "a", "rejected": "b"}\n',
    "half a pair.jsonl": '{"prompt":"a \\ud800","chosen":"c","rejected":"d"}\n',
    "no objects.jsonl": '1\n"x"\nnull\ntrue\n[]\n{}\n',
    "wrong types.jsonl": lines({"prompt": {"a": 1}, "chosen": 3, "rejected": ["x"]}, {"prompt": ["a"], "chosen": ["b"]}),
    "wrong roles.jsonl": lines(
        *({"prompt": [{"role": role, "content": "x"}]} | SAYS for role in (1, None, ["user"], {}, "x"))
    ),
    "wrong contents.jsonl": lines(
        *(
            {"prompt": [{"role": "user", "content": content}]} | SAYS
            for content in (7, {"a": 1}, [1, None], [{"type": "text"}])
        )
    ),
    "wrong calls.jsonl": lines(
        *(
            {"prompt": TURN} | SAYS | {"chosen": [{"role": "assistant", "content": "b", "tool_calls": calls}]}
            for calls in ("x", 5, [1], [None], [{"function": "f"}], [{"function": {"name": 3, "arguments": 5}}], {"a": 1})
        )
    ),
    "wrong tools.jsonl": lines(*({"prompt": TURN, "tools": tools} | SAYS for tools in ("x", 5, [1], [None], [[]], "[", {}))),
    "wrong arguments of the template.jsonl": lines(
        *(
            {"prompt": TURN, "chat_template_kwargs": each} | SAYS
            for each in ("x", 5, {"messages": 1}, {"self": 1}, {"1 a": 2})
        )
    ),
    "wrong completions.jsonl": lines(
        {"prompt": "p", "completions": "x", "ranks": 1},
        {"prompt": "p", "completions": ["a", "b"], "ranks": 5},
        {"prompt": "p", "completions": ["a", "b"], "ranks": ["x", "y"]},
        {"prompt": "p", "completions": [None, {"x": 1}], "scores": [1, 2]},
        {"prompt": "p", "completions": [["a"], ["b"]], "scores": {"a": 1}},
    ),
}
TABLES = {
    "bytes": {"prompt": pa.array([b"a\xff"], pa.binary()), "chosen": [b"b"], "rejected": [b"c"]},
    "maps": {"prompt": pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string())), "chosen": ["a"], "rejected": ["b"]},
    "no rows": {name: pa.array([], pa.string()) for name in PAIR},
    "no columns": {},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("inputs")
    make_tokenizer().save_pretrained(str(place / "model"))
    for name, content in FILES.items():
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for name, columns in TABLES.items():
        pq.write_table(pa.table(columns), place / f"{name}.parquet")
    whole = place / "whole.parquet"
    pq.write_table(pa.table({name: [text] * 3000 for name, text in PAIR.items()}), whole)
    data = whole.read_bytes()
    (place / "truncated.parquet").write_bytes(data[:-30])
    (place / "damaged.parquet").write_bytes(data[:200] + NOISE[:200] + data[400:])
    (place / "a directory.jsonl").mkdir()
    (place / "directory").mkdir()
    (place / "directory" / "inner.jsonl").mkdir()
    os.mkfifo(place / "pipe.jsonl")
    os.symlink(place / "gone.jsonl", place / "to nothing.jsonl")
    os.symlink(place / "in a circle.jsonl", place / "in a circle.jsonl")
    tree = {"output": str(place / "runs"), "model": {"path": str(place / "model")}, "data": {"train": "x"}}
    (place / "config.yaml").write_text(yaml.safe_dump(tree))
    return place


OTHERS = ("truncated.parquet", "damaged.parquet", "a directory.jsonl", "directory", "pipe.jsonl", "to nothing.jsonl")
NAMES = (*FILES, *(f"{name}.parquet" for name in TABLES), *OTHERS, "in a circle.jsonl", "nowhere.jsonl")


@pytest.mark.parametrize("name", NAMES)
def test_data_of_any_kind_is_read_or_refused_with_one_short_message(name, place, capfd):
    status = main(["show", str(place / "config.yaml"), f"data.train={json.dumps(str(place / name))}"])
    out, err = capfd.readouterr()
    assert status in (0, 2), err
    assert "Traceback" not in out + err and "unexpected" not in err
    assert max(len(line.encode()) for line in (out + err).splitlines()) < 2000
    if status:
        assert err.startswith("error: ") and err.count("\n") == 1, err


def test_some_of_them_are_read(place, capfd):
    """The test above would also pass if everything were refused."""
    assert main(["show", str(place / "config.yaml"), f"data.train={json.dumps(str(place / 'byte order mark.jsonl'))}"]) == 0
    assert "Frozen water." in capfd.readouterr().out
