"""Models whose files lack weights of the architecture are refused, before and while they are loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, LONGEST, make_random
from distributed import run_distributed
from safetensors.torch import load_file, save_file

from raydpo.errors import ModelError
from raydpo.model.load import load_causal_lm
from raydpo.model.rotary import rope_length
from raydpo.model.weights import check_weights

VOCABULARY = 96


def load(directory, dtype="float32", **settings):
    config = json.loads(Path(directory, "config.json").read_text())
    return load_causal_lm(directory, dtype, rope_length=rope_length(config, LONGEST), **settings)


def save(model, directory):
    model.save_pretrained(directory)
    return directory


def with_tensors(directory, change, file="model.safetensors"):
    """The directory after its tensors were replaced by ``change(tensors)``."""
    save_file(change(load_file(directory / file)), directory / file, metadata={"format": "pt"})
    return directory


def without(part):
    return lambda tensors: {name: value for name, value in tensors.items() if part not in name}


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): value.clone() for name, value in tensors.items()}


def refused_by_both(told, directory, **settings):
    """Check that it is refused by its headers, and when it is loaded."""
    with pytest.raises(ModelError, match=told):
        check_weights(directory, **settings)
    with pytest.raises(ModelError, match=told):
        load(directory, **settings)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_whole_as_it_is_saved(name, tmp_path):
    """Tied weights, experts stored one by one, and renamed weights are not taken for missing ones."""
    directory = save(make_random(name, VOCABULARY), tmp_path / "model")
    assert check_weights(directory) == []
    load(directory)
    with_tensors(directory, lambda tensors: without("ln_f")(without("norm")(tensors)))
    refused_by_both(r"lack .*, which would be random numbers", directory)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save(make_random("llama", VOCABULARY), tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def model(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "model")


def test_a_layer_that_is_missing(model):
    with_tensors(model, without(".layers.1."))
    refused_by_both(r"lack model\.layers\.1\.input_layernorm\.weight, .* and 6 more, .*fetch or save", model)


def test_names_that_another_tool_prefixed(model):
    """Its output would be that of a random model, whatever the weights are."""
    with_tensors(model, lambda tensors: {f"module.{name}": value for name, value in tensors.items()})
    refused_by_both(r"lack lm_head\.weight.*they hold module\.lm_head\.weight.*under other names", model)


def test_weights_of_another_shape(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    refused_by_both(
        r"another shape .*down_proj\.weight is \[32, 64\] in its files and \[32, 48\] in the model and 5 more", model
    )


def test_an_expert_that_is_missing(tmp_path):
    """One weight is missing among experts that are stored one by one and computed as one tensor."""
    directory = save(make_random("mixtral", VOCABULARY), tmp_path / "model")
    assert any(".experts.3." in name for name in load_file(directory / "model.safetensors"))
    with_tensors(directory, without(".layers.1.block_sparse_moe.experts.3."))
    refused_by_both(r"mlp\.experts\.\w+ is \[3, .*\] in its files and \[4, ", directory)


def test_a_head_of_another_task(model, tmp_path):
    """A classifier has no vocabulary head, and a language model has no score head."""
    from transformers import AutoModelForSequenceClassification

    classifier = save(
        AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, pad_token_id=0), tmp_path / "classifier"
    )
    assert check_weights(classifier, classifier=True) == []
    with pytest.raises(ModelError, match=r"lack score\.weight"):
        check_weights(model, classifier=True)
    refused_by_both(r"is a LlamaForSequenceClassification .*head of another task", classifier)
    config = json.loads((classifier / "config.json").read_text())
    (classifier / "config.json").write_text(json.dumps(config | {"architectures": None}))
    refused_by_both(r"lack lm_head\.weight.*they hold score\.weight", classifier)


def configured(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    return directory


def test_a_classifier_with_tied_embeddings(model):
    """As a language model it lacks nothing, since its head would be the embedding."""
    configured(model, tie_word_embeddings=True, architectures=["LlamaForSequenceClassification"])
    with_tensors(model, lambda tensors: without("lm_head")(tensors) | {"score.weight": torch.ones(1, 32)})
    refused_by_both(r"is a LlamaForSequenceClassification .*head of another task", model)


@pytest.mark.parametrize("layers", [1, 0, -2])
def test_layers_that_config_json_leaves_out(layers, model):
    configured(model, num_hidden_layers=layers)
    with pytest.raises(ModelError, match=rf"describes a model of {layers} layers .*num_hidden_layers"):
        check_weights(model)


def test_integers_without_a_quantization(model):
    with_tensors(
        model,
        lambda tensors: {name: (100 * value).to(torch.int8) if "proj" in name else value for name, value in tensors.items()},
    )
    with pytest.raises(ModelError, match=r"down_proj\.weight, .* in its files are integers \(I8\).*no quantization_config"):
        check_weights(model)


NO_LANGUAGE_MODEL = {
    "unknown": ({"model_type": "llama99"}, "model type `llama99`"),
    "of pictures": ({"model_type": "vit"}, r"\(it describes a ViT model\)"),
    "encoder and decoder": ({"model_type": "t5", "d_model": 8, "num_layers": 1}, "is an encoder-decoder model"),
    "a word for a number": ({"hidden_size": "many"}, "hidden_size"),
}


@pytest.mark.parametrize("kind", NO_LANGUAGE_MODEL)
def test_a_configuration_of_no_language_model(kind, model):
    changes, told = NO_LANGUAGE_MODEL[kind]
    with pytest.raises(ModelError, match=told) as caught:
        check_weights(configured(model, **changes))
    assert len(str(caught.value)) < 1000


def test_tensors_that_nothing_takes_are_told_and_not_refused(model):
    with_tensors(model, lambda tensors: tensors | {"v_head.summary.weight": torch.ones(1, 32)})
    (line,) = check_weights(model)
    assert "v_head.summary.weight in its files belong to no part of the model" in line
    load(model)


def test_an_adapter_that_was_left_in_the_files(model):
    """As save_pretrained of a PEFT model's inner model writes it; without base_layer no weight is missing."""
    name = "model.layers.0.self_attn.q_proj"
    parts = {f"{name}.lora_A.default.weight": torch.ones(4, 32), f"{name}.lora_B.default.weight": torch.ones(32, 4)}
    with_tensors(model, lambda tensors: tensors | parts)
    told = r"an adapter that was not merged.*q_proj\.lora_A\.default\.weight, .*merge_and_unload"
    refused_by_both(told, model)
    with_tensors(model, renamed(f"{name}.weight", f"{name}.base_layer.weight"))
    refused_by_both(told, model)


UNUSED = {
    "bias of another architecture": ("llama", "model.layers.1.self_attn.q_proj.bias", torch.ones(32)),
    "norm of another architecture": ("llama", "model.layers.0.self_attn.q_norm.weight", torch.ones(8)),
    "scale of a weight": ("llama", "model.layers.0.mlp.up_proj.weight_scale", torch.ones(1)),
    "bias of the head": ("llama", "lm_head.bias", torch.ones(VOCABULARY)),
    "without the prefix": ("gpt2", "h.0.mlp.gate.weight", torch.ones(4, 4)),
}


@pytest.mark.parametrize("kind", UNUSED)
def test_weights_in_layers_that_do_not_use_them(kind, tmp_path):
    name, tensor, value = UNUSED[kind]
    directory = save(make_random(name, VOCABULARY), tmp_path / "model")
    if kind == "without the prefix":
        with_tensors(directory, renamed("transformer.", ""))
    with_tensors(directory, lambda tensors: tensors | {tensor: value})
    with pytest.raises(ModelError, match=rf"{tensor} in its files would not be used, .*config\.json that belongs"):
        check_weights(directory)


HARMLESS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    "model.layers.0.attn.masked_bias": torch.tensor(-1e4),
    "model.layers.0.self_attn.k_scale": torch.ones(1),
    "model.layers.1.mlp.up_proj.bias": torch.zeros(64),
    "model.embed_tokens.position_ids": torch.arange(8),
    "mtp.layers.0.mlp.up_proj.weight": torch.ones(4, 4),
    "vision_tower.encoder.layers.0.self_attn.q_proj.bias": torch.ones(4),
    "score.weight": torch.ones(1, 32),
}


@pytest.mark.parametrize("tensor", HARMLESS)
def test_tensors_that_no_output_depends_on(tensor, model):
    """Tables that are computed anew, zeros, and parts that are not computed are at most told."""
    with_tensors(model, lambda tensors: tensors | {tensor: HARMLESS[tensor]})
    assert all("are not used" in line for line in check_weights(model))


@pytest.mark.parametrize("dtype", ["F8_E8M0", "U16", "U32"])
def test_a_tensor_of_an_unusual_dtype_does_not_end_the_comparison(dtype, model):
    kind = {"F8_E8M0": torch.float8_e8m0fnu, "U16": torch.uint16, "U32": torch.uint32}[dtype]
    odd = torch.ones(4, dtype=torch.uint8).view(kind) if dtype == "F8_E8M0" else torch.ones(4, dtype=kind)
    with_tensors(model, lambda tensors: without(".layers.1.")(tensors) | {"odd": odd})
    with pytest.raises(ModelError, match=r"lack model\.layers\.1\.input_layernorm\.weight"):
        check_weights(model)


def test_complex_numbers(model):
    """transformers would drop the imaginary parts."""
    name = "model.layers.0.mlp.up_proj.weight"
    with_tensors(model, lambda tensors: tensors | {name: tensors[name].to(torch.complex64)})
    with pytest.raises(ModelError, match=r"up_proj\.weight in its files are complex numbers \(C64\)"):
        check_weights(model)


def test_a_tied_head_that_config_json_does_not_tie(tmp_path):
    directory = save(make_random("llama-tied", VOCABULARY), tmp_path / "model")
    refused_by_both(
        r"lack lm_head\.weight.* set tie_word_embeddings to true", configured(directory, tie_word_embeddings=False)
    )


def test_a_vision_language_model(tmp_path):
    """Its weights are saved under other names than in the model, and only its text part is computed."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    directory = save(
        Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config=text,
                vision_config=vision,
                mm_tokens_per_image=4,
                image_token_index=80,
                boi_token_index=81,
                eoi_token_index=82,
            )
        ),
        tmp_path / "model",
    )
    assert check_weights(directory) == []
    load(directory)
    with_tensors(directory, without("mlp.up_proj"))
    refused_by_both(r"lack .*mlp\.up_proj\.weight", directory)


def adapted(model, directory, settings=None):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = settings or LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), settings).save_pretrained(directory)
    return directory


def adapter_settings():
    from peft import LoHaConfig, LoraConfig, VBLoRAConfig

    lora = dict(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return {
        "lora": LoraConfig(**lora),
        "dora": LoraConfig(**lora, use_dora=True),
        "head": LoraConfig(**lora, modules_to_save=["lm_head"]),
        "tokens": LoraConfig(**lora, trainable_token_indices={"embed_tokens": [5, 6]}),
        "embedding": LoraConfig(**lora | {"target_modules": ["embed_tokens", "lm_head"]}),
        "loha": LoHaConfig(**lora),
        "bank": VBLoRAConfig(**lora | {"r": 2}, num_vectors=16, vector_length=8),
    }


@pytest.mark.parametrize("kind", ["lora", "dora", "head", "tokens", "embedding", "loha", "bank"])
def test_adapters_are_whole_as_they_are_saved(kind, llama, tmp_path, monkeypatch):
    """An adapter's file is read once, and the model is the same as PEFT's own loading makes it."""
    from peft import PeftModel, peft_model
    from transformers import AutoModelForCausalLM

    adapter = str(adapted(llama, tmp_path / "adapter", adapter_settings()[kind]))
    assert check_weights(llama, adapter=adapter) == []
    reads, read = [], peft_model.load_peft_weights
    monkeypatch.setattr(peft_model, "load_peft_weights", lambda *args, **more: reads.append(args) or read(*args, **more))
    ours = load(llama, adapter=adapter)
    assert len(reads) == 1
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), adapter)
    assert type(ours) is type(theirs) and ours.peft_config == theirs.peft_config
    state, expected = ours.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


ADAPTER_FAULTS = {
    "missing": (without("layers.1.self_attn.v_proj"), r"lack .*layers\.1\.self_attn\.v_proj.*random numbers"),
    "of a larger model": (
        lambda tensors: tensors | renamed("layers.1.", "layers.7.")(tensors),
        r"hold .*layers\.7\..*which no part of the model takes",
    ),
    "renamed": (renamed("base_model.model.model.", "base_model.model.module.model."), "lack .* and they hold .*module"),
    "another rank": (
        lambda tensors: {name: value[:2] if "lora_A" in name else value for name, value in tensors.items()},
        r"lora_A\.default\.weight is \[2, 32\] in its files and \[4, 32\] in the model",
    ),
}


@pytest.mark.parametrize("fault", ADAPTER_FAULTS)
def test_adapters_of_another_model(fault, llama, tmp_path):
    change, told = ADAPTER_FAULTS[fault]
    adapter = with_tensors(adapted(llama, tmp_path / "adapter"), change, "adapter_model.safetensors")
    refused_by_both(told, llama, adapter=str(adapter))


@pytest.mark.parametrize("changes", [{"r": "x"}, {"target_modules": ["no_such_layer"]}])
def test_an_adapter_that_peft_cannot_add(changes, llama, tmp_path):
    adapter = adapted(llama, tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ModelError, match=r"the adapter .* does not fit the model"):
        check_weights(llama, adapter=str(adapter))


def test_a_prompt_that_is_learnt_is_no_layer(llama, tmp_path):
    """PEFT adds it before the embeddings, where the log-probs would not include it."""
    from peft import PromptTuningConfig

    adapter = adapted(llama, tmp_path / "adapter", PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    refused_by_both("kind PROMPT_TUNING.*would be left out of the log-probs", llama, adapter=str(adapter))


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantized_while_it_is_loaded(quantization, model):
    load(model, "bfloat16", quantization=quantization)
    with_tensors(model, without(".layers.1.mlp."))
    with pytest.raises(ModelError, match=r"lack model\.layers\.1\.mlp\.down_proj\.weight"):
        load(model, "bfloat16", quantization=quantization)


def in_shares(directories):
    """Result of loading each directory under ZeRO-3: ``whole`` or the error."""
    from transformers.integrations import HfDeepSpeedConfig

    from raydpo.model.partition import join_process_group

    join_process_group(torch.device("cpu"))
    partitioned = HfDeepSpeedConfig(
        {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}
    )
    said = []
    for directory in directories:
        try:
            load(directory, "bfloat16")
            said.append("whole")
        except ModelError as error:
            said.append(str(error))
    del partitioned
    return said


def test_under_zero_3(tmp_path):
    kinds = ("llama", "llama-tied", "mixtral")
    whole = [save(make_random(name, VOCABULARY), tmp_path / name) for name in kinds]
    lacking = with_tensors(shutil.copytree(whole[0], tmp_path / "lacking"), without(".layers.1.mlp."))
    for said in run_distributed(in_shares, 2, tmp_path / "run", [*whole, lacking]):
        assert said[:-1] == ["whole"] * len(kinds)
        assert "lack model.layers.1.mlp.down_proj.weight" in said[-1]
