import numpy as np
import pytest

from raydpo.data.shapes import POSITIONS_ONLY, PositionCost, Shapes
from raydpo.data.simulate import amounts, deal, simulate, steps_of, training_order

WORK = PositionCost(attention=3e-4, head=0.27)


def lengths(prompt, *completions):
    return Shapes.of_lengths(*(np.array(one) for one in (prompt, *completions)))


def hh_like(count, seed=0, system=0):
    """Log-normal lengths like HH-RLHF's (means 150 and 47 tokens), cut at 512. All prompts begin with ``system`` tokens, and
    the three after every fourth prompt continue it, as in dialogues."""
    rng = np.random.default_rng(seed)
    root = rng.integers(0, 999, system).astype(np.int32)
    prompts, completions = [], []
    for index in range(count):
        fresh = rng.integers(0, 999, min(300, 5 + int(rng.lognormal(4.4, 0.8)))).astype(np.int32)
        head = prompts[-1] if system and index % 4 else root
        prompts.append(np.concatenate([head, fresh])[:400])
        completions.append([min(112, 1 + int(rng.lognormal(3.4, 0.8))) for _ in range(2)])
    return Shapes.of(prompts, completions)


def run(shapes, world_size, pairs_per_step=256, tokens_per_batch=16384, layout="tree", work=WORK, steps=4):
    order = training_order(np.zeros(len(shapes), int), np.ones(1), seed=0, shuffle=True, count=len(shapes))
    return simulate(
        order,
        shapes,
        world_size=world_size,
        pairs_per_step=pairs_per_step,
        tokens_per_batch=tokens_per_batch,
        layout=layout,
        work=work,
        steps=steps,
    )


@pytest.mark.parametrize("system", [0, 30])
@pytest.mark.parametrize("world_size", [2, 8, 32, 64])
def test_imbalance_is_below_three_percent(world_size, system):
    """The worst step of 256 pairs on up to 64 ranks, with prompts that share nothing and prompts that share much."""
    found = run(hh_like(1024, system=system), world_size)
    assert found.worst < min(0.03, found.naive)
    assert found.bound <= found.imbalance <= found.lockstep
    assert found.naive_time > 1.5


def test_ranks_that_meet_after_every_micro_batch_wait_little():
    """With four or more micro-batches per rank: the same number on every rank, of even sizes, in the order of their size."""
    found = run(hh_like(1024, system=30), 4, tokens_per_batch=2048)
    assert found.lockstep < 0.1


def test_a_step_by_hand():
    """Pairs of 6, 3 and 3 positions on two ranks: 6 against 3 + 3."""
    shapes = lengths([4, 1, 1], [1, 1, 1], [1, 1, 1])
    found = simulate(
        np.arange(3), shapes, world_size=2, pairs_per_step=3, tokens_per_batch=100, layout="tree", work=POSITIONS_ONLY
    )
    assert (found.imbalance, found.worst, found.bound, found.lockstep, found.repeated) == (0, 0, 0, 0, 0)
    # Dealt: pairs 0 and 2 in four rows of 16, pair 1 in two rows of 16; 64 against 32 positions, and 64 against our 6.
    assert found.naive == pytest.approx(1 - 48 / 64)
    assert found.naive_time == pytest.approx(64 / 6)
    assert found.steps == 1


def test_stand_ins_and_the_longest_pair_are_lost_time():
    """Pairs of 10 and 3 positions on four ranks: 13 of 4 x 10 positions are useful under any plan."""
    shapes = lengths([8, 1], [1, 1], [1, 1])
    found = simulate(
        np.arange(2), shapes, world_size=4, pairs_per_step=2, tokens_per_batch=100, layout="tree", work=POSITIONS_ONLY
    )
    assert found.imbalance == found.bound == pytest.approx(1 - 13 / 40)


def test_a_prefix_on_two_ranks_is_repeated_work():
    """Two pairs of 10 prompt tokens, all shared, and 2 completion tokens: 14 positions on one rank, 12 on each of two."""
    shapes = Shapes.of([np.arange(10)] * 2, [[1, 1]] * 2)
    found = simulate(
        np.arange(2), shapes, world_size=2, pairs_per_step=2, tokens_per_batch=100, layout="tree", work=POSITIONS_ONLY
    )
    assert found.repeated == pytest.approx(1 - 14 / 24)


def test_amounts_by_hand():
    """Prompts of 3 and 20 tokens, completions of 2 and 5, and of 1 and 1."""
    shapes = lengths([3, 20], [2, 1], [5, 1])
    assert amounts([[0]], shapes, "tree").tolist() == [3 + 7, 9 / 2 + 3 * 7 + 29 / 2, 7]
    assert amounts([[0], [1]], shapes, "packed")[0] == (6 + 7) + (40 + 2)
    # The longest row is 21 tokens, hence all four are 32.
    assert amounts([[0, 1]], shapes, "padded")[0] == 4 * 32
    assert amounts([[0], [1]], shapes, "padded")[0] == 2 * 16 + 2 * 32


def test_amounts_count_what_a_tree_shares_once():
    shapes = Shapes.of([np.arange(10)] * 2, [[1, 1]] * 2)
    positions, looks, tokens = amounts([[0, 1]], shapes, "tree")
    assert (positions, tokens) == (14, 4)
    assert looks == 10 * 10 / 2 + 4 * 10 + 4 / 2  # the prompt at itself, completions at the prompt and at themselves


def test_order_walks_through_epochs():
    sources, weights = np.array([0] * 4 + [1] * 2), np.array([1.0, 0.5])
    order = training_order(sources, weights, seed=0, shuffle=True, count=10)
    assert len(order) == 10 and sorted(order[:5][order[:5] < 4]) == [0, 1, 2, 3]
    assert sorted(order[order > 3].tolist()) == [4, 5]


def test_steps_are_spread_evenly():
    steps = steps_of(np.arange(100), 10, 3)
    assert [step[0] for step in steps] == [0, 40, 90]
    assert steps_of(np.arange(5), 10, 3) == [[0, 1, 2, 3, 4]]


def test_dealing():
    assert deal(list(range(18)), 2)[0] == [[0, 2, 4, 6, 8, 10, 12, 14], [16]]
    assert deal([1], 2) == [[[1]], []]
