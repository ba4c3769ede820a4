"""Modes of a training, the fastest first, and whether each of them fits in GPU memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from raydpo.config import LoraSettings, ModelConfig, TrainConfig
from raydpo.errors import ConfigError, ModelError
from raydpo.model.budget import MOST_TRAINED, STEP
from raydpo.model.memory.activations import Batch
from raydpo.model.memory.anatomy import Anatomy
from raydpo.model.memory.ledger import (
    BASE_BYTES,
    ENOUGH,
    USABLE,
    MemoryEstimate,
    adapters_line,
    estimate_memory,
    trained_numbers,
)

__all__ = ["Fit", "Modes", "Question", "compare_modes"]

MOST = MOST_TRAINED["cuda"]
MOST_WORKERS = 4096
"""Most GPUs that are tried when asking how many are needed."""

_RECOMPUTED: dict[str, Any] = {"gradient_checkpointing": True}
_INPUTS_ON_HOST = _RECOMPUTED | {"offload_activations": True}
_OPTIMIZER_ON_HOST = {"offload_optimizer": "cpu"}
_CHANGES: tuple[dict[str, Any], ...] = (
    # Modes, the fastest first. ZeRO 1 and 2 send as much as ZeRO 0 (ZeRO 2 after every micro-batch); ZeRO 3 also gathers all
    # weights twice per micro-batch.
    *({"zero": zero} for zero in range(4)),
    # Recomputing costs a third more FLOPs.
    *({"zero": zero} | _RECOMPUTED for zero in range(4)),
    # Copies between host and device: inputs of layers; gradients and weights once a step (AdamW on the host); all weights.
    *({"zero": zero} | _INPUTS_ON_HOST for zero in (0, 2, 3)),
    *({"zero": zero} | _RECOMPUTED | _OPTIMIZER_ON_HOST for zero in (2, 3)),
    *({"zero": zero} | _INPUTS_ON_HOST | _OPTIMIZER_ON_HOST for zero in (2, 3)),
    {"zero": 3} | _INPUTS_ON_HOST | _OPTIMIZER_ON_HOST | {"offload_params": "cpu"},
)
_KEYS = ("zero", "gradient_checkpointing", "offload_activations", "offload_optimizer", "offload_params")
_MODES = [{key: TrainConfig.model_fields[key].default for key in _KEYS} | change for change in _CHANGES]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A training, and the devices it should fit on.

    Attributes:
        memory: bytes of a device.
        batch: proportions of the data, and micro-batches per step.
        longest: positions of the longest pair, which is never split; under ``train.sequence_parallel``, a worker's part.
        budget: ``train.tokens_per_batch``, or None = auto.
    """

    anatomy: Anatomy
    model: ModelConfig
    train: TrainConfig
    workers: int
    memory: float
    dtype: str
    batch: Batch
    longest: int
    budget: int | None

    @property
    def least(self) -> int:
        """Positions of a micro-batch that must fit."""
        return max(self.longest, ENOUGH if self.budget is None else self.budget)

    def memory_at(self, positions: int) -> MemoryEstimate:
        return estimate_memory(
            self.anatomy, self.model, self.train, self.batch.scaled(positions), workers=self.workers, dtype=self.dtype
        )

    @property
    def refused(self) -> str | None:
        """Why a training refuses it, however much memory there is; None if it does not."""
        if self.train.optimizer == "adamw":
            return None
        try:
            self.train.check_numbers(trained_numbers(self.anatomy, self.model), self.workers)
        except ConfigError as error:
            return str(error)
        return None

    def fits(self, positions: int) -> bool:
        return self.refused is None and self.memory_at(positions).device + BASE_BYTES <= USABLE * self.memory


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One mode of training and its memory.

    Attributes:
        overrides: settings to add to the command line to get it; empty for the configuration itself.
        positions: positions of the micro-batch that the bytes are for.
        largest: positions that would fit, in steps of 256 and at most ``MOST``; 0 = not even the longest pair fits.
        parts: bytes by purpose at the peak, the moment ``at``. total: their sum with ``BASE_BYTES``.
        host: bytes of host memory per worker.
    """

    name: str
    overrides: tuple[str, ...]
    configured: bool
    fits: bool
    positions: int
    largest: int
    parts: dict[str, float]
    at: str
    total: float
    host: float

    @classmethod
    def of(cls, question: Question, name: str, overrides: tuple[str, ...], configured: bool) -> Fit:
        largest = _largest(question)
        # With auto the budget is what fits. A mode that does not fit is shown at the least positions that would do.
        positions = question.least if question.budget is not None else max(question.least, min(largest, 4 * ENOUGH))
        memory = question.memory_at(positions)
        return cls(
            name=name,
            overrides=overrides,
            configured=configured,
            fits=largest >= question.least,
            positions=positions,
            largest=largest,
            parts=memory.peak.parts,
            at=memory.peak.name,
            total=memory.device + BASE_BYTES,
            host=memory.host_peak,
        )


@dataclass(frozen=True, kw_only=True)
class Modes:
    """All modes of a training, and which one is proposed.

    Attributes:
        longest, budget: as in ``Question``. together: ``train.sequence_parallel``.
        rows: modes that train the same parameters as the configuration, the fastest first.
        proposed: the first that fits, or None.
        refused: why the configuration cannot train in its mode, however much memory there is, or None.
        adapters: the first mode that fits with LoRA and with QLoRA, if the configuration trains more parameters.
        workers_needed: if nothing fits, the fewest GPUs with which something does; None if no number of them helps.
        adapted: which parts of a mixture of experts the configuration's adapters are on, or None.
    """

    device: str
    memory: float
    workers: int
    dtype: str
    together: int
    longest: int
    budget: int | None
    rows: tuple[Fit, ...]
    proposed: Fit | None
    refused: str | None
    adapters: tuple[Fit, ...]
    workers_needed: int | None
    adapted: str | None = None

    def lines(self) -> list[str]:
        """Sentences that say whether it fits and what to change."""
        gib = self.memory / 2**30
        where = f"{self.workers:,} x {self.device} of {gib:g} GiB, {self.dtype}"
        if self.budget is None:
            room = "which is never cut; the budget is auto"
        elif self.longest > self.budget:
            room = f"more than train.tokens_per_batch {self.budget:,}: it is a micro-batch alone, and that must fit"
        else:
            room = f"of a budget of {self.budget:,}"
        part = f", {self.longest:,} of them for each of {self.together} workers" if self.together > 1 else ""
        said = [] if self.adapted is None else [self.adapted]
        said += [f"longest pair: {self.longest * self.together:,} positions{part}, {room}"]
        configured = next(row for row in self.rows if row.configured)
        needs = f"the configuration, on {where}: {_gib(configured.total)} GiB at {configured.positions:,} positions"
        if self.refused is not None:
            said.append(f"the configuration is refused: {self.refused}")
        elif configured.fits:
            said.append(f"fits: {needs}, {configured.largest:,} would fit")
        else:
            said.append(f"does not fit: {needs}, and a plan may use {USABLE:.0%} of the memory")
        if self.proposed is None:
            more = (
                "more GPUs do not help, since one worker alone needs too much for the longest pair. Set "
                f"train.sequence_parallel higher than {self.together}, or data.max_length lower"
                if self.workers_needed is None
                else f"{self.workers_needed:,} GPUs would be enough"
            )
            said.append(f"no mode that trains the same parameters fits on {where}; {more}")
        elif self.proposed.configured:
            said.append("cheapest mode that fits: the configuration as it is")
        else:
            said.append(f"cheapest mode that fits: {' '.join(self.proposed.overrides)}")
        for row in self.adapters:
            fits = f"{' '.join(row.overrides)} ({_gib(row.total)} GiB)" if row.fits else "does not fit either"
            said.append(f"{row.name}, which trains adapters only: {fits}")
        return said


def compare_modes(question: Question, device: str) -> Modes:
    """All modes of the configuration's policy on its GPUs.

    Args:
        device: name of the device, for messages.

    Raises:
        ConfigError: if the memory is not above 0.
    """
    if not question.memory > 0:
        raise ConfigError(f"--memory is {question.memory / 2**30:g}; the GiB of a device are expected, above 0")
    rows = tuple(_rows(question))
    proposed = next((row for row in rows if row.fits), None)
    return Modes(
        device=device,
        memory=question.memory,
        workers=question.workers,
        dtype=question.dtype,
        together=question.train.sequence_parallel,
        longest=question.longest,
        budget=question.budget,
        rows=rows,
        proposed=proposed,
        refused=question.refused,
        adapters=tuple(_adapters(question)),
        workers_needed=question.workers if proposed else _needed(question),
        adapted=adapters_line(question.anatomy, question.model),
    )


def _rows(question: Question) -> Iterator[Fit]:
    now = {key: getattr(question.train, key) for key in _KEYS}
    modes = list(_MODES)
    if question.train.overlap_communication:  # ZeRO 0 and 3 refuse it
        now["overlap_communication"] = True
        modes = [mode | {"overlap_communication": mode["zero"] in (1, 2)} for mode in modes]
    if now not in modes:
        slower = [number for number, mode in enumerate(modes) if _slowness(mode) > _slowness(now)]
        modes.insert(min(slower, default=len(modes)), now)
    for mode in modes:
        shares = mode["zero"] in (1, 2, 3) and question.workers == 1 and mode["offload_optimizer"] is None
        if shares and mode != now:  # one worker has no other rank to share with
            continue
        changed = _changed(question, mode)
        if changed is not None:
            overrides = tuple(f"train.{key}={_text(value)}" for key, value in mode.items() if value != now[key])
            yield Fit.of(changed, _name(mode), overrides, mode == now)


def _changed(question: Question, mode: dict[str, Any]) -> Question | None:
    """The question in another mode, or None if raydpo does not support it."""
    partitioned = mode["zero"] == 3
    dora = question.model.lora is not None and question.model.lora.dora
    if partitioned and (question.model.quantization is not None or dora):
        return None
    try:
        train = TrainConfig.model_validate(question.train.model_dump(exclude_unset=True) | mode)
    except ValidationError:
        return None
    return replace(question, train=train)


def _adapters(question: Question) -> Iterator[Fit]:
    model = question.model
    if model.quantization is not None or (model.lora is None and model.adapter is not None):
        return
    lora = model.lora or LoraSettings()
    plain = {"lora": lora, "freeze": ()}
    kinds = ({} if model.adapts else {"LoRA": plain}) | {"QLoRA": plain | {"quantization": "4bit"}}
    for name, change in kinds.items():
        other = replace(question, model=model.model_copy(update=change))
        try:
            rows = list(_rows(other))
        except ModelError:  # PEFT has no adapters for all layers of every architecture
            continue
        best = next((row for row in rows if row.fits), rows[-1])
        settings = [] if model.adapts else [f"model.lora={{r: {lora.r}}}"]
        settings += ["model.quantization=4bit"] if "quantization" in change else []
        settings += ["model.freeze=[]"] if model.freeze else []
        yield replace(best, name=name, overrides=(*settings, *best.overrides), configured=False)


def _needed(question: Question) -> int | None:
    def fits(workers: int) -> bool:
        more = replace(question, workers=workers)
        questions = filter(None, (_changed(more, mode) for mode in _MODES))
        return any(changed.fits(question.least) for changed in questions)

    few, many = question.workers, question.workers
    while not fits(many):
        few, many = many, 2 * many
        if many > MOST_WORKERS:
            return None
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if fits(middle) else (middle, many)
    return many


def _largest(question: Question) -> int:
    if not question.fits(question.longest):
        return 0
    few, many = 0, MOST // STEP
    if question.fits(MOST):
        return MOST
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if question.fits(middle * STEP) else (few, middle)
    return max(few * STEP, question.longest)


def _slowness(mode: dict[str, Any]) -> tuple[int, ...]:
    return (
        sum(mode[key] is not None for key in ("offload_params", "offload_optimizer")),
        mode["offload_activations"],
        mode["gradient_checkpointing"],
        mode["zero"],
    )


def _name(mode: dict[str, Any]) -> str:
    words = [f"ZeRO {mode['zero']}"]
    words += ["recompute"] if mode["gradient_checkpointing"] else []
    moved = {key: mode[f"offload_{key}"] for key in ("activations", "optimizer", "params")}
    for place, keys in (
        ("host", [key for key, where in moved.items() if where in (True, "cpu")]),
        ("disk", [key for key, where in moved.items() if where not in (True, False, None, "cpu")]),
    ):
        words += [f"{' + '.join(keys)} on {place}"] if keys else []
    return ", ".join(words)


def _text(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _gib(count: float) -> str:
    return f"{count / 2**30:,.1f}"
