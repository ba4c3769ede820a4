"""What a training takes of each device's memory, and of the host's, from the configuration and the sizes of the model.

DeepSpeed's part follows what it allocates (0.19: ``runtime/zero/stage_1_and_2.py``, ``stage3.py``,
``fp16/unfused_optimizer.py``), with its default sizes but for the reduce bucket. The peak is searched for along a step: the
end of the forward pass, the backward pass from the head down, the reduction of gradients, and the update.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from raydpo.config import ModelConfig, TrainConfig
from raydpo.config.train import REDUCE_BUCKET, ROUNDED_PIECE
from raydpo.errors import ConfigError
from raydpo.estimate.activations import Batch, Layer, head_backward, head_forward, layer_memory
from raydpo.estimate.anatomy import EMBEDDING, HEAD, Anatomy, Weight

__all__ = ["BASE_BYTES", "Memory", "Moment", "estimate_memory"]

Device = Literal["cuda", "cpu"]

BASE_BYTES = 1.5 * 2**30
"""Of a GPU before anything is put there: CUDA context and kernels (about 0.5 GiB), NCCL's channels (0.3 to 0.8 GiB, more
with more ranks), cuBLAS workspaces. Outside torch's allocator, and no part of ``Memory.device``."""
PREFETCH = 50_000_000
"""Numbers that ZeRO-3 gathers ahead of their use."""
REUSE = 1_000_000_000
"""ZeRO-3 keeps gathered weights that are used again within so many numbers: on the way from forward to backward."""
PERSISTENT = 100_000
"""ZeRO-3 keeps smaller parameters whole on every rank."""
SUB_GROUP = 1_000_000_000
"""ZeRO-3 updates so many numbers of a rank's share at a time."""
DISK_BUFFERS = 4
"""Buffers of a sub-group each that DeepSpeed keeps in the host's memory where the optimizer lies on a disk."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Bytes that are live at one moment of a step, by what they are for.

    Attributes:
        optimizer: master weights, moments, and what the update works with.
        communication: buckets, copies in them, and weights gathered under ZeRO-3.
    """

    name: str
    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    communication: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.head + self.communication


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of one worker.

    Attributes:
        peak: the moment that takes most on the device.
        host: bytes of the host's memory that weights, optimizer and activations take there.
        host_peak: the same while the update works with them.
        moments: all that were looked at, in their order; the last is the update.
    """

    peak: Moment
    host: float
    host_peak: float
    moments: tuple[Moment, ...] = field(repr=False)

    @property
    def device(self) -> float:
        """Peak bytes in torch's allocator."""
        return self.peak.total

    @property
    def together(self) -> float:
        """Peak bytes where device and host are one memory, as on a CPU."""
        return max(self.device + self.host, self.moments[-1].total + self.host_peak)


@dataclass(frozen=True, kw_only=True)
class _Policy:
    """What trains and what does not.

    Attributes:
        trained: numbers of each trained tensor, in the model's order, with its place.
        frozen: bytes of each frozen tensor, and its numbers, with its place.
    """

    trained: tuple[tuple[int, int], ...]
    frozen: tuple[tuple[int, float, int], ...]
    rank: int
    dora: bool
    adapted: tuple[Weight, ...]

    @property
    def numbers(self) -> int:
        return sum(numel for _, numel in self.trained)


def estimate_memory(anatomy: Anatomy, model: ModelConfig, train: TrainConfig, batch: Batch, *, workers: int, dtype: str,
                    device: Device = "cuda") -> Memory:
    """The peak of a training step after the first.

    Args:
        batch: the largest micro-batch.
        dtype: ``float32`` or ``bfloat16``.
        device: ``cuda``, or ``cpu`` as raydpo's tests compute.

    Raises:
        ConfigError: if ``model.adapter`` has no readable adapter_config.json.
    """
    width = {"float32": 4, "bfloat16": 2}[dtype]
    policy = _policy(anatomy, model, width)
    ledger = _Ledger(anatomy, policy, train, batch, workers, width, device, model.quantization is not None)
    moments = tuple(ledger.moments())
    return Memory(peak=max(moments, key=lambda moment: moment.total), host=ledger.host, host_peak=ledger.host_peak,
                  moments=moments)


@lru_cache(maxsize=8)
def _policy(anatomy: Anatomy, model: ModelConfig, width: int) -> _Policy:
    def stored(weight: Weight) -> float:
        """Bytes of a weight that does not train."""
        if model.quantization == "4bit" and weight.linear:  # a byte of scale for 64 numbers, a float32 for 256 such bytes
            return weight.numel * (1 / 2 + 1 / 64 + 4 / (64 * 256))
        if model.quantization == "8bit" and weight.linear:  # a float32 scale a row
            return weight.numel + 4 * weight.shape[0]
        return weight.numel * width

    rank, dora, targets = _adapters(model)
    if not model.adapts:
        frozen = [weight for weight in anatomy.weights if any(re.search(one, weight.name) for one in model.freeze)]
        return _Policy(trained=tuple((weight.place, weight.numel) for weight in anatomy.weights if weight not in frozen),
                       frozen=tuple((weight.place, stored(weight), weight.numel) for weight in frozen), rank=0, dora=False,
                       adapted=())
    adapted = tuple(anatomy.targets(targets))
    trained = [(weight.place, numel) for weight in adapted
               for numel in (rank * weight.shape[1], rank * weight.shape[0], *([weight.shape[0]] if dora else []))]
    return _Policy(trained=tuple(trained), rank=rank, dora=dora, adapted=adapted,
                   frozen=tuple((weight.place, stored(weight), weight.numel) for weight in anatomy.weights))


def _adapters(model: ModelConfig) -> tuple[int, bool, str | tuple[str, ...]]:
    if model.lora is not None:
        return model.lora.r, model.lora.dora, model.lora.target_modules
    if model.adapter is None:
        return 0, False, ()
    try:
        settings = json.loads((Path(model.adapter) / "adapter_config.json").read_text())
        return settings["r"], settings.get("use_dora", False), settings["target_modules"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model.adapter {model.adapter!r} has no adapter_config.json with its rank and modules, from "
                          f"which its memory follows: {error}") from None


@lru_cache(maxsize=64)
def _whole_parameters(policy: _Policy, share: int, workers: int) -> int:
    """Numbers of the parameters of which a rank owns some part under ZeRO 1 and 2: it keeps gradients of all of each. Of the
    rank that has most."""
    own = [0] * workers
    start = 0
    for _, numel in policy.trained:
        for rank in range(start // share, min((start + numel - 1) // share + 1, workers)):
            own[rank] += numel
        start += numel
    return max(own)


class _Ledger:
    """The books of one rank. P = numbers that train, p = a rank's share of them, W = bytes of a number."""

    def __init__(self, anatomy: Anatomy, policy: _Policy, train: TrainConfig, batch: Batch, workers: int, width: int,
                 device: Device, quantized: bool) -> None:
        self.anatomy, self.policy, self.train, self.batch = anatomy, policy, train, batch
        self.workers, self.width, self.device, self.zero = workers, width, device, train.zero
        self.P = policy.numbers
        self.p = -(-self.P // workers) if train.zero else self.P
        self.offloads = train.offload_optimizer is not None
        self.accumulates = batch.micro_batches > 1
        self.trains_head = any(place == HEAD or (anatomy.tied and place == EMBEDDING) for place, _ in policy.trained)
        self.quantized = quantized
        self.bucket_used = min(self.P, REDUCE_BUCKET) * width
        # On a GPU the bucket is there whole; on a CPU only the pages that are written to are.
        self.bucket = REDUCE_BUCKET * width if device == "cuda" else self.bucket_used
        self.largest = max((numel for _, numel in policy.trained), default=0)
        self.whole = _whole_parameters(policy, self.p, workers)
        self.host = self.host_peak = 0.0
        self.weights, self.optimizer = self._weights(), self._optimizer()

    # What stays from step to step.

    def _weights(self) -> float:
        frozen = sum(size for _, size, _ in self.policy.frozen)
        if self.zero < 3:
            return self.P * self.width + frozen
        share = self.p * self.width + frozen / self.workers
        if self.train.offload_params is not None:
            if self.train.offload_params == "cpu":
                self.host += share
            return 0.0
        return share

    def _optimizer(self) -> float:
        """Master weights and moments; those on the host are added there, with the gradients that lie beside them."""
        train, numbers = self.train, self.p
        masters = 4.0 * numbers if self.zero or self.width == 2 else 0.0
        moments = {"adamw": 4.0 if train.optimizer_states == "bfloat16" else 8.0, "paged_adamw": 8.0,
                   # A byte each, and a float32 for 256 of them.
                   "adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 2 + 8 / 256}[train.optimizer] * numbers
        if self.offloads:
            gradients = 4.0 * numbers
            if self.zero == 3:
                beside = self.width * numbers
            else:  # a copy of the share in W; and of gradients that accumulate, whole parameters
                beside = self.width * (numbers + self.largest)
                beside += self.width * self.whole if self.accumulates else 0
            if train.offload_optimizer == "cpu":
                self.host += masters + moments + gradients + beside
            else:
                self.host += beside + DISK_BUFFERS * 4.0 * min(numbers, SUB_GROUP)
            self.host_peak = self.host + self._update_bytes(min(numbers, SUB_GROUP) if self.zero == 3 else numbers)
            return 0.0
        if "paged" in train.optimizer:
            self.host += moments
            moments = 0.0
        return masters + moments

    def _update_bytes(self, numbers: int) -> float:
        """What an update of so many numbers at once works with."""
        if self.train.optimizer_states == "bfloat16":  # both moments widened, and the step's size
            return 12.0 * min(numbers, ROUNDED_PIECE)
        return 0.0  # torch's fused kernels and bitsandbytes' work in place

    # Along a step.

    def moments(self):
        """All moments that may be the peak."""
        yield from self._backward()
        yield from self._reduction()
        yield from self._update()
        self.host_peak = max(self.host_peak, self.host)

    def _moment(self, name: str, **bytes_of: float) -> Moment:
        parts = {"weights": 0.0, "gradients": 0.0, "optimizer": 0.0, "activations": 0.0, "head": 0.0, "communication": 0.0}
        parts |= bytes_of
        parts["weights"] += self.weights
        parts["optimizer"] += self.optimizer
        return Moment(name=name, **parts)

    def _layers(self):
        """Memory of each decoder layer."""
        by_layer: dict[int, list[Weight]] = {}
        for weight in self.policy.adapted:
            by_layer.setdefault(weight.place, []).append(weight)
        trained = {place for place, _ in self.policy.trained}
        first = min((place for place in trained if place >= 0), default=0)
        if EMBEDDING in trained:
            first = 0
        dense = self.width * max((weight.numel for weight in self.anatomy.weights if weight.linear), default=0)
        alike: dict[tuple[str, ...], Layer] = {}
        for number in range(self.anatomy.layers):
            adapted = by_layer.get(number, [])
            kind = tuple(weight.module.rpartition(".")[2] for weight in adapted)
            if kind not in alike:
                alike[kind] = layer_memory(self.anatomy, self.batch, width=self.width, device=self.device,
                                           trained=not self.policy.adapted, adapted=adapted, rank=self.policy.rank,
                                           dora=self.policy.dora, dense=dense if self.quantized else 0.0)
            layer = alike[kind]
            # Nothing below the lowest layer that trains has a gradient.
            yield layer if number >= first else replace(layer, kept=0.0, entry=0.0, working=0.0)

    def _backward(self):
        """The end of the forward pass, and the backward pass from the head down to the embedding."""
        anatomy, batch, width = self.anatomy, self.batch, self.width
        stream = 4.0 * anatomy.hidden * batch.positions
        layers = list(self._layers())
        recomputes = self.train.gradient_checkpointing
        # Masks, the last norm with its input, and the hidden states that predict.
        precision = 4 if self.device == "cpu" else width
        around = batch.masked * precision * (self.device == "cpu") + stream * (1 if self.policy.adapted else 2)
        around += 4.0 * anatomy.hidden * batch.predictions
        kept = [layer.entry if recomputes else layer.kept for layer in layers]
        on_host = 0.0
        if self.train.offload_activations:
            on_host = sum(kept) + around
            kept, around = [0.0] * len(kept), 0.0
            on_host += anatomy.hidden * anatomy.vocabulary * width * self.trains_head
            self.host += on_host
        new = self._new_gradients()
        old = self._old_gradients()
        gathered = self._gathered()
        yield self._moment("forward", activations=sum(kept) + around + stream, gradients=old,
                           head=head_forward(anatomy, batch, width=width, device=self.device, trained=self.trains_head),
                           communication=gathered[HEAD] + self._bucket(0.0))
        if self.trains_head:
            yield self._moment("head's backward", activations=sum(kept) + around, gradients=old,
                               head=head_backward(anatomy, batch, width=width, device=self.device),
                               communication=gathered[HEAD] + self._bucket(0.0))
        done = new.get(HEAD, 0.0)
        if anatomy.tied and self.trains_head:  # it waits for the embedding's
            done = width * anatomy.hidden * anatomy.vocabulary
        for number in reversed(range(len(layers))):
            layer, entering = layers[number], stream
            live = sum(kept[: number + 1]) + layer.working + entering
            if recomputes:
                live += layer.kept - layer.entry
            if self.train.offload_activations:
                live += layer.entry
            yield self._moment(f"backward of layer {number}", activations=live, **self._held(done, old, new, number),
                               communication=gathered[number] + self._bucket(done))
            done += new.get(number, 0.0)
        if new.get(EMBEDDING):
            yield self._moment("embedding's backward", activations=2 * stream,
                               **self._held(done + new[EMBEDDING], old, new, EMBEDDING),
                               communication=gathered[EMBEDDING] + self._bucket(done + new[EMBEDDING]))

    def _new_gradients(self) -> dict[int, float]:
        """Bytes of the gradients that a backward pass makes, by place."""
        made: dict[int, float] = {}
        for place, numel in self.policy.trained:
            made[place] = made.get(place, 0.0) + numel * self.width
        return made

    def _old_gradients(self) -> float:
        """Of micro-batches before, and under ZeRO-3 the buffer for them."""
        if self.zero == 3:
            return 0.0 if self.offloads else float(self.p * self.width)
        if not self.accumulates or (self.offloads and self.zero == 2):
            return 0.0
        return float(self.width * (self.P if self.zero < 2 else self.whole))

    def _bucket(self, done: float) -> float:
        """ZeRO's bucket once gradients of ``done`` bytes have been put there."""
        if not self.zero:
            return 0.0
        extra = self.width * self.largest if self.offloads and self.zero < 3 else 0.0  # a buffer for one gradient
        if self.device == "cuda":
            return self.bucket + extra
        if self.zero == 3:  # its pages stay once they were written to
            return self.bucket_used + extra
        return (min(done, self.bucket_used) if self.zero == 2 else 0.0) + extra

    def _held(self, done: float, old: float, new: dict[int, float], place: int) -> dict[str, float]:
        """Gradients beside the bucket while those of ``place`` are made."""
        largest = self.width * max((numel for where, numel in self.policy.trained if where == place), default=0)
        if self.zero >= 2 or (old and self.zero < 2):  # each moves on when it is there
            return {"gradients": old + largest}
        return {"gradients": old + done}

    def _gathered(self) -> dict[int, float]:
        """Bytes of weights that ZeRO-3 has gathered while a place is computed backward; HEAD: at the end of the forward
        pass too."""
        order = [EMBEDDING, *range(self.anatomy.layers), HEAD]
        gathered = dict.fromkeys(order, 0.0)
        if self.zero < 3 or (self.workers == 1 and self.train.offload_params is None):
            return gathered
        numels = dict.fromkeys(order, 0)
        lasting = 0.0
        sizes = [(place, numel) for place, numel in self.policy.trained]
        sizes += [(place, numel) for place, _, numel in self.policy.frozen]
        for place, numel in sizes:
            if numel <= PERSISTENT:
                lasting += numel * self.width
            elif place in numels:
                numels[place] += numel
        if self.anatomy.tied:
            numels[HEAD] = numels[EMBEDDING]
        above = sum(numels.values())
        kept, before = 0, None  # numbers below that stay, and those of the place below if they do not
        for place in order:
            live = kept + numels[place]
            if before is not None:  # fetched ahead
                live += min(PREFETCH, before)
            gathered[place] = lasting + live * self.width
            above -= numels[place]
            stays = 2 * above < REUSE
            kept, before = (kept + numels[place], None) if stays else (kept, numels[place])
        return gathered

    def _reduction(self):
        """The gradients of all ranks are added up, in a copy of the bucket."""
        width, P = self.width, self.P
        copied = self.workers > 1
        if self.zero == 3:
            # Each rank's pieces are put side by side first; gloo reduces a copy of that. The embedding is still gathered,
            # since no gradient leaves it backward, which is the sign for its release.
            copies = 1 + (copied and self.device == "cpu")
            yield self._moment("reduction", gradients=self._old_gradients(), communication=self._bucket(P * width)
                               + copies * self.bucket_used + self._gathered()[EMBEDDING])
            return
        if self.zero == 0:
            yield self._moment("reduction", gradients=P * width, communication=min(P, REDUCE_BUCKET + self.largest) * width)
            return
        own = 0.0 if self.offloads else float(width * self.whole)
        if self.zero == 1:
            moved = self.bucket_used
            yield self._moment("reduction", gradients=P * width - moved,
                               communication=self.bucket + (moved if copied else 0))
            yield self._moment("own gradients", gradients=P * width - moved + own, communication=self.bucket)
            return
        old = self._old_gradients()
        yield self._moment("reduction", gradients=old, communication=self._bucket(P * width) + copied * self.bucket_used)
        yield self._moment("own gradients", gradients=old + own, communication=self._bucket(P * width))

    def _update(self):
        width, p = self.width, self.p
        if self.zero == 0:
            widened = 4.0 * p if width == 2 else 0.0
            yield self._moment("update", gradients=p * width + widened,
                               optimizer=self._update_bytes(self.largest))
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
        # Norms are taken in float64, a gradient at a time.
        norm = 8.0 * min(self.largest, at_once)
        yield self._moment("gradient norm", gradients=own, optimizer=norm, communication=lasting)
        yield self._moment("flat gradients", gradients=own + width * at_once + widened, communication=lasting)
        stays = own if self.zero == 3 else 0.0
        yield self._moment("update", gradients=stays + 4.0 * at_once, communication=lasting,
                           optimizer=self._update_bytes(at_once))
