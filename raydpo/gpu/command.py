"""The verb ``raydpo gpu check``: runs the blocks one after another in this process, and writes the report after each."""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import torch

from raydpo.cluster.allocator import allocator_setting
from raydpo.cluster.driver import driver_version, why_no_gpu
from raydpo.errors import ConfigError, one_line, reason
from raydpo.gpu.blocks import BLOCKS, Block
from raydpo.gpu.environment import clocks, describe, versions
from raydpo.gpu.figures import Findings, Report, Result, Skip, temporary_of
from raydpo.gpu.limits import CPU_LIMITS, GPU_LIMITS
from raydpo.gpu.shape import LLAMA_8B, TINY
from raydpo.gpu.world import World
from raydpo.storage.uri import is_uri
from raydpo.terminal.console import Console
from raydpo.version import __version__

__all__ = ["check", "chosen_blocks", "run_block"]

LIBRARIES = ("transformers.models.llama.modeling_llama", "peft", "deepspeed", "bitsandbytes")
"""What blocks import, if it is installed."""
BLOCK_SECONDS = 60.0
"""Longest that a block may take on a GPU."""
ALL_SECONDS = 525.0
"""Longest that all blocks together may take there, so that a rented quarter of an hour holds a second try."""
ON_A_CPU = 5.0
"""How much longer they may take on a CPU, which may have other work."""
AGAIN_SECONDS = 5.0
"""Seconds after which a timeout is raised again, if the one before was lost in a destructor."""


class BlockTimeout(BaseException):
    """A block took longer than it may. No ``Exception``, which libraries catch in many places."""


def check(
    console: Console, *, out: str | Path, blocks: str | None = None, quick: bool = False, device: str | None = None
) -> Report:
    """Check this machine's first GPU.

    Args:
        out: file for the report, replaced after each block.
        blocks: numbers of the blocks to run, such as ``1,5``; None = all.
        quick: leave out the blocks that measure speed and what is offered beside it.
        device: ``cpu`` runs the same code at tiny sizes on the CPU; None = the GPU.

    Raises:
        ConfigError: if there is no GPU, a block is unknown, or ``out`` cannot be written.
    """
    chosen = chosen_blocks(blocks, quick)
    if device is None and not torch.cuda.is_available():
        why = why_no_gpu(driver_version(), torch.__version__, torch.version.cuda, torch.version.hip)
        raise ConfigError(
            f"gpu check found no GPU that torch can use, and a CUDA device is expected: {why}. Add --device cpu to try the "
            "same code at tiny sizes, which proves nothing about a GPU"
        )
    where = torch.device("cpu" if device == "cpu" else "cuda:0")
    out = _writable(str(out))
    shape, limits = (TINY, CPU_LIMITS) if where.type == "cpu" else (LLAMA_8B, GPU_LIMITS)
    with tempfile.TemporaryDirectory(prefix="raydpo-gpu-check-") as folder, _alone(Path(folder), where):
        report = Report(
            raydpo=__version__,
            started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            device=describe(where),
            versions=versions(),
            model={"shape": shape.name, "layers": list(shape.layers), "whole": shape.whole},
        )
        console.say(_first_line(report))
        if where.type == "cpu":
            console.say("warning: --device cpu computes tiny models on this CPU; its figures are not figures of a GPU")
        world = World(where, shape, limits, Path(folder))
        _import_libraries()
        longer = 1.0 if world.cuda else ON_A_CPU
        deadline = time.monotonic() + longer * ALL_SECONDS
        for block in chosen:
            result = run_block(block, world, min(longer * BLOCK_SECONDS, deadline - time.monotonic()), console)
            report.blocks.append(result)
            report.seconds += result.seconds
            report.measured = dict(world.measured)
            report.write(out)
            _tell(result, console)
    counts = report.summary
    console.say(f"report: {out}")
    console.say(f"PASS {counts['pass']}, FAIL {counts['fail']}, SKIP {counts['skip']}")
    return report


def _writable(out: str) -> Path:
    """The path of a report, in whose folder a file was written and removed.

    Raises:
        ConfigError: if it is no path of a file, or cannot be written.
    """
    if is_uri(out):
        raise ConfigError(f"--out {out} is a URI, which is not supported; name a local file, and copy it afterwards")
    path = Path(out)
    try:
        # A device such as /dev/null would be replaced, not written to.
        if os.path.basename(out) in ("", ".", "..") or (path.exists() and not path.is_file()):
            raise ConfigError(f"--out {out} names no file; name a file in an existing folder")
        temporary = temporary_of(path)
        temporary.touch()
        temporary.unlink()
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--out {out} cannot be written: {reason(error)}; name a file in an existing folder") from None
    return path


def chosen_blocks(numbers: str | None, quick: bool) -> tuple[Block, ...]:
    """The blocks that ``--blocks`` and ``--quick`` leave.

    Raises:
        ConfigError: if a number is not that of a block, or both are given.
    """
    if numbers is None:
        return tuple(block for block in BLOCKS if block.quick or not quick)
    if quick:
        raise ConfigError(f"--quick and --blocks {numbers} contradict each other; keep one")
    known = {str(block.number): block for block in BLOCKS}
    wanted = [one.strip() for one in numbers.split(",")]
    for one in wanted:
        if one not in known:
            raise ConfigError(f"--blocks names {one!r}; numbers from 0 to {len(BLOCKS) - 1} are expected, such as 1,5")
    return tuple(block for block in BLOCKS if str(block.number) in wanted)


def run_block(block: Block, world: World, limit: float, console: Console) -> Result:
    """Run one block. Nothing that it raises ends the check, except an interrupt."""
    found, start = Findings(), time.monotonic()
    status, error, before = "pass", None, clocks(world.device) if world.cuda else None
    try:
        with console.quiet(), _limited(limit):
            block.run(world, found)
    except Skip as why:
        status = "skip"
        found.note(f"skipped: {why}")
    except BlockTimeout:
        status, error = "timeout", f"took longer than {max(limit, 0):.0f} s"
    except Exception as raised:
        status, error = "error", f"{type(raised).__name__}: {one_line(raised, 400)}"
    if status == "pass" and any(figure.ok is False for figure in found.figures.values()):
        status = "fail"
    # What a traceback held is free from here on.
    gc.collect()
    if world.cuda:
        torch.cuda.empty_cache()
        for name, one, other in zip(("SM clock in MHz", "power in W"), before, clocks(world.device), strict=True):
            if one is not None and other is not None:
                found.note(f"{name} {one:.0f} before, {other:.0f} after")
    return Result(
        number=block.number,
        name=block.name,
        status=status,
        seconds=round(time.monotonic() - start, 2),
        figures=found.figures,
        note="; ".join(found.notes),
        error=error,
    )


@contextlib.contextmanager
def _limited(limit: float) -> Iterator[None]:
    """Raise ``BlockTimeout`` in the block after ``limit`` seconds. A kernel that runs is waited for."""

    def late(_signal: int, _frame: FrameType | None) -> None:
        raise BlockTimeout

    if limit <= 0:
        raise BlockTimeout
    earlier = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, limit, AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


@contextlib.contextmanager
def _alone(folder: Path, device: torch.device) -> Iterator[None]:
    """Within the block, remember nothing of the models on this machine, reach nothing outside it, and compute as a worker
    does. Nothing may have used a GPU before."""
    changes = {"XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    # DeepSpeed reads the first when it is imported, cuBLAS the second when it is first used, for train.deterministic.
    changes |= {"DS_ACCELERATOR": device.type, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"} | allocator_setting(os.environ)
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _import_libraries() -> None:
    """Import what blocks use, which may take half a minute, so that it does not count for the first of them."""
    for name in LIBRARIES:
        with contextlib.suppress(Exception):  # a block that needs it tells what is wrong
            importlib.import_module(name)


def _first_line(report: Report) -> str:
    named = [f"{name} {version or 'not installed'}" for name, version in report.versions.items()]
    device = report.device
    driver = f", driver {device['driver']}" if device.get("driver") else ""
    return f"raydpo {report.raydpo}, {', '.join(named)}; {device['name']}{driver}"


def _tell(result: Result, console: Console) -> None:
    console.say(f"{result.number:2d} {result.name}: {result.status.upper()} ({result.seconds:.1f} s)")
    lines: Sequence[str] = [figure.line() for figure in result.figures.values()]
    for line in (*lines, *filter(None, (result.note, result.error))):
        console.say(f"     {line}")
