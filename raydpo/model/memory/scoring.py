"""How a reference is put on the devices that score it: whole, a part on each of several, or in the host's memory.

The memory of one device at the peak of a pass is, in bytes:

    W / N + 2 G + max(A t, logits) + base,    and it must be at most USABLE of the device's memory.

W = weights, N = devices that hold them together, G = the largest thing that is gathered at once (a decoder layer, or the
embedding or the head if one is larger), A = activations of a position, t = positions of the pass. G counts twice, since the
next layer is gathered while one is computed; whole weights gather nothing (G = 0). With the weights in the host's memory
W / N is 0. ``model.partition`` puts them where this decides.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from raydpo.errors import ConfigError
from raydpo.model.budget import MOST_SCORED, STEP
from raydpo.model.files import adapter_files, read_header
from raydpo.model.head import chunk_rows
from raydpo.model.memory.activations import STREAM, scoring_memory
from raydpo.model.memory.anatomy import HEAD, Anatomy
from raydpo.model.memory.ledger import BASE_BYTES, ENOUGH, PERSISTENT, USABLE, stored_bytes

__all__ = ["Choice", "Links", "ScoringRoom", "Wish", "adapter_bytes", "choose_partition", "weight_bytes"]

HIDDEN_FROM = 16_384
"""Positions of a team's micro-batch from which gathers over NVLink take a tenth of the time of a dense model's products."""
HOST_RESERVE = 1.1
"""Host memory that offloaded weights need, over their bytes: they are pinned, and the file's pages pass through."""
MOST_SIZE = 64
"""Most devices of a machine that are tried when asking what would do."""

Offload = Literal["cpu"] | None


class Wish(Protocol):
    """What the user asks for: ``config.ScoreConfig``."""

    @property
    def workers(self) -> int: ...

    @property
    def partition(self) -> Literal["auto"] | int: ...

    @property
    def offload(self) -> Literal["auto", "cpu"] | None: ...

    @property
    def sequence_parallel(self) -> int: ...

    @property
    def tokens_per_batch(self) -> Literal["auto"] | int: ...


@dataclass(frozen=True, kw_only=True)
class Links:
    """How fast weights reach a device that computes, bytes per second, and how fast it computes.

    Attributes:
        name: of the link between devices, for messages.
        gather: from other devices of the machine. host: from the machine's memory.
        seconds: a device's seconds for one position.
    """

    name: str
    gather: float
    host: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ScoringRoom:
    """Devices that score.

    Attributes:
        name: name of a device. device_bytes: its memory by the data sheet.
        per_machine: devices of one machine.
        host_bytes: host memory of one machine that is free for weights; None = unknown.
        links: None = unknown.
    """

    name: str
    device_bytes: float
    per_machine: int
    host_bytes: float | None = None
    links: Links | None = None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How the reference is put on the devices.

    Attributes:
        partition, offload: as in ``config.ScoreConfig``, decided.
        model_bytes: W. weights_bytes: of it on one device.
        gathered_bytes: 2 G. position_bytes: A. logits_bytes: of the head's pass, without positions.
        positions: largest micro-batch of a device that fits, a multiple of 256 and at most ``MOST_SCORED``; 0 = none.
        host_bytes: host memory of one machine that the weights take.
        gather_positions: positions whose products take as long as the gathers of one pass; 0 without gathers, or unknown.
        gather_share: time of gathers over that of products, with micro-batches of ``positions``; None = unknown.
        line: one sentence.
    """

    partition: int
    offload: Offload
    model_bytes: float
    weights_bytes: float
    gathered_bytes: float
    position_bytes: float
    logits_bytes: float
    positions: int
    host_bytes: float = 0.0
    gather_positions: float = 0.0
    gather_share: float | None = None
    line: str = ""

    @property
    def simple(self) -> bool:
        """Whether each device holds the whole reference."""
        return self.partition == 1 and self.offload is None

    @property
    def slower(self) -> float:
        """Factor on the time of the pass. Gathers go on beside products, so they cost time only where they take longer."""
        return max(1.0, self.gather_share or 1.0)

    def total_at(self, positions: int) -> float:
        """Bytes of a device at the peak of a pass."""
        return (
            self.weights_bytes + self.gathered_bytes + max(self.position_bytes * positions, self.logits_bytes) + BASE_BYTES
        )


def weight_bytes(anatomy: Anatomy, dtype: str, quantization: str | None = None) -> float:
    """Bytes of a model's weights as they are loaded. A head that is tied to the embedding counts once."""
    return sum(stored_bytes(weight, _width(dtype), quantization) for weight in anatomy.weights)


def adapter_bytes(directory: str | None, dtype: str) -> float:
    """Bytes of an adapter as it is loaded, from the header of its file; 0 without one."""
    if directory is None:
        return 0.0
    _, header = read_header(adapter_files(directory).weights)
    return float(_width(dtype) * sum(math.prod(tensor["shape"]) for tensor in header.values()))


def choose_partition(
    anatomy: Anatomy,
    wish: Wish,
    room: ScoringRoom,
    *,
    dtype: str,
    longest: int,
    quantization: str | None = None,
    adapter_bytes: float = 0.0,
) -> Choice:
    """Decide how the reference is put on the devices, as far as ``wish`` leaves it open.

    Preferred in this order: whole on each device; the fewest devices of one machine together that have room for
    ``HIDDEN_FROM`` positions; the host's memory, with all devices of a machine in one team, so that it holds one copy, or
    the most devices together if that is faster. Each needs room for ``ENOUGH`` positions, or ``wish.tokens_per_batch``, and
    for the longest sequence.

    Args:
        longest: positions of the longest prompt with one completion, which is never split.
        adapter_bytes: of the reference's adapter.

    Raises:
        ConfigError: if nothing fits, or what ``wish`` asks for cannot; it says what would do.
    """
    return _Question(anatomy, wish, room, dtype, longest, quantization, adapter_bytes).answer()


def _width(dtype: str) -> int:
    return {"float32": 4, "bfloat16": 2}[dtype]


@dataclass(frozen=True)
class _Question:
    anatomy: Anatomy
    wish: Wish
    room: ScoringRoom
    dtype: str
    longest: int
    quantization: str | None
    adapter_bytes: float

    def answer(self) -> Choice:
        self._check()
        found = next((one for one in self._in_order() if one is not None), None)
        if found is None:
            raise ConfigError(self._refusal())
        return replace(found, line=self._line(found))

    @property
    def _alone(self) -> bool:
        """Whether only whole models are possible: bitsandbytes' weights cannot be partitioned."""
        return self.quantization is not None

    @property
    def _sizes(self) -> list[int]:
        """Sizes of teams that the workers and the machines allow, in rising order."""
        workers, here = self.wish.workers, min(self.room.per_machine, self.wish.workers)
        if self.wish.partition != "auto":
            return [self.wish.partition]
        machines = -(-workers // self.room.per_machine)
        fit = [size for size in range(1, here + 1) if workers % size == 0 and here // size * machines >= workers // size]
        return [size for size in fit if size == 1 or (size % self.wish.sequence_parallel == 0 and not self._alone)]

    @property
    def _least(self) -> int:
        """Positions of a device's micro-batch that must fit."""
        budget = self.wish.tokens_per_batch
        return max(-(-self.longest // self.wish.sequence_parallel), ENOUGH if budget == "auto" else budget)

    def _check(self) -> None:
        size, offload, room = self.wish.partition, self.wish.offload, self.room
        if self._alone and (size not in ("auto", 1) or offload == "cpu"):
            field = f"score.partition {size}" if size not in ("auto", 1) else "score.offload cpu"
            raise ConfigError(
                f"{field} and a reference with model.quantization {self.quantization} exclude each other: bitsandbytes' "
                "weights cannot be partitioned; set score.partition and score.offload to auto, or model.quantization to null"
            )
        if size == "auto":
            return
        if size > room.per_machine:
            raise ConfigError(
                f"score.partition {size} needs one machine with {size} GPUs, but the largest has {room.per_machine}, and a "
                "team does not span machines; set it lower, or to auto, which puts the weights in the host's memory if "
                "nothing else serves (score.offload)"
            )
        if self.wish.workers % size:
            raise ConfigError(
                f"{self.wish.workers} workers are not a multiple of score.partition {size}; change one of them"
            )

    def _in_order(self) -> Iterator[Choice | None]:
        """Choices that are possible, the best first."""
        sizes, least, offload = self._sizes, self._least, self.wish.offload
        if self.wish.partition != "auto" and offload != "auto":  # the user has decided; only what can never work is refused
            chosen = self._choice(sizes[0], offload)
            bare = replace(chosen, gathered_bytes=chosen.gathered_bytes / 2).total_at(0)
            yield chosen if bare <= self.room.device_bytes and self._host_holds(chosen) else None
            return
        resident = [] if offload == "cpu" else [self._choice(size, None) for size in sizes]
        on_host = [] if offload is None or self._alone else [self._choice(size, "cpu") for size in reversed(sizes)]
        on_host = [one for one in on_host if self._host_holds(one)]
        yield from (one for one in resident[:1] if one.simple and one.positions >= least)
        teams = [one for one in resident if not one.simple and one.positions >= least]
        large = max(least, HIDDEN_FROM) if self.wish.tokens_per_batch == "auto" else least
        yield from (one for one in teams if one.positions >= large)
        # With few positions gathers show, and so do copies from the host: what takes less time, if that is known.
        host = [one for one in on_host if one.positions >= large][:1]
        yield from sorted([*host, *teams[-1:]], key=lambda one: one.slower)
        yield from (one for one in on_host if one.positions >= least)

    def _choice(self, size: int, offload: Offload, quantization: str | None = None) -> Choice:
        width, room = _width(self.dtype), self.room
        whole = weight_bytes(self.anatomy, self.dtype, self.quantization or quantization) + self.adapter_bytes
        gathers = size > 1 or offload is not None
        kept = self._persistent() if gathers else 0.0
        gathered = 2 * self._largest() if gathers else 0.0
        logits = 4.0 * chunk_rows(self.anatomy.vocabulary, "cuda") * self.anatomy.vocabulary * (1 + self.anatomy.softcap)
        made = Choice(
            partition=size,
            offload=offload,
            model_bytes=whole,
            weights_bytes=(0.0 if offload else whole / size) + kept,
            gathered_bytes=gathered,
            position_bytes=scoring_memory(self.anatomy, width=width),
            logits_bytes=logits,
            positions=0,
            host_bytes=whole * max(1, min(room.per_machine, self.wish.workers) // size) if offload else 0.0,
        )
        left = USABLE * room.device_bytes - made.total_at(0) + logits
        # Of the pass of the head, the stream of all positions is alive beside a chunk of logits.
        most = min(left / made.position_bytes, (left - logits) / (STREAM * self.anatomy.hidden))
        positions = max(0, min(int(most) // STEP * STEP, MOST_SCORED["cuda"]))
        budget = self.wish.tokens_per_batch
        passed = positions if budget == "auto" else min(positions, budget)
        gathers = self._gather_positions(made)
        share = None if room.links is None or not (passed or made.simple) else gathers / max(passed, 1)
        return replace(made, positions=positions, gather_positions=gathers, gather_share=share)

    def _gather_positions(self, choice: Choice) -> float:
        links, size = self.room.links, choice.partition
        if links is None or choice.simple:
            return 0.0
        seconds = choice.model_bytes * (size - 1) / size / links.gather
        seconds += choice.model_bytes / size / links.host if choice.offload else 0.0
        return seconds / links.seconds

    def _host_holds(self, choice: Choice) -> bool:
        free = self.room.host_bytes
        return free is None or choice.offload is None or HOST_RESERVE * choice.host_bytes <= free

    def _largest(self) -> float:
        """G."""
        numels: dict[int, int] = defaultdict(int)
        for weight in self.anatomy.weights:
            if weight.numel > PERSISTENT and weight.place >= HEAD:
                numels[weight.place] += weight.numel
        return float(_width(self.dtype) * max(numels.values(), default=0))

    def _persistent(self) -> float:
        """Bytes of the small parameters that each device keeps whole, at most half a percent of the model."""
        small = sum(weight.numel for weight in self.anatomy.weights if weight.numel <= PERSISTENT)
        return float(_width(self.dtype) * min(small, self.anatomy.parameters // 200))

    # What is said

    def _line(self, choice: Choice) -> str:
        name, positions = self.room.name, f"{choice.positions:,} positions fit"
        if choice.positions < self._least:
            positions += f" by the plan, where {self._least:,} are wanted"
        said = f"reference: {choice.model_bytes / 1e9:,.1f} GB in {self._kind}; "
        if choice.simple:
            return f"{said}whole on each {name}, {positions}"
        size = choice.partition
        where = f"on each of {size} x {name}" if size > 1 else f"on a {name}"
        settings = f"score.partition={size}" + (" score.offload=cpu" if choice.offload else "")
        if choice.offload:
            known = "" if self.room.host_bytes is None else f" of {_gib(self.room.host_bytes)} free"
            need = _gib(HOST_RESERVE * choice.host_bytes)
            said += f"{settings}: weights in the host's memory ({need} GiB of each machine{known}), "
        else:
            said += f"{settings}: {_gib(choice.weights_bytes)} GiB of weights and "
        said += f"{_gib(choice.gathered_bytes)} GiB gathered {where}, {positions}"
        share, links = choice.gather_share, self.room.links
        if links is None or share is None:
            return said
        speed = f"{links.gather / 1e9:g} GB/s by {links.name}" if size > 1 else ""
        speed = ", ".join(filter(None, (speed, f"{links.host / 1e9:g} GB/s from the host" if choice.offload else "")))
        times = f"gathers take {share:.1f} times as long as products"
        if share <= 1:
            times = f"gathers {100 * share:.0f} % of the time"
        return f"{said}; {times} ({speed}, assumed)"

    @property
    def _kind(self) -> str:
        return " and ".join(filter(None, (self.dtype, self.quantization)))

    def _refusal(self) -> str:
        """Why nothing fits, and what would do."""
        wish, room, least = self.wish, self.room, self._least
        here, offers = min(room.per_machine, wish.workers), wish.offload is not None and not self._alone
        asked = [f"score.partition {wish.partition}"] if wish.partition != "auto" else []
        asked += [f"score.offload {'null' if wish.offload is None else wish.offload}"] if wish.offload != "auto" else []
        size = self._sizes[-1]
        best = self._choice(size, None)
        told = (
            f"the reference takes {best.model_bytes / 1e9:,.1f} GB in {self._kind} and does not fit on {here} x {room.name} "
            f"({_gib(room.device_bytes)} GiB) of one machine{f' with {chr(32).join(asked)}' if asked else ''}: "
            f"{_gib(best.weights_bytes)} GiB of weights{f' on each of {size}' if size > 1 else ''}, "
            f"{_gib(best.gathered_bytes)} gathered, {_gib(max(best.position_bytes * least, best.logits_bytes))} for "
            f"{least:,} positions, and {_gib(BASE_BYTES)} of CUDA, of {100 * USABLE:.0f} % of the memory"
        )
        ways = []
        hosts = [self._choice(one, "cpu") for one in reversed(self._sizes)] if not self._alone else []
        fitting = next((one for one in hosts if one.positions >= least), None)
        if fitting is not None:
            need = _gib(HOST_RESERVE * fitting.host_bytes)
            has = "" if not offers or room.host_bytes is None else f", of which {_gib(room.host_bytes)} are free"
            ways.append(f"score.offload=cpu with {need} GiB of host memory on each machine{has}")
        more = next((one for one in self._larger() if self._choice(one, None).positions >= least), None)
        if more is not None and not self._alone and more != wish.partition:
            ways.append(f"{more} such GPUs in one machine (score.workers a multiple of {more}, score.partition={more})")
        if not self._alone and self._choice(1, None, "4bit").positions >= least:
            ways.append("model.quantization=4bit, which changes the log-probs")
        if least > ENOUGH:
            ways.append("fewer positions (data.max_length, score.tokens_per_batch) or a higher score.sequence_parallel")
        return f"{told}. What would do: {'; or '.join(ways) or 'GPUs with more memory'}"

    def _larger(self) -> Iterator[int]:
        steps = range(int(math.log2(MOST_SIZE)) + 1)
        yield from (2**step for step in steps if 2**step % self.wish.sequence_parallel == 0 or not step)


def _gib(count: float) -> str:
    return f"{count / 2**30:,.1f}"
