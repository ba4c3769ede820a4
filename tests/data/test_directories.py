import json
import os

import pytest

from raydpo.config import DataConfig, EvalConfig, SourceConfig, load_config
from raydpo.data.pairs import held_out_source, load_pairs
from raydpo.data.records import read_records
from raydpo.errors import ConfigError, DataError


def make(directory, *names):
    """Each file holds one record whose prompt is the file's path."""
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"prompt": name, "chosen": "a", "rejected": "b"}) + "\n")


def prompts(path, **settings):
    return [record.value["prompt"] for record in read_records(SourceConfig(path=str(path), **settings))]


@pytest.mark.parametrize(
    "names, split, wanted",
    [
        (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl"], "train", [0, 1]),
        (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl"], "test", [2]),
        (["train.jsonl", "valid.jsonl"], "validation", [1]),
        (["train.jsonl", "val.jsonl"], "dev", [1]),
        (["train.jsonl", "dev.jsonl"], "train+validation", [1, 0]),
        (["a.jsonl", "b.jsonl"], "test", [0, 1]),
        (["a.jsonl", "test.jsonl"], "train", [0]),
        (["TRAIN.JSONL", "TEST.JSONL"], "train", [0]),
        (["prefs-train-v2.jsonl", "prefs_test_v2.jsonl"], "train", [0]),
        (["training_data.jsonl", "evaluation.jsonl"], "test", [1]),
        (["contest.jsonl", "strain.jsonl"], "train", [0, 1]),  # the words are parts of others
        (["data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl", "README.jsonl.md"], "train", [0]),
        (["train/part-0.jsonl", "test/part-0.jsonl"], "test", [1]),
        (["easy/train.jsonl", "easy/test.jsonl", "hard/train.jsonl"], "train", [0, 2]),
        (["train_prefs-00000-of-00001.jsonl", "train_sft-00000-of-00001.jsonl"], "train_prefs", [0]),
        (["train_prefs-00000-of-00001.jsonl", "test_prefs-00000-of-00001.jsonl"], "train", [0]),
        (["pairs.jsonl", "holdout.jsonl"], "train", [0]),
        (["pairs.jsonl", "held-out.jsonl", "my_heldout_2.jsonl"], "test", [1, 2]),
        (["train_prefs.jsonl", "train_sft.jsonl"], "train_prefs", [0]),
        (["train_prefs.jsonl", "test_prefs.jsonl"], "train", [0]),
        (["train_en.jsonl", "train_de.jsonl"], "train", [1, 0]),
        (["notes.jsonl", "train/a.jsonl", "test/a.jsonl"], "train", [1]),
        (["notes.jsonl", "train/a.jsonl", "test/a.jsonl"], "test", [2]),
        (["test.jsonl", "train/a.jsonl"], "train", [1]),
        (["pairs.jsonl", "test/a.jsonl"], "train", [0]),
        (["train.jsonl", "train/a.jsonl"], "train", [0]),
        (["pairs.jsonl", "training-logs/a.jsonl"], "train", [0]),
        (["train.jsonl", "dataset_info.json", "dataset_infos.json", ".cache/train.jsonl", "_old/train.jsonl"], "train", [0]),
    ],
)
def test_files_of_the_split(tmp_path, names, split, wanted):
    make(tmp_path, *names)
    assert prompts(tmp_path, split=split) == [names[place] for place in wanted]


@pytest.mark.parametrize(
    "names, split, message",
    [
        (["test.jsonl"], "train", "no files of split 'train', but of 'test'; set the source's split"),
        (
            ["train_prefs-00000-of-00001.jsonl", "train_sft-00000-of-00001.jsonl"],
            "train",
            "but of 'train_prefs', 'train_sft'",
        ),
        (["train_prefs.jsonl", "train_sft.jsonl"], "train", "but of 'train_prefs', 'train_sft'"),
        (["data/README.md"], "train", "holds no .jsonl"),
    ],
)
def test_a_split_that_is_not_there(tmp_path, names, split, message):
    make(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        prompts(tmp_path, split=split)


def test_the_files_are_told(tmp_path, tokeniser):
    make(tmp_path, *(f"train-{number}.jsonl" for number in range(7)), "test-0.jsonl")
    sets = load_pairs(DataConfig(train=str(tmp_path), eval=str(tmp_path)), tokeniser)
    assert [source.records for source in sets.report.sources] == [7, 1]
    assert [line for line in sets.report.lines() if ": read " in line] == [
        f"data {tmp_path.name}: read train-0.jsonl, train-1.jsonl, train-2.jsonl, train-3.jsonl, train-4.jsonl and 2 more; "
        "not read: test-0.jsonl",
        "data held-out: read test-0.jsonl; not read: train-0.jsonl, train-1.jsonl, train-2.jsonl, train-3.jsonl, "
        "train-4.jsonl and 2 more",
    ]


def test_subset_is_a_directory(tmp_path):
    make(tmp_path, "easy/train.jsonl", "hard/train.jsonl")
    assert prompts(tmp_path, subset="hard") == ["hard/train.jsonl"]
    with pytest.raises(DataError, match="has no directory 'odd', its subset; found easy, hard"):
        prompts(tmp_path, subset="odd")
    with pytest.raises(DataError, match=r"has no directory '\.\./easy', its subset"):
        prompts(tmp_path / "hard", subset="../easy")
    with pytest.raises(DataError, match=r"subset 'hard' is set, but .* is one file"):
        prompts(tmp_path / "hard" / "train.jsonl", subset="hard")


def test_subset_of_held_out_pairs():
    config = DataConfig(train="a.jsonl", eval=EvalConfig(path="org/prefs", subset="hard"))
    assert (held_out_source(config).subset, held_out_source(config).split) == ("hard", "test")


@pytest.mark.parametrize(
    "files", [{"state.json": "{}", "dataset_info.json": "{}"}, {"dataset_dict.json": "[]"}, {"dataset_dict.json": "{"}]
)
def test_a_directory_that_only_looks_saved(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match="cannot read the directory"):
        prompts(tmp_path)


def test_hub_cache(tmp_path):
    make(
        tmp_path, "snapshots/abc/data/train-00000-of-00001.jsonl", "snapshots/old/data/train-00000-of-00001.jsonl", "blobs/x"
    )
    with pytest.raises(DataError, match="a hub cache with 2 commits"):
        prompts(tmp_path)
    make(tmp_path, "refs/main")
    (tmp_path / "refs" / "main").write_text("abc")
    assert prompts(tmp_path) == ["snapshots/abc/data/train-00000-of-00001.jsonl"]


def test_what_save_to_disk_leaves(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    records = [{"prompt": f"p{number}", "chosen": "a", "rejected": "b"} for number in range(5)]
    data = datasets.Dataset.from_list(records)
    data.save_to_disk(tmp_path / "one", num_shards=2)
    (tmp_path / "one" / "cache-0123.arrow").write_bytes(b"left by map()")
    assert prompts(tmp_path / "one") == prompts(tmp_path / "one", split="test") == [f"p{number}" for number in range(5)]
    datasets.DatasetDict(train=data, test=data.select([4])).save_to_disk(tmp_path / "two")
    assert len(prompts(tmp_path / "two")) == 5 and prompts(tmp_path / "two", split="test") == ["p4"]
    with pytest.raises(DataError, match="has no split 'dev', but 'train', 'test'"):
        prompts(tmp_path / "two", split="dev")


def notes(directory, **settings):
    source = SourceConfig(path=str(directory), **settings)
    return [record.note for record in read_records(source) if record.note]


def test_a_part_of_a_split_is_refused_but_on_the_hub(tmp_path):
    make(tmp_path, "train.jsonl", "part.jsonl")
    for path in (tmp_path, tmp_path / "train.jsonl"):
        with pytest.raises(DataError, match=r"split 'train\[:50%\]' is a part of a split, which is read from the hub alone"):
            notes(path, split="train[:50%]")


def test_files_without_a_split_are_those_of_train_alone(tmp_path):
    make(tmp_path, "part-0.jsonl", "validation.jsonl")
    assert notes(tmp_path) == ["read part-0.jsonl; not read: validation.jsonl"]
    for split in ("test", "trian"):
        with pytest.raises(DataError, match=f"no files of split '{split}', but of 'validation'"):
            notes(tmp_path, split=split)


def test_files_that_are_missing_by_their_names_are_warned_of(tmp_path):
    make(tmp_path, "train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl", "more/a.jsonl")
    assert notes(tmp_path) == [
        "warning: read train-00000-of-00003.jsonl, train-00002-of-00003.jsonl; not read: more/; by their names 1 more files "
        "belong to these, which are not there"
    ]
    make(tmp_path, "train-00001-of-00003.jsonl")
    assert notes(tmp_path) == [
        "read train-00000-of-00003.jsonl, train-00001-of-00003.jsonl, train-00002-of-00003.jsonl; not read: more/"
    ]


def test_a_pipe_and_a_link_to_nothing_are_no_data(tmp_path):
    """A pipe gives its content once, and data are read more than once: reading would wait for ever."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    os.symlink(tmp_path / "gone.jsonl", tmp_path / "link.jsonl")
    for name, told in (("pipe", "a pipe or a device; expected a file or directory"), ("link", "a link to '")):
        tree = {"output": "x", "model": {"path": str(tmp_path)}, "data": {"train": str(tmp_path / f"{name}.jsonl")}}
        with pytest.raises(ConfigError, match=told):
            load_config(tree)
