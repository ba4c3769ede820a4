"""Training of several settings in the same Ray Train workers: a TorchTrainer around ``together.train_settings``.

Ray Train keeps the checkpoints of one run. Here each setting has a run directory, so each keeps its own, by Ray's own rules
and in Ray's own files: a setting may go on alone where it stopped among others, and the other way round.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from raydpo.config import TrackConfig, TrainConfig
from raydpo.errors import DeviceMemoryError, RaydpoError
from raydpo.ray_runtime import Resources
from raydpo.reference.identity import on_this_machine
from raydpo.storage import Storage
from raydpo.training.board import Listener
from raydpo.training.launch import (
    CHECKPOINTS,
    Payload,
    RayHooks,
    attempt,
    checkpoint_config,
    checkpoint_place,
    fit,
    log_to,
    new_board,
    ray_trainer,
)
from raydpo.training.loop import TrainJob

__all__ = ["CheckpointShelf", "launch_together"]


def launch_together(jobs: Sequence[TrainJob], runs: Sequence[tuple[str, str, TrackConfig]], pairs: Any, held_out: Any,
                    resources: Resources, *, base_name: str, tokenizer: Any, listener: Listener,
                    board: Any = None) -> list[dict[str, Any] | RaydpoError]:
    """Train all settings to the end on Ray, each continuing from the newest checkpoint in its run directory.

    Args:
        runs: run directory, name and trackers of each job.
        pairs, held_out: results of ``pairs.join_reference``, or references to them in Ray's object store.
        base_name: how exported adapters name their base model.
        listener: told (kind, (name, content)).
        board: of ``launch.new_board``, for a caller that may want the training to stop.

    Returns:
        Of each setting the summary that rank 0 made, see ``loop.TrainSummary``, or why it could not come to its end.

    Raises:
        RaydpoError: what ended all of them; everything up to the newest checkpoints is kept.
    """
    import ray

    board = board or new_board()
    pairs, held_out = (ray.put(table) if isinstance(table, pa.Table) else table for table in (pairs, held_out))
    payloads = [Payload(job=job, pairs=pairs, held_out=held_out, run_dir=storage.root if storage.is_local else run_dir,
                        run_name=name, track=track, threads=resources.threads, base_name=base_name, tokenizer=tokenizer,
                        board=board)
                for job, (run_dir, name, track) in zip(jobs, runs, strict=True) for storage in [Storage(run_dir)]]
    # Nothing is reported to it, so it writes nothing beside the first run's checkpoints.
    trainer = ray_trainer(_worker, {"payloads": payloads}, jobs[0].train, resources, payloads[0].run_dir)
    return fit(trainer, board, listener, payloads[0].run_dir)["settings"]


class CheckpointShelf:
    """The checkpoints of one run directory, kept as Ray Train's controller keeps those of a run.

    By the controller's own class: its place in Ray is not promised, but neither is the file that it writes, which only the
    same version of Ray reads.

    Args:
        run_dir: local path or URI.
    """

    def __init__(self, run_dir: str, train: TrainConfig) -> None:
        self._run_dir, self._config = run_dir, checkpoint_config(train)

    def newest(self) -> Any:
        """Ray's Checkpoint, or None."""
        result = self._manager().latest_checkpoint_result
        return None if result is None else result.checkpoint

    def register(self, checkpoint: Any, metrics: Mapping[str, float]) -> None:
        """From now on ``checkpoint`` counts; what is one too many is deleted."""
        from ray.train.v2._internal.execution.training_report import _TrainingReport

        async def register() -> None:  # it wants to wake others, in a loop
            self._manager().register_checkpoint(_TrainingReport(checkpoint, dict(metrics), validation=False))

        asyncio.run(register())

    def _manager(self) -> Any:
        from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
        from ray.train.v2._internal.execution.storage import StorageContext

        return CheckpointManager(self._config, StorageContext(self._run_dir, CHECKPOINTS))


class _SettingHooks(RayHooks):
    """The hooks of one setting: what is told carries its name, and its checkpoints lie on its own shelf."""

    def __init__(self, payload: Payload, rank: int) -> None:
        super().__init__(payload, rank)
        self.shelf = CheckpointShelf(payload.run_dir, payload.job.train)

    def register(self, step: int, metrics: Mapping[str, float], *, wait: bool) -> None:
        from ray.train import Checkpoint

        if self.rank == 0:
            self.shelf.register(Checkpoint(self.storage.path(checkpoint_place(step)), self.storage.fs),
                                {"step": step} | dict(metrics))

    def close(self) -> None:
        """Records and trackers; there are none if the setting did not begin."""
        if self.records is not None:
            self.records.close()
            self.trackers.close()

    def _tell(self, kind: str, content: Any) -> None:
        super()._tell(kind, (self.payload.run_name, content))


def _worker(config: dict[str, Any]) -> None:
    """What runs in each Ray Train worker; see ``launch._worker``."""
    payloads: list[Payload] = config["payloads"]
    attempt(payloads[0].board, payloads[0].job.train, lambda tokens_per_batch: _train(payloads, tokens_per_batch))


def _train(payloads: Sequence[Payload], tried: int | None) -> None:
    import ray
    import ray.train
    import torch
    from ray.train.torch import get_device

    from raydpo.model.selfcheck import CHECK_ROWS
    from raydpo.training.export import export_policy
    from raydpo.training.loop import TrainSummary
    from raydpo.training.pairs import TrainingPairs
    from raydpo.training.together import SettingEngine, SharedPolicy, train_settings

    policy = on_this_machine(payloads[0].job.policy)
    payloads = [dataclasses.replace(payload, job=dataclasses.replace(payload.job, policy=policy)) for payload in payloads]
    rank, first = ray.train.get_context().get_world_rank(), payloads[0]
    log_to(Storage(first.run_dir), rank)
    if first.threads is not None:
        torch.set_num_threads(first.threads)
    device = get_device()  # Ray has joined the workers; DeepSpeed, which takes seconds to import, is not needed
    pairs = TrainingPairs(ray.get(first.pairs))
    held_out = None if first.held_out is None else TrainingPairs(ray.get(first.held_out))
    hooks = [_SettingHooks(payload, rank) for payload in payloads]
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="raydpo-")))
        checkpoints = [None if found is None else Path(stack.enter_context(found.as_directory()))
                       for found in [each.shelf.newest() for each in hooks]]
        shared = SharedPolicy(first.job.policy, [payload.job.train for payload in payloads], device,
                              check_rows=pairs.groups(range(min(CHECK_ROWS, len(pairs)))))
        tokens = _tokens_of_one(first.job, len(payloads), checkpoints, tried, shared, hooks[0])

        def after(number: int, engine: SettingEngine, summary: TrainSummary) -> None:
            if not summary.interrupted:
                payload, final = payloads[number], scratch / str(number) / "final"
                export_policy(engine, payload.job.policy, payload.base_name, payload.tokenizer, final,
                              merge=payload.job.train.merge_adapter)
                if rank == 0:
                    hooks[number].storage.upload(final, "final")

        results = train_settings([dataclasses.replace(payload.job, tokens_per_batch=tokens) for payload in payloads], pairs,
                                 held_out, shared, hooks, checkpoints, scratch, after)
        for each in hooks:
            each.close()
    for result in results:
        # What may go better with new workers; they find the settings that came to their end at their end.
        if isinstance(result, DeviceMemoryError) or \
                (isinstance(result, BaseException) and not isinstance(result, RaydpoError)):
            raise result
    if rank == 0:
        ray.get(first.board.finish.remote({"settings": [result if isinstance(result, RaydpoError) else
                                                        dataclasses.asdict(result) for result in results]}))


def _tokens_of_one(job: TrainJob, settings: int, checkpoints: Sequence[Path | None], tried: int | None, shared: Any,
                   hooks: RayHooks) -> int:
    """Positions of a micro-batch of each setting, so that those of all together are ``train.tokens_per_batch``."""
    from raydpo.training.checkpoint import budget_of

    if tried is not None:
        return tried
    # As it began, whoever has come to an end since: the same micro-batches, hence the same bits.
    earlier = [budget_of(checkpoint) for checkpoint in checkpoints if checkpoint is not None]
    if earlier:
        return min(earlier)
    if job.train.tokens_per_batch != "auto":
        return max(1, job.train.tokens_per_batch // settings)
    budget = shared.find_budget(job.memory_share)
    hooks.note(budget.line())
    return budget.tokens
