import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydpo.data.balance import joint_cost, shares
from raydpo.data.plan import BatchPlan, MicroBatch, _exactly, _fill, epoch_order, fill_batches, split_over_ranks
from raydpo.data.shapes import POSITIONS_ONLY, PositionCost, Shapes, cut_group
from raydpo.model.layout import Method, PromptGroup, lay_out, shapes_of

LAYOUTS = ["tree", "packed", "padded"]


def lengths(count, seed=0):
    """Pairs that share no prompt."""
    rng = np.random.default_rng(seed)
    return Shapes.of_lengths(*(rng.integers(1, high, count) for high in (200, 100, 100)))


def dialogues(count, seed=0):
    """Token ids of pairs in random order, many of whose prompts continue another prompt."""
    rng = np.random.default_rng(seed)
    groups, prompt = [], np.zeros(0, np.int32)
    for index in range(count):
        if index % 4 == 0:
            prompt = rng.integers(0, 9, 5)
        prompt = np.concatenate([prompt, rng.integers(0, 9, rng.integers(10, 60))]).astype(np.int32)
        groups.append(PromptGroup(prompt, tuple(rng.integers(0, 9, rng.integers(1, 40)).astype(np.int32) for _ in range(2))))
    return [groups[index] for index in rng.permutation(count)]


def shapes_by_row(groups):
    """Gives the shapes of some of the groups."""
    return lambda rows: shapes_of([groups[row] for row in rows])


def plan(count=37, world_size=1, weights=(1.0,), sources=None, **settings):
    sources = np.zeros(count, dtype=int) if sources is None else sources
    every = lengths(count)

    def of(rows):
        own = (every.prompt, every.tokens, every.squares, every.longest, every.rows)
        return Shapes(*(each[rows] for each in own), np.arange(len(rows)), np.zeros(len(rows), np.int64))

    return BatchPlan(
        of,
        sources,
        np.array(weights),
        world_size=world_size,
        **{"seed": 0, "pairs_per_step": 8, "tokens_per_batch": 1000, "shuffle": True, "epochs": 2, "steps": None} | settings,
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 64])
def test_pairs_of_a_step_do_not_depend_on_world_size(world_size):
    alone, many = plan(), plan(world_size=world_size)
    for step in range(alone.total_steps):
        wanted = sorted(alone.pairs(step))
        given = [
            pair
            for rank in range(world_size)
            for batch in many.micro_batches(step, rank)
            if batch.counts
            for pair in batch.pairs
        ]
        assert sorted(given) == wanted
        assert len({len(many.micro_batches(step, rank)) for rank in range(world_size)}) == 1


def test_an_epoch_that_does_not_divide_ends_with_a_smaller_step():
    steps = [plan().pairs(step) for step in range(5)]
    assert [len(step) for step in steps] == [8, 8, 8, 8, 5]
    assert sorted(np.concatenate(steps)) == list(range(37))


def test_order_differs_by_epoch_and_seed_and_is_pinned():
    order = [
        epoch_order(np.zeros(8, int), np.ones(1), seed=seed, epoch=epoch, shuffle=True).tolist()
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert len({tuple(one) for one in order}) == 3
    # Pinned: a resumed run must have the same order with all versions of all libraries.
    assert order[0] == [0, 5, 7, 2, 3, 1, 4, 6]


def test_file_order_without_shuffle():
    assert plan(shuffle=False).pairs(0).tolist() == list(range(8))
    assert plan(shuffle=False).pairs(5).tolist() == list(range(8))  # the second epoch


def test_weights_take_shares_and_walk_through_the_source():
    sources = np.array([0] * 10 + [1] * 4)
    first, second = (epoch_order(sources, np.array([0.5, 2.0]), seed=3, epoch=epoch, shuffle=True) for epoch in (0, 1))
    assert sorted(np.concatenate([first[first < 10], second[second < 10]])) == list(range(10))
    assert sorted(first[first >= 10]) == [10, 10, 11, 11, 12, 12, 13, 13]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_and_cost_of_a_pair_by_hand(layout):
    """A prompt of 3 tokens, completions of 2 and 5."""
    shapes = Shapes.of_lengths(np.array([3]), np.array([2]), np.array([5]))
    positions = {"tree": 3 + 2 + 5, "packed": 2 * 3 + 2 + 5, "padded": 2 * 16}[layout]
    # A prompt looks at itself (9 / 2, once in a tree and else twice), completions at the prompt (3 * 7) and themselves.
    looks = {"tree": 4.5, "packed": 9, "padded": 9}[layout] + 3 * 7 + (4 + 25) / 2
    assert shapes.positions(layout).tolist() == [positions]
    assert shapes.cost(layout, POSITIONS_ONLY).tolist() == [positions]
    assert shapes.cost(layout, PositionCost(attention=0.5, head=10)).tolist() == [positions + 0.5 * looks + 10 * 7]


def test_shared_prompt_tokens():
    prompts = [np.array(prompt) for prompt in ([1, 2, 300], [7], [1, 2], [1, 2, 300, 4])]
    shapes = Shapes.of(prompts, [[1]] * 4)
    order = sorted(range(4), key=lambda index: shapes.place[index])
    assert order == [2, 0, 3, 1]
    assert shapes.shared(2, 0) == 2 and shapes.shared(0, 3) == 3 and shapes.shared(2, 3) == 2 and shapes.shared(3, 1) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_micro_batches_keep_the_budget_as_laid_out(layout, monkeypatch):
    """Budget and plan agree with what the layout computes."""
    monkeypatch.setattr("raydpo.model.layout.MIN_SAVED", 1)
    method = Method(layout, None if layout == "padded" else "sdpa")
    groups = dialogues(60)
    shapes = shapes_of(groups)
    batches = fill_batches(range(60), shapes, 1000, layout)
    assert sorted(item for batch in batches for item in batch) == list(range(60))
    for batch in batches:
        assert lay_out([groups[item] for item in batch], method).input_ids.numel() <= 1000


def test_a_tree_is_filled_with_neighbours():
    groups = dialogues(200)
    shapes = shapes_of(groups)

    def positions(batches):
        return sum(lay_out([groups[item] for item in batch], Method("tree", "sdpa")).input_ids.numel() for batch in batches)

    batches = fill_batches(range(200), shapes, 1000, "tree")
    size = -(-200 // len(batches))
    unsorted = [list(range(start, min(start + size, 200))) for start in range(0, 200, size)]
    assert positions(batches) < 0.8 * positions(unsorted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_item_larger_than_the_budget_is_a_batch_of_its_own(layout):
    shapes = Shapes.of_lengths(np.array([500, 10, 10]), np.array([1, 1, 1]))
    assert sorted(fill_batches([0, 1, 2], shapes, 100, layout)) == [[0], [1, 2]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_group_is_cut_into_runs_within_the_budget(layout):
    rng = np.random.default_rng(0)
    for _ in range(50):
        prompt, lengths = int(rng.integers(1, 60)), rng.integers(1, 80, rng.integers(1, 12)).tolist()
        runs = cut_group(prompt, lengths, 300, layout)
        assert [index for start, stop in runs for index in range(start, stop)] == list(range(len(lengths)))

        def size(start, stop, prompt=prompt, lengths=lengths):
            group = PromptGroup(np.arange(prompt), tuple(np.arange(length) for length in lengths[start:stop]))
            return int(shapes_of([group]).positions(layout)[0])

        assert all(size(start, stop) <= 300 or stop == start + 1 for start, stop in runs)
        assert all(size(start, stop + 1) > 300 for start, stop in runs[:-1]), "no run is shorter than it must be"


def test_ranks_without_pairs_get_a_stand_in_that_does_not_count():
    shapes = Shapes.of_lengths(np.full(2, 50), np.full(2, 5), np.full(2, 5))
    ranks = split_over_ranks([4, 7], lambda rows: shapes, world_size=4, tokens_per_batch=1000, layout="tree")
    assert [len(rank) for rank in ranks] == [1, 1, 1, 1]
    assert sorted(rank[0].counts for rank in ranks) == [False, False, True, True]


def planned_over_all(pairs, shapes, *, world_size, tokens_per_batch, layout, work):
    """The plan of a step from the shapes of all pairs of the data, by row number."""
    alone = shapes.positions(layout)
    dealt = shares(list(pairs), shapes, world_size, layout, work)
    ranks = [_fill(share, shapes, tokens_per_batch, layout, alone) for share in dealt]
    wanted = max(1, max(len(batches) for batches in ranks))
    even = [_fill(share, shapes, tokens_per_batch, layout, alone, wanted) for share in dealt]
    ranks = [again if len(again) <= wanted else batches for again, batches in zip(even, ranks, strict=True)]

    def largest_first(batches):
        return sorted(_exactly(batches, wanted, pairs[0]), key=lambda one: -one.counts * alone[list(one.pairs)].sum())

    return [largest_first(batches) for batches in ranks]


def assert_the_same_plan(groups, pairs, budgets=(100, 700), worlds=(1, 2, 8)):
    """Returns one of the plans."""
    everything = shapes_of(groups)
    for world_size in worlds:
        for tokens_per_batch in budgets:
            for layout in LAYOUTS:
                for work in (POSITIONS_ONLY, PositionCost(attention=0.01, head=1.0)):
                    given = dict(world_size=world_size, tokens_per_batch=tokens_per_batch, layout=layout, work=work)
                    found = split_over_ranks(pairs, shapes_by_row(groups), **given)
                    assert found == planned_over_all(pairs, everything, **given)
    return found


def test_a_step_is_planned_by_its_own_pairs_as_by_all():
    groups = dialogues(500)
    for seed in range(3):
        pairs = np.random.default_rng(seed).permutation(500)[:64].tolist()
        assert_the_same_plan(groups, [*pairs, *pairs[:seed]])
    found = assert_the_same_plan(groups, list(range(120)), budgets=(400,), worlds=(3,))
    assert isinstance(found[0][0], MicroBatch) and all(type(pair) is int for pair in found[0][0].pairs)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.integers(1, 9), st.integers(1, 9)),
        min_size=1,
        max_size=30,
    ),
    st.data(),
)
def test_any_step_is_planned_by_its_own_pairs_as_by_all(made, data):
    """Prompts of few tokens of three kinds, many of which are equal or continue each other."""
    groups = [PromptGroup(np.array(ids, np.int32), (np.zeros(one), np.zeros(two))) for ids, one, two in made]
    pairs = data.draw(st.lists(st.integers(0, len(groups) - 1), min_size=1, max_size=20))
    assert_the_same_plan(groups, pairs, budgets=(20,))


def rank_costs(shapes, world_size, layout, work=POSITIONS_ONLY):
    """Work of each rank in a step of all pairs, token positions [ranks]: what the plan evens out."""
    alone = shapes.cost(layout, work)
    return np.array(
        [
            joint_cost(share, shapes, alone, layout, work)
            for share in shares(list(range(256)), shapes, world_size, layout, work)
        ]
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("work", [POSITIONS_ONLY, PositionCost(attention=0.01, head=1.0)])
def test_work_is_even(layout, work):
    for shapes in (lengths(256, seed=1), shapes_of(dialogues(256))):
        costs = rank_costs(shapes, 8, layout, work)
        assert costs.max() / costs.mean() < 1.01


def test_neighbours_stay_on_one_rank_as_far_as_balance_allows():
    shapes = shapes_of(dialogues(256))
    together = rank_costs(shapes, 4, "tree").sum()
    alone = rank_costs(shapes, 1, "tree").sum()
    assert together < 1.1 * alone < 0.8 * shapes.positions("tree").sum()


def test_shapes_of_some_groups_are_those_that_are_made_of_them_alone():
    random = np.random.default_rng(0)
    prompts = [
        random.integers(0, 2, random.integers(1, 8)).astype(np.int32) for _ in range(60)
    ]  # many share, some are equal
    completions = random.integers(1, 9, (60, 2)).tolist()
    whole = Shapes.of(prompts, completions)
    for count in (1, 2, 20, 60):
        rows = np.sort(random.choice(60, count, replace=False))
        alone = Shapes.of([prompts[row] for row in rows], [completions[row] for row in rows])
        for name, values in vars(whole.take(rows)).items():
            assert np.array_equal(values, getattr(alone, name)), name
