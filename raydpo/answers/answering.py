"""Answers of a model, computed by Ray actors with one of the engines."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from raydpo.answers.draws import ROWS, answers_identity, draws_of
from raydpo.answers.transformers_engine import answer_all
from raydpo.answers.vllm_engine import open_vllm
from raydpo.model.load import load_causal_lm
from raydpo.reference.identity import on_this_machine, proved_here
from raydpo.reference.score import ReferenceSpec

__all__ = ["Answering"]

PASSED_ON = ("VLLM_BATCH_INVARIANT",)
"""Environment variables that vLLM gets from the command's process, wherever its own process runs."""


def _passed_on() -> dict[str, str]:
    return {name: os.environ[name] for name in PASSED_ON if name in os.environ}


@dataclass(frozen=True, kw_only=True)
class Answering:
    """Work that turns rows of ``draws.ROWS`` into a column ``answer_ids``, list<int32>; see ``cluster.work.BlockTask``.

    An answer includes the token that ended it. An answer of ``max_tokens`` tokens may have none.

    Attributes:
        spec: the model.
        max_tokens: length at which an answer is cut.
        stop: token ids that end an answer.
        batch: number of answers that engine transformers generates at once.
        python, positions, memory_share: as ``open_vllm`` takes them; for engine vllm, which needs ``positions``. No answer
            depends on them.
        section: section of the configuration with ``max_tokens``, ``engine`` and ``vllm_python``, for messages.
        environment: environment variables of vLLM.
    """

    spec: ReferenceSpec
    max_tokens: int
    stop: tuple[int, ...]
    batch: int
    engine: Literal["transformers", "vllm"] = "transformers"
    python: str | None = None
    positions: int = 0
    memory_share: float = 1.0
    section: str = "evaluate"
    environment: Mapping[str, str] = field(default_factory=_passed_on)

    @property
    def identity(self) -> dict[str, Any]:
        return answers_identity(self.spec.identity.digest, self.engine, self.max_tokens, self.stop)

    def open(self, device: str) -> Callable[[pa.Table], pa.Table]:
        """Load the model and return a function that answers a table with the schema ``draws.ROWS``.

        Raises:
            ModelError: if the model's files on this machine differ from ``spec.identity``.
        """
        if self.engine == "vllm":
            answer = open_vllm(
                self.spec,
                self.max_tokens,
                self.stop,
                python=self.python,
                positions=self.positions,
                memory_share=self.memory_share,
                device=device,
                section=self.section,
                environment=self.environment,
            )
        else:
            spec = on_this_machine(self.spec)
            with proved_here(spec):
                model = load_causal_lm(
                    spec.path,
                    spec.identity.dtype,
                    adapter=spec.adapter,
                    device=device,
                    quantization=spec.quantization,
                    rope_length=spec.identity.rope_length,
                    trust_remote_code=spec.trust_remote_code,
                )
            answer = functools.partial(
                answer_all, model, max_tokens=self.max_tokens, stop=self.stop, batch=self.batch, section=self.section
            )

        def act(rows: pa.Table) -> pa.Table:
            prompts = [np.array(ids, np.int32) for ids in rows["prompt_ids"].to_pylist()]
            return pa.table({"answer_ids": pa.array(answer(prompts, draws_of(rows)), ROWS.field("prompt_ids").type)})

        return act
