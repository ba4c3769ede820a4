"""The state of rounds: rounds.json, rounds.parquet and round.json. It is read from the files of the rounds, which alone
decide what is done."""

from __future__ import annotations

import io
import json
import re
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from raydpo.config import Config
from raydpo.config.rounds import STAGES
from raydpo.errors import RaydpoError
from raydpo.rounds.stage import Made, made_of
from raydpo.rundir.directory import (
    FINAL,
    LEDGER,
    ROUND,
    ROUND_HELD_OUT,
    ROUND_PAIRS,
    ROUNDS,
    RUN,
    SAMPLES,
    SCORES,
    SUMMARY,
    TRAIN,
    round_folder,
)
from raydpo.rundir.records import finite
from raydpo.rundir.rounds import ROUNDS_SCHEMA
from raydpo.storage.files import Storage
from raydpo.storage.uri import redact
from raydpo.version import __version__

__all__ = ["FILES", "Ledger"]

FILES = {"sample": SAMPLES, "score": SCORES, "pair": ROUND_PAIRS, "train": f"{TRAIN}/{SUMMARY}", "measure": ROUND_HELD_OUT}
"""The file that each stage of a round ends with, in the round's folder."""
Status = Literal["running", "paused", "done", "stopped", "interrupted", "failed"]


class Ledger:
    """All rounds of a configuration, as their files say.

    Attributes:
        records: contents of round.json, by round.
        status: state of the command. why: a sentence about it, None if there is nothing to say.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.storage = config, Storage(config.run_dir)
        self.status: Status = "running"
        self.why: str | None = None
        self.records = {number: record for number in self._numbers() if (record := self._record(number)) is not None}

    def _numbers(self) -> list[int]:
        """Numbers of the rounds that have a folder. A folder with another name, such as round-002.old, is none of them."""
        found = [int(name.removeprefix("round-")) for name in self.storage.list() if re.fullmatch(r"round-[0-9]+", name)]
        return sorted(number for number in found if self.storage.exists(round_folder(number)))

    def _record(self, number: int) -> dict[str, Any] | None:
        name = f"{round_folder(number)}/{ROUND}"
        if not self.storage.exists(name):
            return None
        try:
            record = json.loads(self.storage.read(name))
            return {"figures": dict(record["figures"]), "settings": dict(record["settings"]), "ended": record["ended"]}
        except (ValueError, KeyError, TypeError) as error:
            raise RaydpoError(
                f"{self.storage}/{name} is damaged ({type(error).__name__}: {error}); delete it, and the same command "
                "writes it again"
            ) from None

    def over(self, number: int) -> bool:
        """Whether a round is over. One that ended the run before its training is looked at again by each command."""
        return number in self.records and self.records[number]["ended"] is None

    def figures(self, number: int) -> dict[str, Any]:
        """The figures of a round that is over."""
        return self.records[number]["figures"]

    def steps(self, number: int) -> int:
        """Number of steps that were trained in rounds up to ``number``."""
        return sum(int(one["figures"].get("steps") or 0) for key, one in self.records.items() if key <= number)

    def rows(self) -> list[dict[str, Any]]:
        """The figures of all rounds that have some, in order: rows of ``rundir.rounds.ROUNDS_SCHEMA``."""
        return [{name: one["figures"].get(name) for name in ROUNDS_SCHEMA.names} for _, one in sorted(self.records.items())]

    def stages(self) -> list[tuple[str, Made]]:
        """Names of the Parquet files of all rounds, and what they were made from.

        Raises:
            RaydpoError: if one of them is damaged.
        """
        found = []
        for folder in map(round_folder, self._numbers()):
            for file in FILES.values():
                if file.endswith(".parquet") and (made := made_of(self.storage, f"{folder}/{file}")) is not None:
                    found.append((f"{folder}/{file}", made))
        return found

    def replaceable(self, stage: str, number: int) -> bool:
        """Whether the file of a stage may be made again with other settings: nothing was trained on it, and its answers
        are in the cache. Samples of training prompts are kept, since another engine might not repeat them."""
        after = {"score": number, "pair": number, "measure": 1 if number == 0 else None}.get(stage)
        return after is not None and not self.storage.exists(f"{round_folder(after)}/{TRAIN}/{RUN}")

    def end_round(self, number: int, figures: dict[str, Any], settings: dict[str, Any], ended: str | None = None) -> None:
        """Write round.json, with which a round is over, and the figures of all rounds.

        Args:
            ended: why the run ends with this round before its training; None if the round was trained and measured.
        """
        whole = {"round": number, "raydpo": __version__, "ended": ended, "figures": figures, "settings": settings}
        name = f"{round_folder(number)}/{ROUND}"
        self.storage.write(name, json.dumps(finite(whole), indent=2, allow_nan=False).encode())
        self.records[number] = {"figures": finite(figures), "settings": settings, "ended": ended}
        self.write()

    def set(self, status: Status, why: str | None = None) -> None:
        """Set the state of the command, and write rounds.json."""
        self.status, self.why = status, why
        self.write()

    def write(self) -> None:
        """Write rounds.parquet and rounds.json."""
        if rows := self.rows():
            sink = io.BytesIO()
            pq.write_table(pa.Table.from_pylist([_maps(row) for row in rows], ROUNDS_SCHEMA), sink, compression="zstd")
            self.storage.write(ROUNDS, sink.getvalue())
        self.storage.write(LEDGER, json.dumps(finite(self.to_dict()), indent=2, allow_nan=False).encode())

    def to_dict(self) -> dict[str, Any]:
        """Return the content of rounds.json."""
        count = self.config.rounds.count if self.config.rounds else 0
        numbers = sorted({*range(count + 1), *self.records})
        return {
            "raydpo": __version__,
            "name": self.config.run_name,
            "run_dir": redact(self.config.run_dir),
            "cache": redact(self.config.cache_uri),
            "count": count,
            "status": self.status,
            "stopped": self.why if self.status == "stopped" else None,
            "why": self.why,
            "final": FINAL if any(number and self.over(number) for number in self.records) else None,
            "rounds": [self._entry(number) for number in numbers],
        }

    def _entry(self, number: int) -> dict[str, Any]:
        folder = round_folder(number)
        stages = STAGES if number else ("measure",)
        if number > 1 and self.config.rounds is not None and self.config.rounds.offline:
            stages = STAGES[STAGES.index("pair") :]  # it trains on the samples of round 1
        return {
            "round": number,
            "folder": folder,
            "over": self.over(number),
            "ended": self.records[number]["ended"] if number in self.records else None,
            "stages": {stage: self.storage.exists(f"{folder}/{FILES[stage]}") for stage in stages},
            "figures": self.records[number]["figures"] if number in self.records else None,
        }


def _maps(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose dictionaries are lists of pairs, as pyarrow takes maps."""
    return {name: list(value.items()) if isinstance(value, dict) else value for name, value in row.items()}
