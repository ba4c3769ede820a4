"""What rounds converge to, and where they reach more than one offline round, in worlds small enough to list."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from enumerable import World, total_variation
from torch import Tensor

from raydpo.config import ObjectiveConfig
from raydpo.config.rounds import RoundsConfig
from raydpo.losses import Objective, PairLogps
from raydpo.rewards.task import prompt_id
from raydpo.rounds.pairing import final_rewards, make_pairs
from raydpo.rundir.rounds import PROMPT_SCHEMA, SAMPLE_SCHEMA, SCORE_SCHEMA

CLOSE = 1e-2


@pytest.fixture(scope="module")
def world():
    return World.random()


# ---- in expectation: pairs of two answers of the current policy, with Bradley-Terry labels


def after_rounds(world: World, settings: ObjectiveConfig, rounds: int, steps: int = 5) -> Tensor:
    """Policy (probabilities) after rounds of gradient steps, the reference being the world's all the time."""
    logits = world.reference.clone().requires_grad_()
    for _ in range(rounds):
        now = replace(world, drawn=logits.detach().softmax(1))
        for _ in range(steps):
            (slope,) = torch.autograd.grad(now.expected_loss(logits.log_softmax(1), settings), logits)
            logits.data -= 20 / settings.beta**2 * slope
    return logits.detach().softmax(1)


@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0])
def test_with_the_initial_reference_many_rounds_aim_at_one_tilt(world, beta):
    """pi = ref * exp(r / beta) / Z, however many rounds: their number is no temperature."""
    settings, wanted = ObjectiveConfig(beta=beta), world.tilted(world.rewards, beta)
    assert total_variation(after_rounds(world, settings, 1), wanted) > 2 * CLOSE
    assert total_variation(after_rounds(world, settings, 100), wanted) < CLOSE
    assert total_variation(after_rounds(world, settings, 200), wanted) < CLOSE


@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_with_the_previous_reference_each_round_tilts_once_more(world, beta):
    """pi = ref * exp(R r / beta) / Z after R rounds, each until it converged: beta divided by R."""
    settings, now = ObjectiveConfig(beta=beta), replace(world, drawn=world.reference.exp())
    for number in range(1, 5):
        policy = now.minimiser(settings)
        assert total_variation(policy, world.tilted(number * world.rewards, beta)) < 1e-7
        assert (total_variation(policy, world.tilted(world.rewards, beta)) > 5 * CLOSE) == (number > 1)
        now = replace(now, reference=policy.log(), drawn=policy)


# ---- with a verifier: answers are drawn, and a reward says for certain which is better

PROMPTS = 32
SHARE = 0.1
"""Probability of each right token, given the ones before. So the best of three tokens has 1e-3."""
BRANCHES = torch.full((PROMPTS, 7), math.log(SHARE / (1 - SHARE)), dtype=torch.float64)
"""Log-odds of the right token at each node of a binary tree, [prompts, nodes]."""
UNSHARED = torch.tensor([0.9, 0.09, 0.009, 0.001], dtype=torch.float64).log().expand(PROMPTS, 4)
"""Log-probs of four answers that have nothing in common, [prompts, answers]; the best has 1e-3, too."""
LEADING = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])
"""Number of right tokens before the first wrong one, of each of the 8 answers."""
WORTH = torch.tensor([0.0, 0.1, 0.2, 1.0], dtype=torch.float64)
"""Reward of that many right tokens, and of the four answers that have nothing in common."""


def token_by_token(parameters: Tensor) -> Tensor:
    """Log-probs of the 8 answers of three tokens, [prompts, 8]. The bits of an answer's number are its tokens."""
    found = []
    for answer in range(8):
        node, logps = 1, torch.zeros(len(parameters), dtype=torch.float64)
        for place in (4, 2, 1):
            right = bool(answer & place)
            odds = parameters[:, node - 1]
            logps = logps + F.logsigmoid(odds if right else -odds)
            node = 2 * node + right
        found.append(logps)
    return torch.stack(found, 1)


def as_wholes(parameters: Tensor) -> Tensor:
    return parameters.log_softmax(1)


@dataclass
class Rounds:
    """Rounds of sampling, pairing as the product does it, and gradient steps, with the initial reference."""

    parameters: Tensor
    logps: object
    rewards: Tensor
    beta: float = 0.1
    rate: float = 5.0

    def __post_init__(self) -> None:
        self.parameters = self.parameters.clone().requires_grad_()
        self.reference = self.logps(self.parameters).detach()
        self.random = torch.Generator().manual_seed(0)
        keys = [prompt_id([place]) for place in range(PROMPTS)]
        self.places = {key: place for place, key in enumerate(keys)}
        rows = [
            {"prompt_id": key, "row": place + 1, "source": "world", "split": "train", "prompt_ids": [place], "prompt": '"x"'}
            for key, place in self.places.items()
        ]
        self.prompts = pa.Table.from_pylist([row | {"columns": "{}"} for row in rows], schema=PROMPT_SCHEMA)

    def pairs(self, number: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts, chosen and rejected answers of a new round of ``count`` answers a prompt, int64 [pairs] each."""
        config = RoundsConfig(prompts="world.jsonl", rewards=[{"use": "world:reward"}])
        drawn = torch.multinomial(self.logps(self.parameters.detach()).exp(), count, True, generator=self.random)
        rows = [
            {"prompt_id": key, "sample": sample, "round": number, "seed": 0, "answer_ids": [int(drawn[place, sample])]}
            for key, place in self.places.items()
            for sample in range(count)
        ]
        samples = pa.Table.from_pylist(
            [row | {"end": "stop", "engine": "world", "answer": str(row["answer_ids"])} for row in rows],
            schema=SAMPLE_SCHEMA,
        )
        scored = {name: pa.nulls(len(rows), SCORE_SCHEMA.field(name).type) for name in SCORE_SCHEMA.names[3:]}
        scored["reward"] = pa.array(self.rewards[drawn.flatten()].numpy())
        found = make_pairs(self.prompts, samples, final_rewards(samples, pa.table(scored), config), config, number)
        answers = (torch.tensor([ids[0] for ids in found[f"{side}_ids"].to_pylist()]) for side in ("chosen", "rejected"))
        return torch.tensor([self.places[key] for key in found["prompt_id"].to_pylist()]), *answers

    def loss(self, pairs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Sum of the losses of the pairs."""
        place, *sides = pairs
        policy, one = self.logps(self.parameters), torch.ones(len(place), dtype=torch.float64)
        logps = [table[place, side] for table in (policy, self.reference) for side in sides]
        return Objective(ObjectiveConfig(beta=self.beta))(PairLogps(*logps, one, one), self.beta).losses.sum()

    def step(self, pairs: tuple[Tensor, Tensor, Tensor]) -> float:
        loss = self.loss(pairs)
        (slope,) = torch.autograd.grad(loss, self.parameters)
        self.parameters.data -= self.rate * slope
        return loss.item()

    def run(self, rounds: int, steps: int, count: int) -> float:
        """Expected reward after rounds of ``count`` new answers a prompt each."""
        for number in range(1, rounds + 1):
            pairs = self.pairs(number, count)
            for _ in range(steps if len(pairs[0]) else 0):
                self.step(pairs)
        return float((self.logps(self.parameters.detach()).exp() * self.rewards).sum(1).mean())


def test_on_policy_finds_what_offline_never_sees():
    """Ten rounds of 10 steps against one of 100: the second and third token are only seen once the first is right.

    Measured with five seeds: 0.71 to 0.79 against 0.06 to 0.12, and against 0.20 to 0.23 with as many answers as all rounds
    together, drawn at once.
    """
    start = float((token_by_token(BRANCHES).exp() * WORTH[LEADING]).sum(1).mean())
    assert token_by_token(BRANCHES)[:, 7].exp().tolist() == pytest.approx([1e-3] * PROMPTS)
    on_policy = Rounds(BRANCHES, token_by_token, WORTH[LEADING]).run(10, 10, 8)
    offline = Rounds(BRANCHES, token_by_token, WORTH[LEADING]).run(1, 100, 8)
    as_many = Rounds(BRANCHES, token_by_token, WORTH[LEADING]).run(1, 100, 80)
    assert start < 0.012 < 0.05 < offline < as_many
    assert on_policy > 5 * offline
    assert on_policy > 2 * as_many


def test_on_policy_is_not_better_everywhere():
    """Where answers have nothing in common, rounds settle on the second best: it soon is the only one that is drawn.

    Measured with five seeds: 0.12 to 0.15 on-policy, 0.06 to 0.13 offline, and 0.19 to 0.23 offline with as many answers
    drawn at once.
    """
    on_policy, offline, as_many = (
        Rounds(UNSHARED, as_wholes, WORTH).run(*each) for each in ((10, 10, 8), (1, 100, 8), (1, 100, 80))
    )
    assert on_policy < 5 * offline
    assert on_policy < as_many


def test_pairs_of_a_verifier_have_no_finite_optimum():
    """Its labels have no noise: the loss of one round's pairs falls for ever, and rejected answers sink with it.

    Measured at steps 1, 30, 300 and 3000: loss 0.69, 0.078, 0.0073, 0.00071; rejected -1, -24, -48, -71 nats.
    """
    rounds = Rounds(BRANCHES, token_by_token, (LEADING == 3).double(), rate=20.0)
    rounds.parameters.data.fill_(0.0)  # each token right or wrong: good and bad answers to most prompts
    rounds.reference = token_by_token(rounds.parameters).detach()
    pairs = rounds.pairs(1, 8)
    place, _, rejected = pairs
    assert len(place) > 10
    losses, sunk = [], []
    for step in range(1, 3001):
        loss = rounds.step(pairs)
        if step in (1, 30, 300, 3000):
            ratios = (token_by_token(rounds.parameters.detach()) - rounds.reference)[place, rejected]
            losses.append(loss / len(place))
            sunk.append(float(ratios.mean()))
    assert losses[0] == pytest.approx(math.log(2))
    assert all(later < earlier / 3 for earlier, later in pairwise(losses[1:]))
    assert all(later < earlier - 10 for earlier, later in pairwise(sunk[1:]))
    assert losses[-1] > 0
