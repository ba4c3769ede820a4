import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from tiny import make_tokenizer, preferences, write_preferences
from unpaired import labelled_records

from raydpo.config import TrainConfig, load_config
from raydpo.data.mismatch import as_trained
from raydpo.data.pairs import load_pairs
from raydpo.data.ragged import tokens_in_use
from raydpo.data.tokenise import Tokeniser
from raydpo.errors import ConfigError
from raydpo.estimate.cards import DEVICES
from raydpo.estimate.display import plan_run
from raydpo.estimate.plan import Rates, Stage, make_plan, operations, training_factors
from raydpo.estimate.rate import stated_rates
from raydpo.model.cost import ModelCost
from raydpo.model.memory.anatomy import model_cost
from raydpo.model.memory.scoring import Choice

RATES = Rates(score=1e9, train=1e9, origin="test")
SIZES = ModelCost(parameters=1500, active=1000, hidden=10, vocabulary=50, layers=2, attention_width=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_llama):
    """A configuration with 40 training pairs and 8 held-out pairs, and these pairs."""
    file = write_preferences(tmp_path_factory.mktemp("plan") / "a.jsonl", preferences(48))
    config = load_config(
        {
            "output": "runs",
            "model": {"path": str(tiny_llama), "layout": "packed"},
            "data": {"train": str(file), "eval": {"fraction": 0.2}},
            "train": {"pairs_per_step": 16, "epochs": 2, "eval_every": 2, "zero": 1},
        }
    )
    return config, load_pairs(config.data, Tokeniser(make_tokenizer()))


@pytest.fixture(autouse=True)
def few_world_sizes(monkeypatch):
    monkeypatch.setattr("raydpo.estimate.plan.WORLD_SIZES", (1, 4))


def plan(data, **settings):
    config, sets = data
    return make_plan(config, sets, SIZES, SIZES, RATES, **settings)


def test_operations_by_hand():
    """10 positions of 2 x 1000 FLOPs, 30 query-key pairs of 4 x 2 layers x width 8, and 5 predictions of 2 x 50 x 10."""
    amount = np.array([10.0, 30.0, 5.0])
    assert operations(amount, SIZES) == 10 * 2000 + 30 * 64 + 5 * 1000
    assert operations(amount, SIZES, (3, 3, 4)) == 3 * 10 * 2000 + 3 * 30 * 64 + 4 * 5 * 1000


def test_config_json_alone_tells_the_same_sizes(tiny_llama, tiny_qwen3, tmp_path):
    for number, model in enumerate((tiny_llama, tiny_qwen3)):
        bare = tmp_path / str(number)
        bare.mkdir()
        shutil.copy(model / "config.json", bare)
        assert model_cost(bare) == model_cost(model) == ModelCost.of(model)


def test_training_factors():
    """Full fine-tuning: forward pass, gradients of inputs and of weights. With adapters: no gradients of weights."""
    assert training_factors(TrainConfig(), lora=False) == (3, 3, 4)
    assert training_factors(TrainConfig(), lora=True) == (2, 3, 2)
    assert training_factors(TrainConfig(gradient_checkpointing=True), lora=True) == (3, 4, 2)
    assert training_factors(TrainConfig(loss="aot"), lora=False) == (4, 4, 5)


def test_a_stage_by_hand():
    """7.2e15 FLOPs on 4 devices of 1e12 FLOP/s that wait a tenth of the time: 2000 s, 2.22 GPU hours."""
    stage = Stage.of(7.2e15, 4, 1e12, 3.0, lost=0.1)
    assert stage.seconds == pytest.approx(2000)
    assert stage.gpu_hours == pytest.approx(4 * 2000 / 3600)
    assert stage.dollars == pytest.approx(3 * 4 * 2000 / 3600)
    assert Stage.of(1.0, 1, 1.0, None).dollars is None
    assert (stage + stage * 2).gpu_hours == pytest.approx(3 * stage.gpu_hours)


def test_stated_rates_are_a_share_of_the_peak():
    rates = stated_rates("A100-80GB", mfu_score=0.5, mfu_train=0.25)
    assert (rates.score, rates.train) == (DEVICES["A100-80GB"] * 1e12 / 2, DEVICES["A100-80GB"] * 1e12 / 4)
    assert "A100-80GB" in rates.origin and "assumed" in rates.origin


def test_plan_counts_what_the_data_are(data):
    """Without shared prefixes, every figure follows from the lengths."""
    _, sets = data
    pairs, held_out = sets.train.to_pylist(), sets.eval.to_pylist()
    found = plan(data, runs=3)

    def amount(rows):
        positions = looks = tokens = 0.0
        for row in rows:
            prompt, *completions = (len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
            for completion in completions:
                positions += prompt + completion
                looks += (prompt + completion) ** 2 / 2
                tokens += completion
        return np.array([positions, looks, tokens])

    per_epoch = -(-len(pairs) // 16)
    assert found.steps == 2 * per_epoch and found.epochs == 2
    assert found.data["completions"] == 2 * (len(pairs) + len(held_out))
    assert found.data["positions"]["packed"] == pytest.approx(2 * amount(pairs)[0], rel=0.1)  # of whole sampled steps
    assert found.score.flops == pytest.approx(operations(amount(pairs + held_out), SIZES))
    evaluations = 1 + -(-found.steps // 2)
    assert found.evaluation.flops == pytest.approx(evaluations * operations(amount(held_out), SIZES))
    assert found.training.flops == pytest.approx(operations(2 * amount(pairs), SIZES, (3, 3, 4)), rel=0.1)
    assert found.training.seconds == pytest.approx(found.training.flops / 1e9 / (1 - found.imbalance.imbalance))
    assert found.total.flops == pytest.approx(found.score.flops + 3 * (found.training.flops + found.evaluation.flops))
    assert found.online.flops > 3 * found.training.flops * 4 / 3
    packed = operations(2 * amount(pairs), SIZES, (4, 4, 5)) + found.evaluation.flops
    assert found.online_packed.flops == pytest.approx(3 * packed, rel=0.1)
    assert found.online_packed.seconds < found.online.seconds


def test_what_is_saved_comes_in_order(data):
    positions = plan(data).data["positions"]
    assert positions["tree"] < positions["packed"] < min(positions["padded"], positions["dealt"])


def test_workers_share_the_time_and_cost_dollars(data):
    one, four = plan(data, workers=1, price=2.0), plan(data, workers=4, price=2.0)
    assert four.score.seconds == pytest.approx(one.score.seconds / 4)
    assert four.score.dollars == pytest.approx(one.score.dollars) == pytest.approx(2 * one.score.flops / 1e9 / 3600)
    assert four.imbalance.world_size == 4
    assert [(one.world_size, one.pairs_per_step) for one in four.fixed + four.scaled] == [(1, 16), (4, 16), (1, 4), (4, 16)]


def test_world_sizes_at_which_most_ranks_have_no_pair_are_left_out(data, monkeypatch):
    monkeypatch.setattr("raydpo.estimate.plan.WORLD_SIZES", (1, 16, 32, 64, 4096))
    pairs = data[1].train.num_rows
    few, many = plan(data), plan(data, workers=32)
    assert [one.world_size for one in few.fixed] == [1, 16] and [one.world_size for one in many.fixed] == [1, 16, 32]
    assert [one.pairs_per_step for one in few.scaled] == [count for count in (4, 64, 128, 256) if count < 2 * pairs]


def test_steps_instead_of_epochs(data):
    config, sets = data
    found = make_plan(
        load_config(config.model_dump(exclude_unset=True) | {"train": {"steps": 3, "pairs_per_step": 16}}),
        sets,
        SIZES,
        SIZES,
        RATES,
    )
    assert found.steps == 3 and found.data["pairs_trained_on"] == min(48, sets.train.num_rows)


def test_an_objective_without_a_reference_has_no_reference_pass(data):
    config, sets = data
    found = make_plan(
        load_config(config.model_dump(exclude_unset=True) | {"train": {"loss": "simpo"}}),
        sets,
        SIZES,
        SIZES,
        RATES,
    )
    assert found.score.flops == 0 and found.data["completions"] == 0 and found.training.flops > 0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"workers": 0}, "--workers"),
        ({"runs": 0}, "--runs"),
        ({"price": -1.0}, "--price"),
        ({"price": float("nan")}, "--price"),
    ],
)
def test_numbers_out_of_range(data, settings, named):
    with pytest.raises(ConfigError, match=named):
        plan(data, **settings)
    with pytest.raises(ConfigError, match=named):
        plan_run(*data, memory=16, **settings)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"device": "H1000"}, "H100, H200"), ({"mfu_score": 45.0}, "--mfu-score"), ({"mfu_train": 0.0}, "--mfu-train")],
)
def test_rates_out_of_range(settings, named):
    with pytest.raises(ConfigError, match=named):
        stated_rates(**settings)


def test_a_device_that_nobody_named_is_told(data):
    config, sets = data
    assert plan_run(config, sets).rates.origin.endswith("; --device names another")
    assert not plan_run(config, sets).rates.warnings
    on_cpus = load_config(config.model_dump(), ["score.gpus_per_worker=0", "train.gpus_per_worker=0"])
    assert "runs on CPUs" in plan_run(on_cpus, sets).rates.warnings[0]
    named = plan_run(on_cpus, sets, device="L4").rates
    assert "--device" not in named.origin and not named.warnings


def test_mismatched_completions_are_planned_once(tmp_path, tiny_llama):
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in labelled_records(12)))
    tree = {"output": "runs", "model": {"path": str(tiny_llama)}, "data": {"train": str(file)}}
    config = load_config(tree, ["train.loss=kto", "train.pairs_per_step=5"])
    sets = load_pairs(config.data, Tokeniser(make_tokenizer()))
    found = plan_run(config, sets)
    tokens = sum(int(tokens_in_use(sets.train, side).sum()) for side in ("chosen", "rejected"))
    assert found.data["completions"] == 24 and found.data["completion_tokens"] == 2 * tokens
    trained = as_trained(sets, config)
    assert as_trained(trained, config) is trained


def test_the_reference_is_put_on_several_devices_if_one_does_not_hold_it(data, monkeypatch):
    """A plan may use 1.44 of 1.6 GiB, and CUDA alone takes 1.5, so nothing fits; in 16 GiB everything does."""
    config, sets = data
    found = plan_run(config, sets, memory=16, workers=2)
    assert found.reference.simple and "whole on each device" in found.reference.line
    refused = plan_run(config, sets, memory=1.6, workers=2)
    assert "does not fit on 2 x device (1.6 GiB)" in refused.reference
    assert refused.score.flops == found.score.flops
    assert "reference" in found.to_dict()


def test_gathers_that_take_longer_than_products_and_stand_ins_are_counted_in_hours(data):
    choice = Choice(
        partition=4,
        offload=None,
        model_bytes=4.0,
        weights_bytes=1.0,
        gathered_bytes=1.0,
        position_bytes=1.0,
        logits_bytes=1.0,
        positions=65536,
        gather_positions=1e6,
    )
    config, sets = data
    whole = plan(data, workers=4)
    hidden = make_plan(config, sets, SIZES, SIZES, RATES, workers=4, choice=replace(choice, gather_positions=1.0))
    shown = make_plan(config, sets, SIZES, SIZES, RATES, workers=4, choice=choice)
    longer = make_plan(config, sets, SIZES, SIZES, RATES, workers=4, choice=replace(choice, gather_positions=3e6))
    assert whole.score.flops == hidden.score.flops == shown.score.flops
    assert shown.score.gpu_hours > 10 * hidden.score.gpu_hours
    assert longer.score.gpu_hours == pytest.approx(3 * shown.score.gpu_hours)
    # One shard, dealt to four processes: the one with the most positions decides.
    assert 1 < hidden.score.seconds / whole.score.seconds < 1.5
    assert hidden.training.seconds == whole.training.seconds
