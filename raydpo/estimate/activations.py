"""Bytes that autograd keeps between the forward and the backward pass, and what a backward pass works with.

Counted from what each operation saves, not fitted. Names: T = positions of a micro-batch, K = keys of all nodes together (a
shared prefix is read once by each branch), N = predicted tokens; H, I = hidden and inner width, A, G = widths of queries and
of keys, r = rank. The residual stream is float32 in both precisions (``model.logps``): 4 bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from raydpo.data.shapes import PADDED_MULTIPLE, LayoutName
from raydpo.estimate.anatomy import Anatomy, Weight

__all__ = ["CHUNK_BYTES", "Batch", "Layer", "head_backward", "head_forward", "layer_memory"]

STREAM = 4
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
"""As ``model.head.CHUNK_BYTES``, which needs torch; a test compares the two."""
WHOLE_BLOCKS = 32, 512
"""As ``model.attention.WHOLE_BLOCKS``, likewise."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch, as far as memory depends on it.

    Attributes:
        positions: T. keys: K. predictions: N.
        masked: query-key pairs of the masks that SDPA is given, shared by all layers.
        padded_queries, padded_keys: T and K where a CPU computes a bfloat16 model in whole blocks.
        micro_batches: of a rank in a step; from the second on, gradients of the first are there already.
    """

    positions: int
    keys: int
    predictions: int
    masked: int = 0
    padded_queries: int = 0
    padded_keys: int = 0
    micro_batches: int = 2

    @classmethod
    def of_pairs(cls, pairs: Iterable[tuple[int, int, int]], layout: LayoutName = "tree", micro_batches: int = 2) -> Batch:
        """From the lengths of prompt, chosen and rejected of each pair; pairs share nothing."""
        positions = keys = predictions = masked = queries = blocks = 0
        for prompt, *completions in pairs:
            predictions += sum(completions)
            if layout == "padded":
                width = -(-(prompt + max(completions)) // PADDED_MULTIPLE) * PADDED_MULTIPLE
                nodes = [(0, width) for _ in completions]
            elif layout == "packed":
                nodes = [(0, prompt + tokens) for tokens in completions]
            else:
                nodes = [(0, prompt), *((prompt, tokens) for tokens in completions)]
            for depth, tokens in nodes:
                positions += tokens
                keys += depth + tokens
                masked += tokens * (depth + tokens) if depth else 0
                queries += -(-tokens // WHOLE_BLOCKS[0]) * WHOLE_BLOCKS[0]
                blocks += -(-(depth + tokens) // WHOLE_BLOCKS[1]) * WHOLE_BLOCKS[1]
        return cls(positions=positions, keys=keys, predictions=predictions, masked=masked, padded_queries=queries,
                   padded_keys=blocks, micro_batches=micro_batches)

    def scaled(self, positions: int) -> Batch:
        """A micro-batch of the same proportions with so many positions."""
        share = positions / self.positions
        rest = {name: round(value * share) for name, value in vars(self).items() if name != "micro_batches"}
        return Batch(**rest, micro_batches=self.micro_batches)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Bytes of one decoder layer.

    Attributes:
        kept: from its forward to its backward pass. entry: of it, its input, which is all that stays when it is recomputed.
        working: on top of that while its backward pass runs.
    """

    kept: float
    entry: float
    working: float


def layer_memory(anatomy: Anatomy, batch: Batch, *, width: int, device: str, trained: bool, adapted: Collection[Weight],
                 rank: int = 0, dora: bool = False, dense: float = 0.0) -> Layer:
    """Of a layer in the middle.

    Args:
        width: bytes of a number in the precision of compute, 2 or 4.
        trained: whether the layer's own weights train. Else only what adapters need is kept.
        adapted: matrices of one layer that have adapters, of rank ``rank``.
        dense: bytes of the largest matrix of a layer that is stored quantized and opened up for a product.
    """
    T, H, inner = batch.positions, anatomy.hidden, anatomy.inner
    # Two norms: the square and the scaling keep the input (once), the weight's gradient wants the normalised input.
    kept = 2 * STREAM * H * T * (2 if trained else 1)
    if trained:
        inputs = {"attention": True, "output": True, "mlp": True, "down": True}
        copies = (3, 2 if anatomy.gated else 1)
    else:
        short = [weight.module.rpartition(".")[2] for weight in adapted]
        entering = [name for name in short if name in _FIRST]
        outputs = [name for name in short if name in _OUTPUT]
        down = [name for name in short if name in _DOWN]
        others = len(short) - len(entering) - len(outputs) - len(down)
        inputs = {"attention": bool(entering), "output": bool(outputs), "mlp": bool(others), "down": bool(down)}
        copies = (len(entering), others)
    # In float32 the projections of one norm share its output; from a float32 stream each makes a bfloat16 copy of its own.
    for name, count in zip(("attention", "mlp"), copies, strict=True):
        kept += inputs[name] * width * H * T * (count if width == 2 else 1)
    # Attention: queries, keys and values by node, its output; and once more in the order of the output projection.
    whole = device == "cpu" and width == 2
    queries, keys = (batch.padded_queries, batch.padded_keys) if whole else (batch.positions, batch.keys)
    precision = 4 if whole else width
    kept += precision * (2 * anatomy.query_width * queries + 2 * anatomy.key_width * keys)
    kept += inputs["output"] * width * anatomy.query_width * T * (device == "cpu")
    # Feed-forward: both projections and the activation; their product is the input of the last one.
    kept += width * inner * T * ((3 if anatomy.gated else 1) + inputs["down"])
    kept += width * rank * T * len(adapted)
    if dora:  # base and adapted output, for the gradient of the magnitudes
        kept += 2 * width * T * sum(weight.shape[0] for weight in adapted)
    # The gradient of the product becomes those of both projections, and the stream has one of its own.
    working = width * inner * T * (2 if anatomy.gated else 1) + 3 * STREAM * H * T + dense
    return Layer(kept=kept, entry=STREAM * H * T, working=working)


def head_forward(anatomy: Anatomy, batch: Batch, *, width: int, device: str, trained: bool) -> float:
    """Bytes of the vocabulary projection's forward pass beyond hidden states: a chunk of logits, whatever the tokens."""
    chunk = min(CHUNK_BYTES[device], 4.0 * batch.predictions * anatomy.vocabulary)
    if trained:
        return chunk * (1 + anatomy.softcap)
    # A frozen head forms the slopes at once: a bfloat16 copy of the chunk enters the product with the weight.
    return chunk * (1 + anatomy.softcap + (width == 2) / 2) + STREAM * anatomy.hidden * batch.predictions


def head_backward(anatomy: Anatomy, batch: Batch, *, width: int, device: str) -> float:
    """Bytes of a trained head's backward pass: logits again, and a gradient of the weight that adds up in float32, beside
    one chunk's product, which bfloat16 widens."""
    chunk = min(CHUNK_BYTES[device], 4.0 * batch.predictions * anatomy.vocabulary)
    size = anatomy.hidden * anatomy.vocabulary
    return (chunk * (1 + anatomy.softcap + (width == 2) / 2) + STREAM * anatomy.hidden * batch.predictions
            + size * (8 if width == 4 else 10))


_FIRST = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "Wqkv", "c_attn")
_OUTPUT = ("o_proj", "out_proj", "dense", "wo")
_DOWN = ("down_proj", "fc2", "dense_4h_to_h", "w2")
