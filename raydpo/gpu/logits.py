"""Block 2: log-probs and gradients of the chunked head against logits in float64, its speed, and its memory."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch
from torch import Tensor

from raydpo.gpu.figures import Findings
from raydpo.gpu.timing import seconds
from raydpo.gpu.world import World
from raydpo.model import head as chunked
from raydpo.model.budget import reset_peak_memory, used_memory
from raydpo.model.head import attach_logp_head
from raydpo.model.memory.activations import Batch, head_backward, head_forward
from raydpo.model.memory.anatomy import Anatomy

__all__ = ["logits"]

ROWS = (512, 1024, 2048)
"""Rows of a chunk whose speed is measured."""
KINDS = ("plain", "softcap", "fused", "fused softcap", "tied")
SOFTCAP = 30.0
"""As Gemma 2 has it."""


def logits(world: World, found: Findings) -> None:
    """Compare plain and fused heads, with and without a soft cap, and one tied to the embedding; then time them."""
    rows = 256 if world.cuda else 24
    for dtype, most in ((torch.float32, world.limits.head32), (torch.bfloat16, world.limits.head16)):
        model = world.model(1, dtype=dtype)
        for kind in KINDS:
            model.config.final_logit_softcapping = SOFTCAP if "softcap" in kind else None
            if kind == "tied":
                model.get_output_embeddings().weight = model.get_input_embeddings().weight
            for name, error in _errors(world, model, rows, fused="fused" in kind).items():
                bits = "float32" if dtype == torch.float32 else "bfloat16"
                says = f"{kind} head in {bits}: relative error of {name}"
                found.at_most(f"{kind.replace(' ', '_')}.{bits}.{name}", error, most, says)
        del model
        gc.collect()
    _speed(world, found)


def _inputs(world: World, model: torch.nn.Module, rows: int) -> tuple[Tensor, Tensor]:
    """Hidden states float32 [rows, H] that the model's precision can hold, and targets [rows]."""
    generator = torch.Generator(world.device).manual_seed(2)
    size = model.config.hidden_size
    hidden = torch.randn(rows, size, generator=generator, device=world.device).to(next(model.parameters()).dtype).float()
    return hidden, torch.randint(model.config.vocab_size, (rows,), generator=generator, device=world.device)


def _errors(world: World, model: torch.nn.Module, rows: int, *, fused: bool) -> dict[str, float]:
    """Relative errors of log-probs and of the gradients of hidden states and weight."""
    hidden, targets = _inputs(world, model, rows)
    head = attach_logp_head(model)
    head.fused = fused
    weight, embedding = head.weight, model.get_input_embeddings().weight
    hidden.requires_grad_()
    tied = weight is embedding
    # A tied weight has a second gradient, from the embedding's rows.
    before = hidden + embedding[targets].float() if tied else hidden
    ours = head(before, targets)
    slopes = torch.linspace(-1, 1, rows, device=world.device)
    gradients = torch.autograd.grad((ours * slopes).sum(), (hidden, weight))
    exact_hidden, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    states = exact_hidden + exact_weight[targets] if tied else exact_hidden
    if tied and weight.dtype == torch.bfloat16:  # the head rounds its input, as the definition must
        states = states + (before.detach().to(weight.dtype).double() - states.detach())
    raw = states @ exact_weight.T
    cap = model.config.final_logit_softcapping
    raw = raw if cap is None else torch.tanh(raw / cap) * cap
    wanted = raw.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected = torch.autograd.grad((wanted * slopes.double()).sum(), (exact_hidden, exact_weight))
    pairs = {"log-probs": (ours, wanted), "dh": (gradients[0], expected[0]), "dW": (gradients[1], expected[1])}
    apart = {name: (one.detach().double() - other.detach(), other.detach()) for name, (one, other) in pairs.items()}
    return {name: float(difference.norm() / exact.norm()) for name, (difference, exact) in apart.items()}


def _speed(world: World, found: Findings) -> None:
    model = world.model(1)
    rows = world.shape.passes[1] // 2
    head = attach_logp_head(model)
    hidden, targets = _inputs(world, model, rows)
    hidden.requires_grad_()
    flops = 2.0 * hidden.shape[1] * model.config.vocab_size * rows

    def forward() -> Tensor:
        with torch.no_grad():
            return head(hidden, targets)

    def both() -> None:
        head(hidden, targets).sum().backward()
        hidden.grad = head.weight.grad = None

    anatomy, width = Anatomy.of_model(model), world.dtype.itemsize
    batch = Batch(positions=rows, keys=rows, predictions=rows)
    device = world.device.type
    planned = max(
        head_forward(anatomy, batch, width=width, device=device, trained=True),
        head_backward(anatomy, batch, width=width, device=device),
    )
    peak = _peak(world, both)
    says = f"head's memory at {rows:,} predictions, as a share of the plan's {planned / 2**30:.2f} GiB"
    found.at_most("memory_of_plan", peak / planned, world.limits.reserved, says)
    chunks = ROWS if world.cuda else (8,)
    for chunk, fused in [*((chunk, False) for chunk in chunks), (chunks[-1], True)]:
        head.fused = fused
        says, suffix = f"chunks of {chunk:,} rows{', fused' if fused else ''}", f"{chunk}{'.fused' if fused else ''}"
        with _chunk_rows(chunk, world):
            rates = {
                "forward": flops / seconds(forward, world.device, repeats=3, warm_ups=1),
                "training": 4 * flops / seconds(both, world.device, repeats=3, warm_ups=1),
            }
            for name, rate in rates.items():
                found.value(f"{name}.{suffix}_tflops", rate / 1e12, f"head, {name}, {says}", "TFLOP/s")
            found.value(f"peak.{suffix}_gib", _peak(world, both) / 2**30, f"head's peak, {says}", "GiB")


def _peak(world: World, run: object) -> float:
    """Bytes that ``run`` needs at its peak."""
    reset_peak_memory(world.device)
    before = used_memory(world.device)
    run()
    return used_memory(world.device) - before


@contextlib.contextmanager
def _chunk_rows(rows: int, world: World) -> Iterator[None]:
    """Compute the head in chunks of ``rows`` rows within the block."""
    kind = world.device.type
    before = chunked.CHUNK_BYTES[kind]
    chunked.CHUNK_BYTES[kind] = 4 * world.shape.vocabulary * rows
    try:
        yield
    finally:
        chunked.CHUNK_BYTES[kind] = before
