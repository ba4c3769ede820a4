"""The estimate of rounds: its arithmetic by hand, and what it says."""

import dataclasses
import io
import types

import numpy as np
import pyarrow as pa
import pytest

from raydpo.cli.entry import _plan_rounds
from raydpo.config import load_config
from raydpo.errors import ConfigError
from raydpo.estimate.plan import Rates, make_plan
from raydpo.estimate.rounds import BANDWIDTH_REACHED, DECODING, STARTS, RoundPrompts, Sampler, made_pairs, plan_rounds
from raydpo.estimate.rounds_display import estimate_rounds
from raydpo.model.cost import ModelCost
from raydpo.rounds import prompts as round_prompts
from raydpo.terminal.console import Console

RATES = Rates(score=1e9, train=1e9, origin="test")
SIZES = ModelCost(parameters=1500, active=1000, hidden=10, vocabulary=50, layers=2, attention_width=8)
SAMPLER = Sampler(cost=SIZES, weight_bytes=3000.0, token_bytes=64.0, rate=1e9, bandwidth=1e6, memory=10_000.0, most=256)
PROMPTS = RoundPrompts(train=np.array([10, 10, 20, 20]), held_out=np.array([10, 10]))


def configured(tiny_llama, **rounds):
    tree = {
        "output": "runs",
        "model": {"path": str(tiny_llama)},
        "data": {"max_length": 64},
        "train": {"steps": 4, "pairs_per_step": 2},
        "rounds": {"prompts": [__file__], "rewards": [{"use": "math"}], "sample": {"n": 4, "max_tokens": 16}} | rounds,
    }
    return load_config(tree)


@pytest.fixture(scope="module", autouse=True)
def few_world_sizes():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("raydpo.estimate.plan.WORLD_SIZES", (1,))
        yield


def estimated(config, sampler=SAMPLER, **more):
    first = made_pairs(config, PROMPTS.train, 16)
    one = make_plan(config, first.sets, SIZES, SIZES, RATES, scales=first.scales, price=more.get("price"))
    how = {"engine": "vllm", "answer_tokens": 16.0, "workers": 1} | more
    return plan_rounds(config, PROMPTS, one, sampler, **how)


def test_answers_at_once_fill_the_memory():
    """9,000 bytes less 3,000 of weights, 64 a position: 93 positions are 3 answers of 31."""
    assert SAMPLER.at_once(31) == 3 and SAMPLER.at_once(1e9) == 1 and SAMPLER.at_once(0.001) == 256
    assert SAMPLER.fits and not dataclasses.replace(SAMPLER, weight_bytes=9_000.0).fits


def test_seconds_of_sampling_by_hand():
    """Two prompts of 10 tokens, 4 answers of 16 tokens each; 9,000 - 3,000 bytes hold 3 answers of 26 positions."""
    prompts = np.array([10, 10])
    read = (3000 + 3 * 64 * 18) / (1e6 * BANDWIDTH_REACHED)  # of a token of 3 answers, half way
    prefill = (20 * 2000 + 100 * 64 + 2 * 1000) / 1e9  # 10 x 10 / 2 looks a prompt
    assert SAMPLER.seconds(prompts, 4, 16.0, 1) == pytest.approx(prefill + 8 / 3 * 16 * read)
    assert SAMPLER.seconds(prompts, 4, 16.0, 2) == pytest.approx((prefill + 8 / 3 * 16 * read) / 2)
    products = (3 * 2000 + 3 * 18 * 64 + 3 * 1000) / 1e9
    fast = dataclasses.replace(SAMPLER, bandwidth=1e15)  # then the products decide
    assert fast.seconds(prompts, 4, 16.0, 1) == pytest.approx(prefill + 8 / 3 * 16 * products)
    unknown = dataclasses.replace(SAMPLER, bandwidth=None)
    assert unknown.seconds(prompts, 4, 16.0, 1) == pytest.approx(prefill + 8 / 3 * 16 * products / DECODING)
    assert SAMPLER.seconds(prompts[:0], 4, 16.0, 1) == 0.0
    pair = dataclasses.replace(SAMPLER, devices=2)  # two devices are one replica
    assert pair.seconds(prompts, 4, 16.0, 2) == SAMPLER.seconds(prompts, 4, 16.0, 1)


def test_made_pairs_are_those_of_a_round(tiny_llama):
    one = made_pairs(configured(tiny_llama), PROMPTS.train, 16)
    assert one.sets.train.num_rows == 4 and one.scales == {"round": 1.0}
    several = made_pairs(configured(tiny_llama, pairs={"choose": "all", "per_prompt": 8}), PROMPTS.train, 16)
    assert several.sets.train.num_rows == 8  # 4 answers are 2 disjoint pairs
    keys = several.sets.train["chosen_key"].to_pylist() + several.sets.train["rejected_key"].to_pylist()
    assert len(set(keys)) == 16
    large = made_pairs(configured(tiny_llama), np.full(10_000, 5), 16)
    assert large.sets.train.num_rows * large.scales["round"] == 10_000
    replayed = made_pairs(configured(tiny_llama, replay=0.5), PROMPTS.train, 16)
    assert replayed.scales == {"round": 2.0}, "as many pairs of earlier rounds"


def test_a_round_is_the_sum_of_its_parts(tiny_llama):
    config = configured(tiny_llama, count=5, measure={"n": 2, "greedy": True})
    plan = estimated(config, price=3.6e6, reward_models=[SIZES], requests=7)
    assert (plan.prompts, plan.answers, plan.held_out, plan.held_out_answers) == (4, 16, 2, 6)
    parts = plan.sampling, plan.rewards, plan.one.score, plan.one.training, plan.measuring
    assert plan.starts == STARTS["vllm"] + STARTS["trainer"] + STARTS["scorer"] * 6
    assert plan.a_round.seconds == pytest.approx(sum(part.seconds for part in parts) + plan.starts)
    assert plan.sampling.dollars == pytest.approx(1000 * plan.sampling.seconds)  # 3.6 million an hour
    read = (3 * 52 * 2000 + 3 * 2 * 26**2 / 2 * 64 + 16 * 6 * 1000) / RATES.score  # held-out answers by the reward model
    first = SAMPLER.seconds(PROMPTS.held_out, 3, 16.0, 1) + read + STARTS["vllm"] + STARTS["scorer"]
    assert plan.total.seconds == pytest.approx(5 * plan.a_round.seconds + first)
    # A reward model reads each prompt with each of its answers: 4 x (26 + 26 + 36 + 36) and 3 x (26 + 26) positions.
    positions, squares = 4 * 124 + 3 * 52, 4 * 2 * (26**2 + 36**2) + 3 * 2 * 26**2
    assert plan.rewards.flops == pytest.approx(positions * 2000 + squares / 2 * 64 + 16 * (16 + 6) * 1000)
    assert "judges: 7 requests a round" in plan.lines()
    assert any("raise train.steps" in line for line in plan.lines()) and plan.lost > 0.9


@pytest.mark.parametrize("reference", ["initial", "previous"])
def test_offline_rounds_sample_once(reference, tiny_llama):
    config, other = (configured(tiny_llama, count=count, offline=True, reference=reference) for count in (5, 1))
    plan = estimated(config, reward_models=[SIZES])
    later = plan.total.seconds - estimated(other, reward_models=[SIZES]).total.seconds
    scored = (4 * 124 * 2000 + 4 * (26**2 + 36**2) * 64 + 16 * 16 * 1000) / RATES.score  # by the reward model
    saved = plan.sampling.seconds + scored + STARTS["scorer"]
    if reference == "initial":
        saved += plan.one.score.seconds + STARTS["scorer"]
    assert later == pytest.approx(4 * (plan.a_round.seconds - saved))
    assert any("rounds.offline" in line for line in plan.lines())
    assert "judges: 9 requests in the first round" in dataclasses.replace(plan, requests=9).lines()


def test_no_drift_is_scored_where_it_is_not_measured(tiny_llama):
    cold = estimated(configured(tiny_llama, sample={"n": 4, "max_tokens": 16, "temperature": 0.7}))
    assert cold.measuring.seconds < estimated(configured(tiny_llama)).measuring.seconds
    assert cold.starts == STARTS["vllm"] + STARTS["trainer"] + STARTS["scorer"]


def test_a_measurement_that_may_end_the_rounds_has_an_engine_of_its_own(tiny_llama):
    for offline in (False, True):
        usual = estimated(configured(tiny_llama, offline=offline, count=5))
        for stop in ({"success": 0.9}, {"drift": 10.0}):
            plan = estimated(configured(tiny_llama, offline=offline, count=5, stop=stop))
            assert plan.starts == usual.starts + STARTS["vllm"]
            more = STARTS["vllm"] * (1 if offline else 5)  # offline rounds sample once
            assert plan.total.seconds == pytest.approx(usual.total.seconds + more)


def test_a_policy_that_no_device_holds_is_told(tiny_llama):
    lines = estimated(configured(tiny_llama), dataclasses.replace(SAMPLER, weight_bytes=1e6)).lines()
    assert "rounds.sample.tensor_parallel" in lines[0]
    assert not any("tensor_parallel" in line for line in estimated(configured(tiny_llama)).lines())


def test_the_whole_estimate_of_a_small_model(tiny_llama):
    config = configured(tiny_llama)
    plan = estimate_rounds(config, PROMPTS, requests=0, device="A100-80GB", price=2.0)
    assert plan.engine == "vllm" and plan.one.steps == 4 and plan.answer_tokens == 16
    shorter = estimate_rounds(config, PROMPTS, requests=0, device="A100-80GB", price=2.0, answer_tokens=4)
    assert shorter.sampling.seconds < plan.sampling.seconds and shorter.one.score.flops < plan.one.score.flops
    h100 = estimate_rounds(config, PROMPTS, requests=0, device="H100", price=2.0)
    assert h100.sampling.seconds < plan.sampling.seconds  # its memory is faster
    told = [estimate_rounds(config, PROMPTS, requests=0, **asked).decoding for asked in ({}, {"memory": 16.0})]
    assert "60% of the memory bandwidth" in told[0] and "10% of the scoring rate" in told[1]
    with pytest.raises(ConfigError, match=r"--answer-tokens is 17; expected is a length from 1 to .* \(16\)"):
        estimate_rounds(config, PROMPTS, requests=0, answer_tokens=17)
    with pytest.raises(ConfigError, match="--runs has no effect on rounds"):
        estimate_rounds(config, PROMPTS, requests=0, runs=2)
    wide = configured(tiny_llama, sample={"n": 4, "max_tokens": 16, "engine": "ray", "tensor_parallel": 4})
    with pytest.raises(ConfigError, match=r"tensor_parallel 4 needs as many GPUs, but 1 score; raise score.workers"):
        estimate_rounds(wide, PROMPTS, requests=0)
    assert estimate_rounds(wide, PROMPTS, requests=0, workers=4).sampling.gpu_hours > 0


def test_requests_to_judges_are_counted_as_rounds_ask_them(tiny_llama, monkeypatch):
    """Duels of held-out answers: samples with samples, and the greedy answer with the greedy one."""
    ids = [bytes([number]) * 16 for number in range(5)]
    rows = [{"prompt_id": one, "split": "held_out" if one in ids[:2] else "train", "prompt_ids": [1, 2]} for one in ids]
    columns = [("prompt_id", pa.binary(16)), ("split", pa.string()), ("prompt_ids", pa.list_(pa.int32()))]
    table = pa.Table.from_pylist(rows, pa.schema(columns))
    counted = []

    def estimate(config, prompts, *, requests, **asked):
        counted.append(requests)
        return types.SimpleNamespace(to_dict=dict)

    monkeypatch.setattr("raydpo.pipeline.tokenised.open_tokeniser", lambda config: None)
    monkeypatch.setattr(round_prompts, "read_prompts", lambda config, tokeniser: table)
    monkeypatch.setattr("raydpo.estimate.rounds_display.estimate_rounds", estimate)
    monkeypatch.setattr("raydpo.estimate.rounds_display.print_rounds", lambda plan, console: None)
    judge = {"judge": {"url": "http://h/v1", "model": "m"}, "opponents": 9}
    for settings in ({}, {"measure": {"greedy": False}}):
        _plan_rounds(configured(tiny_llama, rewards=[judge], **settings), None, {}, Console(io.StringIO()))
    training, sampled, greedy = 3 * 2 * 6, 2 * 2 * 16, 2 * 2
    assert counted == [training + sampled + greedy, training + sampled]
