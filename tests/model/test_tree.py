import numpy as np
import pytest

from raydpo.model.tree import PrefixTree


def arrays(*sequences):
    return [np.array(sequence, np.int32) for sequence in sequences]


def shape(tree):
    return [(node.depth, node.length) for node in tree.nodes]


def test_a_pair_is_a_prompt_with_two_branches():
    tree = PrefixTree.build(arrays([1, 2, 3, 7, 8], [1, 2, 3, 9]), min_saved=1)
    assert shape(tree) == [(0, 3), (3, 2), (3, 1)]
    assert tree.token_ids.tolist() == [1, 2, 3, 7, 8, 9] and tree.depths.tolist() == [0, 1, 2, 3, 4, 3]
    assert tree.positions(1, 2, 4).tolist() == [2, 5]  # the last prompt token, then the branch


def test_a_system_prompt_ranked_answers_and_a_dialogue_that_goes_on_share_one_tree():
    system = [9] * 10
    first, second = [*system, 1, 1], [*system, 2, 2]
    goes_on = [*first, 3, 4, 5]  # continues one of the answers below
    tree = PrefixTree.build(arrays([*first, 3], [*first, 6], [*first, 7], [*second, 8], goes_on), min_saved=1)
    #   system -> 1 1 -> 3 -> 4 5
    #                 -> 6, -> 7
    #          -> 2 2 8
    assert shape(tree) == [(0, 10), (10, 2), (12, 1), (13, 2), (12, 1), (12, 1), (10, 3)]
    assert tree.nodes[3].path == ((0, 10), (10, 2), (12, 1))
    assert len(tree.token_ids) == 20


def test_identical_sequences_are_computed_once():
    tree = PrefixTree.build(arrays([4, 5, 6], [4, 5, 6]), min_saved=1)
    assert shape(tree) == [(0, 3)] and tree.positions(0, 0, 3).tolist() == tree.positions(1, 0, 3).tolist()


@pytest.mark.parametrize(("min_saved", "nodes"), [(3, [(0, 3), (3, 1), (3, 1)]), (4, [(0, 4), (0, 4)])])
def test_a_short_prefix_is_not_worth_a_node(min_saved, nodes):
    assert shape(PrefixTree.build(arrays([1, 2, 3, 4], [1, 2, 3, 5]), min_saved)) == nodes


def test_a_prefix_that_many_share_is_worth_one_though_it_is_short():
    sequences = arrays(*([1, 2, 10 + last] for last in range(6)))
    assert shape(PrefixTree.build(sequences, min_saved=8)) == [(0, 2), *[(2, 1)] * 6]


def test_without_sharing_it_is_a_plain_pack():
    tree = PrefixTree.build(arrays([1, 2, 3], [1, 2, 4]), min_saved=None)
    assert shape(tree) == [(0, 3), (0, 3)] and tree.token_ids.tolist() == [1, 2, 3, 1, 2, 4]


@pytest.mark.parametrize("min_saved", [None, 1, 2, 8])
def test_every_sequence_can_be_read_back(min_saved):
    rng = np.random.default_rng(0)
    for _ in range(50):
        sequences = arrays(*(rng.integers(0, 2, rng.integers(1, 12)) for _ in range(rng.integers(1, 12))))
        tree = PrefixTree.build(sequences, min_saved)
        for number, sequence in enumerate(sequences):
            positions = tree.positions(number, 0, len(sequence))
            assert tree.token_ids[positions].tolist() == sequence.tolist()
            assert tree.depths[positions].tolist() == list(range(len(sequence)))
        assert sum(node.length for node in tree.nodes) == len(tree.token_ids)
        if min_saved == 1:  # nothing is computed twice
            prefixes = {tuple(sequence[: length + 1]) for sequence in sequences for length in range(len(sequence))}
            assert len(tree.token_ids) == len(prefixes)
