"""Weights and optimizer state of the trained parameters, as named fragments in safetensors files.

DeepSpeed keeps master weights and moments in flat tensors, split by ZeRO stage and number of ranks, and saves them that way,
in pickles. Here every rank writes what it owns under the parameter's own name and its offset in the flattened parameter, and
reads what it owns now. So a checkpoint fits any number of ranks, any ZeRO stage and any kind of AdamW, and contains neither
frozen weights nor code.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raydpo.errors import TrainError
from raydpo.training.policy.moments import PIECE, Moment, begin_moments, moments_of

__all__ = ["TrainedState"]

_FILE_BYTES = 2 << 30
_WEIGHT = "weight"


@dataclass(frozen=True)
class Fragment:
    """Elements ``start`` to ``start + numel`` of a flattened parameter, stored in ``flat`` from ``offset``.

    Attributes:
        flat: the tensor that the optimizer updates; also the key of its state.
        total: number of elements of the whole parameter.
    """

    name: str
    start: int
    numel: int
    total: int
    flat: Tensor
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """The fragment's elements of ``flat``, or of a tensor of the same shape."""
        return tensor.view(-1).narrow(0, self.offset, self.numel)

    def within(self, first: int, end: int) -> Fragment | None:
        """The part of it that is stored in ``flat`` from ``first`` to before ``end``, or None."""
        first, end = max(first, self.offset), min(end, self.offset + self.numel)
        if first >= end:
            return None
        return replace(self, start=self.start + first - self.offset, numel=end - first, offset=first)


class TrainedState:
    """The float32 weights and the optimizer state of the trained parameters on this rank.

    Args:
        engine: a DeepSpeed engine.
        parameters: its trained parameters by name.
        zero: its ZeRO stage.
    """

    def __init__(self, engine: Any, parameters: Mapping[str, Tensor], zero: int) -> None:
        self._engine, self._parameters, self._zero = engine, dict(parameters), zero

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer inside DeepSpeed's wrappers."""
        return getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)

    def fragments(self) -> list[Fragment]:
        """Fragments on this rank. Over all ranks, they contain every element at least once."""
        return [fragment for name, parameter in self._parameters.items() for fragment in self._locate(name, parameter)]

    def _locate(self, name: str, parameter: Tensor) -> Iterator[Fragment]:
        wrapper = self._engine.optimizer
        if self._zero == 3:
            group, offset, share = wrapper.grad_position[wrapper.get_param_id(parameter)]
            start, total = share * dist.get_rank(), parameter.ds_numel
            flat = wrapper.fp32_partitioned_groups_flat[group]
            if start < total:  # the shares of the last ranks are padded
                yield Fragment(name, start, min(share, total - start), total, flat, offset)
        elif self._zero:
            place = parameter._hp_mapping
            if place is not None:
                lower, higher = place.lp_fragment_address, place.hp_fragment_address
                flat = wrapper.single_partition_of_fp32_groups[place.param_group_index]
                yield Fragment(name, lower.start, lower.numel, parameter.numel(), flat, higher.start)
        else:
            yield Fragment(name, 0, parameter.numel(), parameter.numel(), self._master(parameter), 0)

    def _master(self, parameter: Tensor) -> Tensor:
        """Without ZeRO: the float32 copy of a bfloat16 parameter, or the parameter itself."""
        wrapper = self._engine.optimizer
        for lower, higher in zip(getattr(wrapper, "fp16_groups", []), getattr(wrapper, "fp32_groups", []), strict=True):
            for parameter_of_group, master in zip(lower, higher, strict=True):
                if parameter_of_group is parameter:
                    return master
        return parameter

    @property
    def bytes(self) -> float:
        """Largest size of this rank's share: a float32 weight and AdamW's two moments, in at most float32, a number."""
        return 12.0 * sum(fragment.numel for fragment in self._own_fragments())

    def _own_fragments(self) -> list[Fragment]:
        """The fragments that this rank writes. Over all ranks, they contain every element once."""
        fragments = self.fragments()
        # Without ZeRO every rank has everything.
        return fragments if self._zero else fragments[dist.get_rank() :: dist.get_world_size()]

    def files(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Copy this rank's share to the host's memory, file by file. Yields names and tensors of safetensors files, each of
        about ``_FILE_BYTES``, which share no memory with the state."""
        fragments = self._own_fragments()
        tensors: dict[str, Tensor] = {}
        size = number = 0
        for flat, parts in _by_flat(fragments):
            with self._in_memory(flat):
                stored = {_WEIGHT: Moment(flat.detach())} | moments_of(self.optimizer.state.get(flat, {}), flat)
                for fragment in parts:
                    for kind, moment in stored.items():
                        values = moment.read(fragment.offset, fragment.numel)
                        tensors[_key(kind, fragment)] = values
                        size += values.nbytes
                    if size >= _FILE_BYTES or fragment is fragments[-1]:
                        yield _file(f"{dist.get_rank():05d}", dist.get_world_size(), f"{number:03d}"), tensors
                        tensors, size, number = {}, 0, number + 1

    @property
    def facts(self) -> dict[str, Any]:
        """What ``read`` needs besides the files."""
        return {"optimizer_steps": self._steps(), "parameters": self._totals()}

    def read(self, directory: Path, facts: Mapping[str, Any], ranks: int) -> None:
        """Load the state that any number of ranks wrote under any ZeRO stage.

        Args:
            facts: as they were when the share was written.
            ranks: number of ranks that wrote it. Files of another number of ranks, left by an unfinished upload, are
                skipped.

        Raises:
            TrainError: if an element of a parameter is missing, or a file is damaged.
        """
        if differing := set(self._totals().items()) ^ set(facts["parameters"].items()):
            name, elements = min(differing)
            raise TrainError(
                f"the checkpoint in {directory} trains other parameters than this run, beginning with {name} "
                f"({elements} elements)"
            )
        pieces = _Pieces(directory, ranks)
        for flat, parts in _by_flat(self.fragments()):
            with self._in_memory(flat, changed=True), torch.no_grad():
                for fragment in parts:
                    pieces.copy(_WEIGHT, fragment, fragment.of(flat))
                for kind, moment in begin_moments(self.optimizer, flat, facts["optimizer_steps"]).items():
                    for start in range(0, flat.numel(), PIECE):
                        values = torch.zeros(min(PIECE, flat.numel() - start))
                        for part in filter(None, (fragment.within(start, start + len(values)) for fragment in parts)):
                            pieces.copy(kind, part, values.narrow(0, part.offset - start, part.numel))
                        moment.write(start, values)
                if self._zero == 3:
                    self._engine.optimizer._reassign_or_swap_out_partitioned_parameters(self._group(flat))
        self._publish()

    def _group(self, flat: Tensor) -> int:
        """Under ZeRO-3: the number of DeepSpeed's parameter group whose weights are ``flat``."""
        groups = self._engine.optimizer.fp32_partitioned_groups_flat
        return next(number for number, each in enumerate(groups) if each is flat)

    @contextlib.contextmanager
    def _in_memory(self, flat: Tensor, *, changed: bool = False) -> Iterator[None]:
        """Load ``flat`` and its moments from the disk, if they are offloaded; write them back if ``changed``."""
        wrapper = self._engine.optimizer
        if self._zero != 3 or not wrapper._swappable_optimizer_subgroup(self._group(flat)):
            yield
            return
        group = self._group(flat)
        wrapper._optimizer_states_and_gradient_swap_in(group)
        try:
            yield
        finally:
            (wrapper._optimizer_states_and_gradient_swap_out if changed else wrapper._release_swap_buffers)(group)

    def _totals(self) -> dict[str, int]:
        return {name: getattr(each, "ds_numel", None) or each.numel() for name, each in self._parameters.items()}

    def _steps(self) -> int:
        return max((int(state["step"]) for state in self.optimizer.state.values() if "step" in state), default=0)

    def _publish(self) -> None:
        """Copy the optimizer's weights to the model. Under ZeRO-3, ``read`` has copied all but the small parameters, which
        every rank holds whole."""
        wrapper = self._engine.optimizer
        if self._zero == 3:
            if wrapper.persistent_parameters:  # small ones, which DeepSpeed keeps whole on every rank
                wrapper.persistent_parameters[0].partition(wrapper.persistent_parameters)
                wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)
        elif self._zero:
            wrapper.update_lp_params()
            wrapper._lazy_init_hp_params_optimizer_state()
        else:
            for parameter in self._parameters.values():
                master = self._master(parameter)
                if master is not parameter:
                    parameter.data.copy_(master.data)


class _Pieces:
    """The fragments in a checkpoint's files, by kind and parameter."""

    def __init__(self, directory: Path, ranks: int) -> None:
        self._directory = directory
        self._found: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        for path in sorted(directory.glob(_file("*", ranks, "*"))):
            try:
                file = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise TrainError(f"the checkpoint in {directory} is damaged: {path.name}: {error}") from None
            for key in file.keys():  # noqa: SIM118 - not a dictionary
                kind, name, start = key.split("|")
                numel = file.get_slice(key).get_shape()[0]
                self._found.setdefault((kind, name), []).append((int(start), numel, file, key))

    def copy(self, kind: str, fragment: Fragment, target: Tensor) -> None:
        """Copy the elements of ``fragment`` to ``target``."""
        first, end = fragment.start, fragment.start + fragment.numel
        for start, numel, file, key in sorted(self._found.get((kind, fragment.name), []), key=lambda piece: piece[:2]):
            until = min(end, start + numel)
            if start <= first < until:
                part = file.get_slice(key)[first - start : until - start]
                target.narrow(0, first - fragment.start, until - first).copy_(part)
                first = until
        if first < end:
            lacking = f"{kind} of {fragment.name} lacks elements {first} to {end}"
            raise TrainError(f"the checkpoint in {self._directory} is incomplete: {lacking}")


def _file(rank: str, ranks: int, number: str) -> str:
    return f"state-{rank}-of-{ranks:05d}-{number}.safetensors"


def _by_flat(fragments: Sequence[Fragment]) -> Iterator[tuple[Tensor, list[Fragment]]]:
    """Group consecutive fragments of the same tensor."""
    for _, parts in itertools.groupby(fragments, key=lambda fragment: id(fragment.flat)):
        found = list(parts)
        yield found[0].flat, found


def _key(kind: str, fragment: Fragment) -> str:
    return f"{kind}|{fragment.name}|{fragment.start}"
