"""Training where not every token counts: sums, losses and the gate against a live model and computations by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from distributed import run_distributed
from kernel import counting, exact, part_of, tiny_pairs, train_here, with_reference
from transformers import AutoModelForCausalLM

from raydpo.config import ObjectiveConfig
from raydpo.losses import Objective
from raydpo.model.load import load_causal_lm
from raydpo.model.logps import LogpModel
from raydpo.training.evaluate import Gaps, pair_logps, reference_logps
from raydpo.training.pairs import TrainingPairs, pair_columns

ROWS = [4, 1, 6]
SIDES = ("chosen", "rejected")


@pytest.fixture(scope="module")
def scored(tiny_llama):
    return with_reference(tiny_pairs(33), tiny_llama)


@pytest.fixture(scope="module")
def masked(scored):
    return counting(scored, part_of)


@pytest.fixture(scope="module")
def engine(tiny_llama):
    module = LogpModel(load_causal_lm(str(tiny_llama), "float32", rope_length=None))
    return SimpleNamespace(module=module, logps=lambda layout, **asked: module(layout, **asked))


@pytest.fixture(scope="module")
def live(masked, tiny_llama):
    """Log-probs of each token of ``ROWS`` by plain transformers, and the logarithm of the sum of squared probabilities at
    it: [(chosen, rejected) of each pair]."""
    model, found = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval(), []
    for row in ROWS:
        prompt, both = masked["prompt_ids"][row].as_py(), []
        for side in SIDES:
            ids = torch.tensor([prompt + masked[f"{side}_ids"][row].as_py()])
            with torch.no_grad():
                logps = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            squares = logps.exp().square().sum(-1).log()
            both.append((logps.gather(1, ids[0, len(prompt) :, None])[:, 0].numpy(), squares.numpy()))
        found.append(both)
    return found


def test_sums_are_those_of_a_live_forward_with_labels_of_minus_100(scored, engine, tiny_llama):
    def answer(side, row, tokens):
        return [float(at >= tokens // 3) for at in range(tokens)]

    table = counting(scored, answer)
    pairs, model = TrainingPairs.of(table), AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    found = pair_logps(engine, engine.module.lay_out(pairs.groups(ROWS)), pairs, ROWS, ObjectiveConfig())
    for place, row in enumerate(ROWS):
        prompt = table["prompt_ids"][row].as_py()
        for side in SIDES:
            completion = table[f"{side}_ids"][row].as_py()
            ids, skipped = torch.tensor([prompt + completion]), len(prompt) + len(completion) // 3
            labels = torch.cat([torch.full((1, skipped), -100), ids[:, skipped:]], 1)
            with torch.no_grad():
                mean = model(input_ids=ids, labels=labels).loss.item()
            tokens = ids.shape[1] - skipped
            assert getattr(found, side)[place].item() == pytest.approx(-mean * tokens, abs=1e-5)
            assert getattr(found, f"ref_{side}")[place].item() == pytest.approx(-mean * tokens, abs=1e-5)
            assert getattr(found, f"{side}_tokens")[place].item() == tokens


def test_sums_tails_and_weights_are_those_by_hand(masked, live, engine):
    table = masked.append_column("pair_weight", pa.array(np.arange(33.0)))
    pairs, config = TrainingPairs.of(table), ObjectiveConfig(ld_alpha=0.5, use_weighting=True)
    found = pair_logps(engine, engine.module.lay_out(pairs.groups(ROWS)), pairs, ROWS, config)
    known = reference_logps(pairs, ROWS, config)
    for place, (row, both) in enumerate(zip(ROWS, live, strict=True)):
        weights = [part_of(side, row, len(logps)) for side, (logps, _) in zip(SIDES, both, strict=True)]
        shared, factor = min(int((each > 0).sum()) for each in weights), float(row)
        for side, (logps, squares), each in zip(SIDES, both, weights, strict=True):
            tail = np.cumsum(each > 0) > shared
            for values in (found, known):  # the model is the reference
                assert getattr(values, side)[place].item() == pytest.approx(logps @ each, abs=1e-5)
                assert getattr(values, f"{side}_tail")[place].item() == pytest.approx((logps * tail) @ each, abs=1e-5)
                assert getattr(values, f"{side}_tokens")[place].item() == each.sum()
            factor *= math.exp((logps - squares) @ each / each.sum())
        assert found.weights[place].item() == pytest.approx(factor, rel=1e-5)
    means = [part_of("chosen", row, len(both[0][0])).sum() for row, both in zip(ROWS, live, strict=True)]
    assert known.mean_chosen_tokens == pytest.approx(np.mean(means))
    assert pairs.weights_of(ROWS).tolist() == [
        weight
        for row, both in zip(ROWS, live, strict=True)
        for side, (logps, _) in zip(SIDES, both, strict=True)
        for weight in part_of(side, row, len(logps)).tolist()
    ]


@pytest.mark.parametrize(
    ("settings", "by_hand"),
    [
        (
            {"loss": "sigmoid_norm"},
            lambda won, lost, n, m, policy: -math.log(1 / (1 + math.exp(-0.1 * (won / n - lost / m)))),
        ),
        ({"loss": "ipo"}, lambda won, lost, n, m, policy: (won / n - lost / m - 5) ** 2),
        ({"loss": "sft"}, lambda won, lost, n, m, policy: -policy[0] / policy[1]),
        (
            {"loss": "sigmoid", "length_penalty": 0.02},
            lambda won, lost, n, m, policy: -math.log(1 / (1 + math.exp(-0.1 * (won - lost) - 0.02 * (n - m)))),
        ),
    ],
    ids=["sigmoid_norm", "ipo", "sft", "length_penalty"],
)
def test_losses_use_the_tokens_that_count(settings, by_hand, masked, live, engine):
    shifted = masked
    for side in SIDES:  # another reference, so that log-ratios are not 0
        name = f"ref_{side}_logps"
        values = [[value - 0.1 * (at % 3) for at, value in enumerate(row)] for row in masked[name].to_pylist()]
        column = pa.array(values, pa.list_(pa.float32()))
        shifted = shifted.set_column(shifted.column_names.index(name), name, column)
    pairs, objective = TrainingPairs.of(shifted), Objective(ObjectiveConfig(beta=0.1, **settings))
    logps = pair_logps(engine, engine.module.lay_out(pairs.groups(ROWS)), pairs, ROWS, objective.config)
    losses = objective(logps, 0.1).losses.tolist()
    chosen = [part_of("chosen", row, len(both[0][0])) for row, both in zip(ROWS, live, strict=True)]
    rejected = [part_of("rejected", row, len(both[1][0])) for row, both in zip(ROWS, live, strict=True)]
    for loss, ((tokens, _), _), more, less in zip(losses, live, chosen, rejected, strict=True):
        ratios = [0.1 * (np.arange(len(each)) % 3) @ each for each in (more, less)]
        policy = tokens @ more, np.mean([each.sum() for each in chosen])
        assert loss == pytest.approx(by_hand(*ratios, more.sum(), less.sum(), policy), abs=1e-5)


def test_a_mask_that_counts_everything_is_none(scored):
    assert TrainingPairs.of(counting(scored, part_of)).masked
    every = TrainingPairs.of(counting(scored, lambda side, row, tokens: np.ones(tokens)))
    plain = TrainingPairs.of(scored)
    assert not every.masked and not plain.masked
    columns = pair_columns(counting(scored, lambda side, row, tokens: np.ones(tokens)), prompts=True)
    assert columns.equals(pair_columns(scored, prompts=True))
    np.testing.assert_array_equal(every.ref_chosen, plain.ref_chosen)


@pytest.mark.parametrize("settings", [{}, {"ld_alpha": 0.5}, {"use_weighting": True}], ids=str)
def test_pairs_whose_tokens_all_count_are_bit_equal_among_others(settings, scored, engine):
    """Only the first pair is masked, so the others take the way of masked ones."""
    others = [1, 4, 6]
    table = counting(scored, lambda side, row, tokens: np.ones(tokens) if row else part_of(side, row, tokens))
    found, config = [], ObjectiveConfig(**settings)
    for pairs in (TrainingPairs.of(table), TrainingPairs.of(scored)):
        logps = pair_logps(engine, engine.module.lay_out(pairs.groups(others)), pairs, others, config)
        found.append({name: value.tolist() for name, value in vars(logps).items() if isinstance(value, torch.Tensor)})
    assert found[0] == found[1]


def test_the_gate_sees_every_token_and_weighs_its_sums(masked, live, engine):
    """The reference of one token is wrong by 0.5 nats."""
    for counted in (True, False):
        weights = part_of("chosen", 4, len(masked["chosen_ids"][4]))
        place = int(np.flatnonzero(weights > 0)[0] if counted else np.flatnonzero(weights == 0)[0])
        values = masked["ref_chosen_logps"].to_pylist()
        values[4][place] += 0.5
        name = "ref_chosen_logps"
        table = masked.set_column(masked.column_names.index(name), name, pa.array(values, pa.list_(pa.float32())))
        pairs = TrainingPairs.of(table)
        here = SimpleNamespace(device=torch.device("cpu"), is_leader=True, sum_over_ranks=lambda values: values)
        gaps, layout = Gaps(here, pairs, ROWS), engine.module.lay_out(pairs.groups(ROWS))
        gaps.add(SimpleNamespace(pairs=ROWS, counts=True), layout, engine.logps(layout))
        found = gaps.join()
        assert found.token_gap[0] == pytest.approx(0.5, abs=1e-4)
        assert found.chosen_gap[0] == pytest.approx(-0.5 * weights[place], abs=1e-4)


@pytest.mark.parametrize(("scale", "off"), [(1, 0), (0.01, 0.25)])
def test_the_gate_compares_sums_where_the_tokens_of_a_side_are_not_known(scale, off, masked, engine):
    """The reference of the whole chosen completion is known as a sum only, and off by 1 nat; the rejected one is masked, and
    off by ``off`` nats. Its weights may add up to less than 1."""
    table = counting(
        masked.drop_columns([f"{side}_{what}" for side in SIDES for what in ("starts", "weights")]),
        lambda side, *row: np.ones(row[1]) if side == "chosen" else scale * part_of(side, *row),
    )
    sums = {
        f"ref_{side}_sum": [
            np.dot(values, np.ones(len(values)) if side == "chosen" else scale * part_of(side, row, len(values)))
            + (1 if side == "chosen" else off)
            for row, values in enumerate(table[f"ref_{side}_logps"].to_pylist())
        ]
        for side in SIDES
    }
    for name, values in sums.items():
        table = table.append_column(name, pa.array(values))
    column = pa.array([[np.nan] * len(ids) for ids in table["chosen_ids"].to_pylist()], pa.list_(pa.float32()))
    table = table.set_column(table.column_names.index("ref_chosen_logps"), "ref_chosen_logps", column)
    pairs = TrainingPairs.of(table)
    assert pairs.masked and pairs.sums_only().tolist() == list(range(33))
    here = SimpleNamespace(device=torch.device("cpu"), is_leader=True, sum_over_ranks=lambda values: values)
    gaps, layout = Gaps(here, pairs, ROWS), engine.module.lay_out(pairs.groups(ROWS))
    gaps.add(SimpleNamespace(pairs=ROWS, counts=True), layout, engine.logps(layout))
    found = gaps.join()
    np.testing.assert_allclose(found.chosen_gap, -1, atol=1e-4)
    np.testing.assert_allclose(found.rejected_gap, -off, atol=1e-4)
    of_a_token = np.maximum(1 / pairs.chosen_tokens[ROWS], off / pairs.rejected_counted[ROWS])
    np.testing.assert_allclose(found.token_gap, of_a_token, atol=1e-5 / scale)


def runs(jobs):
    return [(one.steps, one.evals) for one in (train_here(*args, **kwargs) for args, kwargs in jobs)]


def together(jobs, table, model, scratch, keep):
    """The jobs, a run with checkpoints, and its continuation."""
    found = runs(jobs)
    more = dict(steps=6, checkpoint_every=3, held_out=table)
    found.append(runs([((table, model, scratch), more | dict(keep=keep))])[0])
    found.append(runs([((table, model, scratch), more | dict(checkpoint=keep / "step-3"))])[0])
    return found


def test_training_is_the_same_on_any_layout_and_number_of_workers_and_after_an_interruption(
    masked, scored, tiny_llama, tmp_path
):
    settings = [
        *(dict(policy={"layout": layout}) for layout in ("tree", "packed", "padded")),
        dict(tokens_per_batch=200),
        dict(loss="kto"),  # a loss over the whole step
        dict(ld_alpha=0.5),
    ]
    jobs = [((masked, tiny_llama, tmp_path / "s"), dict(steps=3, held_out=masked) | one) for one in settings]
    (alone,) = run_distributed(together, 1, tmp_path / "one", jobs, masked, tiny_llama, tmp_path / "s", tmp_path / "keep")
    parallel = (jobs[0][0], jobs[0][1] | dict(sequence_parallel=2, workers=2))
    two, other = run_distributed(runs, 2, tmp_path / "two", [*jobs[:1], *jobs[4:], parallel])
    for (steps, evals), one in zip(alone, settings, strict=False):
        assert steps[0]["loss"] == pytest.approx(0.5 if "loss" in one else math.log(2), abs=1e-5), one
        assert evals[0]["eval_loss"] == pytest.approx(0.5 if "loss" in one else math.log(2), abs=1e-5), one
    losses = [[row["loss"] for row in steps] for steps, _ in alone]
    for curve in losses[1:4]:
        assert curve == pytest.approx(losses[0], abs=1e-5)
    for (steps, _), (same, _), curve in zip(two, other, [losses[0], *losses[4:6], losses[0]], strict=True):
        assert exact(steps) == exact(same)
        assert [row["loss"] for row in steps] == pytest.approx(curve, abs=1e-5)
    (whole, evals), (rest, late) = alone[-2:]
    assert exact(rest) == exact(whole)[3:]
    assert exact(late) == exact(evals)[-1:]
    assert whole[0]["length/chosen"] < np.mean([len(ids) for ids in masked["chosen_ids"].to_pylist()])
