"""Floating point operations per second of a device: stated as a share of its peak, or measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pyarrow as pa
import torch

from raydpo.cluster.nodes import usable_cores
from raydpo.cluster.resources import bfloat16_is_faster
from raydpo.config import Config
from raydpo.data.plan import fill_batches
from raydpo.data.simulate import amounts
from raydpo.errors import ConfigError
from raydpo.estimate.cards import DEVICES
from raydpo.estimate.plan import Rates, operations, training_factors
from raydpo.estimate.work import pair_groups
from raydpo.model.budget import MOST_TRAINED, find_budget, probe_group
from raydpo.model.cost import ModelCost
from raydpo.model.files import model_files
from raydpo.model.fused import fuse_layers
from raydpo.model.load import add_lora, load_causal_lm
from raydpo.model.logps import LogpModel
from raydpo.model.memory.anatomy import Anatomy
from raydpo.model.memory.needs import needs_of
from raydpo.model.partition import Partition
from raydpo.model.rotary import rope_length
from raydpo.model.selfcheck import choose_layout
from raydpo.reference.identity import identify, resolve_model
from raydpo.reference.score import ReferenceSpec, Scorer
from raydpo.reference.team import TeamScorer, open_scorer

__all__ = ["measured_rates", "stated_rates"]


def stated_rates(device: str = "H100", mfu_score: float = 0.45, mfu_train: float = 0.35) -> Rates:
    """Rates of a device that is not on this machine.

    Args:
        device: one of ``cards.DEVICES``.
        mfu_score, mfu_train: share of the device's peak that a forward pass and a training step reach.

    Raises:
        ConfigError: if the device is unknown, or a share is not above 0 and at most 1.
    """
    if device not in DEVICES:
        raise ConfigError(
            f"--device {device!r} is not known; name one of {', '.join(DEVICES)}, or measure on this machine with --measure"
        )
    for name, share in (("--mfu-score", mfu_score), ("--mfu-train", mfu_train)):
        if not 0 < share <= 1:
            raise ConfigError(f"{name} is {share:g}; a share of the device's peak is expected, above 0 and at most 1")
    peak = DEVICES[device] * 1e12
    return Rates(
        score=peak * mfu_score,
        train=peak * mfu_train,
        origin=f"{device}, {DEVICES[device]:g} TFLOP/s at an "
        f"assumed MFU of {mfu_score:g} scoring and {mfu_train:g} training",
    )


def measured_rates(config: Config, sample: pa.Table, model: ModelCost, reference: ModelCost) -> Rates:
    """Rates of this machine's GPU or CPU: the reference's forward pass, and the policy's forward and backward pass.

    Each computes the pairs of ``sample`` (``data.pairs.PAIR_SCHEMA``) twice; the second time is measured. The optimizer's
    step and other devices are not included.

    Args:
        model, reference: sizes of the two models.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    native = "bfloat16" if device.type == "cuda" or bfloat16_is_faster() else "float32"
    dtype = native if config.model.dtype == "auto" else config.model.dtype
    score_dtype = {None: dtype, "auto": native}.get(config.score.dtype, config.score.dtype)
    groups, shapes = pair_groups(sample)

    def seconds(run: Callable[[], object]) -> float:
        run()
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        return time.perf_counter() - start

    wish = config.score
    partition = Partition(
        1 if wish.partition == "auto" else wish.partition, None if wish.offload == "auto" else wish.offload
    )
    scorer = _scorer(config, score_dtype, device.type, partition)
    layout = scorer.layout
    batches = fill_batches(range(len(groups)), shapes, scorer.tokens_per_batch, layout)
    score = operations(amounts(batches, shapes, layout), reference) / seconds(partial(scorer.score, groups)) / partition.size
    scorer.close()
    del scorer  # frees its memory for the policy
    policy, budget = _policy(config, dtype, device)
    layout = policy.method.layout
    batches = fill_batches(range(len(groups)), shapes, budget, layout)

    def train() -> None:
        for batch in batches:
            policy(policy.lay_out([groups[item] for item in batch]).to(device)).sum().backward()

    computed = operations(amounts(batches, shapes, layout), model, training_factors(config.train, config.model.adapts))
    rate = computed / seconds(train)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"this CPU, {torch.get_num_threads()} threads"
    return Rates(
        score=score,
        train=rate,
        origin=f"measured on {name}: {len(groups)} pairs, {layout} layout, {score_dtype} scoring and {dtype} training",
    )


def _scorer(config: Config, dtype: str, device: Any, partition: Partition) -> Scorer | TeamScorer:
    path = resolve_model(config.reference_path)
    adapter = config.reference_adapter and resolve_model(config.reference_adapter)
    quantization = config.reference_quantization
    trust = config.model.trust_remote_code
    identity = identify(path, dtype, adapter, quantization, trust, max_length=config.data.max_length)
    loaded = {"path": path, "adapter": adapter, "quantization": quantization, "trust_remote_code": trust}
    spec = ReferenceSpec(**loaded, identity=identity, layout=config.model.layout, fused=config.model.fused)
    threads = max(1, usable_cores() // partition.size) if device == "cpu" else None
    how = {"device": device, "partition": partition, "threads": threads}
    return open_scorer(spec, tokens_per_batch=config.score.tokens_per_batch, **how)


def _policy(config: Config, dtype: str, device: torch.device) -> tuple[LogpModel, int]:
    """The policy in training mode, without DeepSpeed, and the token positions of its micro-batches."""
    adapter = config.model.adapter and resolve_model(config.model.adapter)
    path = resolve_model(config.model.path)
    causal_lm = load_causal_lm(
        path,
        dtype,
        device=device,
        adapter=adapter,
        train_adapter=True,
        quantization=config.model.quantization,
        rope_length=rope_length(model_files(path).config, config.data.max_length),
        trust_remote_code=config.model.trust_remote_code,
    )
    policy = LogpModel(causal_lm if config.model.lora is None else add_lora(causal_lm, config.model.lora, config.train.seed))
    choose_layout(policy, device, config.model.layout)
    if config.model.fused:
        fuse_layers(policy, device)
    if config.train.gradient_checkpointing:
        policy.recompute_layers()
    policy.train()

    def probe(tokens: int) -> object:
        return policy(policy.lay_out([probe_group(tokens, policy.vocabulary)]).to(device))

    if config.train.tokens_per_batch != "auto":
        return policy, config.train.tokens_per_batch
    train = config.train.model_copy(update={"zero": 0, "router_aux_loss_coef": 0.0})
    how = {"workers": 1, "dtype": dtype, "device": device.type, "updates": False}
    needs = needs_of(Anatomy.of_loaded(policy.causal_lm), config.model, train, **how)
    return policy, find_budget(probe, device, most=MOST_TRAINED, needs=needs).tokens


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
