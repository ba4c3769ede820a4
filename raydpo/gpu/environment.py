"""Block 0: the GPU, its driver and libraries, and the rates that other blocks are compared with."""

from __future__ import annotations

import importlib.metadata
import inspect
import platform
import re
import shutil
import subprocess
from typing import Any

import torch

from raydpo.cluster.driver import driver_version
from raydpo.gpu.figures import Findings
from raydpo.gpu.timing import seconds
from raydpo.gpu.world import World
from raydpo.model.recall import processor

__all__ = ["PACKAGES", "clocks", "describe", "environment", "judge_driver", "versions"]

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "bitsandbytes", "flash_attn", "triton", "liger_kernel", "numpy")
"""Packages whose versions a report names."""
VARIABLE_LENGTH = frozenset({"varlen", "flash"})


def environment(world: World, found: Findings) -> None:
    """Measure a large product and a copy; check the driver and that a variable-length body exists."""
    shape, limits = world.shape, world.limits
    size = shape.matrix
    peak = world.sheet_peak
    least = None if peak is None or limits.gemm is None else limits.gemm * peak / 1e12
    found.at_least("gemm_tflops", world.gemm / 1e12, least, f"product of {size} x {size} matrices", "TFLOP/s")
    # Large enough to miss every cache.
    source = torch.empty(2**30 if world.cuda else 2**22, dtype=torch.uint8, device=world.device)
    target = torch.empty_like(source)
    rate = 2 * source.numel() / seconds(lambda: target.copy_(source), world.device)
    found.value("copy_gb_s", rate / 1e9, "copy within the device's memory, read and written", "GB/s")
    world.measured |= {"gemm_tflops": world.gemm / 1e12, "copy_gb_s": rate / 1e9}
    if peak is not None:
        world.measured["peak_tflops"] = peak / 1e12
    bodies = world.bodies()
    found.note(f"bodies of attention: {', '.join(bodies)}")
    found.note(f"varlen_attn takes {_signature()}")
    if world.cuda:
        found.fact(
            "variable_length_body",
            bool(VARIABLE_LENGTH & set(bodies)),
            "a variable-length body of attention exists (1 = yes)",
        )
        judge_driver(found, driver_version(), torch.version.cuda, limits.driver)


def judge_driver(found: Findings, driver: str | None, cuda: str | None, least: int | None) -> None:
    """Compare the main version of the driver with ``least``, which the libraries of CUDA 13 need.

    Args:
        driver: such as ``580.95.05``; None = unknown, which fails.
        cuda: version that torch was built with, such as ``13.0``.
    """
    known = re.match(r"\d+", driver or "")
    needed = least if cuda is not None and int(cuda.split(".")[0]) >= 13 else None
    found.at_least(
        "driver", float(known[0]) if known else 0.0, needed, f"driver {driver} with CUDA {cuda}, its main version"
    )


def _signature() -> str:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return "nothing: this torch has none"
    return ", ".join(inspect.signature(varlen_attn).parameters)


def clocks(device: torch.device) -> tuple[float | None, float | None]:
    """The GPU's SM clock in MHz and its power in watts; None where nvidia-smi does not tell."""
    asked = _nvidia_smi("clocks.sm,power.draw", device) or []
    values = [float(one) if re.fullmatch(r"[\d.]+", one) else None for one in asked[:2]]
    return (values[0], values[1]) if len(values) == 2 else (None, None)


def _nvidia_smi(fields: str, device: torch.device) -> list[str] | None:
    """Values of a GPU, or None. It is named by its UUID, since CUDA_VISIBLE_DEVICES changes its number."""
    program, uuid = shutil.which("nvidia-smi"), getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if program is None or uuid is None:
        return None
    query = [f"--id=GPU-{str(uuid).removeprefix('GPU-')}", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run([program, *query], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = told.stdout.strip().splitlines()
    return [one.strip() for one in lines[0].split(",")] if told.returncode == 0 and lines else None


def versions() -> dict[str, str | None]:
    """Versions of Python and of what may be installed; None = not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__  # with its build, such as +cu130
    return found


def describe(device: torch.device) -> dict[str, Any]:
    """Name, memory and driver of the device, for the report."""
    if device.type != "cuda":
        return {"type": device.type, "name": f"a CPU, {processor()}", "threads": torch.get_num_threads()}
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    name = torch.cuda.get_device_name(device)
    return {"type": device.type, "name": name, "memory_gib": round(memory, 1), "driver": driver_version()}
