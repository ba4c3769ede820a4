"""Run blocks of rows on Ray Data actors, and report the original error of a worker."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from raydpo import errors
from raydpo.cluster.feed import Feed
from raydpo.cluster.resources import Resources
from raydpo.cluster.watch import RESTARTS, Worker, deaths, watching
from raydpo.errors import RaydpoError

__all__ = ["original_error", "over_actors"]

_NO_MEMORY = re.compile(r"running low on memory\..*?\(IP: ([^,)]+).*? was ([\d.]+GB) used / ([\d.]+GB) limit")
"""Ray 2.60's message when it kills workers for lack of memory: node, memory in use, limit."""

AHEAD = 4
"""Blocks in advance for each concurrent call, and as many for all: Ray Data gives an actor two for each, and a few results
are on their way."""


def over_actors(
    actor: type,
    arguments: tuple[Any, ...],
    blocks: Iterable[pa.Table],
    resources: Resources,
    doing: str,
    *,
    calls_at_once: int = 1,
    environment: Mapping[str, str] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator[dict[str, Any]]:
    """Process blocks with Ray Data actors. There is one actor for each team of workers, but no more than blocks.

    Blocks are taken from ``blocks`` while others are processed, a few for each actor in advance.

    Args:
        actor: class whose instances are called with one block at a time, and return a block of one row.
        arguments: arguments of the actors' constructor.
        blocks: blocks of one row each. After the first ones they are taken in another thread.
        resources: number of teams, and what each requests.
        doing: what is done, for messages, such as "scoring the reference".
        calls_at_once: concurrent calls of one actor, each in its own thread.
        environment: environment variables of the actors' processes, besides those of the cluster.
        tell: called from time to time, from another thread, with a line about each actor that is silent for long.

    Yields:
        The rows that the actors return.

    Raises:
        RaydpoError: if an actor fails. What ``blocks`` raises is raised once the blocks before it are done.
    """
    import ray

    blocks = iter(blocks)
    first = list(islice(blocks, resources.teams))
    if not first:
        return
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Ray 2.60 ends an execution in which no block moves for half an hour (data/_internal/execution/no_progress_guard.py).
    # One shard may take that long, and so may a driver that prepares the next one.
    context.execution_no_progress_timeout_s = -1
    # Ray Data joins small blocks to larger ones, which one call after another of the same actor would process.
    context.target_max_block_size = 1
    run = f"watch/{uuid.uuid4().hex}"
    feed = Feed(chain(first, blocks), AHEAD * calls_at_once * len(first) + AHEAD)
    try:
        with ray.data.DataContext.current(context):
            dataset = feed.dataset().map_batches(
                Worker,
                fn_constructor_args=(run, actor, arguments),
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=len(first), max_concurrent_calls_per_actor=calls_at_once),
                num_cpus=resources.together,
                num_gpus=resources.gpus_per_worker * resources.together,
                accelerator_type=resources.accelerator,
                label_selector=dict(resources.labels) or None,
                # By default Ray restarts an actor without limit, also one that a bad block kills each time.
                # Ray deprecates passing these two here, but has no named arguments for them yet.
                max_restarts=RESTARTS,
                max_task_retries=RESTARTS,
                **({"runtime_env": {"env_vars": dict(environment)}} if environment else {}),
            )
        with watching(run, doing, tell):
            try:
                for row in dataset.iter_rows():
                    feed.done()
                    yield row
            except RaydpoError:
                raise
            except Exception as error:
                raise original_error(error, doing, deaths(run)) from error
        if feed.error is not None:
            raise feed.error
    except RaydpoError:
        raise
    except Exception as error:
        raise original_error(error, doing) from error
    finally:
        feed.close()


def original_error(error: BaseException, doing: str, deaths: Mapping[str, str] = MappingProxyType({})) -> RaydpoError:
    """Return the error behind a Ray exception.

    It is the RaydpoError that a worker raised. If there is none, it is a new one with one sentence about the cause.

    Args:
        deaths: what is known of actors that died, by actor id (see ``watch.deaths``).
    """
    seen: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        current = todo.pop(0)
        if current is None or any(current is known for known in seen):
            continue
        if isinstance(current, RaydpoError):
            return current
        seen.append(current)
        todo += [getattr(current, "cause", None), current.__cause__, *getattr(current, "worker_failures", {}).values()]
    for known in seen:
        # If the constructor of an actor fails, only the text of its error arrives.
        match = re.search(r"raydpo\.errors\.(\w+): (.+)", str(known))
        kind = getattr(errors, match[1], None) if match else None
        if isinstance(kind, type) and issubclass(kind, RaydpoError):
            return kind(match[2])
        # The rest of this message is about settings of Ray, and does not help.
        if memory := _NO_MEMORY.search(str(known)):
            node, used, limit = memory.groups()
            return RaydpoError(
                f"{doing} failed: node {node} ran low on memory ({used} of {limit} used by all that runs there), and Ray "
                "killed workers; use fewer workers on a node, fewer tokens_per_batch, or more memory"
            )
    for known in seen:
        if told := deaths.get(getattr(known, "actor_id", None) or ""):
            return RaydpoError(f"{doing} failed: {told}")
    # Ray adds exceptions without a message to the chain. The last one with a message is the origin.
    told = [
        (type(known).__name__, lines[-1].strip())
        for known in seen
        if (lines := str(known).strip().splitlines()) and lines[-1].strip() != type(known).__name__
    ]
    kind, line = told[-1] if told else (type(error).__name__, "no message")
    return RaydpoError(f"{doing} failed: {kind}: {line}")
