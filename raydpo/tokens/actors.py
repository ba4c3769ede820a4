"""Actors on a Ray cluster that make the blocks of tokenised sets. They are plain actors, not those of Ray Data.

Scoring with Ray Data goes on beside them, and each execution of Ray Data takes its share of all CPUs and of the object store
for granted. Here the driver itself feeds the actors: it knows how many bytes are on the way, may start an actor where no CPU
is free, and knows which lines an actor had that died.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from raydpo.cluster.actors import original_error
from raydpo.cluster.nodes import cores_of, nodes_with, room_for
from raydpo.cluster.watch import QUIET_SECONDS, duration
from raydpo.errors import RaydpoError, one_line

__all__ = ["Job", "Makers", "makers"]

IN_FLIGHT = 64 << 20
"""Most bytes of pieces on their way. But each actor may have one piece, however many actors there are."""
AT_ONCE = 2
"""Pieces of one actor: the one in work, and the next."""
MOST_DEATHS = 3
"""How many actors may die with a piece in their hands."""
WITHOUT_CPU = 2
"""Actors that are started where no CPU is free. Scoring may hold all of them and wait for the pairs."""
NICE = 10
"""How far tokenising stands back on cores that scoring wants, too: a GPU must not wait for its process."""
ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


class Host:
    """The process of an actor. ``call`` runs a function that keeps its state in a dictionary.

    Args:
        torch: whether torch may be imported. Without it transformers takes 1.5 instead of 3.9 s CPU and 180 instead of
            450 MB, and its tokenizers are the same; only code of a repository might need it.
    """

    def __init__(self, *, torch: bool) -> None:
        os.environ |= ENVIRONMENT
        os.nice(NICE)
        if not torch and "torch" not in sys.modules:
            sys.modules["torch"] = None  # type: ignore[assignment]  # now it counts as not installed
        from transformers import AutoTokenizer  # noqa: F401  # takes longest; meanwhile the driver reads the first lines

        self._state: dict[Any, Any] = {}

    def call(self, act: Callable[..., Any], *arguments: Any) -> Any:
        return act(self._state, *arguments)

    def where(self) -> str:
        import ray

        return f"process {os.getpid()} on {ray.util.get_node_ip_address()}"


@dataclass
class Job:
    """A call of an actor.

    Attributes:
        act: function of the actor's state and ``arguments``, of which references are resolved.
        size: bytes that are sent for it.
        about: what it is about, for messages, such as "lines 1 to 9 of a.jsonl".
        tag: for the one who submitted it.
    """

    act: Callable[..., Any]
    arguments: tuple[Any, ...]
    size: int = 0
    about: str = ""
    tag: Any = None
    deaths: int = 0
    since: float = 0.0  # when it became the first of its actor
    told: float = 0.0  # when it was last named as taking long


@dataclass
class _Worker:
    actor: Any
    where: str | None = None  # None until it has started
    jobs: deque[tuple[Any, Job]] = field(default_factory=deque)  # in the order in which it does them


class Makers:
    """A pool of actors.

    Args:
        cpus: CPUs that each requests, in order.
        torch: as of ``Host``.
    """

    def __init__(self, cpus: Iterable[int], *, torch: bool) -> None:
        self._torch = torch
        self._starting: dict[Any, _Worker] = {}  # by the reference that is there once it has started
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._cpus = list(cpus)
        self._start_all()

    def __len__(self) -> int:
        return len(self._cpus)

    def _start_all(self) -> None:
        for each in self._cpus:
            self._start(each)

    def _start(self, cpus: int) -> None:
        import ray

        # SPREAD: without CPUs, Ray would put all of them on the driver's node.
        actor = ray.remote(Host).options(num_cpus=cpus, scheduling_strategy="SPREAD").remote(torch=self._torch)
        self._starting[actor.where.remote()] = _Worker(actor)

    def close(self) -> None:
        """End the actors. What they were making is not stored, or stored whole. Another ``run`` starts new ones."""
        import ray

        for worker in (*self._starting.values(), *self._workers):
            ray.kill(worker.actor)
        self._starting.clear()
        self._workers.clear()

    def run(
        self, jobs: Iterator[Job], doing: str, tell: Callable[[str], None] = lambda line: None
    ) -> Iterator[tuple[Job, Any] | None]:
        """Do jobs, in any order. They are taken from the iterator as actors become free.

        Args:
            doing: what is done, for messages.
            tell: called from time to time with a line about an actor that has had the same job for long.

        Yields:
            Each job with its result; None at least every second.

        Raises:
            RaydpoError: that of a job; or if one kills its actor again and again, or no actor can start.
        """
        import ray

        if not (self._workers or self._starting):
            self._start_all()
        again: deque[Job] = deque()
        began = told = time.monotonic()
        try:
            while True:
                ended = self._submit(jobs, again)
                references = {reference: worker for worker in self._workers for reference, _ in worker.jobs}
                if ended and not references:
                    return
                waiting = [*references, *self._starting]
                ready, _ = ray.wait(waiting, num_returns=1, timeout=1.0)
                if ready:
                    ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
                for reference in ready:
                    if reference in self._starting:
                        self._started_one(reference)
                        continue
                    worker = references[reference]
                    job = next((job for known, job in worker.jobs if known == reference), None)
                    if job is None:  # its actor died meanwhile
                        continue
                    try:
                        result = ray.get(reference)
                    except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
                        self._bury(worker, error, again, doing)
                        continue
                    worker.jobs = deque(entry for entry in worker.jobs if entry[0] != reference)
                    _first_now(worker)
                    yield job, result
                if not ready:
                    yield None
                if time.monotonic() - told > QUIET_SECONDS / 10:
                    told = time.monotonic()
                    self._tell_silent(doing, tell, began)
        except ray.exceptions.RayError as error:
            raise original_error(getattr(error, "cause", None) or error, doing) from error
        finally:
            for worker in self._workers:  # the results of another run are of no interest
                worker.jobs.clear()

    def _submit(self, jobs: Iterator[Job], again: deque[Job]) -> bool:
        """Give jobs to actors that have started. Returns whether all jobs have been given."""
        while True:
            free = [
                worker
                for worker in self._workers
                if len(worker.jobs) < AT_ONCE and not any(job.deaths for _, job in worker.jobs)
            ]
            if not free:
                return False
            worker = min(free, key=lambda each: len(each.jobs))
            sizes = [job.size for each in self._workers for _, job in each.jobs]
            # The next job is read only when there is room for it.
            if worker.jobs and (again or sum(sizes) + max(sizes) > IN_FLIGHT):
                return False
            job = again.popleft() if again else next(jobs, None)
            if job is None:
                return True
            worker.jobs.append((worker.actor.call.remote(job.act, *job.arguments), job))
            _first_now(worker)

    def _started_one(self, reference: Any) -> None:
        import ray

        worker = self._starting.pop(reference)
        try:
            worker.where = ray.get(reference)
        except ray.exceptions.RayActorError:
            self._failed_starts += 1
            if self._failed_starts >= MOST_DEATHS:
                raise
            self._start(0)
            return
        self._workers.append(worker)

    def _bury(self, worker: _Worker, error: Exception, again: deque[Job], doing: str) -> None:
        """Replace an actor that died. Any of its jobs may be the cause: the result of one that it had done may be lost with
        it. Each of them is repeated in an actor by itself."""
        import ray

        self._workers.remove(worker)
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(worker.actor)
        jobs = [job for _, job in worker.jobs]
        worker.jobs.clear()
        for job in jobs:
            job.deaths += 1
            job.since = 0.0
            if job.deaths >= MOST_DEATHS:
                raise RaydpoError(
                    f"{doing} failed: {job.deaths} processes died one after another at {job.about}, the last was "
                    f"{worker.where} ({one_line(error, 300)}); look at these lines, or give the machine more memory"
                )
        again.extendleft(reversed(jobs))
        self._start(0)

    def _tell_silent(self, doing: str, tell: Callable[[str], None], began: float) -> None:
        now = time.monotonic()
        for worker in self._workers:
            job = worker.jobs[0][1] if worker.jobs else None
            if job is not None and now - max(job.since, job.told) > QUIET_SECONDS:
                job.told = now
                tell(f"{doing}: {worker.where} has been at {job.about} for {duration(now - job.since)}")
        if not self._workers and now - began > QUIET_SECONDS:
            tell(f"{doing}: no actor has started for {duration(now - began)}")


def _first_now(worker: _Worker) -> None:
    if worker.jobs and not worker.jobs[0][1].since:
        worker.jobs[0][1].since = time.monotonic()


@contextlib.contextmanager
def makers(most: int | None = None, *, keep_free: int = 0, torch: bool = False) -> Iterator[Makers]:
    """Actors for the block, which start at once: one for each core of the cluster that is free, each with its CPU.

    The first requests none, and so starts also where others hold all CPUs; if they do, there are ``WITHOUT_CPU`` such.

    Args:
        most: number of actors at most.
        keep_free: CPUs to leave for what is started beside them.
        torch: as of ``Host``.
    """
    cores = sum(cores_of(node) for node in nodes_with(None, {}))
    wanted = max(1, min(cores, most or cores))
    free = max(0, min(wanted - 1, room_for({"CPU": 1}, None, {}) - keep_free))
    without = min(wanted, 1 if free else WITHOUT_CPU)
    pool = Makers([0] * without + [1] * min(free, wanted - without), torch=torch)
    try:
        yield pool
    finally:
        pool.close()
