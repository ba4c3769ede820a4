"""Sizes of the random models and of the data of a check."""

from __future__ import annotations

from dataclasses import dataclass, replace

from raydpo.estimate.checked import MEASURED_SHAPE

__all__ = ["LLAMA_8B", "TINY", "Shape"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the random models and of the data.

    Attributes:
        vocabulary: of the models whose speed and memory are measured; ``small_vocabulary``: of the others.
        layers: the two numbers of layers from which figures of ``whole`` layers are extrapolated. few: of other models.
        pair: tokens of a prompt and of two completions.
        passes: positions of a scoring pass whose speed is measured.
        live: positions of a training's micro-batch that is compared with a scoring pass.
        planned: positions of a micro-batch whose memory is compared with the plan.
        matrix: rows and columns of the square matrices whose product is timed.
        host_numbers: numbers that an optimizer on the host updates.
        most_pairs: of a step with a measured budget.
        narrow: divisor of the widths in ``narrowed``.
    """

    name: str
    hidden: int
    inner: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    small_vocabulary: int
    layers: tuple[int, int]
    few: int
    whole: int
    pair: tuple[int, int, int]
    passes: tuple[int, ...]
    live: int
    planned: int
    matrix: int
    host_numbers: int
    most_pairs: int
    narrow: int

    @property
    def narrowed(self) -> Shape:
        """The shape with its widths divided by ``narrow``, for blocks that copy weights and train often."""
        widths = {name: getattr(self, name) // self.narrow for name in ("hidden", "inner", "heads", "key_heads")}
        return replace(self, name=f"{self.name}/{self.narrow}", **widths)


LLAMA_8B = Shape(
    name=MEASURED_SHAPE,
    hidden=4096,
    inner=14336,
    heads=32,
    key_heads=8,
    head_size=128,
    vocabulary=128_256,
    small_vocabulary=32_000,
    layers=(4, 8),
    few=2,
    whole=32,
    pair=(1024, 512, 512),
    passes=(4096, 16384, 32768),
    live=4096,
    planned=8192,
    matrix=8192,
    host_numbers=500_000_000,
    most_pairs=64,
    narrow=4,
)
"""Sizes of Llama 3 8B."""
TINY = Shape(
    name="tiny",
    hidden=64,
    inner=128,
    heads=4,
    key_heads=2,
    head_size=16,
    vocabulary=384,
    small_vocabulary=256,
    layers=(1, 2),
    few=2,
    whole=32,
    pair=(24, 12, 12),
    passes=(96, 192),
    live=96,
    planned=96,
    matrix=64,
    host_numbers=20_000,
    most_pairs=3,
    narrow=1,
)
"""For a CPU, where only the code is checked and the figures mean nothing."""
