"""The same record says the same from every kind of file and from the hub."""

import json
from decimal import Decimal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raydpo.config import DataConfig, SourceConfig
from raydpo.data.messages import Malformed
from raydpo.data.pairs import load_pairs
from raydpo.data.preference import normalise
from raydpo.data.records import read_records
from raydpo.errors import DataError

WORD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8).map(
    lambda word: "w" + word
)
LEAF = st.none() | st.booleans() | st.integers(-9, 9) | WORD
VALUE = LEAF | st.lists(LEAF, max_size=2)
CONTENT = WORD | st.lists(st.builds(lambda text: {"type": "text", "text": text}, WORD), min_size=1, max_size=2)


def message(role, content):
    return {"role": role, "content": content}


CALL = st.builds(
    lambda name, arguments: (
        message("assistant", None)
        | {"tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}
    ),
    WORD,
    st.dictionaries(st.sampled_from(["city", "day"]), VALUE, min_size=1, max_size=2),
)
THOUGHT = st.builds(lambda content, thought: message("assistant", content) | {"reasoning_content": thought}, CONTENT, WORD)
ANSWER = st.builds(message, st.just("assistant"), CONTENT) | CALL | THOUGHT
BEFORE = st.builds(message, st.sampled_from(["system", "tool", "developer"]), CONTENT) | ANSWER
PROMPT = st.builds(lambda before, last: [*before, message("user", last)], st.lists(BEFORE, max_size=2), CONTENT)
TOOL = st.builds(
    lambda name, default, choices: {
        "type": "function",
        "function": {"name": name, "parameters": {"p": {"type": "string", "default": default, "enum": choices}}},
    },
    WORD,
    LEAF,
    st.lists(st.none() | WORD, min_size=1, max_size=2),
)
CHAT = st.fixed_dictionaries(
    {
        "prompt": PROMPT,
        "chosen": st.lists(ANSWER, min_size=1, max_size=1),
        "rejected": st.lists(ANSWER, min_size=1, max_size=1),
    },
    optional={"tools": st.lists(TOOL, min_size=1, max_size=2)},
)
TEXT = st.fixed_dictionaries(dict.fromkeys(("prompt", "chosen", "rejected"), WORD))


def said(path, **options):
    found = []
    for record in read_records(SourceConfig(path=str(path), **options)):
        try:
            found.append([(each.prompt, each.chosen, each.rejected, each.tools) for each in normalise(record.value)])
        except Malformed as error:
            found.append(str(error))
    return found


def as_json_columns(records):
    """A table whose columns are of the extension type arrow.json."""
    names = dict.fromkeys(name for record in records for name in record)
    columns = {
        name: pa.array([json.dumps(record[name]) if name in record else None for record in records], pa.string())
        for name in names
    }
    return pa.table({name: pa.ExtensionArray.from_storage(pa.json_(), column) for name, column in columns.items()})


def write_all(records, directory):
    """Writes ``records`` in every way; returns the paths."""
    lines = [json.dumps(record) for record in records]
    (directory / "a.jsonl").write_text("\n".join(lines))
    (directory / "a.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    (directory / "pretty.jsonl").write_text("\n".join(json.dumps(record, indent=1) for record in records))
    table = as_json_columns(records)
    pq.write_table(table, directory / "json.parquet")
    with pa.ipc.new_stream(directory / "stream.arrow", table.schema) as writer:
        writer.write(table)
    with pa.ipc.new_file(directory / "file.arrow", table.schema) as writer:
        writer.write(table)
    return [directory / name for name in ("a.json", "pretty.jsonl", "json.parquet", "stream.arrow", "file.arrow")]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(CHAT, min_size=1, max_size=3) | st.lists(TEXT, min_size=1, max_size=3))
def test_every_file_says_the_same(tmp_path, records):
    paths = write_all(records, tmp_path)
    wanted = said(tmp_path / "a.jsonl")
    assert len(wanted) == len(records)
    for path in paths:
        assert said(path) == wanted, path.name


SAVED = {
    "text": [{"prompt": "p\u2028", "chosen": "é", "rejected": "\U0001f600"}],
    "parts, a call and thoughts": [
        {
            "prompt": [message("system", "s"), message("user", [{"type": "text", "text": "q"}])],
            "chosen": [
                message("assistant", None)
                | {
                    "tool_calls": [
                        {"type": "function", "function": {"name": "f", "arguments": {"city": None, "days": [1, None]}}}
                    ]
                }
            ],
            "rejected": [message("assistant", "b") | {"reasoning_content": "t"}],
            "tools": [{"name": "f", "default": None, "enum": [None, "x"]}],
        }
    ],
    "text and parts in one column": [
        {
            "prompt": [message("user", [{"type": "text", "text": "q"}]), message("tool", "t"), message("user", "r")],
            "chosen": [message("assistant", "a")],
            "rejected": [message("assistant", "b")],
            "tools": [{"name": name, "p": parameters} for name, parameters in (("f", {"x": {"type": "n"}}), ("g", {}))],
        }
    ],
    "two records with other tools": [
        {
            "prompt": "p",
            "chosen": "a",
            "rejected": "b",
            "tools": [{"name": name, "p": {name: {"default": None, "type": "n"}}}],
        }
        for name in ("f", "g")
    ],
}


@pytest.mark.parametrize("records", SAVED.values(), ids=SAVED)
def test_plain_arrow_and_a_saved_data_set_say_the_same(tmp_path, records):
    datasets.disable_progress_bars()
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    data = datasets.Dataset.from_list(records, on_mixed_types="use_json")
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "a.parquet")
    wanted = said(tmp_path / "a.jsonl")
    assert said(tmp_path / "a.parquet") == wanted
    assert said(tmp_path / "saved") == wanted


def test_hub_rows_say_the_same(tmp_path, monkeypatch):
    records = [
        {
            "prompt": [message("user", "q")],
            "chosen": [message("assistant", "a")],
            "rejected": [message("assistant", "b")],
            "tools": [{"name": name, "default": None, "enum": [None, "x"]}],
        }
        for name in ("f", "g")
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    asked = []

    def load_dataset(path, name=None, split=None):
        asked.append((path, name, split))
        return datasets.Dataset.from_list(records)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert said("org/prefs", subset="hard", split="dev") == said(tmp_path / "a.jsonl")
    assert asked == [("org/prefs", "hard", "dev")]


@pytest.mark.parametrize("container", ["struct", "list"])
def test_json_and_maps_are_decoded_at_any_depth(tmp_path, container):
    inner = pa.array(['{"a": null}', None, '"x"'], pa.json_())
    maps = pa.array([[("k", "v"), ("n", None)], None, []], pa.map_(pa.string(), pa.string()))
    if container == "struct":
        columns = {"c": pa.StructArray.from_arrays([inner, maps], ["j", "m"])}
        wanted = [{"c": {"j": {"a": None}, "m": {"k": "v", "n": None}}}, {"c": {}}, {"c": {"j": "x", "m": {}}}]
    else:
        columns = {"c": pa.ListArray.from_arrays([0, 2, 2, 3], inner), "m": pa.ListArray.from_arrays([0, 1, 1, 3], maps)}
        wanted = [
            {"c": [{"a": None}, None], "m": [{"k": "v", "n": None}]},
            {"c": [], "m": []},
            {"c": ["x"], "m": [None, {}]},
        ]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    assert [record.value for record in read_records(SourceConfig(path=str(path)))] == wanted


def test_decimals_are_plain_numbers(tmp_path):
    """Data bases write scores as decimals, and scores that contradict a pair must be found in them, too."""
    kinds = pa.decimal128(4, 1), pa.decimal256(4, 0)
    numbers = {"score": pa.array([Decimal("1.5")], kinds[0]), "each": pa.array([[Decimal("3")]], pa.list_(kinds[1]))}
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(numbers), path)
    (record,) = read_records(SourceConfig(path=str(path)))
    assert record.value == {"score": 1.5, "each": [3]}
    assert [type(record.value["score"]), type(record.value["each"][0])] == [float, int]


def test_fields_that_other_rows_fill_are_absent_and_fields_that_no_row_fills_are_null(tmp_path):
    tools = [[{"name": "f", "strict": None, "extra": 1}], [{"name": "g", "strict": None, "extra": None}]]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"tools": each} for each in tools]), path)
    found = [record.value["tools"] for record in read_records(SourceConfig(path=str(path)))]
    assert found == [[{"name": "f", "strict": None, "extra": 1}], [{"name": "g", "strict": None}]]


@pytest.mark.parametrize("saved", [False, True])
def test_a_null_beside_a_value_cannot_be_told_from_an_absent_field_and_is_said(tmp_path, tokeniser, saved):
    def record(number, **default):
        tool = {"name": "f", "parameters": {"type": "n"} | default}
        return {
            "prompt": [message("user", f"q {number}")],
            "chosen": [message("assistant", "a")],
            "rejected": [message("assistant", "b") | ({"reasoning_content": "t"} if number else {})],
            "tools": [tool],
        }

    records = [record(0, default="x"), record(1, default=None), record(2)]
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list(records)
    path = tmp_path / ("saved" if saved else "a.parquet")
    data.save_to_disk(path) if saved else data.to_parquet(path)
    lines = load_pairs(DataConfig(train=[str(path)], max_lost=1), tokeniser).report.lines()
    (line,) = [line for line in lines if "null" in line]
    assert line.startswith("warning: data ") and "2 records: null fields inside 'tools' read as absent" in line
    (tmp_path / "text.jsonl").write_text(
        "\n".join(json.dumps(each | {"tools": json.dumps(each["tools"])}) for each in records)
    )
    datasets.Dataset.from_json(str(tmp_path / "text.jsonl")).to_parquet(tmp_path / "text.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert said(tmp_path / "text.parquet") == said(tmp_path / "a.jsonl")
    lines = load_pairs(DataConfig(train=[str(tmp_path / "text.parquet")], max_lost=1), tokeniser).report.lines()
    assert not any("null" in line for line in lines)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_two_columns_of_one_name_are_refused(tmp_path, kind):
    table = pa.table([["p"], ["a"], ["b"], ["c"]], names=["prompt", "chosen", "rejected", "chosen"])
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(DataError, match=f"^a.{kind} has more than one column 'chosen'; rename or drop all but one$"):
        said(path)


START = st.sampled_from(["", " ", "\n\n", "[", "{", '"', "Human:", "\n\nHuman: q\n\nAssistant: ", "Assistant: ", "w"])
ODD = st.builds("".join, st.tuples(START, START, st.sampled_from(["", "a", "b?"])))
SIDE = ODD | st.lists(
    st.builds(message, st.sampled_from(["user", "assistant", "system", "human", 3, None]), ODD | st.none() | st.just([])),
    max_size=3,
)


@settings(max_examples=300, deadline=None)
@given(record=st.fixed_dictionaries(dict.fromkeys(("prompt", "chosen", "rejected"), SIDE)) | CHAT | TEXT)
def test_the_short_way_to_read_a_plain_record_gives_what_the_long_way_gives(record):
    def read(value):
        try:
            return normalise(value)
        except Malformed as error:
            return str(error)

    assert read(record) == read(record | {"number": 1})  # a fourth column takes the long way
