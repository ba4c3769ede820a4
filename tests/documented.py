"""Commands and files in README and the guides."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

__all__ = ["DOCUMENTS", "GUIDE", "GUIDES", "ROOT", "block", "blocks", "commands", "inline", "not_run"]

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "raydpo" / "guide").glob("*.md"))
GUIDE = {file.stem: file for file in GUIDES}
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *GUIDES]
PROGRAMS = ("cd", "export", "git", "hf", "kubectl", "make", "pip", "python", "python3", "ray", "raydpo", "sbatch")
NOT_RUN = {
    "export": "names the reader's cluster",
    "make": "makes an environment of its own, and takes minutes",
    "pip install": "asks a registry",
    "python -m pytest": "runs the tests",
    "python3 -m venv": "makes an environment of its own",
    "ray job submit": "asks a cluster: tests/submit",
    "raydpo gpu check": "needs a GPU: tests/gpu runs it on the CPU",
    "raydpo plan config.yaml --measured": "needs a report of a GPU: tests/estimate makes one",
    "raydpo submit": "asks a cluster: tests/submit",
    "raydpo jobs": "asks a cluster: tests/submit",
    "raydpo plan jobs/": "asks the hub for model and data: tests/recipes plans every recipe",
    "raydpo eval config.yaml evaluate.engine=vllm": "needs an environment with vLLM: tests/evaluation/test_vllm.py",
    "python jobs/benchmark.py": "names no model, or needs a GPU: tests/benchmark",
}
"""Beginnings of commands that tests/guide does not run, and why. Those of cluster/ ask a cloud and are parsed by
tests/cluster."""


def blocks(file: Path) -> list[tuple[str, str]]:
    """(language, text) of each code block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", file.read_text(), re.MULTILINE | re.DOTALL)


def block(file: Path, language: str, holding: str) -> str:
    """The only code block of a language that contains these words."""
    (found,) = (text for kind, text in blocks(file) if kind == language and holding in text)
    return found


def commands(text: str) -> list[str]:
    """Commands in a block, without comments and extra spaces."""
    lines = (re.split(r"\s+#\s", line)[0] for line in text.splitlines())
    return [
        shlex.join(words)
        for line in lines
        if line.split()[:1] and line.split()[0] in PROGRAMS and (words := shlex.split(line))
    ]


def inline(file: Path) -> list[str]:
    """Complete commands in running text. A verb alone is a name, not a command."""
    prose = re.sub(r"^```.*?^```", "", file.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = (shlex.join(shlex.split(text)) for text in re.findall(r"`(raydpo [^`]*)`", prose))
    return [text for text in dict.fromkeys(found) if len(text.split()) > (3 if text.startswith("raydpo cache") else 2)]


def not_run(command: str) -> str | None:
    """Reason why a command is not run, if any."""
    return next((reason for start, reason in NOT_RUN.items() if command.startswith(start)), None)
