"""Moments of AdamW under torch's names and in float32, whichever library keeps them and in however many bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raydpo.training.policy.host_memory import host_copy

__all__ = ["PIECE", "Moment", "begin_moments", "moments_of"]

BLOCK = 256
"""Numbers that share a scale in bitsandbytes' 8-bit optimizers."""
PIECE = BLOCK << 14
"""Numbers that are converted at once."""
_THEIRS = {"state1": "exp_avg", "state2": "exp_avg_sq"}
"""bitsandbytes' names of the moments, and torch's."""


@dataclass(frozen=True)
class Moment:
    """One moment of a flat tensor.

    Attributes:
        tensor: its numbers, in the flat tensor's shape.
    """

    tensor: Tensor

    def read(self, start: int, numel: int) -> Tensor:
        """Copy ``numel`` numbers from ``start`` to the CPU."""
        return host_copy(self.tensor.view(-1).narrow(0, start, numel))

    def write(self, start: int, values: Tensor) -> None:
        """Set the numbers from ``start``, a multiple of ``PIECE``."""
        self.tensor.view(-1).narrow(0, start, values.numel()).copy_(values)


@dataclass(frozen=True)
class QuantizedMoment(Moment):
    """A moment of bitsandbytes: 8 bits a number, block by block (arXiv 2110.02861).

    Attributes:
        tensor: an index into ``code`` for each number. Paged ones are a CPU tensor, whose memory a GPU can read, too.
        scales: a factor for each block of ``BLOCK`` numbers, the last one may be shorter.
        code: the 256 values that a number may have before it is multiplied, in ascending order.
    """

    scales: Tensor
    code: Tensor

    def read(self, start: int, numel: int) -> Tensor:
        found = torch.empty(numel)
        for first in range(0, numel, PIECE):
            count = min(PIECE, numel - first)
            places = torch.arange(start + first, start + first + count, device=self.scales.device)
            indices = self.tensor.view(-1).narrow(0, start + first, count).to(self.scales.device).int()
            found[first : first + count] = self.code[indices] * self.scales[places // BLOCK]
        return found

    def write(self, start: int, values: Tensor) -> None:
        """Set the numbers from ``start``. What ``read`` returned becomes the same numbers again, to the bit.

        bitsandbytes takes the largest magnitude of a block as its scale. But in its signed code the lowest value is -0.993,
        so a block whose largest magnitude is negative comes back with a lower scale and other numbers. Here the scale is the
        one that gives the block's numbers with the least error.
        """
        numel = values.numel()
        blocks = torch.nn.functional.pad(values.to(self.scales.device), (0, -numel % BLOCK)).view(-1, BLOCK)
        largest = blocks.abs().amax(dim=1)
        tiny = torch.finfo(largest.dtype).tiny
        least, scales, codes = torch.full_like(largest, torch.inf), largest, torch.zeros_like(blocks, dtype=torch.uint8)
        for scale in self._scales(largest):
            indices = self._nearest(blocks / scale.clamp_min(tiny)[:, None])
            error = self.code[indices] * scale[:, None] - blocks
            error = (error / largest.clamp_min(tiny)[:, None]).square().sum(dim=1)  # squares of small moments would be 0
            better = error < least
            least, scales = torch.where(better, error, least), torch.where(better, scale, scales)
            codes = torch.where(better[:, None], indices.to(torch.uint8), codes)
        self.tensor.view(-1).narrow(0, start, numel).copy_(codes.view(-1)[:numel])
        self.scales.narrow(0, start // BLOCK, len(scales)).copy_(scales)

    def _scales(self, largest: Tensor) -> list[Tensor]:
        """Scales that a block with this largest magnitude may have been written with."""
        lowest = -self.code[0]
        if lowest <= 0:  # the second moment's code has no sign
            return [largest]
        # The product of scale and lowest value was rounded. The quotient is off by one unit in the last place at most; with
        # a number of Python in place of a tensor a GPU would multiply by its reciprocal, which may be off by two.
        bits = (largest / lowest).view(torch.int32)
        return [largest, *((bits + units).view(torch.float32) for units in (0, 1, -1))]

    def _nearest(self, numbers: Tensor) -> Tensor:
        """Indices of the values of the code that are nearest to ``numbers``."""
        return torch.bucketize(numbers, (self.code[1:] + self.code[:-1]) / 2)


def moments_of(state: Mapping[str, Any], flat: Tensor) -> dict[str, Moment]:
    """The moments of ``flat`` by name. ``state``: what the optimizer keeps for it; empty before the first step."""
    found: dict[str, Moment] = {}
    for kind, value in state.items():
        if not torch.is_tensor(value) or not value.dim() or value.shape != flat.shape:
            continue
        if value.dtype == torch.uint8:
            number = kind.removeprefix("state")
            found[_THEIRS[kind]] = QuantizedMoment(value, state[f"absmax{number}"], state[f"qmap{number}"])
        else:
            found[_THEIRS.get(kind, kind)] = Moment(value)
    return found


def begin_moments(optimizer: torch.optim.Optimizer, flat: Tensor, steps: int) -> dict[str, Moment]:
    """Make the state of ``flat`` after ``steps`` steps; the caller fills the moments."""
    if not steps:
        return {}
    state = optimizer.state[flat]
    if not state:
        if hasattr(optimizer, "init_state"):
            _begin_theirs(optimizer, flat)
        else:
            fused = optimizer.defaults.get("fused")
            dtypes = getattr(optimizer, "MOMENTS", dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.float32))
            state["step"] = torch.tensor(0.0, device=flat.device if fused else "cpu")
            for kind, dtype in dtypes.items():  # earlier versions wrote a second moment in bfloat16, which is widened
                state[kind] = torch.zeros_like(flat, dtype=dtype, requires_grad=False)
    if torch.is_tensor(state["step"]):
        state["step"].fill_(float(steps))
    else:
        state["step"] = steps
    return moments_of(state, flat)


def _begin_theirs(optimizer: Any, flat: Tensor) -> None:
    """Make bitsandbytes' state of ``flat``, which must be among the parameters. Under ZeRO-3 it is so during a step only."""
    group = optimizer.param_groups[0]
    shown, group["params"] = group["params"], [flat]
    try:
        optimizer.init_state(group, flat, 0, 0)
    finally:
        group["params"] = shown
