"""Under ZeRO-3 each rank reads its own part of every weight, and all ranks together have the model as it is loaded whole."""

import json
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, HYBRIDS, LONGEST, MORE_MIXTURES, make_directories, make_random
from distributed import run_distributed
from packages import FAMILIES, make_package
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from raydpo.errors import ModelError
from raydpo.model import sliced
from raydpo.model.load import load_causal_lm
from raydpo.model.rotary import rope_length

VOCABULARY = 97
ZERO3 = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


def load(directory, dtype, **settings):
    config = json.loads(Path(directory, "config.json").read_text())
    return load_causal_lm(str(directory), dtype, rope_length=rope_length(config, LONGEST), **settings)


def differences(cases):
    """For each (directory, dtype, settings): what differs from the model loaded whole, and what was noted."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    from raydpo.model.partition import join_process_group

    join_process_group(torch.device("cpu"))
    return [different(deepspeed, HfDeepSpeedConfig, *case) for case in cases]


def different(deepspeed, held, directory, dtype, settings):
    whole, notes, told = load(directory, dtype, **settings), [], []
    partitioned = held(ZERO3 | {"bf16": {"enabled": dtype == "bfloat16"}})
    model = load(directory, dtype, **settings, note=notes.append, progress=lambda *counts: told.append(counts))
    del partitioned
    names = {kind: dict(getattr(whole, kind)()) for kind in ("named_parameters", "named_buffers")}
    found = []
    for name, parameter in model.named_parameters():
        expected, part = names["named_parameters"].pop(name), getattr(parameter, "ds_tensor", None)
        if part is not None and part.numel() > -(-expected.numel() // torch.distributed.get_world_size()):
            found.append(f"{name}: holds {part.numel()} of {expected.numel()}")
        with deepspeed.zero.GatheredParameters([parameter]):
            same = parameter.dtype == expected.dtype and torch.equal(parameter, expected)
        same = same and parameter.requires_grad == expected.requires_grad and ("lora" in name or part is not None)
        found += [] if same else [f"{name}: {parameter.dtype} {parameter}, expected {expected.dtype} {expected}"]
    for name, buffer in model.named_buffers():
        expected = names["named_buffers"].pop(name)
        same = buffer.dtype == expected.dtype and torch.equal(buffer, expected) and not buffer.is_meta
        found += [] if same else [f"{name}: {buffer.dtype} {buffer}, expected {expected.dtype} {expected}"]
    left = [name for each in names.values() for name in each]
    if told and (told[-1][0] != told[-1][1] or told != sorted(told)):
        found.append(f"progress {told[-3:]}")
    return f"{Path(directory).name} {dtype}", [line[:300] for line in [*found, *left]], notes


def check(found):
    for rank in found:
        assert {case: lines for case, lines, _ in rank if lines} == {}
        assert {case: notes for case, _, notes in rank if notes} == {}


SEVERAL = ("llama", "llama-tied", "gemma2", "gpt2", "mixtral", "ernie4_5_moe", "gpt_oss", "qwen3_next", "phi3-longrope")
ALL = (*ARCHITECTURES, *MORE_MIXTURES, *HYBRIDS)


@pytest.mark.parametrize(
    ("names", "families"),
    [(SEVERAL, ("gemma3", "qwen3_vl_moe")), pytest.param(ALL, tuple(FAMILIES), marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_architectures_have_the_same_bits(names, families, tmp_path):
    """Tied weights, experts stored one by one, fused and renamed weights; float32 files in either precision; weights that
    stay in float32 when the others are rounded (``ernie4_5_moe``); vision-language packages."""
    directories = make_directories(names, tmp_path / "models", VOCABULARY)
    directories |= {family: make_package(tmp_path / "models" / family, family) for family in families}
    cases = [(one, dtype, {}) for one in directories.values() for dtype in ("float32", "bfloat16")]
    check(run_distributed(differences, 2, tmp_path / "ranks", cases))


CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
class Ours(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.ones(3, dtype=torch.float32))
        self.register_buffer("kept", torch.zeros(5))
        self.register_buffer("made", torch.arange(5.0), persistent=False)
    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self:
            module.made.copy_(torch.arange(5.0))
"""


def test_other_files_have_the_same_bits(tmp_path):
    """Rank boundaries within an expert, bfloat16 files, an index, an adapter, a model's own code."""
    moe = make_random("qwen3_moe", VOCABULARY, num_experts=5, num_local_experts=5, moe_intermediate_size=24)
    moe.save_pretrained(tmp_path / "odd-moe")
    assert any("experts.4.up_proj" in name for name in load_file(tmp_path / "odd-moe" / "model.safetensors"))
    llama = make_random("llama-tied", VOCABULARY)
    llama.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    moe.to(torch.bfloat16).save_pretrained(tmp_path / "sharded-moe-bf16", max_shard_size="20KB")
    policy = get_peft_model(llama, LoraConfig(r=2, target_modules="all-linear"))
    policy.save_pretrained(tmp_path / "adapter")
    remote = make_random("llama", VOCABULARY)
    remote.save_pretrained(tmp_path / "remote")
    config = json.loads((tmp_path / "remote" / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_ours.Ours"}
    (tmp_path / "remote" / "config.json").write_text(json.dumps(config))
    (tmp_path / "remote" / "modeling_ours.py").write_text(CODE)
    change(tmp_path / "remote", lambda tensors: tensors | {"scale": torch.rand(3), "kept": torch.rand(5)})
    cases = [
        *((tmp_path / name, dtype, {}) for name in ("odd-moe", "sharded-moe-bf16") for dtype in ("float32", "bfloat16")),
        (tmp_path / "sharded", "bfloat16", {}),
        (tmp_path / "sharded", "float32", {"adapter": str(tmp_path / "adapter")}),
        (tmp_path / "sharded", "bfloat16", {"adapter": str(tmp_path / "adapter"), "train_adapter": True}),
        *((tmp_path / "remote", dtype, {"trust_remote_code": True}) for dtype in ("float32", "bfloat16")),
    ]
    check(run_distributed(differences, 3, tmp_path / "ranks", cases))


def change(directory, tensors_of, file="model.safetensors"):
    save_file(tensors_of(load_file(directory / file)), directory / file, metadata={"format": "pt"})


def converted(cases):
    """As ``differences``, for llama files with fused, transposed and interleaved weights, and experts stored transposed."""
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import Chunk, Interleave, Transpose, WeightConverter

    targets = [f"self_attn.{name}_proj.weight" for name in "qko"]
    fused = WeightConverter("self_attn.fused.weight", targets, [Chunk(dim=0)])
    turned = WeightConverter("mlp.turned.weight", "mlp.up_proj.weight", [Transpose(0, 1)])
    woven = WeightConverter("mlp.woven.weight", "mlp.gate_proj.weight", [Interleave(dim=0)])
    register_checkpoint_conversion_mapping("llama", [fused, turned, woven], overwrite=True)
    experts = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    turned = [WeightConverter(name, name, [Transpose(1, 2, check_dims=True)]) for name in experts]
    register_checkpoint_conversion_mapping("qwen3_moe", turned, overwrite=True)
    return differences(cases)


def test_conversions_of_whole_tensors_and_of_rows(tmp_path):
    make_random("llama", VOCABULARY, num_key_value_heads=4).save_pretrained(tmp_path / "fused")
    moe = make_random("qwen3_moe", VOCABULARY, num_experts=5, num_local_experts=5, moe_intermediate_size=24)
    moe.save_pretrained(tmp_path / "turned", save_original_format=False)
    moe.save_pretrained(tmp_path / "straight", save_original_format=False)

    def fuse(tensors):
        for layer in (f"model.layers.{number}" for number in range(2)):
            parts = [tensors.pop(f"{layer}.self_attn.{name}_proj.weight") for name in "qko"]
            tensors[f"{layer}.self_attn.fused.weight"] = torch.cat(parts)
            tensors[f"{layer}.mlp.woven.weight"] = tensors.pop(f"{layer}.mlp.gate_proj.weight")
            tensors[f"{layer}.mlp.turned.weight"] = tensors.pop(f"{layer}.mlp.up_proj.weight").t().contiguous()
        return tensors

    def turn(tensors):
        return {name: each.transpose(1, 2).contiguous() if ".experts." in name else each for name, each in tensors.items()}

    change(tmp_path / "fused", fuse)
    change(tmp_path / "turned", turn)
    assert load_file(tmp_path / "turned" / "model.safetensors")["model.layers.0.mlp.experts.down_proj"].shape == (5, 24, 32)
    cases = [(tmp_path / name, dtype, {}) for name in ("fused", "turned", "straight") for dtype in ("float32", "bfloat16")]
    check(run_distributed(converted, 2, tmp_path / "ranks", cases))


def refusals(cases):
    """The message with which each directory is refused without ZeRO-3, and under it."""
    from transformers.integrations import HfDeepSpeedConfig

    from raydpo.model.partition import join_process_group

    def refusal(directory):
        with pytest.raises(ModelError) as refused:
            load(directory, "float32")
        return str(refused.value)

    join_process_group(torch.device("cpu"))
    whole = [refusal(case) for case in cases]
    held = HfDeepSpeedConfig(ZERO3)
    partitioned = [refusal(case) for case in cases]
    del held
    return whole, partitioned


def test_refusals_are_the_same_on_every_rank(tmp_path):
    """Missing weights, weights of another shape, an adapter that was not merged."""
    llama, names = make_random("llama", VOCABULARY), ("lacking", "headless", "wide", "unmerged")
    for name in names:
        llama.save_pretrained(tmp_path / name)
    change(tmp_path / "lacking", lambda tensors: {name: one for name, one in tensors.items() if ".1.mlp.up" not in name})
    change(tmp_path / "headless", lambda tensors: {name: one for name, one in tensors.items() if "lm_head" not in name})
    change(tmp_path / "wide", lambda tensors: tensors | {"model.norm.weight": torch.ones(33)})
    lora = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    change(tmp_path / "unmerged", lambda tensors: tensors | {lora: torch.ones(2, 32)})
    for whole, partitioned in run_distributed(refusals, 2, tmp_path / "ranks", [tmp_path / name for name in names]):
        assert partitioned == whole
        for told, message in zip((".1.mlp.up", "lm_head", "33", "not merged"), partitioned, strict=True):
            assert told in message


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    save_file({"a": torch.rand(64)}, tmp_path / "a.safetensors")
    stored = sliced._stored([str(tmp_path / "a.safetensors")])["a"]
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-100])
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ModelError, match=r"a\.safetensors was cut short while it was read: it lacks 100 bytes"):
            stored.read(0, torch.empty(64, dtype=dtype))


def test_what_cannot_be_read_in_parts_is_read_by_the_first_rank(tmp_path):
    """With the same bits, and one line that says why."""
    make_random("qwen3_moe", VOCABULARY).save_pretrained(tmp_path / "model")
    line = "the first process reads all weights and sends them to the others: "
    for rank, found in enumerate(run_distributed(unsuited, 2, tmp_path / "ranks", tmp_path / "model")):
        assert [lines for _, lines, _ in found] == [[], []]
        (on_all,), (on_one,) = (notes for _, _, notes in found)
        assert on_all == line + "a name is unclear"
        assert on_one.startswith(line) and on_one.endswith("(KeyError)" if rank else "another cannot read its part")


def unsuited(directory):
    """All ranks cannot; then one rank alone cannot."""
    right = sliced._origins

    def on_all(*args):
        raise sliced._UnsuitedError("a name is unclear")

    def on_one(*args):
        if torch.distributed.get_rank() == 1:
            raise KeyError("of rank 1 alone")
        return right(*args)

    found = []
    for fault in (on_all, on_one):
        sliced._origins = fault
        found += differences([(directory, "bfloat16", {})])
    return found
