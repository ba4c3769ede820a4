"""Checkpoints during training: uploaded in the background, retried, and valid on all ranks or none."""

import errno
import re
import shutil
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from distributed import run_distributed
from kernel import Record, exact, tiny_pairs, train_here, with_reference
from safetensors import SafetensorError

from raydpo.errors import ConfigError, RaydpoError, TrainError
from raydpo.training.checkpoint import saver
from raydpo.training.hooks import TrainHooks
from raydpo.training.job import TrainSummary


@pytest.fixture(scope="module")
def table(tiny_llama):
    return with_reference(tiny_pairs(33), tiny_llama)


class Store(Record):
    """Storage that fails: at attempts ``away`` (first, last) it is unavailable, for step ``full`` the disk is full."""

    away = (0, 0)
    full = None
    slow = 0.0
    attempts = 0

    def upload(self, directory, step):
        import torch.distributed as dist

        self.attempts += 1
        if self.away[0] <= self.attempts <= self.away[1]:
            raise OSError(errno.EIO, "the store is away")
        if step == self.full and dist.get_rank() == dist.get_world_size() - 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        time.sleep(self.slow)
        super().upload(directory, step)


def train(table, model, place, **settings):
    store = Store(keep=place / "keep")
    for name in ("away", "full", "slow", "stop_after"):
        if name in settings:
            setattr(store, name, settings.pop(name))
    return train_here(table, model, place / "scratch", record=store, **{"steps": 9} | settings)


def away_and_full(table, model, place):
    found = train(table, model, place, away=(1, 2), full=4, checkpoint_every=2)
    return found.checkpoints, found.notes, found.attempts


def test_a_store_that_is_away_is_tried_again_and_a_full_one_costs_one_checkpoint(table, tiny_llama, tmp_path):
    ranks = run_distributed(away_and_full, 2, tmp_path / "run", table, tiny_llama, tmp_path)
    for checkpoints, notes, attempts in ranks:
        assert list(checkpoints) == [2, 6, 8, 9]  # all ranks alike, though only one had no room for step 4
        assert attempts == 5 + 2
        assert sum("warning: the checkpoint of step 4 could not be stored" in note for note in notes) == 1
    assert any("No space left on device" in note and "are free" in note for note in ranks[1][1])
    assert not list((tmp_path / "scratch").iterdir())
    assert (tmp_path / "keep" / "step-9" / "raydpo.json").is_file()


def full_at_the_end(table, model, place):
    saver.LAST_PAUSES = (0.1, 0.1)
    with pytest.raises(TrainError) as caught:
        train(table, model, place, full=9, checkpoint_every=2)
    return str(caught.value)


def test_the_last_checkpoint_must_be_stored(table, tiny_llama, tmp_path):
    for message in run_distributed(full_at_the_end, 2, tmp_path / "run", table, tiny_llama, tmp_path):
        assert "the checkpoint of step 9 could not be stored" in message and "the one of step 8 stays" in message
        assert "tried 3 times" in message


class Clock:
    """Stands for module ``time``: sleeping advances it, and nothing waits."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    perf_counter = monotonic

    def sleep(self, seconds):
        self.now += seconds


class Down(TrainHooks):
    """Storage that fails each attempt after its own retries have taken ``seconds``."""

    def __init__(self, clock, seconds, error):
        self.clock, self.seconds, self.error, self.notes = clock, seconds, error, []

    def upload(self, directory, step):
        self.clock.sleep(self.seconds)
        raise self.error

    def note(self, line):
        self.notes.append(line)


@pytest.mark.parametrize(
    ("seconds", "error", "most_seconds", "attempts"),
    [
        (290.0, RaydpoError("the store failed 8 times in 290 s"), 600, 1),  # a remote store that is down
        (0.0, OSError(errno.ENOSPC, "No space left on device"), 300, 23),  # a full disk
    ],
)
def test_attempts_at_the_last_checkpoint_end_after_minutes(monkeypatch, tmp_path, seconds, error, most_seconds, attempts):
    clock, place = Clock(), tmp_path / "scratch"
    place.mkdir()
    engine = SimpleNamespace(
        rank=0,
        world_size=1,
        zero=2,
        device=torch.device("cpu"),
        state=SimpleNamespace(files=lambda: [], facts={}, bytes=0),
        sum_over_ranks=lambda values: values,
    )
    monkeypatch.setattr(saver, "time", clock)
    hooks = Down(clock, seconds, error)
    one = saver.CheckpointSaver(engine, hooks, place, {})
    with pytest.raises(TrainError, match=f"tried {attempts} times"):
        one.save_last(9, TrainSummary(), {})
    one.close()
    assert saver.PATIENCE * 0.9 < clock.now < most_seconds
    assert len(hooks.notes) == attempts and not list(place.iterdir())


class Freed(Store):
    """The disk has room again after the second attempt at the last checkpoint."""

    def upload(self, directory, step):
        self.full = 9 if self.attempts < 6 else None
        super().upload(directory, step)


def freed(table, model, place):
    saver.LAST_PAUSES = (0.1, 0.1)
    record = Freed(keep=place / "keep")
    return list(train_here(table, model, place / "scratch", record=record, steps=9, checkpoint_every=2).checkpoints)


def test_the_last_checkpoint_waits_for_room(table, tiny_llama, tmp_path):
    assert run_distributed(freed, 2, tmp_path / "run", table, tiny_llama, tmp_path) == [[2, 4, 6, 8, 9]] * 2


def disk_full(table, model, place):
    """The local disk of one rank is full when step 4 is written."""
    import torch.distributed as dist

    from raydpo.training.checkpoint import files

    real = files.save_file

    def save_file(tensors, path):
        real(tensors, path)
        if "step-00000004" in str(path) and dist.get_rank() == 1:
            from safetensors import SafetensorError

            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    files.save_file = save_file
    found = train(table, model, place, checkpoint_every=2)
    return list(found.checkpoints), found.notes


def test_a_full_local_disk_costs_one_checkpoint(table, tiny_llama, tmp_path):
    ranks = run_distributed(disk_full, 2, tmp_path / "run", table, tiny_llama, tmp_path)
    assert [checkpoints for checkpoints, _ in ranks] == [[2, 6, 8, 9]] * 2
    assert any("No space left on device" in note for note in ranks[1][1])
    assert not shutil.rmtree(tmp_path / "scratch")


class Ordered(Store):
    """Records after how many steps each checkpoint became valid."""

    def register(self, step, metrics, *, wait):
        super().register(step, metrics, wait=wait)
        self.counted[step] = len(self.steps)


def slow(table, model, place, seconds):
    record = Ordered(keep=place / "keep")
    record.slow, record.counted = seconds, {}
    found = train_here(table, model, place / "scratch", record=record, checkpoint_every=4, steps=12)
    return found.counted, found.summary, found.steps


def test_a_slow_store_goes_on_beside_training_and_its_cost_is_told(table, tiny_llama, tmp_path):
    """Training waits a second for each upload, then for the one before, and at the end for the last."""
    ((counted, summary, steps),) = run_distributed(slow, 1, tmp_path / "run", table, tiny_llama, tmp_path, 1.5)
    assert list(counted) == [4, 8, 12] and counted[4] > 4 and counted[8] > 8
    assert 3 * 1.0 < summary.checkpoint_seconds < 3 * 1.5 + 0.5
    size = sum(path.stat().st_size for path in (tmp_path / "keep" / "step-12").iterdir())
    assert summary.checkpoint_bytes == pytest.approx(size, rel=0.01)
    for row in steps:
        parts = sum(value for name, value in row.items() if name.startswith("time/") and name != "time/step")
        assert parts == pytest.approx(row["time/step"], rel=1e-6)


def test_a_quick_store_counts_before_the_next_step_so_a_kill_costs_an_interval(table, tiny_llama, tmp_path):
    for counted, _, _ in run_distributed(slow, 2, tmp_path / "run", table, tiny_llama, tmp_path, 0.1):
        assert counted == {4: 4, 8: 8, 12: 12}


def slow_disk(table, model, place, memory):
    """Every write of a checkpoint takes 1.5 s. A run of 12 steps, and one that continues from its first checkpoint."""
    from raydpo.training.checkpoint import files

    saver.free_bytes = lambda: memory
    real, seen = files.save_file, []

    def save_file(tensors, path):
        seen.append(threading.current_thread() is threading.main_thread())
        time.sleep(1.5)
        real(tensors, path)

    files.save_file = save_file
    record = Ordered(keep=place / "keep")
    record.counted = {}
    whole = train_here(table, model, place / "scratch", record=record, checkpoint_every=4, steps=12)
    files.save_file = real
    rest = train_here(table, model, place / "scratch", checkpoint=place / "keep" / "step-4", steps=12)
    return record.counted, whole.steps, whole.notes, exact(whole.steps)[4:] == exact(rest.steps), seen


@pytest.mark.parametrize("memory", [1e12, 1e3])
def test_a_slow_disk_does_not_hold_up_training_which_changes_no_bit_of_it(table, tiny_llama, tmp_path, memory):
    """Without memory for a copy, training waits while the state is written."""
    ((counted, steps, notes, same, in_main),) = run_distributed(
        slow_disk, 1, tmp_path / "run", table, tiny_llama, tmp_path, memory
    )
    assert same and list(counted) == [4, 8, 12]
    waited = steps[4]["time/checkpoint"]  # for the checkpoint of step 4
    told = [note for note in notes if note.startswith("training waits while checkpoints are written: a copy takes ")]
    if memory == 1e12:
        assert counted[4] > 4 and waited < 1.4 and not told and not any(in_main)
        assert all(row["seconds"] < 1 for row in steps[4:8])
    else:
        assert counted[4] == 4 and waited > 1.5 and len(told) == 1 and all(in_main)


def no_room(table, model, place):
    import torch.distributed as dist

    real = shutil.disk_usage
    saver.shutil = SimpleNamespace(
        disk_usage=lambda path: SimpleNamespace(free=1e5 if dist.get_rank() else real(path).free), rmtree=shutil.rmtree
    )
    with pytest.raises(ConfigError) as caught:
        train(table, model, place, steps=2)
    saver.shutil = shutil
    train(table, model, place, steps=2)
    saver.shutil = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=0), rmtree=shutil.rmtree)
    again = train_here(table, model, place / "again", steps=2, checkpoint=place / "keep" / "step-2")  # no step is left
    return str(caught.value), again.steps


def test_a_disk_without_room_for_a_checkpoint_is_refused_before_the_first_step(table, tiny_llama, tmp_path):
    for message, steps in run_distributed(no_room, 2, tmp_path / "run", table, tiny_llama, tmp_path):
        assert re.match(rf"a checkpoint takes up to \d\.\d\d MB on the disk of {tmp_path}/scratch, where 0.10 MB", message)
        assert steps == []


def test_a_disk_that_is_full_when_the_trained_model_is_written_is_told(tmp_path):
    def written():
        with open("/dev/full", "w") as stream:
            stream.write("x")

    def serialised():
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def copied():
        raise shutil.Error([("a", "b", "[Errno 28] No space left on device")])

    said = (
        rf"^final/ could not be written: No space left on device \(.* are free on the disk of {tmp_path}\). All 1,200 steps"
    )
    for fails in (written, serialised, copied):
        with pytest.raises(TrainError, match=said), saver.full_disk_told(tmp_path, 1200):
            fails()
    with pytest.raises(FileNotFoundError), saver.full_disk_told(tmp_path, 1200):
        (tmp_path / "nowhere").read_bytes()


def stopped(table, model, place):
    found = train(table, model, place, stop_after=3, checkpoint_every=100)
    return found.summary.interrupted, found.summary.steps, list(found.checkpoints)


def test_a_wish_to_stop_is_heard_after_the_step_with_a_checkpoint(table, tiny_llama, tmp_path):
    assert run_distributed(stopped, 2, tmp_path / "run", table, tiny_llama, tmp_path) == [(True, 3, [3])] * 2


def by_minutes(table, model, place):
    found = train(table, model, place, checkpoint_minutes=1e-9, steps=4)
    return list(found.checkpoints)


def test_an_interval_in_minutes(table, tiny_llama, tmp_path):
    assert run_distributed(by_minutes, 2, tmp_path / "run", table, tiny_llama, tmp_path) == [[1, 2, 3, 4]] * 2


def unknown_metric(table, model, place):
    with pytest.raises(ConfigError) as caught:
        train(table, model, place, held_out=table, keep_best="eval_los")
    return str(caught.value)


def test_a_metric_that_nothing_measures_is_refused_before_the_first_step(table, tiny_llama, tmp_path):
    for message in run_distributed(unknown_metric, 1, tmp_path / "run", table, tiny_llama, tmp_path):
        assert "train.keep_best is 'eval_los'" in message and "eval_loss, " in message


def ended(table, model, place):
    whole = train(table, model, place, checkpoint_every=4)
    again = train_here(table, model, place / "again", steps=9, checkpoint=place / "keep" / "step-9")
    same = [
        torch.equal(one, other)
        for one, other in zip(whole.engine.gather().values(), again.engine.gather().values(), strict=True)
    ]
    return whole.summary, again.summary, again.steps, all(same)


def test_killed_between_the_last_checkpoint_and_the_export_nothing_is_trained_again(table, tiny_llama, tmp_path):
    whole, again, steps, same = run_distributed(ended, 1, tmp_path / "run", table, tiny_llama, tmp_path)[0]
    assert steps == [] and same
    assert (again.steps, again.pairs, again.gate) == (9, whole.pairs, whole.gate)
    assert not again.interrupted and again.seconds > 0
