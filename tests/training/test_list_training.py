"""Training on ranked lists: the same on every number of workers, in every layout, after every interruption."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from distributed import run_distributed
from kernel import counting, exact, part_of, train_here, with_reference
from test_equalities import with_live_reference
from tiny import make_tokenizer, preferences
from transformers import AutoModelForCausalLM

from raydpo.config import DataConfig, ObjectiveConfig
from raydpo.data.lists import rows_of
from raydpo.data.pairs import load_pairs
from raydpo.data.tokenise import Tokeniser
from raydpo.losses import Objective
from raydpo.model.layout import Method, lay_out
from raydpo.training.evaluate import reference_logps
from raydpo.training.gate import expected_first_loss, gate_rows
from raydpo.training.pairs import TrainingPairs

STEPS = 5
LISTS = dict(loss="plackett_luce", pairs_per_step=4)


def records_of(sizes, seed=0):
    """Records of so many ranked completions each; the second and third of a list of four are alike."""
    drawn = iter(preferences(sum(sizes), seed))
    records = []
    for size in sizes:
        made = [next(drawn) for _ in range(size)]
        ranks = [1, 2, 2, 4] if size == 4 else list(range(size))
        records.append({"prompt": made[0]["prompt"], "completions": [each["chosen"] for each in made], "ranks": ranks})
    return records


def lists_of(directory, sizes, **data):
    path = directory / "lists.jsonl"
    path.write_text("\n".join(map(json.dumps, records_of(sizes))))
    config = DataConfig(train=str(path), ranked="lists", max_length=512, max_dropped=1, **data)
    return load_pairs(config, Tokeniser(make_tokenizer())).train


SIZES = [2, 3, 6, 2, 4, 5, 2, 7, 4, 2, 5, 4, 3]  # 13 lists in steps of 4: the fourth step has one, fewer than two ranks


@pytest.fixture(scope="module")
def table(tiny_llama, tmp_path_factory):
    return with_reference(lists_of(tmp_path_factory.mktemp("lists"), SIZES), tiny_llama)


def test_a_list_is_one_tree(table):
    """Its prompt is computed once, whatever the number of its completions."""
    pairs = TrainingPairs.of(table)
    starts = pairs.starts.tolist()
    for number, (start, stop) in enumerate(pairwise(starts)):
        tokens = sum(pairs.chosen_tokens[start:stop]) + sum(pairs.rejected_tokens[start:stop])
        layout = lay_out(pairs.groups(range(start, stop)), Method("tree", "sdpa"))
        assert layout.input_ids.numel() <= pairs.prompt_tokens[start] + tokens
        (planned,) = pairs.shapes_of(np.array([number])).positions("tree")
        assert planned == pairs.prompt_tokens[start] + tokens
        # Completions may share their first tokens.
        assert layout.input_ids.numel() > planned - 5
    assert starts[-1] == len(pairs) == len(table)


def test_which_lists_are_compared_at_the_gate(table):
    """Whole ones only."""
    pairs = TrainingPairs.of(table)
    first = rows_of(pairs.starts, [0, 3])
    rows = gate_rows(pairs, first, count=9, seed=0)
    assert set(rows) | set(first) == set(rows_of(pairs.starts, np.unique(pairs.items_of(sorted([*rows, *first])))))
    assert not set(rows) & set(first) and len(rows) >= 3


def test_a_list_that_occurs_twice_is_two_lists(table):
    pairs, objective = TrainingPairs.of(table), Objective(ObjectiveConfig(loss="plackett_luce"))
    once, twice = (reference_logps(pairs, rows_of(pairs.starts, lists), objective.config) for lists in ([2], [2, 2]))
    assert (once.count, twice.count) == (1, 2) and len(twice.lists) == 2 * len(once.lists) == 6
    assert objective(twice, 0.1).losses.tolist() == 2 * objective(once, 0.1).losses.tolist()
    assert expected_first_loss(objective, pairs, rows_of(pairs.starts, [2, 2]), 0.1) == pytest.approx(math.log(720))


def first_rows(jobs):
    return [train_here(*args, shuffle=False, **LISTS | settings).steps[0] for args, settings in jobs]


def runs(jobs):
    return [
        (found.steps, found.evals, found.notes)
        for found in (train_here(*args, steps=STEPS, **LISTS | settings) for args, settings in jobs)
    ]


def test_the_gradient_of_a_step_is_that_of_the_mean_over_lists(table, tiny_llama, tmp_path):
    """Two lists, of two and of three completions, against plain transformers and the formula."""
    two = table.slice(0, 3)
    job = ((two, tiny_llama, tmp_path / "scratch"), dict(pairs_per_step=2, beta=0.5, clip=1e9, steps=1))
    ((row,),) = run_distributed(first_rows, 1, tmp_path / "ranks", [job])
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    scores = []
    for place in range(5):
        side, at = ("chosen", "rejected")[place % 2], place // 2
        prompt = two["prompt_ids"][at].as_py()
        ids = torch.tensor([prompt + two[f"{side}_ids"][at].as_py()])
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
        scores.append(0.5 * (logps.sum() - sum(two[f"ref_{side}_logps"][at].as_py())))
    losses = [torch.logsumexp(torch.stack(scores[own:end]), 0) - scores[own] for own, end in ((0, 2), (2, 5), (3, 5))]
    loss = sum(losses) / 2
    loss.backward()
    norm = sum(each.grad.square().sum() for each in model.parameters()).sqrt().item()
    assert row["loss"] == pytest.approx(loss.item(), abs=1e-6) == pytest.approx((2 * math.log(2) + math.log(3)) / 2)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_one_worker_equals_two_in_every_layout_and_a_live_reference(table, tiny_llama, tmp_path):
    settings = [
        dict(held_out=table),
        dict(tokens_per_batch=150),
        dict(policy={"layout": "packed"}),
        dict(policy={"layout": "padded"}),
        dict(gradient_checkpointing=True, zero=2),
    ]
    jobs = [((table, tiny_llama, tmp_path / "scratch"), one) for one in settings]
    live = with_live_reference(table, tiny_llama), tiny_llama, tmp_path / "scratch"
    of_some = counting(table, lambda side, row, tokens: part_of(side, row, tokens) if tokens else [])
    masked = (of_some, tiny_llama, tmp_path / "scratch"), dict(held_out=of_some)
    (alone,) = run_distributed(
        runs, 1, tmp_path / "one", [*jobs, (live, {}), (masked[0], dict(policy={"layout": "padded"}))]
    )
    two, other = run_distributed(runs, 2, tmp_path / "two", [*jobs, masked])
    one_masked, two_masked, _ = (found.pop() for found in (alone, two, other))
    wanted = [row["loss"] for row in alone[0][0]]
    assert min(wanted) < wanted[0] - 1e-3  # it learns
    for found in (*alone, *two, *other):
        assert [row["loss"] for row in found[0]] == pytest.approx(wanted, abs=1e-5)
        assert [row["pairs"] for row in found[0]] == [4, 4, 4, 1, 4]
        for row, first in zip(found[0], alone[0][0], strict=True):
            assert row["rewards/margins"] == pytest.approx(first["rewards/margins"], abs=1e-5)
            assert row["tokens"] == first["tokens"]
    for row, same in zip(alone[0][1], two[0][1], strict=True):
        assert row.keys() == same.keys() and row["eval_pairs"] == 81
        assert all(row[name] == pytest.approx(same[name], abs=1e-5) for name in row)
    losses = [row["loss"] for row in one_masked[0]]
    assert [row["loss"] for row in two_masked[0]] == pytest.approx(losses, abs=1e-5)
    assert losses[0] == pytest.approx(wanted[0], abs=1e-6) and abs(losses[-1] - wanted[-1]) > 1e-3
    assert two_masked[1][0]["eval_length/chosen"] < alone[0][1][0]["eval_length/chosen"]
    # At the reference, the loss of a list is the sum of log(1 + number below).
    of_size = {size: sum(math.log(1 + below) for below in range(1, size)) for size in SIZES}
    of_size[4] = math.log(4) + 2 * math.log(2)
    assert alone[0][1][0]["eval_loss"] == pytest.approx(np.mean([of_size[size] for size in SIZES]), abs=1e-6)
    assert alone[0][1][0]["eval_rewards/accuracies"] == 0.5
    assert any("first loss" in note and "warning" not in note for note in alone[0][2])
    assert any(note.startswith("step-0 gate: ") and "pairs computed again" in note for note in alone[0][2])


def interrupted(table, model, scratch, keep, checkpoint=None):
    more = dict(checkpoint_every=2, keep=keep, held_out=table, checkpoint=checkpoint)
    found = train_here(table, model, scratch, steps=STEPS, **LISTS, **more)
    return found.steps, found.evals


def test_interrupted_equals_uninterrupted(table, tiny_llama, tmp_path):
    """The fourth step is the last of an epoch."""
    of_all = table, tiny_llama, tmp_path / "s", tmp_path / "keep"
    (steps, evals), _ = run_distributed(interrupted, 2, tmp_path / "a", *of_all)
    (rest, late), _ = run_distributed(interrupted, 2, tmp_path / "b", *of_all, tmp_path / "keep" / "step-2")
    assert exact(rest) == exact(steps)[2:] and exact(late) == exact(evals)[-1:]
