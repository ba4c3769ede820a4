"""What can be loaded but was hardly meant is told with the remedy, and nothing is told of what is right."""

import json
import shutil

import pytest
from plain_model import write_plain_adapter, write_plain_model
from safetensors.torch import load_file, save_file

from raydpo.errors import FilesError
from raydpo.reference.doubts import doubts


@pytest.fixture
def model(tmp_path):
    return write_plain_model(tmp_path / "model")


def edit_weights(directory, change):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_sound_model_gives_none(model, tmp_path):
    (model / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 3]}))
    assert doubts(model, write_plain_adapter(tmp_path / "adapter")) == []


def test_a_matrix_of_zeros(model):
    edit_weights(model, lambda tensors: tensors["lm_head.weight"].zero_())
    (line,) = doubts(model)
    assert "all values of 1 weight matrix are zero (lm_head.weight)" in line and "fetch the model again" in line


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 1.5),
        ("top_k", 2.5),
        ("top_k", True),
        ("repetition_penalty", 0),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [2, -1]),
        ("pad_token_id", -1),
    ],
)
def test_values_that_no_generation_takes(entry, value, model):
    (model / "generation_config.json").write_text(json.dumps({"do_sample": True, entry: value}))
    (line,) = doubts(model)
    assert f"generation_config.json: {entry} is {json.dumps(value)} (" in line and "correct it there" in line


@pytest.mark.parametrize("entries", [{"max_new_tokens": -1}, {"cache_implementation": "none such"}, {"early_stopping": 3}])
def test_values_with_which_transformers_loads_no_model(entries, model):
    (model / "generation_config.json").write_text(json.dumps(entries))
    with pytest.raises(FilesError, match=rf"transformers refuses .*generation_config\.json.*{next(iter(entries))}"):
        doubts(model)


def with_base(adapter, name):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(name)}))
    return adapter


def test_an_adapter_of_another_model(model, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    adapter = with_base(write_plain_adapter(tmp_path / "adapter"), other)
    assert doubts(model, adapter) == []  # the same weights at another place
    edit_weights(other, lambda tensors: tensors["lm_head.weight"].view(-1)[:4].add_(1))
    (line,) = doubts(model, adapter)
    assert f"was made for {other} (base_model_name_or_path" in line and "such as lm_head.weight" in line


@pytest.mark.parametrize("base", ["absent", "half precision", "", "somebody/model"])
def test_bases_of_which_nothing_is_certain(base, model, tmp_path):
    name = base
    if base == "half precision":
        name = shutil.copytree(model, tmp_path / "other")
        file = name / "model.safetensors"
        save_file({key: value.bfloat16() for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    if base == "absent":
        name = tmp_path / "absent"
    assert doubts(model, with_base(write_plain_adapter(tmp_path / "adapter"), name)) == []
