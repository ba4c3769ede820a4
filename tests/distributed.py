"""Run a function on several gloo ranks of this machine, each a process of its own.

Ranks are forked from a server that has imported torch, DeepSpeed, transformers and raydpo once a session and computed
nothing: what it would take each of them ten seconds to import is there, all else is as in a new process. ``fresh`` ranks
start from nothing, each with hash seeds of its own; all do where there is a GPU, which survives no fork.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any
from unittest import mock

SECONDS = 300


def run_distributed(
    function: Callable[..., Any], world_size: int, directory: Path, *args: Any, fresh: bool = False
) -> list[Any]:
    """``function(*args)`` on every rank; its results in order of rank. A failure carries the rank's traceback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    directory.mkdir(parents=True, exist_ok=True)
    context = _context(fresh)
    with environment(PYTHONWARNINGS="ignore"):  # DeepSpeed calls what torch has deprecated
        variables = dict(os.environ)
        ranks = [
            context.Process(target=_rank, args=(function, rank, world_size, port, directory, variables, args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
    deadline = time.monotonic() + SECONDS
    for process in ranks:
        process.join(timeout=max(0.0, deadline - time.monotonic()))
    for process in ranks:
        if process.is_alive():
            process.kill()
    results = []
    for rank, process in enumerate(ranks):
        file = directory / f"rank-{rank}.pickle"
        assert file.is_file(), f"rank {rank} ended with {process.exitcode} and no result"
        ok, result = pickle.loads(file.read_bytes())
        assert ok, result
        results.append(result)
    return results


def _context(fresh: bool) -> BaseContext:
    import torch

    if fresh or torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    return forking()


@functools.cache
def forking() -> BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    with environment(DS_ACCELERATOR="cpu", PYTHONWARNINGS="ignore", PYTHONPATH=path):
        forkserver.ensure_running()
    return context


def environment(**changes: str) -> AbstractContextManager[Any]:
    """For processes that are started within."""
    return mock.patch.dict(os.environ, changes)


def _rank(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    directory: Path,
    environment: dict[str, str],
    args: tuple,
) -> None:
    os.environ.clear()
    os.environ.update(
        environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import numpy as np
    import torch

    np.random.seed()  # of its own, as after an import; torch begins with the same seed everywhere
    torch.set_num_threads(1)  # more only wait for each other, on models of this size
    try:
        result = (True, function(*args))
    except BaseException:
        result = (False, traceback.format_exc())
    (directory / f"rank-{rank}.pickle").write_bytes(pickle.dumps(result))
    os._exit(0)  # without the interpreter's long good-bye to torch and DeepSpeed
