"""Scoring with weights that several processes hold together: the same bits as one process, whatever the model, its precision
and the processes; and no more memory than promised."""

from __future__ import annotations

import dataclasses
import pickle
import uuid
from contextlib import nullcontext
from datetime import timedelta
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import torch
from architectures import LONGEST, make_directories, make_random
from distributed import run_distributed
from kernel import tiny_pairs
from listed import make_listed
from peft import LoraConfig, get_peft_model

from raydpo.cluster.resources import Resources
from raydpo.evaluation import drift
from raydpo.model import sliced
from raydpo.model.layout import Method, PromptGroup
from raydpo.model.load import load_causal_lm
from raydpo.model.partition import Partition, join_process_group
from raydpo.model.selfcheck import TOLERANCES, CheckReport
from raydpo.model.ulysses import SequenceGroup
from raydpo.reference.build import _ScoreShard
from raydpo.reference.identity import identify
from raydpo.reference.score import ReferenceSpec, Scorer
from raydpo.reference.shards import Wanted, plan_shards
from raydpo.reference.store import ReferenceCache
from raydpo.training.policy.host_memory import HostPeak

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


@pytest.mark.slow
def test_a_team_gives_the_bits_of_one_process_in_bfloat16(models, tmp_path):
    specs = {name: spec_of(models[name], "bfloat16") for name in USUAL[1:]}
    ranks = run_distributed(scored, 2, tmp_path, specs, Partition(2))
    assert not unlike(specs, ranks, 0.5)


def test_every_way_to_load_gives_the_bits_of_one_process_in_bfloat16(models, tmp_path):
    specs = {name: spec_of(models[name], "bfloat16") for name in ["llama", *OWN]}
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


def divergences(policy, reference, partition):
    join_process_group(CPU)
    with mock.patch.object(drift, "CHUNK", 4 * VOCAB):  # so that long answers take more passes of the head than short ones
        both = drift._Both(reference, policy=policy, device="cpu", partition=partition)
        return both.score(drifting())


def drifting():
    return [PromptGroup(group.prompt, group.completions[:1]) for group in groups(5)]


def test_exact_steps_of_two_models_in_one_team(models, tmp_path):
    policy, reference = spec_of(models["llama"], "float32"), spec_of(models["qwen3_moe"], "float32")
    (alone,) = run_distributed(divergences, 1, tmp_path / "one", policy, reference, Partition())
    assert len(alone) == 5 and alone.min() > 0
    for found in run_distributed(divergences, 2, tmp_path / "two", policy, reference, Partition(2)):
        assert np.abs(found - alone).max() < 1e-6  # products of four rows depend on where weights begin in memory


def held(model):
    """Bytes of parameters that this rank has between passes."""
    return sum(
        parameter.ds_tensor.numel() * parameter.ds_tensor.element_size() + parameter.numel() * parameter.element_size()
        for parameter in model.parameters()
    )


def memory(spec):
    """Bytes of parameters on this rank: after loading, and the most at any moment of a few passes."""
    join_process_group(CPU)
    scorer = Scorer(spec, device="cpu", tokens_per_batch=BUDGET, partition=Partition(2))
    loaded, most = held(scorer.model), 0

    def look(*_):
        nonlocal most
        most = max(most, held(scorer.model))

    for module in scorer.model.modules():
        module.register_forward_pre_hook(look)  # after DeepSpeed's, which gathers
        module.register_forward_hook(look)
    scorer.score(groups())
    layers = [sum(one.ds_numel for one in layer.parameters()) for layer in scorer.model.backbone.layers]
    whole = sum(one.ds_numel for one in scorer.model.parameters())
    largest = max(*layers, *(one.ds_numel for one in scorer.model.parameters()))
    return loaded / 4, most / 4, held(scorer.model) / 4, whole, largest


def test_a_rank_holds_its_part_and_what_it_computes_with(tmp_path):
    """Numbers of elements, in a model of which a layer is a small part."""
    model = make_random("llama", VOCAB, num_hidden_layers=12, hidden_size=64, intermediate_size=192)
    model.save_pretrained(tmp_path / "model")
    spec = spec_of(tmp_path / "model", "float32")
    for loaded, most, after, whole, largest in run_distributed(memory, 2, tmp_path / "ranks", spec):
        assert whole / 2 <= loaded <= 0.51 * whole + largest
        assert after <= 0.51 * whole + largest
        assert whole / 2 < most <= 0.55 * whole + 2 * largest


def resident(small, spec):
    """Bytes of this process, beyond those of its libraries, which have scored a small model before: the most while it loads
    the model, and while it scores."""
    join_process_group(CPU)
    Scorer(small, device="cpu", tokens_per_batch=64, partition=Partition(2)).score(groups(4))

    def checked(model, *_):  # the self-check gathers all weights some twenty times
        model.use(Method("tree", "sdpa"))
        return CheckReport(model.method, "")

    with mock.patch("raydpo.reference.score.choose_layout", checked), HostPeak() as loading:
        scorer = Scorer(spec, device="cpu", tokens_per_batch=64, partition=Partition(2))
    with HostPeak() as scoring:
        scorer.score(groups(4))
    peaks = [each.bytes - loading.start_bytes for each in (loading, scoring)]
    return peaks, 4 * sum(parameter.ds_numel for parameter in scorer.model.parameters())


@pytest.mark.slow
def test_two_processes_need_little_more_than_half_the_memory_each(models, tmp_path):
    """Without page cache, which the system takes back. Of a layer three copies exist for a moment, as gloo makes one."""
    model = make_random(
        "llama",
        8192,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=36,
        num_attention_heads=12,
        num_key_value_heads=12,
    )
    assert sum(parameter.numel() for parameter in model.parameters()) > 250e6
    model.save_pretrained(tmp_path / "model")
    del model
    small, spec = spec_of(models["llama"], "float32"), spec_of(tmp_path / "model", "float32")
    for (loading, scoring), whole in run_distributed(resident, 2, tmp_path / "ranks", small, spec):
        assert loading <= 0.62 * whole and scoring <= 0.62 * whole, (loading / whole, scoring / whole)
        assert loading > 0.4 * whole and scoring > 0.5 * whole, "or nothing was measured"


def filled(uri, source, shards, spec, resources):
    """Let an actor of its own score ``shards``. Runs without Ray."""
    actor = _ScoreShard(source, spec, uri, uuid.uuid4().hex[:8], frozenset(), resources, BUDGET, [])
    try:
        rows = [actor(pa.table({"shard": [pickle.dumps(shard)]})).to_pylist()[0] for shard in shards]
    finally:
        actor.scorer.close()
    return rows


def contents(uri, spec):
    """The directory, and the log-probs by key."""
    cache = ReferenceCache.open(uri, spec.identity)
    keys = cache.keys()
    rows = cache.lookup(keys)["logps"].to_pylist()
    return cache.directory, {key: np.array(row, np.float32) for key, row in zip(keys.to_pylist(), rows, strict=True)}


def test_one_cache_whoever_fills_it(tiny_llama, tmp_path, monkeypatch):
    """Begun by one process and ended by a team, and begun by a team with weights in host memory and ended by one process."""
    for name, value in (("LOCAL_RANK", "0"), ("DS_ACCELERATOR", "cpu")):  # which a team sets, and this process outlives it
        monkeypatch.setenv(name, value)
    spec, wanted = spec_of(tiny_llama, "float32"), Wanted([tiny_pairs(12)])
    shards = list(plan_shards(wanted, 400))
    one, team = (Resources(size, 0, 1, partition=size, on_one_machine=True) for size in (1, 2))
    offloaded = dataclasses.replace(team, offload="cpu")
    half = len(shards) // 2
    ways = {
        "one": [(one, shards)],
        "one, then a team": [(one, shards[:half]), (team, shards[half:])],
        "a team, then one": [(offloaded, shards[:half]), (one, shards)],
    }
    found = {}
    for name, steps in ways.items():
        uri = str(tmp_path / name)
        rows = [row for resources, some in steps for row in filled(uri, wanted.source, some, spec, resources)]
        assert sum(row["completions"] for row in rows) == len(wanted), "each completion is scored once"
        found[name] = contents(uri, spec)
    directory, logps = found["one"]
    assert logps.keys() == {completion.key for completion in wanted}
    for name, (where, others) in found.items():
        assert where == directory and others.keys() == logps.keys(), name
        for key, values in others.items():
            assert values.shape == logps[key].shape and np.abs(values - logps[key]).max() < 2e-6, name
