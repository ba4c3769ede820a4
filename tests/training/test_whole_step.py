"""A step gives the same result however it is split over micro-batches and ranks."""

import dataclasses

import numpy as np
import pytest
import torch
from distributed import run_distributed
from kernel import exact, tiny_pairs, train_here, with_reference

from raydpo.config import LOSSES, ObjectiveConfig
from raydpo.losses import Objective, ObjectiveState, PairLogps
from raydpo.training.whole_step import WholeStep

ROWS = np.array([3, 40, 7, 11, 40, 25, 2, 31])  # one pair is there twice
SPLITS = [[ROWS], [ROWS[:3], ROWS[3:]], [ROWS[row : row + 1] for row in (7, 2, 0, 5, 1, 4, 3, 6)]]
OBJECTIVES = [{"loss": name} | ({"label_smoothing": 1e-3} if name == "exo_pair" else {}) for name in LOSSES] + [
    {"loss": "sigmoid", "dynamic_beta": 0.6},
    {"loss": "aot", "label_smoothing": 0.1},
    {"loss": "kto", "ld_alpha": 0.3},
    {"loss": [{"sigmoid": 0.8}, {"bco": 0.2}, {"sft": 1.0}]},
    {"loss": [{"aot_unpaired": 1.0}, {"cpo": 0.5}]},
    {"loss": [{"sigmoid": 0.8}, {"bco_pair": 0.2}, {"sft": 1.0}], "ld_alpha": 0.5},
]


def made_up(rows, tails):
    """Log-probs computed from the row number, so that a row has the same ones in every split."""

    def column(seed, low, high):
        values = torch.rand(64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return low + (high - low) * values[torch.from_numpy(rows)]

    sides = [column(seed, -60, -20) for seed in range(4)]
    tokens = [column(seed, 5, 30).round() for seed in (4, 5)]
    return PairLogps(
        *sides, *tokens, *([column(seed, -15, 0) for seed in range(6, 10)] if tails else ()), mean_chosen_tokens=14.0
    )


def summed(settings, split):
    """Total loss and the gradient by each row's log-probs, added up over micro-batches."""
    objective = Objective(ObjectiveConfig(**settings))
    tails = objective.config.ld_alpha is not None
    names = ("chosen", "rejected", "chosen_tail", "rejected_tail")[: 4 if tails else 2]
    memory = ObjectiveState(rewards=6, reward_mean=0.3, margin_mean=-0.2)
    whole = WholeStep(objective, ROWS, made_up(ROWS, tails), 0.1, memory) if objective.whole_step else None
    total, gradients = 0.0, torch.zeros(len(names), 64, dtype=torch.float64)
    for rows in split:
        known = made_up(rows, tails)
        inputs = {name: getattr(known, name).requires_grad_() for name in names}
        logps = dataclasses.replace(known, **inputs)
        if whole is None:
            loss = objective(logps, 0.1)
            carrier = loss.losses.sum()
        else:
            loss, carrier = whole.part(rows, logps)
        total += loss.losses.sum().item()
        for index, slope in enumerate(torch.autograd.grad(carrier, list(inputs.values()), allow_unused=True)):
            if slope is not None:
                gradients[index].index_add_(0, torch.from_numpy(rows), slope)
    return total, gradients


@pytest.mark.parametrize("settings", OBJECTIVES, ids=str)
def test_any_split_gives_the_same_loss_and_gradient(settings):
    total, gradients = summed(settings, SPLITS[0])
    assert gradients.abs().max() > 1e-4
    for split in SPLITS[1:]:
        other, others = summed(settings, split)
        assert other == pytest.approx(total, rel=1e-12)
        torch.testing.assert_close(others, gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("settings", [one for one in OBJECTIVES if Objective(ObjectiveConfig(**one)).whole_step], ids=str)
def test_the_gradient_is_that_of_the_whole_step(settings):
    """Compare with autograd through the objective itself, with the beta and the mean of the step as constants."""
    objective = Objective(ObjectiveConfig(**settings))
    tails = objective.config.ld_alpha is not None
    logps, memory = made_up(ROWS, tails), ObjectiveState(rewards=6, reward_mean=0.3, margin_mean=-0.2)
    beta, settled = objective.remember(logps, 0.1, memory)
    logps.chosen.requires_grad_()
    logps.rejected.requires_grad_()
    loss = objective(logps, beta, settled).losses.sum()
    wanted = torch.zeros(2, 64, dtype=torch.float64)
    for index, slope in enumerate(torch.autograd.grad(loss, (logps.chosen, logps.rejected))):
        wanted[index].index_add_(0, torch.from_numpy(ROWS), slope)
    total, found = summed(settings, SPLITS[1])
    assert total == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(found[:2], wanted, rtol=1e-9, atol=1e-12)


REAL = [
    {"loss": "aot"},
    {"loss": [{"sigmoid": 0.8}, {"bco": 0.2}, {"sft": 1.0}], "dynamic_beta": 0.6},
    {"loss": [{"sigmoid": 1.0}, {"sft": 0.5}], "ld_alpha": 0.3, "use_weighting": True},
]


@pytest.fixture(scope="module")
def table(tiny_llama):
    return with_reference(tiny_pairs(33), tiny_llama)


def rows_of(jobs):
    return [(run.steps, run.evals, run.notes) for args, settings in jobs for run in [train_here(*args, **settings)]]


def test_a_real_model_takes_the_same_steps_on_one_rank_and_on_two(table, tiny_llama, tmp_path):
    def jobs(**more):
        return [
            ((table, tiny_llama, tmp_path / "scratch"), dict(steps=4, held_out=table.slice(0, 9)) | settings | more)
            for settings in REAL
        ]

    (alone,) = run_distributed(rows_of, 1, tmp_path / "one", jobs())
    two, other = run_distributed(rows_of, 2, tmp_path / "two", jobs(tokens_per_batch=200))
    assert [exact(steps) for steps, *_ in two] == [exact(steps) for steps, *_ in other]
    for (steps, evals, notes), (split, late, _), settings in zip(alone, two, REAL, strict=True):
        for name in ("loss", "rewards/margins", "rewards/chosen", "grad_norm", *["beta"] * ("dynamic_beta" in settings)):
            assert [row[name] for row in split] == pytest.approx([row[name] for row in steps], abs=2e-5, rel=1e-4), name
        assert late[-1]["eval_loss"] == pytest.approx(evals[-1]["eval_loss"], abs=2e-5)
        # The first loss is foretold, but for WPO's weights.
        foretold = [note for note in notes if note.startswith("first loss")]
        assert len(foretold) == (0 if settings.get("use_weighting") else 1), notes
        assert not any("round differently" in note for note in notes)
    assert len({row["beta"] for row in alone[1][0]}) > 1  # it moves


def interrupted(table, model, scratch, keep, settings):
    return train_here(table, model, scratch, steps=6, checkpoint_every=3, keep=keep, held_out=table.slice(0, 9), **settings)


def whole_run(*args):
    run = interrupted(*args)
    return run.steps, run.evals, run.summary.memory


def rest_of_run(table, model, scratch, keep, settings):
    run = train_here(
        table,
        model,
        scratch,
        steps=6,
        checkpoint_every=3,
        checkpoint=keep / "step-3",
        held_out=table.slice(0, 9),
        **settings,
    )
    return run.steps, run.evals, run.summary.memory


def test_what_an_objective_remembers_survives_a_checkpoint(table, tiny_llama, tmp_path):
    settings = {"loss": "bco", "dynamic_beta": 0.6, "beta": {"start": 0.2, "end": 0.1}, "zero": 2}
    args = table, tiny_llama, tmp_path / "s", tmp_path / "keep", settings
    (steps, evals, memory), _ = run_distributed(whole_run, 2, tmp_path / "a", *args)
    (rest, late, again), _ = run_distributed(rest_of_run, 2, tmp_path / "b", *args)
    assert exact(rest) == exact(steps)[3:] and exact(late) == exact(evals)[-1:]
    assert memory == again and memory["rewards"] == 2 * sum(int(row["pairs"]) for row in steps) and memory["margin_mean"]
