"""Everything that can be refused before Ray is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raydpo.config import Config
from raydpo.config.rewards import BUILT_IN, only_duels
from raydpo.config.rounds import RoundsConfig
from raydpo.errors import ConfigError, FilesError
from raydpo.model.limits import tokenizer_warnings
from raydpo.pipeline.checks import check, check_models
from raydpo.pipeline.prepare import training_settings
from raydpo.pipeline.tokenised import limits_of, open_tokeniser
from raydpo.reference.identity import resolve_model
from raydpo.rewards.checks import check_readable, check_rewards
from raydpo.rounds.inputs import Inputs
from raydpo.rounds.ledger import Ledger
from raydpo.rounds.measuring import measure_settings
from raydpo.rounds.prompts import held_out_of, read_prompts, sampled_of, slice_of
from raydpo.rounds.sampling import sample_settings
from raydpo.rounds.stage import Made, made_of, refusal
from raydpo.rounds.training import check_reference, check_training
from raydpo.rundir.directory import FINAL, PROMPTS, RUN, SWEEP, TRAIN, round_folder
from raydpo.rundir.fingerprint import changed_settings
from raydpo.storage.files import Storage
from raydpo.terminal.console import Console

__all__ = ["check_inputs", "pair_settings", "prompts_made", "refuse_changes", "train_settings"]

FEW = 5
"""Fewer held-out prompts than these are warned of."""


def check_inputs(config: Config, console: Console) -> Inputs:
    """Check settings, models, prompts and reward functions, and read the prompts.

    Raises:
        ConfigError: if settings contradict each other or the files.
        DataError: if the prompts cannot be read, or none is held out.
        ModelError: if a model cannot be used.
    """
    console.begin("checks")
    check(config, "rounds", console)
    check_reference(config)
    assert config.rounds is not None
    if (devices := config.rounds.sample.tensor_parallel) > config.score.workers:
        raise ConfigError(
            f"rounds.sample.tensor_parallel {devices} needs as many GPUs, but score.workers is {config.score.workers}; "
            "raise score.workers"
        )
    storage = Storage(config.run_dir)
    for file, what in ((RUN, "a single run"), (SWEEP, "a sweep")):
        if storage.exists(file):
            raise ConfigError(f"{storage} is the directory of {what}; give the rounds another name (name=...)")
    _check_success(config.rounds)
    console.begin("reading prompts")
    tokeniser = open_tokeniser(config)
    inputs = Inputs(config, console, tokeniser, read_prompts(config, tokeniser, console))
    _check_prompts(inputs)
    console.begin("checking reward functions")
    _check_rewards(inputs)
    console.begin("checking model files")
    check_models(config, "rounds", console)
    models = {path: resolve_model(path) for path in (config.model.path, config.reference_path)}
    for line in tokenizer_warnings(tokeniser.tokenizer, models, config.model.trust_remote_code):
        console.warn(line)
    return inputs


def _check_success(rounds: RoundsConfig) -> None:
    """Refuse rewards whose sum is never above ``rounds.measure.success``. Functions of users may return any number."""
    weighted = [one for one in rounds.rewards if one.weight]
    most = sum(max(0.0, one.weight) for one in weighted)
    bounded = all(one.use in BUILT_IN or one.judge is not None for one in weighted)
    if bounded and not only_duels(weighted) and most <= rounds.measure.success:
        raise ConfigError(
            f"no answer could be right: the rewards add up to {most:g} at most (values up to 1 times their weights), and an "
            f"answer is right above rounds.measure.success ({rounds.measure.success:g}); lower that"
        )


def _check_rewards(inputs: Inputs) -> None:
    """Check the reward functions, and that they can read the prompts that are sampled and those that are measured."""
    prompts, rounds = inputs.prompts, inputs.rounds
    read = check_rewards(rounds.rewards, inputs.columns)
    for what, rows in (("training", sampled_of(prompts, rounds)), ("held-out", held_out_of(prompts, rounds))):
        chosen = prompts.take(pa.array(rows))
        columns = [json.loads(text) for text in chosen["columns"].to_pylist()]
        stored = zip(chosen["row"].to_pylist(), chosen["source"].to_pylist(), strict=True)
        places = [f"record {row} of {source}" for row, source in stored]
        for line in check_readable(rounds.rewards, columns, places, what, rounds.max_errors):
            inputs.console.warn(line)
        given = {name for each in columns for name, value in each.items() if value is not None}
        for reward, names in read.items():
            for name in (one for one in names if one not in given):
                line = f"no {what} prompt has a value in {name!r}, which the reward {reward} reads"
                if names[name]:
                    raise ConfigError(f"{line}; add it, or write {name}=None if the function can do without")
                inputs.console.warn(line)


def _check_prompts(inputs: Inputs) -> None:
    """Compare the prompts with the limits of the models and with the size of a round."""
    config, rounds, prompts = inputs.config, inputs.rounds, inputs.prompts
    held_out = len(held_out_of(prompts, rounds))
    if not held_out:
        raise ConfigError(
            "no prompt is held out, so nothing could be measured; raise rounds.held_out.fraction, or name a file in "
            "rounds.held_out.path"
        )
    if held_out < FEW:
        inputs.console.warn(
            f"only {held_out} held-out prompts are measured, so the success has a large error; {_more_held_out(rounds)}"
        )
    longest, most = int(pc.max(pc.list_value_length(prompts["prompt_ids"])).as_py()), rounds.sample.max_tokens
    highest = int(pc.max(pc.list_flatten(prompts["prompt_ids"])).as_py())
    for path, limits in limits_of(config).items():
        if limits.positions is not None and longest + most > limits.positions:
            raise ConfigError(
                f"rounds.sample.max_tokens {most} after a prompt of {longest} tokens is more than the {limits.positions} "
                f"positions of {path}; lower it, or data.max_length"
            )
        if limits.rows is not None and highest >= limits.rows:
            raise FilesError(
                f"the prompts have token ids up to {highest:,}, but the embedding of {path} has {limits.rows:,} rows; set "
                "model.tokenizer to the tokenizer that belongs to the model"
            )
    of_round = len(slice_of(prompts, rounds, 1))
    if of_round < rounds.per_round:
        told = (
            "the first round samples all of them"
            if rounds.offline
            else "each round samples all of them, with new random numbers"
        )
        inputs.console.say(
            f"rounds.per_round is {rounds.per_round:,}, but there are {of_round:,} prompts to train on: {told}"
        )


def _more_held_out(rounds: RoundsConfig) -> str:
    """What to change for more held-out prompts."""
    if rounds.measure.prompts < FEW:
        return "raise rounds.measure.prompts"
    return "raise rounds.held_out.fraction" if rounds.held_out.path is None else "add prompts to rounds.held_out.path"


def prompts_made(inputs: Inputs) -> Made:
    """What the file of prompts is made from. The files that the configuration names are compared by content."""
    return Made(
        stage="prompts",
        number=0,
        settings={"rounds.held_out.fraction": inputs.rounds.held_out.fraction},
        inputs={"rounds.prompts and rounds.held_out (content)": inputs.prompts_digest},
    )


def pair_settings(inputs: Inputs) -> dict[str, Any]:
    """Settings that decide which answers become pairs, by their keys."""
    rounds = inputs.rounds
    chosen = {f"rounds.pairs.{name}": value for name, value in rounds.pairs.model_dump(mode="json").items()}
    return chosen | {"rounds.cut": rounds.cut, "rounds.replay": rounds.replay, "rounds.offline": rounds.offline}


def train_settings(inputs: Inputs) -> dict[str, Any]:
    """Settings that decide what a round trains, by their keys, besides its pairs and its models."""
    config = inputs.config
    rounds = inputs.rounds.model_dump(mode="json", include={"reference", "optimizer"})
    model = config.model.model_dump(mode="json", include={"lora", "freeze", "dtype", "quantization"})
    data = config.data.model_dump(mode="json", include={"max_length", "shuffle"})
    return {
        f"{section}.{name}": value
        for section, settings in (
            ("rounds", rounds),
            ("model", model),
            ("data", data),
            ("train", training_settings(config)),
        )
        for name, value in settings.items()
    }


def refuse_changes(inputs: Inputs, ledger: Ledger) -> None:
    """Refuse settings with which stored rounds would have come out differently. Needs no Ray.

    Scores, pairs and the first measurement are not refused as long as nothing was trained on them: they are made again.

    Raises:
        ConfigError: with all settings that differ.
        FilesError: if ``final`` is no link, which a round could not replace.
    """
    check_training(inputs.config)
    storage = inputs.storage
    _check_final(storage)
    now = {
        "sample": sample_settings(inputs),
        "score": inputs.reward_settings,
        "pair": pair_settings(inputs),
        "measure": measure_settings(inputs),
    }
    stages = ledger.stages()
    changed = []
    if stages and (prompts := made_of(storage, PROMPTS)) is not None:
        changed.append((PROMPTS, prompts.changes(prompts_made(inputs))))
    for name, made in stages:
        changes = changed_settings(made.settings, now[made.stage]) + _other_inputs(inputs, made)
        if changes and ledger.replaceable(made.stage, made.number):
            ledger.records.pop(made.number, None)  # its figures are made again, too
        elif made.failed is None:
            changed.append((name, changes))
    trained = train_settings(inputs)
    for number, record in ledger.records.items():
        if record["settings"]:
            changed.append((f"{round_folder(number)}/{TRAIN}", changed_settings(record["settings"], trained)))
    if changed := [(name, changes) for name, changes in changed if changes]:
        raise refusal(storage, changed)


def _other_inputs(inputs: Inputs, made: Made) -> list[str]:
    """How the prompts, and the model before the first round, differ from those of a stored stage. A round that is over is
    not looked into again, but later ones would sample other prompts, and measure their drift from the other model."""
    ((prompts, digest),) = prompts_made(inputs).inputs.items()
    before, now = {prompts: made.inputs.get("prompts", digest)}, {prompts: digest}
    initial = {("measure", made.number): "initial policy", ("sample", 1): "policy"}.get((made.stage, made.number))
    if initial is not None and made.inputs.get(initial) is not None:
        model = "model.path (its weights, with model.adapter, model.dtype and data.max_length)"
        before[model], now[model] = made.inputs[initial], inputs.policy(0).identity.digest
    return changed_settings(before, now)


def _check_final(storage: Storage) -> None:
    path = Path(storage.path(FINAL))
    if storage.is_local and path.is_dir() and not path.is_symlink():
        raise FilesError(
            f"{path} is a directory, but rounds keep a link to the last policy there; was {storage} copied without its "
            "links? Rename or delete it: the policies are in the folders of their rounds"
        )
