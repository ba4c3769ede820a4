"""Reads the directory of on-policy rounds. Files may be missing: the rounds may be under way."""

from __future__ import annotations

import io
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from raydpo.config import RewardConfig, reward_name
from raydpo.config.rewards import only_duels
from raydpo.errors import RaydpoError
from raydpo.rundir.directory import (
    CONFIG,
    LEDGER,
    PROMPTS,
    ROUND_HELD_OUT,
    ROUNDS,
    SCORES,
    SUMMARY,
    TRAIN,
    round_folder,
)
from raydpo.rundir.read import read_file
from raydpo.rundir.records import finite
from raydpo.storage.files import Storage
from raydpo.storage.uri import redacted

__all__ = ["RewardRecord", "RoundsRecord", "is_rounds"]


@dataclass(frozen=True)
class RewardRecord:
    """One reward function of the rounds. ``kind``: what computes it, such as ``regex``; ``unsafe``: it runs code without a
    sandbox; ``duels``: a judge compares answers."""

    name: str
    kind: str
    weight: float
    unsafe: bool
    duels: bool


@dataclass(frozen=True)
class RoundsRecord:
    """The content of a directory of rounds. What is missing there is empty or None.

    Attributes:
        place: local path or URI, without secrets.
        config: the resolved configuration, without secrets; {} if there is none.
        state: of the last command: running, paused, done, stopped, interrupted or failed; None if unknown.
        why: a sentence about the state, such as why the rounds ended before the last one; None if there is none.
        rounds: rows of rounds.parquet in order of round: ``rundir.rounds.ROUNDS_SCHEMA``, maps as dictionaries. A number
            that is not finite is None.
    """

    storage: Storage
    place: str
    name: str
    config: dict[str, Any]
    state: str | None
    why: str | None
    rounds: list[dict[str, Any]]

    @classmethod
    def read(cls, storage: Storage) -> RoundsRecord:
        """Read the configuration, the ledger and the figures. The other files are read when they are asked for.

        Raises:
            RaydpoError: if one of these files is damaged, naming it.
        """
        config = read_file(storage, CONFIG, yaml.safe_load) or {}
        ledger = read_file(storage, LEDGER, json.loads)
        if not isinstance(ledger, dict):
            raise RaydpoError(f"{storage}/{LEDGER} is not a record of rounds; run 'raydpo rounds' to write it again")
        name = config.get("name") or ledger.get("name") or str(storage).rstrip("/").rsplit("/", 1)[-1]
        table = _table(storage, ROUNDS)
        if table is None and any(isinstance(one, dict) and one.get("figures") for one in ledger.get("rounds") or ()):
            raise RaydpoError(f"{storage}/{ROUNDS} is missing; run 'raydpo rounds' again, which writes it")
        rows = [] if table is None else [finite(row) for row in table.to_pylist(maps_as_pydicts="strict")]
        rows.sort(key=lambda row: row["round"])
        return cls(storage, str(storage), str(name), redacted(config), ledger.get("status"), ledger.get("why"), rows)

    def setting(self, key: str) -> Any:
        """Return the value of a key such as ``rounds.sample.n``, None if it is not set."""
        tree: Any = self.config
        for part in key.split("."):
            tree = tree.get(part) if isinstance(tree, dict) else None
        return tree

    @property
    def rewards(self) -> list[RewardRecord]:
        """The reward functions, in the order of the configuration."""
        return [_reward(tree) for tree in self.setting("rounds.rewards") or ()]

    @property
    def only_duels(self) -> bool:
        """Whether nothing but a judge's duels decides the reward, so that the success is a win rate."""
        return only_duels(self.rewards)

    @property
    def trained(self) -> list[dict[str, Any]]:
        """The rows of all rounds but round 0. The last one may have ended the rounds before it trained."""
        return [row for row in self.rounds if row["round"] > 0]

    @property
    def seconds(self) -> float:
        """Seconds of all stages of all rounds."""
        return sum(value or 0.0 for row in self.rounds for value in (row.get("seconds") or {}).values())

    def sampled(self, row: dict[str, Any], key: str = "answers") -> int:
        """Return a count of a round's training answers; 0 where the round sampled none of its own: round 0, and offline
        rounds after the first."""
        again = row["round"] > 1 and bool(self.setting("rounds.offline"))
        return 0 if again else row.get(key) or 0

    def prompts(self, ids: Collection[bytes] | None = None) -> list[dict[str, Any]]:
        """Return prompt_id, split and prompt (text or messages, as JSON) of the prompts; ``ids``: of these alone."""
        table = _table(self.storage, PROMPTS, ("prompt_id", "split", "prompt"))
        if table is None:
            return []
        if ids is not None:
            table = table.filter(pc.is_in(table["prompt_id"], pa.array(list(ids), table["prompt_id"].type)))
        return table.to_pylist()

    def held_out(self, number: int) -> pa.Table | None:
        """Return the answers to held-out prompts after a round, without their tokens: prompt_id, sample, answer, end,
        reward, parts, error, and length in tokens. None if they are not there."""
        columns = ("prompt_id", "sample", "answer_ids", "answer", "end", "reward", "parts", "error")
        table = _table(self.storage, f"{round_folder(number)}/{ROUND_HELD_OUT}", columns)
        if table is None:
            return None
        length = pc.list_value_length(table["answer_ids"])
        return table.drop_columns(["answer_ids"]).append_column("length", length)

    def errors(self, number: int) -> list[str]:
        """Return what reward functions failed with in a round, in training answers and then in held-out ones: ``name: Type:
        message``, once for each answer and function."""
        folder = round_folder(number)
        tables = [_table(self.storage, f"{folder}/{name}", ("error",)) for name in (SCORES, ROUND_HELD_OUT)]
        said = [text for table in tables if table is not None for text in table["error"].to_pylist() if text]
        return [line for text in said for line in text.splitlines()]

    def training(self, number: int) -> dict[str, Any] | None:
        """Return the summary of a round's training; None if it has not finished."""
        return read_file(self.storage, f"{round_folder(number)}/{TRAIN}/{SUMMARY}", json.loads)


def is_rounds(storage: Storage) -> bool:
    """Whether the directory holds on-policy rounds."""
    return storage.exists(LEDGER)


def _table(storage: Storage, name: str, columns: tuple[str, ...] | None = None) -> pa.Table | None:
    def parse(data: bytes) -> pa.Table:
        try:
            return pq.read_table(io.BytesIO(data), columns=columns and list(columns))
        except OSError as error:  # what pyarrow raises of damaged pages
            raise ValueError(error) from None

    return read_file(storage, name, parse)


def _reward(tree: dict[str, Any]) -> RewardRecord:
    try:
        name = reward_name(RewardConfig(**tree))
    except ValueError:  # written by another version
        name = str(tree.get("name") or tree.get("use") or "reward")
    judge = tree.get("judge") or {}
    kind = tree.get("use") or (tree.get("reward_model") and f"reward model {tree['reward_model']}")
    return RewardRecord(
        name=name,
        kind=str(kind or f"judge {judge.get('model', '')}"),
        weight=float(tree.get("weight", 1.0)),
        unsafe=bool(tree.get("unsafe")),
        duels=bool(judge) and tree.get("scale") != "score",
    )
