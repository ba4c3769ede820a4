"""The tensors of a micro-batch: a packed prefix tree, a plain pack, or padded rows.

Shapes: R = rows (1 for a tree or a pack), T = positions of a row, N = predicted tokens of all completions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raydpo.data.shapes import PADDED_MULTIPLE, LayoutName, Shapes
from raydpo.model.segments import Body, Segments
from raydpo.model.tree import MIN_SAVED, PrefixTree
from raydpo.model.ulysses import SequenceGroup

__all__ = ["Layout", "Method", "PromptGroup", "lay_out", "shapes_of"]


@dataclass(frozen=True)
class PromptGroup:
    """One prompt and its completions; a pair is the group (chosen, rejected).

    Attributes:
        prompt: token ids, at least one.
        completions: token ids of each completion. One without tokens, the missing side of a completion alone, takes no part
            in the computation.
    """

    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]

    @property
    def sequences(self) -> list[np.ndarray]:
        """The prompt joined with each completion that has tokens."""
        return [np.concatenate([self.prompt, completion]) for completion in self.completions if len(completion)]


def shapes_of(groups: Sequence[PromptGroup]) -> Shapes:
    """Lengths of groups, for a plan."""
    return Shapes.of([group.prompt for group in groups], [[len(one) for one in group.completions] for group in groups])


@dataclass(frozen=True)
class Method:
    """A layout and its implementation of attention (None for padded rows: the model's own)."""

    layout: LayoutName
    body: Body | None = None

    def __str__(self) -> str:
        return self.layout if self.body is None else f"{self.layout} ({self.body} attention)"


PADDED = Method("padded")


@dataclass(frozen=True)
class Layout:
    """A micro-batch as tensors.

    Attributes:
        input_ids: [R, T].
        position_ids: [R, T], depth in the tree; None for padded rows, where the model counts positions.
        positions: [N], flat indices into R * T of the positions that predict completion tokens.
        targets: [N], the token that each of them predicts.
        lengths: tokens of each completion, in the order of groups and completions; they sum to N.
        segments: the tree for attention; None for padded rows.
        places: [n], for a part (see ``part``) the index of each of its predictions among all N; else None.
        tokens: positions of the whole micro-batch without padding.
        filled: [R], number of positions at the start of each row that are no padding; None = all are.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    positions: Tensor
    targets: Tensor
    lengths: tuple[int, ...]
    segments: Segments | None
    tokens: int
    places: Tensor | None = None
    filled: Tensor | None = None

    @property
    def real(self) -> Tensor | None:
        """Which positions are no padding, bool [R * T]; None = all."""
        if self.filled is None:
            return None
        width = self.input_ids.shape[1]
        return (torch.arange(width, device=self.filled.device) < self.filled[:, None]).flatten()

    def part(self, group: SequenceGroup) -> Layout:
        """This rank's part in ``group``: t = ceil(T / S) positions, and the n of N predictions made at them.

        A rank without predictions makes one that is ignored: every rank must take part in the head's collectives and have a
        gradient for its weight.
        """
        width = -(-self.input_ids.shape[1] // group.size)
        start = group.rank * width

        def cut(tensor: Tensor) -> Tensor:
            mine = tensor[:, start : start + width]
            return F.pad(mine, (0, width - mine.shape[1]))

        places = torch.nonzero((self.positions >= start) & (self.positions < start + width))[:, 0]
        positions, targets = self.positions[places] - start, self.targets[places]
        if not len(places):
            places, positions, targets = torch.tensor([sum(self.lengths)]), torch.tensor([0]), torch.tensor([0])
        return replace(
            self,
            input_ids=cut(self.input_ids),
            position_ids=cut(self.position_ids),
            positions=positions,
            targets=targets,
            segments=replace(self.segments, group=group),
            places=places,
            filled=torch.tensor([self.input_ids[:, start : start + width].shape[1]]),
        )

    def to(self, device: torch.device) -> Layout:
        """The layout on ``device``; the copy may still be running."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True), lambda segments: segments.to(device))

    def pin(self) -> Layout:
        """The layout in page-locked memory, from which a copy to a GPU overlaps with the GPU's work."""
        return self._each(Tensor.pin_memory, Segments.pin)

    def _each(self, change: Callable[[Tensor], Tensor], change_segments: Callable[[Segments], Segments]) -> Layout:
        changed = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **changed, segments=None if self.segments is None else change_segments(self.segments))


def lay_out(groups: Sequence[PromptGroup], method: Method = PADDED) -> Layout:
    """Build CPU tensors for the completions of ``groups``, in order."""
    sequences = [sequence for group in groups for sequence in group.sequences]
    completions = [completion for group in groups for completion in group.completions]
    lengths = tuple(len(completion) for completion in completions)
    targets = torch.from_numpy(np.concatenate(completions).astype(np.int64))
    # The last prompt token predicts the first completion token; the last completion token predicts none.
    stops = [len(sequence) - 1 for sequence in sequences]
    filled = (length for length in lengths if length)
    spans = [(row, stop - length, stop) for row, (stop, length) in enumerate(zip(stops, filled, strict=True))]
    if method.layout == "padded":
        input_ids = _padded(sequences)
        positions = [row * input_ids.shape[1] + np.arange(start, stop) for row, start, stop in spans]
        position_ids = segments = None
        filled = torch.tensor([stop + 1 for stop in stops])
    else:
        tree = PrefixTree.build(sequences, MIN_SAVED if method.layout == "tree" else None)
        input_ids, position_ids = torch.from_numpy(tree.token_ids)[None], torch.from_numpy(tree.depths)[None]
        positions = [tree.positions(*span) for span in spans]
        segments, filled = Segments.of(tree, method.body), None
    tokens = input_ids.numel() if filled is None else int(filled.sum())
    places = torch.from_numpy(np.concatenate(positions))
    return Layout(input_ids, position_ids, places, targets, lengths, segments, tokens, filled=filled)


def _padded(sequences: list[np.ndarray]) -> Tensor:
    """Right-padded rows [R, T]. Causal attention never sees padding on the right, so no attention mask is needed."""
    width = -(-max(map(len, sequences)) // PADDED_MULTIPLE) * PADDED_MULTIPLE
    rows = np.zeros((len(sequences), width), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        rows[row, : len(sequence)] = sequence
    return torch.from_numpy(rows)
