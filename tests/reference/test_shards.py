"""Prompts with more completions than a shard or a batch holds."""

import numpy as np
import pyarrow as pa
import pytest
from families import planned_by_families
from kernel import tiny_pairs

from raydpo.data.pairs import PAIR_SCHEMA
from raydpo.model.layout import PromptGroup
from raydpo.reference.identity import identify
from raydpo.reference.score import ReferenceSpec, Scorer
from raydpo.reference.shards import Completion, Plan, Wanted, plan_shards, prompt_groups, read_groups


def completions(prompt, count, tokens, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 250, prompt).astype(np.int32)
    return [Completion(rng.bytes(16), ids, rng.integers(3, 250, tokens).astype(np.int32)) for _ in range(count)]


def table_of(*groups):
    """Pairs whose distinct completions are those of ``groups``, each of one prompt."""
    pairs = [
        (group[2 * row], group[min(2 * row + 1, len(group) - 1)]) for group in groups for row in range(-(-len(group) // 2))
    ]
    columns = {"prompt_ids": [chosen.prompt.tolist() for chosen, _ in pairs]}
    for side, ones in zip(("chosen", "rejected"), zip(*pairs, strict=True), strict=True):
        columns |= {f"{side}_ids": [one.tokens.tolist() for one in ones], f"{side}_key": [one.key for one in ones]}
    schema = pa.schema([PAIR_SCHEMA.field(name) for name in columns])
    return pa.table(columns, schema=schema)


def keys_of(shards):
    return [shard.keys.tobytes() for shard in shards]


def test_a_prompt_with_two_thousand_completions_is_cut_into_shards():
    many, few = completions(50, 2000, 100), completions(60, 3, 200, seed=3)
    wanted = Wanted([table_of(few, many)])
    shards = list(plan_shards(wanted, 65_536))
    groups = [group for shard in shards for group in read_groups(shard, wanted.source)]
    assert all(len(group[0].prompt) + sum(len(one.tokens) for one in group) <= 65_536 for group in groups)
    assert sorted(one.key for group in groups for one in group) == sorted(one.key for one in [*many, *few])
    assert [len(shard) for shard in shards] == [3 + 654, 654, 654, 38], "of the small group nothing is cut"
    assert all(shard.tokens == 150 * len(shard) for shard in shards[1:])
    # What is there already changes no shard: the rest of each is scored as it would have been.
    covered = np.arange(len(wanted)) % 3 == 0
    left = Plan(wanted, 65_536).missing(covered)
    present = {one.key for one, there in zip(wanted, covered, strict=True) if there}
    assert keys_of(left) == [
        b"".join(key.tobytes() for key in shard.keys if key.tobytes() not in present) for shard in shards
    ]


def test_what_shares_a_prompt_is_not_cut_finer_than_parts_are():
    """The shards of a small job are small, but a long prompt is still computed once."""
    wanted = Wanted([table_of(completions(1000, 40, 50))])
    (shard,) = plan_shards(wanted, 2048, 65_536)
    (group,) = read_groups(shard, wanted.source)
    assert len(group) == 40 and [one.key for one in group] == sorted(one.key for one in group)


@pytest.mark.parametrize("layout", ["tree", "packed", "padded"])
def test_no_batch_is_larger_than_the_budget(tiny_llama, layout, monkeypatch):
    """Except for a single completion, here the longest one."""
    spec = ReferenceSpec(path=str(tiny_llama), adapter=None, identity=identify(tiny_llama, "float32"), layout=layout)
    groups = [
        PromptGroup(one[0].prompt, tuple(each.tokens for each in one))
        for one in (
            completions(50, 40, 20),
            completions(30, 2, 40, seed=1),
            completions(20, 1, 500, seed=2),
            completions(50, 7, 90, seed=3),
        )
    ]
    whole = Scorer(spec, device="cpu", tokens_per_batch=1 << 16).score(groups)
    scorer = Scorer(spec, device="cpu", tokens_per_batch=300)
    sizes, real = [], scorer.model.lay_out

    def lay_out(groups):
        laid_out = real(groups)
        sizes.append((laid_out.input_ids.numel(), len(laid_out.lengths)))
        return laid_out

    monkeypatch.setattr(scorer.model, "lay_out", lay_out)
    pieces = scorer.score(groups)
    assert len(sizes) > 4 and all(size <= 300 or rows == 1 for size, rows in sizes)
    assert [len(group) for group in pieces] == [40, 2, 1, 7]
    for one, other in zip(whole, pieces, strict=True):
        assert all(np.abs(left - right).max() < 1e-5 for left, right in zip(one, other, strict=True))


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_other_shards_give_the_same_log_probs(tiny_llama, layout):
    """As shards do that are cut by whole prompts."""
    spec = ReferenceSpec(path=str(tiny_llama), adapter=None, identity=identify(tiny_llama, "float32"), layout=layout)
    scorer, wanted = Scorer(spec, device="cpu", tokens_per_batch=300), Wanted([tiny_pairs(30)])

    def scored(planned):
        return {
            one.key: logps
            for groups in planned
            for group, each in zip(groups, scorer.score(prompt_groups(groups)), strict=True)
            for one, logps in zip(group, each, strict=True)
        }

    mine = scored(read_groups(shard, wanted.source) for shard in plan_shards(wanted, 700))
    theirs = scored(planned_by_families(list(wanted), 700))
    assert len(mine) == 60 and mine.keys() == theirs.keys()
    assert max(np.abs(mine[key] - theirs[key]).max() for key in mine) < 1e-5


def test_a_batch_that_does_not_fit_is_cut_where_its_prompt_has_many_completions(tiny_llama, monkeypatch):
    spec = ReferenceSpec(path=str(tiny_llama), adapter=None, identity=identify(tiny_llama, "float32"))
    groups = [
        PromptGroup(one[0].prompt, tuple(each.tokens for each in one))
        for one in (completions(30, 2, 40, seed=1), completions(50, 40, 20))
    ]
    scorer = Scorer(spec, device="cpu", tokens_per_batch=1000)
    whole, real = scorer.score(groups), scorer.model.score_layout

    def score_layout(layout, groups):
        if layout.input_ids.numel() > 500:
            raise MemoryError
        return real(layout, groups)

    monkeypatch.setattr(scorer.model, "score_layout", score_layout)
    again = scorer.score(groups)
    assert "out of memory with 1000 positions" in scorer.notes[-1] and [len(group) for group in again] == [2, 40]
    for one, other in zip(whole, again, strict=True):
        assert all(np.abs(left - right).max() < 1e-5 for left, right in zip(one, other, strict=True))
    assert scorer.score([]) == []
