"""Vision-language packages trained on text and exported: the same package, with the trained policy as its text model."""

import json

import numpy as np
import pytest
import torch
from distributed import run_distributed
from kernel import tiny_pairs, train_here, with_reference
from packages import FAMILIES, PROCESSOR, make_package
from safetensors.torch import load_file
from tiny import make_tokenizer

from raydpo.model.layout import PromptGroup

LORA = {"r": 4, "alpha": 8}
PROMPT, COMPLETION = np.arange(5, 15, dtype=np.int32), np.arange(15, 25, dtype=np.int32)
QUICK = ("gemma3", "qwen3_5", "llama4")


def trained(families, folder, lora, zero):
    """Train and export each family; log-probs of the policy, and what the export noted, and the layout."""
    from raydpo.config import LoraSettings
    from raydpo.training.policy.engine import PolicySpec
    from raydpo.training.policy.export import export_policy

    found = {}
    for family in families:
        model, notes = folder / family, []
        run = train_here(with_reference(tiny_pairs(9), model), model, folder / "s", steps=2, lora=lora, zero=zero)
        spec = PolicySpec(path=str(model), dtype="float32", lora=None if lora is None else LoraSettings(**lora))
        export_policy(
            run.engine, spec, str(model), make_tokenizer(), folder / f"{family}-final", merge=True, note=notes.append
        )
        with run.engine.evaluating():
            logps = run.engine.logps(run.engine.lay_out([PromptGroup(PROMPT, (COMPLETION,))]))
        found[family] = logps, run.steps, notes, run.engine.layout_line
    return found


def check_export(model, directory, logps):
    """Compare an exported package with the package that training began with, and with the policy."""
    from transformers import AutoModelForImageTextToText

    exported = AutoModelForImageTextToText.from_pretrained(str(directory))
    ids = torch.tensor(np.concatenate([PROMPT, COMPLETION]), dtype=torch.long)
    with torch.no_grad():
        found = exported(input_ids=ids[None]).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    assert torch.allclose(found.gather(1, ids[len(PROMPT) :, None])[:, 0], logps, atol=5e-6)
    before, after = (json.loads((each / "config.json").read_text()) for each in (model, directory))
    assert before["architectures"] == after["architectures"] and before["model_type"] == after["model_type"]
    old, new = (load_file(each / "model.safetensors") for each in (model, directory))
    assert old.keys() == new.keys()
    vision = [name for name in old if any(word in name for word in ("vis", "proj_in", "projector", "connector"))]
    assert vision and all(torch.equal(old[name], new[name]) for name in vision)
    assert any(not torch.equal(old[name], new[name]) for name in old.keys() - set(vision))
    for name, content in PROCESSOR.items():
        assert json.loads((directory / name).read_text()) == content


def check_families(families, lora, zero, world_size, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    models = {family: make_package(tmp_path / family, family) for family in families}
    results = run_distributed(trained, world_size, tmp_path / "run", families, tmp_path, lora, zero)[0]
    for family, (logps, steps, notes, _) in results.items():
        assert abs(steps[0]["loss"] - np.log(2)) < 1e-5 and steps[1]["loss"] != steps[0]["loss"], family
        assert not [line for line in notes if line.startswith("warning:")], notes
        final = tmp_path / f"{family}-final"
        if lora is None:
            check_export(models[family], final, logps)
            continue
        check_export(models[family], final / "merged", logps)
        base = AutoModelForImageTextToText.from_pretrained(str(models[family]))
        check = PeftModel.from_pretrained(base, str(final))
        ids = torch.tensor(np.concatenate([PROMPT, COMPLETION]), dtype=torch.long)
        with torch.no_grad():
            found = check(input_ids=ids[None]).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
        assert torch.allclose(found.gather(1, ids[len(PROMPT) :, None])[:, 0], logps, atol=5e-6)
        names = list(load_file(final / "adapter_model.safetensors"))
        assert names and not [name for name in names if "vis" in name or "projector" in name]
    return results


@pytest.mark.parametrize("lora", [pytest.param(None, marks=pytest.mark.slow), LORA], ids=["full", "lora"])
def test_an_exported_package_is_the_policy_and_has_the_vision_tower_it_began_with(lora, tmp_path):
    check_families(QUICK, lora, 2, 1, tmp_path)


def test_a_partitioned_package_trains_in_the_tree_and_is_exported_whole(tmp_path):
    results = check_families(("qwen3_5",), None, 3, 2, tmp_path)
    assert results["qwen3_5"][-1].startswith("layout: tree (sdpa attention), Qwen3_5GatedDeltaNet in rows, ")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_every_family_is_exported_as_it_came(lora, tmp_path):
    check_families([family for family in FAMILIES if family not in QUICK], lora, 2, 1, tmp_path)
