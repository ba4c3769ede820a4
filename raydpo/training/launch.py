"""Training on Ray: a TorchTrainer around ``trainer.train_policy``, with checkpoints that survive the workers."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from raydpo.cluster.actors import original_error
from raydpo.cluster.resources import Resources
from raydpo.config import TrackConfig, TrainConfig, lower_is_better
from raydpo.errors import DeviceMemoryError, RaydpoError
from raydpo.reference.identity import on_this_machine
from raydpo.storage.files import Storage
from raydpo.terminal.interrupt import interruptible
from raydpo.training.board import Board, Listener, listening
from raydpo.training.hooks import Hooks
from raydpo.training.job import TrainJob

__all__ = ["Payload", "RayHooks", "launch", "new_board"]

_CHECKPOINTS = "checkpoints"
"""Folder of a run directory."""
RESIZE_SECONDS = 30.0
"""Seconds between checks for new machines, if the number of workers may vary."""


@dataclass(frozen=True, kw_only=True)
class Payload:
    """What every worker receives.

    Attributes:
        pairs, held_out: results of ``pairs.join_reference``, or references to them in Ray's object store, through which they
            travel once a node. ``held_out`` may be None.
        run_dir: local path or URI.
        base_name: how an exported adapter names its base model.
        board: of ``new_board``, for a caller that may stop the training; None = ``launch`` makes one.
        threads: CPU threads of a worker, None = torch's choice; ``launch`` sets it.
    """

    job: TrainJob
    pairs: Any
    held_out: Any
    run_dir: str
    run_name: str
    track: TrackConfig
    base_name: str
    tokenizer: Any
    board: Any = None
    threads: int | None = None


def new_board() -> Any:
    """Start the actor ``Board`` of a training."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On the driver's node, and lost only with the driver; on another node it would be lost with a machine that only trains.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()


def launch(payload: Payload, resources: Resources, listener: Listener) -> dict[str, Any]:
    """Train to the end on Ray, continuing from the newest checkpoint in the run directory if there is one.

    Returns:
        The summary that rank 0 made: the fields of ``job.TrainSummary``.

    Raises:
        RaydpoError: what the workers raised; everything up to the newest checkpoint is kept.
    """
    import ray

    storage, board = Storage(payload.run_dir), payload.board or new_board()
    pairs, held_out = (ray.put(table) if isinstance(table, pa.Table) else table
                       for table in (payload.pairs, payload.held_out))
    payload = dataclasses.replace(payload, pairs=pairs, held_out=held_out, board=board, threads=resources.threads,
                                  run_dir=storage.root if storage.is_local else payload.run_dir)
    trainer = _ray_trainer(_worker, {"payload": payload}, payload.job.train, resources, payload.run_dir)
    return _fit(trainer, board, listener, payload.run_dir)


def _fit(trainer: Any, board: Any, listener: Listener, run_dir: str) -> dict[str, Any]:
    """Run a trainer of ``_ray_trainer`` to its end. Returns the summary that its workers gave to ``board``.

    Raises:
        RaydpoError: what the workers raised.
    """
    import ray

    with listening(board, listener):
        try:
            interruptible(trainer.fit, on_first=lambda: board.stop.remote())
        except Exception as error:
            raise ray.get(board.error.remote()) or original_error(error, "training") from error
    error, summary = ray.get([board.error.remote(), board.summary.remote()])
    if error is not None:
        raise error
    if summary is None:
        raise RaydpoError(f"training ended without a result; see the logs in {Storage(run_dir)}/logs")
    return summary


def _ray_trainer(worker: Callable[[dict[str, Any]], None], given: dict[str, Any], train: TrainConfig, resources: Resources,
                 run_dir: str) -> Any:
    """Make a TorchTrainer that calls ``worker(given)`` on every worker, and restarts them as often as ``train`` allows."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # reports wait for the controller's next check
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1800")  # an autoscaler may take its time
    # A frozen process never answers, and Ray's barriers have no timeout.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = f"{train.collective_timeout:g}"
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    return TorchTrainer(
        worker,
        train_loop_config=given,
        torch_config=TorchConfig(backend="nccl" if resources.device == "cuda" else "gloo",
                                 timeout_s=max(1, round(train.collective_timeout))),
        scaling_config=ScalingConfig(
            num_workers=resources.workers if resources.fewest in (None, resources.workers)
            else (resources.fewest, resources.workers),
            use_gpu=resources.device == "cuda", elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            accelerator_type=resources.accelerator, label_selector=dict(resources.labels) or None,
            resources_per_worker={"CPU": 1} | ({"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {})),
        run_config=RunConfig(
            name=_CHECKPOINTS, storage_path=run_dir,
            failure_config=FailureConfig(max_failures=train.max_failures, max_preemption_failures=train.max_preemptions),
            checkpoint_config=_checkpoint_config(train)),
    )


def _checkpoint_config(train: TrainConfig) -> Any:
    """Which checkpoints to keep, as Ray's CheckpointConfig."""
    from ray.train import CheckpointConfig

    return CheckpointConfig(num_to_keep=train.keep_checkpoints, checkpoint_score_attribute=train.keep_best,
                            checkpoint_score_order="min" if train.keep_best and lower_is_better(train.keep_best) else "max")


class RayHooks(Hooks):
    """Callbacks of one worker: rank 0 writes the run's records and informs the driver, all ranks report checkpoints."""

    def __init__(self, payload: Payload, rank: int) -> None:
        self.payload, self.rank = payload, rank
        self.storage = Storage(payload.run_dir)
        self.records: Any = None
        self.trackers: Any = None
        self._stop: Any = None  # pending answer of the board

    def begin(self, first_step: int, total_steps: int, facts: Mapping[str, Any]) -> None:
        if self.rank == 0:
            from raydpo.rundir.records import RunRecords
            from raydpo.rundir.trackers import Trackers

            self.records = RunRecords(self.storage, first_step, self.note)
            self.trackers = Trackers(self.payload.track, self.payload.run_name, self.payload.run_dir,
                                     self.payload.job.fingerprint, self.note)
            self._log(f"beginning after step {first_step} of {total_steps} with {facts['world_size']} worker(s)")
            self._tell("begin", {"first_step": first_step, "total_steps": total_steps} | dict(facts))

    def step(self, row: Mapping[str, float]) -> None:
        if self.rank == 0:
            self.records.add_step(row)
            self.trackers.log(int(row["step"]), row)
            self._log(f"step {row['step']:.0f}  loss {row['loss']:.6f}  grad norm {row['grad_norm']:.4f}  "
                      f"{row['seconds']:.3f} s")
            self._tell("step", dict(row))

    def evaluated(self, row: Mapping[str, float]) -> None:
        if self.rank == 0:
            self.records.add_eval(row)
            self.trackers.log(int(row["step"]), row)
            self._tell("evaluated", dict(row))

    def note(self, line: str) -> None:
        if self.rank == 0:
            self._tell("note", line)

    def flush(self) -> None:
        if self.rank == 0:
            self.records.flush()

    def upload(self, directory: Path, step: int) -> None:
        self.storage.upload_into(directory, _checkpoint_place(step))

    def register(self, step: int, metrics: Mapping[str, float], *, wait: bool) -> None:
        import ray.train
        from ray.train import Checkpoint, CheckpointUploadMode

        ray.train.report({"step": step} | dict(metrics), checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
                         checkpoint=Checkpoint(self.storage.path(_checkpoint_place(step)), self.storage.fs))
        if wait:
            # report returns before the controller has registered the checkpoint; a worker that dies in between loses it.
            ray.train.get_all_reported_checkpoints()

    def stop_requested(self) -> bool:
        """The board's answer to the question of an earlier step, so that no step waits for an answer."""
        import ray

        if self.rank:
            return False
        if self._stop is not None:
            if not ray.wait([self._stop], timeout=0)[0]:
                return False
            if ray.get(self._stop):
                return True
        self._stop = self.payload.board.stop_requested.remote()
        return False

    def preempted(self) -> float | None:
        import ray.train

        notice = ray.train.get_preemption_info()
        if notice is None:
            return None
        return 0.0 if notice.deadline_ms is None else notice.deadline_ms / 1000 - time.time()

    def _log(self, line: str) -> None:
        """Write to logs/worker-0.log. A full disk is ignored."""
        with contextlib.suppress(OSError):
            print(line, flush=True)

    def _tell(self, kind: str, content: Any) -> None:
        self.payload.board.put.remote(kind, content)


def _attempt(board: Any, train: TrainConfig, work: Callable[[int | None], None]) -> None:
    """Call ``work`` in one worker, with the positions of a micro-batch if the configured number did not fit, else None.

    Ray Train restarts workers after any error. If the error would only repeat, the restarted workers do nothing.

    Raises:
        RaydpoError: that of ``work``, after ``board`` has it. It must be raised: the other workers wait for this one until
            Ray ends them.
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
    """Train in a Ray Train worker."""
    payload: Payload = config["payload"]
    _attempt(payload.board, payload.job.train, lambda tokens_per_batch: _train(payload, tokens_per_batch))


def _train(payload: Payload, tokens_per_batch: int | None) -> None:
    import ray
    import ray.train
    import torch
    from ray.train.torch import get_device

    from raydpo.model.selfcheck import CHECK_ROWS
    from raydpo.training.engine import PolicyEngine, join_process_group
    from raydpo.training.export import export_policy
    from raydpo.training.pairs import TrainingPairs
    from raydpo.training.trainer import train_policy

    rank = ray.train.get_context().get_world_rank()
    job = dataclasses.replace(payload.job, policy=on_this_machine(payload.job.policy), tokens_per_batch=tokens_per_batch)
    storage = Storage(payload.run_dir)
    _log_to(storage, rank)
    if payload.threads is not None:
        torch.set_num_threads(payload.threads)
    device = get_device()
    join_process_group(device)
    pairs = TrainingPairs(ray.get(payload.pairs))
    engine = PolicyEngine(job.policy, job.train, device, check_rows=pairs.groups(range(min(CHECK_ROWS, len(pairs)))))
    held_out = None if payload.held_out is None else TrainingPairs(ray.get(payload.held_out))
    hooks = RayHooks(payload, rank)
    checkpoint = ray.train.get_checkpoint()
    with (tempfile.TemporaryDirectory(prefix="raydpo-") as scratch,
          checkpoint.as_directory() if checkpoint else contextlib.nullcontext() as directory):
        summary = train_policy(job, pairs, held_out, engine, hooks, None if directory is None else Path(directory),
                               Path(scratch))
        final = Path(scratch) / "final"
        if not summary.interrupted:
            export_policy(engine, job.policy, payload.base_name, payload.tokenizer, final,
                          merge=job.train.merge_adapter)
        if rank == 0:
            if not summary.interrupted:
                storage.upload(final, "final")
            hooks.records.close()
            hooks.trackers.close()
            ray.get(payload.board.finish.remote(dataclasses.asdict(summary)))


def _checkpoint_place(step: int) -> str:
    """Folder of a step's checkpoint in the run directory."""
    return f"{_CHECKPOINTS}/step-{step:08d}"


def _log_to(storage: Storage, rank: int) -> None:
    """Redirect this process's output to the run's logs. A URI cannot be appended to; there it stays in Ray's logs."""
    if not storage.is_local:
        return
    log = Path(storage.path(f"logs/worker-{rank}.log"))
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
