"""Directories that are refused before they are hashed or loaded, and the files that are read from a good one."""

import json
import shutil

import pytest
from plain_model import CONFIG, plain_weights, write_plain_adapter, write_plain_model
from safetensors.numpy import save_file
from tiny import make_tokenizer

from raydpo.data.tokenise import has_tokenizer, load_tokenizer
from raydpo.errors import ModelError
from raydpo.model.files import adapter_files, model_files, read_header, weights_lacking


@pytest.fixture
def model(tmp_path):
    return write_plain_model(tmp_path / "model")


@pytest.fixture
def adapter(tmp_path):
    return write_plain_adapter(tmp_path / "adapter")


def in_shards(directory, tensors=None):
    """Write the tensors as two shards and an index, as ``save_pretrained`` does. It does not delete a single file."""
    tensors = tensors or plain_weights()
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def configured(directory, **entries):
    (directory / "config.json").write_text(json.dumps(CONFIG | entries))
    return directory


def names(files):
    return [file.name for file in files]


def test_transformers_order(model):
    """Order: the file named in config.json, then the single file, then the index."""
    assert names(model_files(model).weights) == ["model.safetensors"]
    in_shards(model)
    files = model_files(model)
    assert names(files.weights) == ["model.safetensors"]
    assert names(files.passed_over) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for shard in files.passed_over:
        shard.unlink()
    assert model_files(model).passed_over == ()  # an index left over from before
    save_file(plain_weights(), model / "other.safetensors")
    assert names(model_files(configured(model, transformers_weights="other.safetensors")).weights) == ["other.safetensors"]
    configured(model)
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks model-00001-of-00002\.safetensors"):
        model_files(model)
    in_shards(model)
    assert names(model_files(model).weights) == names(files.passed_over)


def test_a_file_and_an_index_of_different_tensors(model):
    tensors = plain_weights()
    in_shards(model, {f"model.{name}": value for name, value in tensors.items()})
    with pytest.raises(ModelError, match=r"model\.safetensors and model\.safetensors\.index\.json, which name different"):
        model_files(model)


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({"transformers_weights": "../adapter/adapter_model.safetensors"}, "in that directory is expected"),
        ({"transformers_weights": "pytorch_model.bin"}, "in that directory is expected"),
        ({"transformers_weights": "other.safetensors"}, r"has no other\.safetensors"),
        ({"text_config": {"transformers_weights": "other.safetensors"}}, "unclear which file is loaded"),
        ({"configuration_files": ["config.4.0.0.json"]}, "keep one"),
    ],
)
def test_settings_that_lead_elsewhere(model, adapter, entries, told):
    with pytest.raises(ModelError, match=told):
        model_files(configured(model, **entries))


def test_a_distributed_checkpoint_beside_the_weights(model):
    shutil.copy(model / "model.safetensors", model / "shard-00001-model-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match="distributed checkpoint"):
        model_files(model)


def test_a_model_and_an_adapter_are_told_apart(model, adapter):
    with pytest.raises(ModelError, match=r"holds an adapter, and a model is expected.*model\.adapter"):
        model_files(adapter)
    with pytest.raises(ModelError, match=r"holds a model, and an adapter is expected.*model\.path"):
        adapter_files(model)
    shutil.copytree(adapter, model, dirs_exist_ok=True)
    with pytest.raises(ModelError, match=r"holds a model and an adapter.*name the adapter in model\.adapter"):
        model_files(model)
    assert adapter_files(model).weights.name == "adapter_model.safetensors"  # some trainers also write config.json
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds an adapter, and a model is expected"):
        model_files(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "PREFIX_TUNING"},
        {"peft_type": "P_TUNING"},
        {"peft_type": "XLORA"},
        {"peft_type": "OF_TOMORROW"},
        {"alora_invocation_tokens": [5, 6]},
    ],
)
def test_adapters_that_are_no_layers(adapter, settings):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ModelError, match="would be left out of the log-probs"):
        adapter_files(adapter)


def test_code_of_another_repository_runs_only_from_a_copy(model):
    configured(model, auto_map={"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "org/repo--modeling_x.X"})
    with pytest.raises(ModelError, match=r"another repository.*org/repo.*trust_remote_code=false"):
        model_files(model, trust_remote_code=True)
    assert not model_files(model).runs_code


def test_a_pointer_in_the_place_of_weights(model):
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    in_shards(model)
    with pytest.raises(ModelError, match="Git LFS pointer"):
        model_files(model)


def test_what_is_still_to_be_fetched_of_the_hub(model, adapter, tmp_path):
    """Only the files in the form that is read are fetched."""
    assert weights_lacking(model) == weights_lacking(adapter) == weights_lacking(tmp_path) == []
    (model / "model.safetensors").unlink()
    assert set(weights_lacking(model)) == {"model.safetensors"}
    in_shards(model)
    assert weights_lacking(model) == []
    (model / "model-00001-of-00002.safetensors").unlink()
    assert set(weights_lacking(model)) == {
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    assert "other.safetensors" in weights_lacking(configured(model, transformers_weights="other.safetensors"))
    (adapter / "adapter_model.safetensors").unlink()
    assert set(weights_lacking(adapter)) == {"adapter_model.safetensors"}


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0f3a\nsize 4711\n"


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json", "generation_config.json", "modeling_own.py"]
)
def test_pointers_of_git_lfs_are_named(name, model):
    if name.endswith("index.json"):
        in_shards(model)
        (model / "model.safetensors").unlink()
    (model / name).write_text(POINTER)
    with pytest.raises(ModelError, match=rf"{name} is a Git LFS pointer.*run 'git lfs pull' in"):
        model_files(model)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_pointers_of_an_adapter(name, adapter):
    (adapter / name).write_text(POINTER)
    with pytest.raises(ModelError, match=rf"{name} is a Git LFS pointer"):
        adapter_files(adapter)


@pytest.mark.parametrize("text", ["{", "[1]", "null", ""])
def test_a_broken_generation_config(text, model):
    """transformers would save the trained model with one made up from config.json."""
    (model / "generation_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"cannot read .*generation_config\.json: "):
        model_files(model)


def test_files_that_an_index_lists_and_that_are_not_there(model):
    in_shards(model)
    for file in ("model.safetensors", "model-00002-of-00002.safetensors"):
        (model / file).unlink()
    told = r"lacks model-00002-of-00002\.safetensors, 1 of the 2 files of weights that model\.safetensors\.index\.json lists"
    with pytest.raises(ModelError, match=told):
        model_files(model)


def test_an_empty_directory_of_an_adapter(tmp_path):
    with pytest.raises(ModelError, match=r"has no adapter_config\.json; a PEFT adapter is expected"):
        adapter_files(tmp_path)


def test_pointers_of_a_tokenizer(model):
    make_tokenizer().save_pretrained(model)
    assert has_tokenizer(model) and load_tokenizer(model)
    for name in ("chat_template.jinja", "tokenizer.json"):
        (model / name).write_text(POINTER)
    with pytest.raises(ModelError, match=r"tokenizer\.json is a Git LFS pointer.*\(1 more files beside it\)"):
        load_tokenizer(model)


DAMAGED = {
    "empty": (lambda data: b"", "it is empty"),
    "a page": (lambda data: b"<!DOCTYPE html><title>404</title>", "its first bytes ask for a header of"),
    "cut": (lambda data: data[:-7], r"is truncated: it has [\d,]+ bytes, and its tensors need"),
    "longer": (lambda data: data + b"abc", "has 3 bytes behind its last tensor"),
    "no header": (lambda data: b"\x02\0\0\0\0\0\0\0[]", "is not a safetensors file"),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_damaged_files_of_weights(how, model):
    change, told = DAMAGED[how]
    file = model / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ModelError, match=told):
        read_header(file)


@pytest.mark.parametrize("text", ['{"weight_map": {"a": 3}}', '{"weight_map": {}}', "[" * 100_000])
def test_an_index_that_is_none(text, model):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"has no weight_map|cannot read"):
        model_files(model)
