"""``raydpo doctor``: show what is installed on this machine and what a run would use."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys

from raydpo.cluster.driver import driver_version, why_no_gpu
from raydpo.cluster.nodes import usable_cores
from raydpo.terminal.console import Console
from raydpo.version import __version__

__all__ = ["report", "vllm_of_ray"]

_PACKAGES = ("torch", "transformers", "peft", "deepspeed", "ray", "pyarrow", "datasets", "pydantic")


def report(console: Console) -> None:
    """Print versions, devices, the C++ compiler, and the Ray cluster that a run would use."""
    rows = [("raydpo", __version__), ("python", f"{platform.python_version()} ({sys.executable})")]
    rows += [(name, _version(name)) for name in _PACKAGES]
    installed, pinned = vllm_of_ray()
    if installed is not None:
        rows.append(("vllm", installed))
    console.table("versions", ("", "value"), rows)
    if None not in (installed, pinned) and installed != pinned:
        ray = _version("ray")
        console.warn(
            f"vLLM is {installed}, and ray.data.llm of Ray {ray} imports parts of vLLM {pinned}: engine ray does not run "
            f"here; install 'ray[llm]=={ray}', or use engine vllm"
        )
    compiler, driver = shutil.which("g++") or "none (not needed on the CPU)", driver_version()
    devices, problem = _devices(driver)
    console.table("this machine", ("", "value"), [*devices, ("NVIDIA driver", driver or "none"), ("C++ compiler", compiler)])
    if problem:
        console.warn(problem)
    address = os.environ.get("RAY_ADDRESS", "")
    ray = "a local Ray, started by each command" if not address else f"the cluster at $RAY_ADDRESS {address}"
    if address.startswith(("http://", "https://")):
        ray = f"none: $RAY_ADDRESS is {address}, a job server; set $RAY_API_SERVER_ADDRESS to it instead"
    used = [("Ray", ray), ("precision (dtype: auto)", _auto_dtype())]
    used.append(("reference log-probs", "<output>/cache unless cache.uri says otherwise"))
    console.table("what would be used", ("", "value"), used)


def vllm_of_ray() -> tuple[str | None, str | None]:
    """Return the version of vLLM in this environment, and that which the installed Ray needs for ray.data.llm, which imports
    vLLM's internals. None if there is no vLLM, or Ray names no version."""
    try:
        installed = importlib.metadata.version("vllm").partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        installed = None
    try:
        lines = importlib.metadata.requires("ray") or []
    except importlib.metadata.PackageNotFoundError:
        lines = []
    found = [re.match(r"vllm(?:\[[^\]]*\])?\s*==\s*([\w.]+)\s*;.*\bextra == .llm.", line) for line in lines]
    return installed, next((match[1] for match in found if match), None)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices(driver: str | None) -> tuple[list[tuple[str, str]], str | None]:
    """Return rows of this machine's devices, and why torch finds no GPU although there is a ``driver`` for one."""
    usable, cores = usable_cores(), os.cpu_count()
    rows = [("CPU cores", str(cores) if usable == cores else f"{usable}, of {cores} of the machine")]
    try:
        import torch
    except ImportError:
        return [*rows, ("GPUs", "unknown: torch is not installed")], None
    if not torch.cuda.is_available():
        built = torch.__version__, torch.version.cuda, torch.version.hip
        return [*rows, ("GPUs", "none")], driver and f"torch finds no GPU: {why_no_gpu(driver, *built)}"
    for index in range(torch.cuda.device_count()):
        gib = torch.cuda.get_device_properties(index).total_memory / 2**30
        rows.append((f"GPU {index}", f"{torch.cuda.get_device_name(index)}, {gib:.0f} GiB"))
    return [*rows, ("are they right and fast", "raydpo gpu check finds out, in nine minutes at most")], None


def _auto_dtype() -> str:
    try:
        from raydpo.cluster.resources import bfloat16_is_faster
    except ImportError:
        return "unknown: ray is not installed"
    return "bfloat16" if bfloat16_is_faster() else "float32 (no GPU, and no matrix units for bfloat16 in this processor)"
