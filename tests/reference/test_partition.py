"""Scoring with weights that several processes hold together: the same bits as one process, whatever the model, its precision
and the processes; and no more memory than promised."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from datetime import timedelta
from unittest import mock

import numpy as np
import pytest
import torch
from architectures import LONGEST, make_directories
from distributed import run_distributed
from listed import make_listed
from peft import LoraConfig, get_peft_model

from raydpo.model import sliced
from raydpo.model.layout import PromptGroup
from raydpo.model.load import load_causal_lm
from raydpo.model.partition import Partition, join_process_group
from raydpo.model.selfcheck import TOLERANCES
from raydpo.model.ulysses import SequenceGroup
from raydpo.reference.identity import identify
from raydpo.reference.score import ReferenceSpec, Scorer

CPU = torch.device("cpu")
VOCAB = 300
BUDGET = 120
USUAL = ["llama", "llama-tied", "qwen3_moe", "gemma2", "gpt2"]
OWN = ["ernie4_5_moe", "mamba", "listed"]
"""With routers in float32, layers that use the weight of a child without calling it, and experts in a list."""


def groups(count=9, seed=0):
    rng = np.random.default_rng(seed)

    def tokens(most):
        return rng.integers(3, VOCAB, int(rng.integers(1, most))).astype(np.int32)

    return [PromptGroup(tokens(40), (tokens(30), tokens(30))) for _ in range(count)]


def spec_of(directory, dtype, adapter=None):
    trust = {"trust_remote_code": directory.name == "listed"}
    identity = identify(directory, dtype, adapter, max_length=LONGEST, **trust)
    return ReferenceSpec(path=str(directory), adapter=adapter and str(adapter), identity=identity, **trust)


def make_adapter(directory, folder):
    """An adapter on attention layers whose output is noise."""
    torch.manual_seed(1)
    model = load_causal_lm(directory, "float32", rope_length=None)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(str(folder))
    return folder


def scored(specs, partition, sequence=1, counts=(9,)):
    """On each rank: for each specification and number of groups, the log-probs and the micro-batches of all replicas."""
    join_process_group(CPU)
    group = SequenceGroup.of_world(sequence, timedelta(minutes=1))
    found = {}
    for name, spec in specs.items():
        with (
            mock.patch.object(sliced, "_partitioner", side_effect=sliced._UnsuitedError("no"))
            if "by transformers" in name
            else nullcontext()
        ):
            offload = "cpu" if "offload" in name else None
            scorer = Scorer(
                spec,
                device="cpu",
                tokens_per_batch=BUDGET,
                group=group,
                partition=dataclasses.replace(partition, offload=offload),
            )
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


def flat(scored):
    return [logps for group in scored for logps in group]


def unlike(specs, ranks, tolerance):
    """The cases in which the team's bits differ from one process's, or from one rank to another."""
    wrong = []
    for (name, count), (got, pieces, shares, _) in ranks[0].items():
        single, wanted = alone(specs[name], pieces, shares)
        mine = flat(got)
        same = len(mine) == len(wanted) and all(map(np.array_equal, mine, wanted))
        agree = all(all(map(np.array_equal, mine, flat(rank[name, count][0]))) for rank in ranks[1:])
        gap = max(np.abs(one - two).max() for one, two in zip(mine, flat(single.score(groups(count))), strict=True))
        if not same or not agree or gap > tolerance:
            wrong.append((name, count, same, agree, gap))
    return wrong


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = make_directories([*USUAL, "ernie4_5_moe", "mamba"], folder, VOCAB)
    return made | {"listed": make_listed(folder / "listed", VOCAB)}


def test_a_team_gives_the_bits_of_one_process(models, tmp_path):
    """In float32 also close to what one process computes in micro-batches of its own."""
    specs = {name: spec_of(models[name], "float32") for name in USUAL}
    ranks = run_distributed(scored, 2, tmp_path, specs, Partition(2))
    assert not unlike(specs, ranks, 2e-6)


def test_a_team_gives_the_bits_of_one_process_in_bfloat16(models, tmp_path):
    specs = {name: spec_of(models[name], "bfloat16") for name in [*USUAL, *OWN]}
    for name in ("llama", "ernie4_5_moe"):
        specs[f"{name} by transformers"] = specs[name]
    specs["llama offload"] = specs["llama"]
    adapter = make_adapter(models["llama"], tmp_path / "adapter")
    specs["llama adapter"] = spec_of(models["llama"], "bfloat16", adapter)
    ranks = run_distributed(scored, 2, tmp_path / "ranks", specs, Partition(2))
    assert not unlike(specs, ranks, 0.5)


def test_four_ranks_of_which_some_have_nothing(models, tmp_path):
    specs = {"llama": spec_of(models["llama"], "float32"), "qwen3_moe": spec_of(models["qwen3_moe"], "float32")}
    ranks = run_distributed(scored, 4, tmp_path, specs, Partition(4), 1, (1, 2, 9))
    assert sum(not batch.counts for share in ranks[0]["llama", 1][2] for batch in share) == 3
    assert not unlike(specs, ranks, 2e-6)


def test_two_replicas_of_two_ranks_that_share_positions(models, tmp_path):
    specs = {"llama": spec_of(models["llama"], "float32")}
    ranks = run_distributed(scored, 4, tmp_path, specs, Partition(4), 2, (1, 9))
    for count in (1, 9):
        got, pieces, shares, provenance = ranks[0]["llama", count]
        assert len(shares) == 2 and provenance["sequence_parallel"] == 2 and provenance["partition"] == 4
        _, wanted = alone(specs["llama"], pieces, shares)
        assert max(np.abs(one - two).mean() for one, two in zip(flat(got), wanted, strict=True)) < TOLERANCES[torch.float32]
