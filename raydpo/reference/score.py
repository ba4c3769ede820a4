"""The reference's forward pass: groups of completions in, per-token log-probs out. Needs torch alone."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import transformers

import raydpo
from raydpo.data.plan import fill_batches
from raydpo.errors import ModelError
from raydpo.model.load import load_causal_lm
from raydpo.model.logps import LogpModel, PromptGroup
from raydpo.reference.identity import ReferenceIdentity, identify

__all__ = ["ReferenceSpec", "Scorer"]


@dataclass(frozen=True, kw_only=True)
class ReferenceSpec:
    """Everything a process needs to load the reference and to prove that it is the right one."""

    path: str
    adapter: str | None
    identity: ReferenceIdentity
    trust_remote_code: bool = False


class Scorer:
    """The reference on one device.

    Args:
        spec: which model; its weights are hashed here too, so that a node with other files under the same path is found
            out.
        device: ``cuda`` or ``cpu``.
        tokens_per_batch: token positions of a forward pass, padding included.

    Raises:
        ModelError: if the files here are another model than ``spec.identity``, or cannot be scored exactly.
    """

    def __init__(self, spec: ReferenceSpec, *, device: str, tokens_per_batch: int) -> None:
        here = identify(spec.path, spec.identity.dtype, spec.adapter)
        if here != spec.identity:
            raise ModelError(f"{spec.path} on {platform.node()} is another model than where the run was started: "
                             f"{'; '.join(here.differences(spec.identity))}")
        self.device = torch.device(device)
        self.tokens_per_batch = tokens_per_batch
        self.model = LogpModel(load_causal_lm(spec.path, spec.identity.dtype, adapter=spec.adapter, device=self.device,
                                              trust_remote_code=spec.trust_remote_code))
        self.model.eval().requires_grad_(False)
        self.model.check(self.device)

    def score(self, groups: Sequence[PromptGroup]) -> list[tuple[np.ndarray, ...]]:
        """float32 log-probs [tokens] of each completion, in the order of ``groups`` and their completions."""
        scored: list[tuple[np.ndarray, ...]] = [()] * len(groups)
        longest = [len(group.prompt) + max(map(len, group.completions)) for group in groups]
        rows = [len(group.completions) for group in groups]
        for batch in fill_batches(longest, rows, self.tokens_per_batch):
            for index, logps in zip(batch, self.model.score([groups[index] for index in batch], self.device), strict=True):
                scored[index] = logps
        return scored

    @property
    def provenance(self) -> dict[str, object]:
        """What made the numbers, for people; no part of the identity."""
        cuda = self.device.type == "cuda"
        return {
            "raydpo": raydpo.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name(self.device) if cuda else platform.processor() or platform.machine(),
            "attention": self.model.causal_lm.config._attn_implementation, "layout": "padded" if cuda else "rows",
            "tokens_per_batch": self.tokens_per_batch, "threads": torch.get_num_threads(),
        }
