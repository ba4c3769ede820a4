"""Metrics and evaluations of a run, as Parquet and for TensorBoard."""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydpo.rundir.directory import EVAL, METRICS, TENSORBOARD
from raydpo.storage.files import Storage

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["RunRecords", "finite", "read_rows", "to_parquet"]


def read_rows(storage: Storage, name: str) -> list[dict[str, float]]:
    """Rows of one of a run's Parquet files; none if the file does not exist yet."""
    if not storage.exists(name):
        return []
    return pq.read_table(pa.BufferReader(storage.read(name))).to_pylist()


def finite(value: Any) -> Any:
    """Copy plain data with None for each number that is not finite, since JSON cannot express it."""
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunRecords:
    """Collects rows and writes whole files, so that a reader never sees half a file.

    Args:
        storage: the run directory.
        from_step: rows of later steps, left by an interrupted run, are dropped; those steps are repeated.
        warn: called if TensorBoard's files cannot be written. They are then left out; the Parquet files have all metrics.
    """

    def __init__(self, storage: Storage, from_step: int, warn: Callable[[str], None]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.storage = storage
        # A run that starts again from step 0 repeats the evaluation before its first step.
        self.steps, self.evals = (
            [row for row in read_rows(storage, name) if from_step and row["step"] <= from_step] for name in (METRICS, EVAL)
        )
        # TensorBoard appends to its files. An object store cannot, so they are uploaded at the end.
        self._board_dir = Path(storage.path(TENSORBOARD)) if storage.is_local else Path(tempfile.mkdtemp())
        self._board: SummaryWriter | None = None
        self._warn = warn
        with self._board_may_fail():
            self._board = SummaryWriter(str(self._board_dir), purge_step=from_step + 1 if from_step else None)

    def add_step(self, row: Mapping[str, float]) -> None:
        self.steps.append(dict(row))
        self._to_board("train", row)

    def add_eval(self, row: Mapping[str, float]) -> None:
        self.evals.append(dict(row))
        self._to_board("eval", row)

    def flush(self) -> None:
        """Write all rows so far to metrics.parquet and eval.parquet."""
        for name, rows in ((METRICS, self.steps), (EVAL, self.evals)):
            if rows:
                self.storage.write(name, to_parquet(rows))
        if self._board is not None:
            with self._board_may_fail():
                self._board.flush()

    def close(self) -> None:
        self.flush()
        if self._board is not None:
            with self._board_may_fail():
                self._board.close()
        if not self.storage.is_local:
            self.storage.upload(self._board_dir, TENSORBOARD)

    def _to_board(self, group: str, row: Mapping[str, float]) -> None:
        if self._board is None:
            return
        with self._board_may_fail():
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(f"{group}/{name.removeprefix('eval_')}", value, int(row["step"]))

    @contextlib.contextmanager
    def _board_may_fail(self) -> Iterator[None]:
        """Give up TensorBoard's files after an OSError. Its thread writes, and raises the error at a later call."""
        try:
            yield
        except OSError as error:
            self._board = None
            self._warn(
                f"warning: TensorBoard's files cannot be written ({error}) and are left out until the run is "
                "restarted; metrics.parquet has all metrics"
            )


def to_parquet(rows: list[dict[str, float]]) -> bytes:
    """Encode rows as Parquet, with a column for each name in any row."""
    names = list(dict.fromkeys(name for row in rows for name in row))  # a source may first appear in a later step
    kinds = {name: pa.int64() if name == "step" else pa.float64() for name in names}
    columns = {name: pa.array([row.get(name) for row in rows], kind) for name, kind in kinds.items()}
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue()
