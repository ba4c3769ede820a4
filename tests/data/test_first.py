"""The first pairs of large sources, and how many there may be in all."""

import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import make_tokenizer, preferences, write_preferences

from raydpo.config import DataConfig
from raydpo.data.first import Reading, first_pairs
from raydpo.data.pairs import HELD_OUT, load_pairs
from raydpo.data.tokenise import Tokeniser
from raydpo.errors import DataError


def first(config, most=400, large=lambda source: True):
    return first_pairs(config, Tokeniser(make_tokenizer()), most, large)


def config(*paths, **settings):
    return DataConfig.model_validate({"train": [str(path) for path in paths]} | settings)


@pytest.fixture(scope="module")
def records():
    return preferences(4000)


@pytest.fixture(scope="module")
def big(tmp_path_factory, records):
    return write_preferences(tmp_path_factory.mktemp("big") / "big.jsonl", records)


def test_the_first_records_are_those_of_all(big):
    found, whole = first(config(big)), load_pairs(config(big), Tokeniser(make_tokenizer())).train
    assert not found.whole and found.sets.train.num_rows == 400
    for name in ("pair_id", "chosen_ids", "rejected_key"):
        assert found.sets.train[name].to_pylist() == whole[name].slice(0, 400).to_pylist()
    assert found.read["big"].records == 400 and found.read["big"].of_records == pytest.approx(4000, rel=0.1)
    assert found.scales["big"] == pytest.approx(10, rel=0.1) and found.cpu_seconds > 0
    [line] = found.lines()
    assert re.match(r"from the first 400 of about [34],\d00 records of big; ", line)
    assert found.to_dict() == {"big": {"records": 400, "of_records": found.read["big"].of_records}}


def test_a_source_that_is_not_large_or_ends_is_whole(big, tmp_path):
    few = write_preferences(tmp_path / "few.jsonl", preferences(400))
    for found in (first(config(few)), first(config(few), 10, lambda source: False)):
        assert found.whole and found.read["few"] == Reading(400, 400) and found.lines() == [] and found.to_dict() is None
    both = first(config(big, few), 400, lambda source: source.path.endswith("big.jsonl"))
    assert both.scales["few"] == 1.0 and both.scales["big"] > 9 and both.sets.train.num_rows == 800
    assert both.read["big"].records == 400 and not both.whole


def test_other_files_tell_how_many_records_they_have(records, tmp_path):
    lines = [json.dumps(record) + "\n" for record in records]
    with gzip.open(tmp_path / "packed.jsonl.gz", "wt") as file:
        file.writelines(lines)
    (tmp_path / "list.json").write_text(json.dumps(records))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "rows.parquet", row_group_size=1000)
    (tmp_path / "files").mkdir()
    for number in range(4):
        (tmp_path / "files" / f"{number}.jsonl").write_text("".join(lines[number * 1000 : number * 1000 + 1000]))
    for name in ("packed.jsonl.gz", "list.json", "rows.parquet", "files"):
        [reading] = first(config(tmp_path / name)).read.values()
        assert reading.records == 400 and reading.of_records == pytest.approx(4000, rel=0.25), name


def test_a_limit_bounds_what_is_estimated(big):
    limited = DataConfig.model_validate({"train": {"path": str(big), "limit": 1500}})
    assert first(limited).read["big"] == Reading(400, 1500)
    assert first(limited, 1500).read["big"] == Reading(1500, 1500)


def test_a_held_out_file_is_read_in_part_too(big, tmp_path):
    few = write_preferences(tmp_path / "few.jsonl", preferences(50, seed=7))
    found = first(config(few, eval=str(big)), 100)
    assert found.scales["few"] == 1 and found.scales[HELD_OUT] == pytest.approx(40, rel=0.2)
    assert found.sets.eval.num_rows == 100


def test_prompts_are_held_out_as_in_all_pairs(big):
    settings = config(big, eval={"fraction": 0.2}, fraction=0.5)
    found, whole = first(settings), load_pairs(settings, Tokeniser(make_tokenizer()))
    for part in ("train", "eval"):
        some, every = (getattr(each, part)["pair_id"].to_pylist() for each in (found.sets, whole))
        assert some == [name for name in every if int(name.partition(":")[2]) <= 400]


def test_first_records_of_one_prompt_are_all_shown(tmp_path, records):
    sorted_by_prompt = [record | {"prompt": records[number // 1000]["prompt"]} for number, record in enumerate(records)]
    file = write_preferences(tmp_path / "sorted.jsonl", sorted_by_prompt)
    found = first(config(file, eval={"fraction": 0.2}), 100)
    assert found.sets.train.num_rows == 100 and found.sets.eval is None
    assert "data.eval.fraction is not applied to so few records: " in found.lines()[1]


def test_refusals_say_of_which_records(tmp_path, records):
    bad = [{"prompt": "only"} if number < 40 else record for number, record in enumerate(records)]
    file = write_preferences(tmp_path / "bad.jsonl", bad)
    with pytest.raises(DataError, match=r"in the first 400 of about \d,\d00 records of bad: data bad: 40 of 400"):
        first(config(file))
    with pytest.raises(DataError, match=r"^data bad: 40 of 4,000 records are malformed"):
        first(config(file, max_malformed=0.001), large=lambda source: False)


def test_a_column_that_only_later_records_have_is_no_error(tmp_path, records):
    later = [record | ({"system_text": "Be short."} if number > 2000 else {}) for number, record in enumerate(records)]
    file = write_preferences(tmp_path / "later.jsonl", later)
    mapped = DataConfig.model_validate({"train": {"path": str(file), "columns": {"system": "system_text"}}})
    assert first(mapped).sets.train.num_rows == 400
    with pytest.raises(DataError, match="has the column 'system_text'"):
        first(mapped.model_copy(update={"train": (mapped.train[0].model_copy(update={"limit": 100}),)}))
