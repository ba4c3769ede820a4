"""Answers of policy and reference to the same prompts, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raydpo.answers.contests import Contest
from raydpo.data.keys import completion_key
from raydpo.data.pairs import PAIR_SCHEMA
from raydpo.data.preference import Text
from raydpo.data.tokenise import Tokeniser
from raydpo.evaluation.prompts import Prompt
from raydpo.evaluation.style import is_cut, length_growth, measure_style

__all__ = ["Answers"]

_IDS = pa.list_(pa.int32())
JUDGES = ("reward_model", "score_with", "judge")
"""Settings of section ``evaluate`` that name who says which answer is better."""
SHOWN = 5
"""Prompts whose answers stand in evaluation.json; samples.parquet has all of them."""


@dataclass(frozen=True)
class Answers:
    """Of one mode, A of them: all samples of the first prompt, then those of the second, and so on.

    Attributes:
        prompts: of each answer, [A].
        places: number of the prompt of each, int [A]. samples: number of each among those to its prompt, int [A].
        policy, reference: token ids, int32, the end token included, [A].
    """

    mode: str
    prompts: list[Prompt]
    places: np.ndarray
    samples: np.ndarray
    policy: list[np.ndarray]
    reference: list[np.ndarray]
    tokeniser: Tokeniser

    def style(self) -> dict[str, Any]:
        """What evaluation.json says of the mode."""
        policy, reference = (measure_style(side, self.tokeniser.stop_ids, self.places)
                             for side in (self.policy, self.reference))
        return {"policy": policy, "reference": reference,
                "length_growth": length_growth(self.policy, self.reference, self.places)}

    def pairs(self) -> pa.Table:
        """The policy's answers as rows of ``data.pairs.PAIR_SCHEMA``, which is what a cache is filled with: chosen and
        rejected are both the answer, and the same completion is scored once."""
        prompts = [prompt.ids for prompt in self.prompts]
        keys = [completion_key(*pair) for pair in zip(prompts, self.policy, strict=True)]
        columns: dict[str, Any] = {
            f"{side}_{name}": values for side in ("chosen", "rejected") for name, values in (
                ("ids", pa.array(self.policy, _IDS)), ("key", pa.array(keys, pa.binary(16))),
                ("full", pa.array([len(one) for one in self.policy], pa.int32())))}
        columns |= {"prompt_ids": pa.array(prompts, _IDS), "source": ["answers"] * len(keys), "weight": np.ones(len(keys)),
                    "pair_id": [f"answers:{number}" for number in range(1, len(keys) + 1)]}
        return pa.table({name: columns[name] for name in PAIR_SCHEMA.names}, schema=PAIR_SCHEMA)

    def table(self, log_ratios: np.ndarray | None, exact_steps: np.ndarray | None,
              verdicts: Mapping[str, np.ndarray]) -> pa.Table:
        """For samples.parquet, with what the drift is the mean of, float64 [A] each, where it was measured.

        Args:
            verdicts: on ``contests``, by the setting that names the judge: 1 = the policy won, 0.5 = nobody, 0 = the
                reference, NaN = not judged. A column ``verdict_NAME`` has them; it is null where there was no contest.
        """
        sides = (("policy", self.policy), ("reference", self.reference))
        return pa.table({
            "mode": [self.mode] * len(self.policy), "pair_id": [prompt.pair_id for prompt in self.prompts],
            "sample": pa.array(self.samples, pa.int32()), "prompt": self._decode([prompt.ids for prompt in self.prompts]),
            **{side: self._words(answers) for side, answers in sides},
            **{f"{side}_ids": pa.array(answers, _IDS) for side, answers in sides},
            **{name: pa.nulls(len(self.policy), pa.float64()) if values is None else pa.array(values) for name, values in (
                ("log_ratio", log_ratios), ("exact_steps", exact_steps))},
            **{f"verdict_{name}": self._on_firsts(verdicts.get(name)) for name in JUDGES}})

    def _on_firsts(self, verdicts: np.ndarray | None) -> pa.Array:
        values = np.full(len(self.policy), np.nan)
        if verdicts is not None:
            values[self.samples == 0] = verdicts
        return pa.array(values, from_pandas=True)  # NaN is null

    def contests(self, prompts: Sequence[Text]) -> list[Contest]:
        """One to each distinct prompt, so that they are independent: its first sample."""
        return [Contest(prompts[self.places[row]], policy, reference) for row, policy, reference in self._firsts()]

    def shown(self) -> list[dict[str, str]]:
        """The first few, for people."""
        return [{"prompt": self._decode([self.prompts[row].ids])[0], "policy": policy, "reference": reference}
                for row, policy, reference in self._firsts()[:SHOWN]]

    def _firsts(self) -> list[tuple[int, str, str]]:
        rows = np.flatnonzero(self.samples == 0).tolist()
        sides = (self._words([side[row] for row in rows]) for side in (self.policy, self.reference))
        return list(zip(rows, *sides, strict=True))

    def _words(self, answers: Sequence[np.ndarray]) -> list[str]:
        stop = self.tokeniser.stop_ids
        return self._decode([one if is_cut(one, stop) else one[:-1] for one in answers])

    def _decode(self, ids: Sequence[np.ndarray]) -> list[str]:
        return self.tokeniser.tokenizer.batch_decode(ids, skip_special_tokens=True)
