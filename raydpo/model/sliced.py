"""Loading a model for ZeRO-3: each process reads its own part of every weight from the files.

transformers lets the first process read whole weights and broadcasts them. Here transformers makes the model on the meta
device and says which tensors of the files become which weights. Then each process makes DeepSpeed's partitioned parameters
and reads their parts by byte range, so that nobody holds, sends or waits for whole weights. Precisions, buffers and ties are
those of a model that is loaded without ZeRO-3.
"""

from __future__ import annotations

import contextlib
import copy
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raydpo.errors import ModelError, reason
from raydpo.model.files import read_header
from raydpo.model.weights import DTYPES, without_report

__all__ = ["Progress", "load_parts", "not_partitioned"]

Progress = Callable[[int, int], None]
"""Called with the bytes of a model's files that are read, and of all of them; from any thread, one at a time. Under ZeRO-3
every process tells how far all are, by its own part."""

READERS = 4
"""Threads that read. More do not help one process, and several processes of a machine read at once."""
BLOCK = 16 << 20
"""Bytes that a thread reads at once: large for a disk, and small beside a model."""


class _UnsuitedError(Exception):
    """The weights cannot be read in parts. The message says why."""


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file. transformers is given it in place of the tensor, and gets a tensor without values from it.

    Attributes:
        begin: first byte in ``file``.
    """

    file: Path
    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: Any) -> _Stored:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self.shape, dtype=dtype or self.dtype, device="meta")

    def read(self, start: int, target: Tensor) -> None:
        """Read ``target.numel()`` elements from element ``start`` on into ``target``, one-dimensional and contiguous."""
        size = self.dtype.itemsize
        with open(self.file, "rb", buffering=0) as stream:
            stream.seek(self.begin + start * size)
            if target.device.type == "cpu" and target.dtype == self.dtype:
                self._fill(stream, target)
                return
            step, on_gpu = BLOCK // size, target.device.type == "cuda"
            # Page-locked memory belongs to the current GPU, which in a new thread is the first one.
            with torch.cuda.device(target.device) if on_gpu else contextlib.nullcontext():
                block = torch.empty(min(step, target.numel()), dtype=self.dtype, pin_memory=on_gpu)
                for done in range(0, target.numel(), step):
                    piece = block[: min(step, target.numel() - done)]
                    self._fill(stream, piece)
                    target[done : done + piece.numel()].copy_(piece)

    def _fill(self, stream: Any, target: Tensor) -> None:
        left = memoryview(target.view(torch.uint8).numpy())
        while left:
            count = stream.readinto(left[: 1 << 30])  # Linux reads 2 GiB at most
            if not count:
                raise ModelError(f"{self.file} was cut short while it was read: it lacks {len(left):,} bytes of a tensor")
            left = left[count:]


@dataclass
class _Origin:
    """Where a weight comes from: one stored tensor, or several that transformers converts.

    Attributes:
        name: the weight.
        first: name of the first weight that the conversion makes.
        tensors: for each pattern of ``converter`` the stored tensors in order; one tensor without a converter.
    """

    name: str
    first: str
    tensors: dict[str, list[_Stored]] = field(default_factory=lambda: defaultdict(list))
    converter: Any = None

    @property
    def stored(self) -> list[_Stored]:
        return [one for each in self.tensors.values() for one in each]


def load_parts(
    from_pretrained: Callable[[], tuple[nn.Module, dict[str, Any]]],
    *,
    check: Callable[[Mapping[str, Any]], None],
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> nn.Module:
    """Load a model under ZeRO-3. All processes of the group call it with the same files, and decide alike how to read.

    Args:
        from_pretrained: transformers' method with its arguments; it returns the loading info, too.
        check: raises if the loading info names missing weights.
        note: called with one line if the weights cannot be read in parts, and the first process reads all of them.

    Returns:
        The model. Its weights are DeepSpeed's parameters, partitioned over all processes.
    """
    model, origins, why = None, {}, ""
    try:
        with without_report(), not_partitioned(), _headers_only() as files:
            model, found = from_pretrained()
        check(found)
        init = _partitioner()
        origins = _origins(model, files)
    except ModelError:
        raise
    except Exception as error:  # another release or a model's own code; transformers' way may do
        why = str(error) if isinstance(error, _UnsuitedError) else reason(error)
    if not _all_ranks(not why):
        del model, origins
        if note is not None:
            note(
                f"the first process reads all weights and sends them to the others: {why or 'another cannot read its part'}"
            )
        model, found = from_pretrained()
        check(found)
        return model
    _read(_replace(model, init, origins), progress, sum(one.bytes for one in files.stored.values()))
    _all_ranks(True)  # who returns knows that nobody reads the files any more
    return model


@dataclass
class _Files:
    """What transformers was to load.

    Attributes:
        stored: the tensors of the files by name.
        mapping: transformers' renamings and conversions, in order.
    """

    stored: dict[str, _Stored] = field(default_factory=dict)
    mapping: list[Any] = field(default_factory=list)


@contextlib.contextmanager
def _headers_only() -> Iterator[_Files]:
    """Let transformers read the headers of safetensors files, not the values: weights stay on the meta device."""
    from transformers import PreTrainedModel

    files, original = _Files(), PreTrainedModel._load_pretrained_model

    def load(model: Any, state_dict: Any, checkpoint_files: list[str], load_config: Any, *more: Any, **others: Any) -> Any:
        if load_config.hf_quantizer is not None:
            raise _UnsuitedError("the model is stored quantized")
        files.stored, files.mapping = _stored(checkpoint_files), load_config.weight_mapping or []
        return original(model, dict(files.stored), checkpoint_files, load_config, *more, **others)

    PreTrainedModel._load_pretrained_model = staticmethod(load)
    try:
        yield files
    finally:
        PreTrainedModel._load_pretrained_model = staticmethod(original)


def _stored(weights: Sequence[str]) -> dict[str, _Stored]:
    stored = {}
    for file in map(Path, weights):
        data, header = read_header(file)
        for name, tensor in header.items():
            if tensor["dtype"] not in DTYPES:
                raise _UnsuitedError(f"{name} in {file.name} has a dtype that torch lacks, {tensor['dtype']}")
            stored[name] = _Stored(file, data + tensor["data_offsets"][0], tuple(tensor["shape"]), DTYPES[tensor["dtype"]])
    return stored


@contextlib.contextmanager
def not_partitioned() -> Iterator[None]:
    """Let transformers load and make models as without ZeRO-3 within the block."""
    from transformers.integrations import deepspeed

    held = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held


def _partitioner() -> Any:
    """DeepSpeed's maker of partitioned parameters, as transformers would use it."""
    import deepspeed
    from transformers.integrations.deepspeed import deepspeed_config

    init = deepspeed.zero.Init(config_dict_or_path=deepspeed_config())
    if init.param_swapper is not None:
        raise _UnsuitedError("weights are kept on a disk (offload_param: nvme)")
    if init.zero_param_process_group is not None or init.quantized_weights or init.quantized_nontrainable_weights:
        raise _UnsuitedError("DeepSpeed keeps weights twice, or quantized")
    if init.mem_efficient_linear:  # as within its context: a backward pass then keeps no gathered weights
        init._enable_mem_efficient_linear()
    return init


def _all_ranks(value: bool) -> bool:
    if not dist.is_initialized():  # DeepSpeed will say so
        return value
    from deepspeed.accelerator import get_accelerator

    flag = torch.tensor(int(value), device=get_accelerator().current_device_name())
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def _origins(model: nn.Module, files: _Files) -> dict[str, _Origin]:
    """Where each weight and buffer of ``model`` comes from that is on the meta device, by name.

    As ``convert_and_load_state_dict_in_model`` of transformers 5.23 (``core_model_loading.py``).
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    stored = files.stored
    renamings = [entry for entry in files.mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in files.mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    wanted = model.state_dict(keep_vars=True)
    prefix, origins = model.base_model_prefix, {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=wanted)
        if target not in wanted:
            continue
        if pattern is None:
            origins.setdefault(target, _Origin(target, target, {"": [stored[name]]}))
        else:
            one = origins.setdefault(target, _Origin(target, target, converter=by_pattern[pattern]))
            if one.converter is not None:
                one.tensors[pattern].append(stored[name])
    for origin in list(origins.values()):
        if origin.converter is not None:
            for target in _convert(origin, model, {key: [one.to() for one in each] for key, each in origin.tensors.items()}):
                origins[target] = _Origin(target, origin.first, origin.tensors, origin.converter)
    empty = {id(tensor) for tensor in wanted.values() if tensor.is_meta}
    known = {id(wanted[target]) for target in origins if target in wanted}
    if empty - known:
        lacking = min(name for name, tensor in wanted.items() if id(tensor) in empty - known)
        raise _UnsuitedError(f"it is unclear where {lacking} comes from")
    return origins


def _convert(
    origin: _Origin, model: nn.Module, tensors: dict[str, list[Tensor]], rows: int | None = None
) -> dict[str, Tensor]:
    """What transformers makes of ``tensors``: the converted tensors by name.

    Args:
        rows: number of rows, if only some of them are converted.
    """

    def shape(name: str) -> SimpleNamespace:  # some conversions look it up
        whole = tuple(getattr(parameter := model.get_parameter(name), "ds_shape", parameter.shape))
        return SimpleNamespace(shape=torch.Size(whole if rows is None else (rows, *whole[1:])))

    one = copy.deepcopy(origin.converter)
    for pattern, each in tensors.items():
        one.collected_tensors[pattern] = each
    made = one.convert(origin.first, model=SimpleNamespace(get_parameter=shape, config=model.config), config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _merges(origin: _Origin) -> bool:
    """Whether the conversion begins with making one tensor of lists of tensors, each of which becomes a row."""
    from transformers.core_model_loading import MergeModulelist

    first = origin.converter.operations[0]
    return type(first) is MergeModulelist and first.dim == 0


def _keeps_rows(origin: _Origin, rows: int) -> bool:
    """Whether row i of the converted tensor is made of row i of the stored ones, or of the i-th stored ones."""
    from transformers import core_model_loading as loading

    merges = _merges(origin)
    if any((len(each) if merges else one.shape[0]) != rows for each in origin.tensors.values() for one in each):
        return False
    operations = origin.converter.operations[merges:]
    kinds = (loading.Concatenate, loading.Chunk, loading.Interleave)
    return len(origin.converter.target_patterns) == 1 and all(
        min(operation.dim0, operation.dim1) > 0
        if type(operation) is loading.Transpose
        else type(operation) in kinds and operation.dim > 0
        for operation in operations
    )


@dataclass
class _Part:
    """A part of a weight, or a whole buffer, to be read.

    Attributes:
        target: its elements, one-dimensional.
        start: number of the first element in the whole.
        shape: of the whole.
    """

    model: nn.Module
    origin: _Origin
    target: Tensor
    start: int
    shape: tuple[int, ...]

    def steps(self) -> list[tuple[int, Callable[[], None]]]:
        """What reads it: bytes and function of each step."""
        if not self.target.numel():
            return []
        origin = self.origin
        if origin.converter is None:
            (source,) = origin.stored
            return [
                (count * source.dtype.itemsize, lambda at=at, count=count: self._plain(source, at, count))
                for at, count in _spans(self.target.numel(), BLOCK // source.dtype.itemsize)
            ]
        size = sum(one.bytes for one in origin.stored)
        rows, row = self.shape[0], prod(self.shape[1:])
        if not _keeps_rows(origin, rows):
            return [(size, self._whole)]
        first, last = self.start // row, -(-(self.start + self.target.numel()) // row)
        each = max(1, BLOCK * rows // size)
        return [
            (size * count // rows, lambda at=first + at, count=count: self._rows(at, count))
            for at, count in _spans(last - first, each)
        ]

    def _plain(self, source: _Stored, at: int, count: int) -> None:
        source.read(self.start + at, self.target[at : at + count])

    def _whole(self) -> None:
        # One at a time: it may be large.
        with _WHOLE:
            made = _convert(self.origin, self.model, {key: [_all(one) for one in each] for key, each in self._tensors})
            flat = made[self.origin.name].reshape(-1)
            self.target.copy_(flat[self.start : self.start + self.target.numel()])

    def _rows(self, at: int, count: int) -> None:
        merges = _merges(self.origin)
        tensors = {
            key: [_all(one) for one in each[at : at + count]] if merges else [_all(one, at, count) for one in each]
            for key, each in self._tensors
        }
        flat = _convert(self.origin, self.model, tensors, count)[self.origin.name].reshape(-1)
        begin = at * prod(self.shape[1:])
        start, stop = max(self.start, begin), min(self.start + self.target.numel(), begin + flat.numel())
        self.target[start - self.start : stop - self.start].copy_(flat[start - begin : stop - begin])

    @property
    def _tensors(self) -> Iterable[tuple[str, list[_Stored]]]:
        return self.origin.tensors.items()


_WHOLE = threading.Lock()


def _spans(total: int, each: int) -> list[tuple[int, int]]:
    """Start and length of spans of at most ``each`` that cover ``total``."""
    return [(at, min(each, total - at)) for at in range(0, total, each)]


def _all(stored: _Stored, at: int = 0, rows: int | None = None) -> Tensor:
    """The stored tensor, or some of its rows."""
    shape = stored.shape if rows is None else (rows, *stored.shape[1:])
    found = torch.empty(shape, dtype=stored.dtype)
    stored.read(at * prod(stored.shape[1:]), found.view(-1))
    return found


def _replace(model: nn.Module, init: Any, origins: Mapping[str, _Origin]) -> list[_Part]:
    """Replace tensors on the meta device: weights by partitioned parameters, buffers by real ones. All are still empty."""
    of = {id(tensor): origins[name] for name, tensor in model.state_dict(keep_vars=True).items() if name in origins}
    parts: list[_Part] = []
    new: dict[int, Tensor] = {}  # tied weights stay tied

    def real(tensor: Tensor) -> Tensor:
        if id(tensor) not in new:
            if isinstance(tensor, nn.Parameter):
                made, target, start = _partitioned(tensor, init)
            else:
                made, start = torch.empty_like(tensor, device="cpu"), 0
                target = made.view(-1)
            new[id(tensor)] = made
            parts.append(_Part(model, of[id(tensor)], target, start, tuple(tensor.shape)))
        return new[id(tensor)]

    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None and tensor.is_meta:
                    own[name] = real(tensor)
    return parts


def _partitioned(empty: nn.Parameter, init: Any) -> tuple[nn.Parameter, Tensor, int]:
    """DeepSpeed's parameter for ``empty``, this process's part of it without padding, and where the part begins."""
    parameter = nn.Parameter(
        torch.empty(empty.shape, dtype=empty.dtype, device=init.local_device), requires_grad=empty.requires_grad
    )
    vars(parameter).update(vars(empty))
    init._convert_to_deepspeed_param(parameter)
    parameter.partition()  # makes its part, of arbitrary values, and frees the whole
    part = parameter.ds_tensor
    start = parameter.ds_zero_partition_rank * part.ds_numel
    count = max(0, min(part.ds_numel, parameter.ds_numel - start))
    part.data[count:].zero_()
    return parameter, part.data[:count], start


def _read(parts: Sequence[_Part], progress: Progress | None, whole: int) -> None:
    # In the order of the files: who hashes them at the same time needs the same pages.
    in_order = sorted(parts, key=lambda part: min((str(one.file), one.begin) for one in part.origin.stored))
    steps = [step for part in in_order for step in part.steps()]
    total, done, lock = sum(size for size, _ in steps), 0, threading.Lock()

    @torch.no_grad()  # which is a thread's own
    def read(step: tuple[int, Callable[[], None]]) -> None:
        nonlocal done
        step[1]()
        with lock:
            done += step[0]
            if progress is not None:
                progress(done * whole // total, whole)

    with ThreadPoolExecutor(max_workers=min(READERS, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(read, step) for step in steps]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
