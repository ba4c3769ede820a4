"""K settings of one LoRA policy trained in one process: K ordinary training loops over one model.

Every setting has a ``loop.train_policy`` of its own, with its own loss, optimizer, clipping, evaluations and checkpoints.
What it takes for its engine is a ``SettingEngine``: the model of all settings, seen as one. When the loops ask for the
log-probs of the same micro-batch, it is computed once for all of them, each with its own adapters in its own rows of the
batch, and so are the gradients. A setting that is alone in something (another evaluation interval, a first pass over a step,
a later checkpoint to begin from) is computed alone for as long.

No Ray in here. Shapes: K = settings, A = those of a pass, N = completion tokens of a micro-batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from raydpo.config import TrainConfig
from raydpo.errors import DeviceMemoryError, ModelError, RaydpoError, TrainError
from raydpo.losses import Objective
from raydpo.model.budget import MOST_TRAINED, Budget, find_budget, probe_group
from raydpo.model.layout import Layout, PromptGroup
from raydpo.model.load import add_lora, load_causal_lm, torch_dtype
from raydpo.model.logps import LogpModel
from raydpo.model.selfcheck import TOLERANCES, check_training_mode, choose_layout
from raydpo.model.stacked import AdapterStack, Place, adapter_weights
from raydpo.training.checkpoint import step_of
from raydpo.training.engine import PolicySpec
from raydpo.training.hooks import Hooks
from raydpo.training.host_memory import HostPeak
from raydpo.training.lockstep import Lockstep, Request
from raydpo.training.loop import TrainJob, TrainSummary, train_policy
from raydpo.training.optimizer import make_optimizer
from raydpo.training.pairs import TrainingPairs
from raydpo.training.ranks import OverRanks
from raydpo.training.state import Fragment, TrainedState

__all__ = ["SettingEngine", "SharedPolicy", "train_settings"]

ALONE, BACKWARD, FORWARD = range(3)
"""Kinds of requests. Those that only some loops make come first, so that all are at the same micro-batch when they meet."""
LEAST_POSITIONS = 256
"""Of each setting in a pass, where ``auto`` is to choose: prefixes are shared within a pass. Five settings of a model of
135M parameters took a sixth longer with 256 than with 1,024 on two CPU cores, in two fifths of the memory."""
CHECK_SCALE = 0.05
"""Standard deviation of the adapters' weights while it is checked that rows do not meet."""


@dataclass(frozen=True)
class SharedLayout(Layout):
    """A layout that several settings asked for; ``key`` tells its content."""

    key: bytes = b""


@dataclass
class _Pass:
    """A forward pass with gradient: the log-probs [A, N] of its members, whose slopes come one by one, and what else was
    asked for, [A, N] each."""

    logps: Tensor
    more: tuple[Tensor, ...]
    members: tuple[int, ...]


class SharedPolicy:
    """One model with the adapters of K settings, on this rank.

    Args:
        trains: the settings. What they must have in common is the caller's business, see ``raydpo.together``.
        check_rows: a few pairs of the data, for the self-checks.

    Raises:
        ModelError: if the model cannot be loaded, has adapters that cannot be stacked, or computes other log-probs for
            several settings together than for each alone.
    """

    def __init__(self, spec: PolicySpec, trains: Sequence[TrainConfig], device: torch.device,
                 check_rows: Sequence[PromptGroup] = ()) -> None:
        self.spec, self.device = spec, device
        common = trains[0]
        with HostPeak() as loading:
            model = load_causal_lm(spec.path, spec.dtype, adapter=spec.adapter, train_adapter=True,
                                   quantization=spec.quantization, rope_length=spec.rope_length,
                                   trust_remote_code=spec.trust_remote_code, device=device)
        most = torch.tensor([loading.seconds, loading.bytes], dtype=torch.float64, device=device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        self.load_seconds, self.load_bytes = most.tolist()
        model, starts = _with_adapters(model, spec, [train.seed for train in trains])
        self.stack = AdapterStack(model, starts)
        self.module = LogpModel(model)
        if common.gradient_checkpointing:
            self.module.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._offload_activations = common.offload_activations
        self._layouts: weakref.WeakValueDictionary[bytes, SharedLayout] = weakref.WeakValueDictionary()
        self._laying_out = threading.Lock()
        with torch.no_grad():
            self.module.eval()
            self.layout_line = choose_layout(self.module, device, spec.layout, check_rows).line
            self.layout_line += f"; {self._check_rows(check_rows)}" if len(self.stack) > 1 else ""
            check_training_mode(self.module, device)

    def _check_rows(self, rows: Sequence[PromptGroup]) -> str:
        """Do the rows of a setting depend on nobody else's? Asked with random adapters, a different one for each."""
        weights = self.stack.weights.clone()
        try:
            self.stack.weights.normal_(std=CHECK_SCALE, generator=torch.Generator(self.device).manual_seed(0))
            short = [PromptGroup(group.prompt[-96:], tuple(one[:48] for one in group.completions)) for group in rows]
            layout = self.module.lay_out(short or [probe_group(64, self.module.vocabulary)]).to(self.device)
            everyone = tuple(range(len(self.stack)))
            together = self.compute(layout, everyone)[0]
            alone = [self.compute(layout, (number,))[0][0] for number in everyone]
        finally:
            self.stack.weights.copy_(weights)
        gap = float((together - torch.stack(alone)).abs().mean())
        tolerance = TOLERANCES[torch_dtype(self.spec.dtype)]
        if not gap <= tolerance:
            raise ModelError(f"{type(self.module.causal_lm).__name__} cannot train settings together: its log-probs differ "
                             f"by {gap:.2g} nats a token from those of one setting alone (tolerance {tolerance:g}); train "
                             "them one by one")
        return f"{len(self.stack)} settings together, {gap:.2g} nats a token from one alone"

    def lay_out(self, groups: Sequence[PromptGroup]) -> SharedLayout:
        """The same object for whoever asks for the same groups while one of them still has it."""
        digest = hashlib.blake2b(digest_size=16)
        for group in groups:
            for ids in (group.prompt, *group.completions):
                digest.update(len(ids).to_bytes(4, "little"))
                digest.update(np.ascontiguousarray(ids))
        key = digest.digest()
        with self._laying_out:
            layout = self._layouts.get(key)
            if layout is None:
                plain = self.module.lay_out(groups)
                plain = plain.pin() if self.device.type == "cuda" else plain
                layout = SharedLayout(**vars(plain), key=key)
                self._layouts[key] = layout
        return layout

    def compute(self, layout: Layout, members: Sequence[int], *, log_sum_sq: bool = False) -> tuple[Tensor, ...]:
        """float32 log-probs [A, N] of one micro-batch by each of these settings; see ``model.logps.LogpModel`` for a second
        [A, N]."""
        saved = torch.autograd.graph.save_on_cpu(pin_memory=self.device.type == "cuda") \
            if self._offload_activations and torch.is_grad_enabled() else contextlib.nullcontext()
        with self.stack.using(members), saved:
            layout = layout.to(self.device).repeated(len(members))
            found = self.module(layout, log_sum_sq=True) if log_sum_sq else (self.module(layout),)
            return tuple(each.view(len(members), -1) for each in found)

    def backward(self, done: _Pass, slopes: Mapping[int, Tensor], *, last: bool) -> None:
        """Add the gradients of a pass, given the slope [N] of each member's loss; those of all ranks after the ``last``."""
        nothing = torch.zeros_like(done.logps[0])
        with self.stack.using(done.members):
            torch.autograd.backward(done.logps, torch.stack([slopes.get(number, nothing) for number in done.members]))
        if last and dist.get_world_size() > 1:
            for number in slopes:
                dist.all_reduce(self.stack.gradients[number])

    def find_budget(self, share: float = 1.0) -> Budget:
        """How many positions of a micro-batch fit, when all settings compute it; the same on every rank."""
        everyone = tuple(range(len(self.stack)))

        def run(tokens: int) -> Tensor:
            return self.compute(self.lay_out([probe_group(tokens, self.module.vocabulary)]), everyone)[0]

        moments = 8.0 * self.stack.weights.numel()
        self.module.train()
        most = {kind: max(LEAST_POSITIONS, most // len(self.stack)) for kind, most in MOST_TRAINED.items()}
        budget = find_budget(run, self.device, most=most, share=share, reserve=moments)
        smallest = torch.tensor(budget.tokens, device=self.device)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        return dataclasses.replace(budget, tokens=int(smallest))


class SettingEngine(OverRanks):
    """One setting's part of a ``SharedPolicy``, for ``loop.train_policy``: what ``engine.PolicyEngine`` is to one alone.

    Attributes:
        done: steps that this setting has finished, taken or skipped.
    """

    zero, sequence_parallel, adapts, leads = 0, 1, True, True

    def __init__(self, shared: SharedPolicy, number: int, train: TrainConfig, lockstep: Lockstep, done: int) -> None:
        self.shared, self.number, self.clip, self.done = shared, number, train.clip, done
        self._lockstep = lockstep
        self.device, self.module = shared.device, shared.module
        self.layout_line, self.load_seconds, self.load_bytes = shared.layout_line, shared.load_seconds, shared.load_bytes
        self.weights = shared.stack.weights[number].requires_grad_()
        self.optimizer = make_optimizer([self.weights], train, self.device)
        self._pass: tuple[_Pass, Tensor] | None = None

    @property
    def replicas(self) -> int:
        return self.world_size

    @property
    def replica(self) -> int:
        return self.rank

    def lay_out(self, groups: Sequence[PromptGroup]) -> SharedLayout:
        return self.shared.lay_out(groups)

    def logps(self, layout: SharedLayout, *, log_sum_sq: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """As ``engine.PolicyEngine.logps``, by this setting; with others that ask for the same, where there are any."""
        graded = torch.is_grad_enabled()
        done: _Pass = self._lockstep.ask(self.number, Request(FORWARD if graded else ALONE, (layout.key, log_sum_sq),
                                                              (layout, graded, log_sum_sq)))
        row = done.members.index(self.number)
        logps = done.logps[row].detach()
        if graded:
            self._pass = done, logps.requires_grad_()
        return (logps, *(each[row] for each in done.more)) if log_sum_sq else logps

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradient, and modules in evaluation mode."""
        self.module.eval()
        with torch.no_grad():
            yield

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this rank's share of the step's mean loss; ``last`` marks the step's last micro-batch."""
        done, logps = self._pass
        self._pass = None
        loss.backward()
        self._lockstep.ask(self.number, Request(BACKWARD, id(done), (done, logps.grad, last)))

    def step(self, learning_rate: float) -> float:
        """Clip and apply the gradients; returns their global norm before clipping. A norm that is not finite changes
        nothing."""
        norm = self._lockstep.ask(self.number, Request(ALONE, self.number, lambda: self._step(learning_rate)))
        self.done += 1
        return norm

    def _step(self, learning_rate: float) -> float:
        gradient = self.shared.stack.gradients[self.number]
        norm = float(torch.linalg.vector_norm(gradient))
        if math.isfinite(norm):
            if self.clip is not None:
                gradient.mul_(min(1.0, self.clip / (norm + 1e-6)))
            self.weights.grad = gradient
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        gradient.zero_()
        return norm

    @property
    def state(self) -> TrainedState:
        """Weights and optimizer state, to be written and read."""
        return _VectorState(self)

    def load_whole_models(self) -> None:
        """They are."""

    def gather(self) -> dict[str, Tensor]:
        """This setting's adapters on the CPU of rank 0; elsewhere an empty dict."""
        return self.shared.stack.named(self.number, torch_dtype(self.shared.spec.dtype)) if self.rank == 0 else {}


class _VectorState(TrainedState):
    """The state of a setting, whose weights are parts of one vector; written as the same adapters alone are."""

    def __init__(self, engine: SettingEngine) -> None:
        self._places = {f"policy.{name}": place for name, place in engine.shared.stack.places.items()}
        self._vector = engine.weights
        super().__init__(SimpleNamespace(optimizer=engine.optimizer),
                         {name: place.of(engine.weights.detach()) for name, place in self._places.items()}, zero=0)

    def read(self, directory: Path, facts: Mapping[str, Any], ranks: int) -> None:
        """As of one alone; but what one rank lacks is an error of all, or its other settings would wait for theirs."""
        problem = None
        try:
            super().read(directory, facts, ranks)
        except TrainError as error:
            problem = error
        problems: list[TrainError | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        for found in problems:
            if found is not None:
                raise found

    def _locate(self, name: str, parameter: Tensor) -> Iterator[Fragment]:
        place: Place = self._places[name]
        yield Fragment(name, 0, parameter.numel(), parameter.numel(), self._vector, place.offset)


def train_settings(jobs: Sequence[TrainJob], pairs: TrainingPairs, held_out: TrainingPairs | None, shared: SharedPolicy,
                   hooks: Sequence[Hooks], checkpoints: Sequence[Path | None], scratch: Path,
                   after: Callable[[int, SettingEngine, TrainSummary], None] = lambda *_: None
                   ) -> list[TrainSummary | BaseException]:
    """Train all settings, each as ``loop.train_policy`` would alone.

    Args:
        jobs: one for each setting of ``shared``; all with the same ``tokens_per_batch``, which counts the positions of one
            setting.
        hooks, checkpoints: of each.
        after: called with a setting's number, engine and summary when it has come to its end, before others go on.

    Returns:
        The summary of each, or what ended it; a setting that fails stops no other.

    Raises:
        Exception: of one setting, where several ranks train and the others may not know of it: they would wait for it.
    """
    for job in jobs:
        Objective(job.train)  # a loss of the user's own may be missing on this machine alone
    engines: list[SettingEngine] = []

    def serve(members: list[int], requests: list[Request]) -> list[Any]:
        request = requests[0]
        if request.kind == BACKWARD:
            done, _, last = request.content
            shared.backward(done, {number: one.content[1] for number, one in zip(members, requests, strict=True)}, last=last)
            return [None] * len(members)
        if callable(request.content):
            return [one.content() for one in requests]
        layout, graded, log_sum_sq = request.content
        with torch.set_grad_enabled(graded):
            shared.module.train(graded)  # others may have evaluated in between
            logps, *more = shared.compute(layout, members, log_sum_sq=log_sum_sq)
        return [_Pass(logps, tuple(more), tuple(members))] * len(members)

    def one_alone(number: int) -> None:
        shared.stack.active = (number,)

    def ends_all(error: BaseException) -> bool:
        # Whatever else is explained, all ranks find in the same step.
        return dist.get_world_size() > 1 and (isinstance(error, DeviceMemoryError) or not isinstance(error, RaydpoError))

    lockstep = Lockstep(len(jobs), serve, lambda number: engines[number].done, one_alone, ends_all)
    engines += [SettingEngine(shared, number, job.train, lockstep, 0 if checkpoint is None else step_of(checkpoint))
                for number, (job, checkpoint) in enumerate(zip(jobs, checkpoints, strict=True))]

    def loop(number: int) -> TrainSummary:
        if shared.device.type == "cuda":
            torch.cuda.set_device(shared.device)
        engine, place = engines[number], scratch / str(number)
        place.mkdir(parents=True, exist_ok=True)
        summary = train_policy(jobs[number], pairs, held_out, engine, hooks[number], checkpoints[number], place)
        after(number, engine, summary)
        return summary

    return lockstep.run([lambda number=number: loop(number) for number in range(len(jobs))])


def _with_adapters(model: torch.nn.Module, spec: PolicySpec, seeds: Sequence[int]
                   ) -> tuple[torch.nn.Module, list[dict[str, Tensor]]]:
    """``model`` with adapters, and the weights with which those of each seed begin."""
    if spec.lora is None:
        return model, [adapter_weights(model)] * len(seeds)
    starts: dict[int, dict[str, Tensor]] = {}
    for seed in dict.fromkeys(seeds):
        # Made anew for every seed: PEFT draws more random numbers than it keeps.
        model = add_lora(model.unload() if starts else model, spec.lora, seed)
        starts[seed] = adapter_weights(model)
    return model, [starts[seed] for seed in seeds]
