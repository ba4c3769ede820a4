"""Adapters on fused experts from the first step to a run that trains them further: equal log-probs at every station."""

import math

import pytest
from distributed import run_distributed
from kernel import exact, tiny_pairs, train_here, with_reference
from tiny import make_model, make_tokenizer

LORA = {"r": 2, "alpha": 4}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
KINDS = {
    "qwen3_moe": {"num_experts": 4, **EXPERTS},
    "gpt_oss": {"num_local_experts": 4, **EXPERTS},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 64, **EXPERTS},
}


def life(models, folder):
    """Notes and losses of training, of its end resumed from a checkpoint, of the export, and of training that goes on."""
    from raydpo.config import LoraSettings
    from raydpo.training.policy.engine import PolicySpec
    from raydpo.training.policy.export import export_policy

    found = {}
    for kind, model in models.items():
        keep, final, said = folder / kind, folder / f"{kind}-final", []
        table, how = with_reference(tiny_pairs(17), model), {"lr": 5e-3, "steps": 4, "lora": LORA, "checkpoint_every": 2}
        whole = train_here(table, model, folder / "s", keep=keep, **how)
        rest = train_here(table, model, folder / "s", checkpoint=keep / "step-2", **how)
        spec = PolicySpec(path=str(model), dtype="float32", lora=LoraSettings(**LORA))
        export_policy(rest.engine, spec, str(model), make_tokenizer(), final, merge=True, note=said.append)
        table = with_reference(tiny_pairs(17), model, adapter=final)
        further = train_here(table, model, folder / "s", lr=5e-3, steps=1, policy={"adapter": str(final)})
        found[kind] = whole.notes, exact(whole.steps), exact(rest.steps), said, exact(further.steps)
    return found


def test_adapters_on_experts_from_the_first_step_to_the_next_run(tmp_path):
    models = {kind: make_model(tmp_path / kind, kind, **settings) for kind, settings in KINDS.items()}
    (found,) = run_distributed(life, 1, tmp_path / "run", models, tmp_path / "made")
    for kind, (notes, whole, rest, said, further) in found.items():
        parts = "attention, experts, shared experts" if kind == "qwen2_moe" else "attention, experts"
        assert f"adapters: {parts}; spared: router" in notes
        assert whole[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and whole[-1]["loss"] < whole[0]["loss"] - 1e-3
        assert rest == whole[2:], "resumed to the bit"
        assert [line.partition(" ")[0] for line in said] == ["final", "final/merged"]
        assert further[0]["loss"] == pytest.approx(math.log(2), abs=1e-5), "its own reference"
