"""Callbacks of a training that runs under Ray Train."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydpo.config import TrackConfig
from raydpo.rundir.directory import CHECKPOINTS
from raydpo.storage.files import Storage
from raydpo.training.hooks import TrainHooks
from raydpo.training.job import TrainJob
from raydpo.training.pair_files import PairFiles

__all__ = ["RayHooks", "WorkerInput"]


@dataclass(frozen=True, kw_only=True)
class WorkerInput:
    """Input of every worker.

    Attributes:
        pairs, held_out: the files of the pairs; ``held_out`` may be None.
        run_dir: local path or URI.
        base_name: how an exported adapter names its base model.
        board: made by ``start_mailbox``, for a caller that may stop the training; None = ``launch`` makes one.
        threads: CPU threads of a worker, see ``cluster.resources.Resources``; ``launch`` sets it.
    """

    job: TrainJob
    pairs: PairFiles
    held_out: PairFiles | None
    run_dir: str
    run_name: str
    track: TrackConfig
    base_name: str
    tokenizer: Any
    board: Any = None
    threads: int | None = None


class RayHooks(TrainHooks):
    """Callbacks of one worker: rank 0 writes the run's records and informs the driver, all ranks report checkpoints."""

    def __init__(self, payload: WorkerInput, rank: int) -> None:
        self.payload, self.rank = payload, rank
        self.storage = Storage(payload.run_dir)
        self.records: Any = None
        self.trackers: Any = None
        self._stop: Any = None  # pending answer of the board

    def phase(self, name: str) -> None:
        if self.rank == 0:
            self._tell("phase", name)

    def begin(self, first_step: int, total_steps: int, facts: Mapping[str, Any]) -> None:
        if self.rank == 0:
            from raydpo.rundir.records import RunRecords
            from raydpo.rundir.trackers import Trackers

            given = self.payload
            self.records = RunRecords(self.storage, first_step, self.note)
            self.trackers = Trackers(given.track, given.run_name, given.run_dir, given.job.fingerprint, self.note)
            self._log(f"beginning after step {first_step} of {total_steps} with {facts['world_size']} worker(s)")
            self._tell("begin", {"first_step": first_step, "total_steps": total_steps} | dict(facts))

    def step(self, row: Mapping[str, float]) -> None:
        if self.rank == 0:
            self.records.add_step(row)
            self.trackers.log(int(row["step"]), row)
            figures = f"loss {row['loss']:.6f}  grad norm {row['grad_norm']:.4f}  {row['seconds']:.3f} s"
            self._log(f"step {row['step']:.0f}  {figures}")
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
        self.storage.move_into(directory, _checkpoint_place(step))

    def register(self, step: int, metrics: Mapping[str, float], *, wait: bool) -> None:
        import ray.train
        from ray.train import Checkpoint, CheckpointUploadMode

        ray.train.report(
            {"step": step} | dict(metrics),
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
            checkpoint=Checkpoint(self.storage.path(_checkpoint_place(step)), self.storage.fs),
        )
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


def _checkpoint_place(step: int) -> str:
    """Folder of a step's checkpoint in the run directory."""
    return f"{CHECKPOINTS}/step-{step:08d}"


def log_to(storage: Storage, rank: int) -> None:
    """Redirect this process's output to the run's logs. A URI cannot be appended to; there it stays in Ray's logs."""
    if not storage.is_local:
        return
    log = Path(storage.path(f"logs/worker-{rank}.log"))
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    for stream in (sys.stdout, sys.stderr):  # the log is UTF-8, whatever the locale of this machine is
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
