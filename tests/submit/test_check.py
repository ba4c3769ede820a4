"""What ``raydpo submit`` refuses before it connects, and the command that it prints."""

import contextlib
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from raydpo.cli.entry import main
from raydpo.config import load_config
from raydpo.submit.client import exit_code
from raydpo.submit.command import VERBS

ROOT = Path(__file__).parents[2]
NEEDED = {
    "sweep": ["sweep={grid: {train.lr: [1.0e-6]}}"],
    "rounds": [
        "data.train=[]",
        "data.eval=null",
        "train.keep_best=null",
        "rounds={prompts: /data/p.jsonl, sample: {max_tokens: 64}, rewards: [{use: math}]}",
    ],
    "eval": ["data.eval={fraction: 0.1}"],
}
"""Settings without which these verbs refuse a configuration."""


@pytest.fixture(autouse=True)
def archives(tmp_path_factory, monkeypatch):
    """--dry-run leaves its archive in the temporary directory."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("archives")))


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prefs.jsonl").write_text("{}\n")
    tree = {
        "name": "one",
        "output": "s3://bucket/runs",
        "model": {"path": "/models/llama"},
        "data": {"train": "/data/prefs.jsonl"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def test_paths_of_the_cluster_need_not_exist_here_and_the_command_of_ray_is_printed(project, capsys):
    assert main(["submit", "run", "config.yaml", "train.beta=0.2", "name=a", "--dry-run", "--fresh"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"packed 1 file\(s\), \d+ KiB, without data", said)
    command = shlex.split(said.splitlines()[-1])
    assert command[:3] == ["ray", "job", "submit"]
    assert command[command.index("--") + 1 :] == [
        "python",
        "-m",
        "raydpo.cli",
        "run",
        "config.yaml",
        "train.beta=0.2",
        "name=a",
        "--fresh",
    ]


@pytest.mark.parametrize("include", [[], ["data.jsonl"]])
def test_the_printed_command_uploads_what_was_packed_and_nothing_else(project, capsys, include, tmp_path_factory):
    """Checked with Ray's own packaging, in a project whose ignore files do not list secrets, but list an included file."""
    from ray._private.runtime_env.packaging import create_package
    from ray._private.runtime_env.working_dir import upload_working_dir_if_needed

    for name in (".env", "id_rsa", ".aws/credentials", "data.jsonl", "deep/own_loss.py", "deep/cloud.pem"):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text("nothing\n")
    (project / ".rayignore").write_text("*.jsonl\n")
    words = [word for name in include for word in ("--include", name)]
    assert main(["submit", "run", "config.yaml", *words, "--dry-run"]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    environment = json.loads(command[command.index("--runtime-env-json") + 1])
    environment["working_dir"] = command[command.index("--working-dir") + 1]  # as 'ray job submit' merges them
    uploaded = []

    def upload(directory, excludes, is_file=False):
        if is_file:
            uploaded.append(directory)
        else:
            uploaded.append(str(tmp_path_factory.mktemp("ray") / "all.zip"))
            create_package(directory, Path(uploaded[0]), excludes=excludes, include_gitignore=True)

    upload_working_dir_if_needed(environment, include_gitignore=True, upload_fn=upload)
    with zipfile.ZipFile(uploaded[0]) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    assert names == {"config.yaml", ".rayignore", "deep/own_loss.py", *include}


def test_overrides_are_quoted_for_the_shell_of_the_cluster(project, capsys):
    assert main(["submit", "run", "config.yaml", "track.wandb.project=$(id)", "--dry-run"]) == 0
    assert "'track.wandb.project=$(id)'" in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_in_this_project_the_files_of_jobs_are_the_entry_points_and_each_prints_the_other(verb, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = (
        ["--", "--model", "random-1b", "--random", "512:512", "--full"]
        if verb == "benchmark"
        else ["jobs/qwen3-4b-lora-1xa10g.yaml", "output=s3://b/runs", *NEEDED.get(verb, [])]
    )
    assert main(["submit", verb, "--dry-run", *words]) == 0
    program = shlex.split(capsys.readouterr().out.splitlines()[-1])
    program = program[program.index("--") + 1 :]
    assert program == ["python", f"jobs/{verb}.py", *(word for word in words if word != "--")]
    done = subprocess.run(
        [sys.executable, *program[1:], "--dry-run"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip() == shlex.join(["raydpo", "submit", verb, *words])


@pytest.mark.parametrize(
    ("verb", "settings", "said"),
    [
        ("train", ["sweep={grid: {train.lr: [1.0e-6]}}"], "section 'sweep' has no effect on 'raydpo train'"),
        ("sweep", [], "nothing to sweep over"),
        ("sweep", ["sweep={grid: {train.lr: [fast]}}"], "trial train.lr=fast"),
        ("rounds", [], "nothing to sample"),
        ("eval", [], "no pairs to evaluate on"),
    ],
)
def test_what_no_machine_could_run_is_not_submitted(verb, settings, said, project, capsys):
    assert main(["submit", verb, "config.yaml", "--dry-run", *settings]) == 2
    assert said in capsys.readouterr().err


def test_the_benchmark_has_arguments_of_its_own(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = ["--model", "random-1b", "--random", "512:512", "--full"]
    assert main(["submit", "benchmark", "--gpus", "1", "--dry-run", "--", *words]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[command.index("--") + 1 :] == ["python", "jobs/benchmark.py", *words]
    assert command[command.index("--entrypoint-num-gpus") + 1] == "1"


@pytest.mark.parametrize("verb", VERBS)
def test_elsewhere_the_installed_program_is_the_entry_point_and_takes_what_it_is_given(verb, project, capsys):
    words = (
        ["--", "--model", "random-1b", "--random", "512:512", "--full"]
        if verb == "benchmark"
        else ["config.yaml", *NEEDED.get(verb, [])]
    )
    assert main(["submit", verb, "--dry-run", *words]) == 0
    program = shlex.split(capsys.readouterr().out.splitlines()[-1])
    program = program[program.index("--") + 1 :]
    done = subprocess.run([sys.executable, *program[1:], "--nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and "--nonsense" in done.stderr


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("output=runs/", "'output' is 'runs/', a relative path"),
        ("cache.uri=cache", "'cache.uri' is 'cache', a relative path"),
        ("data.train=prefs.jsonl", "'data.train.0.path' is 'prefs.jsonl', and data is not packed"),
        ("model.path=here", "'model.path' is 'here', a directory of this machine"),
        ("output=s3://me:secret@bucket/runs", r"'output' carries a credential \(s3://\*\*\*@bucket/runs\)"),
        ("cache.uri=abfs://c@a/x?account_key=secret", r"'cache.uri' carries a credential"),
        ("cache.uri=https://secret@host/x", r"'cache.uri' carries a credential \(https://\*\*\*@host/x\)"),
        ("cache.uri=https://host/x?secret", r"'cache.uri' carries a credential \(https://host/x\?\*\*\*\)"),
        ("output=s3://me:secret@YOUR-BUCKET/runs", r"'output' is 's3://\*\*\*@YOUR-BUCKET/runs'; replace YOUR-BUCKET"),
        ("track.wandb={project: hf_" + "secret" * 5 + "}", "'track.wandb.project' carries a credential"),
        ("output=s3://YOUR-BUCKET/runs", "'output' is 's3://YOUR-BUCKET/runs'; replace YOUR-BUCKET by your own"),
        ("train.betta=1", "did you mean 'train.beta'"),
        ("name=../../etc", "use letters, digits"),
        ("score={accelerator: H100, gpus_per_worker: 0}", "accelerator H100 has no effect on workers without GPUs"),
    ],
)
def test_what_would_fail_or_be_lost_on_the_cluster_is_refused_here(project, capsys, override, sentence):
    (project / "here").mkdir()
    assert main(["submit", "run", "config.yaml", override, "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert re.search(sentence, said), said
    assert "secret" not in said.replace("a secret of the cluster", "")


@pytest.mark.parametrize(
    "words",
    [
        ["run", "config.yaml", "output=s3://me:secret@bucket/runs", "output=s3://bucket/runs"],
        ["benchmark", "--", "--data", "https://host/a.jsonl?sig=secret"],
        ["benchmark", "--", "--data=s3://me:secret@bucket/a"],
    ],
)
def test_no_secret_is_in_the_jobs_command(project, capsys, words):
    assert main(["submit", *words[:1], "--dry-run", *words[1:]]) == 2
    said = "".join(capsys.readouterr())
    assert "carries a credential, which everyone" in said and "secret" not in said.replace("a secret of the cluster", "")


def test_small_data_may_be_packed(project, capsys):
    assert main(["submit", "run", "config.yaml", "data.train=prefs.jsonl", "--include", "prefs.jsonl", "--dry-run"]) == 0
    assert "packed 2 file(s)" in capsys.readouterr().out


def test_a_configuration_elsewhere_is_refused(project, tmp_path_factory, capsys):
    other = tmp_path_factory.mktemp("other") / "config.yaml"
    other.write_text((project / "config.yaml").read_text())
    assert main(["submit", "run", str(other), "--dry-run"]) == 2
    assert "lies outside of the working directory" in capsys.readouterr().err


def test_files_that_the_configuration_leads_to_are_packed_or_refused(project, capsys):
    """Bases of the configuration, a chat template and the user's loss, outside of the project or not packed."""
    config = yaml.safe_load((project / "config.yaml").read_text())
    inside = project / "inside"
    (inside / "deep").mkdir(parents=True)
    (inside / "deep" / "losses.py").write_text("def mine(*args): ...\n")
    (inside / "deep" / "__init__.py").write_text("")
    (inside / "x.jinja").write_text("{{ messages }}\n")
    (inside / "base.yaml").write_text(yaml.safe_dump(config))
    (inside / "leaf.yaml").write_text(yaml.safe_dump({"base": "middle.yaml"}))
    (inside / "middle.yaml").write_text(yaml.safe_dump({"base": "base.yaml"}))
    os.chdir(inside)

    def refused(*overrides, said):
        assert main(["submit", "run", "leaf.yaml", *overrides, "--dry-run"]) == 2
        told = capsys.readouterr().err
        assert said in told, told

    settings = ["data.chat_template=x.jinja", "train.loss=deep.losses:mine", "evaluate.score_with=deep.losses:mine"]
    settings.append("evaluate.rewards=[{use: 'deep.losses:mine'}]")
    assert main(["submit", "run", "leaf.yaml", *settings, "--dry-run"]) == 0
    capsys.readouterr()
    refused("data.chat_template=y.jinja", said="'data.chat_template' is 'y.jinja', which is neither a Jinja template nor a")
    (project / "x.jinja").write_text("{{ messages }}\n")
    refused("data.chat_template=../x.jinja", said="'data.chat_template' needs a file that the job would lack: ../x.jinja")
    (inside / ".gitignore").write_text("x.jinja\nlosses.py\nbase.yaml\n")
    refused(settings[0], said="'data.chat_template' needs a file that the job would lack: x.jinja is not packed")
    refused(settings[1], said="'train.loss' needs a file that the job would lack: deep/losses.py is not packed")
    refused(settings[2], said="'evaluate.score_with' needs a file that the job would lack: deep/losses.py is not packed")
    refused(settings[3], said="'evaluate.rewards' needs a file that the job would lack: deep/losses.py is not packed")
    refused(said="'base' needs a file that the job would lack: base.yaml is not packed")
    (inside / ".gitignore").unlink()
    (inside / "middle.yaml").write_text(yaml.safe_dump({"base": "../config.yaml"}))
    refused(said="'base' needs a file that the job would lack: ../config.yaml lies outside of the working directory")
    (inside / "middle.yaml").write_text(yaml.safe_dump({"base": str(project / "config.yaml")}))
    inline = "data.chat_template='{{ messages }}'"
    assert main(["submit", "run", "leaf.yaml", inline, "--dry-run"]) == 0, "all nodes may see it"


def test_it_needs_neither_ray_nor_torch(project):
    blocked = "import sys\nfor name in ('ray', 'torch', 'transformers', 'pyarrow', 'numpy'): sys.modules[name] = None\n"
    program = blocked + (
        "from raydpo.cli.entry import main\n"
        "assert main(['submit', 'run', 'config.yaml', '--dry-run']) == 0\n"
        "sys.exit(main(['submit', 'run', 'config.yaml']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and "pip install 'ray[default]'" in done.stderr, done.stderr


def test_exit_statuses_of_jobs():
    from ray.job_submission import JobDetails, JobStatus

    def ended(status, code=None):
        return exit_code(JobDetails(type="SUBMISSION", status=JobStatus(status), entrypoint="", driver_exit_code=code))

    assert [ended("SUCCEEDED", 0), ended("FAILED", 1), ended("FAILED", 2), ended("FAILED", 130), ended("STOPPED")] == [
        0,
        1,
        2,
        130,
        130,
    ]
    assert ended("FAILED") == 1, "Ray could not run it"
    assert ended("FAILED", -9) == 137


def test_no_secret_in_the_resolved_configuration(project):
    config = load_config(
        "config.yaml",
        [
            "output=s3://me:planted@bucket/runs",
            "cache.uri=abfs://c@a/x?account_key=planted",
            "data.train=https://host/a.jsonl?token=planted",
        ],
        elsewhere=True,
    )
    text = config.to_yaml()
    assert "planted" not in text and "s3://***@bucket/runs" in text
    assert "planted" in config.run_dir, "the run itself still has it"


def test_every_pinned_version_takes_the_oldest_python_that_is_promised():
    """Checked with the metadata of the installed packages, which have the pinned versions."""
    (oldest,) = re.findall(r'^requires-python = ">=([\d.]+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    for file in ("README.md", "cluster/README.md", "Makefile"):
        assert {
            found.replace(", ", ".")
            for found in re.findall(r"(?:[Pp]ython |version_info < \()(3[., ]+\d+)", (ROOT / file).read_text())
        } <= {oldest}, file
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    pins |= dict(re.findall(r"^(\S+)==(\S+) ", (ROOT / "requirements.lock").read_text(), re.M))
    here = {}
    for name, version in pins.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found = importlib.metadata.metadata(name)
            if found["Version"] == version:
                here[name] = found.get("Requires-Python") or ""
    assert len(here) > 100
    assert {name: wants for name, wants in here.items() if not SpecifierSet(wants).contains(f"{oldest}.0")} == {}


def test_what_begins_a_job_gives_it_time_to_stop(project, capsys):
    assert main(["submit", "run", "config.yaml", "--dry-run"]) == 0
    commands = [capsys.readouterr().out] + [
        line
        for file in (ROOT / "README.md", *(ROOT / "cluster").rglob("*.*"), *(ROOT / "jobs").glob("*.py"))
        for line in file.read_text().splitlines()
        if re.search(r"\bray job submit .*-- ", line)
    ]
    assert len(commands) > 1 and all('"RAY_JOB_STOP_WAIT_TIME_S": "120"' in line for line in commands), commands


def test_every_package_of_the_lock_has_hashes_and_the_pinned_version():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().lower().split())
    blocks = re.findall(
        r"^(\S+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", (ROOT / "requirements.lock").read_text(), re.M
    )
    text = (ROOT / "requirements.lock").read_text()
    assert len(blocks) == len(re.findall(r"^[^\s#]", text, re.M)) > 100
    plain = {name.replace("_", "-").replace(".", "-"): version for name, version in pins.items()}
    locked = {name: version for name, version, _ in blocks}
    assert {name: version for name, version in locked.items() if plain.get(name, version) != version} == {}
    assert {"ray", "torch", "transformers", "deepspeed", "safetensors", "pydantic"} <= locked.keys()


def test_prompts_and_modules_of_rewards_must_reach_the_job(project, capsys):
    """A module of the user's is packed as any code. Prompts are data, which --include packs."""
    (project / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (project / "my_rewards.py").write_text("def short(completions, **columns): ...\n")
    rounds = "rounds={prompts: prompts.jsonl, sample: {max_tokens: 64}, rewards: [{use: 'my_rewards:short'}]}"
    words = ["submit", "rounds", "config.yaml", "data.train=[]", rounds, "--dry-run"]
    assert main(words) == 2
    assert "'rounds.prompts.0.path' is 'prompts.jsonl', and data is not packed" in capsys.readouterr().err
    assert main([*words, "--include", "prompts.jsonl"]) == 0
    (project / ".gitignore").write_text("my_rewards.py\n")
    subprocess.run(["git", "init", "-q"], check=True)
    assert main([*words, "--include", "prompts.jsonl"]) == 2
    assert "'rounds.rewards' needs a file that the job would lack: my_rewards.py" in capsys.readouterr().err
