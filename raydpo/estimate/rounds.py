"""Estimate of on-policy rounds: what sampling, scoring, training and measuring take, in GPU hours and dollars.

Sampling generates one token of many answers at a time. A pass then takes as long as the products of these tokens, or as
reading the weights and the keys and values of all answers from the device's memory, whichever is longer. Bandwidths are
those of data sheets; nothing here was measured on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raydpo.config import Config
from raydpo.data.first import FirstPairs, Reading
from raydpo.data.keys import completion_key
from raydpo.data.pairs import PAIR_SCHEMA, PairSets
from raydpo.data.tally import DataReport, SourceReport
from raydpo.estimate.plan import Plan, Stage, operations
from raydpo.model.cost import ModelCost

__all__ = ["MOST_AT_ONCE", "RoundPrompts", "RoundsPlan", "Sampler", "made_pairs", "plan_rounds"]

BANDWIDTH_REACHED = 0.6
"""Share of a device's memory bandwidth that decoding is assumed to reach."""
DECODING = 0.1
"""Share of the scoring rate that decoding is assumed to reach on a device of unknown bandwidth, such as a CPU."""
ROOM = 0.9
"""Share of a device's memory that vLLM takes for weights, keys and values."""
MOST_AT_ONCE = 256
"""Most answers that vLLM generates at once by default (``max_num_seqs``)."""
STARTS = {"vllm": 75.0, "ray": 90.0, "transformers": 15.0, "scorer": 20.0, "trainer": 40.0}
"""Seconds until a stage computes: imports, loading and compiling. Assumed; the page of a run shows those that it took."""
MOST_MADE = 4096
"""Largest number of made-up pairs of a round that are planned. They stand for all."""
MUCH_LOST = 0.2
"""Share of the time lost to starts above which a line says what to do."""


@dataclass(frozen=True, kw_only=True)
class RoundPrompts:
    """Numbers of tokens of the prompts to train on and of the held-out prompts, int [prompts] each."""

    train: np.ndarray
    held_out: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A replica that generates answers: a device, or several that hold the policy together.

    Attributes:
        cost: sizes of the policy. weight_bytes: bytes of its weights, which a pass of many answers reads all.
        token_bytes: bytes of the keys and values of one position.
        rate: FLOPs per second of a large forward pass. bandwidth: bytes per second from its memory; None = unknown.
        memory: bytes of its memory.
        devices: number of its devices.
        most: largest number of answers at once, by the engine's settings.
    """

    cost: ModelCost
    weight_bytes: float
    token_bytes: float
    rate: float
    bandwidth: float | None
    memory: float
    most: int
    devices: int = 1

    @property
    def fits(self) -> bool:
        """Whether the weights leave room for keys and values."""
        return self.memory * ROOM > self.weight_bytes

    @property
    def decoding(self) -> str:
        """What decoding is assumed to take, as a sentence."""
        if self.bandwidth is None:
            return f"Decoding is assumed to reach {DECODING:.0%} of the scoring rate"
        return f"Decoding is assumed to reach {BANDWIDTH_REACHED:.0%} of the memory bandwidth of the data sheet"

    def at_once(self, positions: float) -> int:
        """Number of answers generated at once if each has ``positions`` positions in the end."""
        room = self.memory * ROOM - self.weight_bytes
        return int(max(1, min(self.most, room / max(1.0, self.token_bytes * positions))))

    def seconds(self, prompts: np.ndarray, n: int, tokens: float, workers: int) -> float:
        """Seconds in which ``workers`` devices answer prompts ``n`` times.

        Args:
            prompts: tokens of each prompt, int [prompts]. Each is computed once for its answers.
            tokens: mean length of an answer.
        """
        if not len(prompts):
            return 0.0
        answers, mean, replicas = n * len(prompts), float(prompts.mean()), max(1, workers // self.devices)
        together = min(self.at_once(mean + tokens), -(-answers // replicas))
        reads = self.weight_bytes + together * self.token_bytes * (mean + tokens / 2)
        flops = self._flops(together, together * (mean + tokens / 2), together)
        products = flops / self.rate
        step = flops / (self.rate * DECODING) if self.bandwidth is None else max(products, reads / self._reached)
        prefill = self._flops(prompts.sum(), (prompts.astype(float) ** 2).sum() / 2, len(prompts)) / self.rate
        return prefill / replicas + answers / replicas / together * tokens * step

    def flops(self, prompts: np.ndarray, n: int, tokens: float) -> float:
        """FLOPs of answering prompts ``n`` times."""
        looks = (prompts.astype(float) ** 2 / 2 + n * tokens * (prompts + tokens / 2)).sum()
        return self._flops(prompts.sum() + n * tokens * len(prompts), looks, (1 + n * tokens) * len(prompts))

    @property
    def _reached(self) -> float:
        return (self.bandwidth or 0.0) * BANDWIDTH_REACHED

    def _flops(self, positions: float, looks: float, predictions: float) -> float:
        return operations(np.array([positions, looks, predictions], float), self.cost)


@dataclass(frozen=True, kw_only=True)
class RoundsPlan:
    """The estimate of all rounds.

    Attributes:
        rounds: number of rounds; one more measurement comes before the first.
        prompts, answers: of one round. held_out, held_out_answers: of one measurement.
        answer_tokens: assumed mean length of an answer.
        engine: engine that samples. at_once: answers that a replica generates at once. fits: whether it holds the policy.
        decoding: what decoding is assumed to take, as a sentence.
        one: the reference pass and the training of one round, on as many pairs as rounds.pairs and rounds.replay allow.
        sampling, rewards, measuring: of one round. Rewards are those of reward models; functions run on CPUs.
        requests: requests to judges, of one round with its measurement.
        starts: seconds of a round until its stages compute.
        a_round: everything of one round with its starts; of offline rounds the first one.
        total: all rounds, and the first measurement with its starts.
        offline: rounds after the first sample no answers.
    """

    rounds: int
    prompts: int
    answers: int
    held_out: int
    held_out_answers: int
    answer_tokens: float
    engine: str
    at_once: int
    fits: bool
    decoding: str
    one: Plan
    sampling: Stage
    rewards: Stage
    measuring: Stage
    requests: int
    starts: float
    a_round: Stage
    total: Stage
    offline: bool = False

    @property
    def lost(self) -> float:
        """Share of a round's time that its starts take."""
        return self.starts / self.a_round.seconds

    def lines(self) -> list[str]:
        """What else is to know, in sentences."""
        lines = (
            []
            if self.fits
            else [
                "warning: the policy does not fit on one device that samples; set rounds.sample.engine to ray, and "
                "rounds.sample.tensor_parallel to the number of devices that hold it"
            ]
        )
        lines += [
            f"an answer is taken to have {self.answer_tokens:,.4g} tokens; --answer-tokens sets another number. Pairs: at "
            "most as many as rounds.pairs and rounds.replay allow; prompts whose answers are all equally good give none"
        ]
        if self.offline:
            lines.append(
                "rounds.offline is true: the table has the first round; later ones sample no answers, and the reference "
                "scores none again unless rounds.reference moves it"
            )
        if self.requests:
            lines.append(f"judges: {self.requests:,} requests {'in the first' if self.offline else 'a'} round")
        if self.lost > MUCH_LOST:
            lines.append(
                f"starts take {self.lost:.0%} of a round ({self.starts:,.0f} s assumed): raise train.steps or "
                "rounds.per_round, so that there are fewer, longer rounds"
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The estimate as plain data, for JSON."""
        return asdict(self) | {"lost_to_starts": self.lost}


def made_pairs(config: Config, prompts: np.ndarray, tokens: int) -> FirstPairs:
    """Pairs of made-up tokens as a round may give them, with replayed ones; of a large round those of some of its prompts.

    Args:
        prompts: tokens of each prompt of a round, int [prompts].
        tokens: length of each answer.
    """
    rounds = config.rounds
    assert rounds is not None
    each = 1 if rounds.pairs.choose == "best_worst" else min(rounds.pairs.per_prompt, rounds.sample.n // 2)
    looked_at = prompts[:: max(1, -(-len(prompts) * each // MOST_MADE))]
    columns: dict[str, list[Any]] = {name: [] for name in PAIR_SCHEMA.names}
    for number, length in enumerate(looked_at.tolist()):
        prompt = np.full(length, number, np.int32)  # shares no prefix with another prompt
        for pair in range(each):
            sides = {side: np.full(tokens, 2 * pair + place, np.int32) for place, side in enumerate(("chosen", "rejected"))}
            row = {"pair_id": f"round:{number}#{pair}", "source": "round", "weight": 1.0, "prompt_ids": prompt}
            for side, ids in sides.items():
                row |= {f"{side}_ids": ids, f"{side}_key": completion_key(prompt, ids), f"{side}_full": tokens}
            for name, value in row.items():
                columns[name].append(value)
    table = pa.table({name: columns[name] for name in PAIR_SCHEMA.names}, schema=PAIR_SCHEMA)
    read = {"round": Reading(len(looked_at), math.ceil(len(prompts) / (1 - rounds.replay)))}
    return FirstPairs(PairSets(table, None, DataReport([SourceReport("round", "")])), read)


def plan_rounds(
    config: Config,
    prompts: RoundPrompts,
    one: Plan,
    sampler: Sampler,
    *,
    engine: str,
    answer_tokens: float,
    workers: int,
    price: float | None = None,
    reward_models: Sequence[ModelCost] = (),
    requests: int = 0,
) -> RoundsPlan:
    """Estimate all rounds of ``config``.

    Args:
        one: the plan of one round's reference pass and training, on ``made_pairs``.
        answer_tokens: mean length of an answer.
        workers: devices that sample and score.
        reward_models: sizes of the reward models.
        requests: to judges, of one round with its measurement.
    """
    rounds = config.rounds
    assert rounds is not None
    of_round = prompts.train[: rounds.per_round]
    measured = prompts.held_out[: rounds.measure.prompts]
    each = rounds.measure.n + rounds.measure.greedy
    answers, held_out_answers = len(of_round) * rounds.sample.n, len(measured) * each

    def stage(flops: float, seconds: float) -> Stage:
        hours = workers * seconds / 3600
        return Stage(flops=flops, seconds=seconds, gpu_hours=hours, dollars=None if price is None else hours * price)

    def asked(which: np.ndarray, n: int) -> Stage:
        return stage(sampler.flops(which, n, answer_tokens), sampler.seconds(which, n, answer_tokens, workers))

    def read(which: np.ndarray, n: int, costs: Sequence[ModelCost]) -> Stage:
        """Forward passes of models over each prompt with each of its answers."""
        whole = np.repeat(which, n) + answer_tokens
        amount = np.array([whole.sum(), (whole.astype(float) ** 2).sum() / 2, answer_tokens * len(whole)])
        return Stage.of(sum(operations(amount, cost) for cost in costs), workers, one.rates.score, price)

    sampling, scoring = asked(of_round, rounds.sample.n), read(of_round, rounds.sample.n, reward_models)
    measured_rewards = read(measured, each, reward_models)
    rewards = scoring + measured_rewards
    drift = 0 if rounds.sample.temperature != 1 or rounds.sample.top_p < 1 else rounds.measure.n
    measuring = asked(measured, each) + read(measured, drift, [sampler.cost] * 3)  # policy, initial model, policy before
    # The workers that measure a round also sample for the next one, unless the measurement may end the rounds.
    engines = 1 if rounds.stop.success is None and rounds.stop.drift is None else 2
    judged = STARTS["scorer"] * len(reward_models)
    starts = engines * STARTS[engine] + 2 * judged + STARTS["trainer"] + STARTS["scorer"] * (4 if drift else 1)
    a_round = sampling + rewards + one.score + one.training + measuring + stage(0.0, starts)
    later = a_round
    if rounds.offline:  # rounds after the first train on its answers, which one reference has scored
        moves = rounds.reference != "initial"
        again = starts - judged - STARTS[engine] * (engines - 1) - (0 if moves else STARTS["scorer"])
        later = measured_rewards + one.score * int(moves) + one.training + measuring + stage(0.0, again)
    first = asked(measured, each) + measured_rewards + stage(0.0, STARTS[engine] + judged)
    return RoundsPlan(
        rounds=rounds.count,
        prompts=len(of_round),
        answers=answers,
        held_out=len(measured),
        held_out_answers=held_out_answers,
        answer_tokens=answer_tokens,
        engine=engine,
        at_once=sampler.at_once(float(of_round.mean()) + answer_tokens) if len(of_round) else 0,
        fits=sampler.fits,
        decoding=sampler.decoding,
        one=one,
        sampling=sampling,
        rewards=rewards,
        measuring=measuring,
        requests=requests,
        starts=starts,
        a_round=a_round,
        total=a_round + later * (rounds.count - 1) + first,
        offline=rounds.offline,
    )
