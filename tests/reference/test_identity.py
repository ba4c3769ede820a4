"""Each changed input changes the identity; what does not matter does not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from raydpo.errors import ModelError
from raydpo.reference.identity import ReferenceIdentity, earlier_identity, identify, on_this_machine
from raydpo.reference.score import ReferenceSpec


@pytest.fixture
def model(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "model")


def edit_weights(directory, change):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(directory, **changes):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_one_changed_value_of_one_weight(model):
    before = identify(model, "float32")

    def change(tensors):
        tensors["model.norm.weight"][3] += 1e-6

    edit_weights(model, change)
    after = identify(model, "float32")
    assert before.weights != after.weights
    assert before.digest != after.digest
    assert [line.split(":")[0] for line in before.differences(after)] == ["weights"]


def test_two_weights_swapped(model):
    before = identify(model, "float32")

    def change(tensors):
        first, second = (f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1))
        tensors[first] += 1
        tensors[second] += 2

    edit_weights(model, change)
    middle = identify(model, "float32")

    def swap(tensors):
        first, second = (f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1))
        tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()

    edit_weights(model, swap)
    assert len({before.digest, middle.digest, identify(model, "float32").digest}) == 3


def test_shards_do_not_matter(model):
    before = identify(model, "float32")
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, model / file)
        weight_map |= dict.fromkeys(part, file)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert identify(model, "float32") == before


def test_place_and_names_do_not_matter(model, tmp_path):
    before = identify(model, "float32")
    edit_config(model, _name_or_path="elsewhere", transformers_version="9", use_cache=False, dtype="bfloat16")
    moved = model.rename(tmp_path / "moved")
    assert identify(moved, "float32") == before


@pytest.mark.parametrize("change", [{"rope_theta": 5e5}, {"rms_norm_eps": 1e-3}, {"sliding_window": 4}])
def test_architecture_matters(model, change):
    before = identify(model, "float32")
    edit_config(model, **change)
    assert before.differences(identify(model, "float32"))[0].startswith("architecture")


def test_precision_matters_but_is_the_same_model(model):
    one, other = identify(model, "float32"), identify(model, "bfloat16")
    assert one.digest != other.digest
    assert one.same_model(other)


def test_adapter_matters(model, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    digests = {identify(model, "float32").digest}
    for seed in (0, 1):
        torch.manual_seed(seed)
        policy = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=4, task_type="CAUSAL_LM"))
        policy.save_pretrained(tmp_path / f"adapter-{seed}")
        digests.add(identify(model, "float32", tmp_path / f"adapter-{seed}").digest)
    assert len(digests) == 3


def test_identities_whose_numbers_have_not_changed_stay_what_they_were(model):
    plain = ReferenceIdentity(weights="1" * 64, architecture="a" * 64, adapter=None, dtype="bfloat16")
    assert plain.to_json() == ('{"adapter": null, "architecture": "' + "a" * 64 + '", "dtype": "bfloat16", "quantisation": '
                               'null, "scoring_version": 2, "weights": "' + "1" * 64 + '"}')
    assert plain.digest == "b7c1d087473ebfb21c676473f6b2ca23"
    assert ReferenceIdentity.from_json(plain.to_json()) == plain
    assert identify(model, "float32", max_length=7) == identify(model, "float32", max_length=9999)
    assert earlier_identity(plain) == (plain, "")


def test_an_adapter_in_bfloat16_is_scored_again(model, tmp_path):
    shutil.copy(model / "model.safetensors", tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    versions = {(dtype, quantization): identify(model, dtype, tmp_path, quantization).scoring_version
                for dtype in ("float32", "bfloat16") for quantization in (None, "4bit")}
    assert versions == {("float32", None): 2, ("float32", "4bit"): 2, ("bfloat16", None): 3, ("bfloat16", "4bit"): 2}
    now, exact = identify(model, "bfloat16", tmp_path), identify(model, "float32", tmp_path)
    earlier, change = earlier_identity(now)
    assert earlier.scoring_version == 2 and "rounded to bfloat16" in change
    assert now.same_model(exact) and exact.same_model(now) and not now.same_model(identify(model, "bfloat16"))


def test_pickled_weights_are_refused(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        identify(model, "float32")


def test_truncated_weights_are_refused(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="truncated"):
        identify(model, "float32")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub whose downloads end in another cache than the driver's, as on another machine."""
    asked = []

    def snapshot_download(name, *, revision, allow_patterns):
        if name.startswith("gone"):
            raise OSError("404")
        asked.append((name, revision))
        return str(tmp_path / "cache" / name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


def spec_at(path, adapter=None):
    return ReferenceSpec(path=str(path), adapter=adapter, identity=None)


def test_a_worker_fetches_what_the_driver_had_from_the_hub(hub, tmp_path):
    """The same repository and the same revision; a directory that is no snapshot of the hub is nobody's to fetch."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    spec = on_this_machine(spec_at(f"/drivers/hub/models--meta-llama--Llama-3.1-8B/snapshots/{revision}", "/mnt/sft"))
    assert hub == [("meta-llama/Llama-3.1-8B", revision)]
    assert (spec.path, spec.adapter) == (str(tmp_path / "cache/meta-llama/Llama-3.1-8B"), "/mnt/sft")
    assert on_this_machine(spec_at("/mnt/model")) == spec_at("/mnt/model") and len(hub) == 1


def test_without_the_hub_a_shared_disk_will_do(hub, tmp_path):
    shared = tmp_path / "models--gone--m" / "snapshots" / ("0" * 40)
    with pytest.raises(ModelError, match="the hub does not give"):
        on_this_machine(spec_at(shared))
    shared.mkdir(parents=True)
    assert on_this_machine(spec_at(shared)).path == str(shared)
