"""What is read of a raydpo command: its run directory, the parts of its cache, and what it printed."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kernel import tiny_pairs

from raydpo.benchmark import product
from raydpo.benchmark.job import Job
from raydpo.benchmark.product import config_of, parts_seconds, run_verb
from raydpo.benchmark.watch import Watched
from raydpo.benchmark.workload import Workload
from raydpo.data.shapes import Shapes
from raydpo.errors import TrainError
from raydpo.rundir.records import to_parquet


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    place, table = tmp_path_factory.mktemp("work"), tiny_pairs(8)
    ones = [1] * 8
    lengths = Shapes.of([pa.array([1]).to_numpy()] * 8, [ones] * 8)
    return Workload(place / "pairs.jsonl", place / "pairs-file.jsonl", "file", list(range(8)), table, lengths)


def part(directory, second, keys):
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"part-{int(second * 1e9):020d}-abcdefgh-{'0' * 32}.parquet"
    pq.write_table(pa.table({"key": pa.array(keys, pa.binary(16))}), file)
    return file


def trained(directory, losses):
    directory.mkdir(parents=True)
    rows = [
        {"step": step, "seconds": 2.0 + step, "loss": loss, "logps/chosen": -5.0, "logps/rejected": -6.0}
        | {"peak_memory_bytes": 100.0 * step}
        for step, loss in enumerate(losses, 1)
    ]
    (directory / "metrics.parquet").write_bytes(to_parquet(rows))
    (directory / "summary.json").write_text(json.dumps({"load_seconds": 3.0, "train_seconds": 9.0}))


@pytest.fixture
def command(monkeypatch):
    """Call it with what the command leaves and prints."""

    def use(leave, *lines):
        def watch(words, log, environment):
            leave()
            assert words[1:4] == ["-m", "raydpo.cli", words[3]] and "RAY_ADDRESS" not in environment
            return Watched(60.0, 5, 0.0, list(lines))

        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
        monkeypatch.setattr(product, "watch", watch)

    return use


def config(tmp_path, work, **settings):
    job = Job(
        name="run", stage="train", model="m", pairs="p", work="w", dtype="float32", lora=4, pairs_per_step=4, steps=2,
        device="cpu", lr=1e-4, **settings,
    )  # fmt: skip
    return config_of(job, work, tmp_path / "output", 512, ())


def test_a_run_is_read_from_its_directory_and_its_lines(tmp_path, work, command):
    output = tmp_path / "output"
    part(output / "cache" / "old" / "parts", 1.0, [])

    def leave():
        trained(output / "benchmark", [0.69, 0.68])
        keys = [key for name in ("chosen_key", "rejected_key") for key in work.table[name].to_pylist()]
        for number in range(4):
            part(output / "cache" / "id" / "parts", 100.0 + 2 * number, keys[4 * number : 4 * number + 4])

    command(
        leave,
        (4.0, "data pairs-8: 8 records, 8 pairs kept"),
        (9.0, "tokens_per_batch: auto = 4096 positions (0.01 MiB each measured, 17.4 GiB free)"),
        (20.0, "tokens_per_batch: auto = 1024 positions (0.02 MiB each measured, 17.9 GiB free)"),
        (25.5, "first loss 0.693147, 6.0e-09 from 0.693147"),
    )
    found, watched, trials = run_verb("run", config(tmp_path, work), work)
    assert found.step_seconds == [3.0, 4.0] and found.losses == [0.69, 0.68] and found.peak_bytes == 200.0
    assert found.facts["phases"] == {"read": 4.0, "first step": 25.5} and found.facts["largest_pass"] == 1024
    assert found.facts["parts"] == 4 and 6.0 < found.reference_seconds < 12.0, "six seconds from the first part to the last"
    assert watched.seconds == 60.0 and trials == []


def test_trials_of_a_sweep_are_in_the_order_of_their_betas(tmp_path, work, command):
    output = tmp_path / "output" / "benchmark"

    def leave():
        for name, loss in (("train.beta=0.03", 0.5), ("train.beta=0.1", 0.6)):
            trained(output / name, [loss, loss])
        names = ("train.beta=0.1", "train.beta=0.03")
        (output / "sweep.json").write_text(json.dumps({"trials": [{"name": name} for name in names]}))

    command(leave, (50.0, "sweep: 2 trials over train.beta; 2 at once"), (59.0, "sweep: /somewhere/sweep.json"))
    found, _, trials = run_verb("sweep", config(tmp_path, work), work)
    assert [trial.losses[0] for trial in trials] == [0.6, 0.5]
    assert found.facts["at_once"] == 2 and found.reference_seconds is None


def test_a_training_that_did_not_finish_is_no_measurement(tmp_path, work, command):
    command(lambda: (tmp_path / "output" / "benchmark").mkdir())
    with pytest.raises(TrainError, match="no finished run"):
        run_verb("train", config(tmp_path, work), work)


def test_a_reference_pass_of_few_parts_has_no_time(tmp_path, work):
    keys = work.table["chosen_key"].to_pylist()
    parts = [part(tmp_path, 10.0 * number, keys[number : number + 1]) for number in range(3)]
    assert parts_seconds(parts[:2], work.table) is None
    amounts = [len(row["prompt_ids"]) / 2 + len(row["chosen_ids"]) for row in work.table.slice(0, 3).to_pylist()]
    assert parts_seconds(parts, work.table) == pytest.approx(20.0 * sum(amounts) / sum(amounts[1:]))
