"""Log-probs of given tokens from the vocabulary projection, without a [tokens, vocabulary] tensor.

On request a head also returns log sum_v p_v^2, the log-probability that two draws agree, without gradient.

Shapes: N = predicted tokens, H = hidden size, V = vocabulary size, C = rows of one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raydpo.model.kernels import head_slope, log_normaliser

__all__ = ["LogitTransform", "attach_logp_head", "chunk_rows"]

CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}
"""Most bytes of one chunk of float32 logits. Chunks are computed one after another, so memory for logits does not grow with
the number of tokens. Scoring holds one chunk. Training holds up to 2.5: with a soft cap also a copy, and with bfloat16
weights a copy in bfloat16."""
TILE, MOST_ROWS = 128, 2048
"""On a GPU the rows of a chunk are a multiple of ``TILE``, since a matrix product computes blocks of so many rows, and at
most ``MOST_ROWS``. A vocabulary of 128,256 has 2,048 rows, one of 262,144 has 1,024. With a quarter of them, adding to the
weight's gradient takes longer than the product."""
FLOAT32_BLOCK = 4096
"""Rows of a bfloat16 head that a CPU converts to float32 at a time."""

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names of the soft cap in configurations."""


@dataclass(frozen=True)
class LogitTransform:
    """An architecture's change of its logits after the projection: ``softcap * tanh(scale * logits / softcap)``."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        """Read a transformers configuration: Cohere's logit_scale, Granite's logits_scaling, the soft caps of Gemma and
        xLSTM."""
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        caps = (getattr(config, name, None) for name in SOFTCAPS)
        return cls(scale, next((cap for cap in caps if cap), None))

    def __call__(self, logits: Tensor) -> Tensor:
        """Transform float32 logits [C, V]; may work in place."""
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def backward_(self, grad: Tensor, transformed: Tensor) -> Tensor:
        """Turn the gradient of transformed logits into that of raw ones, in place. Both [C, V]."""
        if self.softcap is not None:
            grad.mul_(1.0 - (transformed / self.softcap).square_())
        if self.scale != 1.0:
            grad.mul_(self.scale)
        return grad


class _ChunkedLogps(torch.autograd.Function):
    """log softmax(transform(hidden @ weight.T + bias))[target] in chunks of rows.

    The gradient of a row's hidden state is its slope (d logp / d hidden) times a number from the loss. With a frozen head
    (adapters) the forward pass computes the slopes from its logits; otherwise the backward pass computes the logits again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, transform, grad_enabled, log_sum_sq=False, fused=False):
        wants_hidden, *wants_head = ctx.needs_input_grad[:3]
        ctx.frozen = grad_enabled and wants_hidden and not any(wants_head)
        ctx.transform = transform
        ctx.fused = fused = fused and bias is None
        logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        normalisers = torch.empty_like(logps)
        slopes = torch.empty_like(hidden) if ctx.frozen else None
        agreement = torch.empty_like(logps) if log_sum_sq else None
        for rows in _chunks(len(hidden), len(weight), hidden.device):
            logits = transformed = slope = None  # frees the chunk before this one
            logits = _project(hidden[rows], weight, bias)
            if fused:
                logps[rows] = transform(logits.gather(1, targets[rows, None]))[:, 0]
                normalisers[rows] = log_normaliser(logits, 1.0, transform.scale, transform.softcap)
                if log_sum_sq:
                    doubled = log_normaliser(logits, 2.0, transform.scale, transform.softcap)
                    agreement[rows] = doubled - 2 * normalisers[rows]
                if ctx.frozen:
                    factors = torch.ones_like(logps[rows])
                    slopes[rows] = (
                        _slope(logits, normalisers[rows], targets[rows], factors, transform, weight.dtype) @ weight
                    )
                continue
            logits = transform(logits)
            logps[rows] = logits.gather(1, targets[rows, None])[:, 0]
            transformed = logits.clone() if ctx.frozen and transform.softcap is not None else logits
            normalisers[rows], sums = _logsumexp_(logits)
            # From here ``logits`` holds exp(logits - maximum), which _logsumexp_ leaves.
            if log_sum_sq:
                agreement[rows] = _log_sum_sq(logits, sums)
            if ctx.frozen:
                slope = _add_at_target(logits.div_(-sums[:, None]), targets[rows], 1.0)
                slopes[rows] = transform.backward_(slope, transformed).to(weight.dtype) @ weight
        logps -= normalisers
        if ctx.frozen:
            ctx.save_for_backward(slopes)
        else:
            ctx.save_for_backward(hidden, weight, bias, targets, normalisers)
        if not log_sum_sq:
            return logps
        ctx.mark_non_differentiable(agreement)
        return logps, agreement

    @staticmethod
    def backward(ctx, grad_logps, _=None):
        if ctx.frozen:
            (slopes,) = ctx.saved_tensors
            return (slopes * grad_logps[:, None].to(slopes.dtype), *[None] * 7)
        hidden, weight, bias, targets, normalisers = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # The weight's gradient sums many chunks. In bfloat16 small contributions would be rounded away.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias and bias is not None else None
        for rows in _chunks(len(hidden), len(weight), hidden.device):
            logits = transformed = slope = grad = None  # frees the chunk before this one
            logits = _project(hidden[rows], weight, bias)
            if ctx.fused:
                factors = grad_logps[rows].contiguous()
                grad = _slope(logits, normalisers[rows], targets[rows], factors, ctx.transform, weight.dtype)
            else:
                logits = ctx.transform(logits)
                transformed = logits.clone() if ctx.transform.softcap is not None else logits
                # d logp / d logits = onehot - softmax. The sign of both is changed, which saves a pass.
                slope = _add_at_target(logits.sub_(normalisers[rows, None]).exp_(), targets[rows], -1.0)
                grad = ctx.transform.backward_(slope.mul_(-grad_logps[rows, None]), transformed)
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                _add_product(grad_weight, grad.T, hidden[rows].to(weight.dtype))
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *[None] * 5,
        )


def _slope(
    logits: Tensor, normalisers: Tensor, targets: Tensor, factors: Tensor, transform: LogitTransform, dtype: torch.dtype
) -> Tensor:
    return head_slope(logits, normalisers, targets, factors, transform.scale, transform.softcap, dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to a float32 sum."""
    if _adds_in_place(left.device, left.dtype):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += (left @ right).float()


@cache
def _adds_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a matrix product can add to a float32 sum here, without a product and a copy of the weight's size.

    CUDA's can (``aten::addmm.dtype_out``) since torch 2.8, but the first releases wanted a sum of the product's precision.
    """
    if not _on_gpu(device):
        return False
    total, ones = torch.ones(TILE, TILE, device=device), torch.ones(TILE, TILE, device=device, dtype=dtype)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == TILE + 1).all())


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Project [C, H] to new float32 logits [C, V], which the caller may change in place.

    With bfloat16 weights the hidden state is rounded to bfloat16 too, but the products are summed and returned in float32.
    In bfloat16, logits near 20 would be rounded to multiples of 1/8. This rounding made a third of the error of a log-prob.
    """
    if weight.dtype == torch.float32:
        return nn.functional.linear(hidden.float(), weight, bias)
    if weight.is_cuda:
        logits = torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=torch.float32)
    else:
        # CPUs have no such product. The weight is converted in blocks, whose float32 copy fits the processor's cache.
        hidden = hidden.to(weight.dtype).float()
        logits = hidden.new_empty(len(hidden), len(weight))
        for start in range(0, len(weight), FLOAT32_BLOCK):
            block = weight[start : start + FLOAT32_BLOCK].float()
            torch.mm(hidden, block.T, out=logits[:, start : start + FLOAT32_BLOCK])
    return logits if bias is None else logits.add_(bias)


def _logsumexp_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """log sum exp of each row, and its sum exp(logits - maximum). Overwrites ``logits`` with exp(logits - maximum) to avoid
    a second [C, V] tensor."""
    largest = logits.amax(-1, keepdim=True)
    sums = logits.sub_(largest).exp_().sum(-1)
    return sums.log().add_(largest[:, 0]), sums


def _log_sum_sq(scaled: Tensor, sums: Tensor) -> Tensor:
    """log sum_v p_v^2 of each row, from ``scaled`` = p times any factor [C, V], and its sums."""
    return 2 * (torch.linalg.vector_norm(scaled, dim=-1).log() - sums.log())


def _add_at_target(rows: Tensor, targets: Tensor, value: float) -> Tensor:
    """Add ``value`` at each row's target, in place."""
    return rows.scatter_add_(1, targets[:, None], torch.full_like(rows[:, :1], value))


def chunk_rows(vocabulary: int, device: str) -> int:
    """Rows of a chunk of logits on a type of device: at most ``CHUNK_BYTES``, on a GPU whole tiles."""
    rows = max(1, CHUNK_BYTES[device] // (4 * vocabulary))
    return rows if device == "cpu" else max(TILE, min(rows // TILE * TILE, MOST_ROWS))


def _chunks(rows: int, vocabulary: int, device: torch.device) -> list[slice]:
    size = chunk_rows(vocabulary, device.type)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


class _LogpLinear(nn.Linear):
    """Output projection that returns log-probs when it is called with targets.

    The module that owns the weight does the whole computation, so ZeRO-3's hooks gather the weight once around it.
    """

    logit_transform: LogitTransform
    fused = False
    """Whether the passes over logits are compiled (``model.kernels``). They are if there is no bias."""

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.weight.dtype

    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, log_sum_sq: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        if targets is None:
            return super().forward(hidden)
        grad_enabled = torch.is_grad_enabled()
        return _ChunkedLogps.apply(
            hidden, self.weight, self.bias, targets, self.logit_transform, grad_enabled, log_sum_sq, self.fused
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [C, V] after the architecture's transform, without gradient."""
        return self.logit_transform(_project(hidden, self.weight, self.bias))


class _AnyHead(nn.Module):
    """Log-probs through any other head, such as one with an adapter: in chunks of rows, recomputed in the backward pass."""

    fused = False

    def __init__(self, head: nn.Module, transform: LogitTransform, vocabulary: int) -> None:
        super().__init__()
        self.head = head
        self.transform = transform
        self.vocabulary = vocabulary

    @property
    def weight_dtype(self) -> torch.dtype:
        return next(parameter.dtype for parameter in self.head.parameters() if parameter.is_floating_point())

    def forward(self, hidden: Tensor, targets: Tensor, log_sum_sq: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        def rows_logps(rows_hidden: Tensor, rows_targets: Tensor) -> Tensor:
            """[C], or [2, C] with the log of the sum of squares."""
            logits = self.logits(rows_hidden)
            normalisers = torch.logsumexp(logits, dim=-1)
            logps = logits.gather(1, rows_targets[:, None])[:, 0] - normalisers
            if not log_sum_sq:
                return logps
            return torch.stack((logps, torch.logsumexp(2 * logits, dim=-1) - 2 * normalisers))

        pieces = [
            checkpoint(rows_logps, hidden[rows], targets[rows], use_reentrant=False)
            for rows in _chunks(len(targets), self.vocabulary, hidden.device)
        ]
        found = torch.cat(pieces, dim=-1) if pieces else hidden.new_zeros((2, 0) if log_sum_sq else 0, dtype=torch.float32)
        return (found[0], found[1].detach()) if log_sum_sq else found

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [C, V] after the architecture's transform."""
        # Not in place: autograd may have saved these tensors.
        logits = self.head(hidden.to(self.weight_dtype)).float()  # the stream is float32, weights may be bfloat16
        if self.transform.scale != 1.0:
            logits = logits * self.transform.scale
        if self.transform.softcap is not None:
            logits = torch.tanh(logits / self.transform.softcap) * self.transform.softcap
        return logits


def attach_logp_head(causal_lm: nn.Module) -> nn.Module:
    """Return ``causal_lm``'s output projection as ``(hidden [N, H], targets [N]) -> float32 log-probs [N]``.

    With ``log_sum_sq=True`` it also returns log sum_v p_v^2, [N]. A plain linear head is converted in place: its weight, its
    name in the state dict and its tying to the embedding stay, and without targets it still returns logits.
    """
    head = causal_lm.get_output_embeddings()
    config = causal_lm.config.get_text_config()
    transform = LogitTransform.of(config)
    if type(head) in (nn.Linear, _LogpLinear):
        head.__class__ = _LogpLinear
        head.logit_transform = transform
        return head
    return _AnyHead(head, transform, config.vocab_size)
