"""Rounds whose processes are killed: the same command goes on, and nothing that is stored is made again."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from small import small_rounds, tables

HERE = Path(__file__).parent
SAMPLE = {"n": 8, "max_tokens": 2}  # at temperature 1, so that the drift is measured, too
FILES = (
    "small/config.yaml",
    "small/prompts.parquet",
    "small/rounds.json",
    "small/round-000/held_out.parquet",
    "small/round-000/round.json",
    "small/rounds.parquet",
    *(
        name
        for number in (1, 2)
        for name in (
            *(f"small/round-{number:03d}/{stage}.parquet" for stage in ("samples", "scores", "pairs")),
            "train/cache-hits.json",
            "train/run.json",
            "train/summary.json",
            f"small/round-{number:03d}/held_out.parquet",
            "final",
            f"small/round-{number:03d}/round.json",
        )
    ),
)
"""Every file of the rounds, in the order in which they are written, as ``kill_at`` names them."""


def command(place, *arguments, kill=()):
    program = [str(HERE / "kill_at.py"), *kill] if kill else ["-m", "raydpo.cli"]
    return [sys.executable, *program, "rounds", str(place / "config.yaml"), *arguments]


def run(place, *arguments, kill=()):
    return subprocess.run(command(place, *arguments, kill=kill), cwd=place, capture_output=True, text=True, timeout=900)


def weights(run, number):
    return load_file(run / f"round-{number:03d}/train/final/model.safetensors")


def same(ours, theirs):
    mine, other = tables(ours), tables(theirs)
    assert mine.keys() == other.keys() and len(mine) == 9
    for name in mine:
        assert mine[name].equals(other[name]), name
    for number in (1, 2):
        left, right = weights(ours, number), weights(theirs, number)
        assert left.keys() == right.keys() and all((left[key] == right[key]).all() for key in left)
    figures = [pq.read_table(one / "rounds.parquet").drop_columns(["seconds"]) for one in (ours, theirs)]
    assert figures[0].equals(figures[1])


def stored(place):
    """What may never be written again: files of stages that are whole, and blocks of answers and rewards."""
    files = [*(place / "runs/small").glob("round-*/*.parquet"), *(place / "runs/cache/evaluation").glob("*.parquet")]
    return {file: file.stat().st_mtime_ns for file in files}


@pytest.fixture(scope="module")
def calm(tmp_path_factory, tiny_llama):
    """The directory of rounds that nothing disturbs."""
    place = tmp_path_factory.mktemp("calm")
    small_rounds(place, tiny_llama, sample=SAMPLE)
    result = run(place)
    assert result.returncode == 0, result.stdout + result.stderr
    return place / "runs/small"


@pytest.mark.slow
def test_the_driver_is_killed_before_and_after_every_file(calm, tmp_path, tiny_llama):
    small_rounds(tmp_path, tiny_llama, sample=SAMPLE)
    kept, kills = {}, 0
    for file in FILES:
        for when in ("before", "after"):
            result = run(tmp_path, kill=(when, file))
            if result.returncode == 0:  # an earlier command has written it
                continue
            assert result.returncode == -signal.SIGKILL, (file, when, result.stdout + result.stderr)
            kills += 1
            now = stored(tmp_path)
            assert kept.items() <= now.items(), (file, when)
            kept = now
    result = run(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not list((tmp_path / "runs/small").glob(".final-*"))
    assert kept.items() <= stored(tmp_path).items() and kills >= 2 * len(FILES) - 4
    same(tmp_path / "runs/small", calm)


def actors_of(driver):
    """The Ray Data actors of a driver with a Ray of its own."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if "MapWorker" in "".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["actor", "driver"])
def test_a_process_is_killed_while_answers_are_sampled(calm, tmp_path, tiny_llama, victim):
    small_rounds(tmp_path, tiny_llama, sample=SAMPLE)
    log = tmp_path / "log.txt"
    with open(log, "w") as sink:
        driver = subprocess.Popen(command(tmp_path), cwd=tmp_path, stdout=sink, stderr=subprocess.STDOUT)
    blocks = tmp_path / "runs/cache/evaluation"
    deadline = time.monotonic() + 600
    while "round 1 of 2: sample" not in log.read_text() or not (actors := actors_of(driver)):
        assert driver.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    before = set(blocks.glob("*.parquet"))
    while victim == "driver" and set(blocks.glob("*.parquet")) == before:  # until the first block of samples is stored
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    if victim == "actor":
        actors[0].kill()
        assert driver.wait(600) == 0, log.read_text()
    else:
        kept = stored(tmp_path)
        driver.kill()
        driver.wait()
        result = run(tmp_path)
        assert result.returncode == 0, result.stdout + result.stderr
        assert kept.items() <= stored(tmp_path).items()
    same(tmp_path / "runs/small", calm)
