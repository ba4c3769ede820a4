"""Pack the working directory for a job: code and configurations, without data, models, results and secrets."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from raydpo.errors import ConfigError
from raydpo.storage.uri import KEYS

__all__ = ["LEFT_OUT", "MOST_BYTES", "SECRET_FILES", "Package", "pack"]

MOST_BYTES = 64 << 20
"""Largest archive that is uploaded. Ray's job server accepts 100 MiB and keeps every archive in the head node's memory."""
SECRET_FILES = (
    *(".env", ".env.*", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.kubeconfig", "kubeconfig"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", ".netrc", "_netrc", ".pypirc", ".npmrc", ".git-credentials"),
    *("credentials", "credentials.*", "*service-account*.json", "*service_account*.json", "secrets.*", "auth_token"),
    *(".aws/", ".azure/", ".config/", ".docker/", ".gnupg/", ".huggingface/", ".kube/", ".ssh/", ".vault-token"),
)
"""Patterns, as in .gitignore, of files with secrets. They are never packed, whatever --include says."""
LEFT_OUT = (
    *SECRET_FILES,
    # Results, weights and data belong on storage that every node can reach.
    *("runs/", "checkpoints/", "tensorboard/", "wandb/", "mlruns/", "mlflow.db"),
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.onnx", "*.npy", "*.npz", "*.pkl"),
    *("*.parquet", "*.arrow", "*.jsonl", "*.jsonl.*", "*.csv", "*.csv.*", "*.zst", "*.gz", "*.tar", "*.zip"),
    # Files of tools.
    *(".git", ".venv/", "venv/", "node_modules/", "__pycache__/", "*.pyc", ".cache/", ".pytest_cache/", ".ruff_cache/"),
    *(".mypy_cache/", ".hypothesis/", ".ipynb_checkpoints/", "*.egg-info/", "build/", "dist/", "*.log"),
)
"""Patterns, as in .gitignore, of files that are not packed. The project's .rayignore has them for ``ray job submit``."""
_KEYS = re.compile(KEYS.encode())
_LOOKED_AT = 1 << 20
"""Largest file, in bytes, that is searched for keys."""


@dataclass(frozen=True)
class Package:
    """The packed archive. ``files`` are relative paths with ``/``; ``bytes`` is the size of the archive."""

    archive: Path
    files: tuple[str, ...]
    bytes: int
    notes: tuple[str, ...]

    def line(self) -> str:
        """Describe the archive in one line."""
        size = f"{self.bytes / 2**20:.1f} MiB" if self.bytes >= 1 << 20 else f"{self.bytes / 2**10:.0f} KiB"
        return f"packed {len(self.files):,} file(s), {size}, without data, models, results and secrets"


def pack(directory: Path, place: Path, include: Sequence[str] = ()) -> Package:
    """Pack ``directory`` into a zip archive in ``place``. The same files give the same bytes.

    Files that match ``LEFT_OUT``, a .gitignore or the directory's .rayignore are not packed, nor are links to the outside.

    Args:
        include: patterns, as in .gitignore, of files to pack nevertheless, except secrets.

    Raises:
        ConfigError: if a file contains what looks like a key, the archive is too large, or ``include`` matches no file.
    """
    candidates, notes = _not_ignored(directory, include)
    candidates = [name for name in candidates if not _matches(name, SECRET_FILES)]
    files = [name for name in candidates if not _matches(name, LEFT_OUT) or _matches(name, include)]
    for pattern in include:
        if not any(_matches(name, [pattern]) for name in files):
            raise ConfigError(
                f"--include {pattern} matches no file of {directory} that may be packed; files with secrets, "
                "and those in a directory that .gitignore or .rayignore excludes, cannot be packed"
            )
    for name in files:
        _refuse_keys(directory / name, name)
    archive = place / "working_dir.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
        for name in files:
            info = zipfile.ZipInfo(name)  # every file gets the same time, in 1980
            info.external_attr = ((directory / name).stat().st_mode & 0xFFFF) << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            with open(directory / name, "rb") as source, target.open(info, "w") as sink:
                shutil.copyfileobj(source, sink)
    size = archive.stat().st_size
    if size > MOST_BYTES:
        largest = sorted(files, key=lambda name: (directory / name).stat().st_size, reverse=True)[:5]
        told = ", ".join(f"{name} ({(directory / name).stat().st_size / 2**20:.1f} MiB)" for name in largest)
        raise ConfigError(
            f"the working directory {directory} packs to {size / 2**20:.0f} MiB, more than "
            f"{MOST_BYTES / 2**20:.0f} MiB; the largest files are {told}. List in .rayignore what the job "
            "does not need, and put data and models on storage that every node can reach"
        )
    return Package(archive, tuple(files), size, tuple(notes))


def _not_ignored(directory: Path, include: Sequence[str]) -> tuple[list[str], list[str]]:
    """Sorted files below ``directory`` that neither a .gitignore nor its .rayignore matches; and lines for the user."""
    top = directory.resolve()

    def own(name: str) -> bool:
        """Whether it is a file, and not a link to one outside or to a secret."""
        target = (directory / name).resolve()
        return target.is_file() and target.is_relative_to(top) and not _matches(str(target.relative_to(top)), SECRET_FILES)

    if shutil.which("git") is None:
        names = [name for path in _walk(directory) if own(name := path.relative_to(directory).as_posix())]
        ignores = [name for name in names if PurePosixPath(name).name in (".gitignore", ".rayignore")]
        return names, [f"git is not installed, so {', '.join(ignores)} have no effect"] if ignores else []
    with tempfile.TemporaryDirectory(prefix="raydpo-") as empty:
        # An empty repository: git only matches names with patterns, and this directory need not be a repository.
        rayignore = directory / ".rayignore"
        subprocess.run(["git", "init", "--quiet", "--bare", empty], check=True, capture_output=True)
        command = ["git", f"--git-dir={empty}", f"--work-tree={directory}", "ls-files", "-z", "--others"]
        command += ["--exclude-per-directory=.gitignore", *([f"--exclude-from={rayignore}"] if rayignore.is_file() else [])]
        command += [f"--exclude=!{pattern}" for pattern in include]
        listed = subprocess.run(command, cwd=directory, check=True, capture_output=True).stdout
    names = sorted(os.fsdecode(name) for name in listed.split(b"\0") if name)
    repositories = [name for name in names if name.endswith("/")]  # git lists each as one entry
    notes = [f"{name} is a repository of its own and is not packed" for name in repositories]
    return [name for name in names if not name.endswith("/") and own(name)], notes


def _walk(directory: Path) -> list[Path]:
    found = []
    for place, below, names in os.walk(directory):
        below[:] = [name for name in below if name != ".git"]
        found += [Path(place) / name for name in names]
    return sorted(found)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern matches the file or a directory above it: ``x/`` is a directory, ``a/b`` a path from the top, any
    other pattern a name at any depth."""
    parts = PurePosixPath(name).parts
    for pattern in patterns:
        bare = pattern.rstrip("/")
        if "/" in bare:
            if any(fnmatchcase("/".join(parts[:end]), bare.lstrip("/")) for end in range(1, len(parts) + 1)):
                return True
        elif any(fnmatchcase(part, bare) for part in (parts[:-1] if pattern.endswith("/") else parts)):
            return True
    return False


def _refuse_keys(path: Path, name: str) -> None:
    if path.stat().st_size > _LOOKED_AT:
        return
    content = path.read_bytes()
    found = _KEYS.search(content)
    if found is not None:
        raise ConfigError(
            f"{name}:{content.count(bytes([10]), 0, found.start()) + 1} holds what looks like a key "
            f"({found[0][:8].decode()}...), which would be copied to every node. Move it out of the working "
            "directory, or list the file in .rayignore"
        )
