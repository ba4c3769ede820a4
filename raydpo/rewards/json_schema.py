"""Reward ``json``: 1 if the answer is JSON, and valid under the schema of its prompt if there is one, else 0.

JSON is read strictly: no repair, no NaN or Infinity, no name twice in an object. Spaces around it are allowed.

With ``whole: false`` other text may surround the JSON. The content of the fenced block counts if there is exactly one, else
the object or array that begins at the first ``{`` or ``[``.

A schema is an object or JSON text in ``column``. null = the reward does not apply to this prompt. ``$schema`` names its
draft; the default is 2020-12. References may lead to the schema itself and to the published drafts. Others are refused, not
fetched. ``format`` is not checked, as the standard has it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from raydpo.config.rewards import RewardConfig, reward_name
from raydpo.errors import ConfigError, one_line
from raydpo.rewards.sources import answer_text

__all__ = ["check", "column", "make", "parse"]

_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)
_LONGEST_INTEGER = 4000
"""Digits of an integer that Python reads quickly. A longer one becomes a float."""
_DEEP = "too deeply nested"
_LONGEST_REASON = 200
"""Characters of a reason in the details."""


def column(reward: RewardConfig) -> tuple[str, ...]:
    """Columns of the prompts that the function needs."""
    return () if reward.column is None else (reward.column,)


def check(reward: RewardConfig) -> None:
    """Check that jsonschema is installed.

    Raises:
        ConfigError: if not.
    """
    if reward.column is not None:
        try:
            import jsonschema  # noqa: F401
        except ImportError:
            raise ConfigError(
                f"the reward {reward_name(reward)} needs jsonschema, which is not installed; pip install 'raydpo[rewards]'"
            ) from None


def make(reward: RewardConfig) -> Callable[..., list[float | ValueError | None]]:
    """Return the reward function. It logs ``json``: why an answer is not valid. An error = the prompt's schema is wrong."""

    def check_json(
        completions: list[Any], log_extra: Callable[[str, list[Any]], None], **columns: Any
    ) -> list[float | ValueError | None]:
        schemas = [None] * len(completions) if reward.column is None else columns[reward.column]
        verdicts = [_verdict(answer_text(one), schema, reward) for one, schema in zip(completions, schemas, strict=True)]
        log_extra("json", [reason for _, reason in verdicts])
        return [value for value, _ in verdicts]

    return check_json


def _verdict(text: str, schema: Any, reward: RewardConfig) -> tuple[float | ValueError | None, str | None]:
    """The reward of an answer, and why it is 0."""
    if reward.column is not None and schema is None:
        return None, None
    try:
        validator = None if reward.column is None else _validator(schema if isinstance(schema, str) else json.dumps(schema))
        try:
            value = parse(text, reward.whole)
        except ValueError as error:
            return 0.0, f"not JSON: {one_line(error, _LONGEST_REASON)}"
        wrong = None if validator is None else _first_error(validator, value)
    except ValueError as error:
        return error, None
    return (1.0, None) if wrong is None else (0.0, one_line(f"{wrong.json_path}: {wrong.message}", _LONGEST_REASON))


def parse(text: str, whole: bool = True) -> Any:
    """Read JSON strictly.

    Args:
        whole: whether it is the whole text; otherwise see the module.

    Raises:
        ValueError: if it is not JSON.
    """
    try:
        return _decoder().decode(text)
    except RecursionError:
        raise ValueError(_DEEP) from None
    except ValueError:
        if whole:
            raise
    blocks: Sequence[str] = _FENCE.findall(text)
    if len(blocks) == 1:
        return parse(blocks[0])
    first = re.search(r"[\[{]", text)
    if first is None:
        raise ValueError("no object and no array in the text")
    try:
        return _decoder().raw_decode(text, first.start())[0]
    except RecursionError:
        raise ValueError(_DEEP) from None


@functools.cache
def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant, parse_int=_integer)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} twice in an object")
    return made


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _LONGEST_INTEGER else float(digits)


def _first_error(validator: Any, value: Any) -> Any:
    from referencing.exceptions import Unresolvable

    try:
        return next(validator.iter_errors(value), None)
    except Unresolvable as error:
        raise ValueError(f"the prompt's schema refers to {error.ref!r}, which is not in it; nothing is fetched") from None
    except (RecursionError, OverflowError) as error:
        raise ValueError(
            f"the prompt's schema cannot be compared with this answer ({type(error).__name__}): the schema refers to itself "
            "without end, or the answer is too deeply nested or has too large a number"
        ) from None


@functools.lru_cache(maxsize=256)
def _validator(text: str) -> Any:
    """The validator of a schema.

    Raises:
        ValueError: if it is no schema.
    """
    import jsonschema
    from jsonschema import validators
    from jsonschema_specifications import REGISTRY

    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the prompt's schema is not JSON: {error}") from None
    if not isinstance(schema, (dict, bool)):
        raise ValueError(f"the prompt's schema is a {type(schema).__name__}; expected an object")
    draft = schema.get("$schema") if isinstance(schema, dict) else None
    known = draft is None or (isinstance(draft, str) and validators.validator_for(schema, None) is not None)
    kind = validators.validator_for(schema, jsonschema.Draft202012Validator) if known else None
    if kind is None:
        raise ValueError(f"the prompt's schema has the unknown $schema {draft!r}")
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"the prompt's schema is not valid: {error.json_path}: {one_line(error.message, 100)}") from None
    return kind(schema, registry=REGISTRY)
