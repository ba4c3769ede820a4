"""The reference on several devices of one machine: processes that score together.

For sequences too long for one device (``score.sequence_parallel``, see ``model.ulysses``), and for models too large for one
(``score.partition``, see ``model.partition``). This process is the first of the team. It starts the others, sends them what
to score, and computes its own share. Needs torch; DeepSpeed only if weights are partitioned.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from raydpo.cluster.ending import end_process
from raydpo.data.shapes import LayoutName
from raydpo.errors import ConfigError, ModelError, ProcessLostError, RaydpoError, one_line
from raydpo.model.budget import is_out_of_memory
from raydpo.model.files import model_files
from raydpo.model.layout import PromptGroup
from raydpo.model.partition import Partition, join_process_group, leave_process_group
from raydpo.model.sliced import Progress
from raydpo.model.ulysses import SequenceGroup
from raydpo.reference.members import Members, WithoutWordsError
from raydpo.reference.score import ReferenceSpec, Scorer

__all__ = ["TeamScorer", "open_scorer", "refuse_quantized"]

PATIENCE = timedelta(minutes=10)
"""Timeout of collectives: how long to wait for a process that does not answer."""
LEAVE_S = 10.0
"""Seconds to leave the process group."""
SLOW_BYTES = 100 << 20
"""Bytes of the weights that are read and hashed a second, at the least. While the model is loaded, a process waits that much
longer for the others."""
_ENDED = re.compile("connection (closed|reset)|broken pipe", re.IGNORECASE)
"""What a process says whose collective fails since another process has ended."""
_OF_ANOTHER = re.compile(f"gloo|nccl|CUDA error|ProcessGroup|timed? ?out|{_ENDED.pattern}", re.IGNORECASE)
"""The same, or that another process does not answer, or that a GPU fails."""


def open_scorer(
    spec: ReferenceSpec,
    *,
    device: Literal["cuda", "cpu"],
    sequence: int = 1,
    partition: Partition = Partition(),  # noqa: B008 (frozen)
    threads: int | None = None,
    **settings: Any,
) -> Scorer | TeamScorer:
    """Load the reference: in this process, or in a team of processes on this machine whose first one this is.

    Args:
        sequence: processes that compute each forward pass together.
        partition: where the weights are.
        threads: CPU threads of each process of a team; None = torch's default. Those of a single process are not set.
        settings: the other arguments of ``Scorer``.

    Raises:
        RaydpoError: what ``Scorer`` raises, here or in another process of the team.
    """
    if sequence == 1 and not partition.active:
        return Scorer(spec, device=device, **settings)
    return TeamScorer(spec, device=device, sequence=sequence, partition=partition, threads=threads, **settings)


def refuse_quantized(spec: ReferenceSpec) -> None:
    """Refuse a model of which no process can hold a part.

    Raises:
        ModelError: if its weights are quantized.
    """
    stored = {"quantization_config", "compression_config"} & model_files(spec.path, spec.trust_remote_code).config.keys()
    if spec.quantization is not None or stored:
        raise ModelError(
            f"{spec.path} is quantized ({spec.quantization or 'as stored'}), and score.partition and score.offload are for "
            "whole weights only; set score.partition=1 and score.offload=null, or score the model in bfloat16"
        )


@dataclass(frozen=True)
class _Setup:
    """First message to a member of the team. All messages come through a pipe from the process that started it."""

    rank: int
    size: int
    port: int
    device: str
    threads: int | None
    sequence: int
    partition: Partition
    loading: timedelta
    work: Callable[..., Any]
    settings: dict[str, Any]

    def join(self, store: dist.TCPStore | None = None, progress: Progress | None = None) -> Any:
        """Join the process group and load the model."""
        device = self.device if self.device == "cpu" else f"{self.device}:{self.rank}"
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if device != "cpu":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "gloo" if device == "cpu" else "nccl",
            rank=self.rank,
            world_size=self.size,
            store=store or dist.TCPStore("127.0.0.1", self.port, self.size, is_master=False),
            timeout=self.loading,
        )
        if self.partition.active:
            join_process_group(torch.device(device))
            from deepspeed.utils import groups

            groups._get_data_parallel_group()  # made now, for the timeout; later DeepSpeed would make it while loading
            _wait_at_most(self.loading)
        group = SequenceGroup.of_world(self.sequence, self.loading)
        settings = self.settings if progress is None else self.settings | {"progress": progress}
        work = self.work(device=device, group=group, partition=self.partition, **settings)
        _wait_at_most(PATIENCE)
        return work


def _wait_at_most(patience: timedelta) -> None:
    """Set the timeout of the collectives of all groups, also of those that DeepSpeed makes, which have torch's defaults."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(patience, group)


class TeamScorer:
    """A ``Scorer`` on several devices, each with a process. A process has at most one.

    Args:
        sequence: processes that compute each forward pass together, each a part of its positions.
        partition: where the weights are. Its size is 1, so that each process has all weights, or a multiple of ``sequence``.
        threads: CPU threads of each process; None = torch's default.
        progress: as of ``Scorer``, of this process.
        work: what each process makes, with the arguments of ``Scorer``; its ``score`` gets what that of the team is given.
        settings: the other arguments of ``Scorer``; ``tokens_per_batch`` is the share of one device.

    Attributes:
        members: the other processes.

    Raises:
        ConfigError: if the machine has fewer devices.
        RaydpoError: what ``Scorer`` raises, here or in another process of the team.
        ProcessLostError: see ``score``.
    """

    def __init__(
        self,
        spec: ReferenceSpec,
        *,
        device: Literal["cuda", "cpu"],
        sequence: int = 1,
        partition: Partition = Partition(),  # noqa: B008 (frozen)
        threads: int | None = None,
        progress: Progress | None = None,
        work: Callable[..., Any] = Scorer,
        **settings: Any,
    ) -> None:
        if partition.active:
            refuse_quantized(spec)
        self._partition, self._size = partition, max(sequence, partition.size)
        if device == "cuda" and self._size > torch.cuda.device_count():
            field = "score.partition" if partition.size > 1 else "score.sequence_parallel"
            raise ConfigError(
                f"{field} {self._size} needs {self._size} GPUs on one machine, and this one shows "
                f"{torch.cuda.device_count()}; set it lower, or run the command on a machine with as many"
            )
        store = dist.TCPStore("127.0.0.1", 0, self._size, is_master=True, wait_for_workers=False)
        size = sum(file.stat().st_size for file in model_files(spec.path, spec.trust_remote_code).weights)
        loading = PATIENCE + timedelta(seconds=size / SLOW_BYTES)
        common = self._size, store.port, device, threads, sequence, partition, loading, work, {"spec": spec} | settings
        setups = [_Setup(rank, *common) for rank in range(self._size)]
        self.members = Members(self._size - 1, self._lost)
        with self._explained():
            self.members.tell(setups[1:], PATIENCE.total_seconds())
            self.members.wait_until_ready(PATIENCE.total_seconds())
            with self.members.working():
                self._scorer = setups[0].join(store, progress)

    def score(self, groups: Sequence[PromptGroup]) -> list[tuple[np.ndarray, ...]]:
        """As ``Scorer.score``, but a batch that does not fit in memory is not retried.

        Raises:
            RaydpoError: if a process of the team failed, with its reason.
            ProcessLostError: if that reason is no fault of the model, the data or the settings.
        """
        with self._explained():
            self.members.tell([list(groups)] * (self._size - 1), PATIENCE.total_seconds())
            with self.members.working():
                return self._scorer.score(groups)

    @property
    def sample(self) -> np.ndarray:
        return self._scorer.sample

    @property
    def notes(self) -> list[str]:
        return self._scorer.notes

    @property
    def provenance(self) -> dict[str, object]:
        return self._scorer.provenance

    @property
    def layout(self) -> LayoutName:
        return self._scorer.layout

    @property
    def tokens_per_batch(self) -> int:
        """Positions of a forward pass of each device."""
        return self._scorer.tokens_per_batch

    def close(self) -> None:
        """End the other processes and leave the process group."""
        self.members.close()
        if dist.is_initialized():
            # In a thread, since NCCL may wait here for processes that have ended.
            leaving = threading.Thread(target=leave_process_group, daemon=True)
            leaving.start()
            leaving.join(LEAVE_S)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise the error of the process that failed. The other processes only notice that it has ended."""
        try:
            yield
        except Exception as error:
            mine = isinstance(error, RaydpoError) or is_out_of_memory(error)
            explained = self._explain([error] if mine else [error, *self.members.reasons()])
            self.close()
            raise explained from (None if explained is error else error)

    def _lost(self, causes: list[BaseException]) -> None:
        """End this process, whose main thread waits for a member that has ended."""
        explained = self._explain(causes)
        self.members.close()
        end_process(explained)

    def _explain(self, causes: Sequence[BaseException]) -> RaydpoError:
        """The error to raise. ``causes``: what processes raised, this one's first."""
        for cause in causes:
            if isinstance(cause, RaydpoError):
                return cause
            if is_out_of_memory(cause):
                return RaydpoError(self._no_room(cause))
        silent = [one_line(cause) for cause in causes if isinstance(cause, WithoutWordsError)]
        if not silent and (own := [cause for cause in causes if not _of_another(cause)]):
            told = "; ".join(f"{type(cause).__name__}: {one_line(cause, 300)}" for cause in own)
            return RaydpoError(f"a process of the scoring team failed: {told}")
        first = next((cause for cause in causes if not _ENDED.search(str(cause))), causes[0])
        told = silent[-1] if silent else f"{type(first).__name__}: {one_line(first, 300)}"
        if not silent and re.search("timed? ?out", told, re.IGNORECASE):
            told = f"a process did not answer for {PATIENCE.total_seconds() / 60:.3g} min ({told})"
        return ProcessLostError(f"the scoring team of {self._size} processes broke: {told}; run it again")

    def _no_room(self, error: BaseException) -> str:
        what = "a forward pass does not fit on one of the devices that compute it together"
        if not hasattr(self, "_scorer"):
            what = "the reference, or its first forward pass, does not fit on one of the devices that compute it together"
        mend = [] if self._partition.active else ["score.sequence_parallel higher"]
        mend += ["score.partition higher"] if self._partition.offload else ["score.partition higher", "score.offload=cpu"]
        said = str(error).splitlines()[0][:200]
        return f"{what}: {said}. Set score.tokens_per_batch lower, or {', or '.join(mend)}"


def _of_another(cause: BaseException) -> bool:
    """Whether ``cause`` says no more than that another process, or a device, failed."""
    if isinstance(cause, (WithoutWordsError, ConnectionError, TimeoutError)):
        return True
    return isinstance(cause, RuntimeError) and bool(_OF_ANOTHER.search(str(cause)))
