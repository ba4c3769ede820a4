"""Checkpoints during training: copied in memory, written and uploaded by a thread, valid once all ranks have uploaded."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from raydpo.errors import ConfigError, RaydpoError, TrainError
from raydpo.training.checkpoint.files import PendingCheckpoint
from raydpo.training.hooks import TrainHooks
from raydpo.training.policy.engine import Engine
from raydpo.training.policy.host_memory import free_bytes

__all__ = ["CheckpointSaver", "full_disk_told"]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PATIENCE = 300.0
"""Seconds for which a failed upload is retried in the background; the next checkpoint waits for it."""
LONGEST_WAIT = 15.0
BRIEFLY = 1.0
"""Seconds for which training waits until a checkpoint is stored. Where that is enough, a kill costs at most the steps of one
interval. Otherwise a thread goes on beside the next steps."""
MEMORY_SHARE = 0.5
"""Largest share of the host's free memory that a copy of the state may take. If it takes more, training waits while the
state is written."""
LAST_PAUSES = (1.0, 2.0, 5.0, 10.0, *[15.0] * 18)
"""Seconds between attempts to store the last checkpoint of a run. No attempt begins more than PATIENCE after the first."""


@dataclass
class _Upload:
    step: int
    directory: Path
    future: Future[float]
    metrics: Mapping[str, float]
    copied: float


class CheckpointSaver:
    """Makes checkpoints, one at a time. All ranks call the same methods at the same steps.

    Training waits while the state is copied to the host's memory; a thread does the rest. If a checkpoint cannot be written
    or uploaded (disk full, storage unavailable for longer than PATIENCE), there is a warning, the earlier one stays, and
    training continues. The last one of a run is retried longer, and must succeed.

    Attributes:
        seconds: time for which training waited for checkpoints.
        last_seconds: time from the beginning of the last one until it was stored.
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
        self._closed = self._told = self._holds = False

    @property
    def minutes_since(self) -> float:
        """Minutes since the last checkpoint was started, or training was."""
        return (time.monotonic() - self._started) / 60

    @property
    def busy(self) -> bool:
        """Whether this rank is still uploading its share."""
        return self._upload is not None and not self._upload.future.done()

    def check_room(self) -> None:
        """Look whether the disk below which checkpoints are written has room for one. All ranks call it.

        Raises:
            ConfigError: if it has not.
        """
        self._scratch.mkdir(parents=True, exist_ok=True)
        place = socket.gethostname(), self._scratch.stat().st_dev
        shares = self._engine.gather_objects((place, self._engine.state.bytes))
        needed, free = sum(size for where, size in shares if where == place), shutil.disk_usage(self._scratch).free
        line = (
            f"a checkpoint takes up to {_size(needed)} on the disk of {self._scratch}, where {_size(free)} are free; free "
            "more, or choose a larger disk: by output, or by $TMPDIR if output is a URI"
        )
        problem = next(filter(None, self._engine.gather_objects(line if free < needed else None)), None)
        if problem:
            raise ConfigError(problem)

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
        """Copy the state after ``step``, and start to store it. Waits for the one before, and ``BRIEFLY`` for this one."""
        self.finish()
        start, self._started = time.perf_counter(), time.monotonic()
        directory = self._scratch / f"step-{step:08d}-rank-{self._engine.rank:05d}"
        pending = problem = None
        try:
            self._hooks.flush()
            pending = PendingCheckpoint(
                self._engine, directory, step, self._fingerprint, summary, copy=self._fits_in_memory()
            )
        except (OSError, RaydpoError) as error:
            problem = _explained(error, directory)
        failed, self.bytes = self._sum_over_ranks(problem is not None, 0 if pending is None else pending.bytes)
        if pending is None or failed:
            shutil.rmtree(directory, ignore_errors=True)
            self._give_up(step, problem, failed)
        else:
            copied = time.perf_counter() - start
            stored = self._pool.submit(self._store, pending, step)
            self._upload = _Upload(step, directory, stored, dict(metrics), copied)
            futures.wait([stored], timeout=BRIEFLY)
        self.seconds += time.perf_counter() - start
        if self._upload is not None and self._sum_over_ranks(self.busy) == [0]:
            self.finish()

    def _fits_in_memory(self) -> bool:
        """Whether the host's memory has room for a copy of the shares of all ranks on this machine."""
        needed, free = self._engine.state.bytes * int(os.environ.get("LOCAL_WORLD_SIZE", "1")), free_bytes()
        fits = self._holds or needed <= MEMORY_SHARE * free
        # torch keeps page-locked memory for the next copy.
        self._holds = fits and self._engine.device.type == "cuda"
        if not fits and not self._told:
            self._told = True
            self._hooks.note(
                f"training waits while checkpoints are written: a copy takes {_size(needed)} of the host's memory, of "
                f"which {_size(free)} are free"
            )
        return fits

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
            self.last_seconds = upload.copied + upload.future.result()
        except (OSError, RaydpoError) as error:
            problem = _explained(error, upload.directory)
        (failed,) = self._sum_over_ranks(problem is not None)
        shutil.rmtree(upload.directory, ignore_errors=True)
        if failed:
            self._give_up(upload.step, problem, failed)
        else:
            self._hooks.register(upload.step, upload.metrics, wait=wait)
            self.newest = upload.step
        self.seconds += time.perf_counter() - start

    def _sum_over_ranks(self, *values: int) -> list[int]:
        totals = torch.tensor(values, dtype=torch.float64, device=self._engine.device)
        return [int(total) for total in self._engine.sum_over_ranks(totals).tolist()]

    def close(self) -> None:
        """Give up what is not stored yet."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _store(self, pending: PendingCheckpoint, step: int) -> float:
        """Write and upload this rank's share. Returns how many seconds that took."""
        started, pause = time.monotonic(), 0.5
        while True:
            try:
                pending.write()
                self._hooks.upload(pending.directory, step)
                return time.monotonic() - started
            except (OSError, RaydpoError) as error:
                full = isinstance(error, OSError) and error.errno in FULL
                if full or self._closed or time.monotonic() - started > PATIENCE:
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
        text += _free(directory.parent)
    return text


def _free(place: Path) -> str:
    return f" ({_size(shutil.disk_usage(place).free)} are free on the disk of {place})"


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


@contextlib.contextmanager
def full_disk_told(place: Path, step: int) -> Iterator[None]:
    """Write the trained model within the block, below ``place`` on this machine, after ``step`` steps.

    Raises:
        TrainError: if the disk is full. Workers that are started again would find it full again.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors and shutil.copytree give the system's error as text only.
        full = next((text for text in map(os.strerror, FULL) if text in str(error)), None)
        if full is None:
            raise
        raise TrainError(
            f"final/ could not be written: {full}{_free(place)}. All {step:,} steps are done, and the last checkpoint is "
            "stored: free disk space, and the same command writes final/ without training again"
        ) from error
