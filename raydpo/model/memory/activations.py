"""Bytes that autograd keeps between the forward and the backward pass, and the working memory of a backward pass.

The bytes are counted from what each operation saves, not fitted to measurements. Names: T = positions of a micro-batch, K =
keys of all nodes (a shared prefix counts once for each branch), N = predicted tokens; H, I = hidden and inner width, A, G =
widths of queries and keys, r = rank. The residual stream is float32 in both precisions (``model.logps``): 4 bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from raydpo.data.shapes import PADDED_MULTIPLE, LayoutName
from raydpo.model.by_node import WHOLE_BLOCKS
from raydpo.model.head import chunk_rows
from raydpo.model.memory.adapters import Adapter
from raydpo.model.memory.anatomy import Anatomy

__all__ = ["Batch", "Layer", "head_backward", "head_forward", "layer_memory", "scoring_memory"]

STREAM = 4
"""Bytes of a number in the residual stream."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sizes of a micro-batch that its memory depends on.

    Attributes:
        positions: T. keys: K. predictions: N.
        masked: query-key pairs of the masks passed to SDPA, shared by all layers.
        padded_queries, padded_keys: T and K padded to whole blocks, as a CPU computes a bfloat16 model.
        micro_batches: micro-batches of a rank in a step. From the second one on, gradients of the first are in memory.
    """

    positions: int
    keys: int
    predictions: int
    masked: int = 0
    padded_queries: int = 0
    padded_keys: int = 0
    micro_batches: int = 2

    @classmethod
    def of_pairs(cls, pairs: Iterable[Sequence[int]], layout: LayoutName = "tree", micro_batches: int = 2) -> Batch:
        """Make a batch from the token counts (prompt, chosen, rejected) of each pair, or (prompt, completion, ...) of each
        list. Pairs share no prefix."""
        found: Counter[str] = Counter()
        for prompt, *completions in pairs:
            found["predictions"] += sum(completions)
            if layout == "padded":
                width = -(-(prompt + max(completions)) // PADDED_MULTIPLE) * PADDED_MULTIPLE
                nodes = [(0, width) for _ in completions]
            elif layout == "packed":
                nodes = [(0, prompt + tokens) for tokens in completions]
            else:
                nodes = [(0, prompt), *((prompt, tokens) for tokens in completions)]
            for depth, tokens in nodes:
                keys = depth + tokens
                found.update(positions=tokens, keys=keys, masked=tokens * keys if depth else 0)
                found["padded_queries"] += -(-tokens // WHOLE_BLOCKS[0]) * WHOLE_BLOCKS[0]
                found["padded_keys"] += -(-keys // WHOLE_BLOCKS[1]) * WHOLE_BLOCKS[1]
        return cls(**found, micro_batches=micro_batches)

    def scaled(self, positions: int) -> Batch:
        """A micro-batch of the same proportions with ``positions`` positions."""
        share = positions / self.positions
        rest = {name: round(value * share) for name, value in vars(self).items() if name != "micro_batches"}
        return Batch(**rest, micro_batches=self.micro_batches)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Bytes of one decoder layer.

    Attributes:
        kept: kept from its forward to its backward pass.
        entry: the part of ``kept`` that is its input; with gradient checkpointing only this is kept.
        working: needed in addition while its backward pass runs.
        passing: needed in addition while its forward pass runs and keeps nothing, as with gradient checkpointing.
    """

    kept: float
    entry: float
    working: float
    passing: float


def layer_memory(
    anatomy: Anatomy,
    batch: Batch,
    *,
    width: int,
    device: str,
    trained: bool,
    adapted: Collection[Adapter],
    dense: float = 0.0,
    fused: bool = False,
) -> Layer:
    """Memory of one decoder layer that is neither the first nor the last.

    Args:
        width: bytes of a number in the compute precision, 2 or 4.
        trained: whether the layer's own weights train. If not, only what the adapters need is kept.
        adapted: adapters of the layer.
        dense: bytes of the largest quantized matrix of a layer after it is dequantized for a product.
        fused: whether norms and the gated part are computed by ``model.kernels``, which keep nothing but their inputs.
    """
    T, H, inner = batch.positions, anatomy.hidden, anatomy.inner
    # Two norms: the square and the scaling keep the input (once), the weight's gradient needs the normalised input.
    kept = 2 * STREAM * H * T * (2 if trained and not fused else 1)
    if trained:
        inputs = {"attention": True, "output": True, "mlp": True, "down": True}
        copies = (3, 2 if anatomy.gated else 1)
    else:
        short = [adapter.name for adapter in adapted if not adapter.folded]
        entering = [name for name in short if name in _FIRST]
        outputs = [name for name in short if name in _OUTPUT]
        down = [name for name in short if name in _DOWN]
        others = len(short) - len(entering) - len(outputs) - len(down)
        inputs = {"attention": bool(entering), "output": bool(outputs), "mlp": bool(others), "down": bool(down)}
        copies = (len(entering), others)
    # The projections share the norm's output in float32, and if it is fused. Else each rounds it to a copy of its own.
    for name, count in zip(("attention", "mlp"), copies, strict=True):
        kept += inputs[name] * width * H * T * (count if width == 2 and not fused else 1)
    # Attention: queries, keys, values and output by node; the output once more, transposed for its projection.
    whole = device == "cpu" and width == 2
    queries, keys = (batch.padded_queries, batch.padded_keys) if whole else (batch.positions, batch.keys)
    precision = 4 if whole else width
    kept += precision * (2 * anatomy.query_width * queries + 2 * anatomy.key_width * keys)
    kept += inputs["output"] * width * anatomy.query_width * T * (device == "cpu")
    # Feed-forward: both projections and the activation. Their product is the input of the last projection.
    kept += width * inner * T * ((3 - fused if anatomy.gated else 1) + inputs["down"])
    kept += width * T * sum(adapter.rank for adapter in adapted if not adapter.folded)
    # Base and adapted output, for the gradient of DoRA's magnitudes.
    kept += 2 * width * T * sum(adapter.weight.shape[0] for adapter in adapted if adapter.dora)
    # Norms of queries and keys: their input in float32; the weight's gradient needs the normalised input.
    if any(weight.name.endswith("q_norm.weight") for weight in anatomy.weights):
        kept += (STREAM + width * trained) * (anatomy.query_width + anatomy.key_width) * T
    # Experts: their outputs before routing weights. In the backward pass gradients of weighted, sorted and copied tokens.
    copies_of_tokens = width * anatomy.experts_used * H * T
    kept += copies_of_tokens
    # PEFT adds the product of all experts to their weights: a second copy, and in the backward pass its gradient. That needs
    # the experts' inputs: sorted copies of tokens, and the product of both projections.
    folded = [width * adapter.weight.numel for adapter in adapted if adapter.folded]
    kept += sum(folded)
    if folded or trained:
        kept += copies_of_tokens + width * inner * T * (bool(folded) and not inputs["down"])
    # Gradients of both projections, where their product and the activation have been freed, and of the stream.
    working = width * inner * T * (2 if anatomy.gated else 1) + STREAM * H * T + dense
    working += max(3.5 * copies_of_tokens, copies_of_tokens + max(folded, default=0))
    # Both projections and the activation, the stream between both parts and its norm.
    passing = (_feed_forward(anatomy, width) + 2 * STREAM * H) * T + dense + sum(folded)
    return Layer(kept=kept, entry=STREAM * H * T, working=working, passing=passing)


def scoring_memory(anatomy: Anatomy, *, width: int) -> float:
    """Bytes of a position in a pass on a GPU that keeps nothing for a backward pass: what the largest part of a layer holds.

    With it are alive: the stream that entered the first layer and the one that entered this layer, the rotary tables, and
    during the feed-forward part the stream between both parts and its norm.

    Args:
        width: bytes of a number in the compute precision, 2 or 4.
    """
    H, A, G = anatomy.hidden, anatomy.query_width, anatomy.key_width
    names = {weight.name.rpartition(".")[0].rpartition(".")[2] for weight in anatomy.weights if weight.place >= 0}
    # Queries and keys are rotated in float32, beside their norm; keys and values are gathered for each branch of a tree.
    fused = 2 * width / 2 * (A + 2 * G) if names & {"qkv_proj", "query_key_value", "Wqkv", "c_attn"} else 0.0
    attention = width / 2 * (14 * A + 10.25 * G) + fused
    return 2 * STREAM * H + max(2 * STREAM * H + _feed_forward(anatomy, width), STREAM * H + attention) + 1024


def _feed_forward(anatomy: Anatomy, width: int) -> float:
    """Bytes of a position in the forward pass of the feed-forward part, which keeps nothing, beside the stream."""
    plain = width * anatomy.inner * (3 if anatomy.gated else 2)  # products, their activation and its gate
    if not anatomy.experts_used:
        return plain
    # Experts compute sorted copies of their tokens: the stream's copy is there throughout, and with it either the inner
    # products (with biases that are copied for each token) or the outputs, weighted, and sorted back.
    tokens = anatomy.hidden * anatomy.experts_used
    biased = any("experts" in weight.name and weight.name.endswith("bias") for weight in anatomy.weights)
    products = (19 if biased else 8 if anatomy.gated else 4) / 2 * width * anatomy.inner
    return max(plain, STREAM * tokens + max(products, 3 * width * tokens))


def head_forward(anatomy: Anatomy, batch: Batch, *, width: int, device: str, trained: bool, fused: bool = False) -> float:
    """Bytes of the vocabulary projection's forward pass besides hidden states: of one chunk of logits at any token count."""
    chunk = _chunk(anatomy, batch, device)
    if trained:
        return chunk
    # A frozen head computes its gradients at once, with a bfloat16 copy of the chunk for the product with the weight. Caps
    # that are not fused need a copy of the capped logits and two temporary tensors.
    chunks = 4.0 if anatomy.softcap and not fused else 1.5 if width == 2 else 1.0
    return chunk * chunks + STREAM * anatomy.hidden * batch.predictions


def head_backward(anatomy: Anatomy, batch: Batch, *, width: int, device: str, fused: bool = False) -> float:
    """Bytes of a trained head's backward pass: the logits again, the weight's gradient summed in float32, and one chunk's
    product (in bfloat16 with a float32 copy). A GPU adds bfloat16 products to the sum, and then rounds a copy of it."""
    chunk, capped = _chunk(anatomy, batch, device), anatomy.softcap and not fused
    size, half = anatomy.hidden * anatomy.vocabulary, (width == 2) / 2
    rounding = size * (8 if width == 4 else 10 if device == "cpu" else 6) + chunk * (1 + capped + half)
    return max(rounding, 4 * size + chunk * (1 + 3 * capped + half)) + STREAM * anatomy.hidden * batch.predictions


def _chunk(anatomy: Anatomy, batch: Batch, device: str) -> float:
    """Bytes of a chunk of float32 logits."""
    return 4.0 * min(chunk_rows(anatomy.vocabulary, device), batch.predictions) * anatomy.vocabulary


_FIRST = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "Wqkv", "c_attn")
_OUTPUT = ("o_proj", "out_proj", "dense", "wo")
_DOWN = ("down_proj", "fc2", "dense_4h_to_h", "w2")
