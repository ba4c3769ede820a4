"""A mixture of experts trains on two ranks as on one, with and without the router loss, for every ZeRO stage."""

import math

import pytest
from distributed import run_distributed
from kernel import exact, tiny_pairs, train_here, with_reference
from tiny import make_model
from unpaired import labelled, scored

from raydpo.training.policy import deepspeed_engine

STEPS = 3
MODEL = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, initializer_range=0.1)
LORA = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj"]}
# Micro-batches of one pair each, so that they are the same whatever the number of ranks. Steps of three pairs: on two ranks
# one of them computes a stand-in.
ROUTED = dict(router_aux_loss_coef=1.0, tokens_per_batch=16, pairs_per_step=3)
LABELLED = "routed, labels"
# ZeRO-3 last: while its engine lives, transformers partitions every model it loads.
KINDS = {
    "routed": dict(zero=0, **ROUTED),
    "routed, zero 2, lora": dict(zero=2, lora=LORA, **ROUTED),
    LABELLED: dict(zero=1, loss="bco", **ROUTED),
    "zero 3": dict(zero=3),
    "routed, zero 3, recomputed": dict(zero=3, gradient_checkpointing=True, **ROUTED),
    "routed, zero 3, lora": dict(zero=3, lora=LORA, **ROUTED),
}
SOME = ("routed", LABELLED, "routed, zero 3, recomputed")
TOGETHER = {"routed, one micro-batch on both": dict(zero=1, sequence_parallel=2, workers=2, **ROUTED)}


def trained(tables, model, scratch, kinds):
    """Steps, evaluations and weights of each kind. ZeRO-3 partitions every weight, however small."""
    settings = deepspeed_engine._deepspeed_config

    def all_partitioned(train, dtype):
        found = settings(train, dtype)
        found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return found

    deepspeed_engine._deepspeed_config = all_partitioned
    found = {}
    for name, kind in kinds.items():
        rows = tables[name == LABELLED]
        run = train_here(rows, model, scratch, steps=STEPS, eval_every=STEPS, held_out=rows, **kind)
        found[name] = run.steps, run.evals, {each: value.norm().item() for each, value in run.engine.gather().items()}
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("mixture") / "qwen3_moe", "qwen3_moe", **MODEL)


@pytest.fixture(scope="module")
def tables(model):
    """Pairs, and completions of which most are alone, with a label."""
    return with_reference(tiny_pairs(9), model), scored(labelled([0, 1, -1, 1, 0, -1, 1, 1, -1]), model)


def same(ours, wanted, note):
    assert len(ours[0]) == len(wanted[0]) and len(ours[1]) == len(wanted[1])
    for mine, other in zip([*ours[0], *ours[1]], [*wanted[0], *wanted[1]], strict=True):
        assert set(mine) - {"slowest_rank", "slowest_lag"} == set(other) - {"slowest_rank", "slowest_lag"}, note
        for key in {"loss", "eval_loss", "aux_loss", "eval_aux_loss", "rewards/margins"} & set(mine):
            assert mine[key] == pytest.approx(other[key], abs=1e-5), f"{note} {key}"
        if "grad_norm" in mine:
            assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4), note
    assert ours[2] == pytest.approx(wanted[2], rel=1e-5, abs=1e-5), note


@pytest.mark.parametrize("names", [SOME, pytest.param(tuple(KINDS), marks=pytest.mark.slow)], ids=["some", "all"])
def test_two_ranks_equal_one(tables, model, names, tmp_path):
    kinds = {name: KINDS[name] for name in names}
    (alone,) = run_distributed(trained, 1, tmp_path / "1", tables, model, tmp_path / "s1", kinds)
    two = run_distributed(trained, 2, tmp_path / "2", tables, model, tmp_path / "s2", TOGETHER | kinds)
    for name, wanted in alone.items():
        assert exact(two[0][name][0]) == exact(two[1][name][0]), name
        same(two[0][name], wanted, name)
        routed = "router_aux_loss_coef" in KINDS[name]
        assert all(("aux_loss" in row) == routed for row in wanted[0]), name
        assert all(("eval_aux_loss" in row) == routed for row in wanted[1]), name
    same(alone["routed, zero 3, recomputed"], alone["routed"], "recomputed")
    if "routed, zero 3, lora" in alone:
        same(alone["routed, zero 3, lora"], alone["routed, zero 2, lora"], "lora")
    for name in TOGETHER:
        same(two[0][name], alone["routed"], name)
    assert alone["routed"][0][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    before, after = (row["eval_aux_loss"] for row in alone["routed"][1])
    assert after < before - 0.02, "experts are used more alike"
