"""What all rounds of a configuration share: prompts, tokeniser, models, and the workers that answer and score."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from raydpo.cluster.resources import resources_for
from raydpo.cluster.work import BlockTask, do_work
from raydpo.config import Config
from raydpo.config.rewards import reward_name
from raydpo.config.rounds import RoundsConfig
from raydpo.data.tokenise import Tokeniser
from raydpo.reference.score import ReferenceSpec
from raydpo.rewards.functions import reward_settings
from raydpo.rounds.stage import content_digest
from raydpo.rounds.training import policy_spec
from raydpo.storage.files import Storage
from raydpo.terminal.console import Console

__all__ = ["Inputs"]


@dataclass(frozen=True)
class Inputs:
    """The inputs of all rounds. Only ``work`` needs a Ray session.

    Attributes:
        prompts: all prompts, rows of ``rundir.rounds.PROMPT_SCHEMA``.
    """

    config: Config
    console: Console
    tokeniser: Tokeniser
    prompts: pa.Table

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
    def prompts_digest(self) -> str:
        """Digest of the prompts and their columns."""
        return content_digest(self.prompts, ("prompt_id", "split", "prompt", "columns"))

    @functools.cached_property
    def columns(self) -> frozenset[str]:
        """Names of the columns that reward functions get, of all prompts together."""
        return frozenset(name for text in self.prompts["columns"].to_pylist() for name in json.loads(text))

    def policy(self, number: int) -> ReferenceSpec:
        """Find and identify the policy after round ``number``; 0 = the initial model.

        Raises:
            FilesError: if the round is not trained, or its policy is not the one that it wrote.
        """
        if number not in self._policies:
            self._policies[number] = policy_spec(self.config, number)
        return self._policies[number]

    def say_once(self, line: str) -> None:
        """Print a line that many stages would print, once."""
        if line not in self._said:
            self._said.add(line)
            self.console.say(line)

    @functools.cached_property
    def _said(self) -> set[str]:
        return set()

    @functools.cached_property
    def _policies(self) -> dict[int, ReferenceSpec]:
        return {}

    @functools.cached_property
    def reward_settings(self) -> dict[str, Any]:
        """Settings that decide the rewards, by their keys. See ``rewards.functions.reward_settings``."""
        found: dict[str, Any] = {"rounds.cut": self.rounds.cut}
        for one in self.rounds.rewards:
            key = f"rounds.rewards ({reward_name(one)})"
            found |= {f"{key} {name}": value for name, value in reward_settings(one, self.config).items()}
        return found

    def work(
        self,
        task: BlockTask,
        tables: Sequence[pa.Table],
        doing: str,
        block: int | Sequence[int],
        spent: Callable[[int, float], None],
    ) -> list[pa.Table]:
        """Do work on tables; see ``cluster.work.do_work``."""
        storage, resources = Storage(self.config.cache_uri), resources_for("score", self.config)
        with self.console.part(doing, "answers") as progress:
            return do_work(
                task,
                tables,
                storage,
                resources,
                block=block,
                progress=progress,
                doing=doing,
                warn=self.console.warn,
                spent=spent,
            )
