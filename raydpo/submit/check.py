"""Checks on the submitting machine that a configuration, as packed, can run on other machines."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from raydpo.config import Config
from raydpo.config.load import files_of, named_inputs, template_file
from raydpo.errors import ConfigError
from raydpo.storage.uri import carries_secret, hidden, is_uri, redact, shown

__all__ = ["check_files", "check_for_cluster", "check_words", "packed_name"]

_INSTEAD = (
    "which everyone who can see the job could read; remove it, and give it to the nodes by their environment: a "
    "service account, or a secret of the cluster"
)


def packed_name(file: str, packed: Collection[str]) -> str:
    """Name of the configuration file in the job's working directory.

    Raises:
        ConfigError: if it is not packed.
    """
    path = Path(file).resolve()
    if not path.is_relative_to(Path.cwd()):
        raise ConfigError(
            f"{file} lies outside of the working directory {Path.cwd()}, which is all that the job gets; run "
            "the command in the project's directory, or move the file there"
        )
    name = path.relative_to(Path.cwd()).as_posix()
    if name not in packed:
        raise ConfigError(
            f"{name} is not packed, since .gitignore, .rayignore or raydpo excludes it; move it to a "
            f"directory that they do not exclude, or add --include {name}"
        )
    return name


def check_files(file: str, config: Config, packed: Collection[str]) -> None:
    """Check that all local files that the job reads are packed: bases of the configuration ``file``, a chat template,
    modules of the user's functions.

    Raises:
        ConfigError: with a line for each missing one.
    """
    needed = [("base", path.as_posix()) for path in files_of(Path(file))[1:]]
    if (template := template_file(config)) is not None:
        needed.append(("data.chat_template", template))
    functions = [("train.loss", name) for name in config.train.terms]
    functions += [("evaluate.rewards", one.use or "") for one in config.evaluate.rewards]
    functions += [("rounds.rewards", one.use or "") for one in (config.rounds.rewards if config.rounds else ())]
    for key, name in [*functions, ("evaluate.score_with", config.evaluate.score_with or "")]:
        module, colon, _ = name.partition(":")
        place = module.replace(".", "/")
        if colon:  # other modules are installed packages
            needed += [(key, path) for path in (f"{place}.py", f"{place}/__init__.py") if Path(path).is_file()][:1]
    problems = []
    for key, path in needed:
        if Path(path).is_absolute():  # on storage that all nodes mount
            continue
        try:
            packed_name(path, packed)
        except ConfigError as error:
            problems.append(f"{key!r} needs a file that the job would lack: {error}")
    if problems:
        raise ConfigError("\n".join(problems))


def check_words(words: Iterable[str]) -> None:
    """Check the words of the job's command, which also has settings that later ones replace.

    Raises:
        ConfigError: if a word carries a credential.
    """
    for word in words:
        if hidden(word) != word:
            raise ConfigError(f"{hidden(word)!r} carries a credential, {_INSTEAD}")


def check_for_cluster(config: Config, packed: Collection[str]) -> None:
    """Check what would fail or be lost on other machines: credentials, placeholders, relative paths, local inputs.

    Args:
        packed: names of the packed files, relative to the working directory.

    Raises:
        ConfigError: with a line for each problem.
    """
    problems = [*_secrets(config), *_capitals(config), *_places(config), *_inputs(config, packed)]
    if problems:
        raise ConfigError("\n".join(problems))


def _secrets(config: Config) -> Iterator[str]:
    for key, value in _leaves(config.model_dump(mode="json")):
        if isinstance(value, str) and carries_secret(value):
            yield f"{key!r} carries a credential ({redact(value)}), {_INSTEAD}"


def _capitals(config: Config) -> Iterator[str]:
    for key, value in _leaves(config.model_dump(mode="json")):
        found = re.search(r"\bYOUR-[A-Z-]*[A-Z]", value) if isinstance(value, str) else None
        if found:
            yield f"{key!r} is {shown(value)}; replace {found[0]} by your own"


def _places(config: Config) -> Iterator[str]:
    for key, value in (("output", config.output), ("cache.uri", config.cache.uri)):
        if value is not None and not is_uri(value) and not Path(value).is_absolute():
            yield (
                f"{key!r} is {shown(value)}, a relative path: on the cluster that is a temporary directory of one node, "
                f"deleted with the job; give a URI ({key}=s3://bucket/{PurePosixPath(value).name}) or the absolute path "
                "of a file system that all nodes mount"
            )


def _inputs(config: Config, packed: Collection[str]) -> Iterator[str]:
    for key, value, is_model in named_inputs(config):
        if is_uri(value) or Path(value).is_absolute() or not Path(value).exists():
            continue  # load_config has refused what neither exists nor is a hub name
        if is_model:
            yield (
                f"{key!r} is {shown(value)}, a directory of this machine, and weights are not packed; give a hub name, "
                "or the absolute path under which all nodes see it"
            )
        elif PurePosixPath(value).as_posix() not in packed:
            yield (
                f"{key!r} is {shown(value)}, and data is not packed; give a URI or the absolute path under which the "
                f"nodes see it, or pack it with --include {value}"
            )


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(value, f"{prefix}{key}.")
    else:
        yield prefix[:-1], tree
