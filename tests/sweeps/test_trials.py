"""Trials of section ``sweep``: their settings, names and errors."""

import re

import pytest
import yaml

from raydpo.config import load_config
from raydpo.config.run import NAME_PATTERN
from raydpo.config.sweep import DrawConfig
from raydpo.errors import ConfigError
from raydpo.sweeps.trials import parameters_of, trial_name, trials_of


@pytest.fixture
def sweep(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "a.jsonl").write_text("{}\n")
    tree = {
        "output": str(tmp_path / "runs"),
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": [str(tmp_path / "a.jsonl")], "eval": {"fraction": 0.1}},
    }

    def trials(*overrides, **section):
        return trials_of(load_config(tree | {"sweep": section}, overrides))

    return trials


def names(trials):
    return [trial.name for trial in trials]


def test_a_grid_is_every_combination(sweep, tmp_path):
    trials = sweep(grid={"train.beta": [0.1, 0.3], "train.lr": ["1e-6", 5e-7]})
    assert names(trials) == ["beta=0.1,lr=1e-06", "beta=0.1,lr=5e-07", "beta=0.3,lr=1e-06", "beta=0.3,lr=5e-07"]
    assert [(trial.config.train.beta, trial.config.train.lr) for trial in trials] == [
        (0.1, 1e-6),
        (0.1, 5e-7),
        (0.3, 1e-6),
        (0.3, 5e-7),
    ]
    assert parameters_of(trials) == ["train.beta", "train.lr"]
    first = trials[0].config
    assert first.run_dir == f"{tmp_path}/runs/model-sweep/beta=0.1,lr=1e-06"
    assert first.cache_uri == f"{tmp_path}/runs/cache" and first.sweep is None


def test_a_trial_is_what_its_configuration_file_says(sweep):
    for trial in sweep(list=[{"train.beta": 0.2}, {"model.lora": {"r": 4}}, {"data.filter": "chosen_tokens < 9"}]):
        assert load_config(yaml.safe_load(trial.config.to_yaml())).to_yaml() == trial.config.to_yaml()
        assert re.fullmatch(NAME_PATTERN, trial.name)


def test_a_sweep_is_what_its_configuration_file_says(tmp_path, sweep):
    tree = {
        "output": str(tmp_path / "runs"),
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": str(tmp_path / "a.jsonl")},
        "sweep": {"random": {"samples": 3, "train.lr": {"uniform": [0.1, 0.2]}}},
    }
    config = load_config(tree)
    again = load_config(yaml.safe_load(config.to_yaml()))
    assert names(trials_of(again)) == names(trials_of(config)) and again.run_dir == config.run_dir


def test_checks_ask_what_was_given_not_what_is_default(sweep):
    """steps and epochs contradict each other only where both are set."""
    assert sweep(grid={"train.steps": [5]})[0].config.train.steps == 5
    with pytest.raises(ConfigError, match=r"trial train.steps=5: 'train': steps \(5\) and epochs \(3\) contradict"):
        sweep("train.epochs=3", grid={"train.steps": [5]})


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"train.beta": 0.1}, "beta=0.1"),
        ({"train.beta": 1.0, "train.loss": "ipo"}, "beta=1.0,loss=ipo"),
        ({"model.lora.r": 8, "train.seed": 3}, "r=8,seed=3"),
        ({"data.train.0.limit": 100}, "train.0.limit=100"),
        ({"data.train.0.weight": 0.5, "data.train.1.weight": 2.0}, "train.0.weight=0.5,train.1.weight=2.0"),
        ({"data.fraction": 0.1, "data.eval.fraction": 0.2}, "data.fraction=0.1,eval.fraction=0.2"),
        ({"model.lora": None, "data.shuffle": False}, "lora=null,shuffle=false"),
        ({"data.train_on": [{"answer": 1.0}, {"reasoning": 0.1}]}, "train_on=answer+0.1reasoning"),
        ({"data.train_on": "answer", "data.eval.train_on": None}, "data.train_on=answer,eval.train_on=null"),
    ],
)
def test_names_say_the_settings(settings, name):
    assert trial_name(settings) == name


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"data.filter": "chosen_tokens < 9"}, {"data.filter": "chosen_tokens > 9"}),
        ({"model.path": "./a/b"}, {"model.path": "./a-b"}),
        ({"model.lora": {"r": 1}}, {"model.lora": [{"r": 1}]}),
        ({"model.path": "x" * 300 + "1"}, {"model.path": "x" * 300 + "2"}),
        ({"model.path": "/"}, {"model.path": "//"}),
    ],
)
def test_what_a_name_cannot_say_is_in_its_digest(one, other):
    assert trial_name(one) != trial_name(other)
    for name in (trial_name(one), trial_name(other)):
        assert re.fullmatch(NAME_PATTERN, name), name


def test_a_sweep_over_what_counts_names_its_trials_by_it(sweep):
    """Weights that a name cannot tell apart get a digest."""
    weighted = [[{"answer": 1.0}, {"reasoning": weight}] for weight in (0.1, 0.10000001)]
    trials = sweep(grid={"data.train_on": ["completion", "answer", *weighted]})
    first, second, third, fourth = names(trials)
    assert (first, second, third) == ("train_on=completion", "train_on=answer", "train_on=answer+0.1reasoning")
    assert re.fullmatch(r"train_on=answer\+0.1reasoning-[0-9a-f]{8}", fourth)
    assert [trial.config.data.train_on for trial in trials[:2]] == ["completion", "answer"]


def test_names_do_not_depend_on_the_other_trials(sweep):
    few = sweep(list=[{"train.beta": 0.1}, {"train.beta": 0.3}])
    more = sweep(list=[{"train.beta": 0.3, "train.lr": 1e-5}, {"train.beta": 0.3}, {"train.beta": 0.1}])
    assert set(names(few)) < set(names(more))


def test_settings_of_one_name_are_told_apart(sweep):
    quantized = sweep(
        "model.lora={r: 4}",
        "reference.allow_other_quantization=true",
        list=[{"model.quantization": "8bit"}, {"reference.quantization": "8bit"}],
    )
    assert names(quantized)[0] == "quantization=8bit" and re.fullmatch("quantization=8bit-[0-9a-f]{8}", names(quantized)[1])


@pytest.mark.parametrize(
    ("draw", "place", "value"),
    [
        ({"uniform": (0.0, 0.4999)}, 0.9999, 0.4999),
        ({"uniform": (0.0, 0.4999)}, 0.5, 0.25),
        ({"uniform": (0.1235, 1.0)}, 0.0, 0.1235),
        ({"log_uniform": (1.2345e-5, 1e-3)}, 0.0, 1.2345e-5),
        ({"log_uniform": (1e-4, 9.997e-4)}, 0.99999, 9.997e-4),
        ({"log_uniform": (1e-7, 1e-5)}, 0.5, 1e-6),
    ],
)
def test_a_drawn_number_is_rounded_but_stays_within_its_bounds(draw, place, value):
    assert DrawConfig(**draw).at(place) == value


def test_random_trials_are_the_same_each_time_and_the_first_of_more(sweep):
    draws = {
        "train.lr": {"log_uniform": [1e-7, 1e-5]},
        "train.beta": {"choice": [0.1, 0.3]},
        "train.label_smoothing": {"uniform": [0, 0.2]},
    }
    eight, again, more, other = (
        sweep(random={"samples": samples, "seed": seed} | draws) for samples, seed in ((8, 0), (8, 0), (20, 0), (8, 1))
    )
    assert names(eight) == names(again) == names(more)[:8] and not set(names(eight)) & set(names(other))
    fewer_keys = sweep(random={"samples": 8, "train.lr": draws["train.lr"]})
    assert [trial.config.train.lr for trial in fewer_keys] == [trial.config.train.lr for trial in eight]
    rates = [trial.config.train.lr for trial in more]
    assert all(1e-7 <= lr <= 1e-5 for lr in rates) and {lr < 1e-6 for lr in rates} == {True, False}
    assert {trial.config.train.beta for trial in more} == {0.1, 0.3}
    assert len(sweep(random={"samples": 2, "train.beta": {"choice": [0.1, 0.3]}})) == 2, "each value once"


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"grid": {"train.bata": [1]}}, ["trial train.bata=1", "did you mean 'train.beta'"]),
        ({"grid": {"train.beta": [0.1, -1, -2]}}, ["trial train.beta=-1:", "trial train.beta=-2:", "greater than 0"]),
        ({"grid": {"train.beta": 0.1}}, ["sweep.grid.train.beta", "0.1", "expected a list"]),
        ({"grid": {"train.beta": []}}, ["grid.train.beta has no values"]),
        ({"grid": {"train.beta": [0.1, "0.1"]}}, ["twice"]),
        ({"grid": {"train.beta": [1]}, "list": [{"train.beta": 1}]}, ["grid and list given", "one of"]),
        ({}, ["neither grid, list nor random"]),
        ({"list": [{}]}, ["sets nothing"]),
        ({"grid": {"output": ["x"]}}, ["'output' cannot be varied"]),
        ({"grid": {"cache.uri": ["x"]}}, ["'cache.uri' cannot be varied"]),
        ({"grid": {"train beta": [1]}}, ["'train beta'", "in full"]),
        ({"grid": {"data.train.4.limit": [1]}}, ["there is no entry 4"]),
        ({"random": {"samples": 3, "train.beta": {"choice": [0.1, 0.3]}}}, ["samples is 3", "only 2 different"]),
        (
            {"random": {"samples": 3, "train.lr": {"log_uniform": [0, 1]}}},
            ["sweep.random.train.lr", "log_uniform is [0, 1]"],
        ),
        ({"random": {"samples": 3, "train.lr": {"uniform": [2, 1]}}}, ["uniform is [2, 1]", "below the second"]),
        ({"random": {"samples": 3, "train.lr": {}}}, ["nothing given", "log_uniform: [low, high]"]),
        (
            {"grid": {"train.beta": [0.1]}, "metric": "eval_rewards/acuracies"},
            ["sweep.metric is 'eval_rewards/acuracies', which no evaluation measures", "eval_rewards/accuracies"],
        ),
        (
            {"grid": {"train.beta": [0.1]}, "metric": "eval_rewards/rejected"},
            ["sweep.metric: neither a lower nor a higher 'eval_rewards/rejected' is better", "one of eval_loss"],
        ),
        (
            {"grid": {"train.beta": [0.1]}, "stop_early": {"grace": 50, "metric": "eval_length/chosen"}},
            ["sweep.stop_early.metric: neither a lower nor a higher 'eval_length/chosen'"],
        ),
        (
            {"grid": {"train.loss": ["sigmoid", "simpo"]}, "metric": "eval_logps/chosen_fell"},
            ["trial train.loss=simpo: sweep.metric is 'eval_logps/chosen_fell', which no evaluation measures"],
        ),
        (
            {"list": [{"train.lr": 1e-6}, {"train.keep_best": "eval_lengths"}]},
            ["trial train.keep_best=eval_lengths:", "train.keep_best is 'eval_lengths', which no evaluation measures"],
        ),
        ({"grid": {"train.beta": [0.1]}, "stop_early": {"grace": 60}}, ["grace is 60", "every 50 steps"]),
        (
            {"list": [{"evaluate.policy": "org/model"}], "evaluate": True},
            ["evaluate.policy is org/model, but sweep.evaluate measures the policies of the trials"],
        ),
        (
            {"list": [{"data.eval": None}], "evaluate": True},
            ["sweep.evaluate has no pairs to measure trials on; set data.eval"],
        ),
    ],
)
def test_bad_sweeps_name_the_trial_and_the_fix(section, said, sweep):
    with pytest.raises(ConfigError) as caught:
        sweep(**section)
    for piece in said:
        assert piece in str(caught.value), str(caught.value)


def test_the_loss_compares_trials_that_share_it(sweep):
    assert len(sweep(grid={"train.lr": [1e-6, 1e-5]}, metric="eval_loss")) == 2
    assert len(sweep(list=[{"train.lr": 1e-6}, {"train.lr": 1e-5, "train.loss": "sigmoid"}], metric="eval_loss")) == 2


@pytest.mark.parametrize(
    ("grid", "key"),
    [
        ({"train.beta": [0.01, 1.0]}, "train.beta"),
        ({"train.loss": ["sigmoid", "sigmoid_norm"]}, "train.loss"),
        ({"train.loss": [[{"sigmoid": 1.0}, {"sft": 0.1}], [{"sigmoid": 1.0}, {"sft": 0.2}]]}, "train.loss"),
        ({"train.label_smoothing": [0.0, 0.1]}, "train.label_smoothing"),
        ({"train.length_penalty": [0.0, 0.01]}, "train.length_penalty"),
        ({"train.beta.end": [0.05, 0.1]}, "train.beta"),
        ({"data.margin_column": [None, "score"]}, "data.margin_column"),
    ],
)
@pytest.mark.parametrize("metric", ["eval_loss", "eval_rewards/margins", "eval_a/loss", "eval_b/rewards/margins"])
def test_metrics_of_another_scale_are_not_compared(grid, key, metric, sweep, tmp_path):
    """The same holds for stop_early. Accuracies compare between all of these trials."""
    (tmp_path / "b.jsonl").write_text("{}\n")
    more = [f"data.train=['{tmp_path / 'a.jsonl'}', '{tmp_path / 'b.jsonl'}']"]
    more += ["train.beta={start: 0.2, end: 0.1}"] if "train.beta.end" in grid else []
    for section in ({"metric": metric}, {"stop_early": {"grace": 50, "metric": metric}}):
        with pytest.raises(ConfigError, match=f"'{metric}', which does not compare between trials with different {key};"):
            sweep(*more, grid=grid, **section)
    assert len(sweep(*more, grid=grid, metric="eval_a/rewards/accuracies")) == 2


def test_nothing_held_out_is_nothing_to_choose_by(sweep):
    with pytest.raises(ConfigError, match=r"sweep.stop_early is set, but there are no held-out pairs"):
        sweep("data.eval=null", grid={"train.beta": [0.1]}, stop_early={"grace": 50})
    assert sweep("data.eval=null", grid={"train.beta": [0.1]})
