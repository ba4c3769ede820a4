"""Which files are packed for a job, and which never are."""

import random
import subprocess
import zipfile
from pathlib import Path

import pytest

from raydpo.errors import ConfigError
from raydpo.submit import package
from raydpo.submit.package import LEFT_OUT, SECRET_FILES, pack

ROOT = Path(__file__).parents[2]
KEY = "AKIA" + "ABCDEFGHIJKLMNOP"


@pytest.fixture
def project(tmp_path):
    place = tmp_path / "project"
    for name in (
        "config.yaml",
        "jobs/a.yaml",
        "code/own_loss.py",
        "data/prefs.jsonl",
        "model/model.safetensors",
        "runs/one/config.yaml",
        ".env",
        "deep/below/.env.local",
        "deep/id_rsa",
        ".ssh/known",
        "deep/cloud.pem",
        "code/__pycache__/own_loss.pyc",
        "notes/later.txt",
        "service-account-prod.json",
    ):
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("nothing\n")
    return place


def packed(project, tmp_path, **options):
    done = pack(project, tmp_path, **options)
    with zipfile.ZipFile(done.archive) as archive:
        assert sorted(archive.namelist()) == sorted(done.files)
    return set(done.files)


def test_code_and_configurations_and_nothing_else(project, tmp_path):
    assert packed(project, tmp_path) == {"config.yaml", "jobs/a.yaml", "code/own_loss.py", "notes/later.txt"}


def test_ignore_files_are_heeded_with_git_and_without_a_repository(project, tmp_path):
    (project / ".rayignore").write_text("notes/\n")
    (project / "code" / ".gitignore").write_text("own_*\n")
    assert packed(project, tmp_path) == {"config.yaml", "jobs/a.yaml", ".rayignore", "code/.gitignore"}
    subprocess.run(["git", "init", "--quiet", str(project)], check=True)
    assert packed(project, tmp_path) == {"config.yaml", "jobs/a.yaml", ".rayignore", "code/.gitignore"}


def test_without_git_ignore_files_are_said_to_go_unheeded(project, tmp_path, monkeypatch):
    (project / ".rayignore").write_text("notes/\n")
    monkeypatch.setattr(package.shutil, "which", lambda name: None)
    done = pack(project, tmp_path)
    assert "notes/later.txt" in done.files and "id_rsa" not in str(done.files)
    assert "git is not installed, so .rayignore have no effect" in done.notes


def test_include_brings_data_in_and_never_a_secret(project, tmp_path):
    (project / ".rayignore").write_text("*.jsonl\n")
    assert "data/prefs.jsonl" in packed(project, tmp_path, include=["data/prefs.jsonl"])
    for pattern in (".env", "id_rsa", "nowhere.jsonl"):
        with pytest.raises(ConfigError, match=f"--include {pattern} matches no file"):
            pack(project, tmp_path, include=[pattern])


def test_links_out_of_the_directory_and_to_secrets_stay(project, tmp_path):
    (tmp_path / "outside.txt").write_text("private\n")
    (project / "harmless.txt").symlink_to(tmp_path / "outside.txt")
    (project / "also.txt").symlink_to(project / ".env")
    (project / "fine.txt").symlink_to(project / "config.yaml")
    assert {"harmless.txt", "also.txt", "fine.txt"} & packed(project, tmp_path) == {"fine.txt"}


@pytest.mark.parametrize("secret", [KEY, "hf_" + "a1" * 17, "-----BEGIN RSA PRIVATE" + " KEY-----", "ghp_" + "a" * 36])
def test_a_key_in_a_file_is_refused(project, tmp_path, secret):
    (project / "code" / "own_loss.py").write_text(f"first\nkey = '{secret}'\n")
    with pytest.raises(ConfigError, match=r"code/own_loss.py:2 holds what looks like a key") as error:
        pack(project, tmp_path)
    assert secret not in str(error.value)


def test_too_large_names_the_largest(project, tmp_path, monkeypatch):
    (project / "code" / "table.txt").write_bytes(random.Random(0).randbytes(10_000))
    monkeypatch.setattr(package, "MOST_BYTES", 1000)
    with pytest.raises(ConfigError, match=r"packs to 0 MiB, more than 0 MiB; the largest files are code/table.txt"):
        pack(project, tmp_path)


def test_the_same_files_give_the_same_bytes(project, tmp_path):
    first = pack(project, tmp_path).archive.read_bytes()
    (project / "config.yaml").touch()
    assert pack(project, tmp_path).archive.read_bytes() == first


def test_this_project_is_packed_small_and_ray_leaves_out_the_same(tmp_path):
    lines = (ROOT / ".rayignore").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [*LEFT_OUT, "tests/"]
    assert set(SECRET_FILES) <= set(LEFT_OUT)
    done = pack(ROOT, tmp_path)
    assert {"raydpo/cli/entry.py", "jobs/run.py", "raydpo/reference/build.py"} <= set(done.files)
    assert done.bytes < 2 << 20, done.line()
