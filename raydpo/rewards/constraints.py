"""The reward ``constraints``: 1 if the answer follows all its instructions, else 0 (IFEval's strict accuracy of prompts)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raydpo.config.rewards import RewardConfig
from raydpo.errors import ConfigError
from raydpo.rewards.instructions import InstructionError, arguments_of, follows
from raydpo.rewards.sources import answer_text

__all__ = ["check", "column", "make"]

IFEVAL = ("instruction_id_list", "kwargs")
"""Columns of IFEval's data: the names of the instructions of a prompt, and the arguments of each."""


def column(reward: RewardConfig) -> tuple[str, ...]:
    """Columns of the prompts that the reward reads."""
    if reward.instructions:
        return ()
    return (reward.column,) if reward.column is not None else IFEVAL


def check(reward: RewardConfig) -> None:
    """Refuse instructions of the configuration that are unknown or have wrong arguments.

    Raises:
        ConfigError: naming the instruction and the argument.
    """
    try:
        for identifier, arguments in _listed(list(reward.instructions)):
            arguments_of(identifier, arguments)
    except InstructionError as error:
        raise ConfigError(f"instructions of the reward constraints: {error}") from error


def make(reward: RewardConfig) -> Callable[..., list[Any]]:
    """Return the reward function, with TRL's interface.

    The instructions of an answer are those of the configuration, or of its prompt: a list of objects with ``id`` and the
    arguments in ``column``, else the columns of IFEval. A prompt without instructions gives None. An entry of the result is
    1.0, 0.0, None, or an exception if the instructions of the prompt are wrong. What is not followed is logged as
    ``not_followed``.
    """
    names, fixed = column(reward), list(reward.instructions)

    def constraints(
        completions: Sequence[Any], log_extra: Callable[[str, list[Any]], None] | None = None, **columns: Any
    ) -> list[Any]:
        results: list[Any] = []
        missed: list[list[str] | None] = []
        for row, completion in enumerate(completions):
            text = answer_text(completion)
            try:
                listed = _listed(fixed) if fixed else _of_prompt([columns[name][row] for name in names])
                missed.append([identifier for identifier, arguments in listed if not follows(identifier, arguments, text)])
                results.append(float(not missed[row]) if listed else None)
            except InstructionError as error:
                missed.append(None)
                results.append(error)
        if log_extra is not None:
            log_extra("not_followed", missed)
        return results

    return constraints


def _listed(instructions: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Names and arguments of ``[{"id": ..., ...}]``."""
    if not isinstance(instructions, list) or not all(isinstance(one, Mapping) and "id" in one for one in instructions):
        raise InstructionError(f"expected a list of objects with 'id', found {_shown(instructions)}")
    return [(one["id"], {name: value for name, value in one.items() if name != "id"}) for one in instructions]


def _of_prompt(values: list[Any]) -> list[tuple[Any, dict[str, Any]]]:
    read = [_read(value) for value in values]
    if len(read) == 1:
        return [] if read[0] is None else _listed(read[0])
    names, arguments = read
    if names is None:
        return []
    if not isinstance(names, list) or not isinstance(arguments, list) or len(names) != len(arguments):
        raise InstructionError(f"expected two lists of one length in {' and '.join(IFEVAL)}, found {_shown(read)}")
    if not all(one is None or isinstance(one, Mapping) for one in arguments):
        raise InstructionError(f"expected objects or null in the list {IFEVAL[1]}, found {_shown(arguments)}")
    return [(name, dict(one or {})) for name, one in zip(names, arguments, strict=True)]


def _read(value: Any) -> Any:
    """``value``, or what it holds if it is JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise InstructionError(f"the column holds the text {_shown(value)}, which is no JSON") from error


def _shown(value: Any) -> str:
    return repr(value)[:80]
