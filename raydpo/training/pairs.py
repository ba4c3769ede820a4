"""Tokenised pairs with their reference log-probs, read by row number without copies."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch

from raydpo.data.facts import prompt_numbers
from raydpo.data.pairs import PAIR_MARGIN, PAIR_WEIGHT
from raydpo.data.shapes import Shapes
from raydpo.model.layout import PromptGroup
from raydpo.reference.pairs import SIDES

__all__ = ["TrainingPairs", "send"]


class TrainingPairs:
    """Rows of ``join_reference``. Columns of sums may be absent; they follow from the log-probs of the tokens. All columns
    of the reference may be absent, for an objective without a reference.

    Attributes:
        has_reference: whether the reference's values are known; otherwise they are 0.
        ids: name of each pair, ``source:row``.
        source_names: names of the sources, in order of first appearance.
        sources: number of the source of each pair, int [pairs].
        weights: weight of each source, float [sources].
        prompt_tokens, chosen_tokens, rejected_tokens: lengths, int [pairs].
        pair_weights, pair_margins: float [pairs], from ``data.weight_column`` and ``data.margin_column``; None if not set.
    """

    def __init__(self, table: pa.Table) -> None:
        table = table.combine_chunks()
        self.has_reference = "ref_chosen_logps" in table.column_names
        lists = ("prompt_ids", "chosen_ids", "rejected_ids")
        logps = ("ref_chosen_logps", "ref_rejected_logps") if self.has_reference else ()
        self._lists = {name: _Ragged(table[name]) for name in (*lists, *logps)}
        self._prompts = table.select(["prompt_ids"])
        self.ids = table["pair_id"]
        encoded = table["source"].combine_chunks().dictionary_encode()
        if isinstance(encoded, pa.ChunkedArray):
            encoded = encoded.combine_chunks()
        self.source_names: list[str] = encoded.dictionary.to_pylist()
        self.sources = encoded.indices.to_numpy()
        weights = table["weight"].to_numpy()
        self.weights = np.array([weights[self.sources == source][0] for source in range(len(self.source_names))])
        self.prompt_tokens, self.chosen_tokens, self.rejected_tokens = (self._lists[name].lengths for name in lists)
        self.pair_weights, self.pair_margins = (
            table[name].to_numpy() if name in table.column_names else None for name in (PAIR_WEIGHT, PAIR_MARGIN)
        )
        if not self.has_reference:
            self.ref_chosen, self.ref_rejected = np.zeros(len(self.ids)), np.zeros(len(self.ids))
            return
        self.ref_chosen, self.ref_rejected = (
            table[f"ref_{side}_sum"].to_numpy()
            if f"ref_{side}_sum" in table.column_names
            else self._lists[f"ref_{side}_logps"].sums()
            for side in SIDES
        )

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def shapes(self) -> Shapes:
        """Lengths and shared tokens of the pairs, for the batch plan."""
        prompts = self._lists["prompt_ids"]
        completions = np.stack([self.chosen_tokens, self.rejected_tokens], axis=1).tolist()
        return Shapes.of([prompts[row] for row in range(len(self))], completions)

    @cached_property
    def prompts(self) -> np.ndarray:
        """Number of the prompt of each pair among the distinct ones, int64 [pairs]."""
        return prompt_numbers(self._prompts)

    def groups(self, rows: Sequence[int]) -> list[PromptGroup]:
        """The pairs in ``rows``, each as a group (chosen, rejected)."""
        prompts, chosen, rejected = (self._lists[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        return [PromptGroup(prompts[row], (chosen[row], rejected[row])) for row in rows]

    def source_of(self, rows: Sequence[int] | np.ndarray, device: torch.device) -> torch.Tensor:
        """Source numbers of ``rows``, int64 [rows]."""
        return send(self.sources[np.asarray(rows)].astype(np.int64), device)

    def reference(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Reference log-probs of the tokens of a pair's chosen and rejected completion; NaN if only their sum is known."""
        return self._lists["ref_chosen_logps"][row], self._lists["ref_rejected_logps"][row]

    def reference_tails(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Sums of the reference log-probs of tokens beyond the length of the shorter completion, float64 [rows]."""
        tails = np.array(
            [[side[min(map(len, sides)) :].sum(dtype=np.float64) for side in sides] for sides in map(self.reference, rows)]
        )
        return tails[:, 0], tails[:, 1]

    def sums_only(self) -> np.ndarray:
        """Rows of which only the sums of the reference log-probs are known."""
        return np.array([row for row in range(len(self)) if not self.has_tokens(row)], dtype=np.int64)

    def has_tokens(self, row: int) -> bool:
        """Whether the reference log-probs of this pair's tokens are known, not only their sums."""
        return not any(np.isnan(values[0]) for values in self.reference(row))


def send(values: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """Copy ``values`` to ``device``. A GPU copies from page-locked memory, and nobody waits: a copy from other memory would
    wait until all that the GPU was asked to compute is done, and then the GPU for what it is asked next."""
    tensor, device = torch.from_numpy(values), torch.device(device)
    return tensor.to(device) if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class _Ragged:
    """A list column as one flat array and offsets."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        array = column.combine_chunks()
        array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
        self.offsets = array.offsets.to_numpy()
        self.flat = array.values.to_numpy()

    def __getitem__(self, row: int) -> np.ndarray:
        return self.flat[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def sums(self) -> np.ndarray:
        """float64 [rows]; every row has at least one value."""
        return np.add.reduceat(self.flat[: self.offsets[-1]].astype(np.float64), self.offsets[:-1])
