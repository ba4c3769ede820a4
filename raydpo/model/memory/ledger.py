"""Device and host memory that a training needs, from the configuration and the sizes of the model.

DeepSpeed's part follows what version 0.19 allocates (``runtime/zero/stage_1_and_2.py``, ``stage3.py``,
``fp16/unfused_optimizer.py``), with its default sizes except for the reduce bucket. The peak is the largest of these moments
of a step: the end of the forward pass, the backward pass layer by layer, the reduction of gradients, and the update.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

from raydpo.config import TrainConfig
from raydpo.config.train import REDUCE_BUCKET, ROUNDED_PIECE
from raydpo.model.memory.activations import Batch, Layer, head_backward, head_forward, layer_memory
from raydpo.model.memory.adapters import Adapter, Adapters, Trained, adapters_of
from raydpo.model.memory.anatomy import EMBEDDING, HEAD, OTHER, Anatomy, Weight

__all__ = [
    "BASE_BYTES",
    "ENOUGH",
    "PERSISTENT",
    "USABLE",
    "MemoryEstimate",
    "Moment",
    "adapters_line",
    "estimate_memory",
    "stored_bytes",
    "trained_numbers",
]

Device = Literal["cuda", "cpu"]

BASE_BYTES = 1.5 * 2**30
"""Bytes of a GPU in use before torch allocates: CUDA context and kernels (about 0.5 GiB), NCCL's channels (0.3 to 0.8 GiB,
more with more ranks), cuBLAS workspaces. Not part of ``MemoryEstimate.device``."""
USABLE = 0.9
"""Share of a device's memory (data sheet) that a plan may use. Error correction takes up to 1/16 (L40S, A10G, L4, T4), the
driver a little, and torch's allocator loses a few percent to fragmentation."""
ENOUGH = 2048
"""Positions of a micro-batch that ``tokens_per_batch: auto`` should reach. With fewer, a GPU's matrix units idle."""
PREFETCH = 50_000_000
"""Most numbers that ZeRO-3 gathers before they are used."""
REUSE = 1_000_000_000
"""ZeRO-3 keeps gathered weights that are used again within this many numbers, as between forward and backward pass."""
PERSISTENT = 100_000
"""ZeRO-3 keeps parameters of at most this many numbers whole on every rank."""
SUB_GROUP = 1_000_000_000
"""ZeRO-3 updates at most this many numbers of a rank's share at a time."""
DISK_BUFFERS = 4
"""Buffers, each the size of a sub-group, that DeepSpeed keeps in host memory when the optimizer is on disk."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Bytes in use at one moment of a step, by purpose.

    Attributes:
        optimizer: master weights, AdamW's moments, and working memory of the update.
        communication: buckets, copies of them, and weights gathered under ZeRO-3.
    """

    name: str
    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    head: float = 0.0
    communication: float = 0.0

    @property
    def parts(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if name != "name"}

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Memory of one worker.

    Attributes:
        standing: what is there before the first step, when the policy is loaded and DeepSpeed has wrapped it.
        peak: the moment with the most bytes on the device.
        host: bytes of host memory for offloaded weights, optimizer and activations.
        host_peak: the same during the update.
        passes: moments of the forward and the backward pass. moments: all moments in order; the last is the update.
    """

    standing: Moment
    peak: Moment
    host: float
    host_peak: float
    passes: tuple[Moment, ...] = field(repr=False)
    moments: tuple[Moment, ...] = field(repr=False)

    @property
    def device(self) -> float:
        """Peak bytes in torch's allocator."""
        return self.peak.total

    @property
    def together(self) -> float:
        """Peak bytes if device and host share one memory, as on a CPU."""
        return max(self.device + self.host, self.moments[-1].total + self.host_peak)


@dataclass(frozen=True, kw_only=True)
class _Policy:
    """Trained and frozen parameters."""

    trained: tuple[tuple[int, int], ...]  # place and numbers of each tensor, in the model's order
    frozen: tuple[tuple[int, float, int], ...]  # place, bytes and numbers of each
    adapters: Adapters

    @property
    def numbers(self) -> int:
        return sum(numel for _, numel in self.trained)


def estimate_memory(
    anatomy: Anatomy,
    model: Trained,
    train: TrainConfig,
    batch: Batch,
    *,
    workers: int,
    dtype: str,
    device: Device = "cuda",
) -> MemoryEstimate:
    """Memory of a training step after the first one.

    Args:
        batch: the largest micro-batch.
        dtype: ``float32`` or ``bfloat16``.
        device: ``cuda`` or ``cpu``.

    Raises:
        ModelError, ConfigError: if adapters do not fit the model, see ``memory.adapters``.
    """
    width = {"float32": 4, "bfloat16": 2}[dtype]
    policy = _policy(anatomy, model, width)
    kind = {"quantized": model.quantization is not None, "fused": model.fused and width == 2}
    ledger = _Ledger(anatomy, policy, train, batch, workers, width, device, **kind)
    passes = tuple(ledger.passes())
    moments = (*passes, *ledger.rest())
    return MemoryEstimate(
        standing=ledger.standing(),
        peak=max(moments, key=lambda moment: moment.total),
        host=ledger.host,
        host_peak=max(ledger.host, ledger.host_peak),
        passes=passes,
        moments=moments,
    )


def trained_numbers(anatomy: Anatomy, model: Trained) -> list[int]:
    """Numbers of each parameter that trains.

    Raises:
        ConfigError: as ``estimate_memory``.
    """
    return [numel for _, numel in _policy(anatomy, model, 4).trained]


def stored_bytes(weight: Weight, width: int, quantization: str | None) -> float:
    """Bytes of a frozen weight."""
    if quantization == "4bit" and weight.linear:  # one byte of scale per 64 numbers, a float32 per 256 such bytes
        return weight.numel * (1 / 2 + 1 / 64 + 4 / (64 * 256))
    if quantization == "8bit" and weight.linear:  # a float32 scale per row
        return weight.numel + 4 * weight.shape[0]
    return weight.numel * width


def adapters_line(anatomy: Anatomy, model: Trained) -> str | None:
    """Which parts of a mixture of experts have adapters; None for other models, and without adapters.

    Raises:
        ModelError, ConfigError: as ``estimate_memory``.
    """
    return _policy(anatomy, model, 4).adapters.line


@lru_cache(maxsize=8)
def _policy(anatomy: Anatomy, model: Trained, width: int) -> _Policy:
    adapters = adapters_of(anatomy, model) if model.adapts else Adapters((), ())
    if model.adapts:
        frozen: Sequence[Weight] = anatomy.weights
        trained: Sequence[tuple[int, int]] = adapters.trained
    else:
        frozen = [
            weight
            for weight in anatomy.weights
            if weight.place == OTHER or any(re.search(one, weight.name) for one in model.freeze)
        ]
        trained = [(weight.place, weight.numel) for weight in anatomy.weights if weight not in frozen]
    kept = tuple((weight.place, stored_bytes(weight, width, model.quantization), weight.numel) for weight in frozen)
    return _Policy(trained=tuple(trained), frozen=kept, adapters=adapters)


@lru_cache(maxsize=64)
def _whole_parameters(policy: _Policy, share: int, workers: int) -> int:
    """Count the elements of all parameters of which the rank with the most owns a part. The rank keeps their whole
    gradients."""
    own = [0] * workers
    start = 0
    for _, numel in policy.trained:
        for rank in range(start // share, min((start + numel - 1) // share + 1, workers)):
            own[rank] += numel
        start += numel
    return max(own)


class _Ledger:
    """Memory of one rank. P = trained numbers, p = a rank's share of them, W = bytes of a number."""

    def __init__(
        self,
        anatomy: Anatomy,
        policy: _Policy,
        train: TrainConfig,
        batch: Batch,
        workers: int,
        width: int,
        device: Device,
        quantized: bool,
        fused: bool,
    ) -> None:
        self.anatomy, self.policy, self.train, self.batch = anatomy, policy, train, batch
        self.workers, self.width, self.device, self.zero = workers, width, device, train.zero
        self.P = policy.numbers
        self.p = -(-self.P // workers) if train.zero else self.P
        self.offloads = train.offload_optimizer is not None
        self.accumulates = batch.micro_batches > 1
        self.trains_head = any(place == HEAD or (anatomy.tied and place == EMBEDDING) for place, _ in policy.trained)
        self.quantized, self.fused = quantized, fused
        self.bucket_used = min(self.P, REDUCE_BUCKET) * width
        buckets = 2 if train.overlap_communication and train.zero in (1, 2) else 1
        # A GPU allocates the whole bucket; on a CPU only pages that are written use memory.
        self.bucket = buckets * REDUCE_BUCKET * width if device == "cuda" else self.bucket_used
        self.largest = max((numel for _, numel in policy.trained), default=0)
        self.whole = _whole_parameters(policy, self.p, workers)
        self.host = self.host_peak = 0.0
        self.weights = self._weights()
        self.masters, self.optimizer = self._optimizer()

    # Memory that stays from step to step.

    def _weights(self) -> float:
        frozen = sum(size for _, size, _ in self.policy.frozen)
        if self.zero < 3:
            return self.P * self.width + frozen
        share = self.p * self.width + frozen / self.workers
        if self.train.offload_params == "cpu":
            self.host += share
        return share if self.train.offload_params is None else 0.0

    def _optimizer(self) -> tuple[float, float]:
        """Device bytes of master weights, and of these with the moments. If they are offloaded, the host's bytes are added
        to, with their gradients."""
        train, numbers = self.train, self.p
        masters = 4.0 * numbers if self.zero or self.width == 2 else 0.0
        moments = {
            "adamw": 6.0 if train.optimizer_states == "bfloat16" else 8.0,
            "paged_adamw": 8.0,
            # One byte each, and a float32 per 256 of them.
            "adamw_8bit": 2 + 8 / 256,
            "paged_adamw_8bit": 2 + 8 / 256,
        }[train.optimizer] * numbers
        if self.offloads:
            if self.zero == 3:
                beside = self.width * numbers
            else:  # a copy of the share in W; with accumulation also the gradients of whole parameters
                beside = self.width * (numbers + self.largest)
                beside += self.width * self.whole if self.accumulates else 0
            if train.offload_optimizer == "cpu":
                self.host += masters + moments + 4.0 * numbers + beside
            else:
                self.host += beside + DISK_BUFFERS * 4.0 * min(numbers, SUB_GROUP)
            self.host_peak = self.host + self._update_bytes(min(numbers, SUB_GROUP) if self.zero == 3 else numbers)
            return 0.0, 0.0
        if "paged" in train.optimizer:
            self.host += moments
            moments = 0.0
        return masters, masters + moments

    def _update_bytes(self, numbers: int) -> float:
        """Working memory of an update of ``numbers`` numbers at once."""
        if self.train.optimizer_states == "bfloat16":  # the first moment in float32, and the update with its square root
            return 12.0 * min(numbers, ROUNDED_PIECE)
        return 0.0  # torch's fused kernels and bitsandbytes' work in place

    # Moments of a step.

    def standing(self) -> Moment:
        """What is there before the first step. The optimizer makes its moments in that step."""
        spare = self.width * self.largest if self.offloads and self.zero < 3 else 0.0  # for one gradient
        return Moment(
            name="before the first step",
            weights=self.weights,
            optimizer=self.masters,
            gradients=self._old_gradients() if self.zero == 3 else 0.0,
            communication=self.bucket + self._persistent() if self.zero == 3 else spare,
        )

    def rest(self) -> Iterator[Moment]:
        """What follows the passes."""
        yield from self._reduction()
        yield from self._update()

    def _moment(self, name: str, *, optimizer: float = 0.0, **parts: float) -> Moment:
        """A moment with the given bytes besides the weights and the optimizer's lasting bytes."""
        return Moment(name=name, weights=self.weights, optimizer=self.optimizer + optimizer, **parts)

    def _layers(self) -> Iterator[Layer]:
        """Memory of each decoder layer."""
        by_layer: dict[int, list[Adapter]] = defaultdict(list)
        for adapter in self.policy.adapters.on:
            by_layer[adapter.weight.place].append(adapter)
        trained = {place for place, _ in self.policy.trained}
        first = 0 if EMBEDDING in trained else min((place for place in trained if place >= 0), default=0)
        dense = self.width * max((weight.numel for weight in self.anatomy.weights if weight.linear), default=0)
        alike: dict[tuple[Any, ...], Layer] = {}
        for number in range(self.anatomy.layers):
            adapted = by_layer[number]
            kind = tuple((adapter.name, adapter.weight.shape) for adapter in adapted)
            if kind not in alike:
                alike[kind] = layer_memory(
                    self.anatomy,
                    self.batch,
                    width=self.width,
                    device=self.device,
                    trained=not self.policy.adapters.on,
                    adapted=adapted,
                    dense=dense if self.quantized else 0.0,
                    fused=self.fused,
                )
            layer = alike[kind]
            # Layers below the lowest trained one have no gradient.
            yield layer if number >= first else replace(layer, kept=0.0, entry=0.0, working=0.0, passing=0.0)

    def passes(self) -> Iterator[Moment]:
        """The end of the forward pass, and the backward pass from the head down to the embedding."""
        anatomy, batch, width = self.anatomy, self.batch, self.width
        how = {"width": width, "device": self.device, "fused": self.fused}
        stream = 4.0 * anatomy.hidden * batch.positions
        layers = list(self._layers())
        recomputes = self.train.gradient_checkpointing
        # Masks, the last norm with its input, and the hidden states of predicting positions.
        precision = 4 if self.device == "cpu" else width
        around = batch.masked * precision * (self.device == "cpu") + stream * (1 if self.policy.adapters.on else 2)
        around += 4.0 * anatomy.hidden * batch.predictions
        # Router logits for the router loss; in the backward pass their gradients take their place, layer by layer.
        routed = width * anatomy.routed * batch.positions * (self.train.router_aux_loss_coef != 0)
        kept = [(layer.entry if recomputes else layer.kept) + routed / len(layers) for layer in layers]
        on_host = 0.0
        if self.train.offload_activations:
            on_host = sum(kept) + around
            kept, around = [0.0] * len(kept), 0.0
            on_host += anatomy.hidden * anatomy.vocabulary * width * self.trains_head
            self.host += on_host
        new = self._new_gradients()
        old = self._old_gradients()
        gathered = self._gathered()
        yield self._moment(
            "forward",
            activations=sum(kept) + around,
            gradients=old,
            head=head_forward(anatomy, batch, trained=self.trains_head, **how),
            communication=gathered[HEAD] + self._bucket(0.0),
        )
        if recomputes and layers:
            yield self._moment(
                "forward of the last layer",
                activations=sum(kept) + layers[-1].passing,
                gradients=old,
                communication=gathered[len(layers) - 1] + self._bucket(0.0),
            )
        if self.trains_head:
            yield self._moment(
                "head's backward",
                activations=sum(kept) + around,
                gradients=old,
                head=head_backward(anatomy, batch, **how),
                communication=gathered[HEAD] + self._bucket(0.0),
            )
        done = new.get(HEAD, 0.0)
        if anatomy.tied and self.trains_head:  # kept until the embedding's gradient is there
            done = width * anatomy.hidden * anatomy.vocabulary
        for number in reversed(range(len(layers))):
            layer, entering = layers[number], stream
            live = sum(kept[: number + 1]) + layer.working + entering
            live += (layer.kept - layer.entry if recomputes else 0) + (layer.entry if self.train.offload_activations else 0)
            yield self._moment(
                f"backward of layer {number}",
                activations=live,
                **self._held(done, old, new, number),
                communication=gathered[number] + self._bucket(done),
            )
            done += new.get(number, 0.0)
        if new.get(EMBEDDING):
            yield self._moment(
                "embedding's backward",
                activations=2 * stream,
                **self._held(done + new[EMBEDDING], old, new, EMBEDDING),
                communication=gathered[EMBEDDING] + self._bucket(done + new[EMBEDDING]),
            )

    def _new_gradients(self) -> dict[int, float]:
        """Bytes of the gradients that one backward pass computes, by place."""
        made: dict[int, float] = defaultdict(float)
        for place, numel in self.policy.trained:
            made[place] += numel * self.width
        return made

    def _old_gradients(self) -> float:
        """Bytes of gradients from earlier micro-batches; under ZeRO-3 the buffer for them."""
        if self.zero == 3:
            return 0.0 if self.offloads else float(self.p * self.width)
        if not self.accumulates or (self.offloads and self.zero == 2):
            return 0.0
        return float(self.width * (self.P if self.zero < 2 else self.whole))

    def _bucket(self, done: float) -> float:
        """Bytes of ZeRO's bucket after gradients of ``done`` bytes were copied into it."""
        if not self.zero:
            return 0.0
        extra = self.width * self.largest if self.offloads and self.zero < 3 else 0.0  # a buffer for one gradient
        if self.device == "cuda":
            return self.bucket + extra
        if self.zero == 3:  # pages stay in memory once written
            return self.bucket_used + extra
        return (min(done, self.bucket_used) if self.zero == 2 else 0.0) + extra

    def _held(self, done: float, old: float, new: dict[int, float], place: int) -> dict[str, float]:
        """Gradients outside the bucket while those of ``place`` are computed."""
        largest = self.width * max((numel for where, numel in self.policy.trained if where == place), default=0)
        if self.zero >= 2 or (old and self.zero < 2):  # each is copied to the bucket or added at once
            return {"gradients": old + largest}
        return {"gradients": old + done}

    def _tensors(self) -> Iterator[tuple[int, int]]:
        """Place and numbers of each parameter."""
        yield from self.policy.trained
        yield from ((place, numel) for place, _, numel in self.policy.frozen)

    def _persistent(self) -> float:
        """Bytes of the parameters that ZeRO-3 keeps whole beside their parts."""
        if self.workers == 1 and self.train.offload_params is None:
            return 0.0
        return float(self.width * sum(numel for _, numel in self._tensors() if numel <= PERSISTENT))

    def _gathered(self) -> dict[int, float]:
        """Bytes that ZeRO-3 gathers in the backward pass of each place; for HEAD, also at the end of the forward pass."""
        order = [EMBEDDING, *range(self.anatomy.layers), HEAD]
        gathered = dict.fromkeys(order, 0.0)
        if self.zero < 3 or (self.workers == 1 and self.train.offload_params is None):
            return gathered
        numels = dict.fromkeys(order, 0)
        for place, numel in self._tensors():
            if numel > PERSISTENT and place in numels:
                numels[place] += numel
        lasting = self._persistent()
        if self.anatomy.tied:
            numels[HEAD] = numels[EMBEDDING]
        above = sum(numels.values())
        kept, before = 0, None  # numbers of lower places that stay gathered; numbers of the next lower place if it does not
        for place in order:
            live = kept + numels[place] + (0 if before is None else min(PREFETCH, before))  # prefetched
            gathered[place] = lasting + live * self.width
            above -= numels[place]
            stays = 2 * above < REUSE
            kept, before = (kept + numels[place], None) if stays else (kept, numels[place])
        return gathered

    def _reduction(self) -> Iterator[Moment]:
        """Gradients of all ranks are summed, in a copy of the bucket."""
        width, P = self.width, self.P
        copied = self.workers > 1
        if self.zero == 3:
            # Each rank's pieces are concatenated first; gloo reduces a copy of that. The embedding is still gathered:
            # DeepSpeed releases a module when a gradient leaves it, and none leaves the embedding.
            copies = 1 + (copied and self.device == "cpu")
            yield self._moment(
                "reduction",
                gradients=self._old_gradients(),
                communication=self._bucket(P * width) + copies * self.bucket_used + self._gathered()[EMBEDDING],
            )
            return
        if self.zero == 0:
            yield self._moment("reduction", gradients=P * width, communication=min(P, REDUCE_BUCKET + self.largest) * width)
            return
        own = 0.0 if self.offloads else float(width * self.whole)
        if self.zero == 1:
            moved = self.bucket_used
            rest = P * width - moved
            yield self._moment("reduction", gradients=rest, communication=self.bucket + copied * moved)
            yield self._moment("own gradients", gradients=rest + own, communication=self.bucket)
            return
        old = self._old_gradients()
        bucket = self._bucket(P * width)
        yield self._moment("reduction", gradients=old, communication=bucket + copied * self.bucket_used)
        yield self._moment("own gradients", gradients=old + own, communication=bucket)

    def _update(self) -> Iterator[Moment]:
        width, p = self.width, self.p
        if self.zero == 0:
            widened = 4.0 * p if width == 2 else 0.0
            yield self._moment("update", gradients=p * width + widened, optimizer=self._update_bytes(self.largest))
            if width == 2:
                yield self._moment("gradient norm", gradients=p * width + widened, optimizer=8.0 * self.largest)
            return
        lasting = self.bucket if self.zero == 3 else 0.0
        if self.offloads:
            yield self._moment("update", communication=self._bucket(0.0))
            return
        own = width * (p if self.zero == 3 else self.whole)
        at_once = min(p, SUB_GROUP) if self.zero == 3 else p
        widened = 4.0 * at_once if width == 2 else 0.0
        # Norms are computed in float64, one gradient at a time.
        norm = 8.0 * min(self.largest, at_once)
        yield self._moment("gradient norm", gradients=own, optimizer=norm, communication=lasting)
        yield self._moment("flat gradients", gradients=own + width * at_once + widened, communication=lasting)
        stays = own if self.zero == 3 else 0.0
        working = self._update_bytes(at_once)
        yield self._moment("update", gradients=stays + 4.0 * at_once, communication=lasting, optimizer=working)
