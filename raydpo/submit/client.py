"""Client of a Ray cluster's job server: submit, follow and stop jobs, and map their ends to exit statuses.

Ray is imported by the functions that need it: --dry-run works without Ray.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from raydpo.errors import ConfigError, RaydpoError
from raydpo.terminal.interrupt import EXIT_INTERRUPTED
from raydpo.version import __version__

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

__all__ = ["ENDED", "STOP_SECONDS", "Jobs", "RunningJobError", "exit_code", "job_env", "stop_seconds"]

STOP_SECONDS = 120
"""Seconds between SIGTERM and SIGKILL when a job is stopped, for its checkpoint. Ray's default is 3."""
_STOP_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
LOST_SECONDS = 120.0
"""Seconds without an answer of the job server after which following a job ends."""
BEGINNING_SECONDS = 120.0
"""Seconds to wait for a new head node: its job server answers before it can start jobs."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
"""States of a Ray job that has ended."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PUT_TOKEN = "put the cluster's into $RAY_AUTH_TOKEN, a file named by $RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token"


class RunningJobError(ConfigError):
    """A job of the same run has not ended."""


def job_env() -> dict[str, str]:
    """Environment variables of a job. They must hold no secrets: everyone who can list jobs can read them."""
    return {_STOP_VARIABLE: str(STOP_SECONDS)}


def stop_seconds(job: JobDetails) -> int | None:
    """Seconds that a job has between SIGTERM and SIGKILL; None if it does not set them, so that the environment of the head
    node or Ray's default decides."""
    told = str(((job.runtime_env or {}).get("env_vars") or {}).get(_STOP_VARIABLE, ""))
    return int(told) if told.isdigit() else None


def exit_code(job: JobDetails) -> int:
    """Exit status for a job that has ended: its own, 130 if it was stopped, 128 + n if signal n ended it, 1 if Ray could not
    run it."""
    status = job.status.value
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        return EXIT_INTERRUPTED
    code = job.driver_exit_code
    return 1 if code is None else 128 - code if code < 0 else code


@dataclass(frozen=True)
class Jobs:
    """The job server of one cluster."""

    client: JobSubmissionClient
    address: str

    @classmethod
    def at(cls, address: str | None) -> Jobs:
        """Connect, with the token of $RAY_AUTH_TOKEN, $RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.

        Args:
            address: job server, http://host:8265; None = $RAY_API_SERVER_ADDRESS, $RAY_ADDRESS, else this machine.

        Raises:
            ConfigError: if it cannot be reached, or refuses the token.
        """
        token = _has_token()
        if token:
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it once, at import
        try:
            import ray.exceptions
            from ray.job_submission import JobSubmissionClient
        except ImportError:
            raise _without_client() from None
        for module in ("dashboard_sdk", "job.sdk"):  # they log every upload and connection
            logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
        if address is not None:  # the variable overrides the client's argument
            os.environ["RAY_API_SERVER_ADDRESS"] = address if "://" in address else f"http://{address}"
        wished = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "this machine"
        if os.environ.get("RAY_AUTH_MODE") == "token" and not token:  # or Ray ends this process
            raise ConfigError(f"the Ray cluster at {wished} wants a token, and this machine has none; {_PUT_TOKEN}")
        try:
            client = JobSubmissionClient()
            return cls(client, client.get_address())
        except ray.exceptions.AuthenticationError:
            ours = "does not take this machine's" if token else "this machine has none"
            raise ConfigError(f"the Ray cluster at {wished} wants a token, and {ours}; {_PUT_TOKEN}") from None
        except Exception as error:  # connection, proxy, TLS, version
            if "ray[default]" in str(error):
                raise _without_client() from None
            raise ConfigError(
                f"no Ray job server answers at {wished} ({_said(error)}); give --address http://host:8265 or "
                "set RAY_API_SERVER_ADDRESS, for example to the near end of 'kubectl port-forward' or 'ssh -L'"
            ) from None

    def warnings(self) -> Iterator[str]:
        """Warnings about an unsafe connection to this cluster."""
        import requests

        url = urlsplit(self.address)
        try:
            answer = requests.get(f"{self.address.rstrip('/')}/api/authentication_mode", timeout=10)
            mode = answer.json().get("authentication_mode", "") if answer.ok else ""
        except (requests.RequestException, ValueError):
            mode = ""
        if mode and "token" not in mode.lower() and "k8s" not in mode.lower():
            yield (
                f"the cluster at {self.address} runs code of anyone who can reach this port; start its nodes with "
                "RAY_AUTH_MODE=token and one RAY_AUTH_TOKEN"
            )
        elif url.scheme == "http" and url.hostname not in LOOPBACK:
            yield (
                f"the token is sent to {url.hostname} unencrypted; use https, or a port of this machine that "
                "'kubectl port-forward' or 'ssh -L' forwards to it"
            )

    def of_run(self, name: str) -> Sequence[JobDetails]:
        """Jobs of a run, oldest first."""
        pattern = re.compile(rf"{re.escape(name)}-\d+")
        found = [job for job in self.list() if pattern.fullmatch(job.submission_id)]
        return sorted(found, key=_number)

    def list(self) -> Sequence[JobDetails]:
        """Submitted jobs, oldest first."""
        return sorted((job for job in self.client.list_jobs() if job.submission_id), key=lambda job: job.start_time or 0)

    def find(self, name: str) -> JobDetails:
        """Find a job by its id, or the newest one of a run by the run's name.

        Raises:
            ConfigError: if there is none.
        """
        jobs = self.list()
        exact = [job for job in jobs if job.submission_id == name] or self.of_run(name)
        if not exact:
            known = ", ".join(job.submission_id for job in jobs[-5:]) or "none at all"
            raise ConfigError(f"there is no job {name!r} at {self.address}; the newest are: {known}")
        return exact[-1]

    def submit(self, name: str, verb: str, entrypoint: str, archive: Path, gpus: int = 0) -> str:
        """Start a job of run ``name``; its id is the name with a number.

        Args:
            gpus: GPUs for the job's own process, besides those it requests from Ray.

        Raises:
            RunningJobError: if another job of the run has not ended.
        """
        earlier = self.of_run(name)
        for job in earlier:
            if job.status.value not in ENDED:
                raise RunningJobError(
                    f"job {job.submission_id} of this run is {job.status.value.lower()}, and two would write the same "
                    f"directory; follow it with 'raydpo jobs logs -f {job.submission_id}', end it with 'raydpo jobs stop "
                    f"{job.submission_id}' and submit again, which continues it, or give this run another name (name=...)"
                )
        number = 1 + max(map(_number, earlier), default=0)
        deadline = time.monotonic() + BEGINNING_SECONDS
        while True:
            try:
                return self.client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=f"{name}-{number}",
                    entrypoint_num_gpus=gpus or None,
                    runtime_env={"working_dir": str(archive), "env_vars": job_env()},
                    metadata={"raydpo": __version__, "raydpo_run": name, "raydpo_verb": verb},
                )
            except Exception as error:
                if "No available agent" in str(error):
                    if time.monotonic() < deadline:
                        time.sleep(2)
                        continue
                    raise RaydpoError(
                        f"the cluster at {self.address} has had no agent to start jobs for {BEGINNING_SECONDS:.0f} s: "
                        "'ray[default]' is not installed there, or another Ray on the same machine uses its ports; see "
                        "logs/dashboard_agent.log of the head's session, and 'ray start --dashboard-agent-listen-port'"
                    ) from None
                if "already" in str(error):
                    raise RunningJobError(f"another user has just submitted {name}-{number}; see 'raydpo jobs ls'") from None
                raise RaydpoError(f"the cluster at {self.address} did not take the job: {_said(error)}") from None

    def follow(self, job: str) -> JobDetails:
        """Print a job's log until the job ends.

        Raises:
            RaydpoError: if the job server does not answer for ``LOST_SECONDS``.
        """
        import asyncio

        printed, answered = 0, time.monotonic()
        while True:
            try:
                printed = asyncio.run(self._print(job, printed))
                details = self.client.get_job_info(job)
                if details.status.value in ENDED:
                    return details
                answered = time.monotonic()
            except _TailBrokenError as broken:
                if broken.printed > printed:
                    answered = time.monotonic()
                printed = broken.printed
            except Exception as error:  # server or network may come back
                if time.monotonic() - answered > LOST_SECONDS:
                    raise RaydpoError(
                        f"the job server at {self.address} has not answered for {LOST_SECONDS:.0f} s "
                        f"({_said(error)}); job {job} may still be running"
                    ) from None
            time.sleep(1)

    async def _print(self, job: str, printed: int) -> int:
        """Print the log from character ``printed`` on; returns the number of characters printed when the log ends."""
        seen = 0
        try:
            async for text in self.client.tail_job_logs(job):
                new = text[max(0, printed - seen) :]
                seen += len(text)
                if new:
                    print(new, end="", flush=True)
                    printed = seen
        except Exception as error:
            raise _TailBrokenError(printed) from error
        return printed

    def stop(self, job: str, seconds: int = STOP_SECONDS) -> JobDetails:
        """Stop a job, which has ``seconds`` for a checkpoint, and wait until it has ended."""
        self.client.stop_job(job)
        deadline = time.monotonic() + seconds + 30
        while (details := self.client.get_job_info(job)).status.value not in ENDED:
            if time.monotonic() > deadline:
                raise RaydpoError(
                    f"job {job} was told to stop {seconds + 30} s ago and is still "
                    f"{details.status.value.lower()}; look at 'raydpo jobs logs {job}'"
                )
            time.sleep(0.5)
        return details


class _TailBrokenError(Exception):
    """The connection was lost after ``printed`` characters of the log."""

    def __init__(self, printed: int) -> None:
        super().__init__(printed)
        self.printed = printed


def _number(job: JobDetails) -> int:
    """The number at the end of the id of a run's job."""
    return int(job.submission_id.rsplit("-", 1)[1])


def _has_token() -> bool:
    """Whether Ray would find a token."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(path) if path else Path.home() / ".ray" / "auth_token"
    return bool(os.environ.get("RAY_AUTH_TOKEN") or (file.is_file() and file.read_text(encoding="utf-8").strip()))


def _without_client() -> ConfigError:
    return ConfigError(
        "submitting a job needs Ray's job client, which is not installed here; run: pip install "
        "'ray[default]' in the cluster's version, or let --dry-run print the command"
    )


def _said(error: Any) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip()[:300]}" if lines else type(error).__name__
