"""What all rounds of a configuration share: prompts, tokeniser, models, and the workers that answer and score."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from raydpo.cluster.resources import resources_for
from raydpo.cluster.work import BlockTask, do_work
from raydpo.config import Config
from raydpo.config.rounds import EveryConfig, RoundsConfig
from raydpo.data.tokenise import Tokeniser
from raydpo.errors import FilesError
from raydpo.evaluation.policy import find_policy
from raydpo.pipeline.prepare import native_dtype
from raydpo.reference.identity import identify, resolve_model
from raydpo.reference.score import ReferenceSpec
from raydpo.rounds.stage import content_digest
from raydpo.rundir.directory import TRAIN, round_folder
from raydpo.storage.files import Storage
from raydpo.terminal.console import Console

__all__ = ["Inputs", "reference_round"]

WORK_BLOCK = 64
"""Least number of answers that a worker makes and stores together; a kill loses one such block for each worker."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of all rounds, within a Ray session.

    Attributes:
        prompts: all prompts, rows of ``rundir.rounds.PROMPT_SCHEMA``.
        known: identities of the policies of rounds that are over, by round.
    """

    config: Config
    console: Console
    tokeniser: Tokeniser
    prompts: pa.Table
    known: dict[int, str] = field(default_factory=dict)

    @property
    def rounds(self) -> RoundsConfig:
        """Section ``rounds``."""
        if self.config.rounds is None:
            raise ValueError("the configuration has no section 'rounds'")
        return self.config.rounds

    @functools.cached_property
    def storage(self) -> Storage:
        """The directory of the rounds."""
        return Storage(self.config.run_dir)

    @functools.cached_property
    def dtype(self) -> str:
        """Precision of all policies."""
        return native_dtype() if self.config.model.dtype == "auto" else self.config.model.dtype

    @functools.cached_property
    def prompts_digest(self) -> str:
        """Digest of the prompts and their columns."""
        return content_digest(self.prompts, ("prompt_id", "split", "prompt", "columns"))

    @property
    def block(self) -> int:
        """Number of answers in a block of work: all answers of a few prompts. No setting that may change changes it."""
        return self.rounds.sample.n * max(1, WORK_BLOCK // self.rounds.sample.n)

    def policy(self, number: int) -> ReferenceSpec:
        """Find and identify the policy after round ``number``; 0 = the initial model.

        Raises:
            FilesError: if it is not the policy that the round trained.
            RaydpoError: if it is not there.
        """
        found = self._policies.get(number)
        if found is None:
            found = self._policies[number] = self._initial() if number == 0 else self._trained(number)
        if self.known.get(number, found.identity.digest) != found.identity.digest:
            raise FilesError(
                f"the policy of round {number} in {self.storage}/{round_folder(number)}/{TRAIN} is not the one that the round "
                f"trained (identity {self.known[number]}, now {found.identity.digest}): its files were changed. Put them "
                "back, or start again with --fresh"
            )
        return found

    @functools.cached_property
    def _policies(self) -> dict[int, ReferenceSpec]:
        return {}

    def _initial(self) -> ReferenceSpec:
        model = self.config.model
        files = resolve_model(model.path), self.dtype, model.adapter and resolve_model(model.adapter)
        identity = identify(*files, model.quantization, model.trust_remote_code, max_length=self.config.data.max_length)
        return ReferenceSpec(
            path=files[0],
            adapter=files[2],
            identity=identity,
            quantization=model.quantization,
            trust_remote_code=model.trust_remote_code,
            layout=model.layout,
            fused=model.fused,
        )

    def _trained(self, number: int) -> ReferenceSpec:
        place = f"{self.config.run_dir}/{round_folder(number)}/{TRAIN}"
        evaluate = self.config.evaluate.model_copy(update={"policy": place, "base": self.config.model.path})
        return find_policy(self.config.model_copy(update={"evaluate": evaluate}), self.dtype).spec

    def work(self, task: BlockTask, tables: Sequence[pa.Table], doing: str) -> list[pa.Table]:
        """Do work on tables in blocks of whole prompts; see ``cluster.work.do_work``."""
        storage, resources = Storage(self.config.cache_uri), resources_for("score", self.config)
        with _progress(self.console, doing) as progress:
            return do_work(
                task,
                tables,
                storage,
                resources,
                block=self.block,
                progress=progress,
                doing=doing,
                warn=self.console.warn,
            )


def reference_round(rounds: RoundsConfig, number: int) -> int:
    """Number of the round whose policy is the reference of round ``number``; 0 = the initial model."""
    if isinstance(rounds.reference, EveryConfig):
        return (number - 1) // rounds.reference.every * rounds.reference.every
    return 0 if rounds.reference == "initial" else number - 1


@contextlib.contextmanager
def _progress(console: Console, doing: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress line from the first call on; if there is no call, everything was stored already."""
    line: Any = None
    with contextlib.ExitStack() as stack:

        def update(done: int, total: int) -> None:
            nonlocal line
            if line is None:
                line = stack.enter_context(console.progress(doing, total, "answers"))
            line.update(done)

        yield update
    if line is None:
        console.say(f"  {doing}: all found in the cache")
