"""Protocols of the object that holds the policy: ``StepEngine`` for one optimizer step, ``Engine`` for a whole run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from raydpo.config import LoraSettings
from raydpo.model.budget import Budget
from raydpo.model.layout import Layout, PromptGroup
from raydpo.model.logps import LogpModel
from raydpo.model.selfcheck import Wish
from raydpo.storage.local_copy import RemoteDirectory
from raydpo.training.policy.state import TrainedState

__all__ = ["Engine", "PolicySpec", "StepEngine"]


class StepEngine(Protocol):
    """A trainable policy on one rank, as far as one optimizer step needs it.

    Ranks that compute each micro-batch together (``sequence_parallel`` of them) form a replica; every replica has
    micro-batches of its own. Shapes: N = completion tokens of a micro-batch.
    """

    @property
    def device(self) -> torch.device: ...

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def replica(self) -> int:
        """Number of the replica that this rank belongs to."""
        ...

    @property
    def replicas(self) -> int: ...

    @property
    def sequence_parallel(self) -> int:
        """Ranks of a replica."""
        ...

    @property
    def is_leader(self) -> bool:
        """Whether this rank counts the pairs of its replica."""
        ...

    @property
    def module(self) -> LogpModel: ...

    def lay_out(self, groups: Sequence[PromptGroup]) -> Layout:
        """Lay out a micro-batch on the CPU. May run in another thread than the one that computes."""
        ...

    def logps(self, layout: Layout, *, log_sum_sq: bool = False, router_loss: bool = False) -> Tensor | tuple[Tensor, ...]:
        """float32 log-probs [N], with gradient in training mode; if they are asked for, also what ``LogpModel`` returns
        beside them."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this rank's share of the step's mean loss. ``last``: it is the step's last micro-batch."""
        ...

    def step(self, learning_rate: float) -> float:
        """Clip and apply the gradients. Returns their norm before clipping; one that is not finite changes nothing."""
        ...

    def evaluating(self) -> AbstractContextManager[None]:
        """Compute without gradients and in evaluation mode within the block."""
        ...

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        ...

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum ``values`` over all ranks, in place."""
        ...

    def gather_objects(self, value: Any) -> list[Any]:
        """``value`` of every rank, in order of ranks."""
        ...


class Engine(StepEngine, Protocol):
    """A trainable policy on one rank, with all that a run needs: memory, checkpoints, samples, export."""

    @property
    def zero(self) -> int:
        """ZeRO stage."""
        ...

    @property
    def adapts(self) -> bool:
        """Whether adapters train, not the model's own weights."""
        ...

    @property
    def layout_line(self) -> str:
        """The layout that was chosen, and why, in one line for the log."""
        ...

    @property
    def adapters_line(self) -> str | None:
        """Parts of a mixture of experts that have adapters; None for other models, and without adapters."""
        ...

    @property
    def load_seconds(self) -> float:
        """Seconds until the slowest rank had loaded the model."""
        ...

    @property
    def load_bytes(self) -> float:
        """Peak host memory while loading, of the rank with the highest peak."""
        ...

    @property
    def state(self) -> TrainedState:
        """Weights and optimizer state, to be written to a checkpoint or read from one."""
        ...

    def find_budget(self, share: float = 1.0) -> Budget:
        """Measure how many token positions of a micro-batch fit into ``share`` of a device's memory; equal on all ranks."""
        ...

    def gather(self) -> dict[str, Tensor]:
        """The trained weights on the CPU of rank 0, elsewhere an empty dict. All ranks must call it."""
        ...

    def load_whole_models(self) -> None:
        """Stop partitioning the models that transformers loads in this process from here on."""
        ...


@dataclass(frozen=True, kw_only=True)
class PolicySpec:
    """The policy before training.

    Attributes:
        path: local directory of the model.
        dtype: ``float32`` or ``bfloat16``.
        lora: settings of new adapters to train, or None.
        adapter: directory of an adapter to train further, or None; neither = full fine-tuning.
        quantization, freeze: see ``config.ModelConfig``.
        identity: digest of the identity of model and ``adapter``, at the precision of training. Machines remember checks
            under it; with None they remember nothing.
        rope_length: of its identity, see ``model.rotary``.
        layout, fused: as in ``config.ModelConfig``.
        origin: remote directory that the adapter, or without one the model, was copied from; None if every machine has it.
    """

    path: str
    dtype: str
    lora: LoraSettings | None
    adapter: str | None = None
    quantization: str | None = None
    freeze: tuple[str, ...] = ()
    rope_length: int | None = None
    trust_remote_code: bool = False
    layout: Wish = "auto"
    fused: bool = False
    identity: str | None = None
    origin: RemoteDirectory | None = None

    @property
    def adapts(self) -> bool:
        """Whether adapters train, not the model's own weights."""
        return self.lora is not None or self.adapter is not None
