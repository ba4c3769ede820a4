"""Input of a training, and the summary that it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raydpo.config import TrainConfig
from raydpo.config.objective import BetaSchedule
from raydpo.data.shapes import POSITIONS_ONLY, PositionCost
from raydpo.training.policy.engine import PolicySpec

__all__ = ["SCHEDULE_STEPS", "Continued", "TrainJob", "TrainSummary"]

SCHEDULE_STEPS = "rounds: steps of the schedule"
"""The key of a fingerprint with the steps of a schedule over all rounds."""


@dataclass(frozen=True, kw_only=True)
class Continued:
    """What a training takes over from those of the rounds before it.

    Attributes:
        name: of the training, for people: the name of the rounds and the number of this one.
        begins_as: the policy that it begins with, in words, such as "the policy of round 1".
        compared: what is known of the cached log-probs where the gate cannot compare them, as a sentence without full stop.
        position: steps that earlier rounds took on the same pairs. Their order goes on from there.
        first, total: steps of the schedule before this training, and all of its steps; ``total`` None = its own schedule.
        checkpoint: folder, at a local path or URI, of the checkpoint with the weights and moments to begin with; None = new
            moments.
    """

    name: str
    begins_as: str
    compared: str = ""
    position: int = 0
    first: int = 0
    total: int | None = None
    checkpoint: str | None = None

    def deciding(self, train: TrainConfig) -> dict[str, Any]:
        """What of it the trained policy depends on, by name; without the length of a schedule on which no step depends."""
        found: dict[str, Any] = {"rounds: steps before on the same pairs": self.position} if self.position else {}
        if self.total is not None:
            found |= {"rounds.optimizer": "carry", "rounds: steps before in the schedule": self.first}
            if train.schedule != "constant" or 0 < train.warmup < 1 or isinstance(train.beta, BetaSchedule):
                found[SCHEDULE_STEPS] = self.total
        return found


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """A training to be done.

    Attributes:
        train: section ``train`` of the configuration.
        shuffle: ``data.shuffle``.
        policy: the policy before the first step.
        reference_identity: digest of the identity of the cached log-probs.
        starts_as_reference: whether both are the same function up to rounding.
        coarser_dtype: the coarser of the two precisions.
        reference_fused: whether fused functions computed the cached log-probs; empty if not known, or in another precision.
        fingerprint: everything that the result depends on, by name. Checkpoints with another fingerprint are refused.
        work: cost of a position, of an attended key and of a predicted token, to balance ranks.
        tokens_per_batch: replaces ``train.tokens_per_batch`` after that ran out of memory.
        memory_share: fraction of the device's memory that one worker may use.
        stop_after: stop with a checkpoint after this step; None = train to the end.
        sample_prompts: (text to show, token ids) of the prompts to answer before and after training.
        sample_stop: ids of the tokens that end such an answer.
        continued: what it takes over from earlier rounds; None = nothing.
    """

    train: TrainConfig
    shuffle: bool
    policy: PolicySpec
    reference_identity: str
    starts_as_reference: bool
    coarser_dtype: str
    fingerprint: Mapping[str, Any]
    reference_fused: frozenset[bool] = frozenset()
    work: PositionCost = POSITIONS_ONLY
    tokens_per_batch: int | None = None
    memory_share: float = 1.0
    stop_after: int | None = None
    sample_prompts: tuple[tuple[str, np.ndarray], ...] = ()
    sample_stop: tuple[int, ...] = ()
    continued: Continued | None = None


@dataclass
class TrainSummary:
    """Progress of a training; stored in its checkpoints.

    Attributes:
        steps, pairs: finished steps, and the pairs in them.
        seconds: wall time from the first step on, with evaluations and checkpoints, over all sessions.
        step_seconds: time of the steps alone, the sum of column ``seconds`` of metrics.parquet.
        tokens_per_second: tokens of all steps by ``step_seconds``.
        load_seconds, load_bytes: see ``engine.Engine``; of the newest session.
        interrupted: whether training was stopped before its last step.
        skipped: steps not taken because a loss or gradient was not finite.
        checkpoint_seconds: time during which training waited for checkpoints.
        checkpoint_bytes: size of the newest checkpoint, over all workers.
        scores: the newest evaluation.
        warned: kinds of warnings given so far.
        memory: fields of ``losses.ObjectiveState``.
    """

    steps: int = 0
    pairs: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    tokens_per_second: float = 0.0
    tokens_per_batch: int = 0
    gate: str | None = None
    load_seconds: float = 0.0
    load_bytes: float = 0.0
    interrupted: bool = False
    skipped: int = 0
    skipped_in_a_row: int = 0
    checkpoint_seconds: float = 0.0
    checkpoint_bytes: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    warned: list[str] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)
    samples_before: list[list[int]] = field(default_factory=list)
    samples_after: list[list[int]] = field(default_factory=list)
