"""Models with layers that carry a state train in the tree layout, and equal themselves in padded rows."""

import pytest
from architectures import HYBRIDS
from distributed import run_distributed
from kernel import tiny_pairs, train_here, with_reference
from tiny import make_model

STEPS = 2
KINDS = {
    "lora": dict(zero=2, lora={"r": 4, "alpha": 8}),
    "recomputed": dict(zero=2, gradient_checkpointing=True),
    "zero3": dict(zero=3, gradient_checkpointing=True, tokens_per_batch=200),
}
# ZeRO-3 last: while its engine lives, transformers partitions every model it loads.
FEW = [("falcon_h1", "lora"), ("jamba", "zero3")]
MANY = [("lfm2", "lora"), ("granitemoehybrid", "recomputed"), ("qwen3_5_text", "zero3"), ("minimax", "zero3")]


def sizes(name):
    return {key: value for key, value in HYBRIDS[name][1].items() if key not in ("num_hidden_layers", "head_dim")}


def trained(cases, table, models, scratch, layout):
    found = {}
    for name, kind in cases:
        settings = {"steps": STEPS, "policy": {"layout": layout}, "held_out": table[name], **KINDS[kind]}
        run = train_here(table[name], models[name], scratch / f"{name} {kind}", **settings)
        found[name, kind] = run.steps, run.evals, run.engine.layout_line
    return found


@pytest.mark.parametrize("cases", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
def test_training_in_the_tree_equals_training_in_padded_rows(cases, tmp_path):
    """On two ranks in the tree, and on one in padded rows. Under ZeRO-3 the ranks have batches of unequal rows."""
    models = {name: make_model(tmp_path / name, name, hidden=32, layers=3, **sizes(name)) for name, _ in cases}
    tables = {name: with_reference(tiny_pairs(11), models[name]) for name, _ in cases}
    (padded,) = run_distributed(trained, 1, tmp_path / "padded", cases, tables, models, tmp_path / "s1", "padded")
    tree = run_distributed(trained, 2, tmp_path / "tree", cases, tables, models, tmp_path / "s2", "auto")[0]
    for case, (steps, evals, line) in tree.items():
        assert line.startswith(f"layout: tree (sdpa attention), {HYBRIDS[case[0]][0]} in rows, "), line
        assert padded[case][2].startswith("layout: padded, ")
        for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "pairs", "tokens"):
            expected = [row[key] for row in padded[case][0]]
            assert [row[key] for row in steps] == pytest.approx(expected, abs=1e-4, rel=1e-5), (case, key)
        expected = [row["eval_loss"] for row in padded[case][1]]
        assert [row["eval_loss"] for row in evals] == pytest.approx(expected, abs=1e-5), case
