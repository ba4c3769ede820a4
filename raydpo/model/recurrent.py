"""Layers that carry a state from token to token (Mamba, gated delta rule, short convolution), in packed layouts.

Such a mixer reads a pack as one long sequence, so that the state of one completion reaches the next. Here it gets padded
rows in place of the pack: for each leaf of the prefix tree, the positions on the path from its root. Padding on the right
changes nothing for a causal layer. Its outputs go back to the pack. Those of a shared prefix are equal in all rows, so they
are taken from one. Everything else, attention too, computes the pack. Kernels and states stay the architecture's own.

Mixers are found by trying (``find_mixers``), not by a list of names. Whether a layout is then exact is for
``model.selfcheck`` to decide.

Shapes: T = positions of the pack, R = rows, L = positions of a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raydpo.data.shapes import PADDED_MULTIPLE
from raydpo.errors import ModelError
from raydpo.model.attention import watch_callers
from raydpo.model.segments import Segments
from raydpo.model.tree import PrefixTree, TreeNode
from raydpo.model.varlen import gather

__all__ = ["Mixers", "Rows", "find_mixers"]

BUCKETS = 4
"""Most batches of rows of similar length that a mixer computes one after the other. Under ZeRO-3 it is the exact number
where each batch gathers weights (see ``model.leaves``), since all ranks must gather as often."""
BUCKET_COST = 256
"""Positions of padding that a further batch must save."""
CUTS = 24
"""A batch begins only where rows are shorter by this part of the longest row, which bounds the work of choosing."""
PROBE_TOKENS = 37
"""Positions of the sequence on which mixers are sought. No width of a layer has this size."""
PROBE_PLACE = 11
"""The position that is changed there."""
SHAPE = (1, PROBE_TOKENS)
"""First sizes of tensors with something for each position there."""
MIXED = 1e-4
"""Change of an output, relative to the largest one, above which a module mixes positions. Rounding changes less."""


@dataclass(frozen=True)
class Rows:
    """The rows that mixers compute for a pack.

    Attributes:
        index: [R, L] for each batch of rows, positions in the pack; 0 in the padding.
        back: [T], for each position the place of its output among the R * L of all batches, one batch after the other.
    """

    index: tuple[Tensor, ...]
    back: Tensor

    @classmethod
    def of(cls, nodes: Sequence[TreeNode], buckets: int | None = None) -> Rows:
        """Make them from the nodes of a tree.

        Args:
            buckets: the exact number of batches; without it as many as pay, up to ``BUCKETS``.
        """
        inner = {run for node in nodes for run in node.path}
        leaves = [node.with_path for node in nodes if (node.start, node.length) not in inner]
        paths = [np.concatenate([np.arange(start, start + length) for start, length in path]) for path in leaves]
        paths.sort(key=len, reverse=True)
        index, back, done = [], np.full(nodes[-1].start + nodes[-1].length, -1), 0
        for low, high in _cut([len(path) for path in paths], buckets):
            width = -(-len(paths[low]) // PADDED_MULTIPLE) * PADDED_MULTIPLE if low < high else PADDED_MULTIPLE
            rows = np.zeros((max(1, high - low), width), dtype=np.int64)
            for number, path in enumerate(paths[low:high]):
                rows[number, : len(path)] = path
                new = back[path] < 0
                back[path[new]] = (done + number * width + np.arange(len(path)))[new]
            index.append(torch.from_numpy(rows))
            done += rows.size
        return cls(tuple(index), torch.from_numpy(back))

    def to(self, device: torch.device) -> Rows:
        return Rows(tuple(one.to(device, non_blocking=True) for one in self.index), self.back.to(device, non_blocking=True))


def _cut(lengths: Sequence[int], buckets: int | None) -> list[tuple[int, int]]:
    """Ranges of ``lengths`` (descending) with the least padding. With ``buckets``, empty ranges make up that number."""
    count, price = len(lengths), 0 if buckets else BUCKET_COST
    starts = [0]
    for place in range(1, count):
        if lengths[starts[-1]] - lengths[place] >= max(1, lengths[0] // CUTS):
            starts.append(place)
    ends = [*starts[1:], count]
    # least[end]: the least work for the rows before ``end``, and the ranges that take it.
    least: dict[int, tuple[float, tuple[tuple[int, int], ...]]] = {0: (0, ())}
    best = None
    for _ in range(buckets or BUCKETS):
        found = {}
        for end in ends:
            options = [
                (work + (end - start) * lengths[start] + price, (*ranges, (start, end)))
                for start, (work, ranges) in least.items()
                if start < end
            ]
            if options:
                found[end] = min(options)
        least = found
        if count in least and (best is None or least[count] < best):
            best = least[count]
    chosen = list(best[1])
    return chosen + [(count, count)] * ((buckets or 0) - len(chosen))


@dataclass
class Mixers:
    """The mixers of a model, and the pack that it computes.

    Attributes:
        kinds: names of the mixers' classes; none until ``wrap``.
        segments: the pack that is being computed, or None: then a mixer computes its inputs as they are.
    """

    kinds: tuple[str, ...] = ()
    segments: Segments | None = field(default=None, repr=False)

    def wrap(self, model: nn.Module, kinds: Collection[str]) -> None:
        """Make the modules of ``model`` whose class is named in ``kinds``, and no others, compute packs in rows."""
        gathered = {part for leaf in model.modules() if getattr(leaf, "_z3_leaf", False) for part in leaf.modules()}
        for module in model.modules():
            if isinstance(vars(module).get("forward"), _InRows):
                del module.forward
            if type(module).__name__ in kinds:
                partitioned = any(hasattr(parameter, "ds_id") for parameter in module.parameters())
                buckets = BUCKETS if partitioned and module not in gathered else None
                module.forward = _InRows(module, self, buckets)  # type: ignore[method-assign]
        self.kinds = tuple(sorted(kinds))

    @contextlib.contextmanager
    def over(self, segments: Segments | None) -> Iterator[None]:
        """Context in which mixers compute the pack ``segments``."""
        before, self.segments = self.segments, segments
        try:
            yield
        finally:
            self.segments = before

    def recomputing(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of a layer's forward pass and of its repetition in the backward pass, see ``torch.utils.checkpoint``: a
        backward pass begins after the forward pass has left ``over``, and may run in another thread."""
        return contextlib.nullcontext(), self.over(self.segments)


class _InRows:
    """The forward of a mixer: its own forward on the rows of the pack that ``mixers`` computes.

    Args:
        buckets: see ``Rows.of``.
    """

    def __init__(self, module: nn.Module, mixers: Mixers, buckets: int | None) -> None:
        self.plain, self.module, self.mixers, self.buckets = module.forward, module, mixers, buckets

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        segments, name = self.mixers.segments, type(self.module).__name__
        if segments is None:
            return self.plain(*args, **kwargs)
        if segments.group is not None:
            raise ModelError(f"{name} carries a state along whole sequences, so ranks cannot share their positions")
        kwargs.pop("segments", None)  # kernels may refuse what they do not know
        shape = 1, segments.positions
        device = next((one.device for one in _tensors((args, kwargs)) if one.shape[:2] == shape), None)
        if device is None:
            raise ModelError(f"{name} has no input with the {segments.positions} positions of the pack")
        rows = self._rows(segments, device)
        outputs = []
        with self.mixers.over(None):  # a mixer may have others in it
            for index in rows.index:
                own_args, own_kwargs = _each((args, kwargs), shape, lambda one, index=index: _to_rows(one, index))
                outputs.append(self.plain(*own_args, **own_kwargs))
        return _joined(outputs, rows)

    def _rows(self, segments: Segments, device: torch.device) -> Rows:
        key = "rows", self.buckets
        if key not in segments.memo:
            segments.memo[key] = Rows.of(segments.nodes, self.buckets).to(device)
        return segments.memo[key]


def _to_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """[1, T, ...] as [R, L, ...]."""
    taken = gather(tensor[0], index.flatten()) if tensor.is_floating_point() else tensor[0, index.flatten()]
    return taken.view(*index.shape, *tensor.shape[2:])


def _joined(outputs: Sequence[Any], rows: Rows) -> Any:
    """The outputs of all batches of rows as those of the pack: tensors [R, L, ...] become [1, T, ...]."""
    first = outputs[0]
    if isinstance(first, Tensor):
        if any(one.shape[:2] != index.shape for one, index in zip(outputs, rows.index, strict=True)):
            return first
        return torch.cat([one.flatten(0, 1) for one in outputs])[rows.back][None]
    if isinstance(first, (tuple, list)):
        return type(first)(_joined(parts, rows) for parts in zip(*outputs, strict=True))
    return first


def _each(value: Any, shape: tuple[int, int], change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``change`` applied to the tensors in it whose shape begins with ``shape``."""
    if isinstance(value, Tensor):
        return change(value) if value.shape[:2] == shape else value
    if isinstance(value, (tuple, list)):
        return type(value)(_each(one, shape, change) for one in value)
    if isinstance(value, dict):
        return {name: _each(one, shape, change) for name, one in value.items()}
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


@torch.no_grad()
def find_mixers(backbone: nn.Module) -> set[str]:
    """Names of the classes of modules that mix positions without transformers' attention.

    The model computes one sequence, and each module is tried alone on what it got there, with one position changed. If
    other positions of its output change, it mixes. It is a mixer if that is not the work of its parts alone: with their
    outputs held fixed at the other positions, its own still change.

    Args:
        backbone: a model without its head, with float32 weights on a CPU, that uses ``model.attention.ATTENTION``.
    """
    tokens = torch.arange(PROBE_TOKENS) % backbone.config.get_text_config().vocab_size
    segments = Segments.of(PrefixTree.build([tokens.numpy()], None), "sdpa")
    calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, (args, kwargs))

    hooks = [one.register_forward_pre_hook(note, with_kwargs=True) for one in backbone.modules() if one is not backbone]
    try:
        with watch_callers() as attending:
            backbone(
                input_ids=tokens[None], position_ids=torch.arange(PROBE_TOKENS)[None], segments=segments, use_cache=False
            )
    finally:
        for hook in hooks:
            hook.remove()
    known: dict[Any, list[nn.Module]] = {}
    return {type(one).__name__ for part in _called(backbone, calls) for one in _mixing(part, calls, attending, known)}


def _called(module: nn.Module, calls: Collection[nn.Module]) -> Iterator[nn.Module]:
    """The nearest modules below ``module`` that were called."""
    for part in module.children():
        if part in calls:
            yield part
        else:
            yield from _called(part, calls)


def _mixing(
    module: nn.Module, calls: dict[nn.Module, Any], attending: Collection[nn.Module], known: dict[Any, Any]
) -> list[nn.Module]:
    """The mixers in ``module`` or below. ``known``: those of modules that are built alike."""
    built = tuple(type(one) for one in module.modules())
    if built not in known:
        inner = list(_called(module, calls))
        found = [one for part in inner for one in _mixing(part, calls, attending, known)]
        if not any(one in attending for one in module.modules()):
            parts = [part for part in inner if found and _mixes(part, calls)]
            found = [module] if _mixes(module, calls, parts) else found
        known[built] = found
    return known[built]


def _mixes(module: nn.Module, calls: dict[nn.Module, Any], held: Sequence[nn.Module] = ()) -> bool:
    """Whether other positions of the output change with one of the input.

    Args:
        held: parts of the module whose outputs are held fixed at the other positions. Their inputs count as outputs.
    """
    args, kwargs = calls[module]
    if not any(_is_stream(one) for one in _tensors((args, kwargs))):
        return False
    before = _watched(module, (args, kwargs), held)
    after = _watched(module, _each((args, kwargs), SHAPE, _changed), held, before)
    others = torch.arange(PROBE_TOKENS) != PROBE_PLACE
    for a, b in zip(_tensors(before), _tensors(after), strict=True):
        if _is_stream(a) and float((a - b)[:, others].abs().max()) > MIXED * float(a[:, others].abs().max()):
            return True
    return False


def _watched(module: nn.Module, inputs: Any, held: Sequence[nn.Module], fixed: Sequence[Any] = ()) -> list[Any]:
    """Run ``module`` on ``inputs`` (args, kwargs): inputs and outputs of the calls of ``held``, and its output.

    Args:
        fixed: what an earlier run returned. The outputs of ``held`` are taken from it except at the changed position.
    """
    found: list[Any] = []

    def watch(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        found.append((args, kwargs))
        found.append(output if len(found) >= len(fixed) else _patched(output, fixed[len(found)]))
        return found[-1]

    hooks = [part.register_forward_hook(watch, with_kwargs=True) for part in held]
    try:
        found.append(module(*inputs[0], **inputs[1]))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _patched(output: Any, fixed: Any) -> Any:
    """``output`` at the changed position, ``fixed`` at all others."""
    if isinstance(output, Tensor):
        if not _is_stream(output):
            return fixed
        patched = fixed.clone()
        patched[:, PROBE_PLACE] = output[:, PROBE_PLACE]
        return patched
    if isinstance(output, (tuple, list)):
        return type(output)(_patched(one, other) for one, other in zip(output, fixed, strict=True))
    return output


def _is_stream(tensor: Tensor) -> bool:
    """Whether it has numbers for each position of the probe."""
    return tensor.is_floating_point() and tensor.shape[:2] == SHAPE


def _changed(tensor: Tensor) -> Tensor:
    """``tensor`` with other numbers at one position."""
    if not tensor.is_floating_point():
        return tensor
    tensor = tensor.clone()
    tensor[:, PROBE_PLACE] = tensor[:, PROBE_PLACE].flip(-1) + tensor.std()
    return tensor
