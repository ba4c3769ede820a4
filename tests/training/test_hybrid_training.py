"""Models with layers that carry a state train in the tree layout, and equal themselves in padded rows."""

import pytest
from architectures import HYBRIDS
from distributed import run_distributed
from kernel import tiny_pairs, train_here, with_reference
from tiny import make_model

STEPS = 3
LORA = {"r": 4, "alpha": 8, "target_modules": "all-linear"}
# ZeRO-3 last: while its engine lives, transformers partitions every model it loads.
KINDS = {
    "zero1": dict(zero=1),
    "recomputed": dict(zero=2, gradient_checkpointing=True),
    "lora": dict(zero=2, lora=LORA),
    "zero3": dict(zero=3, gradient_checkpointing=True, tokens_per_batch=300),
}
CASES = [("falcon_h1", "recomputed"), ("lfm2", "lora"), ("jamba", "zero3"), ("qwen3_5_text", "zero3")]
NAMES = list(dict.fromkeys(name for name, _ in CASES))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrids")
    return {name: make_model(folder / name, name, hidden=32, layers=3, **sizes(name)) for name in NAMES}


def sizes(name):
    return {key: value for key, value in HYBRIDS[name][1].items() if key not in ("num_hidden_layers", "head_dim")}


def trained(table, models, scratch, layout):
    found = {}
    for name, kind in CASES:
        settings = {"steps": STEPS, "policy": {"layout": layout}, "held_out": table[name], **KINDS[kind]}
        run = train_here(table[name], models[name], scratch / f"{name} {kind}", **settings)
        found[name, kind] = run.steps, run.evals, run.engine.layout_line
    return found


def test_training_in_the_tree_equals_training_in_padded_rows(models, tmp_path):
    tables = {name: with_reference(tiny_pairs(17), model) for name, model in models.items()}
    (padded,) = run_distributed(trained, 1, tmp_path / "padded", tables, models, tmp_path / "s1", "padded")
    tree = run_distributed(trained, 2, tmp_path / "tree", tables, models, tmp_path / "s2", "auto")[0]
    for case, (steps, evals, line) in tree.items():
        assert line.startswith(f"layout: tree (sdpa attention), {HYBRIDS[case[0]][0]} in rows, "), line
        assert padded[case][2].startswith("layout: padded, ")
        for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "pairs", "tokens"):
            expected = [row[key] for row in padded[case][0]]
            assert [row[key] for row in steps] == pytest.approx(expected, abs=1e-4, rel=1e-5), (case, key)
        expected = [row["eval_loss"] for row in padded[case][1]]
        assert [row["eval_loss"] for row in evals] == pytest.approx(expected, abs=1e-5), case
