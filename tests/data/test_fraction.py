"""``data.fraction``: smaller fractions of the training prompts are subsets of larger ones, and held-out pairs stay the
same."""

from itertools import pairwise

import pytest
from samples import text

from raydpo.config import DataConfig
from raydpo.data.pairs import load_pairs


@pytest.fixture
def load(tokeniser, write):
    """250 prompts with two pairs each."""
    path = write([text(number // 2, chosen=f" answer {number}") for number in range(500)])
    return lambda **settings: load_pairs(DataConfig(train=path, max_dropped=1, **settings), tokeniser)


def ids(table):
    return set(table["pair_id"].to_pylist())


def prompts(table):
    return [tuple(row) for row in table["prompt_ids"].to_pylist()]


def test_smaller_shares_are_parts_of_larger_ones(load):
    shares = [ids(load(fraction=fraction).train) for fraction in (0.01, 0.1, 0.3, 0.7, 1.0)]
    assert all(small < large for small, large in pairwise(shares))
    assert len(shares[-1]) == 500
    assert len(shares[2]) == pytest.approx(150, abs=45) and len(shares[3]) == pytest.approx(350, abs=45)  # three sigma


def test_a_prompt_keeps_all_its_pairs_or_none(load):
    kept = prompts(load(fraction=0.3).train)
    assert {kept.count(prompt) for prompt in kept} == {2}


def test_held_out_pairs_stay_and_say_nothing_about_what_is_kept(load):
    whole, half = load(eval={"fraction": 0.5}), load(eval={"fraction": 0.5}, fraction=0.5)
    assert half.eval.equals(whole.eval)
    assert ids(half.train) < ids(whole.train)
    assert half.train.num_rows / whole.train.num_rows == pytest.approx(0.5, abs=0.14)


def test_another_seed_is_another_share_and_the_same_one_is_the_same(load):
    first, again, other = (ids(load(fraction=0.3, fraction_seed=seed).train) for seed in (1, 1, 2))
    assert first == again and first != other


def test_one_prompt_stays_and_the_report_tells(load):
    sets = load(fraction=1e-9)
    assert sets.train.num_rows == 2
    assert "data.fraction: 2 of 500 training pairs are used" in sets.report.lines()
    assert sets.report.to_dict()["thinned"] == (2, 500)


def test_new_data_moves_no_prompt(tokeniser, write):
    few, more = ([text(number) for number in range(count)] for count in (100, 200))
    small, large = (
        load_pairs(DataConfig(train=write(records, f"{len(records)}.jsonl"), fraction=0.4), tokeniser).train
        for records in (few, more)
    )
    assert prompts(small) == [prompt for prompt in prompts(large) if prompt in set(prompts(small))]
    assert prompts(large)[: small.num_rows] == prompts(small)
