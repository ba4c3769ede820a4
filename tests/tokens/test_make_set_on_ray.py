"""Sets made by actors: the same blocks as in one process, whoever dies meanwhile, beside others that hold all CPUs."""

import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from making import SIZES, content, write
from samples import text

from raydpo.errors import DataError, FilesError, RaydpoError
from raydpo.tokens import actors, reader
from raydpo.tokens.actors import Job, Makers, makers
from raydpo.tokens.build import make_set, make_set_on_ray
from raydpo.tokens.store import TokenSet

TEXTS = [text(number) for number in range(400)]
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def ray():
    import ray

    ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False, object_store_memory=1 << 27)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def pool(ray):
    """Two actors, which serve many sets."""
    pool = Makers([0, 0], torch=False)
    yield pool
    pool.close()


@pytest.fixture
def source(kit, tmp_path, monkeypatch):
    """Data of 58 pieces, and the names of its blocks as one process makes them."""
    monkeypatch.setattr(reader, "PIECE_SIZES", SIZES["7 lines"])
    data = kit.data(write(tmp_path / "a.jsonl", [*TEXTS, "{broken"]))
    wanted = kit.set(data, "here")
    make_set(wanted, data.train[0], data, kit.tokeniser())
    return data, names(wanted), wanted


def names(token_set):
    return [block.index for block in token_set.complete().blocks]


def on_ray(pool, kit, data, token_set, **given):
    return make_set_on_ray(pool, token_set, data.train[0], data, kit.recipe(token_set, data), **given)


def process_of(worker):
    return int(worker.where.split()[1])


def test_actors_make_the_marks_that_one_process_makes(pool, kit, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "PIECE_SIZES", SIZES["7 lines"])
    thinking = [text(number, chosen=f"<think>{number}</think> blue", s={"rejected": [[0, 2]]}) for number in range(40)]
    data = kit.data(write(tmp_path / "a.jsonl", thinking), train_on="answer", spans_column="s")
    here, there = kit.set(data, "here"), kit.set(data, "there")
    make_set(here, data.train[0], data, kit.tokeniser())
    list(on_ray(pool, kit, data, there))
    assert names(there) == names(here) and content(there) == content(here)
    light = there.light().light
    assert set(map(len, light["chosen_marks"].to_pylist())) == {2} and light["rejected_factors"][0].as_py()[-1] == 0


@pytest.mark.parametrize("count", [1, 2, 5])
def test_actors_make_the_blocks_that_one_process_makes(ray, kit, source, monkeypatch, count):
    data, wanted, here = source
    sizes, put = [], ray.put

    def measured(value):
        sizes.append(len(pickle.dumps(value)))
        return put(value)

    monkeypatch.setattr(ray, "put", measured)
    monkeypatch.setattr(actors, "cores_of", lambda node: 6)
    token_set = kit.set(data, f"actors {count}")
    with makers(count) as pool:
        told = list(on_ray(pool, kit, data, token_set))
        modules = [
            ray.get(worker.actor.call.remote(lambda state: [sys.modules.get("torch"), "transformers" in sys.modules]))
            for worker in pool._workers
        ]
    assert len(pool) == count and modules and all(each == [None, True] for each in modules), "no torch in the actors"
    assert names(token_set) == wanted and content(token_set) == content(here)
    contiguous = [each.contiguous for each in told]
    assert contiguous == sorted(contiguous) and contiguous[-1] == told[-1].pairs == 400
    assert sum(0 < each < 400 for each in contiguous) > 5, "a caller learns of the first pairs before the last are made"
    assert told[-1].complete is not None and told[-1].seconds_left == 0 and told[-1].records == 401
    assert all(each.contiguous <= each.pairs for each in told) and told[-2].pairs_per_second > 0
    assert max(sizes) < 100_000 and len(sizes) < 130, "pieces, not the source, go into the object store"


def test_progress_counts_blocks_in_order_only(pool, kit, source, monkeypatch):
    """The block with the first lines arrives last."""
    data, wanted, _ = source
    token_set, first, run = kit.set(data), [], pool.run

    def late(jobs, *given):
        for answer in run(jobs, *given):
            if answer is not None and answer[0].about.startswith("lines 1 to") and answer[0].tag is not None:
                first.append(answer)
            else:
                yield answer
        yield from first

    monkeypatch.setattr(pool, "run", late)
    told = list(on_ray(pool, kit, data, token_set))
    assert {each.contiguous for each in told} == {0, 400} and names(token_set) == wanted
    assert sum(each.contiguous == 400 for each in told) == 2


def test_it_goes_on_while_others_hold_all_cpus(ray, kit, source):
    data, wanted, _ = source

    @ray.remote(num_cpus=6)
    class Scoring:
        def ready(self):
            return True

    scoring = Scoring.remote()
    ray.get(scoring.ready.remote())
    try:
        with makers(4) as pool:
            told = list(on_ray(pool, kit, data, kit.set(data)))
        assert names(kit.set(data)) == wanted and told[-1].pairs == 400
    finally:
        ray.kill(scoring)


def test_two_commands_at_once_make_one_set(ray, pool, kit, source):
    data, wanted, _ = source
    with makers(1) as other:
        runs = [on_ray(each, kit, data, kit.set(data)) for each in (pool, other)]
        while runs:
            runs = [run for run in runs if next(run, None) is not None]
    assert names(kit.set(data)) == wanted
    assert len(kit.set(data).blocks()) == len(wanted) and not kit.set(data).problems


def test_an_actor_that_is_killed_is_replaced(pool, kit, source):
    data, wanted, _ = source
    seed = random.randrange(1 << 30)
    when = sorted(random.Random(seed).sample(range(50), 2))
    killed = []
    for progress in on_ray(pool, kit, data, kit.set(data)):
        busy = [worker for worker in pool._workers if worker.jobs]
        if when and busy and progress.records // 7 >= when[0]:
            when.pop(0)
            killed.append(process_of(busy[-1]))
            os.kill(killed[-1], signal.SIGKILL)
    assert names(kit.set(data)) == wanted and killed, f"seed {seed}"


def test_an_error_of_an_actor_arrives_as_it_is(pool, kit, source):
    data, _, _ = source
    token_set = kit.set(data)
    (kit.root / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(RaydpoError, match=r"^cannot load a tokenizer from ") as raised:
        list(on_ray(pool, kit, data, token_set))
    assert type(raised.value) is FilesError


def test_another_tokenizer_on_the_node_of_an_actor_is_refused(pool, kit, source):
    data, _, _ = source
    token_set = kit.set(data)
    path = kit.root / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace("\n", "\n "))
    with pytest.raises(RaydpoError, match=r"is another one here than where .*differ in: files"):
        list(on_ray(pool, kit, data, token_set))


def test_a_source_that_is_refused_ends_at_once(pool, kit, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "PIECE_SIZES", SIZES["7 lines"])
    data = kit.data(write(tmp_path / "bad.jsonl", ["{broken"] * 300 + TEXTS[:10]))
    with pytest.raises(DataError, match=r"data bad: \d+ of \d\d? records are malformed"):
        list(on_ray(pool, kit, data, kit.set(data)))
    assert kit.set(data).complete() is None


def die(state, marker, times):
    """Kills its process as often as told."""
    import os

    for number in range(times):
        try:
            os.close(os.open(f"{marker}-{number}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        os.kill(os.getpid(), 9)
    return "survived"


def jobs_around(tmp_path, times):
    import ray.cloudpickle as cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield from (Job(lambda state, number=number: number, (), tag=number, about="others") for number in range(3))
    yield Job(die, (str(tmp_path / "mark"), times), about="lines 8 to 14 of a.jsonl")
    yield from (Job(lambda state, number=number: number, (), tag=number, about="others") for number in range(3, 9))


def test_a_piece_that_kills_each_process_is_named(pool, tmp_path):
    with pytest.raises(RaydpoError, match=r"^tokenising failed: 3 processes died .* at lines 8 to 14 of a.jsonl, the last"):
        list(pool.run(jobs_around(tmp_path, 99), "tokenising"))


def test_only_the_pieces_of_a_dead_actor_are_repeated(pool, tmp_path):
    answers = [answer for answer in pool.run(jobs_around(tmp_path, 1), "tokenising") if answer is not None]
    assert sorted(job.tag for job, _ in answers if job.tag is not None) == list(range(9))
    assert [result for job, result in answers if job.tag is None] == ["survived"]


def test_a_silent_actor_is_named(pool, monkeypatch):
    monkeypatch.setattr(actors, "QUIET_SECONDS", 1.0)
    job, lines = Job(lambda state: time.sleep(4), (), about="lines 1 to 7 of a.jsonl"), []
    list(pool.run(iter([job]), "tokenising", lines.append))
    processes = [process_of(worker) for worker in pool._workers]
    named = [line for line in lines if "has been at lines 1 to 7 of a.jsonl for" in line]
    assert named and int(named[0].split()[2]) in processes and named[0].startswith("tokenising: process ")


def test_what_is_on_its_way_is_bounded(pool, monkeypatch):
    monkeypatch.setattr(actors, "IN_FLIGHT", 50)
    taken = most = 0

    def jobs():
        nonlocal taken
        for number in range(30):
            taken += 1
            yield Job(lambda state: time.sleep(0.02), (), size=20, tag=number)

    for number, answer in enumerate(each for each in pool.run(jobs(), "tokenising") if each is not None):
        most = max(most, taken - number)
        assert answer[0].size == 20
    assert taken == 30 and most <= 3


PROGRAM = """
import os, sys
sys.path += [{tests!r}, {tests!r} + "/tokens", {tests!r} + "/data"]
from pathlib import Path
import ray
from making import SIZES, Kit
from raydpo.tokens import reader
from raydpo.tokens.actors import makers
from raydpo.tokens.build import make_set_on_ray
reader.PIECE_SIZES = SIZES["7 lines"]
kit = Kit(Path({root!r}))
data = kit.data({path!r})
token_set = kit.set(data)
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=1 << 27)
with makers(2) as pool:
    for progress in make_set_on_ray(pool, token_set, data.train[0], data, kit.recipe(token_set, data)):
        print("blocks", progress.pairs, flush=True)
"""


def killed_after(kit, path, pairs, delay):
    """Run a command that makes the set, and kill it a moment after it has told of so many pairs."""
    code = PROGRAM.format(tests=str(TESTS), root=str(kit.root), path=str(path))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment["PYTHONPATH"] = str(TESTS.parent)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as command:
        for line in command.stdout:
            if line.startswith("blocks") and int(line.split()[1]) >= pairs:
                time.sleep(delay)
                break
        command.send_signal(signal.SIGKILL)


def check_after_kill(kit, source, pairs, delay):
    data, wanted, _ = source
    killed_after(kit, kit.root / "a.jsonl", pairs, delay)
    token_set = kit.set(data)
    there = token_set.blocks()
    assert {block.index for block in there} <= set(wanted)
    made, commit = [], TokenSet.commit
    patch = pytest.MonkeyPatch()
    patch.setattr(TokenSet, "commit", lambda self, span, rows: made.append(span) or commit(self, span, rows))
    try:
        if token_set.complete() is None:
            make_set(token_set, data.train[0], data, kit.tokeniser())
    finally:
        patch.undo()
    assert names(kit.set(data)) == wanted
    # Actors may outlive their driver for a moment.
    assert len(made) <= len(wanted) - len(there) and len(there) * 7 >= pairs


def test_a_command_that_is_killed_goes_on(kit, source):
    check_after_kill(kit, source, pairs=100, delay=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(20))
def test_a_command_that_is_killed_at_any_moment_goes_on(kit, source, moment):
    check_after_kill(kit, source, pairs=random.Random(moment).randrange(0, 400, 7), delay=random.Random(moment).random() / 5)
