"""The verb ``raydpo plan`` of a configuration with rounds: estimates them and prints tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from raydpo.config import Config, RoundsConfig
from raydpo.errors import ConfigError
from raydpo.estimate.cards import BANDWIDTH, MEMORY
from raydpo.estimate.display import DEVICE, plan_run, print_memory, stage_row
from raydpo.estimate.plan import Rates, Stage
from raydpo.estimate.rounds import MOST_AT_ONCE, RoundPrompts, RoundsPlan, Sampler, made_pairs, plan_rounds
from raydpo.model.cost import ModelCost
from raydpo.model.files import model_files
from raydpo.model.memory.anatomy import model_cost
from raydpo.model.memory.scoring import Choice
from raydpo.reference.identity import resolve_model
from raydpo.terminal.console import Console

__all__ = ["estimate_rounds", "print_rounds"]

WIDTH = {"float32": 4.0, "bfloat16": 2.0, "auto": 2.0}
"""Bytes of a weight, by ``model.dtype``."""
QUANTIZED = {"8bit": 1.0, "4bit": 0.5}
"""Bytes of a weight, by ``model.quantization``."""


def estimate_rounds(
    config: Config, prompts: RoundPrompts, *, requests: int, answer_tokens: float | None = None, **asked: Any
) -> RoundsPlan:
    """Estimate all rounds of ``config``.

    Args:
        requests: to judges, of one round with its measurement.
        answer_tokens: mean length of an answer; None = rounds.sample.max_tokens, which is the most.
        asked: the arguments of ``display.plan_run``.

    Raises:
        ConfigError: if an argument is out of range, a device is unknown, or there are too few for a replica.
    """
    rounds = config.rounds
    assert rounds is not None
    if asked.pop("runs", None) is not None:
        raise ConfigError("--runs has no effect on rounds; rounds.count is their number")
    tokens = float(rounds.sample.max_tokens if answer_tokens is None else answer_tokens)
    if not 1 <= tokens <= rounds.sample.max_tokens:
        raise ConfigError(
            f"--answer-tokens is {tokens:g}; expected is a length from 1 to rounds.sample.max_tokens "
            f"({rounds.sample.max_tokens})"
        )
    first = made_pairs(config, prompts.train[: rounds.per_round], max(1, round(tokens)))
    one = dataclasses.replace(plan_run(config, first.sets, first=first, **asked), tokenising=None, first=None)
    if rounds.sample.tensor_parallel > one.score_workers:
        raise ConfigError(
            f"rounds.sample.tensor_parallel {rounds.sample.tensor_parallel} needs as many GPUs, but {one.score_workers} "
            "score; raise score.workers, or --workers"
        )
    engine = _engine(rounds, config)
    models = [resolve_model(each.reward_model) for each in rounds.rewards if each.reward_model is not None]
    return plan_rounds(
        config,
        prompts,
        one,
        _sampler(config, one.rates, engine, asked.get("device"), asked.get("memory")),
        engine=engine,
        answer_tokens=tokens,
        workers=one.score_workers,
        price=asked.get("price"),
        reward_models=[model_cost(path, config.model.trust_remote_code) for path in models],
        requests=requests,
    )


def _engine(rounds: RoundsConfig, config: Config) -> str:
    """The engine that samples: for auto that of a machine with GPUs, unless the workers are to have none."""
    if rounds.sample.engine != "auto":
        return rounds.sample.engine
    return "transformers" if config.score.gpus_per_worker == 0 or config.model.quantization else "vllm"


def _sampler(config: Config, rates: Rates, engine: str, device: str | None, memory: float | None) -> Sampler:
    assert config.rounds is not None
    model, sample = config.model, config.rounds.sample
    path, trusted = resolve_model(model.path), model.trust_remote_code
    cost: ModelCost = model_cost(path, trusted)
    settings: Mapping[str, Any] = model_files(path, trusted).config
    text = settings.get("text_config") or settings
    heads = text.get("num_attention_heads") or text.get("n_head") or 1
    key_width = cost.attention_width / heads * (text.get("num_key_value_heads") or heads)
    width = WIDTH[model.dtype]
    known = device or (DEVICE if memory is None and not rates.origin.startswith("measured") else None)
    devices = sample.tensor_parallel
    return Sampler(
        cost=cost,
        weight_bytes=cost.parameters * QUANTIZED.get(model.quantization or "", width),
        token_bytes=2 * cost.layers * key_width * width,
        rate=rates.score * devices,
        bandwidth=None if known is None else BANDWIDTH[known] * devices,
        memory=(MEMORY[known or DEVICE] if memory is None else memory) * 2.0**30 * devices,
        most=sample.batch if engine == "transformers" else MOST_AT_ONCE,
        devices=devices,
    )


def print_rounds(plan: RoundsPlan, console: Console) -> None:
    """Print the estimate as lines and tables."""
    one = plan.one
    console.say(
        f"a round: {plan.prompts:,} prompts, {plan.answers:,} answers, {one.steps:,} steps of "
        f"{one.data['pairs_per_step']:,} pairs; measured on {plan.held_out:,} prompts with {plan.held_out_answers:,} answers"
    )
    console.say(f"sampling: {plan.engine}, {plan.at_once:,} answers at once on a replica")
    console.say(
        f"rate of a device: {one.rates.score / 1e12:.4g} TFLOP/s scoring, {one.rates.train / 1e12:.4g} training "
        f"({one.rates.origin}). {plan.decoding}"
    )
    for line in one.rates.warnings:
        console.say(f"warning: {line}")
    workers = one.score_workers
    hours = workers * plan.starts / 3600
    dollars = None if plan.total.dollars is None else _price(plan) * hours
    starts = Stage(flops=0.0, seconds=plan.starts, gpu_hours=hours, dollars=dollars)
    rows = [
        stage_row("sampling", workers, plan.sampling),
        stage_row("reward models", workers, plan.rewards),
        stage_row("reference pass", workers, one.score),
        stage_row("training", one.train_workers, one.training),
        stage_row("measurement", workers, plan.measuring),
        stage_row("starts", workers, starts),
        stage_row("one round", "", plan.a_round),
        stage_row(f"{plan.rounds:,} round(s)", "", plan.total),
    ]
    console.table("estimate", ("part", "GPUs", "PFLOP", "time", "GPU hours", "dollars"), rows)
    console.say("reward functions run on CPUs beside this; their time is not known")
    if one.reference is not None:
        console.say(one.reference.line if isinstance(one.reference, Choice) else one.reference)
    if one.memory is not None:
        print_memory(one.memory, console)
    for line in plan.lines():
        console.say(line)


def _price(plan: RoundsPlan) -> float:
    """Dollars of a GPU hour."""
    return (plan.total.dollars or 0.0) / plan.total.gpu_hours if plan.total.gpu_hours else 0.0
