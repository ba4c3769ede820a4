"""Training on Ray: a TorchTrainer around ``trainer.train_policy``, with checkpoints that survive the workers."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raydpo.cluster.actors import original_error
from raydpo.cluster.nodes import usable_cores
from raydpo.cluster.resources import Resources
from raydpo.cluster.session import owns_ray
from raydpo.config import TrainConfig, lower_is_better
from raydpo.errors import DeviceMemoryError, RaydpoError
from raydpo.reference.identity import on_this_machine
from raydpo.rundir.directory import CHECKPOINTS, FINAL, SCRATCH
from raydpo.storage.files import Storage
from raydpo.terminal.interrupt import interruptible
from raydpo.terminal.phases import collect_rarely
from raydpo.training.launch.board import Listener, listening, start_mailbox
from raydpo.training.launch.hooks import RayHooks, WorkerInput, log_to

__all__ = ["launch"]

RESIZE_SECONDS = 30.0
"""Seconds between checks for new machines, if the number of workers may vary."""


def launch(
    payload: WorkerInput, resources: Resources, listener: Listener, say: Callable[[str], object]
) -> tuple[dict[str, Any], bool]:
    """Train to the end on Ray, continuing from the newest checkpoint in the run directory if there is one.

    Args:
        say: called with a line when the user asks to stop.

    Returns:
        The summary that rank 0 made: the fields of ``job.TrainSummary``; and whether the user asked to stop. The training
        may be at its end all the same, if that was during the last step.

    Raises:
        RaydpoError: what the workers raised; everything up to the newest checkpoint is kept.
    """
    storage, board = Storage(payload.run_dir), payload.board or start_mailbox()
    run_dir = storage.root if storage.is_local else payload.run_dir
    payload = dataclasses.replace(payload, board=board, threads=resources.threads, run_dir=run_dir)
    trainer = _ray_trainer(_worker, {"payload": payload}, payload.job.train, resources, payload.run_dir)
    return _fit(trainer, board, listener, say, payload.run_dir)


def _fit(
    trainer: Any, board: Any, listener: Listener, say: Callable[[str], object], run_dir: str
) -> tuple[dict[str, Any], bool]:
    """Run ``trainer`` to its end. Returns as ``launch``, or raises what the workers raised."""
    import ray

    with listening(board, listener):
        try:
            asked = interruptible(trainer.fit, on_first=lambda: board.stop.remote(), say=say)
        except Exception as error:
            raise ray.get(board.error.remote()) or original_error(error, "training") from error
    error, summary = ray.get([board.error.remote(), board.summary.remote()])
    if error is not None:
        raise error
    if summary is None:
        raise RaydpoError(f"training ended without a result; see the logs in {Storage(run_dir)}/logs")
    return summary, asked


def _ray_trainer(
    worker: Callable[[dict[str, Any]], None], given: dict[str, Any], train: TrainConfig, resources: Resources, run_dir: str
) -> Any:
    """Make a TorchTrainer that calls ``worker(given)`` on every worker, and restarts them as often as ``train`` allows."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # reports wait for the controller's next check
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1800")  # an autoscaler may need many minutes
    # A frozen process never answers, and Ray's barriers have no timeout.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = f"{train.collective_timeout:g}"
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    # Each of Ray Train's helpers is a process, which takes a CPU second to start. Workers map the pairs from files, so there
    # is no data set to divide. A Ray of our own ends with the driver, so that no worker outlives its controller.
    unused = {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if owns_ray() else set())
    on_gpus, varies = resources.device == "cuda", resources.fewest not in (None, resources.workers)
    base = TorchTrainer
    if owns_ray() and not varies:
        # It is made of private classes, which another release of Ray may not have. Without it more processes are started.
        with contextlib.suppress(ImportError):
            from raydpo.training.launch.local import LocalTrainer as base

    class Trainer(base):
        def _create_default_callbacks(self) -> list[Any]:
            return [one for one in super()._create_default_callbacks() if type(one).__name__ not in unused]

    return Trainer(
        worker,
        train_loop_config=given,
        torch_config=TorchConfig(backend="nccl" if on_gpus else "gloo", timeout_s=max(1, round(train.collective_timeout))),
        scaling_config=ScalingConfig(
            num_workers=(resources.fewest, resources.workers) if varies else resources.workers,
            use_gpu=on_gpus,
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            accelerator_type=resources.accelerator,
            label_selector=dict(resources.labels) or None,
            resources_per_worker={"CPU": 1} | ({"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {}),
        ),
        run_config=RunConfig(
            name=CHECKPOINTS,
            worker_runtime_env={"env_vars": resources.environment} if resources.environment else None,
            storage_path=run_dir,
            failure_config=FailureConfig(max_failures=train.max_failures, max_preemption_failures=train.max_preemptions),
            checkpoint_config=_checkpoint_config(train),
        ),
    )


def _checkpoint_config(train: TrainConfig) -> Any:
    """Which checkpoints to keep, as Ray's CheckpointConfig."""
    from ray.train import CheckpointConfig

    return CheckpointConfig(
        num_to_keep=train.keep_checkpoints,
        checkpoint_score_attribute=train.keep_best,
        checkpoint_score_order="min" if train.keep_best and lower_is_better(train.keep_best) else "max",
    )


def _attempt(board: Any, train: TrainConfig, work: Callable[[int | None], None]) -> None:
    """Call ``work`` in one worker, with the positions of a micro-batch if the configured number did not fit, else None.

    Ray Train restarts workers after any error. If the error would only repeat, the restarted workers do nothing. The
    error must still be raised, since the other workers wait for this one until Ray ends them.
    """
    import ray
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    # Rank 0 asks, and all do the same.
    first = ray.train.get_context().get_world_rank() == 0
    entered = broadcast_from_rank_zero(ray.get(board.enter.remote()) if first else None)
    if entered is None:
        return
    number, tokens_per_batch = entered
    try:
        work(tokens_per_batch)
    except DeviceMemoryError as error:
        # Some ranks have added part of the gradients: only new workers, from the last checkpoint, are certain to be right.
        if not train.max_failures or not ray.get(board.back_off.remote(error.tokens, number)):
            ray.get(board.fail.remote(error))
        raise
    except RaydpoError as error:
        ray.get(board.fail.remote(error))
        raise


def _worker(config: dict[str, Any]) -> None:
    payload: WorkerInput = config["payload"]
    _attempt(payload.board, payload.job.train, lambda tokens_per_batch: _train(payload, tokens_per_batch))


def _train(payload: WorkerInput, tokens_per_batch: int | None) -> None:
    import ray
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    hooks = RayHooks(payload, rank)
    hooks.phase("training: imports")
    collect_rarely()
    import torch
    from ray.train.torch import get_device

    from raydpo.model.partition import join_process_group
    from raydpo.model.selfcheck import CHECK_ROWS
    from raydpo.training.checkpoint.saver import full_disk_told
    from raydpo.training.policy.deepspeed_engine import PolicyEngine
    from raydpo.training.policy.export import export_policy
    from raydpo.training.trainer import train_policy

    job = dataclasses.replace(payload.job, policy=on_this_machine(payload.job.policy), tokens_per_batch=tokens_per_batch)
    storage = Storage(payload.run_dir)
    log_to(storage, rank)
    workers_here = ray.train.get_context().get_local_world_size()
    torch.set_num_threads(payload.threads or max(1, usable_cores() // workers_here))
    device = get_device()
    join_process_group(device)
    hooks.phase("loading and checking the policy")
    pairs = payload.pairs.open()
    check_rows = pairs.groups(range(min(CHECK_ROWS, len(pairs))))
    engine = PolicyEngine(job.policy, job.train, device, check_rows=check_rows, note=hooks.note)
    held_out = None if payload.held_out is None else payload.held_out.open()
    checkpoint, earlier = ray.train.get_checkpoint(), None
    if checkpoint is None and job.continued is not None and job.continued.checkpoint is not None:
        earlier = Storage(job.continued.checkpoint)
        earlier = ray.train.Checkpoint(earlier.path(), earlier.fs)
    with (
        _scratch(storage, rank, engine.world_size) as scratch,
        _directory(checkpoint) as directory,
        _directory(earlier) as before,
    ):
        summary = train_policy(job, pairs, held_out, engine, hooks, directory, scratch, before)
        final = scratch / "final"
        if not summary.interrupted:
            names, merge = (payload.base_name, payload.tokenizer), job.train.merge_adapter
            with full_disk_told(scratch):
                export_policy(engine, job.policy, *names, final, merge=merge, rows=check_rows, note=hooks.note)
                if rank == 0:
                    storage.upload(final, FINAL)
        if rank == 0:
            hooks.records.close()
            hooks.trackers.close()
            ray.get(payload.board.finish.remote(dataclasses.asdict(summary)))


@contextlib.contextmanager
def _directory(checkpoint: Any | None) -> Iterator[Path | None]:
    """The files of a checkpoint of Ray Train on this machine, within the block."""
    with checkpoint.as_directory() if checkpoint else contextlib.nullcontext() as directory:
        yield None if directory is None else Path(directory)


@contextlib.contextmanager
def _scratch(storage: Storage, rank: int, world_size: int) -> Iterator[Path]:
    """Make a directory of this worker, in which checkpoints are written before they are stored. It ends with the block.

    If the run directory is local, it is in there, so that files are only renamed. Those of killed workers are removed.
    """
    if not storage.is_local:
        with tempfile.TemporaryDirectory(prefix="raydpo-") as place:
            yield Path(place)
        return
    root = Path(storage.path(SCRATCH))
    for old in range(rank, max([int(path.name) for path in root.glob("[0-9]*")], default=-1) + 1, world_size):
        shutil.rmtree(root / f"{old:05d}", ignore_errors=True)
    place = root / f"{rank:05d}"
    place.mkdir(parents=True, exist_ok=True)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):  # other workers use it
            root.rmdir()
