"""The trials of a sweep: settings, names, and a checked configuration for each. Imports neither torch nor Ray."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from raydpo.config import (
    SCALE_KEYS,
    Config,
    RandomConfig,
    SweepConfig,
    check_metric,
    check_verb,
    depends_on_scale,
    load_config,
    with_setting,
)
from raydpo.config.counting import train_on_text
from raydpo.errors import ConfigError

__all__ = ["Trial", "parameters_of", "trial_name", "trials_of"]

LONGEST_NAME = 100
DIGEST = 8
"""Characters of a digest in a name."""
FIXED = ("name", "output", "cache", "ray", "score", "sweep")
"""Keys and sections that the trials of a sweep share."""
DRAWS_PER_SAMPLE = 100
"""Draws for each wanted sample after which the search for different settings ends."""


@dataclass(frozen=True)
class Trial:
    """One training of a sweep: an ordinary run.

    Attributes:
        name: name made from its settings, the last part of its run directory.
        settings: its own keys, with values as parsed by the configuration.
        config: configuration of the run.
    """

    name: str
    settings: dict[str, Any]
    config: Config

    def value(self, key: str) -> Any:
        """Return the value of any key of the configuration."""
        return _value(self.config, key)


def trials_of(config: Config, *, elsewhere: bool = False) -> list[Trial]:
    """All trials of a configuration with a sweep, each checked as a run of its own.

    Args:
        elsewhere: as of ``load_config``: absolute paths are those of other machines.

    Raises:
        ConfigError: if trials are wrong (it names each), if two are equal, or if there is no sweep.
    """
    check_verb(config, "sweep")
    sweep = config.sweep
    # Without defaults, since some checks depend on which keys were given.
    base = config.model_dump(mode="json", exclude_unset=True, exclude={"sweep", "name"})
    base |= {"output": config.run_dir, "cache": base.get("cache", {}) | {"uri": config.cache_uri}}
    problems: list[str] = []
    trials: dict[str, Trial] = {}
    for chosen in _choices(sweep):
        try:
            trial = _trial(base, chosen, elsewhere)
            _check(trial, sweep)
        except ConfigError as error:
            problems += [f"trial {_told(chosen)}: {line}" for line in str(error).splitlines()]
            continue
        name = trial.name
        if name in trials and trials[name].config == trial.config:
            problems.append(f"trial {_told(chosen)} is in the sweep twice; remove one")
        elif name in trials:  # they differ only in characters that a name cannot have
            trial = _named(trial, f"{name}-{_digest(trial.settings)}")
        trials[trial.name] = trial
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    _check_that_metrics_compare(sweep, list(trials.values()))
    return list(trials.values())


def parameters_of(trials: list[Trial]) -> list[str]:
    """Return the keys that are varied, in order of first appearance."""
    return list(dict.fromkeys(key for trial in trials for key in trial.settings))


def trial_name(settings: dict[str, Any]) -> str:
    """Name the trial with these settings, such as ``beta=0.1,lr=1e-06``; the name is valid for a run.

    A key is shortened to its last parts, as many as distinguish it from the others of the trial. If a value has characters
    that a name cannot have, or the name would be too long, a digest of the settings replaces what is left out.
    """
    texts = {key: _text(_in_words(key, value)) for key, value in settings.items()}
    name = ",".join(f"{_short(key, list(settings))}={text}" for key, (text, _) in texts.items())
    if len(name) > LONGEST_NAME or not all(whole for _, whole in texts.values()):
        name = f"{name[: LONGEST_NAME - DIGEST - 1]}-{_digest(settings)}"
    return name


def _choices(sweep: SweepConfig) -> Iterator[dict[str, Any]]:
    if sweep.grid is not None:
        yield from (dict(zip(sweep.grid, values, strict=True)) for values in itertools.product(*sweep.grid.values()))
    elif sweep.list is not None:
        yield from sweep.list
    elif sweep.random is not None:
        yield from _drawn(sweep.random)


def _drawn(search: RandomConfig) -> Iterator[dict[str, Any]]:
    """Draw different settings at random.

    A draw depends on seed, key and number alone, so more samples or more keys do not change earlier draws.
    """
    seen = set()
    for number in range(DRAWS_PER_SAMPLE * search.samples):
        chances = {key: random.Random(f"{search.seed}/{key}/{number}").random() for key in search.draws}
        settings = {key: draw.at(chances[key]) for key, draw in search.draws.items()}
        told = json.dumps(settings, default=str)
        if told not in seen:
            seen.add(told)
            yield settings
        if len(seen) == search.samples:
            return
    raise ConfigError(
        f"sweep.random.samples is {search.samples}, but only {len(seen)} different trial(s) can be drawn; "
        "lower it, or give more values to choose from"
    )


def _trial(base: dict[str, Any], chosen: dict[str, Any], elsewhere: bool) -> Trial:
    if not chosen:
        raise ConfigError("it sets nothing; give at least one key, for example {train.beta: 0.1}")
    tree = base
    for key, value in chosen.items():
        if not re.fullmatch(r"\w+(\.\w+)*", key):
            raise ConfigError(f"{key!r} is not a key of the configuration; write it in full, for example train.beta")
        if key.split(".")[0] in FIXED:
            raise ConfigError(f"{key!r} cannot be varied; all trials of a sweep share {key.split('.')[0]}")
        tree = with_setting(tree, key, value, f"sweep key {key!r}")
    config = load_config(tree, elsewhere=elsewhere)
    settings = {key: _value(config, key) for key in chosen}
    return _named(Trial("", settings, config), trial_name(settings))


def _named(trial: Trial, name: str) -> Trial:
    return Trial(name, trial.settings, trial.config.model_copy(update={"name": name}))


def _value(config: Config, key: str) -> Any:
    """Return the value of a dotted key as plain data; None inside a section that is None."""
    return _at(config.model_dump(mode="json"), key)


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[int(part)] if isinstance(tree, list) else None if tree is None else tree[part]
    return tree


def _check(trial: Trial, sweep: SweepConfig) -> None:
    early, every = sweep.stop_early, trial.config.train.eval_every
    if early is not None and early.grace % every:
        raise ConfigError(
            f"sweep.stop_early.grace is {early.grace}, but trials are measured every {every} steps "
            "(train.eval_every); set one to a multiple of the other"
        )
    if sweep.evaluate and trial.config.evaluate.policy is not None:
        raise ConfigError(
            f"evaluate.policy is {trial.config.evaluate.policy}, but sweep.evaluate measures the policies of "
            "the trials; set evaluate.policy=null"
        )
    if sweep.evaluate and trial.config.data.eval is None and trial.config.evaluate.data is None:
        raise ConfigError(
            "sweep.evaluate has no pairs to measure trials on; set data.eval, for example "
            "data.eval.fraction=0.05, or evaluate.data"
        )
    if trial.config.data.eval is None:
        if sweep.metric != SweepConfig.model_fields["metric"].default:
            raise ConfigError(
                f"sweep.metric {sweep.metric} has no effect: nothing is held out to measure it on; set data.eval, for "
                "example data.eval.fraction=0.05"
            )
        return
    for key, metric in _metrics(sweep):
        try:
            check_metric(key, metric, trial.config.held_out_metrics)
        except ValueError as error:
            raise ConfigError(str(error)) from None


def _metrics(sweep: SweepConfig) -> list[tuple[str, str]]:
    """Return (setting, metric) for each metric by which trials are compared."""
    metrics = {"sweep.metric": sweep.metric, "sweep.stop_early.metric": sweep.stop_metric}
    return [(key, metric) for key, metric in metrics.items() if metric is not None]


def _check_that_metrics_compare(sweep: SweepConfig, trials: list[Trial]) -> None:
    trees = [trial.config.model_dump(mode="json", include={"train", "data"}) for trial in trials]
    scales = [key for key in SCALE_KEYS if any(_at(tree, key) != _at(trees[0], key) for tree in trees)]
    for key, metric in _metrics(sweep):
        if depends_on_scale(metric) and scales:
            raise ConfigError(
                f"{key} is {metric!r}, which does not compare between trials with different "
                f"{' and '.join(scales)}; use eval_rewards/accuracies"
            )


def _short(key: str, keys: list[str]) -> str:
    parts = key.split(".")
    # The index of a list entry is not clear without the name of the list.
    first = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts)) - 1
    for start in range(first, 0, -1):
        tail = parts[start:]
        if sum(other.split(".")[-len(tail) :] == tail for other in keys) == 1:
            return ".".join(tail)
    return key


def _in_words(key: str, value: Any) -> Any:
    """The value, or ``answer+0.1reasoning`` for a list of the parts of a completion that count."""
    parts = key.endswith(".train_on") and isinstance(value, list)
    return train_on_text(value).replace(" ", "") if parts else value


def _text(value: Any) -> tuple[str, bool]:
    """Return a value in characters that a run's name can have, and whether nothing was lost."""
    text = value if isinstance(value, str) else json.dumps(value)
    cleaned = re.sub(r"[^A-Za-z0-9._+~-]+", "-", text).strip("-") or "-"
    return cleaned, cleaned == text


def _told(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items()) or "{}"


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:DIGEST]
