"""The reference's forward pass: groups of completions in, log-probs per token out. Needs torch only."""

from __future__ import annotations

import dataclasses
import gc
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import transformers

from raydpo.data.plan import MicroBatch, fill_batches, split_over_ranks
from raydpo.data.prefetch import prefetch
from raydpo.data.shapes import LayoutName, cut_group
from raydpo.errors import ModelError
from raydpo.model.budget import MOST_SCORED, Needs, find_budget, is_out_of_memory, probe_groups
from raydpo.model.files import model_files
from raydpo.model.fused import fuse_layers
from raydpo.model.layout import Layout, PromptGroup, shapes_of
from raydpo.model.limits import longest_sequence
from raydpo.model.load import load_causal_lm
from raydpo.model.logps import LogpModel
from raydpo.model.partition import Partition, partitioned, partitioned_loading
from raydpo.model.recall import Recall
from raydpo.model.selfcheck import CHECK_ROWS, Wish, choose_layout, logps_by_definition, share_positions
from raydpo.model.sliced import Progress
from raydpo.model.ulysses import SequenceGroup
from raydpo.reference.identity import ReferenceIdentity, proved_here
from raydpo.storage.local_copy import RemoteDirectory
from raydpo.version import __version__

__all__ = ["ReferenceSpec", "Scorer", "refuse_difference"]

LOADED_TWICE_BYTES = 2 << 30
"""Largest model that is loaded twice for the check of one worker: a second or two."""
_WHOLE = Partition()
SAMPLE_PROMPT, SAMPLE_COMPLETION = 96, 48
"""Tokens of a group's prompt, and of a completion, that are scored to compare two loads."""
SAME = {"float32": 5e-5, "bfloat16": 0.1}
"""Largest mean difference of two loads of the same model, nats a token, by precision. Equal machines give equal bits, other
ones differ by rounding; random weights differ by 0.1 or more."""


@dataclass(frozen=True, kw_only=True)
class ReferenceSpec:
    """Specification of the reference: what a process needs to load it and to check that it is the right one."""

    path: str
    adapter: str | None
    identity: ReferenceIdentity
    quantization: str | None = None
    trust_remote_code: bool = False
    layout: Wish = "auto"
    fused: bool = False
    origin: RemoteDirectory | None = None
    """Remote directory that the adapter, or without one the model, was copied from; None if every machine has it."""


class Scorer:
    """The reference on one device, or this process's share of it.

    Args:
        spec: the model. Its weights are hashed here, too: a node with other files under the same path is detected.
        device: ``cuda`` or ``cpu``.
        tokens_per_batch: token positions of a forward pass on this device, or ``auto``: as many as fit, measured here.
        memory_share: share of the device's memory that belongs to this process.
        check_rows: a few groups of the data, for the self-check of the layout.
        group: processes that compute each forward pass together; all of them score the same groups (see ``reference.team``).
        partition: where the weights are. If it is active, all processes of torch.distributed hold them together, and score
            the same groups: each ``group`` of processes computes some of them.
        alone: no other worker loads the model, so load it twice here to see whether both loads give the same log-probs. That
            is done for models of up to ``LOADED_TWICE_BYTES``, and for larger ones that bring their own code.
        progress: told how far loading is.

    Attributes:
        notes: messages for the user: the layout and why it was chosen, the measured budget, a batch that did not fit.
        sample: log-probs of ``check_rows``, shortened, by the plain model: float32 [tokens]. Equal in all workers.

    Raises:
        ModelError: if the files here are another model than ``spec.identity``, cannot be scored exactly, or give other
            log-probs each time they are loaded.
    """

    def __init__(
        self,
        spec: ReferenceSpec,
        *,
        device: str,
        tokens_per_batch: int | Literal["auto"],
        memory_share: float = 1.0,
        check_rows: Sequence[PromptGroup] = (),
        group: SequenceGroup | None = None,
        partition: Partition = _WHOLE,
        alone: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self._progress = progress
        self.device, self.partition = torch.device(device), partition
        self._size = 1 if group is None else group.size
        self._team = group is not None or partition.active
        self.notes: list[str] = []
        recall = self._recall(spec)
        # Loading in parts ends when all processes have read, so it is enough that the first hashes the files after that.
        prove = not partition.active or dist.get_rank() == 0
        with proved_here(spec, prove=prove), partitioned_loading(partition, spec.identity.dtype):
            twice = alone and check_rows and not recall.known("loaded twice") and _loaded_twice(spec)
            earlier = self._sample(self._load(spec), check_rows) if twice else None
            if partition.active:
                gc.collect()  # DeepSpeed's hooks and the model refer to each other
            self.model = self._load(spec)
        self.sample = self._sample(self.model, check_rows)
        if earlier is not None:
            refuse_difference(spec, earlier, self.sample, "loaded twice by one worker")
            recall.keep("loaded twice", True)
        self.notes.append(choose_layout(self.model, self.device, spec.layout, check_rows, recall).line)
        if spec.fused:
            self.notes.append(fuse_layers(self.model, self.device, recall))
        if group is not None:
            self.notes.append(share_positions(self.model, self.device, group, check_rows))
        self.tokens_per_batch = self._budget(recall, memory_share) if tokens_per_batch == "auto" else tokens_per_batch
        self._backed_off = False

    def _recall(self, spec: ReferenceSpec) -> Recall:
        """What is known of the model as it is computed here, to all processes that check together."""
        model = [spec.identity.to_dict(), spec.fused]
        if not self._team:
            return Recall(model, self.device)
        model += [self._size, self.partition.size, self.partition.offload]
        return Recall(model, self.device, lambda known: bool(self._least(known)))

    def _least(self, value: int) -> int:
        """The smallest ``value`` of the processes of a team."""
        if not self._team:
            return value
        agreed = torch.tensor(int(value), device=self.device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        return int(agreed)

    def _budget(self, recall: Recall, share: float) -> int:
        """Positions of a pass that fit on this device, and on those of the other processes of a team."""
        gathered = self.model.gathered_bytes if self.partition.active else None
        needs = None if gathered is None else Needs(step=lambda _: gathered, probe=lambda _: 0.0)
        room = {"most": MOST_SCORED, "share": share, "needs": needs, "known": recall.known("scoring")}
        budget = find_budget(self._probe, self.device, **room, agree=lambda value: bool(self._least(value)))
        recall.keep("scoring", budget.bytes_per_token)
        line = dataclasses.replace(budget, step_bytes=None).line()
        if gathered is not None:
            line = f"{line[:-1]}, {gathered / 2**30:.1f} of it for gathered weights)"
            if budget.step_bytes > budget.free_bytes:
                line = f"warning: {line}; that does not fit. Set score.partition higher, or score.offload=cpu"
        self.notes.append(line)
        return self._least(budget.tokens)

    def _load(self, spec: ReferenceSpec) -> LogpModel:
        torch.seed()  # every process begins with the same seed, with which random weights would agree
        model = LogpModel(
            load_causal_lm(
                spec.path,
                spec.identity.dtype,
                adapter=spec.adapter,
                device="cpu" if self.partition.active else self.device,  # DeepSpeed moves what it partitions
                quantization=spec.quantization,
                rope_length=spec.identity.rope_length,
                trust_remote_code=spec.trust_remote_code,
                progress=self._progress,
                note=self.notes.append,
            )
        )
        if self.partition.active:
            return partitioned(model, self.partition, spec.identity.dtype)
        return model.eval().requires_grad_(False)

    @torch.no_grad()
    def _sample(self, model: LogpModel, rows: Sequence[PromptGroup]) -> np.ndarray:
        short = [
            PromptGroup(row.prompt[-SAMPLE_PROMPT:], tuple(one[:SAMPLE_COMPLETION] for one in row.completions[:2]))
            for row in rows[:CHECK_ROWS]
        ]
        found = [logps_by_definition(model.causal_lm, group, self.device) for group in short]
        return np.concatenate(found) if found else np.empty(0, np.float32)

    def score(self, groups: Sequence[PromptGroup]) -> list[tuple[np.ndarray, ...]]:
        """Score completions.

        A group larger than a batch is computed in several batches; a single completion larger than a batch, alone. The first
        batch that does not fit in memory halves the budget for all later ones, with a note; a second one raises.

        Returns:
            float32 log-probs [tokens] of each completion, in the order of ``groups`` and their completions.
        """
        if not groups:
            return []
        pieces = [self._pieces(group) for group in groups]
        score = self._score_shares if self.partition.active else self._score_pieces
        scored = iter(score([piece for each in pieces for piece in each]))
        return [tuple(logps for _ in each for logps in next(scored)) for each in pieces]

    def _pieces(self, group: PromptGroup) -> list[PromptGroup]:
        lengths, most = [len(one) for one in group.completions], self.tokens_per_batch * self._size
        runs = cut_group(len(group.prompt), lengths, most, self.model.method.layout)
        return [PromptGroup(group.prompt, group.completions[start:stop]) for start, stop in runs]

    def _score_pieces(self, groups: Sequence[PromptGroup]) -> list[tuple[np.ndarray, ...]]:
        scored: list[tuple[np.ndarray, ...]] = [()] * len(groups)
        fits = True
        most, method = self.tokens_per_batch * self._size, self.model.method
        batches = fill_batches(range(len(groups)), shapes_of(groups), most, method.layout)
        try:
            for batch, layout in self._laid_out(groups, batches):
                rows = [groups[index] for index in batch]
                for index, logps in zip(batch, self.model.score_layout(layout.to(self.device), rows), strict=True):
                    scored[index] = logps
        except (RuntimeError, MemoryError) as error:
            # Processes of a team must not back off alone: they would compute different batches.
            if not is_out_of_memory(error) or self._backed_off or self._size > 1:
                raise
            fits = False
        if not fits:  # not within ``except``, where the traceback still refers to the activations
            self._back_off()
        left = [index for index, logps in enumerate(scored) if not logps]
        for index, logps in zip(left, self.score([groups[index] for index in left]), strict=True):
            scored[index] = logps
        return scored

    def _score_shares(self, groups: Sequence[PromptGroup]) -> list[tuple[np.ndarray, ...]]:
        """Compute this replica's share of ``groups`` and exchange the log-probs."""
        lengths = [[len(one) for one in group.completions] for group in groups]
        starts = np.cumsum([0, *(sum(each) for each in lengths)])
        found = np.zeros(starts[-1], np.float32)
        # A stand-in is computed for its gathers alone, so it is as short as a group can be.
        short = PromptGroup(groups[0].prompt[:1], (groups[0].completions[0][:1],))
        shares = self.shares(groups)
        batches = [list(batch.pairs) if batch.counts else [len(groups)] for batch in shares[dist.get_rank() // self._size]]
        for batch, layout in self._laid_out([*groups, short], batches):
            rows = [groups[index] if index < len(groups) else short for index in batch]
            for index, logps in zip(batch, self.model.score_layout(layout.to(self.device), rows), strict=True):
                if index < len(groups):
                    found[starts[index] : starts[index + 1]] = np.concatenate(logps)
        if dist.get_rank() % self._size:
            found[:] = 0  # the first of its group tells what all of it have
        # As integers: the sum of the bits and of zeros is these bits, for every float.
        bits = torch.from_numpy(found.view(np.int32)).to(self.device)
        dist.all_reduce(bits)
        found = bits.cpu().numpy().view(np.float32)
        return [
            tuple(np.split(found[start:stop], np.cumsum(each)[:-1]))
            for start, stop, each in zip(starts, starts[1:], lengths, strict=False)
        ]

    def shares(self, groups: Sequence[PromptGroup]) -> list[list[MicroBatch]]:
        """Micro-batches of each replica of a team with partitioned weights, as indices into ``groups``; each has as many."""
        replicas, most = dist.get_world_size() // self._size, self.tokens_per_batch * self._size
        how = {"world_size": replicas, "tokens_per_batch": most, "layout": self.model.method.layout}
        return split_over_ranks(range(len(groups)), lambda rows: shapes_of([groups[row] for row in rows]), **how)

    def _laid_out(self, groups: Sequence[PromptGroup], batches: Iterable[list[int]]) -> Iterator[tuple[list[int], Layout]]:
        def prepare(batch: list[int]) -> tuple[list[int], Layout]:
            layout = self.model.lay_out([groups[index] for index in batch])
            return batch, layout.pin() if self.device.type == "cuda" else layout

        return prefetch(batches, prepare)

    def _back_off(self) -> None:
        self._backed_off = True
        halved = max(1, self.tokens_per_batch // 2)
        self.notes.append(
            f"warning: out of memory with {self.tokens_per_batch} positions a batch; continuing with "
            f"{halved}. Set score.tokens_per_batch={halved} to start with that"
        )
        self.tokens_per_batch = halved
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _probe(self, tokens: int) -> object:
        longest = longest_sequence(self.model.causal_lm)
        return self.model.score(probe_groups(tokens * self._size, self.model.vocabulary, longest), self.device)

    @property
    def layout(self) -> LayoutName:
        """The layout in use."""
        return self.model.method.layout

    @property
    def provenance(self) -> dict[str, object]:
        """Hardware and software that made the numbers, for people; not part of the identity."""
        cuda = self.device.type == "cuda"
        return {
            "raydpo": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name(self.device) if cuda else platform.processor() or platform.machine(),
            "layout": f"{self.model.method}{', fused' if self.model.head.fused else ''}",
            "tokens_per_batch": self.tokens_per_batch,
            "threads": torch.get_num_threads(),
            **({"sequence_parallel": self._size} if self._size > 1 else {}),
            **({"partition": self.partition.size, "offload": self.partition.offload} if self.partition.active else {}),
        }

    def close(self) -> None:
        """Nothing to end; for callers that may have a ``TeamScorer``."""


def _loaded_twice(spec: ReferenceSpec) -> bool:
    files = model_files(spec.path, spec.trust_remote_code)
    return files.runs_code or sum(file.stat().st_size for file in files.weights) <= LOADED_TWICE_BYTES


def refuse_difference(spec: ReferenceSpec, one: np.ndarray, other: np.ndarray, how: str) -> None:
    """Refuse a model of which two loads give different log-probs of the same rows.

    Args:
        one, other: ``Scorer.sample`` of both loads.
        how: how it was loaded, for the message.

    Raises:
        ModelError: with the difference.
    """
    if np.array_equal(one, other, equal_nan=True):  # NaN on both sides has an error of its own
        return
    gap = float(np.abs(one - other).mean())
    if not gap <= SAME[spec.identity.dtype]:
        what = f"{spec.path} with adapter {spec.adapter}" if spec.adapter else spec.path
        raise ModelError(
            f"the model {what} is not a function of its files: {how}, it gives log-probs of the same rows that differ by "
            f"{gap:.2g} nats a token (tolerance {SAME[spec.identity.dtype]:g}), so stored ones would belong to no model. "
            "Its own Python code may draw random numbers when it is loaded or called, or a machine computes wrongly"
        )
