"""Modules of reward functions: how they are imported, and what identifies their source."""

from __future__ import annotations

import ast
import contextlib
import difflib
import hashlib
import importlib
import importlib.metadata
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raydpo.config.rewards import RewardConfig

__all__ = ["PACKAGES", "answer_text", "built_in", "built_in_digest", "imported", "open_built_in", "sources_digest"]

_MODULES = {
    "math": ("mathematics", ("math-verify", "latex2sympy2-extended", "sympy")),
    "json": ("json_schema", ("jsonschema",)),
    "regex": ("pattern", ("google-re2",)),
    "constraints": ("constraints", ()),
    "code": ("programs", ()),
}
"""Module of a built-in function, and the packages that its rewards depend on."""
_NOT_OF_ONE = {"apply", "call", "checks", "functions", "models", "process", "sources", "task"}
"""Modules of this folder on which no reward of a built-in function depends."""
PACKAGES = ("site-packages", "dist-packages")
"""Directories of installed packages."""


def imported(path: str) -> tuple[ModuleType, Callable[..., Any]]:
    """Import ``module:function`` from the working directory or an installed package.

    Raises:
        AttributeError: if the module has no such function.
        BaseException: what the module raises.
    """
    name, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module = importlib.import_module(name)
    if not hasattr(module, attribute):
        near = difflib.get_close_matches(attribute, [one for one, value in vars(module).items() if callable(value)], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise AttributeError(f"module {name!r} has no attribute {attribute!r}{hint}")
    function = getattr(module, attribute)
    if not callable(function):
        raise TypeError(f"{attribute} is not a function but a {type(function).__name__}")
    if inspect.isclass(function):
        raise TypeError(f"{attribute} is a class; name an object of it, as in: my_{attribute.lower()} = {attribute}()")
    if inspect.isasyncgenfunction(function):
        raise TypeError(f"{attribute} is an asynchronous generator; return a list")
    return module, function


def sources_digest(module: ModuleType) -> str:
    """Digest of the source files of a module and of the modules in its directory and below that it has imported.

    It does not cover modules that are imported while the function runs, installed packages, and data files.
    """
    file = getattr(module, "__file__", None)
    digest = hashlib.sha256(module.__name__.encode())
    if file is None:
        return digest.hexdigest()[:32]
    top, found = Path(file).resolve().parent, {Path(file).resolve()}
    for other in list(sys.modules.values()):
        with contextlib.suppress(Exception):  # some modules compute their attributes
            place = Path(str(other.__file__))
            # torch.classes says that its file is _classes.py, which is none of the working directory.
            if place.is_absolute() and (place := place.resolve()).is_relative_to(top) and place.is_file():
                found |= set() if set(PACKAGES) & set(place.relative_to(top).parts) else {place}
    for place in sorted(found):
        digest.update(f"\0{place.relative_to(top)}\0".encode() + hashlib.sha256(place.read_bytes()).digest())
    return digest.hexdigest()[:32]


def built_in(name: str) -> ModuleType:
    """The module of a built-in function, with ``make(reward)``, ``check(reward)`` and ``column(reward)``."""
    return importlib.import_module(f"raydpo.rewards.{_MODULES[name][0]}")


def built_in_digest(name: str) -> str:
    """Digest of the code of a built-in function, of the modules of this folder that it names, and of the versions of the
    packages that it uses. Comments, docstrings and layout do not count: a release may change them."""
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
        digest.update(f"\0{module}\0".encode() + hashlib.sha256(_code(sources[module]).encode()).digest())
    for package in packages:
        try:
            digest.update(f"\0{package} {importlib.metadata.version(package)}".encode())
        except importlib.metadata.PackageNotFoundError:
            digest.update(f"\0{package}".encode())
    return digest.hexdigest()[:32]


def _code(source: bytes) -> str:
    """Python source without comments and docstrings, laid out anew."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def open_built_in(reward: RewardConfig) -> Callable[..., Any]:
    """The function of a built-in reward, with the signature of TRL's reward functions."""
    return built_in(str(reward.use)).make(reward)


def answer_text(completion: str | Sequence[dict[str, str]]) -> str:
    """Text of a completion: itself, or the content of its message."""
    return completion if isinstance(completion, str) else completion[0]["content"]
