"""Limits of the figures of a check.

The gaps in nats a token are for random weights (normal, 0.02) of Llama 3 8B's widths. On a CPU, two such layers in bfloat16
were 0.0138 from float32, with fused functions 0.0134, and the two 0.0068 from each other; a wrong layout gives 0.1 and more.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CPU_LIMITS", "GPU_LIMITS", "Limits"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of the figures. None = the figure is told and not compared.

    Attributes:
        driver: oldest driver that runs the CUDA 13 libraries.
        gemm, attention: least share of the data sheet's peak of a large product, and of attention's forward pass.
        body: largest relative error of attention; body_ratio: the same as a multiple of SDPA's own.
        head32, head16: largest relative error of log-probs and gradients of the head, in float32 and bfloat16.
        gap: mean difference of cached and live log-probs, nats a token.
        loss: difference of the first loss from ln 2, beside what the gaps explain. most_loss: with what they explain.
        plan: largest relative difference of planned and measured memory. reserved: reserved through allocated memory.
        room: least and largest peak as a share of the memory that the budget was measured for.
        resumed, resumed8: relative difference of the weights of a resumed run, and of one with 8-bit moments.
        first: least and largest first update, as a share of the learning rate.
        host: nanoseconds that AdamW on the host takes a number; slowdown: of a step with activations on the host.
        fused: gap of fused functions to plain ones, nats a token; fused_ratio: of their gap to float32 through that of plain
            ones; fused_gain: goal of what they gain in scoring.
        bfloat16, layout: mean gap to float32, and between two layouts or bodies, nats a token. cosine: of gradients.
        score, full, lora: goals of the MFU.
    """

    driver: int | None = 580
    gemm: float | None = 0.6
    attention: float | None = 0.25
    body: float = 0.01
    body_ratio: float = 1.5
    head32: float = 1e-5
    head16: float = 4e-3
    gap: float = 0.02
    loss: float = 1e-3
    most_loss: float = 0.01
    plan: float | None = 0.08
    reserved: float | None = 1.10
    room: tuple[float, float] | None = (0.70, 0.97)
    resumed: float = 1e-6
    resumed8: float = 1e-3
    first: tuple[float, float] = (0.99, 1.01)
    host: float | None = 1.5
    slowdown: float | None = 1.35
    fused: float = 0.03
    fused_ratio: float = 1.2
    fused_gain: float | None = 0.10
    bfloat16: float = 0.03
    layout: float = 0.01
    cosine: float = 0.9999
    recompiles: int = 2
    score: float | None = 0.50
    full: float | None = 0.45
    lora: float | None = 0.42


GPU_LIMITS = Limits()
"""The limits of a GPU."""
CPU_LIMITS = Limits(
    driver=None,
    gemm=None,
    attention=None,
    plan=None,
    reserved=None,
    room=None,
    host=None,
    slowdown=None,
    fused_gain=None,
    score=None,
    full=None,
    lora=None,
)
"""A CPU has no speed to prove, and torch does not count its memory."""
