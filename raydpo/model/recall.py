"""Results of checks and measurements of a model that this machine remembers, so that a later run need not repeat them."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from raydpo.storage.memory import keep, program, recall

__all__ = ["Recall", "processor"]


class Recall:
    """What is known of one model on one device.

    Everything that could change a result decides under which name it is kept: the model, the device with its memory and
    threads, the versions of the libraries, and raydpo's own code. So a result is found again only where nothing has changed.

    Args:
        model: what determines the model and how it is used, as JSON; None = remember nothing.
        agree: given whether this process knows a result, tells whether all processes that check together know theirs. A
            check may wait for all of them, so they all make it or none does.
    """

    def __init__(self, model: object | None, device: torch.device, agree: Callable[[bool], bool] = bool) -> None:
        self._model = model
        self._device = device
        self._agree = agree

    def known(self, kind: str) -> Any:
        """The result that is remembered under the name ``kind``, or None."""
        known = None if self._model is None else recall("models", self._decides(kind))
        return known if self._agree(known is not None) else None

    def keep(self, kind: str, result: Any) -> None:
        """Remember ``result``, which JSON can store."""
        if self._model is not None:
            keep("models", self._decides(kind), result)

    def _decides(self, kind: str) -> list[Any]:
        libraries = program("torch", "transformers", "peft", "deepspeed")
        return [kind, self._model, _machine(self._device), torch.get_num_threads(), libraries]


def _machine(device: torch.device) -> list[Any]:
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return [found.name, found.total_memory, torch.version.cuda]
    return [processor(), torch.backends.cpu.get_cpu_capability(), os.cpu_count()]


def processor() -> str:
    """Name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
