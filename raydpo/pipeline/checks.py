"""Checks that every verb makes before it starts Ray or any other process.

They read settings, headers of model files, tokenizers and the user's own functions. They use no GPU. They use the network
only for what the configuration names on the hub or at a URI.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raydpo.cluster.preflight import missing_vllm
from raydpo.cluster.session import starts_own_ray
from raydpo.config import LOSSES, Config, LoraSettings, SourceConfig, Verb, check_verb, source_name
from raydpo.config.rewards import RewardConfig
from raydpo.data.pairs import HELD_OUT, check_first_records, held_out_source
from raydpo.data.records import read_records
from raydpo.data.rows import FIRST_RECORDS
from raydpo.data.select import LABEL
from raydpo.data.tokenise import has_tokenizer, load_tokenizer
from raydpo.errors import ConfigError, FilesError, ModelError
from raydpo.evaluation.policy import policy_files
from raydpo.evaluation.prompts import reading
from raydpo.losses import Objective
from raydpo.model.files import adapter_files, model_files
from raydpo.model.rotary import rope_length
from raydpo.model.router import router_loss_coef
from raydpo.model.weights import check_weights
from raydpo.reference.doubts import doubts
from raydpo.reference.identity import identify, resolve_model
from raydpo.storage.memory import program, remembered, stamp
from raydpo.terminal.console import Console

__all__ = ["check", "check_labels", "check_models", "pythons_of"]

_TRAINING = ("train", "run", "sweep", "rounds")
"""Verbs that need a loss for the pairs."""


def check(config: Config, verb: Verb, console: Console, trials: Sequence[Config] = ()) -> None:
    """Refuse a configuration with which ``verb`` would fail, as far as one process can tell without building the models.

    ``check_models`` does the rest. It takes two seconds longer, so whoever reads pairs first reads them in between.

    Args:
        console: for warnings.
        trials: configurations of the trials of a sweep.

    Raises:
        ConfigError: if settings, local files or the user's functions are wrong.
        DataError: if a local file of pairs cannot be read.
        ModelError: if a model is not on the hub, or cannot be scored exactly.
    """
    check_verb(config, verb)
    configs = trials or [config]
    for each in configs:
        Objective(each.train)  # imports a loss of the user's own and tries it on made-up rows
        if verb != "eval":
            _check_reference(each)
    _check_data(configs, verb, console)
    trusted = [each for each in configs if each.model.trust_remote_code]
    models = [path for each in trusted for path in (each.model.path, each.reference_path)]
    if verb == "eval":
        models += [each.evaluate.policy for each in trusted]
    models += [path for path, trusting in _reward_models(config, configs, verb) if trusting]
    for path in dict.fromkeys(filter(None, models)):
        console.warn(f"model.trust_remote_code is on: Python code in {path} runs with your rights")
    _check_values(config, configs, verb, console)
    tokenizers = _check_tokenizers(configs)
    if _evaluates(config, verb):
        _check_judges(configs)
        _check_vllm(configs, verb)
    if verb == "eval":
        _check_policy(config, tokenizers[0])


def check_models(config: Config, verb: Verb, console: Console, trials: Sequence[Config] = ()) -> None:
    """Check that the files of all models that ``verb`` loads are complete. Reads only their headers.

    Args:
        console, trials: as for ``check``.

    Raises:
        ConfigError: if ``train.optimizer`` cannot train so many parameters, adapters do not fit the model, or the model has
            no router loss to weigh.
        ModelError: naming the weights that are missing or have another shape.
    """
    wanted: dict[tuple[str, str | None, bool], None] = {}
    for each in trials or [config]:
        trusted = each.model.trust_remote_code
        if verb == "eval":
            files = policy_files(each)
            wanted[files.base, files.adapter, trusted] = None
        else:
            wanted[each.model.path, each.model.adapter, trusted] = None
        wanted[each.reference_path, each.reference_adapter, trusted] = None
        if verb in _TRAINING:
            _check_optimizer(each)
            _check_adapters(each)
            router_loss_coef(resolve_model(each.model.path), each.train.router_aux_loss_coef, trusted)
    lines = [line for path, adapter, trusted in wanted for line in _complete(path, adapter, trusted)]
    if rewards := _reward_models(config, trials or [config], verb):
        from raydpo.answers.reward import check_reward_model  # imports transformers' models

        lines += [line for path, trusted in rewards for line in check_reward_model(resolve_model(path), trusted)]
    for line in lines:
        console.warn(line)


def _complete(path: str, adapter: str | None, trusted: bool) -> list[str]:
    """As ``check_weights``, which imports transformers' models for two seconds. Its warnings are remembered."""
    path, adapter = resolve_model(path), adapter and resolve_model(adapter)
    files = model_files(path, trusted)
    used = [*files.weights, *files.code, *([adapter_files(adapter).weights] if adapter else [])]
    settings = [files.config, adapter and adapter_files(adapter).config, trusted]
    decides = [*settings, *map(stamp, used), program("torch", "transformers", "peft")]
    return remembered("complete", decides, lambda: check_weights(path, adapter=adapter, trust_remote_code=trusted))


def _check_optimizer(config: Config) -> None:
    """Check that the optimizer can count what it trains. Only bitsandbytes' has a limit; others need no sizes."""
    if config.train.optimizer == "adamw":
        return
    from raydpo.model.memory.anatomy import Anatomy  # imports transformers' models
    from raydpo.model.memory.ledger import trained_numbers

    anatomy = Anatomy.of(resolve_model(config.model.path), config.model.trust_remote_code)
    config.train.check_numbers(trained_numbers(anatomy, config.model), config.train.fewest_workers)


def _check_adapters(config: Config) -> None:
    """Check that settings which name weights, or decompose adapters, fit the model. What they make is remembered."""
    lora, defaults = config.model.lora, LoraSettings()
    named = ("target_modules", "target_parameters", "exclude_modules", "dora")
    if lora is None or all(getattr(lora, name) == getattr(defaults, name) for name in named):
        return
    from raydpo.model.memory.anatomy import Anatomy  # imports transformers' models
    from raydpo.model.memory.ledger import trained_numbers

    path, trusted = resolve_model(config.model.path), config.model.trust_remote_code
    files = model_files(path, trusted)
    settings = [lora.model_dump(mode="json"), config.model.quantization, files.config, trusted, *map(stamp, files.code)]
    decides = [*settings, program("torch", "transformers", "peft")]
    try:
        remembered("adapters", decides, lambda: sum(trained_numbers(Anatomy.of(path, trusted), config.model)))
    except ModelError as error:
        raise ConfigError(str(error)) from None


def _evaluates(config: Config, verb: Verb) -> bool:
    """Whether ``verb`` measures policies as section ``evaluate`` says."""
    return verb == "eval" or (verb == "sweep" and config.sweep is not None and config.sweep.evaluate)


def _reward_models(config: Config, configs: Sequence[Config], verb: Verb) -> list[tuple[str, bool]]:
    """Reward models that ``verb`` loads, each with whether its code is trusted.

    Args:
        configs: the trials of ``config``, or ``config`` alone.
    """
    found: list[tuple[str | None, bool]] = []
    for each in configs:
        paths = [each.evaluate.reward_model, *(one.reward_model for one in each.evaluate.rewards)]
        if not _evaluates(config, verb):
            paths = [one.reward_model for one in each.rounds.rewards] if verb == "rounds" and each.rounds is not None else []
        found += [(path, each.model.trust_remote_code) for path in paths]
    return [(path, trusted) for path, trusted in dict.fromkeys(found) if path is not None]


def _check_reference(config: Config) -> None:
    for key, value, policy in (
        ("reference.path", config.reference.path, config.model.path),
        ("reference.adapter", config.reference.adapter, config.model.adapter),
    ):
        if value not in (None, policy) and not config.needs_reference:
            raise ConfigError(
                f"{key!r} is {value!r}, but nothing compares with a reference: train.loss is "
                f"{config.train.loss_text}. Drop it, or set a loss with a reference, such as sigmoid"
            )


def check_labels(config: Config, tables: Sequence[pa.Table | None]) -> None:
    """Refuse completions with labels if the loss needs pairs.

    Args:
        tables: training and held-out pairs, as ``data.select.select`` gives them.

    Raises:
        ConfigError: with their sources, their number, and the losses that take them.
    """
    labelled: dict[str, int] = {}
    for table in tables:
        if table is not None and LABEL in table.column_names:
            found = pc.value_counts(table["source"].filter(pc.not_equal(table[LABEL], 0))).to_pylist()
            labelled |= {each["values"]: labelled.get(each["values"], 0) + each["counts"] for each in found}
    if labelled and (problem := _needs_pairs(config, labelled)):
        raise ConfigError(problem)


def _needs_pairs(config: Config, labelled: Mapping[str, int], first: str = "") -> str | None:
    """What is wrong if the loss cannot take completions with labels, whose number is given by source; else None.

    Args:
        first: which records were read, if not all.
    """
    needing = [name for name, traits in config.train.traits.items() if not traits.unpaired]
    if not needing:
        return None
    counts = " and ".join(f"{count:,} {'row' if count == 1 else 'rows'} of {name}" for name, count in labelled.items())
    lists = config.data.ranked == "lists"
    return (
        f"train.loss {' and '.join(needing)} needs {'ranked lists' if lists else 'pairs'}, but {counts}{first} "
        f"{'holds' if counts.startswith('1 ') else 'hold'} one completion with a label; set "
        f"{'data.ranked to pairs and ' if lists else ''}train.loss to one that takes it "
        f"({', '.join(name for name, traits in LOSSES.items() if traits.unpaired)}), or leave these rows out"
    )


def _check_data(configs: Sequence[Config], verb: Verb, console: Console) -> None:
    """Read the first records of each local source of pairs."""
    sources: dict[str, tuple[SourceConfig, str, Config]] = {}
    for config in configs:
        evaluated, train = config.evaluate.data or (), config.data.train
        own_file = config.data.eval is not None and config.data.eval.path is not None
        held_out = (held_out_source(config.data),) if own_file else ()
        for source in (evaluated or held_out or train) if verb == "eval" else (*train, *held_out):
            name = HELD_OUT if source in held_out else source_name(source)
            numbers = (config.data.weight_column, config.data.margin_column)
            sources[f"{source.model_dump_json()} {numbers}"] = source, name, config
    for source, name, config in sources.values():
        if Path(source.path).exists():  # not on the hub or at a URI
            reader = reading(config.evaluate) if verb == "eval" else read_records
            labelled = check_first_records(source, name, config.data, reader)
            if not labelled or verb == "eval" or config.data.filter:
                continue
            first = f" (among its first {FIRST_RECORDS:,} records)"
            for problem in filter(None, (_needs_pairs(each, {name: labelled}, first) for each in configs)):
                if verb in _TRAINING or config.data.ranked == "lists":  # a list of one is nothing to audit either
                    raise ConfigError(problem)
                console.warn(problem)


def _check_values(base: Config, configs: Sequence[Config], verb: Verb, console: Console) -> None:
    """Hash the weights of all models, which refuses NaN and files of zeros, and warn of what was hardly meant.

    Digests are remembered, so later stages do not read the weights again.
    """
    wanted: dict[tuple[str, str | None, bool], None] = {}
    for config in configs:
        trusted = config.model.trust_remote_code
        wanted[config.reference_path, config.reference_adapter, trusted] = None
        if verb == "eval":
            files = policy_files(config)
            wanted[files.base, files.adapter, trusted] = None
        else:
            wanted[config.model.path, config.model.adapter, trusted] = None
    wanted |= {(path, None, trusted): None for path, trusted in _reward_models(base, configs, verb)}
    for path, adapter, trusted in wanted:
        directory, adapter = resolve_model(path), adapter and resolve_model(adapter)
        identify(directory, "float32", adapter, trust_remote_code=trusted)
        for line in doubts(directory, adapter, trusted):
            console.warn(line)


def _check_tokenizers(configs: Sequence[Config]) -> list[Any]:
    """Load each tokenizer with its chat template."""
    wanted = {
        (config.model.tokenizer or config.model.path, config.data.chat_template, config.model.trust_remote_code): None
        for config in configs
    }
    try:
        return [
            load_tokenizer(resolve_model(path), chat_template=template, trust_remote_code=trust_remote_code)
            for path, template, trust_remote_code in wanted
        ]
    except ConfigError:
        raise
    except ModelError as error:  # a directory without tokenizer, or a template that is not Jinja
        raise FilesError(str(error)) from None


def _check_judges(configs: Sequence[Config]) -> None:
    """Check what judges the answers of an evaluation: the user's functions, the API keys."""
    from raydpo.answers.contests import own_function
    from raydpo.answers.judge import Judge
    from raydpo.rewards.checks import check_rewards

    for path in dict.fromkeys(filter(None, (config.evaluate.score_with for config in configs))):
        own_function(path)
    for judge in dict.fromkeys(filter(None, (config.evaluate.judge for config in configs))):
        with Judge(judge):  # raises an error without its key; sends no request
            pass
    checked: list[tuple[RewardConfig, ...]] = []
    for config in configs:
        if config.evaluate.rewards not in checked:
            checked.append(config.evaluate.rewards)
            check_rewards(config.evaluate.rewards, None)


def pythons_of(configs: Sequence[Config]) -> list[str]:
    """Pythons that answer with vLLM in evaluations of these configurations."""
    answering = [each.evaluate for each in configs if each.evaluate.engine == "vllm"]
    return list(dict.fromkeys(each.vllm_python or sys.executable for each in answering))


def _check_vllm(configs: Sequence[Config], verb: Verb) -> None:
    """Check that vLLM computes the models as raydpo does, and is on this machine if the answers are written here."""
    from raydpo.answers.vllm_engine import check_servable  # imports torch and transformers

    for config in configs:
        if config.evaluate.engine != "vllm":
            continue
        served = [(config.reference_path, _settings_of(config.reference_adapter), config.reference_quantization)]
        if verb == "eval":
            files = policy_files(config)
            served.append((files.base, _settings_of(files.adapter), files.adapter and config.model.quantization))
        else:  # what the trials begin with
            lora = config.model.lora
            adapter = (
                {"peft_type": "LORA", "r": lora.r, "use_dora": lora.dora} if lora else _settings_of(config.model.adapter)
            )
            served.append((config.model.path, adapter, config.model.quantization))
        for path, adapter, quantization in served:
            files_of = model_files(resolve_model(path), config.model.trust_remote_code)
            check_servable(quantization, rope_length(files_of.config, config.data.max_length), adapter)
        if starts_own_ray(config) and (problem := missing_vllm(pythons_of([config])[0], "this machine")):
            raise ConfigError(problem)


def _settings_of(adapter: str | None) -> dict[str, Any] | None:
    return None if adapter is None else adapter_files(resolve_model(adapter)).config


def _check_policy(config: Config, tokenizer: Any) -> None:
    """Check that the policy to evaluate has the vocabulary of ``tokenizer``: log-probs of the same tokens are compared."""
    files, trust_remote_code = policy_files(config), config.model.trust_remote_code
    directory = files.adapter or files.base
    if not has_tokenizer(directory):
        return
    own = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    if own.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"the policy {files.name} has another vocabulary ({len(own.get_vocab()):,} tokens) than "
            f"model.tokenizer or model.path ({len(tokenizer.get_vocab()):,}); log-probs of the same tokens "
            "are compared, so set model.path to a model with its tokenizer"
        )
