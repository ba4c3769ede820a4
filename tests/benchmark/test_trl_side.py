"""TRL's side and raydpo's compute the same with the same optimizer, whatever the batch size of TRL."""

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from distributed import run_distributed
from tiny import preferences

PAIRS, PER_STEP = 8, 4


def kernel(job):
    """Both stages of the kernel, in a process of their own."""
    from raydpo.benchmark.kernel_side import score, train

    return [dataclasses.asdict(stage(job, torch.device("cpu"))) for stage in (score, train)]


@pytest.fixture(scope="module")
def sides(tmp_path_factory, tiny_llama):
    pytest.importorskip("trl")
    from raydpo.benchmark.job import Job
    from raydpo.benchmark.trl_side import run
    from raydpo.benchmark.workload import Workload

    place = tmp_path_factory.mktemp("sides")
    work = Workload.write(preferences(PAIRS), str(tiny_llama), 512, "file", place)
    pq.write_table(work.table, place / "pairs.parquet")
    job = Job(
        name="kernel", stage="train", model=str(tiny_llama), pairs=str(place / "pairs.parquet"), work=str(place),
        dtype="float32", lora=4, pairs_per_step=PER_STEP, steps=2, device="cpu", lr=1e-3, tokens_per_batch=1024,
    )  # fmt: skip
    (ours,) = run_distributed(kernel, 1, place / "rank", job)
    theirs = {}
    for name, settings in {
        "1": {"batch": 1},
        "4": {"batch": 4, "reference_batch": 4},
        "recomputed": {"batch": 2, "recompute": True, "warm": True},
        "again": {"batch": 1, "beta": 0.3},
        "online": {"batch": 4, "stage": "online"},
        "one step": {"batch": 1, "steps": 1},
    }.items():
        cache = str(place / "cache") if name in ("1", "again") else None
        fields = {"name": name, "stage": "cached", "pairs": str(work.in_order), "cache": cache} | settings
        theirs[name] = run(dataclasses.replace(job, **fields), torch.device("cpu"))
    return ours, theirs, place


def test_losses_and_reference_log_probs_are_the_same(sides):
    (scored, trained), theirs, _ = sides
    for name in ("1", "4", "recomputed", "online"):
        assert theirs[name].losses == pytest.approx(trained["losses"], abs=1e-5), name
        assert theirs[name].chosen_logps[0] == pytest.approx(trained["chosen_logps"][0], abs=1e-3)
    for half in ("ref_chosen", "ref_rejected"):
        for name in ("1", "recomputed"):
            assert np.allclose(getattr(theirs[name], half), scored[half], atol=1e-3), name
    assert trained["losses"][1] != pytest.approx(trained["losses"][0], abs=1e-4), "nothing was learnt"


def test_both_optimizers_are_the_fused_one(sides):
    (_, trained), theirs, _ = sides
    assert trained["facts"]["fused"] is True and all(each.facts["fused"] is True for each in theirs.values())


def test_both_say_how_many_positions_a_pass_had(sides):
    (_, trained), theirs, _ = sides
    facts = {name: each.facts for name, each in theirs.items()}
    assert [facts[name]["forward_passes"] for name in ("1", "4", "recomputed")] == [8, 2, 4]
    assert facts["1"]["largest_pass"] < facts["4"]["largest_pass"] and facts["1"]["positions"] < facts["4"]["positions"]
    assert 0 < trained["facts"]["largest_pass"] <= 1024 and trained["facts"]["positions"] < facts["1"]["positions"]
    assert [facts[name]["recompute"] for name in ("1", "recomputed")] == [False, True]


def test_trl_reads_its_reference_again_only_from_the_same_cache(sides):
    _, theirs, _ = sides
    assert theirs["again"].reference_seconds < 0.5 * theirs["1"].reference_seconds
    assert theirs["again"].ref_chosen == theirs["1"].ref_chosen and theirs["again"].losses[1] != theirs["1"].losses[1]
    assert theirs["online"].reference_seconds is None and theirs["online"].ref_chosen is None


def test_trl_reads_all_pairs_and_trains_on_those_of_its_steps(sides):
    _, theirs, place = sides
    one = theirs["one step"]
    assert len(one.losses) == 1 and len(one.ref_chosen) == PER_STEP and one.facts["read_pairs"] == PAIRS
    saved = json.loads((place / "one step-trl" / "output" / "adapter_config.json").read_text())
    assert saved["r"] == 4, "the policy is saved"
