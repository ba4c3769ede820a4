import ast
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import raydpo.config
from raydpo.cli.entry import main, parsed
from raydpo.config import load_config
from raydpo.config.load import with_setting
from raydpo.config.rewards import RewardConfig
from raydpo.errors import ConfigError
from raydpo.sweeps.trials import trials_of
from raydpo.terminal.guard import guarded


def test_model_data_and_output_are_enough(tree):
    config = load_config(tree)
    assert config.train.beta == 0.1 and config.train.loss == "sigmoid" and config.train.pairs_per_step == 64
    assert config.run_name == "model-sigmoid-beta0.1"
    assert config.cache_uri == tree["output"] + "/cache"
    assert config.reference_path == config.model.path


def test_the_documented_example_loads(tree, tmp_path):
    text = f"""
name: politeness-beta0.1
output: runs/
model:     {{path: {tmp_path}/model, dtype: bfloat16, lora: {{r: 16, alpha: 32, target_modules: all-linear}}}}
reference: {{path: {tmp_path}/model}}
data:
  train: [{{path: {tmp_path}/a.jsonl, name: a, weight: 1.0}}]
  eval:  {{fraction: 0.1}}
  max_length: 1024
  truncation: keep_start
  shuffle: true
cache: {{uri: cache/}}
score: {{workers: 2, gpus_per_worker: 1, tokens_per_batch: 16384, dtype: bfloat16}}
train: {{workers: 2, pairs_per_step: 64, epochs: 1, steps: null, lr: 5.0e-7, schedule: linear, warmup: 0.1,
        weight_decay: 0.0, clip: 1.0, zero: 2,
        loss: sigmoid, beta: 0.1, label_smoothing: 0.0, seed: 0, checkpoint_every: 100, eval_every: 50}}
ray: {{address: null}}
"""
    file = tmp_path / "config.yaml"
    file.write_text(text)
    config = load_config(file, ["train.beta=0.05", "train.lr=1e-6", "data.train.0.weight=2"])
    assert (config.train.beta, config.train.lr, config.data.train[0].weight) == (0.05, 1e-6, 2.0)
    assert load_config(yaml.safe_load(config.to_yaml())) == config.model_copy(
        update={"cache": config.cache, "name": config.run_name}
    )


@pytest.mark.parametrize(
    ("override", "name", "text"),
    [
        (
            "train.loss=[{sigmoid: 0.8}, {bco_pair: 0.2}, {sft: 1}]",
            "model-sigmoid+bco_pair+sft-beta0.1",
            "0.8 sigmoid + 0.2 bco_pair + 1 sft",
        ),
        ("train.loss=[{sigmoid: 0.5}]", "model-sigmoid-beta0.1", "0.5 sigmoid"),
        ("train.loss=[{sigmoid: 1}]", "model-sigmoid-beta0.1", "sigmoid"),
        ("train.loss=my_losses.mine:squared", "model-squared-beta0.1", "my_losses.mine:squared"),
        ("train.beta={start: 0.2, end: 0.05, schedule: cosine}", "model-sigmoid-beta0.2-0.05", "sigmoid"),
    ],
)
def test_losses_and_betas_of_all_kinds_have_a_name_and_survive_yaml(override, name, text, tree):
    config = load_config(tree, [override])
    assert (config.run_name, config.train.loss_text) == (name, text)
    assert load_config(yaml.safe_load(config.to_yaml())).train == config.train


def test_a_resolved_configuration_names_every_default_and_contradicts_nothing(tree):
    """checkpoint_minutes replaces checkpoint_every, whose default is in the file, too."""
    config = load_config(tree, ["train.checkpoint_minutes=10"])
    assert load_config(yaml.safe_load(config.to_yaml())).train == config.train
    with pytest.raises(ConfigError, match=r"checkpoint_minutes \(10\) and checkpoint_every \(50\) contradict"):
        load_config(tree, ["train.checkpoint_minutes=10", "train.checkpoint_every=50"])


def test_a_quantized_reference_is_not_divided(tree):
    quantized = ["model.quantization=4bit", "model.lora={r: 8}"]
    assert load_config(tree, quantized).score.partition == "auto"
    for settings, said in (
        (["score.workers=2", "score.partition=2"], r"score\.partition \(2\) is for whole weights"),
        (["score.offload=cpu"], r"score\.offload \(cpu\) is for whole weights"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_config(tree, quantized + settings)
        load_config(tree, [*quantized, *settings, "reference.quantization=none", "reference.allow_other_quantization=true"])


IDLE = [
    ("data.fraction_seed=3", "data.fraction_seed 3 has no effect without data.fraction", "data.fraction=0.5"),
    ("train.sample_tokens=8", "train.sample_tokens 8 has no effect without train.sample_prompts", "train.sample_prompts=2"),
    ("train.gate_pairs=8 train.loss=sft", "train.gate_pairs 8 has no effect on loss sft", "data.filter='ref_margin > 0'"),
    ("data.eval={fraction: 0.1, split: dev}", "split dev has no effect without path", "data.eval={path: PLACE, split: dev}"),
    ("data.eval={fraction: 0.1, subset: x}", "subset x has no effect without path", "data.eval={path: PLACE, subset: x}"),
    ("data.eval={fraction: 0.1, columns: {a: b}}", "columns {'a': 'b'} has no effect", "data.eval={path: PLACE}"),
    ("data.eval={}", "data.eval names no held-out pairs", "data.eval.fraction=0.1"),
    (
        "data.train=[{path: PLACE, train_on: assistant}] data.train_on=answer",
        "data.train_on 'answer' has no effect: each source has its own train_on",
        "data.train=[{path: PLACE}]",
    ),
    ("evaluate.prompts=0 evaluate.max_tokens=8", "max_tokens 8 has no effect on prompts 0", "evaluate.prompts=1"),
    ("evaluate.prompts=0 evaluate.modes=[greedy]", "modes ['greedy'] has no effect on prompts 0", "evaluate.prompts=1"),
    ("evaluate.prompts=0 evaluate.samples=2", "samples 2 has no effect on prompts 0", "evaluate.prompts=1"),
    ("evaluate.prompts=0 evaluate.temperature=2", "temperature 2.0 has no effect on prompts 0", "evaluate.prompts=1"),
    ("evaluate.prompts=0 evaluate.seed=1", "seed 1 has no effect on prompts 0", "evaluate.prompts=1"),
    ("evaluate.prompts=0 evaluate.engine=vllm", "engine vllm has no effect on prompts 0", "evaluate.prompts=1"),
    ("evaluate.prompts=0 evaluate.batch=4", "batch 4 has no effect on prompts 0", "evaluate.prompts=1"),
    ("evaluate.prompts=0 evaluate.exact_steps=false", "exact_steps False has no effect on prompts 0", "evaluate.prompts=1"),
    ("evaluate.engine=vllm evaluate.batch=4", "batch 4 has no effect on engine vllm", "evaluate.engine=transformers"),
    ("evaluate.vllm_python=/v", "vllm_python /v has no effect on engine transformers", "evaluate.engine=vllm"),
    ("train.overlap_communication=true train.zero=3", "has no effect on ZeRO 3", "train.zero=2 train.workers=2"),
    ("train.overlap_communication=true", "has no effect with train.workers 1", "train.workers={min: 1, max: 2}"),
    ("model.fused=true model.dtype=float32", "model.fused has no effect on model.dtype float32", "score.dtype=bfloat16"),
    (
        "evaluate.engine=vllm evaluate.vllm_python=v/bin/python",
        "is not an absolute path",
        "evaluate.vllm_python=/v/bin/python",
    ),
    (
        "evaluate.temperature=0.7 evaluate.exact_steps=false",
        "exact_steps False has no effect on temperature 0.7",
        "evaluate.temperature=1",
    ),
]


def words(text, tree):
    """Overrides of a line, split before each key."""
    return re.split(r" (?=\w+\.\w+=)", text.replace("PLACE", tree["data"]["train"]))


@pytest.mark.parametrize(("settings", "said", "heeding"), IDLE, ids=[settings for settings, *_ in IDLE])
def test_a_setting_that_would_be_ignored_is_refused(settings, said, heeding, tree):
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config(tree, words(settings, tree))
    config = load_config(tree, words(settings, tree) + words(heeding, tree))
    assert load_config(yaml.safe_load(config.to_yaml())).to_yaml() == config.to_yaml()


def test_a_setting_that_is_switched_off_keeps_what_refines_it(tree):
    """As in the resolved configurations of runs, which name every key."""
    assert load_config(tree, ["data.fraction=1.0", "data.fraction_seed=3"]).data.fraction_seed == 3
    assert load_config(tree, ["train.sample_prompts=0", "train.sample_tokens=8"]).train.sample_tokens == 8


def test_what_a_sweep_varies_may_be_refined(tree):
    trials = "sweep.grid={data.fraction: [0.5, 1.0]}"
    found = trials_of(load_config(tree, [trials, "data.fraction_seed=3"]))
    assert [(trial.config.data.fraction, trial.config.data.fraction_seed) for trial in found] == [(0.5, 3), (1.0, 3)]
    found = trials_of(
        load_config(tree, ["sweep.list=[{data.eval.fraction: 0.1}, {data.eval: {fraction: 0.2}}]", "data.eval={}"])
    )
    assert [trial.config.data.eval.fraction for trial in found] == [0.1, 0.2]
    both = [{"data.ranked": "lists", "train.loss": "plackett_luce"}, {"train.loss": "sigmoid"}]
    found = trials_of(load_config(tree | {"sweep": {"list": both}}, []))
    assert [trial.config.data.ranked for trial in found] == ["lists", "pairs"]
    with pytest.raises(ConfigError, match=r"'sigmoid' of train[.]loss is over pairs"):
        trials_of(
            load_config(tree | {"sweep": {"grid": {"train.loss": ["plackett_luce", "sigmoid"]}}}, ["data.ranked=lists"])
        )
    random = "sweep.random={samples: 2, train.sample_prompts: {choice: [1, 2]}}"
    assert len(trials_of(load_config(tree, [random, "train.sample_tokens=8"]))) == 2
    with pytest.raises(ConfigError, match=r"sweep.metric eval_loss has no effect: nothing is held out"):
        trials_of(load_config(tree, ["sweep.grid={train.lr: [1.0e-6, 1.0e-5]}", "sweep.metric=eval_loss"]))


def test_beta_moves_from_start_to_end(tree):
    for schedule, middle in (("linear", 0.125), ("cosine", 0.125)):
        train = load_config(tree, [f"train.beta={{start: 0.2, end: 0.05, schedule: {schedule}}}"]).train
        assert [train.beta_at(step, 11) for step in (0, 5, 10)] == pytest.approx([0.2, middle, 0.05])
    assert train.beta_at(1, 11) > 0.2 - 0.015  # the cosine begins slowly
    assert load_config(tree).train.beta_at(7, 11) == 0.1


def test_only_settings_of_the_objective_that_are_set_are_part_of_its_shape(tree):
    """So checkpoints from before a setting existed still belong to the same run."""
    assert load_config(tree).train.shaped() == {}
    train = load_config(tree, ["train.loss=simpo", "train.simpo_gamma=1.0", "train.lr=1"]).train
    assert train.shaped() == {"simpo_gamma": 1.0}


def test_it_is_frozen(tree):
    with pytest.raises(Exception, match="frozen"):
        load_config(tree).train.beta = 1.0


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.bata=1", ["train.bata", "1", "did you mean 'train.beta'"]),
        ("beta=0.2", ["'beta'", "0.2", "did you mean 'train.beta'"]),
        ("train.eval_steps=3", ["'train.eval_steps' (value 3)", "is 'train.eval_every' here (switching.md"]),
        ("learning_rate=1", ["'learning_rate'", "is 'train.lr' here"]),
        ("train.lora_alpha=3", ["'train.lora_alpha'", "is 'model.lora.alpha' here"]),
        ("train.max_length=3", ["'train.max_length'", "did you mean 'data.max_length'"]),
        ("train.logging_steps=3", ["'train.logging_steps'", "known here: loss, beta"]),
        ("train.loss=sigmod", ["train.loss", "sigmod", "did you mean 'sigmoid'"]),
        ("train.zero=5", ["train.zero", "5", "0, 1, 2 or 3"]),
        ("train.beta=-1", ["train.beta", "-1", "greater than 0"]),
        ("train.beta=.nan", ["train.beta", "nan"]),
        ("train.zero=true", ["train.zero", "number", "not true or false"]),
        ("train.epochs=1:30", ["train.epochs", "'1:30'", "integer"]),
        ("train.seed=1:30", ["train.seed", "'1:30'", "integer"]),
        ("train.warmup=1:30.5", ["train.warmup", "'1:30.5'", "number"]),
        ("train.gpus_per_worker=2", ["gpus_per_worker 2 is more", "set it to 1", "workers to the number"]),
        ("score.gpus_per_worker=2", ["gpus_per_worker 2 is more", "set it to 1", "workers to the number"]),
        ("train.tokens_per_batch=0", ["'train.tokens_per_batch' is 0, expected 'auto' or greater than or equal to 1"]),
        ("score.tokens_per_batch=Auto", ["is 'Auto', expected 'auto' or a valid integer", "; did you mean 'auto'?"]),
        ("score.tokens_per_batch=true", ["is True, expected 'auto' or a number, not true or false"]),
        ("train.offload_optimizer=5", ["'train.offload_optimizer' is 5, expected 'cpu' or a valid string"]),
        ("reference.quantization=3bit", ["'reference.quantization' is '3bit', expected '4bit' or '8bit' or 'none'"]),
        ("output=''", ["'output'", "empty", "variable"]),
        ("output=//", ["'output'", "'//'", "root of the disk", "variable"]),
        ("cache.uri=''", ["'cache.uri'", "empty"]),
        ("data.train=''", ["data.train.0.path", "empty"]),
        ("train.workers=true", ["train.workers", "number"]),
        ("train.workers=two", ["train.workers", "two", "integer"]),
        ("train=3", ["'train'", "3", "beta", "more"]),
        ("train.label_smoothing=0.1 train.loss=ipo", ["label_smoothing 0.1", "ipo", "set it to 0", "robust"]),
        ("train.loss=hinge train.label_smoothing=0.1", ["label_smoothing 0.1", "'hinge'"]),
        ("train.discopop_tau=0.1", ["discopop_tau 0.1", "'sigmoid'", "uses it (discopop)"]),
        ("train.loss=sft train.beta=0.3", ["beta 0.3", "'sft'"]),
        ("train.loss=[{sigmoid: 1}, {bco_pair: 1}] train.f_divergence_type=forward_kl", ["forward_kl", "'bco_pair'"]),
        ("train.f_alpha_divergence_coef=0.3", ["f_alpha_divergence_coef 0.3", "alpha_divergence"]),
        ("train.loss=aot train.use_weighting=true", ["use_weighting True", "'aot'"]),
        ("train.loss=exo_pair", ["label_smoothing", "0.001"]),
        ("train.dynamic_beta_momentum=0.5", ["dynamic_beta_momentum 0.5", "dynamic_beta"]),
        ("train.loss=[{sigmod: 1}]", ["train.loss", "did you mean 'sigmoid'"]),
        ("train.loss=[{sigmoid: -1}]", ["train.loss", "-1", "above 0"]),
        ("train.loss=[{sigmoid: 1}, {sigmoid: 2}]", ["train.loss", "'sigmoid'", "twice"]),
        ("train.beta={start: 0.2, end: -1}", ["train.beta.end", "-1", "greater than 0"]),
        ("train.beta={start: 0.2, end: 0.2}", ["beta: 0.2"]),
        ("train.loss=aot data.weight_column=importance", ["weight_column", "importance", "'aot'"]),
        ("train.loss=bco_pair data.margin_column=gap", ["margin_column", "gap", "'bco_pair'"]),
        (
            "data.ranked=lists",
            ["data.ranked is lists", "'sigmoid' of train.loss", "(plackett_luce)", "data.ranked to pairs"],
        ),
        (
            "data.ranked=lists train.loss=[{plackett_luce: 1.0}, {sft: 0.1}]",
            ["data.ranked is lists", "'sft' of train.loss is over pairs"],
        ),
        ("train.loss=plackett_luce", ["'plackett_luce' is over ranked lists", "data.ranked is pairs", "such as sigmoid"]),
        ("data.ranked=lists train.loss=plackett_luce data.margin_column=gap", ["margin_column", "'plackett_luce'"]),
        ("train.steps=5 train.epochs=3", ["steps (5)", "epochs (3)"]),
        ("data.spans_column=gap data.margin_column=gap", ["spans_column and data.margin_column are both 'gap'"]),
        ("data.train_on=answers", ["data.train_on", "'answers' is no part", "answer, reasoning", "{answer: 1.0}"]),
        ("data.train_on=[{answer: 0}]", ["data.train_on", "the weight of 'answer' is 0", "above 0"]),
        ("data.train_on=[{answer: 1e39}]", ["data.train_on", "the weight of 'answer' is '1e39'", "at most 1,000,000"]),
        ("data.train_on=[{answer: yes}]", ["data.train_on", "the weight of 'answer' is True", "above 0"]),
        ("data.train_on=[{answer: 1}, {answer: 1}]", ["data.train_on", "'answer' is in the list twice"]),
        ("train.gpus_per_worker=0.5 train.workers=2", ["0.5", "whole GPU"]),
        ("model.lora={dropout: 0.1}", ["dropout is 0.1", "set it to 0"]),
        ("name=../elsewhere", ["'name'", "../elsewhere", "letters"]),
        ("data.train=nowhere.jsonl", ["data.train.0.path", "nowhere.jsonl", "no such file"]),
        ("data.train=[]", ["data.train", "at least one"]),
        ("data.eval={path: x, fraction: 0.1}", ["x", "0.1", "keep one"]),
        ("model.path=/nowhere/at/all", ["model.path", "/nowhere/at/all", "no such directory"]),
        ("data.train.3.weight=2", ["data.train.3.weight", "entry 3"]),
        ("train.beta", ["train.beta", "key.sub=value"]),
    ],
)
def test_bad_input_names_key_value_and_fix(override, said, tree):
    tree["data"]["train"] = [tree["data"]["train"]]
    with pytest.raises(ConfigError) as caught:
        load_config(tree, re.split(" (?=(?:train|data)[.])", override))
    for piece in said:
        assert piece in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("reference=wrong", "'rounds.reference' is 'wrong', expected 'initial' or 'previous' or a section of keys: every"),
        ("reference={every: 0}", "'rounds.reference.every' is 0, expected greater than or equal to 1"),
        ("reference={}", "'rounds.reference.every' is missing"),
        (
            "pairs={choose: all}",
            "'rounds.pairs': choose all makes at most per_prompt pairs of a prompt, and per_prompt is not set, so 1 as with "
            "best_worst; set it, for example to 4",
        ),
        (
            "rewards=[{use: math, colum: answer}]",
            "unknown key 'rounds.rewards.0.colum' (value 'answer'); did you mean 'rounds.rewards.0.column'?",
        ),
        (
            "rewards=[{use: math, name: a+b}]",
            "'rounds.rewards.0.name' is 'a+b'; use letters, digits and any of . _ - and start with a letter or digit",
        ),
        ("rewards=[]", "'rounds.rewards' is empty; at least one entry is needed"),
        ("rewards=my_rewards.py:f", "'rounds.rewards.0': use 'my_rewards.py:f' names a file; name its module: my_rewards:f"),
        ("held_out=1", "'rounds.held_out.fraction' is 1, expected less than 1"),
    ],
)
def test_one_mistake_is_one_line(setting, told, tree):
    with pytest.raises(ConfigError) as caught:
        load_config(tree, ["rounds={prompts: x.jsonl, rewards: [{use: math}]}", f"rounds.{setting}"])
    assert str(caught.value) == told


def test_rewards_may_be_names(tree):
    rounds = f"rounds={{prompts: '{tree['data'].pop('train')}', rewards: [math]}}"
    whole = [{"use": "math"}, {"use": "my_rewards:f", "weight": 0.5}]
    for value, expected in (
        ("math", whole[:1]),
        ("[math, {use: 'my_rewards:f', weight: 0.5}]", whole),
        ("{use: math}", whole[:1]),
    ):
        rewards = load_config(tree, [rounds, f"rounds.rewards={value}"]).rounds.rewards
        assert rewards == tuple(RewardConfig.model_validate(one) for one in expected)


def test_a_section_without_effect_is_told_by_its_keys(tree):
    del tree["data"]["train"]
    with pytest.raises(ConfigError, match=r"^data.eval \{'path': 'x.jsonl'\} has no effect on rounds, which make"):
        load_config(tree, ["rounds={prompts: x.jsonl, rewards: [{use: math}]}", "data.eval=x.jsonl"])


@pytest.mark.parametrize(
    "words",
    [
        ["train", "c.yaml", "name=a", "--fresh", "train.beta=0.2"],
        ["train", "--fresh", "c.yaml", "name=a", "train.beta=0.2"],
        ["submit", "run", "c.yaml", "name=a", "--no-wait", "train.beta=0.2", "--include", "a=b.jsonl"],
        ["plan", "c.yaml", "name=a", "--workers", "2", "train.beta=0.2", "--json"],
    ],
)
def test_settings_may_stand_on_either_side_of_an_option(words):
    args = parsed(words)
    assert args.config == "c.yaml" and args.overrides == ["name=a", "train.beta=0.2"]


@pytest.mark.parametrize(
    "words",
    [
        ["train", "c.yaml", "name=a", "--frsh"],
        ["train", "c.yaml", "--fresh", "train.beta"],
        ["jobs", "ls", "train.beta=0.2"],
        ["train", "c.yaml", "--fresh", "train.beta=0.2", "--learning-rate=1"],
    ],
)
def test_what_is_neither_setting_nor_option_is_refused(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        parsed(words)
    assert "unrecognized arguments: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "overrides",
    [
        ["cache=s3://AKIAEXAMPLE:SECRET@bucket/cache"],
        ["data.eval.path=s3://AK:SECRET@b/x.jsonl", "data.eval.fraction=0.5"],
        ["track.wandb.api_key=SECRET"],
        ["model.token=SECRET"],
        ["model.hf_token=SECRET"],
        ["secrets={wandb: SECRET}"],
        ["name={password: SECRET}"],
        ["name=[{account_key: SECRET}]"],
        ["evaluate.judge.api_key=SECRET"],
        ["evaluate.judge.key.file=SECRET", "evaluate.judge.key=SECRET", "evaluate.judge.key.file=other"],
        ["track.wandb.token=SECRET", "track.wandb.token.of=me"],
        ["model.token=[SECRET"],
        ["wandb-api-key=SECRET"],
        ["train.loss=s3://AK:SECRET@bucket/x"],
        ["train.zero=https://SECRET@host/x"],
        ["train.zero=https://host/x?SECRET"],
        ["data.train.0.path=[https://host/x?sig=SECRET]"],
        ["model.adapter=hf_" + "SECRET" * 6],
        ["model.path=hf_" + "SECRET" * 6],
        ["hf_" + "SECRET" * 6],
        ["train.loss=[{s3://AK:SECRET@b: 1}]"],
    ],
    ids=lambda overrides: overrides[-1].partition("=")[0][:24],
)
def test_a_mistake_beside_a_secret_does_not_tell_it(tree, overrides):
    tree["data"]["train"] = [{"path": tree["data"]["train"]}]
    with pytest.raises(ConfigError) as caught:
        load_config(tree, overrides)
    assert "SECRET" not in str(caught.value), str(caught.value)


def test_a_file_that_is_no_yaml_is_told_without_its_text(tree, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("track:\n  wandb: {api_key: SECRET\nname: one\n")
    assert main(["run", str(tmp_path / "c.yaml")]) == 2
    said = capsys.readouterr().err
    assert "in line 3, column 5" in said and "SECRET" not in said


def test_what_is_no_secret_is_shown(tree):
    with pytest.raises(ConfigError, match=r"'train.zero' is 's3://bucket/x\?region=eu', expected"):
        load_config(tree, ["train.zero=s3://bucket/x?region=eu"])
    with pytest.raises(ConfigError, match=r"'train.zero' is 'abfss://container@account/x', expected"):
        load_config(tree, ["train.zero=abfss://container@account/x"])
    with pytest.raises(ConfigError, match=r"unknown key 'train.tokenizers' \(value \['a', 'b'\]\)"):
        load_config(tree, ["train.tokenizers=[a, b]"])


def test_an_error_of_any_kind_is_told_without_the_secrets_in_it(capsys):
    def fail(console):
        raise RuntimeError("cannot open s3://AK:SECRET@bucket/x, nor https://SECRET@host")

    assert guarded(fail) == 1
    said = capsys.readouterr().err
    log = Path(re.search(r"traceback in (\S+)\)", said)[1])
    assert "cannot open s3://***@bucket/x, nor https://***@host" in log.read_text()
    assert "SECRET" not in said + log.read_text()
    log.unlink()


def test_numbers_are_what_they_look_like(tree):
    """PyYAML follows YAML 1.1, in which 010 is 8."""
    config = load_config(
        tree,
        [
            "train.epochs=010",
            "train.seed=-0_0",
            "train.pairs_per_step=0x10",
            "train.lr=1.0e-5",
            "train.weight_decay=1e-2",
            "name=2026-01-31",
            "score.gpus_per_worker=1.0",
            "train.gpus_per_worker=.5",
        ],
    )
    train = config.train
    assert (train.epochs, train.seed, train.pairs_per_step, train.lr, train.weight_decay) == (10, 0, 16, 1e-5, 0.01)
    assert config.name == "2026-01-31" and config.score.gpus_per_worker == 1 and train.gpus_per_worker == 0.5
    assert load_config(tree, ["train.steps=1_000", "train.zero=0"]).train.steps == 1000


def test_a_misspelt_file_is_pointed_out(tree, tmp_path):
    tree["data"]["train"] = str(tmp_path / "b.jsonl")
    (tmp_path / "bb.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"did you mean '.*bb\.jsonl'"):
        load_config(tree)


def test_all_problems_are_told_at_once(tree):
    with pytest.raises(ConfigError) as caught:
        load_config(tree, ["train.beta=-1", "train.bata=2", "score.workers=0"])
    assert str(caught.value).count("\n") == 2


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [
        ("model", "some/path", "write model: {path: some/path}"),
        ("model", ["some/path"], None),
        ("model", None, "write model: {path: ...}"),
        ("reference", "some/path", "write reference: {path: some/path}"),
        ("data", "a.jsonl", "write data: {train: a.jsonl}"),
        ("data", ["a.jsonl", "b.jsonl"], "write data: {train: [a.jsonl, b.jsonl]}"),
        ("data.eval", 0.1, "write eval: {fraction: 0.1}"),
        ("cache", "s3://user:secret@bucket/c", "write cache: {uri: s3://***@bucket/c}"),
        ("score", 4, "write score: {workers: 4}"),
        ("train", "ipo", "write train: {loss: ipo}"),
        ("train", [{"sigmoid": 0.8}, {"sft": 0.2}], "write train: {loss: [{sigmoid: 0.8}, {sft: 0.2}]}"),
        ("train", "a.jsonl", "write data: {train: a.jsonl}"),
        ("train", ["a.jsonl"], "write data: {train: [a.jsonl]}"),
        ("train", [{"path": "a.jsonl", "weight": 2}], "write data: {train: [{path: a.jsonl, weight: 2}]}"),
        ("train", 3, None),
        ("evaluate", "runs/a", "write evaluate: {policy: runs/a}"),
        ("evaluate", "a.jsonl.gz", "write evaluate: {data: a.jsonl.gz}"),
        ("evaluate.judge", "https://host/v1", "write judge: {url: https://host/v1}"),
        ("model.lora", 8, "write lora: {r: 8}"),
        ("model.lora", True, "write lora: {} for its defaults"),
        ("model.lora", "a lot", None),
        ("track.mlflow", "runs/mlflow", "write mlflow: {uri: runs/mlflow}"),
        ("sweep", [{"train.beta": 0.1}], "write sweep: {list: [{train.beta: 0.1}]}"),
        ("sweep.random", 8, "write random: {samples: 8}"),
        ("ray", "ray://head:10001", "write ray: {address: ray://head:10001}"),
    ],
)
def test_a_value_in_the_place_of_a_section(key, value, fix, tree):
    with pytest.raises(ConfigError) as caught:
        load_config(with_setting(tree, key, value, "it"))
    (line,) = (line for line in str(caught.value).splitlines() if line.startswith(f"{key!r} is "))
    assert ", expected a section of keys: " in line and "secret" not in line
    assert line.endswith(f"; {fix}") if fix else "write" not in line


def test_an_override_below_a_value_in_the_place_of_a_section(tree):
    tree["model"] = "some/path"
    with pytest.raises(
        ConfigError, match=r"below 'model', whose value is 'some/path', not .*; write model: \{path: some/path\}"
    ):
        load_config(tree, ["model.dtype=float32"])
    tree["data"] = {"path": "a.jsonl"}
    with pytest.raises(ConfigError, match=r"unknown key 'data\.path' .*did you mean 'data\.train\.path'"):
        load_config(tree | {"model": {"path": "x"}})


def test_every_field_is_documented():
    """Each field of a section is followed by a docstring."""
    undocumented, documented = [], 0
    for file in Path(raydpo.config.__file__).parent.glob("*.py"):
        for section in ast.walk(ast.parse(file.read_text())):
            if (
                not isinstance(section, ast.ClassDef)
                or section.name == "Config"
                or not {"Section", "ObjectiveConfig"} & set(map(ast.unparse, section.bases))
            ):
                continue
            for field, below in itertools.pairwise([*section.body, ast.Pass()]):
                if isinstance(field, ast.AnnAssign) and not field.target.id.startswith("_"):
                    told = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                    documented += told
                    undocumented += [] if told else [f"{section.name}.{field.target.id}"]
    assert undocumented == [] and documented > 100


def test_checks_in_a_bare_environment(tree, tmp_path):
    """A configuration is checked in a Python without torch, ray, deepspeed, numpy and pyarrow."""
    import importlib.util

    bare = tmp_path / "site"
    bare.mkdir()
    light = (
        "pydantic",
        "pydantic_core",
        "annotated_types",
        "typing_extensions",
        "typing_inspection",
        "yaml",
        "rich",
        "pygments",
        "markdown_it",
        "mdurl",
        "raydpo",
    )
    for name in light:
        origin = Path(importlib.util.find_spec(name).origin)
        source = origin.parent if origin.name == "__init__.py" else origin
        os.symlink(source, bare / source.name)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree | {"train": {"bata": 1}}))
    program = (
        "import sys, raydpo, raydpo.cli.entry\n"
        "assert not {'torch', 'ray', 'deepspeed', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "for heavy in ('torch', 'ray', 'deepspeed'):\n"
        "    try: __import__(heavy)\n"
        "    except ImportError: continue\n"
        "    raise SystemExit('not bare: ' + heavy)\n"
        f"print(raydpo.load_config({tree!r}).run_name)\n"
        f"raise SystemExit(raydpo.cli.entry.main(['train', {str(tmp_path / 'config.yaml')!r}]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(bare)!r})\n{program}"],
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "model-sigmoid-beta0.1", result.stderr
    assert result.returncode == 2 and "did you mean 'train.beta'" in result.stderr


def test_help_and_a_wrong_setting_import_little(tree, tmp_path):
    """So both answer in a fraction of a second."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree | {"train": {"bata": 1}}))
    config = str(tmp_path / "config.yaml")
    wrong = [[verb, config] for verb in ("score", "train", "run", "sweep", "show", "audit", "eval", "plan")]
    wrong += [["cache", "export", config, "out.parquet"], ["cache", "import", config]]
    wrong += [["cache", "verify", "cache", "--config", config], ["quickstart", "train.bata=1"]]
    commands = [
        ([["--help"]], 0, {"pydantic", "rich", "yaml", "asyncio"}),
        (wrong, 2, {"rich", "asyncio", "numpy", "pyarrow", "ray", "torch"}),
    ]
    for words, status, unused in commands:
        program = (
            "import sys\nfrom raydpo.cli.entry import main\n"
            f"for words in {words!r}:\n"
            "    try: status = main(words)\n"
            "    except SystemExit as ended: status = ended.code or 0\n"
            f"    if status != {status}: raise SystemExit(f'{{words}} ended with {{status}}')\n"
            f"    if found := {unused!r} & set(sys.modules): raise SystemExit(f'{{words}} imported {{found}}')\n"
        )
        done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("did you mean 'train.beta'") == (len(words) if status else 0)
    assert not (tmp_path / "runs").exists()
