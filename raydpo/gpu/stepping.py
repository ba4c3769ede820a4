"""Policies of random weights inside DeepSpeed, and their optimizer steps, alone in this process."""

from __future__ import annotations

import gc
import importlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from raydpo.config import LoraSettings, TrainConfig
from raydpo.data.plan import BatchPlan
from raydpo.gpu.figures import Skip
from raydpo.gpu.world import World
from raydpo.losses import Objective, ObjectiveState
from raydpo.model.layout import PromptGroup
from raydpo.model.partition import join_process_group
from raydpo.training.clock import StepClock
from raydpo.training.pairs import TrainingPairs
from raydpo.training.policy.deepspeed_engine import PolicyEngine
from raydpo.training.policy.engine import PolicySpec
from raydpo.training.step import Stepper

__all__ = ["RandomPolicy", "make_stepper", "needs", "policy", "reference_pairs"]

LORA = LoraSettings(r=16)


def needs(*packages: str) -> None:
    """Skip the block if one of ``packages``, or what it imports, is not installed.

    Raises:
        Skip: naming those that are not.
    """
    lacking = []
    for name in packages:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            lacking.append(error.name or name)
    if lacking:
        raise Skip(f"no {' and no '.join(lacking)}")


class RandomPolicy(PolicyEngine):
    """A ``PolicyEngine`` that trains a model which was made here, not loaded.

    Args:
        model: the causal LM, or None to load the model at ``spec.path``.
    """

    def __init__(self, model: nn.Module | None, spec: PolicySpec, train: TrainConfig, device: torch.device) -> None:
        self._made = model
        super().__init__(spec, train, device)

    def _load(self, spec: PolicySpec, note: Callable[[str], None]) -> nn.Module:
        made, self._made = self._made, None
        return super()._load(spec, note) if made is None else made


@contextmanager
def policy(
    world: World,
    train: TrainConfig,
    *,
    layers: int | None = None,
    vocabulary: int | None = None,
    lora: bool = False,
    quantization: str | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[RandomPolicy]:
    """A policy of the world's shape in training mode, whose memory is freed at the end of the block.

    Args:
        layers: None = ``few``, as of the files.
        vocabulary: None = the small one, as of the files.
        quantization: load the files of ``world.files`` quantized, with ``few`` layers and the small vocabulary.

    Raises:
        Skip: if DeepSpeed, or what ``quantization`` needs, is not installed.
    """
    needs("deepspeed", "pyarrow", *(["peft"] if lora else []), *(["bitsandbytes"] if quantization else []))
    _join(world.device)
    shape, precision = world.shape, dtype or world.dtype
    model = None
    if quantization is None:
        wanted = {"vocabulary": vocabulary or shape.small_vocabulary, "dtype": precision}
        model = world.model(layers or shape.few, **wanted)
    spec = PolicySpec(
        path=str(world.files) if model is None else "",
        dtype=str(precision).removeprefix("torch."),
        lora=LORA if lora else None,
        quantization=quantization,
        # Checks of a layout are remembered for the rest of the check, in its own folder.
        identity=f"{shape.name} {layers} {vocabulary} {precision} {quantization}",
    )
    engine = RandomPolicy(model, spec, train, world.device)
    del model
    try:
        yield engine
    finally:
        engine.engine.destroy()
        vars(engine).clear()  # a caller's variable keeps the object, not its tensors
        gc.collect()
        if world.cuda:
            torch.cuda.empty_cache()


def reference_pairs(groups: Sequence[PromptGroup], logps: Sequence[Sequence[np.ndarray]] | None = None) -> TrainingPairs:
    """Pairs to train on.

    Args:
        logps: of the reference, for each token of chosen and rejected; None = -5 nats each, near those of random weights.
    """
    import pyarrow as pa

    def lists(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
        return pa.array(list(values), pa.list_(kind))

    if logps is None:
        logps = [[np.full(len(one), -5.0, np.float32) for one in group.completions] for group in groups]
    columns = {
        "pair_id": pa.array([f"random:{number}" for number in range(len(groups))]),
        "source": pa.array(["random"] * len(groups)),
        "weight": pa.array([1.0] * len(groups)),
        "prompt_ids": lists([group.prompt for group in groups], pa.int32()),
    }
    for side, name in enumerate(("chosen", "rejected")):
        columns[f"{name}_ids"] = lists([group.completions[side] for group in groups], pa.int32())
        columns[f"ref_{name}_logps"] = lists([one[side] for one in logps], pa.float32())
    return TrainingPairs.of(pa.table(columns))


def make_stepper(engine: RandomPolicy, train: TrainConfig, pairs: TrainingPairs, tokens_per_batch: int) -> Stepper:
    """The steps of ``train`` over ``pairs``, in their order."""
    plan = BatchPlan(
        pairs.shapes_of,
        pairs.sources,
        pairs.weights,
        seed=train.seed,
        pairs_per_step=train.pairs_per_step,
        tokens_per_batch=tokens_per_batch,
        world_size=1,
        shuffle=False,
        epochs=train.epochs,
        steps=train.steps,
        layout=engine.module.method.layout,
    )
    return Stepper(train, plan, pairs, engine, Objective(train), StepClock(engine.device), ObjectiveState())


def _join(device: torch.device) -> None:
    """Be the only rank of a process group."""
    if dist.is_initialized():
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(alone)  # a launcher may have left others
    join_process_group(device)
