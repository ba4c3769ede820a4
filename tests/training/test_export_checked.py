"""What was exported is loaded again and compared with the policy, and the files of the model travel with it."""

import json
import re
import shutil

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


def export(model, directory, adapter=None, dtype="float32", merge=False, tokenizer=None, **how):
    """Export the model, or model and adapter; returns the notes."""
    said = []
    policy = load_causal_lm(model, dtype, adapter=adapter and str(adapter), rope_length=None, train_adapter=True, **how)
    spec = PolicySpec(path=str(model), dtype=dtype, lora=None, adapter=adapter and str(adapter), **how)
    module.export_policy(
        OneProcess(policy), spec, str(model), tokenizer or make_tokenizer(), directory, merge=merge, note=said.append
    )
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
    with pytest.raises(TrainError, match=r"exported final/merged, loaded again, differ .*nats a token.*checkpoints are"):
        export(tied, tmp_path / "final", adapter, merge=True)


def test_a_model_whose_weights_were_not_written_is_refused(tiny_llama, tmp_path, monkeypatch):
    from transformers import PreTrainedModel

    whole = PreTrainedModel.save_pretrained

    def lose(self, directory, state_dict, **more):
        whole(self, directory, state_dict={name: each for name, each in state_dict.items() if "up_proj" not in name}, **more)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lose)
    with pytest.raises(TrainError, match=r"exported to final cannot be loaded again: .* lack .*up_proj"):
        export(tiny_llama, tmp_path / "final")


@pytest.fixture
def no_memory(monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda device: 1e5)


def test_without_the_memory_headers_are_compared(tiny_llama, tmp_path, no_memory):
    (line,) = export(tiny_llama, tmp_path / "final")
    assert line.startswith(
        "warning: final was not loaded again to compare its log-probs with the trained policy's: that takes"
    )
    assert "names and shapes in the headers of its files were compared with those of the model that its config.json" in line
    adapter = adapted(tiny_llama, tmp_path / "adapter", settings_of("head"))
    (line,) = export(tiny_llama, tmp_path / "adapted", adapter)
    assert "were compared with those of the model that PEFT makes of its adapter_config.json: none is missing" in line


FAULTS = {
    "lost": lambda tensors: {name: each for name, each in tensors.items() if "q_proj" not in name},
    "unknown": lambda tensors: (
        tensors | {f"module.{name}": each.clone() for name, each in tensors.items() if "q_proj" in name}
    ),
    "of another shape": lambda tensors: {
        name: each[:, :-1].contiguous() if "q_proj" in name else each for name, each in tensors.items()
    },
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_headers_show_faults_without_the_memory(kind, fault, tiny_llama, tmp_path, no_memory, monkeypatch):
    """What is written is damaged before it is checked."""
    add = module._add_companions

    def damage(spec, directory):
        add(spec, directory)
        file = directory / ("model.safetensors" if kind == "model" else "adapter_model.safetensors")
        save_file(FAULTS[fault](load_file(file)), file, metadata={"format": "pt"})

    monkeypatch.setattr(module, "_add_companions", damage)
    adapter = None if kind == "model" else adapted(tiny_llama, tmp_path / "adapter", settings_of("head"))
    if (kind, fault) == ("model", "unknown"):  # transformers takes it, other programs may not
        first, second, third = export(tiny_llama, tmp_path / "final")
        assert "it has 2 more (module.model.layers.0.self_attn.q_proj.weight, module.model.layers.1." in first
        assert "belong to no part of the model" in third or "belong to no part of the model" in second
        return
    with pytest.raises(TrainError, match=r"what was exported to final cannot be loaded again: .*q_proj"):
        export(tiny_llama, tmp_path / "final", adapter)


def test_other_tensors_than_those_of_the_model_are_told(tiny_llama, tmp_path):
    """The model's files have one more, and a norm of another shape."""
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {"model.rotary.inv_freq": torch.ones(2)}, model / "model.safetensors", metadata={"format": "pt"})
    first, second = export(model, tmp_path / "final")
    assert "it lacks 1 (model.rotary.inv_freq)" in first and second.startswith("final loaded again: ")


def test_merging_waits_for_memory(tied, tmp_path, no_memory):
    for kind, untie in (("head", True), ("embedding saved", True), ("tokens", False)):
        adapter = adapted(tied, tmp_path / kind, settings_of(kind))
        first, second = export(tied, tmp_path / f"final {kind}", adapter, merge=True)
        assert (
            first.startswith("warning: final was not loaded again") and not (tmp_path / f"final {kind}" / "merged").exists()
        )
        assert second.startswith(
            "warning: final/merged was not written: merging takes 0.0 GB of memory, and 0.0 GB are free; "
        )
        assert "AutoPeftModelForCausalLM" in second and ("copy the head's weight before" in second) is untie
        assert (tmp_path / f"final {kind}" / "adapter_model.safetensors").is_file()


def test_the_merged_model_of_a_quantized_one_is_compared_with_both(tiny_llama, tmp_path):
    from peft import LoraConfig

    adapter = adapted(tiny_llama, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    final, merged, apart = export(tiny_llama, tmp_path / "final", adapter, "bfloat16", merge=True, quantization="4bit")
    assert final.startswith("final loaded again: its log-probs differ from the trained policy's by ")
    stored = f"final/merged loaded again: its log-probs differ from those of the adapter on {tiny_llama} as it is stored by "
    assert merged.startswith(stored)
    told = re.fullmatch(
        r"final/merged: its log-probs differ by (\S+) nats a token on average, (\S+) at most from the trained policy's, "
        r"whose base was quantized to 4bit; that is the error of quantization, and is not refused",
        apart,
    )
    quantized, whole = (
        load_causal_lm(path, "bfloat16", rope_length=None, **more)
        for path, more in (
            (tiny_llama, {"adapter": str(adapter), "quantization": "4bit"}),
            (tmp_path / "final" / "merged", {}),
        )
    )
    group = module.probe_group(module._PROMPT + 2 * module._COMPLETION, LogpModel(whole).vocabulary)
    group = module.PromptGroup(
        group.prompt[-module._PROMPT :], tuple(one[: module._COMPLETION] for one in group.completions)
    )
    with torch.no_grad():
        a, b = (module.logps_by_definition(one, group, torch.device("cpu")) for one in (quantized, whole))
    assert abs(a - b).mean() == pytest.approx(float(told[1]), rel=0.2) and float(told[1]) > 0


@pytest.fixture(scope="module")
def picture_model(tmp_path_factory):
    """A tiny model of text and pictures, with the files of its processor."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedTokenizerFast

    directory, plain = tmp_path_factory.mktemp("models") / "pictures", make_tokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        **{f"{name}_token": getattr(plain, f"{name}_token") for name in ("bos", "eos", "pad")},
        extra_special_tokens={"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"},
        chat_template=plain.chat_template,
    )
    text = dict(
        vocab_size=len(tokenizer) + 8, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    names = dict(image_token_index="<image>", boi_token_index="<boi>", eoi_token_index="<eoi>")
    places = {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}
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
    from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    adapter = adapted(picture_model, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    tokenizer = AutoTokenizer.from_pretrained(picture_model)
    export(picture_model, tmp_path / "whole", tokenizer=tokenizer)
    export(picture_model, tmp_path / "final", adapter, merge=True, tokenizer=tokenizer)
    for directory in (tmp_path / "whole", tmp_path / "final", tmp_path / "final" / "merged"):
        processor = AutoProcessor.from_pretrained(directory)
        assert type(processor).__name__ == "Gemma3Processor" and processor.image_processor.image_seq_length == 4
        assert (directory / "processor_config.json").read_text() == (picture_model / "processor_config.json").read_text()
        assert (directory / "chat_template.jinja").is_file() and not (directory / "chat_template.json").exists()
    source = load_file(picture_model / "model.safetensors").keys()
    for directory in (tmp_path / "whole", tmp_path / "final" / "merged"):
        AutoModelForImageTextToText.from_pretrained(directory)
        assert load_file(directory / "model.safetensors").keys() == source
        assert (directory / "generation_config.json").is_file()


OWN_CODE = {
    "configuration_own.py": """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
""",
    "scale_own.py": "SCALE = 1.5\n",
    "late_own.py": "# imported by name while the model runs\n",
    "modeling_own.py": """
from transformers import LlamaForCausalLM, LlamaModel

from .configuration_own import OwnConfig
from .scale_own import SCALE

class OwnModel(LlamaModel):
    config_class = OwnConfig

    def forward(self, *arguments, **more):
        output = super().forward(*arguments, **more)
        output.last_hidden_state = output.last_hidden_state * SCALE
        return output

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.post_init()
""",
}


@pytest.fixture
def own_code(tiny_llama, tmp_path):
    """A model with code of its own, one file of which only the code imports."""
    model = shutil.copytree(tiny_llama, tmp_path / "own")
    for name, text in OWN_CODE.items():
        (model / name).write_text(text)
    config = json.loads((model / "config.json").read_text())
    names = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    own = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": names}
    (model / "config.json").write_text(json.dumps(config | own))
    return model


def test_a_model_with_code_of_its_own(own_code, tmp_path):
    """Code travels with the weights; without it neither directory would load."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def load(directory):
        return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)

    made = get_peft_model(load(own_code), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * parameter.requires_grad * torch.randn_like(parameter))
    made.save_pretrained(tmp_path / "adapter")
    (line,) = export(own_code, tmp_path / "whole", trust_remote_code=True)
    assert line.startswith("final loaded again: ")
    final, merged = export(own_code, tmp_path / "final", tmp_path / "adapter", merge=True, trust_remote_code=True)
    assert final.startswith("final loaded again: ") and merged.startswith("final/merged loaded again: ")
    shutil.rmtree(own_code)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        wanted = made(input_ids=ids).logits
        for directory in (tmp_path / "whole", tmp_path / "final" / "merged"):
            for name, text in OWN_CODE.items():
                assert (directory / name).read_text() == text
            loaded = load(directory)
            assert type(loaded).__name__ == "OwnForCausalLM" and AutoTokenizer.from_pretrained(directory).eos_token
        assert torch.allclose(loaded(input_ids=ids).logits, wanted, atol=1e-4)
    assert not list((tmp_path / "final").glob("*.py"))  # the adapter names its base model


def test_what_was_not_checked_is_told(tiny_llama, tmp_path, no_memory, monkeypatch):
    monkeypatch.setattr(module, "compare_headers", lambda *arguments, **more: None)
    (line,) = export(tiny_llama, tmp_path / "final")
    assert line.endswith("; its files were not checked, since this model cannot be made without its weights")
