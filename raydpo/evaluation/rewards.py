"""Rewards of the answers of policy and reference by reward functions: the answers to score, and the figures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpo.config.rewards import RewardConfig, reward_name
from raydpo.data.interval import Interval, mean_by_group, share_by_group
from raydpo.data.messages import Text
from raydpo.evaluation.samples import Answers
from raydpo.rewards.task import ANSWERS, prompt_id

__all__ = ["TOTAL", "Rewarded", "answers_to_score"]

TOTAL = "weighted sum"
"""Name of the sum of all functions; no function can be named so."""
SIDES = ("policy", "reference")


def answers_to_score(answers: Answers, prompts: Sequence[tuple[Text, str]]) -> pa.Table:
    """Return rows of ``ANSWERS``: to each prompt the answers of the policy, and then those of the reference.

    Args:
        prompts: text and other columns of each prompt; see ``prompts.prompt_records``.
    """
    texts = {side: answers.words(getattr(answers, side)) for side in SIDES}
    rows = []
    for side, row in _in_order(answers.places):
        text, columns = prompts[answers.places[row]]
        rows.append(
            {
                "prompt_id": prompt_id(answers.prompts[row].ids),
                "sample": int(answers.samples[row]) + int(side == "reference") * (int(answers.samples.max()) + 1),
                "prompt": json.dumps(text),
                "completion": texts[side][row],
                "completion_ids": getattr(answers, side)[row],
                "columns": columns,
            }
        )
    return pa.Table.from_pylist(rows, schema=ANSWERS)


def _in_order(places: np.ndarray) -> Iterator[tuple[str, int]]:
    """Side and number of each answer, in the order in which they are scored: answers to one prompt are consecutive."""
    for place in dict.fromkeys(places.tolist()):
        for side in SIDES:
            for row in np.flatnonzero(places == place).tolist():
                yield side, row


@dataclass(frozen=True)
class Rewarded:
    """The rewards of the A answers of one mode.

    Attributes:
        scores: by side, rows of ``rewards.apply.SCORES`` in the order of its answers, [A].
    """

    answers: Answers
    scores: dict[str, pa.Table]

    @classmethod
    def of(cls, answers: Answers, scored: pa.Table) -> Rewarded:
        """Sort what ``rewards.apply.apply`` returned for ``answers_to_score``."""
        places: dict[str, list[int]] = {side: [0] * len(answers.places) for side in SIDES}
        for number, (side, row) in enumerate(_in_order(answers.places)):
            places[side][row] = number
        return cls(answers, {side: scored.take(places[side]) for side in SIDES})

    def columns(self) -> dict[str, Any]:
        """Return columns of samples.parquet: the weighted sum, the value of each function, and what failed, for both
        sides."""
        return {
            f"{side}_{column}": self.scores[side][name].combine_chunks()
            for side in SIDES
            for column, name in (("reward", "reward"), ("rewards", "parts"), ("reward_error", "error"))
        }

    def figures(self, rewards: Sequence[RewardConfig]) -> list[dict[str, Any]]:
        """Return entries of evaluation.json, one for each function and one for the weighted sum of several.

        ``policy`` and ``reference`` are means over the answers that have a value, ``difference`` is the mean over those
        whose answer of the other side with the same number has one, too. All have intervals over prompts. ``errors`` counts
        the answers on which the function failed, ``none`` those to which it does not apply, each by side. Of the sum
        ``errors`` counts the answers that have none because a function failed.
        """
        found = [self._figures(reward_name(one), one.weight, [reward_name(one)]) for one in rewards]
        parts = [reward_name(one) for one in rewards if one.weight]
        return [*found, *([self._figures(TOTAL, None, parts)] if len(rewards) > 1 else [])]

    def _figures(self, name: str, weight: float | None, parts: Sequence[str]) -> dict[str, Any]:
        """Figures of a function or of the sum. An answer on which one of the functions ``parts`` failed has none."""
        values = {side: self._values(side, name) for side in SIDES}
        known = {side: ~np.isnan(each) for side, each in values.items()}
        failed = {side: self._failures(side, parts) for side in SIDES}
        groups, both = self.answers.places, known["policy"] & known["reference"]
        of_all = np.concatenate([values[side][known[side]] for side in SIDES])
        binary = len(of_all) > 0 and bool(np.isin(of_all, (0, 1)).all())

        def mean(side: str) -> Interval:
            each = values[side][known[side]], groups[known[side]]
            return share_by_group(*each) if binary else mean_by_group(*each)

        return {
            "name": name,
            "weight": weight,
            "mode": self.answers.mode,
            "answers": len(groups),
            **{side: mean(side) for side in SIDES},
            "difference": mean_by_group((values["policy"] - values["reference"])[both], groups[both]),
            "errors": {side: len(failed[side]) for side in SIDES},
            "none": {side: int((~known[side]).sum()) - len(failed[side]) for side in SIDES},
        }

    def _values(self, side: str, name: str) -> np.ndarray:
        """Values of a function, float64 [A]; NaN = none."""
        scores = self.scores[side]
        if name == TOTAL:
            return _numbers(scores["reward"])
        return _numbers(pa.array([dict(each).get(name) for each in scores["parts"].to_pylist()], pa.float64()))

    def _failures(self, side: str, names: Sequence[str]) -> list[tuple[int, str]]:
        """Answers on which one of these functions failed, with the first line that says so."""
        found = []
        for row, lines in enumerate(self.scores[side]["error"].to_pylist()):
            for line in lines.split("\n") if lines else ():
                if line.partition(": ")[0] in names:
                    found.append((row, line))
                    break
        return found

    def account(self, rewards: Sequence[RewardConfig]) -> list[str]:
        """One line for each function that failed on answers, with the first of them."""
        lines = []
        for name in map(reward_name, rewards):
            failed = [(side, *each) for side in SIDES for each in self._failures(side, [name])]
            if failed:
                side, row, line = failed[0]
                lines.append(
                    f"reward {name}: {len(failed):,} of {2 * len(self.answers.places):,} {self.answers.mode} answers failed "
                    f"(first: the {side}'s answer {self.answers.samples[row]} to {self.answers.prompts[row].pair_id}: "
                    f"{line.partition(': ')[2]})"
                )
        return lines


def _numbers(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    return np.asarray(pc.fill_null(column, np.nan), float)
