"""What a training leaves loads in transformers and PEFT, and computes what the policy computed."""

import json

import numpy as np
import pytest
import torch
from distributed import run_distributed
from kernel import tiny_pairs, train_here, with_reference
from safetensors.torch import load_file
from tiny import make_tokenizer

from raydpo.model.layout import PromptGroup

LORA = {"r": 4, "alpha": 8}
PROMPT, COMPLETION = np.arange(5, 15, dtype=np.int32), np.arange(15, 25, dtype=np.int32)


def exported(model, scratch, directory, lora, zero):
    from raydpo.config import LoraSettings
    from raydpo.training.engine import PolicySpec
    from raydpo.training.export import export_policy

    run = train_here(with_reference(tiny_pairs(17), model), model, scratch, steps=3, lora=lora, zero=zero)
    spec = PolicySpec(path=str(model), dtype="float32", lora=None if lora is None else LoraSettings(**lora))
    export_policy(run.engine, spec, str(model), make_tokenizer(), directory, merge=True)
    with run.engine.evaluating():
        return run.engine.logps(run.engine.lay_out([PromptGroup(PROMPT, [COMPLETION])]))


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_the_export_is_the_policy(lora, zero, tiny_llama, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logps = run_distributed(exported, 2, tmp_path / "run", tiny_llama, tmp_path / "s", tmp_path / "final", lora, zero)[0]
    ids = torch.tensor(np.concatenate([PROMPT, COMPLETION]), dtype=torch.long)
    if lora is None:
        loaded = [AutoModelForCausalLM.from_pretrained(str(tmp_path / "final"))]
        assert not (tmp_path / "final" / "merged").exists()
        names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"}
        assert names <= {path.name for path in (tmp_path / "final").iterdir()}
        assert len(load_file(tmp_path / "final" / "model.safetensors")) == len(load_file(tiny_llama / "model.safetensors"))
    else:
        base = AutoModelForCausalLM.from_pretrained(str(tiny_llama))
        loaded = [PeftModel.from_pretrained(base, str(tmp_path / "final")),
                  AutoModelForCausalLM.from_pretrained(str(tmp_path / "final" / "merged"))]
        settings = json.loads((tmp_path / "final" / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(tiny_llama)
    for model in loaded:
        with torch.no_grad():
            found = model(input_ids=ids[None]).logits[0, len(PROMPT) - 1:-1].log_softmax(-1)
        assert torch.allclose(found.gather(1, ids[len(PROMPT):, None])[:, 0], logps, atol=5e-6)
    for directory in (tmp_path / "final", *(tmp_path / "final").glob("merged")):
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
        assert tokenizer.eos_token and tokenizer.chat_template == make_tokenizer().chat_template
        assert directory.name != "merged" or (directory / "generation_config.json").is_file()
    assert not list((tmp_path / "final").rglob("*.bin")) + list((tmp_path / "final").rglob("*.pt"))
