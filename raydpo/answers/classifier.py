"""Scores of token sequences by a sequence classifier with one output, in padded batches of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from raydpo.errors import one_line

__all__ = ["Classifier"]

BATCH_TOKENS = 8192
"""Largest number of positions of a batch, padding included; a single longer sequence is a batch of its own."""
CPU_BATCH_TOKENS = 1024
"""The same on a CPU, which a few hundred positions keep busy."""
BATCH_ROWS = 64
"""Largest number of sequences of a batch."""
FLOAT32_TOLERANCE = 1e-4
"""Largest difference that padding may make in float32, as a share of the largest score of the check."""
ROUNDINGS = 8
"""The same in lower precision, in units of its rounding error."""


class Classifier:
    """A loaded classifier. It scores padded batches if padding does not change its scores, else one sequence at a time.

    Attributes:
        alone: why it scores one sequence at a time; None = it scores batches.
    """

    def __init__(self, model: Any, probes: Sequence[Sequence[int]]) -> None:
        """Compare the scores of ``probes``, sequences of token ids of different lengths, alone and in one padded batch."""
        self._model = model
        self._settings = model.config.get_text_config()
        self._has_padding = getattr(self._settings, "pad_token_id", None) is not None
        self.alone = self._why_alone(probes)

    def scores(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the score of each sequence of token ids, float64 [rows]; it may be NaN or infinite.

        The last digits depend on the other sequences of the batch, which follow from ``rows`` alone.
        """
        found = np.empty(len(rows))
        most = CPU_BATCH_TOKENS if self._model.device.type == "cpu" else BATCH_TOKENS
        lengths = [len(row) for row in rows]
        for batch in [[place] for place in range(len(rows))] if self.alone else _batches(lengths, most):
            found[batch] = self._forward([rows[place] for place in batch])
        return found

    @torch.no_grad()
    def _forward(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        device = self._model.device
        if len(rows) == 1:
            if not self._has_padding:
                self._settings.pad_token_id = None  # that of a batch before may end this sequence
            logits = self._model(input_ids=torch.tensor([list(rows[0])], device=device)).logits
            return logits[:, 0].float().double().cpu().numpy()
        longest, padding = max(map(len, rows)), self._padding(rows)
        ids = torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
        return self._model(input_ids=ids, attention_mask=mask).logits[:, 0].float().double().cpu().numpy()

    def _padding(self, rows: Sequence[Sequence[int]]) -> int:
        """The token id to pad with. A causal classifier scores the last token that is not this one, so a model that names
        none gets an id that ends no sequence of the batch: each is then scored at its last token, as it is alone."""
        if not self._has_padding:
            last = {row[-1] for row in rows}
            self._settings.pad_token_id = next(number for number in range(len(last) + 1) if number not in last)
        return self._settings.pad_token_id

    def _why_alone(self, probes: Sequence[Sequence[int]]) -> str | None:
        if len({len(probe) for probe in probes}) < 2:
            return "it has too few positions to compare sequences of different lengths"
        singly = np.concatenate([self._forward([probe]) for probe in probes])
        try:
            together = self._forward(probes)
        except Exception as error:  # models refuse batches or padding in ways of their own
            return f"it refuses padded batches ({type(error).__name__}: {one_line(error, 200)})"
        precision = next(self._model.parameters()).dtype
        allowed = FLOAT32_TOLERANCE if precision == torch.float32 else ROUNDINGS * torch.finfo(precision).eps
        difference, largest = float(np.abs(together - singly).max()), float(np.abs(singly).max())
        if together.shape == singly.shape and difference <= allowed * largest:  # false for NaN, too
            return None
        return f"padding changes its scores (by {difference:.2g}, where the largest is {largest:.2g})"


def _batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Divide the places of sequences into batches of at most so many positions, the longest first."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        if batch and (len(batch) == BATCH_ROWS or (len(batch) + 1) * lengths[batch[0]] > most):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
