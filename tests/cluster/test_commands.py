"""The command line accepts every raydpo command in the cluster files and READMEs, and its settings load."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from documented import DOCUMENTS

from raydpo.cli.entry import parsed
from raydpo.config import load_config

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(
    r"(?:^|[\s'\"(])(?:raydpo (?=[a-z])|"
    r"python (?:/opt/raydpo/)?jobs/(?P<job>score|train|run|sweep|eval|rounds)\.py |"
    r"sbatch (?:--\S+ )*cluster/(?P<slurm>slurm)\.sbatch )(?P<rest>[^|;]*)"
)
FILES = [
    *DOCUMENTS,
    *(
        file
        for file in sorted((ROOT / "cluster").rglob("*"))
        if file.is_file() and file.suffix in (".md", ".yaml", ".sbatch")
    ),
]


def strings(node):
    if isinstance(node, dict):
        return [text for value in node.values() for text in strings(value)]
    if isinstance(node, list):
        return [text for value in node for text in strings(value)]
    return [node] if isinstance(node, str) else []


def lines(file):
    """Possible commands: lines of code blocks, comments and scripts, and strings of YAML, each joined to one line."""
    text = file.read_text()
    if file.suffix == ".md":
        text = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    commented = file.suffix == ".yaml"
    plain = [line.lstrip() for line in text.splitlines() if not commented or line.lstrip().startswith("#     ")]
    plain = [line.removeprefix("#").strip() if line.startswith("#     ") else line for line in plain]
    found = re.sub(r"\\\s*\n", " ", "\n".join(plain)).splitlines()
    if file.suffix == ".yaml":
        found += [line for text in strings([*yaml.safe_load_all(file.read_text())]) for line in text.splitlines()]
    return [line for line in found if not line.startswith("#")]


def commands(file):
    for line in lines(file):
        for match in COMMAND.finditer(re.split(r"\s#\s", line)[0]):
            words = shlex.split(match["rest"])
            words = words[: words.index("&&")] if "&&" in words else words
            yield [verb, *words] if (verb := "run" if match["slurm"] else match["job"]) else words


ALL = [(str(file.relative_to(ROOT)), words) for file in FILES for words in commands(file)]


def test_commands_were_found_where_they_are():
    places = {place for place, _ in ALL}
    assert {
        "README.md",
        "cluster/README.md",
        "cluster/aws.yaml",
        "cluster/gcp.yaml",
        "cluster/anyscale.yaml",
        "cluster/skypilot.yaml",
        "cluster/slurm.sbatch",
        "cluster/kuberay/base/rayjob.yaml",
        "cluster/kuberay/overlays/gke/rayjob.yaml",
    } <= places
    assert len(ALL) >= 35


@pytest.mark.parametrize(("place", "words"), ALL, ids=[f"{place}: {' '.join(words)}"[:90] for place, words in ALL])
def test_the_command_line_takes_it(place, words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    try:
        args = parsed(words)
    except SystemExit:
        pytest.fail(f"{place}: {capsys.readouterr().err}")
    config = str(getattr(args, "config", "")).removeprefix("/opt/raydpo/")
    if config.startswith("jobs/"):
        load_config(config, args.overrides)
