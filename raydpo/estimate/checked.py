"""Rates that ``raydpo gpu check`` measured on a GPU, read from its report for ``raydpo plan --measured``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

from raydpo.config import Config
from raydpo.errors import ConfigError, one_line, reason
from raydpo.estimate.plan import Rates
from raydpo.version import __version__

__all__ = ["MEASURED_SHAPE", "REPORT_FORMAT", "CheckedDevice", "read_check"]

REPORT_FORMAT = 1
"""Version of the report's layout."""
MEASURED_SHAPE = "llama3-8b"
"""Shape of the models whose rates a plan takes."""
PLAUSIBLE_RATES = (1e9, 1e16)
"""Operations per second between which every GPU is."""
PLAUSIBLE_MEMORY = (1, 2000)
"""GiB between which every GPU's memory is."""


@dataclass(frozen=True, kw_only=True)
class CheckedDevice:
    """The GPU of a report.

    Attributes:
        memory: GiB.
        flops: operations per second by kind of pass, counted as ``plan.operations`` does: ``score``, ``full``, ``lora``, and
            the last two with ``_checkpointing``. Those of a block that did not pass are left out.
        outcomes: of the blocks that ran, by number: name, status, and what the block said.
        raydpo: version that wrote the report.
    """

    path: str
    name: str
    memory: float
    started: str
    flops: dict[str, float]
    outcomes: dict[int, tuple[str, str, str]]
    raydpo: str

    def rates(self, config: Config) -> Rates:
        """Rates of scoring, and of the training that ``config`` asks for.

        Raises:
            ConfigError: if the report has no rate of one of them.
        """
        kind = (
            f"{'lora' if config.model.adapts else 'full'}{'_checkpointing' if config.train.gradient_checkpointing else ''}"
        )
        lacking = [f"{name}: {self._why_no(name)}" for name in ("score", kind) if name not in self.flops]
        if lacking:
            raise ConfigError(
                f"--measured {self.path} has no rate of {'; nor of '.join(lacking)}. Mend what is named, and run "
                "'raydpo gpu check' with blocks 6 and 7 again"
            )
        return Rates(
            score=self.flops["score"],
            train=self.flops[kind],
            origin=f"measured by gpu check on {self.name}, {self.started}: random weights, bfloat16, plain kernels, "
            "one GPU, no communication",
            warnings=(*self._doubts(), *_other_passes(config)),
        )

    def _why_no(self, rate: str) -> str:
        number = _block_of(rate)
        if number not in self.outcomes:
            return f"block {number}, which measures it, did not run"
        name, status, said = self.outcomes[number]
        return f"block {number} ({name}) ended as {status!r}{said and f', and says: {said}'}"

    def _doubts(self) -> list[str]:
        """Why the report may not be what a plan needs."""
        found = [
            f"--measured: block {number} ({name}) ended as {status!r} on this GPU; a run there may fail or compute wrongly. "
            f"Read the report's figures of block {number} first"
            for number, (name, status, _) in self.outcomes.items()
            if status not in ("pass", "skip")
        ]
        if self.raydpo != __version__:
            found.append(
                f"--measured: the report is of raydpo {self.raydpo}, and this is raydpo {__version__}, whose speed may "
                "differ; run 'raydpo gpu check' again"
            )
        return found


def _block_of(rate: str) -> int:
    """Number of the block that measures a rate."""
    return 6 if rate == "score" else 7


def _other_passes(config: Config) -> list[str]:
    """What in ``config`` computes otherwise than the passes that were measured."""
    model, settings = config.model, []
    for name, dtype in (("model.dtype", model.dtype), ("score.dtype", config.score.dtype)):
        if dtype == "float32":
            settings.append(f"{name} is float32, whose peak is several times lower on data sheets")
    if model.quantization is not None or config.reference_quantization is not None:
        settings.append("weights are quantized, and unpacking them takes time")
    if model.fused:
        settings.append("model.fused is true, and is meant to be faster")
    return [
        f"--measured: the rates are of bfloat16 passes with plain kernels, but {one}; the estimated times and costs do not "
        "include that"
        for one in settings
    ]


def read_check(path: str | Path) -> CheckedDevice:
    """Read the report of a GPU.

    Raises:
        ConfigError: if the file is none, is of another format, tells of a CPU or of another model, or has an implausible
            figure.
    """
    try:
        report: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"--measured {path} cannot be read: {reason(error)}; name a report of 'raydpo gpu check'"
        ) from None
    found = report.get("format") if isinstance(report, dict) else None
    if type(found) is not int or found != REPORT_FORMAT:
        raise ConfigError(
            f"--measured {path} has format {short(found)}; a report of 'raydpo gpu check' of format {REPORT_FORMAT} is "
            "expected"
        )
    try:
        device, measured = report["device"], report["measured"]
        texts = {
            "device.type": device["type"],
            "device.name": device["name"],
            "started": report["started"],
            "raydpo": report["raydpo"],
            "model.shape": report["model"]["shape"],
        }
        outcomes = {
            block["number"]: (str(block["name"]), str(block["status"]), one_line(block["error"] or block["note"], 200))
            for block in report["blocks"]
        }
        rates = {
            name: value
            for key, value in measured.items()
            if (name := key.removesuffix("_flops")) != key and outcomes.get(_block_of(name), ("", ""))[1] == "pass"
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--measured {path} is no whole report of 'raydpo gpu check' ({reason(error)}); make it again"
        ) from None
    for key, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"--measured {path}: {key} is {short(text)}, and a text is expected; make the report again")
    name = one_line(texts["device.name"], 200)
    if texts["device.type"] != "cuda":
        raise ConfigError(
            f"--measured {path} is a report of {name}, and its figures mean nothing for a plan; make one on a GPU"
        )
    if texts["model.shape"] != MEASURED_SHAPE:
        raise ConfigError(
            f"--measured {path}: model.shape is {short(texts['model.shape'])}, and rates of {MEASURED_SHAPE!r} are "
            "expected; make the report again"
        )
    memory = device.get("memory_gib")
    numbers = {"device.memory_gib": (memory, PLAUSIBLE_MEMORY, "GiB")} | {
        f"measured.{key}_flops": (rate, PLAUSIBLE_RATES, "operations a second") for key, rate in rates.items()
    }
    for key, (value, (least, most), unit) in numbers.items():
        if type(value) not in (int, float) or not least <= value <= most:
            raise ConfigError(
                f"--measured {path}: {key} is {short(value)}, and a number from {least:g} to {most:g} {unit} is expected; "
                "run 'raydpo gpu check' again"
            )
    return CheckedDevice(
        path=str(path),
        name=name,
        memory=float(memory),
        started=one_line(texts["started"], 100),
        flops={key: float(rate) for key, rate in rates.items()},
        outcomes=outcomes,
        raydpo=one_line(texts["raydpo"], 100),
    )
