"""Peak memory of training with a cached reference, against TRL with a reference model beside the policy."""

import dataclasses

import pyarrow.parquet as pq
import pytest
from kernel import with_reference
from tiny import make_model

BAR = 0.55
VOCABULARY, PAIRS, LENGTH, STEPS = 32_000, 4, 128, 2


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    """Results of both sides on the same model, pairs and steps."""
    pytest.importorskip("trl")
    pytest.importorskip("deepspeed")
    from raydpo.benchmark.job import Job, start
    from raydpo.benchmark.workload import Workload, random_records

    place = tmp_path_factory.mktemp("memory")
    model = make_model(place / "model", vocab_size=VOCABULARY)
    records = [
        {name: text.replace("w", "") for name, text in record.items()}  # about three tokens a number
        for record in random_records(STEPS * PAIRS, LENGTH // 6, LENGTH // 6, 100)
    ]
    work = Workload.write(records, str(model), 4 * LENGTH, "file", place)
    # Positions of all pairs at once: neither side cuts a step into parts.
    job = Job(
        name="kernel",
        stage="train",
        model=str(model),
        pairs=str(place / "pairs.parquet"),
        work=str(place),
        dtype="float32",
        lora=None,
        pairs_per_step=PAIRS,
        steps=STEPS,
        tokens_per_batch=4 * PAIRS * LENGTH,
        device="cpu",
        lr=1e-3,
        batch=PAIRS,
    )
    pq.write_table(work.table, job.pairs)
    pq.write_table(with_reference(work.table, model), job.scored)
    other = dataclasses.replace(job, name="trl", stage="online", pairs=str(work.in_order))
    (ours, _), (theirs, _) = start("kernel_side", job), start("trl_side", other)
    assert len(ours.losses) == STEPS and ours.losses == pytest.approx(theirs.losses, abs=1e-5), "not the same training"
    assert ours.losses[0] != ours.losses[1]
    return ours, theirs


@pytest.mark.slow  # it measures a claim; no other test depends on it
def test_a_cached_reference_takes_about_half_of_what_a_second_model_takes(peaks):
    ours, theirs = peaks
    for side, found in zip(("raydpo", "TRL"), peaks, strict=True):
        print(f"{side}: {found.peak_bytes / 2**20:.0f} MiB, {found.start_bytes / 2**20:.0f} of them imports")
    assert ours.start_bytes > 2**27 and theirs.start_bytes > 2**27
    assert ours.peak_bytes <= BAR * theirs.peak_bytes
    assert ours.peak_bytes - ours.start_bytes <= BAR * (theirs.peak_bytes - theirs.start_bytes)
