"""Answers of policy and reference to the same prompts, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raydpo.answers.contests import Contest
from raydpo.data.keys import completion_key
from raydpo.data.messages import Text
from raydpo.data.pairs import PAIR_SCHEMA
from raydpo.data.tokenise import Tokeniser
from raydpo.evaluation.prompts import Prompt
from raydpo.evaluation.style import is_cut, length_growth, measure_style

__all__ = ["Answers", "answer_pairs"]

_IDS = pa.list_(pa.int32())
JUDGES = ("reward_model", "score_with", "judge")
"""Settings of section ``evaluate`` that name a judge of answers."""
SHOWN = 5
"""Number of prompts whose answers are in evaluation.json; samples.parquet has all answers."""


def answer_pairs(prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]) -> pa.Table:
    """Return answers as rows of ``data.pairs.PAIR_SCHEMA``, with which a cache is filled.

    Chosen and rejected are both the answer; the same completion is scored once.

    Args:
        prompts, answers: token ids, int32, one prompt for each answer.
    """
    keys = [completion_key(*pair) for pair in zip(prompts, answers, strict=True)]
    columns: dict[str, Any] = {
        f"{side}_{name}": values
        for side in ("chosen", "rejected")
        for name, values in (
            ("ids", pa.array(answers, _IDS)),
            ("key", pa.array(keys, pa.binary(16))),
            ("full", pa.array([len(one) for one in answers], pa.int32())),
        )
    }
    columns |= {
        "prompt_ids": pa.array(prompts, _IDS),
        "source": ["answers"] * len(keys),
        "weight": np.ones(len(keys)),
        "pair_id": [f"answers:{number}" for number in range(1, len(keys) + 1)],
    }
    return pa.table({name: columns[name] for name in PAIR_SCHEMA.names}, schema=PAIR_SCHEMA)


@dataclass(frozen=True)
class Answers:
    """The A answers of one mode: all samples of the first prompt, then those of the second, and so on.

    Attributes:
        prompts: prompt of each answer, [A].
        places: number of the prompt of each answer, int [A].
        samples: number of each answer among those to its prompt, int [A].
        policy, reference: token ids of each answer, int32, including the end token, [A].
    """

    mode: str
    prompts: list[Prompt]
    places: np.ndarray
    samples: np.ndarray
    policy: list[np.ndarray]
    reference: list[np.ndarray]
    tokeniser: Tokeniser

    def style(self) -> dict[str, Any]:
        """Return the entry of this mode in evaluation.json."""
        sides = {"policy": self.policy, "reference": self.reference}
        measured = {name: measure_style(side, self.tokeniser.stop_ids, self.places) for name, side in sides.items()}
        return measured | {"length_growth": length_growth(self.policy, self.reference, self.places)}

    def pairs(self) -> pa.Table:
        """Return the policy's answers as rows with which a cache is filled; see ``answer_pairs``."""
        return answer_pairs([prompt.ids for prompt in self.prompts], self.policy)

    def table(
        self,
        log_ratios: np.ndarray | None,
        exact_steps: np.ndarray | None,
        verdicts: Mapping[str, np.ndarray],
        rewards: Mapping[str, Any],
    ) -> pa.Table:
        """Return the rows of samples.parquet.

        Args:
            log_ratios, exact_steps: the drift of each answer, float64 [A], or None if it was not measured.
            verdicts: verdicts on ``contests``, by the setting that names the judge: 1 = the policy won, 0.5 = tie, 0 = the
                reference won, NaN = not judged. They are in columns ``verdict_NAME``, null where there was no contest.
            rewards: columns of reward functions; see ``rewards.Rewarded.columns``.
        """
        sides = (("policy", self.policy), ("reference", self.reference))
        return pa.table(
            {
                "mode": [self.mode] * len(self.policy),
                "pair_id": [prompt.pair_id for prompt in self.prompts],
                "sample": pa.array(self.samples, pa.int32()),
                "prompt": self._decode([prompt.ids for prompt in self.prompts]),
                **{side: self.words(answers) for side, answers in sides},
                **{f"{side}_ids": pa.array(answers, _IDS) for side, answers in sides},
                **{
                    name: pa.nulls(len(self.policy), pa.float64()) if values is None else pa.array(values)
                    for name, values in (("log_ratio", log_ratios), ("exact_steps", exact_steps))
                },
                **{f"verdict_{name}": self._on_firsts(verdicts.get(name)) for name in JUDGES},
                **rewards,
            }
        )

    def _on_firsts(self, verdicts: np.ndarray | None) -> pa.Array:
        values = np.full(len(self.policy), np.nan)
        if verdicts is not None:
            values[self.samples == 0] = verdicts
        return pa.array(values, from_pandas=True)  # NaN is null

    def contests(self, prompts: Sequence[Text]) -> list[Contest]:
        """Return one contest for each distinct prompt, with its first sample, so that contests are independent."""
        return [Contest(prompts[self.places[row]], policy, reference) for row, policy, reference in self._firsts()]

    def shown(self) -> list[dict[str, str]]:
        """Return the first few answers, as text."""
        return [
            {"prompt": self._decode([self.prompts[row].ids])[0], "policy": policy, "reference": reference}
            for row, policy, reference in self._firsts()[:SHOWN]
        ]

    def _firsts(self) -> list[tuple[int, str, str]]:
        rows = np.flatnonzero(self.samples == 0).tolist()
        sides = (self.words([side[row] for row in rows]) for side in (self.policy, self.reference))
        return list(zip(rows, *sides, strict=True))

    def words(self, answers: Sequence[np.ndarray]) -> list[str]:
        """Return the text of answers, without the token that ended them and other special tokens."""
        stop = self.tokeniser.stop_ids
        return self._decode([one if is_cut(one, stop) else one[:-1] for one in answers])

    def _decode(self, ids: Sequence[np.ndarray]) -> list[str]:
        return self.tokeniser.tokenizer.batch_decode(ids, skip_special_tokens=True)
