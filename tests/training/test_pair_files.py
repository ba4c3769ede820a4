"""Files of the pairs of a training: workers read what the driver had, share it, and notice what is damaged."""

import io
import os
import pickle
import time

import numpy as np
import pyarrow as pa
import pytest
import yaml
from kernel import counting, tiny_pairs
from rows import ONE
from tiny import preferences, write_preferences

from raydpo.config import load_config
from raydpo.data.ragged import Ragged
from raydpo.errors import RaydpoError
from raydpo.pipeline import train as pipeline
from raydpo.pipeline.prepare import Prepared, Tokenised
from raydpo.reference.pairs import SIDES, join_reference, place_reference
from raydpo.reference.shards import Wanted
from raydpo.reference.store import ReferenceCache
from raydpo.storage.files import Storage
from raydpo.terminal.console import Console
from raydpo.training.pair_files import PairFolder
from raydpo.training.pairs import TrainingPairs

ARRAYS = (
    *("sources", "weights", "prompt_tokens", "chosen_tokens", "rejected_tokens"),
    *("ref_chosen", "ref_rejected", "pair_weights", "pair_margins", "prompts"),
)


def made_up(count, seed=0):
    """Pairs of two sources with random tokens, some of which have sums only; and where the log-probs are."""
    rng = np.random.default_rng(seed)

    def lists(low, high):
        lengths = rng.integers(low, high, count)
        ends = np.cumsum(lengths)
        flat = rng.integers(0, 50, int(ends[-1])).astype(np.int32)
        return pa.ListViewArray.from_arrays(
            pa.array(ends - lengths, pa.int32()), pa.array(lengths, pa.int32()), pa.array(flat)
        )

    table = pa.table(
        {
            "pair_id": [f"data:{row}" for row in range(count)],
            "source": np.array(["b", "a"])[np.sort(rng.integers(0, 2, count))],
            "weight": np.ones(count),
            "prompt_ids": lists(1, 4),
            **{f"{side}_ids": lists(1, 9) for side in SIDES},
            **{
                f"{side}_key": pa.Array.from_buffers(pa.binary(16), count, [None, pa.py_buffer(rng.bytes(16 * count))])
                for side in SIDES
            },
            "pair_weight": rng.random(count),
            "set": np.zeros(count, np.int16),
            "place": rng.permutation(count),
        }
    )
    lengths = [Ragged.of(table[f"{side}_ids"]).lengths for side in SIDES]
    logps = [-rng.random(int(each.sum())).astype(np.float32) for each in lengths]
    starts = [np.cumsum(each) - each for each in lengths]
    table = table.append_column("ref_chosen_place", pa.array(starts[0]))
    table = table.append_column("ref_rejected_place", pa.array(starts[1] + len(logps[0])))
    table = table.append_column("ref_known", pa.array((rng.random(count) < 0.9).astype(np.uint8)))
    for side, start, values in zip(SIDES, starts, logps, strict=True):
        table = table.append_column(f"ref_{side}_sum", pa.array(np.add.reduceat(values.astype(np.float64), start)))
    return table, logps


def with_lists(table, logps):
    """The table as it would be in memory, with lists of log-probs."""
    values = pa.array(np.concatenate(logps))
    for side in SIDES:
        lengths = pa.array(Ragged.of(table[f"{side}_ids"]).lengths, pa.int32())
        starts = table[f"ref_{side}_place"].combine_chunks().cast(pa.int32())
        known = table["ref_known"].to_numpy()
        assert known.min() in (0, 1)
        table = table.append_column(f"ref_{side}_logps", pa.ListViewArray.from_arrays(starts, lengths, values))
    return table


def assert_equal(found, wanted):
    assert len(found) == len(wanted) and found.source_names == wanted.source_names
    assert found.ids.to_pylist() == wanted.ids.to_pylist() and found.has_reference == wanted.has_reference
    for name in ARRAYS:
        one, two = getattr(found, name), getattr(wanted, name)
        assert (one is None) == (two is None) and (one is None or np.array_equal(one, two)), name
    rows = list(range(len(wanted)))
    for one, two in zip(found.groups(rows), wanted.groups(rows), strict=True):
        assert np.array_equal(one.prompt, two.prompt)
        assert all(map(np.array_equal, one.completions, two.completions))
    one, two = found.shapes_of(np.arange(len(wanted))), wanted.shapes_of(np.arange(len(wanted)))
    assert all(np.array_equal(getattr(one, name), getattr(two, name)) for name in vars(two))
    assert np.array_equal(found.sums_only(), wanted.sums_only())
    if wanted.has_reference:
        assert all(all(map(np.array_equal, found.reference(row), wanted.reference(row))) for row in rows)


class Backwards:
    """Tokens of a table whose places count from its end; each completion goes on beyond what is in use."""

    def __init__(self, table):
        self.lists = [Ragged.of(table[f"{part}_ids"]) for part in ("prompt", *SIDES)]
        self.row = {int(place): row for row, place in enumerate(table["place"].to_numpy())}

    def rows(self, sets, places):
        assert (sets == 0).all()
        further = np.array([7, 7], np.int32)
        found = [[lists[self.row[place]] for lists in self.lists] for place in places.tolist()]
        return [(prompt, *(np.concatenate([each, further]) for each in answers)) for prompt, *answers in found]


def test_files_give_what_the_table_in_memory_gives(tmp_path):
    table, logps = made_up(60)
    wanted = TrainingPairs.of(with_lists(table, logps))
    wanted._known = table["ref_known"].to_numpy()
    with PairFolder(Storage(str(tmp_path)), one_machine=True) as folder:
        written = folder.write(table, logps, prompts=True)
        read = folder.write(table, logps, Backwards(table), prompts=True)
        assert set(written.sizes) == {"pairs.arrow", "tokens.arrow", "logps.float32"}
        assert set(read.sizes) == {"pairs.arrow", "logps.float32"}, "tokens that workers find elsewhere are not written"
        found, elsewhere = pickle.loads(pickle.dumps(written)).open(), read.open()
        files = folder.write(table.drop_columns([name for name in table.column_names if "ref" in name]), prompts=False)
        assert (
            not files.open().has_reference and files.open().prompts is None and files.open().ref_chosen.tolist() == [0] * 60
        )
        few = folder.write(table.filter(pa.array(np.arange(60) % 3 == 1)), logps).open()
    assert not (tmp_path / ".scratch").exists(), "removed at the end, and still readable by those that opened them"
    assert_equal(found, wanted)
    assert_equal(elsewhere, wanted)
    assert 0 < len(found.sums_only()) < 60 and not found.has_tokens(found.sums_only()[0])
    assert [few.ids[row].as_py() for row in range(20)] == [f"data:{row}" for row in range(1, 60, 3)]
    assert all(np.array_equal(few.reference(row)[1], wanted.reference(3 * row + 1)[1]) for row in range(20))
    assert all(np.array_equal(few.groups([row])[0].prompt, wanted.groups([3 * row + 1])[0].prompt) for row in range(20))


def test_tokens_of_other_pairs_are_refused(tmp_path):
    table, logps = made_up(60)
    shifted = Backwards(table)
    shifted.row = {place: shifted.row.get(place + 1, row) for place, row in shifted.row.items()}
    with PairFolder(Storage(str(tmp_path)), one_machine=True) as folder:
        found = folder.write(table, logps, shifted).open()
    for read in (found.groups, lambda rows: found.shapes_of(np.array(rows))):
        with pytest.raises(RaydpoError, match=r"pair \S+ was read as .* tokens, expected .*; run the command again"):
            read(range(60))


def test_log_probs_of_a_cache_are_placed_as_they_are_joined(tmp_path):
    table = tiny_pairs(12)
    cache, wanted = ReferenceCache.open(str(tmp_path / "cache"), ONE), Wanted([table])
    rng = np.random.default_rng(0)
    cache.prepare({})
    cache.commit(wanted.keys.to_pylist(), [-rng.random(count).astype(np.float32) for count in wanted.tokens], {})
    placed, logps = place_reference(table, cache, "training")
    with PairFolder(Storage(str(tmp_path)), one_machine=True) as folder:
        found = folder.write(placed, logps, prompts=True).open()
    assert_equal(found, TrainingPairs.of(join_reference(table, cache, "training")))


def test_a_handle_is_small_and_equal_pairs_share_their_files(tmp_path):
    table, logps = made_up(100_000)
    with PairFolder(Storage(str(tmp_path)), one_machine=True) as folder:
        first, again = folder.write(table, logps), folder.write(table, logps)
        assert first == again and len(pickle.dumps(first)) < 1000 and sum(first.sizes.values()) > 10_000_000
        sums = table.set_column(table.column_names.index("ref_chosen_sum"), "ref_chosen_sum", table["ref_rejected_sum"])
        others = folder.write(sums, logps), folder.write(table.slice(1), logps)
        assert len({first.place, *(other.place for other in others)}) == 3
        assert len(list((tmp_path / ".scratch" / "pairs").iterdir())) == 3, "no leftovers of what was being written"


def test_other_masks_of_equal_pairs_share_the_log_probs(tmp_path):
    table, logps = made_up(50)
    masks = [counting(table, lambda side, row, tokens, first=first: np.arange(tokens) >= first) for first in (0, 1)]
    with PairFolder(Storage(str(tmp_path)), one_machine=True) as folder:
        plain, every, some, other = (folder.write(each, logps) for each in (table, *masks, table.slice(1)))
        assert plain == every and len({plain.place, some.place, other.place}) == 3
        files = [os.stat(f"{one.place}/logps.float32") for one in (plain, some, other)]
        assert files[0].st_ino == files[1].st_ino != files[2].st_ino
        assert [one.masked for one in (plain.open(), some.open())] == [False, True]
        for row in range(50):
            for one, two in zip(plain.open().reference(row), some.open().reference(row), strict=True):
                np.testing.assert_array_equal(one, two)
            weights = some.open().weights_of([row])
            assert weights.tolist() == [
                float(at > 0) for n in some.open().groups([row])[0].completions for at in range(len(n))
            ]


def test_memory_does_not_grow_with_the_pairs(tmp_path):
    """All that a worker holds itself is its modules' and what it makes of a step's rows."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs /proc")

    def own_bytes():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

    with PairFolder(Storage(str(tmp_path)), one_machine=True) as folder:
        few, many = (folder.write(*made_up(count)) for count in (1000, 100_000))
        kept = [few.open()]
        kept[0].groups(range(100))
        before = own_bytes()
        kept.append(many.open())
        rows = np.arange(0, 100_000, 1000)
        kept[1].groups(rows), kept[1].shapes_of(rows), [kept[1].reference(row) for row in rows]
        assert sum(many.sizes.values()) > 10_000_000
        assert own_bytes() - before < 2_000_000


@pytest.mark.parametrize("name", ["pairs.arrow", "tokens.arrow", "logps.float32"])
def test_a_missing_or_damaged_file_is_named_with_what_to_do(name, tmp_path):
    with PairFolder(Storage(str(tmp_path)), one_machine=True) as folder:
        files = folder.write(*made_up(5))
        place = tmp_path / ".scratch" / "pairs" / os.path.basename(files.place) / name
        content = place.read_bytes()
        place.write_bytes(content[:-1])
        with pytest.raises(RaydpoError, match=rf"{place} is damaged: it has [\d,]+ bytes, expected .*run the command again"):
            files.open()
        if name == "pairs.arrow":
            place.write_bytes(content[:-200] + bytes([content[-200] ^ 1]) + content[-199:])
            with pytest.raises(RaydpoError, match=rf"{place} is damaged: its checksum is .*run the command again"):
                files.open()
        place.unlink()
        with pytest.raises(RaydpoError, match=rf"{place} is missing.*set output to a directory that all machines share"):
            files.open()
        again = folder.write(*made_up(5))
        assert again == files and len(again.open()) == 5, "written anew"


def test_machines_without_a_common_disk_read_their_own_copies(tmp_path, monkeypatch):
    storage = Storage(f"memory://runs-{time.time_ns()}/run")
    table, logps = made_up(20)
    with PairFolder(storage, one_machine=False) as folder:
        sent = pickle.dumps(folder.write(table, logps))
        for machine in ("one", "two", "one"):
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
            assert pickle.loads(sent).open().ids.to_pylist() == table["pair_id"].to_pylist()
        copies = {machine: list((tmp_path / machine).rglob("pairs.arrow")) for machine in ("one", "two")}
        assert [len(found) for found in copies.values()] == [1, 1]
    assert not storage.exists(".scratch/pairs") or not storage.list(".scratch/pairs")
    with PairFolder(storage, one_machine=True) as folder:
        files = folder.write(table, logps)
        assert not storage.exists(".scratch/pairs") or not storage.list(".scratch/pairs"), "one machine needs no upload"
        assert len(files.open()) == 20
    assert not os.path.exists(files.place)


def test_nothing_of_the_pairs_goes_through_the_object_store(tmp_path, tiny_llama, monkeypatch):
    """As far as the start of the workers, for which this process stands in; it stops the training."""
    import ray

    from raydpo.cluster.resources import Resources

    write_preferences(tmp_path / "a.jsonl", preferences(40))
    tree = {
        "output": str(tmp_path / "runs"),
        "name": "one",
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "data": {"train": str(tmp_path / "a.jsonl"), "eval": {"fraction": 0.3}, "filter": "ref_margin > -1e9"},
        "train": {"workers": 1, "pairs_per_step": 8, "steps": 2},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    console = Console(io.StringIO())
    config = load_config(tmp_path / "config.yaml", [])
    prepared = Prepared.of(config, console, Tokenised.of(config, console))
    wanted = Wanted(prepared.tables)
    prepared.cache.prepare({})
    prepared.cache.commit(wanted.keys.to_pylist(), [np.full(count, -1.0, np.float32) for count in wanted.tokens], {})
    seen = {}

    def launch(payload, resources, listener, say):
        sent = pickle.dumps((payload.pairs, payload.held_out))
        seen["bytes"] = len(sent)
        assert "tokens.arrow" not in payload.pairs.sizes, "they are in the tokenised set of the cache"
        seen["pairs"], seen["held_out"] = (files.open() for files in pickle.loads(sent))
        return {"interrupted": True, "steps": 0}, True

    monkeypatch.setattr(ray, "put", lambda value: pytest.fail("ray.put"))
    monkeypatch.setattr(pipeline, "resources_for", lambda *_: Resources(1, 0.0, 1))
    monkeypatch.setattr(pipeline, "wait_for_workers", lambda *_: None)
    monkeypatch.setattr(pipeline, "launch", launch)
    with pytest.raises(KeyboardInterrupt):
        pipeline.train_prepared(prepared, console)
    assert seen["bytes"] < 2000
    for name, table in zip(("pairs", "held_out"), prepared.tables, strict=True):
        assert_equal_but_prompts(seen[name], TrainingPairs.of(join_reference(table, prepared.cache, name)))
    assert seen["held_out"].prompts is not None
    assert not (tmp_path / "runs" / "one" / ".scratch").exists()


def assert_equal_but_prompts(found, wanted):
    found.prompts = wanted.prompts if found.prompts is None else found.prompts
    assert_equal(found, wanted)
