"""Exported policies load in transformers and PEFT, and compute the same log-probs as the trained policy."""

import json

import numpy as np
import pytest
import torch
from distributed import run_distributed
from kernel import tiny_pairs, train_here, with_reference
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer

from raydpo.model.layout import PromptGroup

LORA = {"r": 4, "alpha": 8}
PROMPT, COMPLETION = np.arange(5, 15, dtype=np.int32), np.arange(15, 25, dtype=np.int32)


def exported(model, scratch, directory, lora, zero):
    from raydpo.config import LoraSettings
    from raydpo.training.policy.engine import PolicySpec
    from raydpo.training.policy.export import export_policy

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
        loaded = [
            PeftModel.from_pretrained(base, str(tmp_path / "final")),
            AutoModelForCausalLM.from_pretrained(str(tmp_path / "final" / "merged")),
        ]
        settings = json.loads((tmp_path / "final" / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(tiny_llama)
    for model in loaded:
        with torch.no_grad():
            found = model(input_ids=ids[None]).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
        assert torch.allclose(found.gather(1, ids[len(PROMPT) :, None])[:, 0], logps, atol=5e-6)
    for directory in (tmp_path / "final", *(tmp_path / "final").glob("merged")):
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
        assert tokenizer.eos_token and tokenizer.chat_template == make_tokenizer().chat_template
        assert directory.name != "merged" or (directory / "generation_config.json").is_file()
    assert not list((tmp_path / "final").rglob("*.bin")) + list((tmp_path / "final").rglob("*.pt"))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_merging_changes_only_the_one_of_two_tied_weights_that_has_an_adapter(target, tmp_path):
    from raydpo.model.load import load_causal_lm
    from raydpo.model.logps import LogpModel

    model = make_model(tmp_path / "model", tie_word_embeddings=True)
    lora = LORA | {"target_modules": ["q_proj", target]}
    (policy,) = run_distributed(exported, 1, tmp_path / "run", model, tmp_path / "s", tmp_path / "final", lora, 2)
    merged = load_causal_lm(tmp_path / "final" / "merged", "float32", rope_length=None)
    found = LogpModel(merged).score([PromptGroup(PROMPT, (COMPLETION,))], torch.device("cpu"))[0][0]
    assert np.allclose(found, policy.numpy(), atol=5e-6)


def exported_kinds(model, folder):
    """Log-probs of the trained policy and of its exports, loaded again, for each kind of adapter."""
    import peft

    from raydpo.model.load import load_causal_lm
    from raydpo.model.logps import LogpModel
    from raydpo.training.policy.engine import PolicySpec
    from raydpo.training.policy.export import export_policy

    group, found = [PromptGroup(PROMPT, (COMPLETION,))], {}
    for name, config in (
        ("vera", peft.VeraConfig(r=4, target_modules=["q_proj"])),
        ("vblora", peft.VBLoRAConfig(r=2, num_vectors=10, vector_length=16, topk=2, target_modules=["q_proj"])),
        ("randlora", peft.RandLoraConfig(r=4, target_modules=["q_proj"])),
        ("delora", peft.DeloraConfig(r=2, target_modules=["q_proj"])),
    ):
        adapter, final = folder / name, folder / f"{name}-final"
        policy = peft.get_peft_model(load_causal_lm(model, "float32", rope_length=None), config)
        policy.save_pretrained(str(adapter))
        run = train_here(
            with_reference(tiny_pairs(5), model, adapter=adapter),
            model,
            folder / "s",
            steps=2,
            lr=1e-2,
            policy={"adapter": str(adapter)},
        )
        spec = PolicySpec(path=str(model), dtype="float32", lora=None, adapter=str(adapter))
        export_policy(run.engine, spec, str(model), make_tokenizer(), final, merge=True)
        loaded = [
            load_causal_lm(model, "float32", adapter=str(final), rope_length=None),
            load_causal_lm(final / "merged", "float32", rope_length=None),
        ]
        found[name] = [LogpModel(each).score(group, torch.device("cpu"))[0][0] for each in loaded]
        with run.engine.evaluating():
            found[name].append(run.engine.module.score(group, torch.device("cpu"))[0][0])
    return found


@pytest.mark.slow
def test_adapters_with_tensors_that_do_not_train_are_exported_whole(tiny_llama, tmp_path):
    """VeRA stores projections, VB-LoRA a bank that its layers share, RandLoRA bases, DeLoRA norms."""
    (found,) = run_distributed(exported_kinds, 1, tmp_path / "run", tiny_llama, tmp_path)
    assert len(found) == 4
    for name, (final, merged, policy) in found.items():
        assert np.allclose(final, policy, atol=5e-6) and np.allclose(merged, policy, atol=5e-6), name
