"""TRL 1.16's DPOTrainer and raydpo give the same numbers for the same mixture of experts, with and without the router loss.

Padded and packed rows compute a pair's prompt twice, as TRL does. The tree computes it once, so its router loss is the same
loss over other positions.
"""

import json
import math

import pytest
from distributed import run_distributed
from trl_reference import RAYDPO
from trl_router_reference import CASES, FILE, MAX_LENGTH, MODEL, STEPS, make_mixture, write_pairs
from trl_unpaired_reference import moved

RECORDED = json.loads(FILE.read_text())["cases"]


def train_case(model, data, scratch, settings, layout):
    """Some steps of raydpo, from files to losses; the held-out evaluation after them, and each weight's change."""
    import torch
    from kernel import train_here, with_reference
    from transformers import AutoModelForCausalLM

    from raydpo.config import DataConfig, LoraSettings
    from raydpo.data.pairs import load_pairs
    from raydpo.data.tokenise import Tokeniser, load_tokenizer
    from raydpo.model.load import add_lora

    tables = []
    for file in data:
        config = DataConfig(train=[str(file)], max_length=MAX_LENGTH, max_dropped=1.0)
        sets = load_pairs(config, Tokeniser(load_tokenizer(str(model))))
        tables.append(with_reference(sets.train, model))
    record = train_here(
        tables[0],
        model,
        scratch,
        held_out=tables[1],
        steps=STEPS,
        eval_every=STEPS,
        zero=0,
        tokens_per_batch=4096,
        policy={"layout": layout},
        **RAYDPO,
        **settings,
    )
    before = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if lora := settings.get("lora"):
        before = add_lora(before, LoraSettings(**lora), seed=0)
    after = dict(record.engine.module.policy.named_parameters())
    weights = {name: value.detach() for name, value in before.named_parameters() if value.requires_grad}
    return record.steps, record.evals, moved(weights, after), record.notes


def train_all(jobs):
    return [train_case(*job) for job in jobs]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("router")
    model, data = make_mixture(scratch / "mixture"), write_pairs(scratch)
    wanted = [(name, "padded") for name in CASES] + [("given", "packed"), ("given", "tree")]
    jobs = []
    for name, layout in wanted:
        settings = dict(CASES[name])
        if settings["router_aux_loss_coef"] is None:  # resolved before the workers start
            from raydpo.model.router import router_loss_coef

            settings["router_aux_loss_coef"] = router_loss_coef(str(model), None)
        jobs.append((model, data, scratch / f"{name}-{layout}", settings, layout))
    (ours,) = run_distributed(train_all, 1, scratch / "ranks", jobs)
    return model, dict(zip(wanted, ours, strict=True))


@pytest.mark.parametrize(("name", "layout"), [(name, "padded") for name in CASES] + [("given", "packed")])
def test_same_numbers_as_trl(name, layout, results):
    from raydpo.reference.identity import identify

    model, found = results
    recorded, coef = RECORDED[name], CASES[name]["router_aux_loss_coef"]
    assert identify(model, "float32").weights == recorded["weights"], (
        "this torch initialises the tiny model otherwise than the recorded run: run trl_router_reference.py"
    )
    coef = MODEL["router_aux_loss_coef"] if coef is None else coef
    steps, (_, last), changes, notes = found[name, layout]
    for number, (ours, theirs) in enumerate(zip(steps, recorded["steps"], strict=True)):
        if coef:
            assert ours["aux_loss"] == pytest.approx(theirs["aux_loss"], abs=1e-5), number
        else:
            assert "aux_loss" not in ours and "aux_loss" not in theirs
        assert ours["loss"] + coef * ours.get("aux_loss", 0) == pytest.approx(theirs["loss"], abs=1e-5), number
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), number
    assert changes == pytest.approx(recorded["moved"], rel=1e-3, abs=1e-6)
    wanted = recorded["eval"]
    assert last.get("eval_aux_loss") == (pytest.approx(wanted["eval_aux_loss"], abs=1e-5) if coef else None)
    assert last["eval_loss"] + coef * last.get("eval_aux_loss", 0) == pytest.approx(wanted["eval_loss"], abs=1e-5)
    assert any(f"router loss: {coef:g} times aux_loss" in note for note in notes) == bool(coef)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6), "the loss is of the pairs alone"


def test_the_router_loss_does_something():
    given, none = (RECORDED[name] for name in ("given", "none"))
    assert given["steps"][-1]["aux_loss"] < given["steps"][0]["aux_loss"] - 0.1
    gates = [name for name in given["moved"] if name.endswith("mlp.gate.weight")]
    assert gates and all(given["moved"][name] > none["moved"][name] for name in gates)


def test_the_tree_counts_a_shared_prompt_once(results):
    (tree, _, _, _), theirs = results[1]["given", "tree"], RECORDED["given"]["steps"]
    assert tree[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert 1e-3 < abs(tree[0]["aux_loss"] - theirs[0]["aux_loss"]) < 0.3
