"""How a micro-batch becomes tensors: as one packed prefix tree, as a plain pack, or as padded rows.

Shapes: R = rows (1 for a tree or a pack), T = positions of a row, N = predicted tokens of all completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raydpo.data.shapes import PADDED_MULTIPLE, LayoutName, Shapes
from raydpo.model.attention import Body, Segments
from raydpo.model.tree import MIN_SAVED, PrefixTree
from raydpo.model.ulysses import SequenceGroup

__all__ = ["Layout", "Method", "PromptGroup", "lay_out", "shapes_of"]


@dataclass(frozen=True)
class PromptGroup:
    """One prompt and completions that answer it; a pair is the group (chosen, rejected).

    Attributes:
        prompt: token ids, at least one.
        completions: token ids of each completion, at least one each.
    """

    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]

    @property
    def sequences(self) -> list[np.ndarray]:
        """Prompt and completion of each, as the model reads them."""
        return [np.concatenate([self.prompt, completion]) for completion in self.completions]


def shapes_of(groups: Sequence[PromptGroup]) -> Shapes:
    """What a plan needs to know of groups."""
    return Shapes.of([group.prompt for group in groups], [[len(one) for one in group.completions] for group in groups])


@dataclass(frozen=True)
class Method:
    """Which layout, and what computes its attention (None for padded rows: the model's own)."""

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
        position_ids: [R, T], depth in the tree; None for padded rows, where the model counts by itself.
        positions: [N], flat indices into R * T of the positions that predict completion tokens.
        targets: [N], the token each of them predicts.
        lengths: completion tokens of each completion, in the order of groups and completions; they sum to N.
        segments: the tree for attention; None for padded rows.
        places: None, or of a part (see ``part``) where each of its predictions belongs among all N, [n].
    """

    input_ids: Tensor
    position_ids: Tensor | None
    positions: Tensor
    targets: Tensor
    lengths: tuple[int, ...]
    segments: Segments | None
    places: Tensor | None = None

    def part(self, group: SequenceGroup) -> Layout:
        """What this rank of ``group`` computes: t = ceil(T / S) positions, and the predictions made at them, n of N.

        A rank at whose positions nothing is predicted makes one prediction that nobody looks at, since every rank must take
        part in the head's collectives and have a gradient for its weight.
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
        return replace(self, input_ids=cut(self.input_ids), position_ids=cut(self.position_ids), positions=positions,
                       targets=targets, segments=replace(self.segments, group=group), places=places)

    def to(self, device: torch.device) -> Layout:
        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(self, input_ids=moved(self.input_ids), position_ids=moved(self.position_ids),
                       positions=moved(self.positions), targets=moved(self.targets), places=moved(self.places),
                       segments=None if self.segments is None else self.segments.to(device))

    def pin(self) -> Layout:
        """In page-locked memory, from which a copy to a GPU overlaps with what the GPU is doing."""
        def pinned(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.pin_memory()

        return replace(self, input_ids=pinned(self.input_ids), position_ids=pinned(self.position_ids),
                       positions=pinned(self.positions), targets=pinned(self.targets), places=pinned(self.places),
                       segments=None if self.segments is None else self.segments.pin())


def lay_out(groups: Sequence[PromptGroup], method: Method = PADDED, min_saved: int = MIN_SAVED) -> Layout:
    """Tensors on the CPU for the completions of ``groups``, in their order.

    Args:
        min_saved: see ``tree.MIN_SAVED``.
    """
    sequences = [sequence for group in groups for sequence in group.sequences]
    completions = [completion for group in groups for completion in group.completions]
    lengths = tuple(len(completion) for completion in completions)
    targets = torch.from_numpy(np.concatenate(completions).astype(np.int64))
    if method.layout == "padded":
        input_ids = _padded(sequences)
        width = input_ids.shape[1]
        # The last prompt token predicts the first completion token, and the last completion token nothing.
        positions = [row * width + np.arange(len(sequence) - length - 1, len(sequence) - 1)
                     for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True))]
        position_ids = segments = None
    else:
        tree = PrefixTree.build(sequences, min_saved if method.layout == "tree" else None)
        input_ids, position_ids = torch.from_numpy(tree.token_ids)[None], torch.from_numpy(tree.depths)[None]
        positions = [tree.positions(number, len(sequence) - length - 1, len(sequence) - 1)
                     for number, (sequence, length) in enumerate(zip(sequences, lengths, strict=True))]
        segments = Segments.of(tree, method.body)
    return Layout(input_ids, position_ids, torch.from_numpy(np.concatenate(positions)), targets, lengths, segments)


def _padded(sequences: list[np.ndarray]) -> Tensor:
    """Right-padded rows [R, T]. No attention mask is needed: in a causal model nothing looks to its right, and padded
    positions are never read."""
    width = -(-max(map(len, sequences)) // PADDED_MULTIPLE) * PADDED_MULTIPLE
    rows = np.zeros((len(sequences), width), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        rows[row, : len(sequence)] = sequence
    return torch.from_numpy(rows)
