"""The built-in reward functions by name: their modules, and what their rewards depend on."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from raydpo.config.rewards import RewardConfig

__all__ = ["answer_text", "built_in", "built_in_digest", "open_built_in"]

_MODULES = {
    "math": ("mathematics", ("math-verify", "latex2sympy2-extended", "sympy")),
    "json": ("json_schema", ("jsonschema",)),
    "regex": ("pattern", ("google-re2",)),
    "constraints": ("constraints", ()),
    "code": ("programs", ()),
}
"""Module of a built-in function, and the packages that its rewards depend on."""
_NOT_OF_ONE = {"apply", "builtin", "call", "functions", "models", "process", "task"}
"""Modules of this folder on which no reward of a built-in function depends."""


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
