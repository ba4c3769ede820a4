"""The verbs ``raydpo submit`` and ``raydpo jobs``."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raydpo.errors import one_line
from raydpo.submit.client import ENDED, STOP_SECONDS, Jobs, exit_code, job_env, stop_seconds
from raydpo.terminal.arguments import at_least
from raydpo.terminal.console import Console
from raydpo.terminal.interrupt import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from raydpo.config import Config
    from raydpo.submit.package import Package

__all__ = ["add_jobs", "add_submit", "as_submit"]

VERBS = ("score", "train", "run", "sweep", "rounds", "eval", "benchmark")
"""Verbs that can be jobs. Each has a file in jobs/."""
FRESH = ("train", "run", "sweep", "rounds")
_SERVER = "the job server (default: $RAY_API_SERVER_ADDRESS, $RAY_ADDRESS, else this machine's)"


def add_submit(parser: argparse.ArgumentParser, check: Callable[[Config, str], object]) -> None:
    """Add the verbs of ``raydpo submit`` to its parser.

    Args:
        check: refuses a configuration with which a verb would fail on any machine.
    """
    verbs = parser.add_subparsers(dest="what", required=True, metavar="VERB")
    for name in VERBS:
        verb = verbs.add_parser(name, help=f"'raydpo {name}' as a job")
        verb.set_defaults(act=lambda args, console: submit(args, console, check))
        verb.add_argument("--address", metavar="URL", help=_SERVER)
        verb.add_argument("--no-wait", action="store_true", help="do not print the log")
        verb.add_argument(
            "--dry-run", action="store_true", help="check and pack, then print the command of Ray that submits the archive"
        )
        verb.add_argument(
            "--include",
            action="append",
            default=[],
            metavar="PATTERN",
            help="also pack files that match, such as a small data file (repeatable)",
        )
        if name == "benchmark":
            verb.add_argument(
                "--gpus",
                type=at_least(0),
                default=0,
                metavar="N",
                help="GPUs of the node that runs it (default: %(default)s, on the CPU of the head node)",
            )
            verb.add_argument("arguments", nargs="*", metavar="-- ...", help="arguments of jobs/benchmark.py")
            continue
        verb.add_argument("config", metavar="CONFIG", help="YAML file of the run, below the current directory")
        verb.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace those of the file")
        if name in FRESH:
            verb.add_argument("--fresh", action="store_true", help="start again; rename an earlier one of this name")


def add_jobs(parser: argparse.ArgumentParser) -> None:
    """Fill the parser of ``raydpo jobs``."""
    acts = parser.add_subparsers(dest="what", required=True, metavar="ls|logs|stop")
    for name, act, about in (
        ("ls", _ls, "list the jobs of a cluster, and how they ended"),
        ("logs", _logs, "print the log of a job"),
        ("stop", _stop, "stop a job, after its next checkpoint"),
    ):
        sub = acts.add_parser(name, help=about, description=about)
        sub.set_defaults(act=act)
        sub.add_argument("--address", metavar="URL", help=_SERVER)
        if name != "ls":
            sub.add_argument("job", metavar="JOB", help="id of a job, or name of a run (its newest job)")
        if name == "logs":
            sub.add_argument(
                "-f",
                "--follow",
                action="store_true",
                help="print the log until the job ends, and exit with its status; Ctrl-C does not stop the job",
            )


def as_submit(verb: str, arguments: Sequence[str]) -> str:
    """The command that submits ``jobs/VERB.py`` with these arguments."""
    words = [word for word in arguments if word != "--dry-run"]
    return shlex.join(["raydpo", "submit", verb, *(["--"] if verb == "benchmark" else []), *words])


def submit(args: argparse.Namespace, console: Console, check: Callable[[Config, str], object]) -> int:
    """Check, pack and start a job, and print its log until it ends; returns its exit status."""
    from raydpo.config import load_config
    from raydpo.submit.check import check_files, check_for_cluster, check_words, packed_name
    from raydpo.submit.package import pack

    with tempfile.TemporaryDirectory(prefix="raydpo-") as place:
        package = pack(Path.cwd(), Path(place), args.include)
        if args.what == "benchmark":
            name, words = "benchmark", args.arguments
        else:
            config = load_config(args.config, args.overrides, elsewhere=True)
            check(config, args.what)
            check_for_cluster(config, package.files)
            check_files(args.config, config, package.files)
            name = config.run_name
            if config.model.trust_remote_code:
                console.warn(
                    f"model.trust_remote_code is on: Python code in {config.model.path} runs on every node, with "
                    "all rights of the cluster"
                )
            words = [packed_name(args.config, package.files), *args.overrides]
            words += ["--fresh"] if getattr(args, "fresh", False) else []
        check_words(words)
        gpus = getattr(args, "gpus", 0)
        entrypoint = shlex.join([*_program(args.what, package), *words])
        for line in (*package.notes, package.line()):
            console.say(line)
        if args.dry_run:
            kept = Path(tempfile.mkdtemp(prefix="raydpo-")) / package.archive.name
            shutil.move(package.archive, kept)
            console.say(_by_ray(entrypoint, gpus, kept))
            return 0
        jobs = Jobs.at(args.address)
        for line in jobs.warnings():
            console.warn(line)
        job = jobs.submit(name, args.what, entrypoint, package.archive, gpus)
    console.say(f"job {job}: {entrypoint}")
    if gpus:
        console.say(f"it starts when a node has {gpus} free GPU(s)")
    if args.no_wait:
        console.say(f"follow it with 'raydpo jobs logs -f {job}', stop it with 'raydpo jobs stop {job}'")
        return 0
    return _follow(jobs, job, console)


def _program(verb: str, package: Package) -> list[str]:
    """Command of the job: the project's own jobs/VERB.py if it is packed with raydpo, else the installed raydpo."""
    file = f"jobs/{verb}.py"
    if file in package.files and "raydpo/cli/entry.py" in package.files:
        return ["python", file]
    return ["python", "-m", "raydpo.benchmark.command"] if verb == "benchmark" else ["python", "-m", "raydpo.cli", verb]


def _by_ray(entrypoint: str, gpus: int, archive: Path) -> str:
    """Ray's own command for the same job. From a directory it would also upload secrets that no ignore file lists."""
    environment, packed = shlex.quote(json.dumps({"env_vars": job_env()})), shlex.quote(str(archive))
    devices = f" --entrypoint-num-gpus {gpus}" if gpus else ""
    return f"ray job submit --working-dir {packed}{devices} --runtime-env-json {environment} -- {entrypoint}"


def _follow(jobs: Jobs, job: str, console: Console) -> int:
    """Print the log of a job until it ends; returns its exit status."""
    try:
        details = jobs.follow(job)
    except KeyboardInterrupt:
        print(
            f"\ndetached; job {job} continues. 'raydpo jobs logs -f {job}' follows it, 'raydpo jobs stop {job}' stops it",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    code, status = exit_code(details), details.status.value
    if status == "STOPPED":
        console.say(f"job {job} was stopped; submit it again to continue")
    elif status == "FAILED":
        reason = "" if details.driver_exit_code is not None else f": {one_line(details.message or '', 500)}"
        console.say(f"job {job} failed with exit status {code}{reason}")
    else:
        console.say(f"job {job} is done")
    return code


def _ls(args: argparse.Namespace, console: Console) -> None:
    rows = []
    for job in Jobs.at(args.address).list():
        status, began = job.status.value, (job.start_time or 0) / 1000
        code = str(exit_code(job)) if status in ENDED else ""
        seconds = (job.end_time / 1000 if job.end_time else time.time()) - began
        start = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began))
        rows.append((job.submission_id, status.lower(), code, start, f"{seconds:,.0f}", job.entrypoint))
    console.table("jobs", ("job", "status", "exit", "began", "seconds", "entry point"), rows)


def _logs(args: argparse.Namespace, console: Console) -> int | None:
    jobs = Jobs.at(args.address)
    job = jobs.find(args.job).submission_id
    if args.follow:
        return _follow(jobs, job, console)
    sys.stdout.write(jobs.client.get_job_logs(job))
    return None


def _stop(args: argparse.Namespace, console: Console) -> None:
    jobs = Jobs.at(args.address)
    job = jobs.find(args.job)
    if job.status.value in ENDED:
        console.say(f"job {job.submission_id} is over: {job.status.value.lower()}")
        return
    seconds = stop_seconds(job)
    if seconds is None:
        console.warn(
            f"job {job.submission_id} was started without RAY_JOB_STOP_WAIT_TIME_S in its runtime_env: the "
            "head node kills it after the seconds of that variable there, 3 by default. If that is too short for a "
            f"checkpoint, all work since the last one is lost. Jobs of 'raydpo submit' have {STOP_SECONDS} s"
        )
    console.say(f"stopping {job.submission_id}" + ("" if seconds is None else f", which has {seconds} s for a checkpoint"))
    ended = jobs.stop(job.submission_id, STOP_SECONDS if seconds is None else seconds)
    console.say(f"job {job.submission_id} is {ended.status.value.lower()}; submit it again to continue")
