"""raydpo's policy in plain torch, for machines without DeepSpeed: the kernels are the same, the optimizer is torch's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from raydpo.config import TrainConfig
from raydpo.model.budget import MOST_TRAINED, Budget, find_budget, probe_group
from raydpo.model.layout import Layout, PromptGroup
from raydpo.model.load import add_lora, load_causal_lm
from raydpo.model.logps import LogpModel
from raydpo.model.selfcheck import choose_layout
from raydpo.training.engine import PolicySpec
from raydpo.training.optimizer import make_optimizer

__all__ = ["KernelEngine"]


class KernelEngine:
    """A ``training.protocols.StepEngine`` on one device, without sharding.

    Args:
        check_rows: a few pairs of the data, for the self-check of the layout.
    """

    rank = replica = 0
    replicas = sequence_parallel = world_size = 1
    leads = True

    def __init__(self, spec: PolicySpec, train: TrainConfig, device: torch.device,
                 check_rows: Sequence[PromptGroup] = ()) -> None:
        self.device, self.clip = device, train.clip
        model = load_causal_lm(spec.path, spec.dtype, rope_length=spec.rope_length, device=device)
        self.module = LogpModel(model if spec.lora is None else add_lora(model, spec.lora, train.seed))
        self.trainable = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(self.trainable, train, device)
        self.layout_line = choose_layout(self.module, device, spec.layout, check_rows).line
        self.module.train()

    def lay_out(self, groups: Sequence[PromptGroup]) -> Layout:
        layout = self.module.lay_out(groups)
        return layout.pin() if self.device.type == "cuda" else layout

    def logps(self, layout: Layout, *, log_sum_sq: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        return self.module(layout.to(self.device), log_sum_sq=log_sum_sq)

    def find_budget(self) -> Budget:
        """Token positions of a micro-batch that fit beside the optimizer's two moments."""
        moments = 2.0 * sum(parameter.numel() * parameter.element_size() for parameter in self.trainable)
        return find_budget(lambda tokens: self.logps(self.lay_out([probe_group(tokens, self.module.vocabulary)])),
                           self.device, most=MOST_TRAINED, reserve=moments)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> float:
        """Clip and apply the gradients; returns their global norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.trainable, self.clip if self.clip is not None else float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train()

    def meet(self) -> None:
        """Do nothing: there is one rank."""

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return values

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def gather(self) -> dict[str, Tensor]:
        """The adapters on the CPU, by name."""
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.module.policy.named_parameters()
                if parameter.requires_grad}
