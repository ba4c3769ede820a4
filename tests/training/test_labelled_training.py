"""Training on completions with labels: the same steps in any layout, on any number of ranks, continued or not."""

import math

import numpy as np
import pytest
import torch
from distributed import run_distributed
from kernel import exact, train_here
from unpaired import labelled, mismatched, scored

LOSSES = ("kto", "bco", "bco_pair", "apo_zero", "sft")
LABELS = ([1, -1, 1, 1, 0, -1, 1, -1, -1, 0, 1, 1, -1] * 2)[:25]  # steps of 8: the fourth has one row
MIXTURE = [{"kto": 1.0}, {"sft": 0.1}]
STEPS = 4


@pytest.fixture(scope="module")
def tables(tiny_llama):
    """By whether the other sides are filled."""
    table = labelled(LABELS)
    return {False: scored(table, tiny_llama), True: scored(mismatched(table, 8), tiny_llama)}


def jobs_of(tables, model, scratch, losses=LOSSES, **more):
    return [
        ((tables["kto" in str(loss)], model, scratch), dict(loss=loss, held_out=tables["kto" in str(loss)]) | more)
        for loss in losses
    ]


def runs(jobs):
    return [(run.steps, run.evals, run.notes) for args, more in jobs for run in [train_here(*args, **more)]]


def numbers(rows, names=("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "kl", "grad_norm")):
    return [row.get(name, 0.0) for row in rows for name in names]


def test_any_layout_and_number_of_ranks_takes_the_same_steps(tables, tiny_llama, tmp_path):
    losses = (*LOSSES, MIXTURE)
    settings = dict(steps=STEPS, zero=0)
    jobs = jobs_of(tables, tiny_llama, tmp_path / "s", losses, **settings)
    layouts = jobs_of(tables, tiny_llama, tmp_path / "s", LOSSES[:2], **settings)
    jobs += [(args, more | {"policy": {"layout": layout}}) for args, more in layouts for layout in ("packed", "padded")]
    (alone,) = run_distributed(runs, 1, tmp_path / "one", jobs)
    tree, others = alone[: len(losses)], alone[len(losses) :]
    more = dict(steps=STEPS, tokens_per_batch=200, zero=2)
    two, again = run_distributed(runs, 2, tmp_path / "two", jobs_of(tables, tiny_llama, tmp_path / "s", losses, **more))
    assert [exact(steps) for steps, *_ in two] == [exact(steps) for steps, *_ in again]
    for number, loss in enumerate(losses):
        steps, evals, notes = tree[number]
        for other in (*others[2 * number : 2 * number + 2], two[number]):
            assert numbers(other[0]) == pytest.approx(numbers(steps), abs=2e-5, rel=1e-4), loss
            late, last = other[1][-1], evals[-1]
            assert {*late} == {*last}
            assert late == pytest.approx(last, abs=2e-4, rel=1e-4), loss
        assert not any("round differently" in note for note in notes)
    firsts = {loss: tree[number][1][0]["eval_loss"] for number, loss in enumerate(LOSSES)}
    pairs = LABELS.count(0) / len(LABELS)
    assert firsts["kto"] == pytest.approx(0.5, abs=1e-6)
    assert firsts["bco"] == firsts["bco_pair"] == pytest.approx(math.log(2) * (1 + pairs), abs=1e-6)
    for number, loss in enumerate(LOSSES[:4]):
        evals = tree[number][1]
        assert evals[0]["eval_rewards/auc"] == 0.5 and evals[-1]["eval_rewards/auc"] > 0.7, loss
        assert ("eval_kl" in evals[0]) == (loss == "kto")


def test_interrupted_equals_uninterrupted(tables, tiny_llama, tmp_path):
    def settings(loss):
        filled = tables[loss == "kto"]
        return (filled, tiny_llama, tmp_path / "s"), dict(loss=loss, held_out=filled, steps=6, checkpoint_every=3)

    whole, rest = [], []
    for loss in ("kto", "bco"):
        args, more = settings(loss)
        whole.append((args, more | {"keep": tmp_path / loss}))
        rest.append((args, more | {"checkpoint": tmp_path / loss / "step-3"}))
    (first,) = run_distributed(runs, 1, tmp_path / "ranks", whole)
    (found,) = run_distributed(runs, 1, tmp_path / "again", rest)
    for (steps, evals, _), (later, late, _) in zip(first, found, strict=True):
        assert exact(later) == exact(steps)[3:] and exact(late) == exact(evals)[-1:]


def by_hand(table, model, beta, weights=(1.0, 1.0)):
    """Loss of KTO on all rows of ``table``, from plain transformers, and the gradient's norm."""
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    policy.get_input_embeddings().weight.data *= 0.5  # so that it is not the reference
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    def logratio(prompt, completion):
        ids = torch.tensor([prompt + completion])

        def total(model):
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            return logps[len(prompt) - 1 :].double().sum()

        with torch.no_grad():
            known = total(reference)
        return total(policy) - known

    terms, drift = [], []
    for row in table.to_pylist():
        label = row["label"]
        chosen, rejected = (logratio(row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected"))
        drift += [each.detach() for each, is_sample in ((chosen, label <= 0), (rejected, label >= 0)) if is_sample]
        terms.append((label, chosen, rejected))
    z = torch.stack(drift).mean().clamp(min=0)
    total = 0.0
    for label, chosen, rejected in terms:
        good = weights[0] * (1 - torch.sigmoid(beta * (chosen - z)))
        bad = weights[1] * (1 - torch.sigmoid(beta * (z - rejected)))
        total = total + ((good + bad) / 2 if label == 0 else good if label > 0 else bad)
    loss = total / len(terms)
    loss.backward()
    norm = math.sqrt(sum(float(each.grad.double().pow(2).sum()) for each in policy.parameters() if each.grad is not None))
    return loss.item(), float(z), norm, policy


def test_pairs_and_labels_in_one_step_are_the_computation_by_hand(tables, tiny_llama, tmp_path):
    table = tables[True].slice(0, 8)
    loss, z, norm, policy = by_hand(table, tiny_llama, 0.1, (0.7, 1.3))
    moved = tmp_path / "moved"
    policy.save_pretrained(str(moved))
    import shutil

    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / file, moved / file)
    more = dict(loss="kto", desirable_weight=0.7, undesirable_weight=1.3, shuffle=False, steps=1, zero=0, clip=1e9)
    (((steps, *_),),) = run_distributed(
        runs, 1, tmp_path / "ranks", [((table, moved, tmp_path / "s"), more | {"starts_as_reference": False})]
    )
    assert steps[0]["loss"] == pytest.approx(loss, abs=1e-5)
    assert steps[0]["kl"] == pytest.approx(z, abs=1e-3) and z > 0.01
    assert steps[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_a_step_of_one_label_has_no_figures_of_the_other(tiny_llama, tmp_path):
    table = scored(labelled([1, 1, 1, 1]), tiny_llama)
    (((steps, evals, _),),) = run_distributed(
        runs, 1, tmp_path / "ranks", [((table, tiny_llama, tmp_path / "s"), dict(loss="bco", steps=1, held_out=table))]
    )
    for name in ("rewards/rejected", "rewards/margins", "logps/rejected", "length/rejected", "length/margin_correlation"):
        assert name not in steps[0] and f"eval_{name}" not in evals[0]
    assert steps[0]["rewards/accuracies"] == 0.5 and np.isfinite(list(steps[0].values())).all()
