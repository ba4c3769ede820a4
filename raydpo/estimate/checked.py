"""Rates that ``raydpo gpu check`` measured on a GPU, read from its report for ``raydpo plan --measured``."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydpo.config import Config
from raydpo.errors import ConfigError, reason
from raydpo.estimate.plan import Rates

__all__ = ["REPORT_FORMAT", "CheckedDevice", "read_check"]

REPORT_FORMAT = 1
"""Version of the report's layout."""


@dataclass(frozen=True, kw_only=True)
class CheckedDevice:
    """The GPU of a report.

    Attributes:
        memory: GiB.
        flops: operations per second by kind of pass, counted as ``plan.operations`` does: ``score``, ``full``, ``lora``, and
            the last two with ``_checkpointing``.
    """

    path: str
    name: str
    memory: float
    started: str
    flops: dict[str, float]

    def rates(self, config: Config) -> Rates:
        """Rates of scoring, and of the training that ``config`` asks for.

        Raises:
            ConfigError: if the report has no rate of one of them.
        """
        kind = (
            f"{'lora' if config.model.adapts else 'full'}{'_checkpointing' if config.train.gradient_checkpointing else ''}"
        )
        lacking = [name for name in ("score", kind) if name not in self.flops]
        if lacking:
            raise ConfigError(
                f"--measured {self.path} has no rate of {' and '.join(lacking)}, which blocks 6 and 7 measure; run "
                "'raydpo gpu check' with them"
            )
        return Rates(
            score=self.flops["score"],
            train=self.flops[kind],
            origin=f"measured by gpu check on {self.name}, {self.started}: random weights, one GPU, no communication",
        )


def read_check(path: str | Path) -> CheckedDevice:
    """Read the report of a GPU.

    Raises:
        ConfigError: if the file is none, is of another format, or tells of a CPU.
    """
    try:
        report: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--measured {path} cannot be read: {reason(error)}; name a report of 'raydpo gpu check'"
        ) from None
    found = report.get("format") if isinstance(report, dict) else None
    if found != REPORT_FORMAT:
        raise ConfigError(
            f"--measured {path} has format {found!r}; a report of 'raydpo gpu check' of format {REPORT_FORMAT} is expected"
        )
    try:
        device, measured = report["device"], report["measured"]
        kind, name, started = device["type"], str(device["name"]), str(report["started"])
        rates = {key.removesuffix("_flops"): value for key, value in measured.items() if key.endswith("_flops")}
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--measured {path} is no whole report of 'raydpo gpu check' ({reason(error)}); make it again"
        ) from None
    if kind != "cuda":
        raise ConfigError(
            f"--measured {path} is a report of {name}, and its figures mean nothing for a plan; make one on a GPU"
        )
    numbers = {"device.memory_gib": device.get("memory_gib")} | {
        f"measured.{key}_flops": rate for key, rate in rates.items()
    }
    for key, value in numbers.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ConfigError(
                f"--measured {path}: {key} is {value!r}, and a number above 0 is expected; run 'raydpo gpu check' again"
            )
    return CheckedDevice(path=str(path), name=name, memory=device["memory_gib"], started=started, flops=rates)
