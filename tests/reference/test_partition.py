"""Scoring with weights that several processes hold together: the same bits as one process, whatever the model, its precision
and the processes; and no more memory than promised."""

from __future__ import annotations

import numpy as np
import torch
from architectures import LONGEST, make_directories
from distributed import run_distributed

from raydpo.model.layout import PromptGroup
from raydpo.model.partition import Partition, join_process_group
from raydpo.reference.identity import identify
from raydpo.reference.score import ReferenceSpec, Scorer

CPU = torch.device("cpu")
VOCAB = 300
BUDGET = 120
USUAL = ["llama", "llama-tied", "qwen3_moe", "gemma2", "gpt2", "ernie4_5_moe", "mamba"]
"""With a table that is tied to the head, experts, soft caps, absolute positions, routers in float32, and layers that use the
weight of a child without calling it."""


def groups(count=9, seed=0):
    rng = np.random.default_rng(seed)

    def tokens(most):
        return rng.integers(3, VOCAB, int(rng.integers(1, most))).astype(np.int32)

    return [PromptGroup(tokens(40), (tokens(30), tokens(30))) for _ in range(count)]


def spec_of(directory, dtype, adapter=None, **settings):
    identity = identify(directory, dtype, adapter, max_length=LONGEST)
    return ReferenceSpec(path=str(directory), adapter=adapter and str(adapter), identity=identity, **settings)


def scored(specs, partition, sequence=1, counts=(9,)):
    """On each rank: for each specification and number of groups, the log-probs and the micro-batches of all replicas."""
    from datetime import timedelta

    from raydpo.model.ulysses import SequenceGroup

    join_process_group(CPU)
    group = SequenceGroup.of_world(sequence, timedelta(minutes=1))
    found = {}
    for name, spec in specs.items():
        scorer = Scorer(spec, device="cpu", tokens_per_batch=BUDGET, group=group, partition=partition)
        for count in counts:
            pieces = [piece for one in groups(count) for piece in scorer._pieces(one)]
            found[name, count] = scorer.score(groups(count)), pieces, scorer.shares(pieces), scorer.provenance
    return found


def alone(spec, pieces, shares):
    """The same micro-batches in this process, which holds all weights. Log-probs by piece."""
    scorer = Scorer(spec, device="cpu", tokens_per_batch=BUDGET)
    found = {}
    for batch in (batch for share in shares for batch in share if batch.counts):
        for index, logps in zip(batch.pairs, scorer.model.score([pieces[index] for index in batch.pairs], CPU), strict=True):
            found[index] = logps
    return scorer, [logps for index in range(len(pieces)) for logps in found[index]]


def unlike(specs, ranks, tolerance):
    """Names of the cases in which the team's bits differ from one process's, or from one rank to another."""
    wrong = []
    for (name, count), (got, pieces, shares, _) in ranks[0].items():
        single, wanted = alone(specs[name], pieces, shares)
        mine = [logps for group in got for logps in group]
        own = [logps for group in single.score(groups(count)) for logps in group]
        same = len(mine) == len(wanted) and all(map(np.array_equal, mine, wanted))
        others = [[logps for group in rank[name, count][0] for logps in group] for rank in ranks[1:]]
        agree = all(all(map(np.array_equal, mine, other)) for other in others)
        gap = max(np.abs(one - two).max() for one, two in zip(mine, own, strict=True))
        if not same or not agree or gap > tolerance[specs[name].identity.dtype]:
            wrong.append((name, count, same, agree, gap))
    return wrong


def test_a_team_gives_the_bits_of_one_process(tmp_path):
    directories = make_directories(USUAL, tmp_path / "models", VOCAB)
    specs = {
        f"{name} {dtype}": spec_of(each, dtype) for name, each in directories.items() for dtype in ("float32", "bfloat16")
    }
    ranks = run_distributed(scored, 2, tmp_path / "ranks", specs, Partition(2))
    assert not unlike(specs, ranks, {"float32": 2e-6, "bfloat16": 0.5})
