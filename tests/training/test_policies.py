"""Every kind of policy starts as its reference, learns, and is exported so that other libraries load it."""

import dataclasses
import io
import math
import re

import numpy as np
import pytest
import torch
import yaml
from distributed import run_distributed
from kernel import tiny_pairs, train_here, with_reference
from safetensors.torch import load_file
from tiny import preferences, write_preferences

from raydpo.cli.entry import main
from raydpo.config import load_config
from raydpo.errors import ConfigError, ModelError
from raydpo.pipeline.prepare import Prepared
from raydpo.reference.pairs import join_reference
from raydpo.reference.shards import Wanted
from raydpo.reference.store import ReferenceCache
from raydpo.terminal.console import Console

LORA = {"r": 4, "alpha": 8}


def sft_adapter(model, directory):
    """A PEFT adapter with non-zero weights and with dropout in its settings, as after SFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    policy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(str(model)),
        LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    policy.save_pretrained(str(directory))
    return directory


def learns(model, scratch, reference, settings):
    table = with_reference(tiny_pairs(17), model, **reference)
    run = train_here(table, model, scratch, steps=6, zero=settings.pop("zero", 2), lr=2e-3, **settings)
    weights = run.engine.gather()
    return [row["loss"] for row in run.steps], run.summary.gate, run.notes, weights


KINDS = {
    "4bit": ({"quantization": "4bit"}, {"lora": LORA, "policy": {"quantization": "4bit"}}),
    "8bit": ({"quantization": "8bit"}, {"lora": LORA, "policy": {"quantization": "8bit"}}),
    "dora": ({}, {"lora": LORA | {"dora": True}}),
    "rslora": ({}, {"lora": LORA | {"rslora": True}}),
    "pattern": ({}, {"lora": LORA | {"target_modules": r".*layers\.1\..*(q|v)_proj"}}),
    "frozen": ({}, {"policy": {"freeze": ("embed_tokens", r"layers[.]0[.]")}}),
    "frozen under ZeRO-3": ({}, {"policy": {"freeze": ("embed_tokens", r"layers[.]0[.]")}, "zero": 3}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_its_reference_and_learns(kind, tiny_llama, tmp_path):
    reference, settings = KINDS[kind]
    losses, gate, notes, weights = run_distributed(
        learns, 2, tmp_path, tiny_llama, tmp_path / "s", reference, dict(settings)
    )[0]
    # int8 rounds activations too: what float32 rounds in its last bit may there fall to another of 255 values.
    assert losses[0] == pytest.approx(math.log(2), abs=2e-4 if kind == "8bit" else 1e-5), notes
    assert "12 pairs computed again" in gate
    assert min(losses[2:]) < losses[0] - 0.001, losses
    if kind == "pattern":
        assert weights and all("layers.1." in name and ("q_proj" in name or "v_proj" in name) for name in weights)
    if "frozen" in kind:
        before = load_file(tiny_llama / "model.safetensors")
        same = {name for name, value in weights.items() if name in before and torch.equal(value, before[name])}
        assert same == {name for name in weights if "embed_tokens" in name or "layers.0." in name}


def from_adapter(model, adapter, scratch):
    table = with_reference(tiny_pairs(17), model, adapter=adapter)
    run = train_here(table, model, scratch, steps=4, policy={"adapter": str(adapter)})
    return [row["loss"] for row in run.steps], run.engine.gather()


def test_an_existing_adapter_is_trained_further_against_itself(tiny_llama, tmp_path):
    adapter = sft_adapter(tiny_llama, tmp_path / "sft")
    losses, weights = run_distributed(from_adapter, 1, tmp_path / "run", tiny_llama, adapter, tmp_path / "s")[0]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < losses[0]
    before = load_file(adapter / "adapter_model.safetensors")
    assert len(weights) == len(before)
    assert all(not torch.equal(value, before[name.replace(".default", "")]) for name, value in weights.items())


def test_what_cannot_be_is_refused_with_the_fix(tiny_llama, tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    base = {"output": str(tmp_path / "o"), "model": {"path": str(tiny_llama)}, "data": {"train": str(tmp_path / "a.jsonl")}}
    cases = {
        ("model.quantization=4bit",): "add lora",
        ("train.merge_adapter=true",): "train.merge_adapter has no effect",
        ("model.quantization=4bit", "model.lora={r: 4}", "train.zero=3"): "train.zero=2",
        (
            "model.quantization=4bit",
            "model.lora={r: 4}",
            "reference.quantization=none",
        ): "reference.allow_other_quantization=true",
        (
            "model.quantization=4bit",
            "model.lora={r: 4}",
            f"reference.path={tiny_llama}",
            "reference.quantization=none",
        ): "reference.allow_other_quantization=true",
        ("model.lora={r: 4, dora: true}", "train.zero=3"): "train.zero=2",
        ("model.lora={r: 4}", "model.freeze=[embed]"): "drop one",
        ("model.freeze=['(']",): "is not a regular expression",
        ("train.keep_best=eval_loss",): "data.eval",
        ("train.workers={min: 4, max: 2}",): "min 4 is more than max 2",
    }
    for overrides, fix in cases.items():
        with pytest.raises(ConfigError) as caught:
            load_config(base, overrides)
        assert fix in str(caught.value), overrides
    allowed = load_config(
        base,
        [
            "model.quantization=4bit",
            "model.lora={r: 4}",
            "reference.quantization=none",
            "reference.allow_other_quantization=true",
        ],
    )
    assert allowed.reference_quantization is None
    same = load_config(base, ["model.quantization=8bit", "model.lora={r: 4}"])
    assert same.reference_quantization == "8bit"


def other_reference(model, scratch):
    table = with_reference(tiny_pairs(17), model)
    with pytest.raises(Exception) as caught:
        train_here(table, model, scratch, steps=2, lora=LORA, policy={"quantization": "4bit"})
    return type(caught.value).__name__, str(caught.value)


def test_a_reference_of_other_precision_does_not_pass_the_gate(tiny_llama, tmp_path):
    name, message = run_distributed(other_reference, 1, tmp_path, tiny_llama, tmp_path / "s")[0]
    assert name == "GateError", message


def allowed(model, scratch):
    """Log-probs of the stored model, and a policy in 4 bits."""
    run = train_here(
        with_reference(tiny_pairs(17), model),
        model,
        scratch,
        steps=6,
        lr=2e-3,
        lora=LORA,
        policy={"quantization": "4bit"},
        starts_as_reference=False,
    )
    return [row["loss"] for row in run.steps], run.summary.gate


def test_a_cache_of_other_quantization_is_refused_unless_allowed(tiny_llama, tmp_path, capsys):
    """Run the command, without the training itself."""
    data = write_preferences(tmp_path / "a.jsonl", preferences(6))
    tree = {
        "output": str(tmp_path / "runs"),
        "data": {"train": str(data)},
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "score": {"dtype": "bfloat16"},
    }
    config = load_config(tree)
    whole = Prepared.of(config, Console(io.StringIO()))
    wanted = list(Wanted(whole.tables))
    whole.cache.commit([one.key for one in wanted], [np.full(len(one.tokens), -1.0, np.float32) for one in wanted], {})
    quantized = ["model.quantization=4bit", "model.lora={r: 4}", "score.dtype=float32"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    assert main(["train", str(tmp_path / "config.yaml"), *quantized]) == 1
    said = capsys.readouterr().err
    assert "quantisation: 'bitsandbytes nf4, double' here, None there" in said and "raydpo score" in said
    settings = re.search(r"to train against it anyway: (reference.*? score.dtype=bfloat16)", said)[1].split()
    prepared = Prepared.of(load_config(tree, [*quantized, *settings]), Console(io.StringIO()))
    assert join_reference(prepared.sets.train, prepared.cache, "training").num_rows == 6
    losses, gate = run_distributed(allowed, 1, tmp_path / "run", tiny_llama, tmp_path / "s")[0]
    assert "the policy starts from another model than the reference" in gate
    assert abs(losses[0] - math.log(2)) > 1e-5 and min(losses[2:]) < losses[0]


def test_a_cache_that_is_scored_again_is_named_with_the_reason(tiny_llama, tmp_path):
    adapter = sft_adapter(tiny_llama, tmp_path / "sft")
    data = write_preferences(tmp_path / "a.jsonl", preferences(6))
    tree = {
        "output": str(tmp_path / "runs"),
        "data": {"train": str(data)},
        "model": {"path": str(tiny_llama), "adapter": str(adapter)},
    }
    for dtype, told in (("bfloat16", True), ("float32", False)):
        config, said = load_config(tree, [f"model.dtype={dtype}"]), io.StringIO()
        prepared = Prepared.of(config, Console(said))
        assert "scored again" not in said.getvalue()
        before = dataclasses.replace(prepared.reference.identity, scoring_version=2)
        ReferenceCache.open(config.cache_uri, before).prepare({})
        Prepared.of(config, Console(said))
        assert (
            f"scored again, not read from {before.digest} of this cache: a model with an adapter" in said.getvalue()
        ) == told


def bad_patterns(model, scratch):
    table = with_reference(tiny_pairs(9), model)
    found = []
    for freeze in (("no_such_name",), (".",)):
        with pytest.raises(ModelError) as caught:
            train_here(table, model, scratch, steps=1, policy={"freeze": freeze})
        found.append(str(caught.value))
    return found


def test_patterns_that_freeze_nothing_or_everything_are_refused(tiny_llama, tmp_path):
    nothing, everything = run_distributed(bad_patterns, 1, tmp_path, tiny_llama, tmp_path / "s")[0]
    assert "'no_such_name' matches no parameter" in nothing
    assert "leaves nothing to train" in everything
