"""The gate before the first step: wrong references are stopped and named, right ones pass."""

import numpy as np
import pyarrow as pa
from distributed import run_distributed
from kernel import tiny_pairs, train_here, with_reference
from tiny import make_model

from raydpo.errors import GateError
from raydpo.training.gate import gate_rows
from raydpo.training.pairs import TrainingPairs


def outcome(jobs):
    """What each run said at the gate, or the error that stopped it."""
    said = []
    for args, kwargs in jobs:
        try:
            said += [note for note in train_here(*args, steps=1, **kwargs).notes if note.startswith("step-0 gate")]
        except GateError as error:
            said.append(error)
    return said


def altered(table, row, by):
    """One stored value of one pair moved by so many nats."""
    rows = table["ref_chosen_logps"].to_pylist()
    rows[row][0] += by
    index = table.column_names.index("ref_chosen_logps")
    return table.set_column(index, "ref_chosen_logps", pa.array(rows, pa.list_(pa.float32())))


def test_the_gate(tiny_llama, tmp_path):
    pairs = tiny_pairs(60)
    right = with_reference(pairs, tiny_llama)
    wrong = with_reference(pairs, make_model(tmp_path / "other", seed=1))
    columns = ["ref_chosen_logps", "ref_rejected_logps"]
    shifted = right.drop_columns(columns)
    for column in columns:  # every value right, at the next pair
        rows = right[column].to_pylist()
        lengths = [len(row) for row in rows]
        rolled = [(rows[index - 1] * 40)[:length] for index, length in enumerate(lengths)]
        shifted = shifted.append_column(column, pa.array(rolled, pa.list_(pa.float32())))
    tables = {"right": right, "wrong weights": wrong, "altered": altered(right, 41, -3.0), "shifted": shifted}
    jobs = [((table, tiny_llama, tmp_path / "scratch"), {}) for table in tables.values()]
    jobs.append(((wrong, tiny_llama, tmp_path / "scratch"), {"starts_as_reference": False}))
    (said,) = run_distributed(outcome, 1, tmp_path / "ranks", jobs)
    right, wrong, altered_, shifted, other = said
    assert "loss 0.693147" in right
    for error in (wrong, altered_, shifted):
        assert isinstance(error, GateError)
        assert "Policy identity policy, cache identity reference" in str(error)
    assert "pair tiny:42 " in str(altered_)
    assert "not compared" in other


def test_rows_hold_first_step_extremes_and_others(tiny_llama):
    pairs = TrainingPairs(altered(with_reference(tiny_pairs(60), tiny_llama), 50, -40.0))
    rows = gate_rows(pairs, np.array([7, 8, 9, 10]), count=12, seed=0)
    assert len(rows) == len(set(rows)) == 12
    assert set(rows) >= {7, 8, 9, 10, 50}
    assert gate_rows(pairs, np.array([7]), count=100, seed=0) == list(range(60))
