"""Read a configuration from YAML and ``key.sub=value`` overrides, check it, and explain what is wrong with it."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from raydpo.config.data import DATA_SUFFIXES, bare_suffix
from raydpo.config.filter import PairFilter
from raydpo.config.run import Config
from raydpo.errors import ConfigError, one_line, some_of
from raydpo.storage.uri import hidden, is_uri, redacted, shown

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

__all__ = ["files_of", "is_hub_name", "load_config", "named_inputs", "template_file", "with_setting"]


_REMOVED = {"sweep.together": "trials no longer share a process; drop the key, and each trial trains in workers of its own"}
"""Keys of earlier versions, and what to do about each."""
_OTHER_NAMES = {
    theirs: ours
    for ours, names in {
        "output": "output_dir",
        "name": "run_name",
        "model.path": "model_name_or_path model_revision",
        "model.tokenizer": "tokenizer_name_or_path",
        "model.dtype": "model_init_kwargs torch_dtype bf16 fp16",
        "model.layout": "padding_free attn_implementation concatenated_forward packing",
        "model.fused": "use_liger_kernel torch_compile",
        "model.lora": "peft_config use_peft use_lora",
        "model.lora.r": "lora_r lora_rank",
        "model.lora.alpha": "lora_alpha",
        "model.lora.target_modules": "lora_target_modules",
        "model.lora.target_parameters": "lora_target_parameters",
        "model.lora.exclude_modules": "lora_exclude_modules",
        "model.lora.dora": "use_dora",
        "model.lora.rslora": "use_rslora",
        "model.quantization": "load_in_4bit load_in_8bit use_qlora",
        "reference.path": "ref_model",
        "cache.uri": "precompute_ref_log_probs",
        "data.train": "train_dataset dataset_name mixer_list dataset_mixer mixer_list_splits",
        "data.eval": "eval_dataset",
        "data.fraction": "max_train_samples",
        "data.max_length": "max_seq_length",
        "data.truncation": "truncation_mode",
        "data.chat_template": "chat_template_name",
        "score.tokens_per_batch": "precompute_ref_batch_size",
        "train.loss": "loss_type loss_weights",
        "train.simpo_gamma": "gamma_beta_ratio",
        "train.pairs_per_step": "per_device_train_batch_size gradient_accumulation_steps",
        "train.epochs": "num_train_epochs num_epochs",
        "train.steps": "max_steps max_train_steps",
        "train.lr": "learning_rate",
        "train.schedule": "lr_scheduler_type",
        "train.warmup": "warmup_steps warmup_ratio",
        "train.clip": "max_grad_norm",
        "train.optimizer": "optim use_8bit_optimizer dpo_use_paged_optimizer",
        "train.zero": "deepspeed fsdp zero_stage",
        "train.gradient_checkpointing": "activation_memory_budget",
        "train.offload_activations": "activation_offloading",
        "train.router_aux_loss_coef": "load_balancing_loss load_balancing_weight",
        "train.offload_params": "offload_param",
        "train.sequence_parallel": "context_parallel_degree",
        "train.seed": "data_seed",
        "train.eval_every": "eval_strategy eval_steps",
        "train.checkpoint_every": "save_strategy save_steps checkpointing_steps",
        "train.keep_checkpoints": "save_total_limit keep_last_n_checkpoints",
        "train.keep_best": "load_best_model_at_end metric_for_best_model",
        "track": "report_to",
        "track.wandb": "with_tracking wandb_project wandb_entity",
    }.items()
    for theirs in names.split()
}
"""The key that is nearest to each setting of TRL, PEFT and open-instruct. The guide's page switching.md explains them."""
_MAIN_KEYS = {
    "model": ("path",), "reference": ("path",), "data": ("train",), "cache": ("uri",), "score": ("workers",),
    "train": ("loss",), "evaluate": ("policy", "data"), "ray": ("address",), "sweep": ("list",), "lora": ("r",),
    "eval": ("fraction",), "judge": ("url",), "random": ("samples",), "stop_early": ("grace",), "wandb": ("project",),
    "mlflow": ("uri",),
}  # fmt: skip
"""Keys of each section that a single value in its place may be meant for."""
_INSTEAD = {
    "data.eval.path": ("data.eval.fraction",),
    "data.eval.fraction": tuple(f"data.eval.{name}" for name in ("path", "split", "subset", "columns")),
    "train.checkpoint_every": ("train.checkpoint_minutes",),
    "train.checkpoint_minutes": ("train.checkpoint_every",),
    "train.epochs": ("train.steps",),
    "train.steps": ("train.epochs",),
}
"""Keys that cannot be set together, and what each one replaces in a base, or in the file below the overrides."""
_INT, _FLOAT, _DATE = (f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))


def is_hub_name(path: str) -> bool:
    """Whether ``path`` has the form of a hub name such as ``org/name``, and nothing of this name lies on this machine."""
    formed = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", path) is not None
    return formed and not _is_data_file(path) and not Path(path).exists()


def load_config(source: str | Path | dict[str, Any], overrides: Sequence[str] = (), *, elsewhere: bool = False) -> Config:
    """Read, override and check a configuration.

    Args:
        source: path of a YAML file, or its content as a dictionary. A file may name a ``base``, another file relative to
            itself, and then holds what differs from it (see ``_read_tree``).
        overrides: ``key.sub=value`` strings, with values in YAML. They replace values of the file, also those that
            contradict them (see ``_INSTEAD``).
        elsewhere: the run is for other machines, so absolute paths need not exist on this one.

    Raises:
        ConfigError: with one message that names every bad key, its value and the fix.
    """
    tree = source if isinstance(source, dict) else _read_tree(Path(source))
    tree = _without_replaced(tree, functools.reduce(_override, overrides, {}))
    for override in overrides:
        tree = _override(tree, override)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(
            "\n".join(_one_each([_explain(tree, problem) for problem in _innermost(error.errors())]))
        ) from None
    _check_paths(config, elsewhere)
    if config.data.filter is not None:
        _check_filter(config.data.filter)
    return config


def _check_filter(expression: str) -> None:
    """Check the condition on pairs, if polars is installed. A machine that only submits jobs may lack it."""
    if importlib.util.find_spec("polars") is not None:
        PairFilter(expression)


def _read_tree(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings of a file merged over those of its base. Sections are merged key by key; any other value, also a list or
    null, replaces that of the base, and so does a key that contradicts one of the base (``_INSTEAD``).

    Args:
        above: the files whose ``base`` led here.
    """
    tree = _read_yaml(path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"'base' in {path} is {shown(base)}, expected the path of one YAML file, relative to this one")
    place, files = path.parent / base, (*above, path)
    if any(place.resolve() == file.resolve() for file in files):
        raise ConfigError(f"'base' is circular: {' -> '.join(map(str, (*files, place)))}; drop one of them")
    if not place.is_file():
        raise ConfigError(f"'base' in {path} is {base!r}, but there is no file {str(place)!r}; it is relative to {path}")
    return _merged(_without_replaced(_read_tree(place, files), tree), tree)


def files_of(source: Path) -> list[Path]:
    """A configuration file and its chain of bases, in order. All of them must be readable."""
    files = [source]
    while (base := _read_yaml(files[-1]).get("base")) is not None:
        files.append(files[-1].parent / base)
    return files


def _without_replaced(tree: Any, changes: Any, prefix: str = "") -> Any:
    """``tree`` without the keys that a key of ``changes`` replaces, unless its value is null."""
    if not isinstance(tree, dict) or not isinstance(changes, dict):
        return tree
    named = (f"{prefix}{key}" for key, value in changes.items() if value is not None)
    gone = {other for key in named for other in _INSTEAD.get(key, ())}
    return {
        key: _without_replaced(value, changes.get(key), f"{prefix}{key}.")
        for key, value in tree.items()
        if f"{prefix}{key}" not in gone
    }


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(base[key], value)
        for key, value in changes.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return base | changes | both


class _Loader(yaml.SafeLoader):
    """YAML's safe types, without surprises of YAML 1.1: 010 is 10, not 8; 1:30 and 2026-01-31 are text, not a number of
    seconds and a date."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT, _DATE)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    _INT, re.compile(r"[-+]?(?:[0-9][0-9_]*|0x[0-9a-fA-F][0-9a-fA-F_]*|0b[01][01_]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?$|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|"
        r"\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    digits = text.lstrip("-+").replace("_", "")
    return (-1 if text.startswith("-") else 1) * int(digits, 0 if digits[:2] in ("0x", "0b") else 10)


_Loader.add_constructor(_INT, _whole)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"there is no configuration file {str(path)!r}; give the path of a YAML file")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {_yaml_problem(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}, not a mapping of settings such as 'model: {{path: ...}}'")
    return tree


def _override(tree: dict[str, Any], override: str) -> dict[str, Any]:
    key, sign, text = override.partition("=")
    # The value is left out, since it may be a secret.
    what = f"override {hidden(key + '=...' * bool(sign))!r}"
    if not sign or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise ConfigError(f"{what} does not have the form key.sub=value, for example train.beta=0.05")
    if not text.strip():
        raise ConfigError(
            f"override '{key}=' has no value; a shell variable that is not set leaves none. Give a value, or "
            f"write {key}=null"
        )
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {what} is not valid YAML: {_yaml_problem(error)}") from None
    return with_setting(tree, key, value, what)


def _yaml_problem(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """What is wrong and where. The text itself is left out, since it may be a secret."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return one_line(error)
    mark = error.problem_mark or error.context_mark
    place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    return f"{', '.join(part for part in (error.context, error.problem) if part)}{place}"


def with_setting(tree: dict[str, Any], key: str, value: Any, what: str) -> dict[str, Any]:
    """A copy of ``tree`` with ``value`` at the dotted ``key``.

    Args:
        what: name of the setting in errors.

    Raises:
        ConfigError: if part of the key is not a section, or a list has no such entry.
    """
    return _replaced(tree, key.split("."), value, what)


def _replaced(node: Any, path: Sequence[str], value: Any, what: str, above: tuple[str, ...] = ()) -> Any:
    """A copy of a dictionary or list with ``value`` at the end of ``path``. ``above`` leads to ``node``."""
    if not path:
        return value
    head, *rest = path
    if isinstance(node, (list, tuple)) and head.isdigit():
        if int(head) >= len(node):
            raise ConfigError(f"{what}: {'.'.join(above)} has {len(node)} entries, there is no entry {head}")
        # A source may be a bare path, which stands for a section.
        entry = {"path": node[int(head)]} if rest and isinstance(node[int(head)], str) else node[int(head)]
        return [*node[: int(head)], _replaced(entry, rest, value, what, (*above, head)), *node[int(head) + 1 :]]
    if node is not None and not isinstance(node, dict):
        raise ConfigError(
            f"{what} sets a key below {'.'.join(above)!r}, whose value is {shown(node, above[-1])}, not a section"
            + _as_section(above, node)
        )
    node = node or {}
    return node | {head: _replaced(node.get(head), rest, value, what, (*above, head))}


_INNER = re.compile(r"function-|tuple\[|constrained-|tagged-|literal\[|[A-Z]\w*Config$")
"""How pydantic's location parts begin that are not keys, such as the section of a value that may be one."""


def _keys(problem: ErrorDetails) -> list[str]:
    """The keys down to the value that ``problem`` is about."""
    return [str(part) for part in problem["loc"] if not _INNER.match(str(part))]


def _innermost(problems: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """``problems`` without those of a value that was read further, as a section or list: what is wrong is inside of it.
    pydantic takes a list whose entries are all wrong for an empty one."""
    found = [_keys(problem) for problem in problems]
    return [
        problem
        for problem, keys in zip(problems, found, strict=True)
        if problem["type"] not in {"literal_error", "too_short"}
        or not any(len(keys) < len(other) and keys == other[: len(keys)] for other in found)
    ]


def _one_each(lines: Sequence[str]) -> list[str]:
    """``lines``, with those of one key joined: for a value that may be of several types, pydantic says of each what it
    expects."""
    told: dict[str, list[str]] = {}
    for line in lines:
        told.setdefault(line.split("'")[1] if line.startswith("'") and "expected " in line else line, []).append(line)
    joined = []
    for same in told.values():
        starts, _, expected = zip(*(line.partition("expected ") for line in same), strict=True)
        parts, _, hints = zip(*(rest.partition("; ") for rest in expected), strict=True)
        hint = next((f"; {hint}" for hint in hints if hint), "")
        joined.append(f"{starts[0]}expected {' or '.join(parts)}{hint}" if same[1:] else same[0])
    return joined


def _explain(tree: dict[str, Any], problem: ErrorDetails) -> str:
    """One sentence on what pydantic found: key, value, what is expected, and the fix where it is known."""
    where = _keys(problem)
    key, value = ".".join(where), problem["input"]
    told = shown(value, where[-1] if where else "")
    kind, context = problem["type"], problem.get("ctx", {})
    if key in _REMOVED:
        return f"{key!r} was removed: {_REMOVED[key]}"
    if kind == "extra_forbidden":
        known = list(_section_at(where[:-1]).model_fields)
        near = difflib.get_close_matches(where[-1], known, n=1, cutoff=0.6)
        same = [full for full in _all_keys() if full.rsplit(".", 1)[-1] == where[-1]]
        elsewhere = sorted(same, key=lambda full: not full.startswith(f"{'.'.join(where[:-1])}."))
        meant = elsewhere[0] if elsewhere else ".".join([*where[:-1], near[0]]) if near else None
        hint = f"did you mean {meant!r}?" if meant else f"known here: {', '.join(known)}"
        if not elsewhere and where[-1] in _OTHER_NAMES:
            hint = f"what others call {where[-1]} is {_OTHER_NAMES[where[-1]]!r} here (switching.md of the guide)"
        # It may be a judge's API key under a wrong name.
        value_told = "" if where[:2] == ["evaluate", "judge"] else f" (value {told})"
        return f"unknown key {key!r}{value_told}; {hint}"
    if kind == "missing":
        every = "; every run needs a model (model.path), data (data.train) and an output (output)"
        return f"{key!r} is missing" + ("" if where[1:] and key != "model.path" else every)
    if kind == "literal_error":
        choices = context.get("expected", "")
        near = difflib.get_close_matches(str(value), re.findall(r"'([^']+)'", choices), n=1, cutoff=0.5)
        return f"{key!r} is {told}, expected {choices}" + (f"; did you mean {near[0]!r}?" if near else "")
    if kind == "value_error":
        return hidden(f"{key!r}: {context['error']}" if key else str(context["error"]))
    if kind == "model_type":
        known = some_of(list(_section_at(where).model_fields), 12)
        return f"{key!r} is {told}, expected a section of keys: {known}{_as_section(where, value)}"
    if kind == "tuple_type":
        return f"{key!r} is {told}, expected a list, for example [{told}]"
    if kind == "too_short":
        return f"{key!r} is empty; at least one entry is needed"
    if kind == "string_pattern_mismatch":
        signs = ". _ - = , + ~" if "+" in context["pattern"] else ". _ -"
        return f"{key!r} is {told}; use letters, digits and any of {signs} and start with a letter or digit"
    message = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{key!r} is {told}, expected {message}"


def _as_section(where: Sequence[str], value: Any) -> str:
    """What to write for a value that stands in the place of the section at ``where``; empty if that is not clear."""
    name, section = where[-1], _section_at(where)
    if isinstance(value, bool):
        optional = not any(field.is_required() for field in section.model_fields.values())
        return f"; write {name}: {{}} for its defaults" if value and optional else ""
    own = [(name, key, section) for key in _MAIN_KEYS.get(name, ())]
    if value is None:
        return f"; write {name}: {{{own[0][1]}: ...}}" if own else ""
    if isinstance(value, str) and _is_data_file(value):
        own.sort(key=lambda each: each[1] not in ("data", "train"))
    # The key may be that of another section, such as data.train.
    own += [(top, name, inner) for top in Config.model_fields if name in (inner := _section_at([top])).model_fields]
    found = next(((top, key) for top, key, inner in own if _takes(inner, key, value)), None)
    text = yaml.safe_dump(redacted(value), default_flow_style=True, width=10_000, allow_unicode=True).removesuffix("...\n")
    return f"; write {found[0]}: {{{found[1]}: {text.strip()}}}" if found and len(text) <= 300 else ""


def _takes(section: type[BaseModel], key: str, value: Any) -> bool:
    """Whether ``value`` is one for ``key`` of ``section``."""
    try:
        section.model_validate({key: value})
    except ValidationError as error:
        return not any(problem["loc"][:1] == (key,) for problem in error.errors())
    return True


def _section_at(where: Sequence[str]) -> type[BaseModel]:
    section: type[BaseModel] = Config
    for part in where:
        if part in section.model_fields:
            section = _inner_section(section.model_fields[part].annotation) or section
    return section


def _inner_section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _inner_section(inner))), None)


def _all_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        inner = _inner_section(field.annotation)
        if inner is not None:
            keys += _all_keys(inner, f"{prefix}{name}.")
    return keys


def _is_data_file(path: str) -> bool:
    return bare_suffix(path).endswith(DATA_SUFFIXES)


def named_inputs(config: Config) -> list[tuple[str, str, bool]]:
    """Every input that a configuration names: (key; path, hub name or URI; whether it is a model)."""
    inputs = [
        ("model.path", config.model.path, True),
        ("model.tokenizer", config.model.tokenizer, True),
        ("reference.path", config.reference.path, True),
        ("reference.adapter", config.reference.adapter, True),
        ("model.adapter", config.model.adapter, True),
        ("evaluate.policy", config.evaluate.policy, True),
        ("evaluate.base", config.evaluate.base, True),
        ("evaluate.reward_model", config.evaluate.reward_model, True),
    ]
    inputs += [(f"data.train.{i}.path", source.path, False) for i, source in enumerate(config.data.train)]
    inputs += [(f"evaluate.data.{i}.path", source.path, False) for i, source in enumerate(config.evaluate.data or ())]
    if config.data.eval is not None:
        inputs.append(("data.eval.path", config.data.eval.path, False))
    rewards = [("evaluate", one) for one in enumerate(config.evaluate.rewards)]
    if config.rounds is not None:
        inputs += [(f"rounds.prompts.{i}.path", source.path, False) for i, source in enumerate(config.rounds.prompts)]
        inputs.append(("rounds.held_out.path", config.rounds.held_out.path, False))
        rewards += [("rounds", one) for one in enumerate(config.rounds.rewards)]
    inputs += [(f"{section}.rewards.{i}.reward_model", one.reward_model, True) for section, (i, one) in rewards]
    return [(key, value, is_model) for key, value, is_model in inputs if value is not None]


def template_file(config: Config) -> str | None:
    """The file that ``data.chat_template`` names; None if it is unset, or the template itself."""
    template = config.data.chat_template
    return None if template is None or "{{" in template or "{%" in template else template


def _check_paths(config: Config, elsewhere: bool) -> None:
    """Check that every local input exists. Hub names and URIs are checked when they are opened.

    Args:
        elsewhere: do not check absolute paths; they are those of other machines.
    """
    problems = []
    for key, value, is_model in named_inputs(config):
        if elsewhere and Path(value).is_absolute():
            continue
        if is_uri(value) or Path(value).exists():
            if is_model and Path(value).is_file():
                problems.append(f"{key!r} is {shown(value)}, a file; expected a directory with config.json and safetensors")
            elif not is_uri(value) and not Path(value).is_file() and not Path(value).is_dir():
                problems.append(
                    f"{key!r} is {shown(value)}, a pipe or a device; expected a file or directory, since it is read more "
                    "than once. Write its content to a file"
                )
            continue
        if Path(value).is_symlink():
            problems.append(f"{key!r} is {shown(value)}, a link to {os.readlink(value)!r}, which is not there")
            continue
        if is_hub_name(value) and "/" in value and not Path(value).parent.is_dir():
            continue
        near = difflib.get_close_matches(Path(value).name, _siblings(value), n=1, cutoff=0.6)
        hint = f"; did you mean {str(Path(value).parent / near[0])!r}?" if near else ""
        problems.append(f"{key!r} is {shown(value)}, but there is no such {'directory' if is_model else 'file'}{hint}")
    template = template_file(config)
    if template is not None and not Path(template).is_file() and not (elsewhere and Path(template).is_absolute()):
        problems.append(f"'data.chat_template' is {shown(template)}, which is neither a Jinja template nor a file")
    if problems:
        raise ConfigError("\n".join(problems))


def _siblings(path: str) -> list[str]:
    parent = Path(path).parent
    return [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
