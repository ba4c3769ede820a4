"""A run that is refused for other pairs says which of them are other ones."""

import numpy as np
import pyarrow as pa
import pytest

from raydpo.data.pairs import PAIR_SCHEMA
from raydpo.errors import ConfigError
from raydpo.rundir.earlier import finished_summary
from raydpo.rundir.fingerprint import TRAINING_PAIRS
from raydpo.rundir.pairs import changed_pairs, pairs_record
from raydpo.storage.files import Storage


def table(*answers, swap=False, start=1, tokens=3, weight=1.0, chunks=1):
    """Pairs a:1, a:2, ... whose keys follow from ``answers``."""
    keys = [np.random.default_rng(answer).bytes(32) for answer in answers]
    halves = [[key[:16] for key in keys], [key[16:] for key in keys]]
    if swap:
        halves.reverse()
    count = len(answers)
    columns = {
        "pair_id": [f"a:{start + row}" for row in range(count)],
        "source": ["a"] * count,
        "weight": [weight] * count,
        "prompt_ids": [[1]] * count,
        **{f"{side}_ids": [list(range(tokens))] * count for side in ("chosen", "rejected")},
        **dict(zip(("chosen_key", "rejected_key"), halves, strict=True)),
        **{f"{side}_full": [tokens] * count for side in ("chosen", "rejected")},
    }
    whole = pa.table(columns, PAIR_SCHEMA)
    size = max(1, count // chunks)
    return pa.concat_tables([whole.slice(place, size) for place in range(0, count, size)])


def counted(pairs, weights):
    """``pairs`` of whose chosen completions the first token has another weight than the others, in the last pair."""
    count = len(pairs)
    ones, parts = [[1.0]] * count, [[1.0]] * (count - 1) + [weights]
    for side, each in (("chosen", parts), ("rejected", ones)):
        starts = pa.array([list(range(len(runs))) for runs in each], pa.list_(pa.int32()))
        pairs = pairs.append_column(f"{side}_starts", starts)
        pairs = pairs.append_column(f"{side}_weights", pa.array(each, pa.list_(pa.float32())))
    return pairs


@pytest.fixture
def run(tmp_path):
    storage = Storage(str(tmp_path / "run"))
    storage.write("training-pairs.parquet", pairs_record(table(1, 2, 3, 4)))
    storage.write("run.json", f'{{"fingerprint": {{"{TRAINING_PAIRS}": "{"a" * 32}", "train.lr": 1}}}}'.encode())
    return storage


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (table(1, 2, 9, 4), "1 of 4 pairs is another one (first: a:3)"),
        (table(1, 2, 9, 4, chunks=3), "1 of 4 pairs is another one (first: a:3)"),
        (table(8, 9, 3, 4), "2 of 4 pairs are other ones (first: a:1, a:2)"),
        (table(1, 2, 3, 4, 5), "1 of 5 pairs is new (first: a:5)"),
        (table(1, 2, 3), "1 of 4 pairs is gone (first: a:4)"),
        (table(9, 1, 2, 3, 4), "1 of 5 pairs is new (first: a:1)"),
        (table(2, 1, 3, 4), "another order"),
        (table(1, 2, 3, 4, 4), "4 pairs then and 5 now"),
        (table(1, 2, 3, 4, tokens=2), "4 of 4 pairs differ in length in use, source, weight or rank"),
        (table(1, 2, 3, 4, weight=0.5), "4 of 4 pairs differ in length in use, source, weight or rank"),
        (counted(table(1, 2, 3, 4), [0.0, 1.0]), "1 of 4 pairs differ in the tokens that count (first: a:4)"),
        (counted(table(1, 2, 3, 4), [0.5]), "1 of 4 pairs differ in the tokens that count (first: a:4)"),
        (table(1, 2, 3, 4, swap=True), "4 of 4 pairs are other ones (first: a:1, a:2, a:3, ...), the chat template or"),
    ],
)
def test_what_has_changed_is_said_in_words(run, now, told):
    assert told in changed_pairs(run, now)


def test_what_counts_is_compared_with_what_counted(tmp_path):
    storage = Storage(str(tmp_path / "run"))
    storage.write("training-pairs.parquet", pairs_record(counted(table(1, 2), [0.0, 1.0])))
    told = "1 of 2 pairs differ in the tokens that count (first: a:2)"
    assert changed_pairs(storage, table(1, 2)) == changed_pairs(storage, counted(table(1, 2), [1.0, 0.0])) == told
    assert "in another order" in changed_pairs(storage, counted(table(1, 2), [0.0, 1.0]))  # nothing that the record tells


def test_the_refusal_has_the_words_and_no_digest(run):
    with pytest.raises(ConfigError) as caught:
        finished_summary(run, {TRAINING_PAIRS: "b" * 32, "train.lr": 2}, table(1, 2, 9, 4))
    assert "(data.train: 1 of 4 pairs is another one (first: a:3); train.lr: 1 -> 2)" in str(caught.value)
    assert finished_summary(run, {TRAINING_PAIRS: "a" * 32, "train.lr": 1}, table(1, 2, 3, 4)) is None


def test_a_run_of_an_earlier_version_speaks_of_data(run, tmp_path):
    (tmp_path / "run" / "training-pairs.parquet").unlink()
    with pytest.raises(ConfigError, match=r"data\.train: the pairs are not those that it was trained on") as caught:
        finished_summary(run, {TRAINING_PAIRS: "b" * 32, "train.lr": 1}, table(1))
    assert "bbb" not in str(caught.value)


def test_the_record_is_small():
    pairs = table(*range(2000))
    assert len(pairs_record(pairs)) < 16 * 2000
