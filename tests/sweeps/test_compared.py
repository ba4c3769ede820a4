"""A sweep compares trials only on the same held-out pairs, and by finite figures."""

import io
import json

import numpy as np
import pytest
import yaml
from tiny import preferences, write_preferences

from raydpo.config import load_config
from raydpo.errors import ConfigError, ModelError
from raydpo.pipeline.evaluate import pairs_to_evaluate, protocol
from raydpo.pipeline.prepare import measured_pairs
from raydpo.pipeline.tokenised import Tokenised
from raydpo.reference.shards import Wanted
from raydpo.rundir.records import to_parquet
from raydpo.storage.files import Storage
from raydpo.sweeps import run as sweeps
from raydpo.sweeps.ledger import Ledger
from raydpo.sweeps.run import _on_same_pairs, _prepare, _shared, _Sweep, sweep
from raydpo.sweeps.trials import trials_of
from raydpo.terminal.console import Console
from raydpo.training.pair_files import PairFolder


@pytest.fixture
def place(tmp_path, tiny_llama):
    for number, name in enumerate(("a", "b", "held_out", "others")):
        write_preferences(tmp_path / f"{name}.jsonl", preferences(30, seed=number))
    tree = {
        "output": str(tmp_path / "runs"),
        "name": "s",
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "data": {
            "train": [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")],
            "eval": {"path": str(tmp_path / "held_out.jsonl")},
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def prepared(place, *overrides):
    config = load_config(place / "config.yaml", overrides)
    trials, console = trials_of(config), Console(io.StringIO())
    tokenised = {_shared(trial.config): Tokenised.of(trial.config, console) for trial in trials}
    return config, _prepare(trials, tokenised, console)


def compared(place, *overrides):
    """Whether the trials' figures compare, and what is said."""
    config, trials = prepared(place, *overrides)
    return _on_same_pairs(config, trials, Console(said := io.StringIO())), said.getvalue()


SILENT = Console(io.StringIO())
EARLY = "sweep.stop_early={grace: 50}"


@pytest.mark.parametrize(
    "varied",
    [
        "sweep.grid={data.eval.fraction: [0.2, 0.4]}",
        "sweep.grid={data.max_length: [20, 1024]}",
        "sweep.list=[{data.eval.path: PLACE/held_out.jsonl}, {data.eval.path: PLACE/others.jsonl}]",
    ],
)
def test_other_held_out_pairs_do_not_compare(varied, place):
    varied = varied.replace("PLACE", str(place))
    more = ("data.eval={fraction: 0.3}",) if "fraction" in varied else ()
    same, said = compared(place, varied, "data.max_dropped=1.0", *more)
    assert not same and "trials are measured on different held-out pairs" in said and "none will be recommended" in said
    with pytest.raises(ConfigError, match=r"sweep.stop_early would stop the wrong ones.*or set sweep.stop_early=null"):
        compared(place, varied, "data.max_dropped=1.0", EARLY, *more)


@pytest.mark.parametrize(
    "varied",
    [
        "sweep.grid={train.beta: [0.1, 0.3]}",
        "sweep.grid={data.fraction: [0.5, 1.0]}",
        "sweep.grid={data.train.0.weight: [0.5, 1.0]}",
        "sweep.grid={data.filter: [null, chosen_tokens < 30]}",
        "sweep.list=[{data.train: [PLACE/a.jsonl]}, {data.train: [PLACE/b.jsonl]}]",
    ],
)
def test_trials_that_differ_in_what_they_train_on_compare(varied, place):
    assert compared(place, varied.replace("PLACE", str(place)), EARLY) == (True, "")


@pytest.fixture
def thoughtful(place):
    """The same pairs with reasoning, the last one without; a third of them is held out."""
    tag = "<think>\nlet me see\n</think>\n\n"
    records = [record | {side: tag + record[side] for side in ("chosen", "rejected")} for record in preferences(30)]
    write_preferences(place / "a.jsonl", [*records, *preferences(2, seed=9)])
    tree = yaml.safe_load((place / "config.yaml").read_text())
    tree["data"] |= {"train": str(place / "a.jsonl"), "eval": {"fraction": 0.3}}
    (place / "config.yaml").write_text(yaml.safe_dump(tree))
    return place


MASKS = "sweep.grid={data.train_on: [answer, completion, reasoning]}"


def test_trials_that_are_measured_on_what_they_train_on_do_not_compare(thoughtful):
    same, said = compared(thoughtful, MASKS)
    assert not same and "different tokens of the held-out pairs (answer (train_on=answer); completion (" in said
    assert "Set data.eval.train_on, for example data.eval.train_on=completion" in said
    with pytest.raises(ConfigError, match=r"different tokens.*sweep.stop_early would stop the wrong ones"):
        compared(thoughtful, MASKS, EARLY)


@pytest.mark.parametrize("yardstick", ["completion", "answer", "[{answer: 1.0}, {reasoning: 0.5}]"])
def test_trials_that_are_measured_on_the_same_tokens_compare(yardstick, thoughtful):
    """Also where one of them drops pairs that another trains on, and where one alone needs no marks."""
    assert compared(thoughtful, MASKS, EARLY, f"data.eval.train_on={yardstick}") == (True, "")


def test_parts_that_are_the_same_tokens_compare(place):
    """Texts without reasoning are answers as a whole."""
    assert compared(place, "sweep.grid={data.train_on: [completion, answer, assistant]}", EARLY) == (True, "")


def test_the_order_of_a_split_does_not_matter(place):
    """The same pairs of two files are held out for any order and weights of the files."""
    both = [f"{{path: {place / name}, weight: {weight}}}" for name, weight in (("a.jsonl", 1), ("b.jsonl", 0.5))]
    varied = f"sweep.list=[{{data.train: [{both[0]}, {both[1]}]}}, {{data.train: [{both[1]}, {both[0]}]}}]"
    assert compared(place, varied, "data.eval={fraction: 0.3}", EARLY) == (True, "")


def test_hit_rates_are_those_of_the_cache_before_the_pass(place, monkeypatch):
    """The pass stores all completions, so afterwards each trial would have found all of them."""

    def fill(cache, tables):
        wanted = Wanted(tables)
        cache.prepare({})
        cache.commit(wanted.keys.to_pylist(), [np.full(count, -1.0, np.float32) for count in wanted.tokens], {})

    config, trials = prepared(place, "sweep.grid={data.fraction: [0.5, 1.0]}")
    half, whole = trials.values()
    fill(half.cache, half.tables)
    monkeypatch.setattr(sweeps, "score_prepared", lambda first, _, tables: fill(first.cache, tables))
    ledger = Ledger(config, trials_of(config))
    with PairFolder(Storage(config.run_dir), one_machine=True) as folder:
        joined = sweeps._score(config, trials, ledger, folder, SILENT)
        assert [len(one.pairs.open()) for one in joined.values()] == [one.sets.train.num_rows for one in trials.values()]
    share = len(Wanted(half.tables)) / len(Wanted(whole.tables))
    assert 0.3 < share < 0.9 and ledger.cache["hit_rates"] == [1.0, share]


@pytest.mark.parametrize(("loss", "audited"), [("sigmoid", ("sigmoid", 0.1)), ("sft", ("sigmoid", 0.5))])
def test_the_audit_of_a_sweep_advises_for_its_own_configuration(loss, audited, place, monkeypatch):
    """Not for one of its trials, unless the configuration itself needs no reference."""
    varied = [f"{{train.loss: sigmoid, train.beta: {beta}}}" for beta in (0.3, 0.5)]
    config, trials = prepared(place, f"train.loss={loss}", f"sweep.list=[{', '.join(varied)}]")

    def stop(first, *_):
        raise ModelError(f"{(first.config.train.loss, first.config.train.beta)}")

    monkeypatch.setattr(sweeps, "score_prepared", stop)
    with pytest.raises(ModelError) as stopped:
        sweeps._score(config, trials, Ledger(config, trials_of(config)), None, SILENT)
    assert str(stopped.value) == str(audited)


def test_the_audit_of_a_sweep_tells_what_counts_in_its_pairs(thoughtful, monkeypatch):
    """They are those of the first trial, which counts answers alone."""
    config, trials = prepared(thoughtful, "sweep.grid={data.train_on: [answer, completion]}")
    seen = []

    def stop(first, *_):
        seen.append((first.config.data.train_on, first.sets, first.config.run_dir))
        raise ModelError("enough")

    monkeypatch.setattr(sweeps, "score_prepared", stop)
    with pytest.raises(ModelError):
        sweeps._score(config, trials, Ledger(config, trials_of(config)), None, SILENT)
    (first, _) = trials.values()
    assert seen == [("answer", first.sets, config.run_dir)]


def test_held_out_pairs_that_have_changed_since_do_not_compare(place):
    """One trial is done; then data.eval.path is another file, and a trial is added."""
    grid = "sweep.grid={train.beta: [0.1, 0.3]}"
    _, trials = prepared(place, grid)
    digest = measured_pairs(next(iter(trials.values())).sets.eval)
    for name in ("beta=0.1", "beta=0.3"):
        run = place / "runs" / "s" / name
        run.mkdir(parents=True)
        (run / "run.json").write_text(json.dumps({"fingerprint": {}, "held_out": digest}))
    (place / "runs" / "s" / "beta=0.1" / "summary.json").write_text("{}")
    assert compared(place, grid) == (True, "")
    assert not compared(place, grid, f"data.eval.path={place / 'others.jsonl'}")[0]
    (place / "runs" / "s" / "beta=0.3" / "summary.json").write_text("{}")
    assert compared(place, grid, f"data.eval.path={place / 'others.jsonl'}") == (True, ""), "nothing is measured any more"


def test_a_trial_is_measured_again_where_settings_or_pairs_have_changed(place):
    """What counts are the settings of section evaluate and the content of its pairs, not names of files."""
    grid = "sweep.grid={train.beta: [0.1]}"

    def is_there(*overrides, measure=False):
        config, trials = prepared(place, grid, "sweep.evaluate=true", *overrides)
        ledger = Ledger(config, trials_of(config))
        ledger.found_in_cache("", [None])
        ((name, one),) = trials.items()
        sweep = _Sweep(trials, {}, ledger, None, 1)
        if measure:
            told = protocol(one.config, pairs_to_evaluate(one.config, one.tokeniser, SILENT)[0], one.reference)
            Storage(one.config.run_dir).write("evaluation.json", json.dumps({"protocol": told}).encode())
        return sweep._evaluated(name, SILENT)

    assert not is_there(), "nothing is measured yet"
    assert is_there(measure=True) and is_there() and is_there("evaluate.batch=3", "evaluate.score_missing=false")
    for changed in (
        "max_tokens=512",
        "prompts=8",
        "seed=1",
        "temperature=0.7",
        "modes=[sampled]",
        "samples=2",
        "engine=vllm",
        "score_with=a:b",
        "judge={url: 'http://host/v1', model: m}",
    ):
        assert not is_there(f"evaluate.{changed}"), changed
    assert not is_there(f"data.eval.path={place / 'others.jsonl'}") and not is_there("score.dtype=bfloat16")
    data = f"evaluate.data={place / 'others.jsonl'}"
    assert not is_there(data) and is_there(data, measure=True) and is_there(data) and not is_there()
    write_preferences(place / "others.jsonl", preferences(30, seed=9))
    assert not is_there(data), "the file has been written again"


def test_a_trial_that_diverged_leaves_a_record_that_every_reader_can_read(place):
    config = load_config(place / "config.yaml", ["sweep.grid={train.beta: [0.1, 0.3]}"])
    trials = trials_of(config)
    for trial, accuracy in zip(trials, (float("nan"), 0.7), strict=True):
        Storage(trial.config.run_dir).write(
            "eval.parquet",
            to_parquet(
                [{"step": 4, "eval_rewards/accuracies": accuracy, "eval_loss": float("inf") if accuracy != 0.7 else 0.5}]
            ),
        )
    ledger = Ledger(config, trials)
    for trial in trials:
        ledger.set(trial.name, "done")

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    found = json.loads((place / "runs" / "s" / "sweep.json").read_text(), parse_constant=refuse)
    assert found["trials"][0]["eval"] == {"step": 4, "eval_rewards/accuracies": None, "eval_loss": None}
    assert found["trials"][1]["eval"]["eval_loss"] == 0.5
    assert [entry.trial.name for entry in ledger.best()] == ["beta=0.3"]
    ledger.same_pairs = False
    assert ledger.best() == []


def test_the_time_of_a_trial_includes_its_evaluations_and_checkpoints(place):
    """As the training time on the trial's own page does."""
    config = load_config(place / "config.yaml", ["sweep.grid={train.beta: [0.1, 0.3]}"])
    trials = trials_of(config)
    ledger = Ledger(config, trials)
    row = {"seconds": 2.0, "time/evaluation": 1.0, "time/step": 3.0}
    for trial, leave_out in zip(trials, ((), ("time/step", "time/evaluation")), strict=True):
        rows = [{"step": step} | {name: value for name, value in row.items() if name not in leave_out} for step in (1, 2)]
        Storage(trial.config.run_dir).write("metrics.parquet", to_parquet(rows))
        ledger.set(trial.name, "done")
    assert [entry.seconds for entry in ledger.entries.values()] == [6.0, 4.0], "an earlier version's has no time/step"


def test_trials_that_are_equally_good_are_all_the_best(place):
    config = load_config(place / "config.yaml", ["sweep.grid={train.beta: [0.1, 0.3, 0.5]}"])
    trials = trials_of(config)
    ledger = Ledger(config, trials)
    for trial, accuracy in zip(trials, (0.75, 0.5, 0.75), strict=True):
        rows = [{"step": 4, "eval_rewards/accuracies": accuracy}]
        Storage(trial.config.run_dir).write("eval.parquet", to_parquet(rows))
        ledger.set(trial.name, "done")
    assert [entry.trial.name for entry in ledger.best()] == ["beta=0.1", "beta=0.5"]


def test_a_model_without_weights_sets_no_earlier_sweep_aside(place, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "runs" / "s").mkdir(parents=True)
    (tmp_path / "runs" / "s" / "sweep.json").write_text("{}")
    config = load_config(place / "config.yaml", ["sweep.grid={train.beta: [0.1, 0.3]}", f"model.path={tmp_path / 'empty'}"])
    with pytest.raises(ModelError):
        sweep(config, SILENT, fresh=True)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["s"]
