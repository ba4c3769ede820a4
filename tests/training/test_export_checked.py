"""What was exported is loaded again and compared with the policy, and the files of the model travel with it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model, make_tokenizer

from raydpo.errors import TrainError
from raydpo.model.load import load_causal_lm
from raydpo.model.logps import LogpModel
from raydpo.training.policy import export as module
from raydpo.training.policy.engine import PolicySpec


class OneProcess:
    """An engine without DeepSpeed, whose policy is trained already."""

    rank, device = 0, torch.device("cpu")

    def __init__(self, policy):
        self.module = LogpModel(policy)

    def evaluating(self):
        return torch.no_grad()

    def gather(self):
        policy = self.module.policy
        adapts = hasattr(policy, "peft_config")
        named = policy.named_parameters(remove_duplicate=not adapts)
        return {
            name: value.detach().clone()
            for name, value in named
            if not adapts or value.requires_grad or "default" in name.split(".")
        }

    def load_whole_models(self):
        pass


def export(model, directory, adapter=None, dtype="float32", merge=False):
    """Export the model, or model and adapter; returns the notes."""
    said = []
    policy = load_causal_lm(model, dtype, adapter=adapter and str(adapter), rope_length=None, train_adapter=True)
    spec = PolicySpec(path=str(model), dtype=dtype, lora=None, adapter=adapter and str(adapter))
    module.export_policy(OneProcess(policy), spec, str(model), make_tokenizer(), directory, merge=merge, note=said.append)
    return said


def adapted(model, directory, settings):
    """An adapter that has learnt something."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    made = get_peft_model(AutoModelForCausalLM.from_pretrained(model), settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    made.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tied", tie_word_embeddings=True)


def settings_of(kind):
    from peft import LoraConfig

    common = dict(r=4, task_type="CAUSAL_LM")
    return {
        "head": LoraConfig(**common, target_modules=["lm_head", "q_proj"]),
        "embedding": LoraConfig(**common, target_modules=["embed_tokens"]),
        "both": LoraConfig(**common, target_modules=["embed_tokens", "lm_head"]),
        "head saved": LoraConfig(**common, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        "embedding saved": LoraConfig(**common, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        "tokens": LoraConfig(**common, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 6]}),
    }[kind]


@pytest.mark.parametrize("kind", ["head", "embedding", "both", "head saved", "embedding saved", "tokens"])
def test_merging_into_a_tied_model(kind, tied, tmp_path):
    """Exports that differ from the policy would be refused."""
    adapter = adapted(tied, tmp_path / "adapter", settings_of(kind))
    final, merged = export(tied, tmp_path / "final", adapter, merge=True)
    assert final.startswith("final loaded again: ") and merged.startswith("final/merged loaded again: ")
    config = json.loads((tmp_path / "final" / "merged" / "config.json").read_text())
    names = load_file(tmp_path / "final" / "merged" / "model.safetensors").keys()
    assert config["tie_word_embeddings"] == ("lm_head.weight" not in names) == (kind == "tokens")


@pytest.mark.parametrize("kind", ["embedding", "embedding saved"])
def test_a_merged_model_that_is_another_one_is_refused(kind, tied, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_untie", lambda causal_lm: None)
    monkeypatch.setattr(module, "_say_untied", lambda causal_lm: None)
    save = module._restore_dropout

    def tie_again(spec, directory):
        save(spec, directory)
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
        tensors = load_file(directory / "model.safetensors")
        tensors.pop("lm_head.weight", None)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(module, "_restore_dropout", tie_again)
    adapter = adapted(tied, tmp_path / "adapter", settings_of(kind))
    with pytest.raises(TrainError, match=r"exported final/merged, loaded again, differs .*nats a token.*checkpoints are"):
        export(tied, tmp_path / "final", adapter, merge=True)


def test_a_model_whose_weights_were_not_written_is_refused(tiny_llama, tmp_path, monkeypatch):
    from transformers import PreTrainedModel

    whole = PreTrainedModel.save_pretrained

    def lose(self, directory, state_dict, **more):
        whole(self, directory, state_dict={name: each for name, each in state_dict.items() if "up_proj" not in name}, **more)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lose)
    with pytest.raises(TrainError, match=r"exported to final cannot be loaded again: .* lack .*up_proj"):
        export(tiny_llama, tmp_path / "final")


def test_without_the_memory_that_is_said(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda device: 1e5)
    (line,) = export(tiny_llama, tmp_path / "final")
    assert line.startswith("warning: final was not loaded again") and "names and shapes" in line


@pytest.fixture(scope="module")
def picture_model(tmp_path_factory):
    """A tiny model of text and pictures, with the files of its processor."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    directory = tmp_path_factory.mktemp("models") / "pictures"
    tokenizer = make_tokenizer()
    text = dict(
        vocab_size=len(tokenizer) + 8, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    places = dict(image_token_index=len(tokenizer), boi_token_index=len(tokenizer) + 1, eoi_token_index=len(tokenizer) + 2)
    Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **places)
    ).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    pictures = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 28, "width": 28}, "image_seq_length": 4}
    (directory / "preprocessor_config.json").write_text(json.dumps(pictures))
    (directory / "processor_config.json").write_text(json.dumps({"processor_class": "Gemma3Processor"}))
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": "of the source"}))
    return directory


def test_a_model_of_pictures_keeps_its_processor(picture_model, tmp_path):
    from peft import LoraConfig
    from transformers import AutoImageProcessor, AutoModelForImageTextToText

    adapter = adapted(picture_model, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    export(picture_model, tmp_path / "whole")
    export(picture_model, tmp_path / "final", adapter, merge=True)
    for directory in (tmp_path / "whole", tmp_path / "final", tmp_path / "final" / "merged"):
        assert AutoImageProcessor.from_pretrained(directory).image_seq_length == 4
        assert (directory / "processor_config.json").read_text() == (picture_model / "processor_config.json").read_text()
        assert (directory / "chat_template.jinja").is_file() and not (directory / "chat_template.json").exists()
    source = load_file(picture_model / "model.safetensors").keys()
    for directory in (tmp_path / "whole", tmp_path / "final" / "merged"):
        AutoModelForImageTextToText.from_pretrained(directory)
        assert load_file(directory / "model.safetensors").keys() == source
        assert (directory / "generation_config.json").is_file()
