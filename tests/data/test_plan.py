import numpy as np
import pytest

from raydpo.data.plan import BatchPlan, PairLengths, epoch_order, fill_batches, split_over_ranks


def lengths(count, seed=0):
    rng = np.random.default_rng(seed)
    return PairLengths(*(rng.integers(1, high, count) for high in (200, 100, 100)))


def plan(count=37, world_size=1, weights=(1.0,), sources=None, **settings):
    sources = np.zeros(count, dtype=int) if sources is None else sources
    return BatchPlan(lengths(count), sources, np.array(weights), world_size=world_size,
                     **{"seed": 0, "pairs_per_step": 8, "tokens_per_batch": 1000, "shuffle": True, "epochs": 2,
                        "steps": None} | settings)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 64])
def test_pairs_of_a_step_do_not_depend_on_world_size(world_size):
    alone, many = plan(), plan(world_size=world_size)
    for step in range(alone.total_steps):
        wanted = sorted(alone.pairs(step))
        given = [pair for rank in range(world_size) for batch in many.micro_batches(step, rank) if batch.counts
                 for pair in batch.pairs]
        assert sorted(given) == wanted
        assert len({len(many.micro_batches(step, rank)) for rank in range(world_size)}) == 1


def test_an_epoch_that_does_not_divide_ends_with_a_smaller_step():
    steps = [plan().pairs(step) for step in range(5)]
    assert [len(step) for step in steps] == [8, 8, 8, 8, 5]
    assert sorted(np.concatenate(steps)) == list(range(37))


def test_order_differs_by_epoch_and_seed_and_is_pinned():
    order = [epoch_order(np.zeros(8, int), np.ones(1), seed=seed, epoch=epoch, shuffle=True).tolist()
             for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(one) for one in order}) == 3
    # Pinned: a resumed run must find the same order whatever versions it runs on.
    assert order[0] == [0, 5, 7, 2, 3, 1, 4, 6]


def test_file_order_without_shuffle():
    assert plan(shuffle=False).pairs(0).tolist() == list(range(8))
    assert plan(shuffle=False).pairs(5).tolist() == list(range(8))  # the second epoch


def test_weights_take_shares_and_walk_through_the_source():
    sources = np.array([0] * 10 + [1] * 4)
    first, second = (epoch_order(sources, np.array([0.5, 2.0]), seed=3, epoch=epoch, shuffle=True) for epoch in (0, 1))
    assert sorted(np.concatenate([first[first < 10], second[second < 10]])) == list(range(10))
    assert sorted(first[first >= 10]) == [10, 10, 11, 11, 12, 12, 13, 13]


def test_micro_batches_keep_the_budget():
    longest = lengths(37).longest
    for rank in split_over_ranks(range(37), longest, world_size=2, tokens_per_batch=1000):
        for batch in rank:
            assert len(batch.pairs) == 1 or 2 * len(batch.pairs) * max(longest[list(batch.pairs)]) <= 1000


def test_an_item_larger_than_the_budget_is_a_batch_of_its_own():
    assert fill_batches([500, 10, 10], [2, 2, 2], 100) == [[0], [1, 2]]


def test_ranks_without_pairs_get_a_stand_in_that_does_not_count():
    ranks = split_over_ranks([4, 7], np.full(8, 50), world_size=4, tokens_per_batch=1000)
    assert [len(rank) for rank in ranks] == [1, 1, 1, 1]
    assert [rank[0].counts for rank in ranks] == [True, True, False, False]


def test_load_is_even():
    longest = lengths(256, seed=1).longest
    loads = [sum(longest[pair] for batch in rank for pair in batch.pairs)
             for rank in split_over_ranks(range(256), longest, world_size=8, tokens_per_batch=4000)]
    assert max(loads) / min(loads) < 1.02
