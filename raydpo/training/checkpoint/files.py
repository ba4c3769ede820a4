"""Checkpoint files: each rank's share of the trained state, and the facts by which a run continues or refuses them."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from raydpo.errors import ConfigError, TrainError
from raydpo.rundir.fingerprint import changed_settings
from raydpo.training.job import TrainSummary
from raydpo.training.policy.engine import Engine

__all__ = ["FACTS", "PendingCheckpoint", "load_checkpoint", "load_earlier"]

FACTS = "raydpo.json"
"""File of a checkpoint with all facts but the tensors."""
FORMAT = 2


@dataclass(frozen=True)
class CheckpointState:
    """Progress in a checkpoint: finished steps, number of workers, ZeRO stage, and the summary so far."""

    step: int
    world_size: int
    zero: int
    summary: dict[str, Any]


class PendingCheckpoint:
    """This rank's share of a checkpoint, as the state was when this was made. All or a part of it is not written yet.

    Args:
        directory: where the files are written; what it held is removed.
        copy: hold the share in the host's memory until ``write``, so that training can go on. Otherwise it is written here,
            file by file.

    Attributes:
        bytes: size of the share.

    Raises:
        OSError: if the disk is full, or cannot be written.
    """

    def __init__(
        self,
        engine: Engine,
        directory: Path,
        step: int,
        fingerprint: Mapping[str, Any],
        summary: TrainSummary,
        *,
        copy: bool,
    ) -> None:
        self.directory, self.bytes = directory, 0
        self._files: list[tuple[str, dict[str, Tensor]]] = []
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        for name, tensors in engine.state.files():
            self._files.append((name, tensors))
            self.bytes += sum(tensor.nbytes for tensor in tensors.values())
            del tensors
            if not copy:
                self.write()
        if engine.rank == 0:
            state = {"format": FORMAT, "step": step, "world_size": engine.world_size, "zero": engine.zero}
            state |= {"state": engine.state.facts, "fingerprint": dict(fingerprint), "summary": dataclasses.asdict(summary)}
            (directory / FACTS).write_text(json.dumps(state), encoding="utf-8")

    def write(self) -> None:
        """Write what is not written yet. May run in another thread than the one that trains; after an error, again.

        Raises:
            OSError: if the disk is full, or cannot be written.
        """
        while self._files:
            name, tensors = self._files[0]
            try:
                save_file(tensors, self.directory / name)
            except SafetensorError as error:
                raise _as_os_error(error) from None
            del tensors, self._files[0]  # frees the memory


def load_checkpoint(engine: Engine, directory: Path, fingerprint: Mapping[str, Any]) -> CheckpointState:
    """Load the checkpoint in ``directory`` into ``engine``.

    Raises:
        ConfigError: if it belongs to a run whose result would differ.
        TrainError: if it is incomplete or damaged, or written by another version of raydpo.
    """
    state = _read(directory)
    changes = changed_settings(state["fingerprint"], fingerprint)
    if changes:
        raise ConfigError(f"the checkpoint belongs to a run with other settings ({'; '.join(changes)})")
    return _load(engine, directory, state)


def load_earlier(engine: Engine, directory: Path) -> CheckpointState:
    """Load the last checkpoint of an earlier training, which this one continues with settings of its own.

    Raises:
        TrainError: as ``load_checkpoint``.
    """
    return _load(engine, directory, _read(directory))


def _load(engine: Engine, directory: Path, state: dict[str, Any]) -> CheckpointState:
    engine.state.read(directory, state["state"], state["world_size"])
    return CheckpointState(state["step"], state["world_size"], state["zero"], state["summary"])


def _read(directory: Path) -> dict[str, Any]:
    try:
        state = json.loads((directory / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainError(f"the checkpoint in {directory} is incomplete or damaged: {error}") from None
    if state.get("format") != FORMAT:
        raise TrainError(
            f"the checkpoint in {directory} has format {state.get('format', 1)}, this version of raydpo reads "
            f"format {FORMAT}; finish the run with the version that started it, or start again with --fresh"
        )
    return state


def _as_os_error(error: SafetensorError) -> OSError:
    """Turn an operating system's error, which safetensors reports as text (``... Os { code: 28, ...``), into OSError."""
    code = re.search(r"code: (\d+)|os error (\d+)", str(error))
    number = int(code[1] or code[2]) if code else errno.EIO
    return OSError(number, os.strerror(number))
