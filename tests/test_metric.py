"""Metrics of held-out evaluations: the configuration knows their names, and which way each is better."""

import pytest
import torch

from raydpo.config import load_config, lower_is_better
from raydpo.config.metric import held_out_metrics
from raydpo.errors import ConfigError
from raydpo.losses import PairLogps, preference_loss
from raydpo.training.launch.launch import _checkpoint_config
from raydpo.training.metrics import PairSums

BETTER = {"loss": "min", "chosen_fell": "min", "accuracies": "max", "margins": "max"}


def measured(sources, reference=True):
    logps = PairLogps(*(torch.tensor([-10.0, -20.0]) for _ in range(4)), torch.tensor([3.0, 4.0]), torch.tensor([5.0, 2.0]))
    sums = PairSums(sources, torch.device("cpu"), reference=reference)
    sums.add(preference_loss("sigmoid", logps, beta=0.1), logps, torch.arange(2) % len(sources))
    return [f"eval_{name}" for name in sums.metrics()]


@pytest.mark.parametrize("sources", [["a"], ["helpful", "a/b.c"]])
@pytest.mark.parametrize("reference", [True, False])
def test_the_names_are_those_that_are_measured(sources, reference):
    assert sorted(held_out_metrics(sources, reference=reference)) == sorted(measured(sources, reference))


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("helpful", "harmless"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    return {
        "output": str(tmp_path),
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": [str(tmp_path / f"{name}.jsonl") for name in ("helpful", "harmless")], "eval": {"fraction": 0.1}},
    }


@pytest.mark.parametrize("metric", measured(["helpful", "harmless"]))
def test_the_best_checkpoints_are_kept_by_any_metric_that_has_a_best(metric, tree):
    last = metric.removeprefix("eval_").split("/")[-1]
    if last in BETTER:
        train = load_config(tree, [f"train.keep_best={metric}"]).train
        assert _checkpoint_config(train).checkpoint_score_order == BETTER[last]
        assert lower_is_better(metric) == (BETTER[last] == "min")
    else:
        with pytest.raises(ConfigError, match=f"keep_best: neither a lower nor a higher '{metric}' is .*eval_helpful/loss"):
            load_config(tree, [f"train.keep_best={metric}"])


@pytest.mark.parametrize("metric", ["eval_los", "loss", "eval_other/loss", "eval_rewards/acuracies"])
def test_what_no_evaluation_measures_is_refused_before_anything_starts(metric, tree):
    with pytest.raises(ConfigError, match=f"train.keep_best is '{metric}', which no evaluation measures; set it to one of"):
        load_config(tree, [f"train.keep_best={metric}"])


def test_a_metric_against_the_reference_needs_one(tree):
    """A loss without a reference has none, unless the filter needs its log-probs; another filter does not help."""
    overrides = ["train.loss=simpo", "train.keep_best=eval_logps/chosen_fell"]
    for condition in ("null", "chosen_tokens < 10"):
        with pytest.raises(ConfigError, match="'eval_logps/chosen_fell', which no evaluation measures"):
            load_config(tree, [*overrides, f"data.filter={condition}"])
    assert load_config(tree, [*overrides, "data.filter=ref_margin > -20"]).needs_reference


def test_a_file_of_held_out_pairs_is_one_source(tree, tmp_path):
    with pytest.raises(ConfigError, match="'eval_helpful/loss', which no evaluation measures"):
        load_config(tree, ["train.keep_best=eval_helpful/loss", f"data.eval={tmp_path / 'helpful.jsonl'}"])


@pytest.mark.parametrize("metric", ["eval_loss", "eval_rewards/margins", "eval_helpful/loss"])
def test_a_beta_that_moves_leaves_no_loss_to_compare(metric, tree):
    moving = "train.beta={start: 0.2, end: 0.05}"
    with pytest.raises(ConfigError, match=rf"'{metric}', which cannot be compared between steps: train.beta changes"):
        load_config(tree, [f"train.keep_best={metric}", moving])
    assert load_config(tree, ["train.keep_best=eval_rewards/accuracies", moving]).train.keep_best
