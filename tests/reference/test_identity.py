"""Each relevant change of an input changes the identity; irrelevant ones do not."""

import fnmatch
import json
import os
import re
import shutil

import pytest
import torch
from plain_model import write_plain_adapter, write_plain_model
from safetensors.torch import load_file, save_file

from raydpo.errors import FilesError, ModelError
from raydpo.model.files import read_header
from raydpo.model.load import load_causal_lm
from raydpo.reference.identity import (
    ReferenceIdentity,
    _finite_and_zero,
    differs_from_its_tie,
    earlier_identity,
    identify,
    on_this_machine,
    resolve_model,
    zero_matrices,
)
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


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits[0]


PINNED = {
    "float32": ("float32", None, None, "4afbb8ad53535d6e659b1e9ba82b639f"),
    "bfloat16": ("bfloat16", None, None, "230edf906a25e7db648fd3de28a47f7a"),
    "4bit": ("bfloat16", None, "4bit", "386083d781e04b63e6da66ec8366236e"),
    "adapter": ("float32", "adapter", None, "e0dd30830e51a4ffce09accc1c42d69a"),
}


@pytest.mark.parametrize("kind", PINNED)
def test_caches_that_exist_are_found(kind, tmp_path):
    """Pinned digests: another digest for the same model would make existing caches unfindable."""
    dtype, adapter, quantization, digest = PINNED[kind]
    plain = write_plain_model(tmp_path / "model")
    adapter = adapter and write_plain_adapter(tmp_path / adapter)
    assert identify(plain, dtype, adapter, quantization).digest == digest
    assert identify(plain, dtype, adapter, quantization, trust_remote_code=True).digest == digest


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


def test_one_weight_in_two_files_with_other_values_is_refused(model):
    """Copies of a shard from another save: which of both is loaded is left to chance."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    name, *others = sorted(tensors)
    for number, names in enumerate([[name, *others[:3]], [*others[3:], name]]):
        save_file({each: tensors[each] for each in names}, model / f"{number}.safetensors", metadata={"format": "pt"})
    index = {"weight_map": {each: "0.safetensors" if each in others[:3] else "1.safetensors" for each in tensors}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert identify(model, "float32")
    tensors[name] = tensors[name] + 1
    save_file({each: tensors[each] for each in [*others[3:], name]}, model / "1.safetensors", metadata={"format": "pt"})
    with pytest.raises(FilesError, match=rf"1\.safetensors holds {name}, which another file of the model holds with other"):
        identify(model, "float32")


def test_what_is_hashed_is_what_is_loaded(model, tmp_path):
    """A sharded model saved over one that was saved as one file: transformers keeps that file, and loads it."""
    from transformers import AutoModelForCausalLM

    before, first = identify(model, "float32"), AutoModelForCausalLM.from_pretrained(model)
    for parameter in first.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    first.save_pretrained(tmp_path / "other")
    other = identify(tmp_path / "other", "float32")
    first.save_pretrained(model, max_shard_size="100KB")
    assert (model / "model.safetensors").is_file() and (model / "model.safetensors.index.json").is_file()
    with pytest.raises(ModelError, match="delete the one that is not meant"):
        identify(model, "float32")
    (model / "model.safetensors").unlink()
    assert identify(model, "float32") == other != before
    first.save_pretrained(model)  # as one file over shards, which transformers deletes; the index stays
    assert identify(model, "float32") == other
    shutil.copy(tmp_path / "other" / "model.safetensors", model / "named.safetensors")
    shutil.copy(tmp_path / "other" / "config.json", model / "config.json")
    edit_config(model, transformers_weights="named.safetensors")

    def change(tensors):
        tensors["model.norm.weight"] += 1

    edit_weights(model, change)  # of a file that is not read
    assert torch.equal(logits(load_causal_lm(model, "float32", rope_length=None)), logits(first.eval()))
    assert identify(model, "float32") == other


def test_an_adapter_in_the_models_directory_is_refused(model, tmp_path):
    """transformers would load it on top of the model, under the identity of the model alone."""
    shutil.copytree(write_plain_adapter(tmp_path / "adapter"), model, dirs_exist_ok=True)
    for read in (lambda: identify(model, "float32"), lambda: load_causal_lm(model, "float32", rope_length=None)):
        with pytest.raises(ModelError, match=r"name the adapter in model\.adapter"):
            read()


def test_the_order_of_layers_matters(tmp_path):
    from tiny import make_model

    kinds = ["sliding_attention", "full_attention"] * 2
    mixed = make_model(tmp_path / "mixed", "qwen3", layers=4, sliding_window=4, use_sliding_window=True, layer_types=kinds)
    before, alternating = identify(mixed, "float32"), logits(load_causal_lm(mixed, "float32", rope_length=None))
    edit_config(mixed, layer_types=sorted(kinds))
    assert not torch.allclose(alternating, logits(load_causal_lm(mixed, "float32", rope_length=None)), atol=1e-3)
    assert [line.split(":")[0] for line in before.differences(identify(mixed, "float32"))] == ["architecture"]


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class Ours(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * {factor}
        return found
"""


def test_whether_code_runs_matters(model):
    plain = identify(model, "float32")
    assert identify(model, "float32", trust_remote_code=True) == plain
    edit_config(model, auto_map={"AutoModelForCausalLM": "modeling_ours.Ours"})
    (model / "modeling_ours.py").write_text(CODE.format(factor=2))
    ours, theirs = (
        logits(load_causal_lm(model, "float32", rope_length=None, trust_remote_code=trust)) for trust in (True, False)
    )
    torch.testing.assert_close(ours, 2 * theirs)
    assert identify(model, "float32", trust_remote_code=True) != identify(model, "float32")


def test_code_that_lies_deeper_matters_where_it_runs(model):
    edit_config(model, auto_map={"AutoModelForCausalLM": "modeling_ours.Ours"})
    (model / "modeling_ours.py").write_text("from .parts.scale import FACTOR\n" + CODE.format(factor="FACTOR"))
    (model / "parts").mkdir()
    (model / "parts" / "scale.py").write_text("FACTOR = 2\n")
    before, not_run = identify(model, "float32", trust_remote_code=True), identify(model, "float32")
    (model / "parts" / "scale.py").write_text("FACTOR = 3\n")
    assert identify(model, "float32", trust_remote_code=True) != before
    assert identify(model, "float32") == not_run


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
    assert plain.to_json() == (
        '{"adapter": null, "architecture": "' + "a" * 64 + '", "dtype": "bfloat16", "quantisation": '
        'null, "scoring_version": 2, "weights": "' + "1" * 64 + '"}'
    )
    assert plain.digest == "b7c1d087473ebfb21c676473f6b2ca23"
    assert ReferenceIdentity.from_json(plain.to_json()) == plain
    assert identify(model, "float32", max_length=7) == identify(model, "float32", max_length=9999)
    assert earlier_identity(plain) == (plain, "")


def test_an_adapter_in_bfloat16_is_scored_again(model, tmp_path):
    adapter = write_plain_adapter(tmp_path / "adapter")
    versions = {
        (dtype, quantization): identify(model, dtype, adapter, quantization).scoring_version
        for dtype in ("float32", "bfloat16")
        for quantization in (None, "4bit")
    }
    assert versions == {("float32", None): 2, ("float32", "4bit"): 2, ("bfloat16", None): 3, ("bfloat16", "4bit"): 4}
    now, exact = (identify(model, dtype, adapter) for dtype in ("bfloat16", "float32"))
    earlier, change = earlier_identity(now)
    assert earlier.scoring_version == 2 and "rounded to bfloat16" in change
    assert now.same_model(exact) and exact.same_model(now) and not now.same_model(identify(model, "bfloat16"))


def test_a_quantized_reference_in_bfloat16_is_scored_again(model):
    """Whether raydpo quantizes it, or its files are quantized."""
    plain = {dtype: identify(model, dtype) for dtype in ("float32", "bfloat16")}
    assert {dtype: identify(model, dtype, None, "8bit").scoring_version for dtype in plain} == {"float32": 2, "bfloat16": 4}
    edit_config(model, quantization_config={"quant_method": "gptq", "bits": 4})
    assert {dtype: identify(model, dtype).scoring_version for dtype in plain} == {"float32": 2, "bfloat16": 4}
    earlier, change = earlier_identity(identify(model, "bfloat16"))
    assert earlier.scoring_version == 2 and change.startswith("quantized layers now give bfloat16 to attention")


def test_the_order_of_an_adapters_sets_does_not_matter_and_of_its_patterns_does(tmp_path):
    model, adapter = write_plain_model(tmp_path / "model"), write_plain_adapter(tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    settings = json.loads(file.read_text())
    before = identify(model, "float32", adapter)
    file.write_text(json.dumps(settings | {"target_modules": settings["target_modules"][::-1]}))
    assert identify(model, "float32", adapter) == before
    digests = []
    for pattern in ({".*proj": 1, "q_.*": 2}, {"q_.*": 2, ".*proj": 1}):  # PEFT takes the first that fits
        file.write_text(json.dumps(settings | {"alpha_pattern": pattern}))
        digests.append(identify(model, "float32", adapter).digest)
    assert len({before.digest, *digests}) == 3


def test_a_user_without_a_home(model, monkeypatch, tmp_path):
    """Digests are remembered in the same place as everything else of this node."""
    before = identify(model, "float32")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert identify(model, "float32") == before
    assert list((tmp_path / f"raydpo-{os.getuid()}" / "raydpo" / "digests").iterdir())


def test_pickled_weights_are_refused(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        identify(model, "float32")


def test_truncated_weights_are_refused(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="truncated"):
        identify(model, "float32")


NUMBERS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


@pytest.mark.parametrize("dtype", NUMBERS)
def test_finite_numbers_are_told_from_others_by_their_bits(dtype):
    kind = NUMBERS[dtype]
    bits = torch.arange(1 << 8 * min(kind.itemsize, 2), dtype=torch.int32).to(
        torch.uint16 if kind.itemsize > 1 else torch.uint8
    )
    if kind.itemsize > 2:  # every pattern of the first two bytes, among them all exponents and both signs
        bits = torch.stack([torch.full_like(bits, 1)] * (kind.itemsize // 2 - 1) + [bits], dim=1).flatten()
    numbers = bits.view(kind)
    expected = torch.isfinite(numbers.double()).tolist()
    found = [_finite_and_zero(one.numpy().tobytes(), dtype) for one in numbers.view(torch.uint8).view(len(numbers), -1)]
    assert [finite for finite, _ in found] == expected and len(set(expected)) == 2
    assert [zero for _, zero in found] == (numbers.double() == 0).tolist()
    whole = numbers[torch.tensor(expected)]
    assert _finite_and_zero(whole.view(torch.uint8).numpy().tobytes(), dtype) == (True, False)
    zeros = torch.tensor([0.0, -0.0, 0.0]).to(kind)
    assert _finite_and_zero(zeros.view(torch.uint8).numpy().tobytes(), dtype) == (True, True)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(value, model):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        tensors["model.norm.weight"][-1] = value

    edit_weights(model, change)
    told = r"model\.layers\.1\.mlp\.up_proj\.weight, model\.norm\.weight hold NaN or infinite"
    for _ in "12":  # not remembered as digests
        with pytest.raises(FilesError, match=told):
            identify(model, "float32")


def test_an_adapter_of_nan_is_refused(tmp_path):
    plain, adapter = write_plain_model(tmp_path / "model"), write_plain_adapter(tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    tensors[name].view(-1)[0] = float("inf")
    save_file(tensors, file)
    with pytest.raises(FilesError, match=f"{re.escape(name)} holds NaN or infinite"):
        identify(plain, "float32", adapter)


def with_zeros(directory, first):
    """Overwrite the data of model.safetensors with zeros, from ``first`` (share of the bytes) on."""
    file = directory / "model.safetensors"
    data, _ = read_header(file)
    content = file.read_bytes()
    kept = data + int((len(content) - data) * first)
    file.write_bytes(content[:kept] + bytes(len(content) - kept))


@pytest.mark.parametrize(
    ("first", "told"),
    [(0, "all its matrices are zero"), (0.4, r"it is zero from the last part of model\.embed_tokens\.weight on")],
)
def test_a_file_that_was_not_written_to_its_end(first, told, model):
    with_zeros(model, first)
    for _ in "12":  # not remembered as digests
        with pytest.raises(FilesError, match=rf"holds zeros in place of weights: {told} .*fetch or save it again"):
            identify(model, "float32")


def test_one_of_two_files_of_zeros(model):
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in files.items():
        save_file({name: tensors[name] * (file < "b") for name in part}, model / file)
    places = {name: file for file, part in files.items() for name in part}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(FilesError, match=r"b\.safetensors holds zeros .*all its matrices are zero"):
        identify(model, "float32")


def test_matrices_that_may_be_zero_on_purpose_are_named(model):
    """Negative zeros count, as multiplying by zero leaves them; biases, norms and padding rows do not."""

    def change(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"] *= 0
        tensors["model.layers.1.self_attn.v_proj.weight"][:] = 0  # the last but one of the file
        tensors["model.layers.0.input_layernorm.weight"][:] = 0
        tensors["model.norm.weight"][:] = 0
        tensors["model.embed_tokens.weight"][-8:] = 0
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(4)

    assert zero_matrices(model) == []
    edit_weights(model, change)
    for _ in "12":  # remembered with the digests
        assert zero_matrices(model) == ["model.layers.1.mlp.down_proj.weight", "model.layers.1.self_attn.v_proj.weight"]


@pytest.mark.parametrize("zero", ["lora_B", "lora_"])
def test_an_adapter_of_zeros(zero, tmp_path):
    """An adapter that was not trained yet has one matrix of zeros in each pair; with two it could not be trained."""
    plain, adapter = write_plain_model(tmp_path / "model"), write_plain_adapter(tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    save_file({name: value * (zero not in name) for name, value in load_file(file).items()}, file)
    if zero == "lora_B":
        identify(plain, "float32", adapter)
    else:
        with pytest.raises(FilesError, match="all its matrices are zero"):
            identify(plain, "float32", adapter)


def test_a_mask_may_be_infinite(model):
    edit_weights(model, lambda tensors: tensors.update({"causal_mask": torch.full((4, 4), float("-inf"))}))
    identify(model, "float32")


def test_a_head_beside_a_tied_embedding(model):
    assert differs_from_its_tie(model) is None
    edit_config(model, tie_word_embeddings=True)
    assert "lm_head.weight that differs from model.embed_tokens.weight" in differs_from_its_tie(model)
    edit_weights(model, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert differs_from_its_tie(model) is None


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub whose downloads go to another cache than the driver's, as on another machine."""
    asked = []

    def snapshot_download(name, *, revision, allow_patterns):
        if name.startswith("gone"):
            raise OSError("404")
        asked.append((name, revision))
        return str(tmp_path / "cache" / name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


def test_of_a_repository_only_the_weights_that_are_read_are_fetched(monkeypatch, tmp_path):
    """Some repositories hold the weights twice in different formats: twice the download, and twice the parameters."""
    repository = write_plain_model(tmp_path / "repository")
    shutil.copy(repository / "model.safetensors", repository / "consolidated.safetensors")
    snapshot, revisions = tmp_path / "snapshots" / ("0" * 40), []

    def snapshot_download(name, *, revision, allow_patterns):
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in repository.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, snapshot / file.name)
        revisions.append(revision)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for _ in range(2):
        assert identify(resolve_model("org/repository"), "float32") == identify(repository, "float32")
    assert {file.name for file in snapshot.iterdir()} == {"config.json", "model.safetensors"}
    assert revisions == [None, "0" * 40, None]  # what is here already costs one question


def spec_at(path, adapter=None):
    return ReferenceSpec(path=str(path), adapter=adapter, identity=None)


def test_a_worker_fetches_what_the_driver_had_from_the_hub(hub, tmp_path):
    """The same repository and revision; a directory that is not a snapshot of the hub is not fetched."""
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
