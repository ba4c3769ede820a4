"""Checkpoints during training: written to the local disk, uploaded by a thread, valid once all ranks have uploaded."""

from __future__ import annotations

import contextlib
import errno
import shutil
import time
from collections.abc import Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raydpo.errors import RaydpoError, TrainError
from raydpo.training.checkpoint.files import directory_size, save_checkpoint
from raydpo.training.hooks import TrainHooks
from raydpo.training.policy.engine import Engine

__all__ = ["CheckpointSaver"]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PATIENCE = 300.0
"""Seconds for which a failed upload is retried in the background; the next checkpoint waits for it."""
LONGEST_WAIT = 15.0
BRIEFLY = 1.0
"""Seconds for which training waits for an upload. After a quick upload, a kill costs at most the steps of one interval. A
longer upload continues beside the next steps."""
LAST_PAUSES = (1.0, 2.0, 5.0, 10.0, *[15.0] * 18)
"""Seconds between attempts to store the last checkpoint of a run. No attempt begins more than PATIENCE after the first."""


@dataclass
class _Upload:
    step: int
    directory: Path
    future: Future[None]
    metrics: Mapping[str, float]


class CheckpointSaver:
    """Makes checkpoints, one at a time. All ranks call the same methods at the same steps.

    If a checkpoint cannot be written or uploaded (disk full, storage unavailable for longer than PATIENCE), there is a
    warning, the earlier one stays, and training continues. The last one of a run is retried longer, and must succeed.

    Attributes:
        seconds, last_seconds: time for which training waited for all checkpoints, and for the last one.
        bytes: size of the last one, over all ranks.
        newest: step of the newest valid checkpoint of this session, or None.
    """

    def __init__(self, engine: Engine, hooks: TrainHooks, scratch: Path, fingerprint: Mapping[str, Any]) -> None:
        self._engine, self._hooks, self._scratch, self._fingerprint = engine, hooks, scratch, fingerprint
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="raydpo-checkpoint")
        self._upload: _Upload | None = None
        self.seconds = self.last_seconds = 0.0
        self.bytes = 0
        self.newest: int | None = None
        self._problem = ""
        self._started = time.monotonic()

    @property
    def minutes_since(self) -> float:
        """Minutes since the last checkpoint was started, or training was."""
        return (time.monotonic() - self._started) / 60

    @property
    def busy(self) -> bool:
        """Whether this rank is still uploading its share."""
        return self._upload is not None and not self._upload.future.done()

    def save(self, step: int, summary: Any, metrics: Mapping[str, float]) -> bool:
        """Write and upload the state after ``step`` while training waits. Returns whether that worked."""
        self.begin(step, summary, metrics)
        self.finish()
        return self.newest == step

    def save_last(self, step: int, summary: Any, metrics: Mapping[str, float]) -> None:
        """``save`` with retries: without this checkpoint the work since the one before is lost.

        Raises:
            TrainError: if it cannot be stored.
        """
        started = time.monotonic()
        for attempt, pause in enumerate((*LAST_PAUSES, None), 1):
            if self.save(step, summary, metrics):
                return
            # The clocks of ranks differ. If the storage does not answer, the first attempt uses all of the time.
            (late,) = self._sum_over_ranks(time.monotonic() - started + (pause or 0) > PATIENCE)
            if pause is None or late:
                raise TrainError(
                    f"{self._problem}. It was the last one, tried {attempt} times. Free disk space or repair the storage, "
                    "and start the run again"
                )
            time.sleep(pause)

    def begin(self, step: int, summary: Any, metrics: Mapping[str, float]) -> None:
        """Write the state after ``step`` and start its upload. Waits for the upload before, and ``BRIEFLY`` for this one."""
        self.finish()
        self.last_seconds = 0.0
        start, self._started = time.perf_counter(), time.monotonic()
        directory = self._scratch / f"step-{step:08d}-rank-{self._engine.rank:05d}"
        problem = None
        try:
            self._hooks.flush()
            save_checkpoint(self._engine, directory, step, self._fingerprint, summary)
            size = directory_size(directory)
        except (OSError, RaydpoError) as error:
            problem, size = _explained(error, directory), 0
        failed, self.bytes = self._sum_over_ranks(problem is not None, size)
        if failed:
            shutil.rmtree(directory, ignore_errors=True)
            self._give_up(step, problem, failed)
        else:
            self._upload = _Upload(step, directory, self._pool.submit(self._store, directory, step), dict(metrics))
            futures.wait([self._upload.future], timeout=BRIEFLY)
        self._add(time.perf_counter() - start)
        if self._upload is not None and self._sum_over_ranks(self.busy) == [0]:
            self.finish()

    def settle(self, *, all_stored: bool) -> None:
        """Make the pending checkpoint valid if every rank has uploaded its share."""
        if self._upload is not None and all_stored:
            self.finish(wait=False)

    def finish(self, *, wait: bool = True) -> None:
        """Wait until all ranks have uploaded the pending checkpoint, and make it valid.

        Args:
            wait: also wait until it is certain that it is valid.
        """
        if self._upload is None:
            return
        start = time.perf_counter()
        upload, self._upload = self._upload, None
        problem = None
        try:
            upload.future.result()
        except (OSError, RaydpoError) as error:
            problem = _explained(error, upload.directory)
        (failed,) = self._sum_over_ranks(problem is not None)
        shutil.rmtree(upload.directory, ignore_errors=True)
        if failed:
            self._give_up(upload.step, problem, failed)
        else:
            self._hooks.register(upload.step, upload.metrics, wait=wait)
            self.newest = upload.step
        self._add(time.perf_counter() - start)

    def _sum_over_ranks(self, *values: int) -> list[int]:
        totals = torch.tensor(values, dtype=torch.float64, device=self._engine.device)
        return [int(total) for total in self._engine.sum_over_ranks(totals).tolist()]

    def _add(self, seconds: float) -> None:
        self.seconds += seconds
        self.last_seconds += seconds

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _store(self, directory: Path, step: int) -> None:
        started, pause = time.monotonic(), 0.5
        while True:
            try:
                return self._hooks.upload(directory, step)
            except (OSError, RaydpoError) as error:
                full = isinstance(error, OSError) and error.errno in FULL
                if full or time.monotonic() - started > PATIENCE:
                    raise
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_WAIT)

    def _give_up(self, step: int, problem: str | None, failed: int) -> None:
        # The reason of this rank, if it failed here.
        reason = problem or f"{failed} of {self._engine.world_size} workers could not write it; see their logs"
        kept = "the one before stays" if self.newest is None else f"the one of step {self.newest} stays"
        line = self._problem = f"the checkpoint of step {step} could not be stored: {reason}; {kept}"
        if problem is not None:
            with contextlib.suppress(OSError):
                print(line, flush=True)  # into this worker's log, on every rank
        self._hooks.note(f"warning: {line}")


def _explained(error: Exception, directory: Path) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.errno in FULL:
        free = shutil.disk_usage(directory.parent).free
        text += f" ({free / 1e9:.2f} GB are free on the disk of {directory.parent})"
    return text
