"""Completions without another to compare them with: scored once, never missing on the other side, never computed there."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from kernel import tiny_pairs, unpaired
from rows import ONE
from tiny import make_model, make_tokenizer

from raydpo.config import DataConfig
from raydpo.data.index import as_bytes
from raydpo.data.plan import BatchPlan
from raydpo.data.ragged import tokens_in_use
from raydpo.data.shapes import Shapes
from raydpo.errors import CacheMissError
from raydpo.model.layout import Method, PromptGroup, lay_out, shapes_of
from raydpo.model.load import load_causal_lm
from raydpo.model.logps import LogpModel
from raydpo.model.selfcheck import logps_by_definition
from raydpo.reference.exchange import export_pairs, import_sums
from raydpo.reference.join import join
from raydpo.reference.pairs import SIDES, join_reference, place_reference
from raydpo.reference.shards import Wanted, plan_shards, read_groups
from raydpo.reference.store import ReferenceCache
from raydpo.training.pairs import TrainingPairs


@pytest.fixture
def cache(tmp_path):
    return ReferenceCache.open(str(tmp_path), ONE)


def keys_of(wanted):
    return sorted(one.key for one in wanted)


def test_wanted_are_the_completions_of_the_pairs_and_no_others():
    pairs = tiny_pairs(7)
    alone = unpaired(pairs)
    assert keys_of(Wanted([alone])) == keys_of(Wanted([pairs]))
    assert all(len(one.tokens) for one in Wanted([alone]))
    mixed = Wanted([pairs.slice(0, 3), alone.slice(6).drop_columns(["label"])])
    assert keys_of(mixed) == keys_of(Wanted([pairs]))
    shards = list(plan_shards(Wanted([alone]), 500))
    groups = [group for shard in shards for group in read_groups(shard, Wanted([alone]).source)]
    assert sorted(one.key for group in groups for one in group) == keys_of(Wanted([pairs]))


def fill(cache, wanted):
    logps = [-np.random.default_rng(len(one.tokens)).random(len(one.tokens)).astype(np.float32) for one in wanted]
    cache.commit([one.key for one in wanted], logps, {})


def test_the_missing_side_is_no_miss_and_its_sum_is_0(cache):
    pairs = tiny_pairs(5)
    alone = unpaired(pairs)
    with pytest.raises(CacheMissError, match="missing for 10 of 10 training pairs"):
        join_reference(alone, cache, "training")
    fill(cache, list(Wanted([pairs])))
    expected, found = (join_reference(table, cache, "training") for table in (pairs, alone))
    for row, (good, bad) in zip(expected.to_pylist(), zip(*[iter(found.to_pylist())] * 2, strict=True), strict=True):
        assert good["ref_chosen_logps"] == row["ref_chosen_logps"] and good["ref_chosen_sum"] == row["ref_chosen_sum"]
        assert bad["ref_rejected_logps"] == row["ref_rejected_logps"] and bad["ref_rejected_sum"] == row["ref_rejected_sum"]
        assert (good["ref_rejected_logps"], good["ref_rejected_sum"], bad["ref_chosen_sum"]) == ([], 0.0, 0.0)
    placed, _ = place_reference(alone, cache, "training")
    assert placed["ref_known"].to_pylist() == [1] * 10
    keys, none = as_bytes(alone["rejected_key"])[:1], np.zeros(1, np.int32)
    assert (join(cache, keys, none).sums[0], join(cache, keys, none).known[0]) == (0.0, True)


def test_training_pairs_hold_them(cache):
    alone = unpaired(tiny_pairs(4))
    fill(cache, list(Wanted([alone])))
    pairs = TrainingPairs.of(join_reference(alone, cache, "training").drop_columns(["ref_chosen_sum", "ref_rejected_sum"]))
    assert not len(pairs.sums_only())
    for row in range(8):
        sides = pairs.reference(row)
        assert [len(side) for side in sides] == [pairs.chosen_tokens[row], pairs.rejected_tokens[row]]
        sums = [side.sum(dtype=np.float64) for side in sides]
        assert [pairs.ref_chosen[row], pairs.ref_rejected[row]] == pytest.approx(sums)
    (group,) = pairs.groups([1])
    assert [len(one) for one in group.completions] == [0, pairs.rejected_tokens[1]]
    shapes = pairs.shapes_of(np.arange(8))
    assert shapes.rows.tolist() == [1] * 8
    assert (shapes.positions("packed") == shapes.positions("tree")).all(), "the prompt is there once"
    lengths = pairs.prompt_tokens, pairs.chosen_tokens, pairs.rejected_tokens
    assert (Shapes.of_lengths(*lengths).positions("padded") == shapes.positions("padded")).all()


@pytest.mark.parametrize("layout", [Method("tree", "sdpa"), Method("packed", "sdpa"), Method("padded")], ids=str)
def test_each_layout_computes_what_is_there(layout, tmp_path):
    """Rows, positions and log-probs are those of the completions without the missing ones."""
    model = (
        LogpModel(load_causal_lm(str(make_model(tmp_path / "model")), "float32", rope_length=None))
        .eval()
        .requires_grad_(False)
    )
    model.use(layout)
    pairs = tiny_pairs(3)
    prompts, chosen, rejected = (pairs[f"{part}_ids"].to_pylist() for part in ("prompt", "chosen", "rejected"))
    ids = [[np.array(each, np.int32) for each in part] for part in (prompts, chosen, rejected)]
    none = np.empty(0, np.int32)
    groups = [
        PromptGroup(ids[0][0], (ids[1][0], none)),
        PromptGroup(ids[0][1], (none, ids[2][1])),
        PromptGroup(ids[0][2], (ids[1][2], ids[2][2])),
        PromptGroup(ids[0][2], (none, ids[2][2][:1])),
    ]
    bare = [PromptGroup(group.prompt, tuple(one for one in group.completions if len(one))) for group in groups]
    assert lay_out(groups, layout).input_ids.shape == lay_out(bare, layout).input_ids.shape
    assert (shapes_of(groups).positions(layout.layout) == shapes_of(bare).positions(layout.layout)).all()
    device = torch.device("cpu")
    scored = model.score(groups, device)
    model.use(Method("padded"))  # the model's own attention
    assert [[len(one) for one in group] for group in scored] == [[len(one) for one in group.completions] for group in groups]
    for group, found in zip(groups, scored, strict=True):
        expected = logps_by_definition(model.causal_lm, group, device)
        assert np.abs(np.concatenate(found) - expected).max() < 1e-4


def test_a_plan_of_them_has_each_row_once():
    alone = unpaired(tiny_pairs(20))
    alone = pa.concat_tables([alone.slice(0, 30), tiny_pairs(5).append_column("label", pa.array([0] * 5, pa.int8()))])
    pairs = TrainingPairs.of(alone.drop_columns(["label"]))
    settings = {"seed": 0, "pairs_per_step": 16, "shuffle": True, "epochs": 1, "steps": None, "tokens_per_batch": 200}
    for layout in ("tree", "packed", "padded"):
        plan = BatchPlan(pairs.shapes_of, pairs.sources, pairs.weights, world_size=3, layout=layout, **settings)
        seen = [
            pair
            for step in range(plan.total_steps)
            for rank in range(3)
            for batch in plan.micro_batches(step, rank)
            if batch.counts
            for pair in batch.pairs
        ]
        assert sorted(seen) == list(range(35))


def test_sums_are_exchanged_in_trls_unpaired_form(cache, tmp_path):
    """Export writes one row for each completion, and import reads these sums back for the same completions."""
    alone = unpaired(tiny_pairs(3))
    mixed = pa.concat_tables([alone, tiny_pairs(1, seed=1).append_column("label", pa.array([0], pa.int8()))])
    fill(cache, list(Wanted([mixed])))
    joined = join_reference(mixed, cache, "training")
    decode = make_tokenizer().batch_decode
    assert export_pairs(joined, decode, tmp_path / "out.parquet") == 8
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["label"] for row in rows] == [True, False] * 4
    for row, (number, side) in zip(
        rows, [*((n, s) for n, s in enumerate(SIDES * 3)), (6, "chosen"), (6, "rejected")], strict=True
    ):
        of = joined.slice(number, 1).to_pylist()[0]
        assert row["pair_id"] == of["pair_id"] and row["completion"] == decode([of[f"{side}_ids"]])[0]
        assert (row["ref_logps"], row["ref_token_logps"]) == (of[f"ref_{side}_sum"], of[f"ref_{side}_logps"])
        assert (row["prompt_ids"], row["completion_ids"]) == (of["prompt_ids"], of[f"{side}_ids"])

    records = [{"prompt": "", "completion": "", "label": row["label"], "ref_logps": row["ref_logps"]} for row in rows[:6]]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [*records, {"prompt": "", "ref_logps": -1.0}]))
    pairs = mixed.set_column(0, "pair_id", pa.array([f"sums:{number}" for number in range(1, 8)]))
    other = ReferenceCache.open(str(tmp_path / "other"), ONE, unverified=True)
    report = import_sums(DataConfig(train=str(path)), pairs, other)
    assert (report.pairs, report.rows, report.without, report.columns) == (6, 6, 1, ("ref_logps", "ref_logps"))
    sums = [join(other, as_bytes(pairs[f"{side}_key"]), tokens_in_use(pairs, side)).sums[:6] for side in SIDES]
    assert sums[0] + sums[1] == pytest.approx([row["ref_logps"] for row in rows[:6]])
    assert not np.isnan(sums).any()
