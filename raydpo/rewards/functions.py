"""Reward functions: the user's own and the built-in ones, found and identified before anything runs."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from raydpo.config.rewards import BUILT_IN, RewardConfig
from raydpo.errors import ConfigError, RaydpoError
from raydpo.rewards.call import imported
from raydpo.rewards.process import described

__all__ = ["RewardFunction", "answer_text", "built_in", "built_in_digest", "open_built_in", "resolve"]

_MODULES = {
    "math": ("mathematics", ("math-verify", "latex2sympy2-extended", "sympy")),
    "json": ("json_schema", ("jsonschema",)),
    "regex": ("pattern", ("google-re2",)),
    "constraints": ("constraints", ()),
    "code": ("programs", ()),
}
"""Module of a built-in function, and the packages that its rewards depend on."""
_NOT_OF_ONE = {"apply", "call", "functions", "models", "process", "task"}
"""Modules of this folder on which no reward of a built-in function depends."""
_NO_OPTIONS = {"use", "reward_model", "judge", "weight", "name", "timeout"}
"""Settings that no reward of a function depends on, or that its digest covers."""


@dataclass(frozen=True)
class RewardFunction:
    """A reward function that was found: a built-in one, or the user's own.

    Attributes:
        name: ``use`` of its configuration.
        digest: of its source. For a user's own see ``call.sources_digest``.
        options: settings that its rewards depend on, as plain data for JSON.
        parameters: (name, kind of ``inspect.Parameter``, has a default) of a user's own; None if unknown.
    """

    name: str
    digest: str
    options: dict[str, Any]
    parameters: tuple[tuple[str, str, bool], ...] | None = None

    def open(self) -> Callable[..., Any]:
        """Return the function, with the signature of TRL's reward functions. It is imported in this process."""
        if self.name in BUILT_IN:
            return open_built_in(RewardConfig.model_validate({"use": self.name, **self.options}))
        return imported(self.name)[1]


def resolve(reward: RewardConfig) -> RewardFunction:
    """Find the function of a reward with ``use``. A user's module is imported in another process, which then ends.

    Raises:
        ConfigError: if there is no such function, or its module cannot be imported.
    """
    assert reward.use is not None
    options = reward.model_dump(mode="json", exclude=_NO_OPTIONS, exclude_defaults=True)
    if reward.use in BUILT_IN:
        return RewardFunction(reward.use, built_in_digest(reward.use), options)
    try:
        about = described(reward)
    except RaydpoError as error:
        raise ConfigError(
            f"{error}; its module must be in the working directory or installed, and have the function "
            f"{reward.use.partition(':')[2]}"
        ) from None
    kinds = about["parameters"]
    return RewardFunction(
        reward.use, about["digest"], options, kinds and tuple((name, kind, bool(d)) for name, kind, d in kinds)
    )


def built_in(name: str) -> ModuleType:
    """The module of a built-in function, with ``make(reward)``, ``check(reward)`` and ``column(reward)``."""
    return importlib.import_module(f"raydpo.rewards.{_MODULES[name][0]}")


def built_in_digest(name: str) -> str:
    """Digest of the source of a built-in function, of the modules of this folder that it names, and of the versions of the
    packages that it uses."""
    first, packages = _MODULES[name]
    sources: dict[str, bytes] = {}
    todo = [first]
    while todo:
        module = todo.pop()
        file = Path(__file__).parent / f"{module}.py"
        if module not in sources and module not in _NOT_OF_ONE and file.is_file():
            sources[module] = file.read_bytes()
            todo += re.findall(r"raydpo\.rewards\.(\w+)", sources[module].decode())
    digest = hashlib.sha256()
    for module in sorted(sources):
        digest.update(f"\0{module}\0".encode() + hashlib.sha256(sources[module]).digest())
    for package in packages:
        try:
            digest.update(f"\0{package} {importlib.metadata.version(package)}".encode())
        except importlib.metadata.PackageNotFoundError:
            digest.update(f"\0{package}".encode())
    return digest.hexdigest()[:32]


def open_built_in(reward: RewardConfig) -> Callable[..., Any]:
    """The function of a built-in reward, with the signature of TRL's reward functions."""
    return built_in(str(reward.use)).make(reward)


def answer_text(completion: str | Sequence[dict[str, str]]) -> str:
    """Text of a completion: itself, or the content of its message."""
    return completion if isinstance(completion, str) else completion[0]["content"]
