"""The reference on several devices of one machine: processes that score together.

For sequences too long for one device (``score.sequence_parallel``, see ``model.ulysses``), and for models too large for one
(``score.partition``, see ``model.partition``). This process is the first of the team. It starts the others, sends them what
to score, and computes its own share. Needs torch; DeepSpeed only if weights are partitioned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from raydpo.errors import RaydpoError, one_line
from raydpo.model.budget import is_out_of_memory
from raydpo.model.layout import PromptGroup
from raydpo.model.partition import Partition, join_process_group
from raydpo.model.ulysses import SequenceGroup
from raydpo.reference.members import Members
from raydpo.reference.score import ReferenceSpec, Scorer

__all__ = ["TeamScorer", "open_scorer"]

PATIENCE = timedelta(minutes=10)
"""Timeout of collectives: how long to wait for a process that does not answer."""


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
    scorer: dict[str, Any]

    def join(self, store: dist.TCPStore | None = None) -> Scorer:
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
            timeout=PATIENCE,
        )
        if self.partition.active:
            join_process_group(torch.device(device))
        group = SequenceGroup.of_world(self.sequence, PATIENCE)
        return Scorer(device=device, group=group, partition=self.partition, **self.scorer)


class TeamScorer:
    """A ``Scorer`` on several devices, each with a process. A process has at most one; the machine must have the devices.

    Args:
        sequence: processes that compute each forward pass together, each a part of its positions.
        partition: where the weights are. Its size is 1, so that each process has all weights, or a multiple of ``sequence``.
        threads: CPU threads of each process; None = torch's default.
        tokens_per_batch: share of one device. This and the rest: as ``Scorer``.

    Attributes:
        members: the other processes.

    Raises:
        RaydpoError: what ``Scorer`` raises, here or in another process of the team.
    """

    def __init__(
        self,
        spec: ReferenceSpec,
        *,
        device: Literal["cuda", "cpu"],
        sequence: int = 1,
        partition: Partition = Partition(),  # noqa: B008 (frozen)
        threads: int | None = None,
        tokens_per_batch: int | Literal["auto"],
        memory_share: float = 1.0,
        check_rows: Sequence[PromptGroup] = (),
        alone: bool = False,
    ) -> None:
        size = max(sequence, partition.size)
        store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
        settings = {
            "spec": spec,
            "tokens_per_batch": tokens_per_batch,
            "memory_share": memory_share,
            "check_rows": list(check_rows),
            "alone": alone,
        }
        setups = [_Setup(rank, size, store.port, device, threads, sequence, partition, settings) for rank in range(size)]
        self.members = Members(size - 1)
        with self._explained():
            self.members.tell(setups[1:])
            self._scorer = setups[0].join(store)

    def score(self, groups: Sequence[PromptGroup]) -> list[tuple[np.ndarray, ...]]:
        """As ``Scorer.score``, but a batch that does not fit in memory is not retried.

        Raises:
            RaydpoError: if a process of the team failed, with its reason.
        """
        with self._explained():
            self.members.tell([list(groups)] * len(self.members.processes))
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

    def close(self) -> None:
        """End the other processes and leave the process group."""
        self.members.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise the error of the process that failed. The other processes only notice that it has ended."""
        try:
            yield
        except Exception as error:
            causes = [error] if isinstance(error, RaydpoError) else [error, *self.members.last_words()]
            self.close()
            for cause in causes:
                if isinstance(cause, RaydpoError):
                    raise cause from None
                if is_out_of_memory(cause):
                    raise RaydpoError(
                        "a forward pass does not fit on one of the devices that compute it together: "
                        f"{str(cause).splitlines()[0][:200]}. Set score.tokens_per_batch lower, or "
                        "score.sequence_parallel higher"
                    ) from error
            told = [f"{type(cause).__name__}: {one_line(cause, 300)}" for cause in causes[1:] or causes]
            raise RaydpoError(f"a process of the scoring team failed: {'; '.join(told)}") from error
