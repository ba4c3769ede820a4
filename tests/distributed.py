"""Run a function on several gloo ranks of this machine, each a process of its own."""

from __future__ import annotations

import os
import pickle
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_distributed(function: Callable[..., Any], world_size: int, directory: Path, *args: Any) -> list[Any]:
    """``function(*args)`` on every rank; its results in order of rank. A failure carries the rank's traceback."""
    import torch.multiprocessing as mp

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    directory.mkdir(parents=True, exist_ok=True)
    context = mp.get_context("spawn")
    os.environ["PYTHONWARNINGS"] = "ignore"  # of the ranks: DeepSpeed calls what torch has deprecated
    ranks = [context.Process(target=_rank, args=(function, rank, world_size, port, directory, args))
             for rank in range(world_size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=300)
    results = []
    for rank, process in enumerate(ranks):
        if process.is_alive():
            process.kill()
        file = directory / f"rank-{rank}.pickle"
        assert file.is_file(), f"rank {rank} ended with {process.exitcode} and no result"
        ok, result = pickle.loads(file.read_bytes())
        assert ok, result
        results.append(result)
    return results


def _rank(function: Callable[..., Any], rank: int, world_size: int, port: int, directory: Path, args: tuple) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    try:
        result = (True, function(*args))
    except BaseException:
        result = (False, traceback.format_exc())
    (directory / f"rank-{rank}.pickle").write_bytes(pickle.dumps(result))
    os._exit(0)  # without the interpreter's long good-bye to torch and DeepSpeed
