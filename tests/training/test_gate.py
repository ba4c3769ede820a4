"""Step-0 gate: wrong references are stopped and named, right ones pass."""

import math

import numpy as np
import pyarrow as pa
import pytest
from distributed import run_distributed
from kernel import tiny_pairs, train_here, with_reference
from tiny import make_model

from raydpo.config import LOSSES, ObjectiveConfig
from raydpo.errors import GateError
from raydpo.losses import Objective
from raydpo.training.evaluate import Comparison
from raydpo.training.gate import expected_first_loss, gate_rows, judge
from raydpo.training.pairs import TrainingPairs


def outcome(jobs):
    """Line of the gate of each run, or the error that stopped it."""
    said = []
    for args, kwargs in jobs:
        try:
            said += [note for note in train_here(*args, steps=1, **kwargs).notes if note.startswith("step-0 gate")]
        except GateError as error:
            said.append(error)
    return said


def altered(table, row, by):
    """Shift one stored log-prob of one pair by so many nats."""
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
    named = {"policy": {"identity": "policy"}}
    jobs = [((table, tiny_llama, tmp_path / "scratch"), named) for table in tables.values()]
    jobs.append(((wrong, tiny_llama, tmp_path / "scratch"), {"starts_as_reference": False}))
    (said,) = run_distributed(outcome, 1, tmp_path / "ranks", jobs)
    right, wrong, altered_, shifted, other = said
    assert "loss 0.693147" in right
    for error in (wrong, altered_, shifted):
        assert isinstance(error, GateError)
        assert "Policy identity policy, cache identity reference" in str(error)
    assert "pair tiny:42 " in str(altered_)
    assert "not compared" in other


def tails_at_the_gate(table, model, scratch):
    run = train_here(
        table,
        model,
        scratch,
        steps=1,
        loss="sigmoid",
        beta=5.0,
        ld_alpha=0.25,
        pairs_per_step=len(table),
        gate_pairs=len(table),
    )
    (line,) = [note for note in run.notes if note.startswith("step-0 gate")]
    return float(line.rpartition("loss ")[2]), run.steps[0]["loss"]


def test_the_gate_tells_the_first_loss_with_light_tails(tiny_llama, tmp_path):
    """A policy that differs a little from the reference in the last token of longer completions, whose weight is 1/4."""
    table = with_reference(tiny_pairs(8), tiny_llama)
    for column in ("chosen", "rejected"):
        name, other = (f"{side}_logps" for side in (f"ref_{column}", "ref_rejected" if column == "chosen" else "ref_chosen"))
        rows = [
            [*row[:-1], row[-1] + 0.01 * (len(row) > len(than))]
            for row, than in zip(table[name].to_pylist(), table[other].to_pylist(), strict=True)
        ]
        table = table.set_column(table.column_names.index(name), name, pa.array(rows, pa.list_(pa.float32())))
    ((told, first),) = run_distributed(tails_at_the_gate, 1, tmp_path / "ranks", table, tiny_llama, tmp_path / "scratch")
    assert abs(first - LN2) > 1e-4
    assert told == pytest.approx(first, abs=2e-6)


def test_rows_hold_extremes_and_others(tiny_llama):
    pairs = TrainingPairs.of(altered(with_reference(tiny_pairs(60), tiny_llama), 50, -40.0))
    first = np.array([7, 8, 9, 10])
    rows = gate_rows(pairs, first, count=12, seed=0)
    assert len(rows) == len(set(rows)) == 8 and 50 in rows and not set(rows) & set(first)
    beside = [gate_rows(pairs, np.arange(40), count=12, seed=seed) for seed in range(5)]
    assert all(len(each) == 4 and 50 in each for each in beside), "the extremes are computed beside any first step"
    assert len(set(map(tuple, beside))) > 1, "and random pairs"
    assert gate_rows(pairs, np.array([7]), count=100, seed=0) == [row for row in range(60) if row != 7]


def wrong_first_step(table, model, scratch):
    """The error of a run whose gate computes no pair but those of the first step, and the steps that it took."""
    try:
        train_here(table, model, scratch, steps=2, shuffle=False, gate_pairs=1, policy={"identity": "policy"})
    except GateError as error:
        return str(error)


def test_pairs_of_the_first_step_are_compared_before_its_update(tiny_llama, tmp_path):
    right = with_reference(tiny_pairs(20), tiny_llama)
    for row, found in ((2, "pair tiny:3 differs"), (19, None)):  # no first step holds the last pair
        said = run_distributed(
            wrong_first_step, 2, tmp_path / f"{row}", altered(right, row, -3.0), tiny_llama, tmp_path / "scratch"
        )
        assert all(found in one if found else one is None for one in said), said


@pytest.mark.parametrize(
    ("reference", "told"), [("another", "made by other weights or altered"), ("same", "is not a function of its files")]
)
def test_what_helps_depends_on_whether_the_models_are_one(reference, told, tiny_llama):
    """A model whose log-probs change at each load cannot be scored correctly, and the advice says so."""
    pairs, gaps = TrainingPairs.of(with_reference(tiny_pairs(4), tiny_llama)), np.full(4, 0.5)
    comparison = Comparison(
        rows=np.arange(4),
        token_gap=gaps,
        mean_gap=gaps,
        chosen_gap=gaps,
        rejected_gap=-gaps,
        chosen_tail_gap=0 * gaps,
        rejected_tail_gap=0 * gaps,
    )
    with pytest.raises(GateError, match=told):
        judge(comparison, pairs, Objective(ObjectiveConfig()), 0.1, dtype="float32", policy="same", reference=reference)


LN2 = math.log(2)
AT_THE_REFERENCE = {
    "sigmoid": LN2,
    "robust": LN2,
    "hinge": 1.0,
    "ipo": 25.0,
    "ipo_sum": 25.0,
    "sigmoid_norm": LN2,
    "exo_pair": -LN2 - (math.log(0.9) + math.log(0.1)) / 2,
    "discopop": (LN2 + 1) / 2,
    "dpop": LN2,
    "nca_pair": 2 * LN2,
    "bco_pair": 2 * LN2,
    "bco": 2 * LN2,
    "sppo_hard": 50.0,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "kto": 0.5,
    "aot": LN2,
    "aot_unpaired": LN2,
    "plackett_luce": LN2,
}


def test_the_first_loss_is_foretold_for_every_objective(tiny_llama):
    pairs = TrainingPairs.of(with_reference(tiny_pairs(12), tiny_llama))
    rows = np.array([3, 1, 7, 9])

    def foretold(loss, **settings):
        return expected_first_loss(Objective(ObjectiveConfig(loss=loss, **settings)), pairs, rows, 0.1)

    assert set(AT_THE_REFERENCE) == {name for name, traits in LOSSES.items() if traits.reference}
    for name, loss in AT_THE_REFERENCE.items():
        smooth = {"label_smoothing": 0.1} if name in ("exo_pair", "robust") else {}
        assert foretold(name, **smooth) == pytest.approx(loss, abs=1e-9), name
    likelihood = -sum(pairs.ref_chosen[rows]) / sum(pairs.chosen_tokens[rows])
    mixture = [{"sigmoid": 0.8}, {"sft": 0.5}]
    assert foretold(mixture) == foretold(mixture, ld_alpha=0.3) == pytest.approx(0.8 * LN2 + 0.5 * likelihood)
