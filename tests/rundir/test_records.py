import errno

import pytest

from raydpo.rundir.records import RunRecords, read_rows
from raydpo.storage.files import Storage


def test_a_resumed_run_keeps_rows_up_to_its_step(tmp_path):
    storage = Storage(str(tmp_path))
    first = RunRecords(storage, 0, pytest.fail)
    for step in range(1, 6):
        first.add_step({"step": step, "loss": 1.0 / step})
    first.add_eval({"step": 4, "eval_loss": 0.5})
    first.flush()
    again = RunRecords(storage, 3, pytest.fail)
    again.add_step({"step": 4, "loss": 0.0})
    again.close()
    assert [row["step"] for row in read_rows(storage, "metrics.parquet")] == [1, 2, 3, 4]
    assert read_rows(storage, "metrics.parquet")[-1]["loss"] == 0.0


def test_a_run_that_begins_again_has_its_first_evaluation_once(tmp_path):
    """The run was killed after its rows were written, before its first checkpoint was valid."""
    storage = Storage(str(tmp_path))
    for _ in range(2):
        records = RunRecords(storage, 0, pytest.fail)
        records.add_eval({"step": 0, "eval_loss": 0.7})
        records.flush()
    assert [row["step"] for row in read_rows(storage, "eval.parquet")] == [0]


def test_a_full_disk_costs_tensorboard_and_a_warning(tmp_path, monkeypatch):
    from tensorboard.summary.writer import event_file_writer

    warnings = []
    records = RunRecords(Storage(str(tmp_path)), 0, warnings.append)

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(event_file_writer.RecordWriter, "write", full)
    for step in range(1, 200):
        records.add_step({"step": step, "loss": 0.5})
    records.close()
    assert len(warnings) == 1 and "No space left on device" in warnings[0] and "metrics.parquet" in warnings[0]
    assert len(read_rows(Storage(str(tmp_path)), "metrics.parquet")) == 199
