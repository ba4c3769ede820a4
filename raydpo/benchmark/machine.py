"""What a measurement ran on: the device, its peak, the versions of everything that matters."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re

import raydpo
from raydpo.estimate.rate import DEVICES

__all__ = ["device_name", "known_peak", "versions"]

CARDS = {"H100 PCIe": 756.0, "H100 NVL": 835.0, "H200 NVL": 835.0}
"""Peak TFLOP/s of dense bfloat16 products of cards whose name begins as that of one of ``DEVICES``, from NVIDIA's data
sheets."""
PACKAGES = ("torch", "transformers", "peft", "trl", "deepspeed", "accelerate", "datasets", "numpy")


def device_name(device: str) -> str:
    """Of the GPU or of the processor, as it calls itself."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as lines:
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def known_peak(name: str) -> float | None:
    """Operations a second in bfloat16 of a GPU that calls itself ``name``, or None where it is none of ``DEVICES`` and
    ``CARDS``, or a part of one."""
    if "MIG" in name.split():
        return None
    fitting = [peak for card, peak in CARDS.items() if card in name] or [
        peak for known, peak in DEVICES.items() if all(re.search(rf"\b{part}\b", name) for part in known.split("-"))]
    return fitting[0] * 1e12 if fitting else None


def versions() -> dict[str, str]:
    """Of Python, raydpo and the packages that are installed of those that make the numbers."""
    found = {"python": platform.python_version(), "raydpo": raydpo.__version__}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
