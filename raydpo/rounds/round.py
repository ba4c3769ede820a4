"""One round: its stages in order, and its figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from raydpo.config.rounds import STAGES
from raydpo.errors import RaydpoError
from raydpo.rounds.before import pair_settings, train_settings
from raydpo.rounds.figures import held_out_figures, pair_figures, sampled_figures
from raydpo.rounds.goal import few_mixed
from raydpo.rounds.inputs import Inputs
from raydpo.rounds.ledger import FILES, Ledger
from raydpo.rounds.measuring import measure, measure_settings
from raydpo.rounds.pairing import ROUND_PAIR_SCHEMA, make_pairs, no_pairs, with_replay
from raydpo.rounds.sampling import Asked, answer, sample_settings
from raydpo.rounds.scoring import score
from raydpo.rounds.stage import Content, Made, content_digest, made_of, stage_table
from raydpo.rounds.training import start_of, train_round
from raydpo.rundir.directory import METRICS, TRAIN, round_folder
from raydpo.rundir.records import read_rows
from raydpo.rundir.rounds import HELD_OUT_SCHEMA, SAMPLE_SCHEMA, SCORE_SCHEMA

__all__ = ["Ended", "Round"]

_SAMPLED = ("prompt_id", "sample", "answer_ids", "answer")
_SCORED = ("prompt_id", "sample", "reward")
_PAIRED = ("pair_id", "chosen_key", "rejected_key", "reward_good", "reward_bad")


@dataclass(frozen=True)
class Ended:
    """Why the rounds end before the training of a round: ``stopped`` = there is nothing more to learn, ``failed`` = nothing
    can be learned as it is set."""

    status: Literal["stopped", "failed"]
    why: str


class Round:
    """A round of a run. Round 0 is the measurement before the first one.

    Each stage reads its file if it is there, else it makes it. Stages are called in the order of ``STAGES``.

    Args:
        ahead: whether the workers that measure the round also sample for the next one.
    """

    def __init__(self, inputs: Inputs, ledger: Ledger, number: int, *, ahead: bool = False) -> None:
        self.inputs, self.ledger, self.number, self.ahead = inputs, ledger, number, ahead
        self.figures: dict[str, Any] = {"round": number, "seconds": {}}
        self._samples = self._scores = self._pairs = self._held_out = pa.table({})

    @property
    def stages(self) -> Sequence[str]:
        """Names of its stages, in order."""
        return STAGES if self.number else ("measure",)

    def stage(self, name: str) -> Ended | None:
        """Do a stage. Returns why the rounds end here, None if they go on.

        Raises:
            ConfigError: if the stage was done with other settings.
            RaydpoError: if it fails. What was computed is kept.
        """
        acts = {
            "sample": self._sample,
            "score": self._score,
            "pair": self._pair,
            "train": self._train,
            "measure": self._measure,
        }
        return acts[name]()

    def end(self, ended: Ended | None = None) -> None:
        """Write the figures, with which the round is over.

        Args:
            ended: why the round was not trained, if it was not.
        """
        settings = train_settings(self.inputs) if self.number and ended is None else {}
        self.ledger.end_round(self.number, self.figures, settings, None if ended is None else ended.why)

    # ---- stages

    @property
    def _source(self) -> int:
        """Number of the round whose samples this one trains on."""
        return 1 if self.inputs.rounds.offline else self.number

    def _sample(self) -> None:
        inputs, number = self.inputs, self.number
        if self._source != number:
            return  # read by _score
        policy = inputs.policy(number - 1)
        made = Made(
            stage="sample",
            number=number,
            settings=sample_settings(inputs),
            inputs={"policy": policy.identity.digest, "prompts": inputs.prompts_digest},
        )

        def make() -> Content:
            return Content(answer(inputs, policy, Asked.in_round(inputs, number), number=number)[0])

        self._samples = self._table("sample", made, SAMPLE_SCHEMA, make)
        before = made_of(inputs.storage, f"{round_folder(number - 1)}/{FILES['measure']}")
        if before is not None:
            seconds = self.figures["seconds"]
            seconds["sample"] = round(seconds["sample"] + before.ahead, 2)

    def _score(self) -> None:
        if self._source != self.number:
            first = Round(self.inputs, self.ledger, self._source)
            first._read_answers()
            self._samples, self._scores = first._samples, first._scores
        else:
            self._own_scores()
        found = sampled_figures(self.inputs.prompts, self._samples, self._scores, self.inputs.rounds)
        self.figures |= found
        self.inputs.console.say(
            f"round {self.number}: {found['answers']:,} answers to {found['prompts']:,} prompt(s), "
            f"{_share(found['success'])} right, {_share(found['mixed'])} of the prompts with different rewards"
        )

    def _own_scores(self) -> None:
        digests = {"prompts": self.inputs.prompts_digest, "samples": content_digest(self._samples, _SAMPLED)}
        made = Made(stage="score", number=self.number, settings=self.inputs.reward_settings, inputs=digests)
        step = self.ledger.steps(self.number - 1)

        def make() -> Content:
            return score(self.inputs, self._samples, number=self.number, step=step)

        self._scores = self._table("score", made, SCORE_SCHEMA, make)

    def _read_answers(self) -> None:
        """Samples and scores of a round that is over, for a later one."""
        self._sample()
        self._own_scores()

    def _pair(self) -> Ended | None:
        inputs, rounds = self.inputs, self.inputs.rounds
        self._own_pairs(self._earlier_pairs() if rounds.replay else [])
        self.figures |= {"policy": inputs.policy(self.number - 1).identity.digest} | pair_figures(self._pairs, self.number)
        if not self._pairs.num_rows:
            why, told = no_pairs(self._samples, self._scores, rounds)
            return Ended("stopped" if why == "right" else "failed", f"round {self.number}: {told}")
        few = few_mixed(self.number, self.figures, rounds.stop)
        return None if few is None else Ended("stopped", few)

    def _make_pairs(self, earlier: Sequence[pa.Table]) -> pa.Table:
        inputs = self.inputs
        pairs = make_pairs(inputs.prompts, self._samples, self._scores, inputs.rounds, self.number)
        return with_replay(pairs, earlier, inputs.rounds, self.number, inputs.console) if len(pairs) else pairs

    def _own_pairs(self, earlier: Sequence[pa.Table]) -> None:
        """Make or read the pairs of this round, given those of all rounds before it, or none without replay."""
        digests = {
            "policy": self.inputs.policy(self.number - 1).identity.digest,
            "samples": content_digest(self._samples, _SAMPLED),
            "scores": content_digest(self._scores, _SCORED),
        }
        digests |= {f"pairs of round {number}": content_digest(one, _PAIRED) for number, one in enumerate(earlier, 1)}
        made = Made(stage="pair", number=self.number, settings=pair_settings(self.inputs), inputs=digests)
        self._pairs = self._table("pair", made, ROUND_PAIR_SCHEMA, lambda: Content(self._make_pairs(earlier)))

    def _earlier_pairs(self) -> list[pa.Table]:
        """The pairs of all rounds before this one, in order. Each is read once, though it depends on those before it."""
        found: list[pa.Table] = []
        for number in range(1, self.number):
            one = Round(self.inputs, self.ledger, number)
            one._read_answers()
            one._own_pairs(found)
            found.append(one._pairs)
        return found

    def _train(self) -> None:
        inputs, folder = self.inputs, f"{round_folder(self.number)}/{TRAIN}"
        start = start_of(inputs.config, self.number)
        summary = train_round(inputs.config, self.number, self._pairs, start, inputs.console)
        rows = read_rows(inputs.storage, f"{folder}/{METRICS}")
        if not rows:  # the training is over, so nothing writes it again
            inputs.console.warn(f"{inputs.storage}/{folder}/{METRICS} is missing; the log-ratios of this round are unknown")
        last = rows[-1] if rows else {}
        self.figures["seconds"]["train"] = summary["seconds"]
        self.figures |= {
            "policy": summary["policy"],
            "reference": (summary["reference"] or {}).get("identity"),
            "wanted": summary["wanted"],
            "cache_hits": summary["hits"],
            "steps": summary["steps"],
            "first_loss": summary["first_loss"],
            "last_loss": summary["last_loss"],
        }
        for side in ("chosen", "rejected"):
            each, length = last.get(f"logratio/{side}_per_token"), last.get(f"length/{side}")
            self.figures[f"{side}_log_ratio"] = None if each is None or length is None else each * length

    def _measure(self) -> None:
        inputs, number = self.inputs, self.number
        of = {"policy": number, "initial policy": 0, "previous policy": max(0, number - 1)}
        digests = {name: inputs.policy(one).identity.digest for name, one in of.items()}
        digests["prompts"] = inputs.prompts_digest
        made = Made(stage="measure", number=number, settings=measure_settings(inputs), inputs=digests)
        step = self.ledger.steps(number - 1) + int(self.figures.get("steps") or 0)

        def make() -> Content:
            return measure(inputs, number, step=step, ahead=self.ahead)

        self._held_out = self._table("measure", made, HELD_OUT_SCHEMA, make)
        self.figures |= {"policy": digests["policy"]} | held_out_figures(self._held_out, inputs.rounds)

    def _table(self, stage: str, made: Made, schema: pa.Schema, make: Callable[[], Content]) -> pa.Table:
        """The table of a stage, which ``make`` makes as ``stage.stage_table`` has it.

        Raises:
            RaydpoError: if a reward function failed too often, after the table is stored.
        """
        inputs, folder = self.inputs, round_folder(self.number)
        again = self.ledger.replaceable(stage, self.number)
        table, stored = stage_table(
            inputs.storage, f"{folder}/{FILES[stage]}", made, schema, make, again=again, note=inputs.console.say
        )
        self.figures["seconds"][stage] = stored.seconds
        if stored.failed is not None:
            raise RaydpoError(f"round {self.number}: {stored.failed}")
        return table


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"
