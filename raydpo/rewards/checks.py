"""Refuses reward functions, and prompts that they cannot read, before anything is sampled or scored."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from raydpo.config.rewards import BUILT_IN, RewardConfig, reward_name
from raydpo.errors import ConfigError, some_of
from raydpo.rewards.call import ARGUMENTS, NO_COLUMNS
from raydpo.rewards.functions import RewardFunction, resolve
from raydpo.rewards.sources import built_in, open_built_in

__all__ = ["check_readable", "check_rewards"]

_ARGUMENT_OF = {"prompt": "prompts", "completion": "completions"}
"""Arguments of reward functions with what these columns hold. No function is given the columns themselves."""


def check_rewards(rewards: Sequence[RewardConfig], columns: Collection[str] | None) -> dict[str, dict[str, bool]]:
    """Refuse, before Ray is started, what can be refused: missing functions, libraries, columns and keys.

    Args:
        columns: of the prompts, without the prompt; None = unknown.

    Returns:
        Name of each reward -> the columns that it is known to read, and whether the column is a parameter without a default.

    Raises:
        ConfigError: naming the reward.
    """
    read: dict[str, dict[str, bool]] = {}
    for reward in rewards:
        if reward.judge is not None:
            from raydpo.answers.judge import Judge

            # raises an error without its key; sends no request
            with Judge(reward.judge, f"reward {reward_name(reward)}: judge"):
                pass
        if reward.use is None:  # pipeline.checks checks reward models
            continue
        name = reward_name(reward)
        if reward.use in BUILT_IN:
            module = built_in(reward.use)
            module.check(reward)
            names = module.column(reward)
            read[name] = dict.fromkeys(names, False)
            if columns is not None:
                _refuse_missing(name, [one for one in names if one not in columns], columns)
                if taken := [one for one in names if one in NO_COLUMNS]:
                    raise ConfigError(
                        f"the reward {name} reads the column {taken[0]!r}, which it is not given, since reward functions "
                        "have an argument of this name; rename it with the source's 'columns'"
                    )
        else:
            function = resolve(reward)
            if columns is not None and function.parameters is not None:
                read[name] = _check_parameters(name, function, columns)
    return read


def _check_parameters(name: str, function: RewardFunction, columns: Collection[str]) -> dict[str, bool]:
    """Refuse a function that cannot be called with the arguments that TRL gives it. Return the columns that it names."""
    given = {*ARGUMENTS, *columns} - {"prompt", "completion"}
    parameters = function.parameters or ()
    named = {one for one, kind, _ in parameters if kind in ("POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY")}
    if by_place := [one for one, kind, _ in parameters if kind == "POSITIONAL_ONLY"]:
        raise ConfigError(
            f"the reward {name} ({function.name}) takes {_named(by_place)} by position only, but it is called with "
            "names; remove the / from its parameters"
        )
    needed = [one for one, kind, default in parameters if not default and not kind.startswith("VAR_")]
    _refuse_missing(name, [one for one in needed if one not in given], columns)
    if not any(kind == "VAR_KEYWORD" for _, kind, _ in parameters) and given - named:
        raise ConfigError(
            f"the reward {name} ({function.name}) has no **kwargs and takes no {_named(sorted(given - named))}, but it is "
            "called with the prompts' columns and what TRL's trainers give; add **kwargs to its parameters"
        )
    return {one: one in needed for one in columns if one in named}


def _refuse_missing(name: str, missing: Sequence[str], columns: Collection[str]) -> None:
    if not missing:
        return
    near = difflib.get_close_matches(missing[0], columns, 1)
    fix = f"did you mean {near[0]!r}?" if near else "add it, or map it with the source's 'columns'"
    if missing[0] in _ARGUMENT_OF:
        fix = f"functions get it as {_ARGUMENT_OF[missing[0]]!r}, a list"
    raise ConfigError(
        f"the reward {name} needs the column {missing[0]!r} of the prompts, which have "
        f"{_named(sorted(columns)) if columns else 'no other columns'}; {fix}"
    )


def _named(names: Sequence[str]) -> str:
    return some_of([repr(name) for name in names], 10)


def check_readable(
    rewards: Sequence[RewardConfig],
    columns: Sequence[Mapping[str, Any]],
    places: Sequence[str],
    what: str,
    max_errors: float | None,
) -> list[str]:
    """Refuse prompts whose columns built-in functions cannot read, if they are too many.

    Each function scores an empty answer to each prompt, which fails only if the columns cannot be read.

    Args:
        columns: of each prompt, as reward functions get them.
        places: where each prompt stands, for the message.
        what: what the prompts are, for the message: training or held-out.
        max_errors: largest share of prompts that may be unreadable; None = nothing is refused.

    Returns:
        A line for each function that cannot read some prompts, and one if no reward with a weight applies to any prompt.

    Raises:
        ConfigError: with such a line, if ``max_errors`` does not allow it.
    """
    lines: list[str] = []
    applies = not columns or not any(one.weight for one in rewards)
    why = f"{places[0]}: the columns that the rewards read are null or missing there" if places else ""
    for reward in rewards:
        names = built_in(reward.use).column(reward) if reward.use in BUILT_IN else ()
        if not names:
            applies = applies or reward.weight != 0
            continue
        given = {name: [each.get(name) for each in columns] for name in names}
        empty = "{}" if reward.use == "json" else ""  # what is no JSON is not compared with a schema
        values = open_built_in(reward)(completions=[empty] * len(columns), log_extra=lambda *_: None, **given)
        applies = applies or (reward.weight != 0 and any(isinstance(value, float) for value in values))
        failed = [(place, value) for place, value in zip(places, values, strict=True) if isinstance(value, Exception)]
        if failed:
            first = f"{failed[0][0]}: {failed[0][1]}"
            why = first if reward.weight else why
            share = f"{len(failed):,} of {len(columns):,} {what} prompt(s)"
            line = f"the reward {reward_name(reward)} cannot read {_named(names)} of {share} (first: {first})"
            if max_errors is not None and len(failed) / len(columns) > max_errors:
                allowed = f"more than rounds.max_errors ({max_errors:g}) allows"
                raise ConfigError(f"{line}, {allowed}; correct or remove these prompts, or raise it")
            lines.append(f"{line}; answers to them get no reward")
    if not applies:
        line = f"no reward with a weight applies to any of {len(columns):,} {what} prompt(s), such as {why}"
        if max_errors is not None:
            raise ConfigError(f"{line}; add the columns, or other prompts")
        lines.append(line)
    return lines
