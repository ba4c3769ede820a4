"""Decisions on light rows: those that a loader of one pair after another takes on the tokens."""

import pickle

import numpy as np
import oracle
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydpo.config import DataConfig
from raydpo.data.facts import digests_of, pair_facts
from raydpo.data.keys import completion_key
from raydpo.data.marks import ANSWER, ASSISTANT, MARK_BITS, MARK_COLUMNS, REASONING, REASONING_NOT_FOUND, TURNS_NOT_FOUND
from raydpo.data.ragged import digests
from raydpo.data.rows import LIGHT_SCHEMA, TOKEN_SCHEMA
from raydpo.data.select import COUNT_COLUMNS, PLACE_SCHEMA, SourceRows, TokenTables, check_source, select, window
from raydpo.data.shapes import common_prefix
from raydpo.data.split import held_out, kept
from raydpo.data.tally import SourceReport
from raydpo.data.tokenise import TokenisedPair
from raydpo.errors import DataError

TEXTS = [bytes([number]) * 16 for number in range(6)]
IDS = st.lists(st.integers(0, 1), min_size=1, max_size=5)
PAIRS = st.tuples(IDS, IDS, IDS, st.sampled_from(TEXTS), st.booleans(), st.integers(0, 3)).filter(
    lambda pair: pair[1] != pair[2]
)


def source_of(pairs, name, blocks):
    """The pairs of a source: prompt, chosen and rejected ids, digest of the prompt, several turns, further pairs of its
    record; in ``blocks`` chunks."""
    rows, record, number = [], 0, 0
    for prompt, chosen, rejected, digest, several, more in pairs:
        record, number = (record, number + 1) if more and record else (record + 1, 0)
        rows.append(
            {
                **{
                    "row": record,
                    "number": number,
                    "file": record % 2,
                    "line": record * 10,
                    "source": number - 1 if more else -1,
                },
                **{"prompt_tokens": len(prompt), "chosen_tokens": len(chosen), "rejected_tokens": len(rejected)},
                "agree": common_prefix(np.array(chosen), np.array(rejected)),
                "highest": max(*prompt, *chosen, *rejected),
                **{"chosen_key": completion_key(prompt, chosen), "rejected_key": completion_key(prompt, rejected)},
                **{"prompt_digest": digest, "question_digest": digest},
                **{
                    f"{part}_hash": int(digests(pa.array([ids], pa.list_(pa.int32())))[0])
                    for part, ids in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected))
                },
                **{"characters": 10, "flags": int(several), "head": bytes(64)},
            }
        )
        rows[-1]["source"] = min(rows[-1]["source"], 1)
    light = pa.Table.from_pylist(rows, schema=LIGHT_SCHEMA)
    tokens = pa.table(
        {
            f"{part}_ids": pa.array([pair[at] for pair in pairs], pa.list_(pa.int32()))
            for at, part in enumerate(("prompt", "chosen", "rejected"))
        },
        schema=TOKEN_SCHEMA,
    )
    size = -(-len(pairs) // blocks)
    cut = [slice(start, start + size) for start in range(0, len(pairs), size)]
    account = SourceReport("", "", records=record, pairs=len(pairs))
    lights = [light.slice(part.start, size) for part in cut]
    chunks = [tokens.slice(part.start, size) for part in cut]
    return SourceRows(pa.concat_tables(lights), chunks, ["x", "y"], ["one", "two"], account, name, f"{name}.jsonl", 0.5)


def expected(config, sources, held):
    """What the other loader's functions make of the same pairs."""
    seen: set[bytes] = set()
    found, counts = [], []
    for number, (pairs, name) in enumerate(sources + ([] if held is None else [held])):
        seen = set() if held is not None and number == len(sources) else seen
        rows = source_of(pairs, name, 1).light.to_pylist()
        dropped: dict[str, list[str]] = {}
        duplicates = truncated = several = left = 0
        for place, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
            full = TokenisedPair(*(np.array(ids, np.int32) for ids in pair[:3]))
            used = oracle._truncated(full, config.max_length, config.truncation)
            if isinstance(used, str):
                dropped.setdefault(used, []).append(f"{'xy'[row['file']]}:{row['line']}")
                continue
            both = row["chosen_key"] + row["rejected_key"]
            duplicates, several, left = duplicates + (both in seen), several + row["flags"], left + 1
            seen.add(both)
            truncated += sum(len(short) < len(whole) for short, whole in zip(used, full, strict=True))
            found.append(
                {
                    "pair_id": f"{name}:{row['row']}" + (f"#{row['number']}" if row["number"] else ""),
                    "source": name if row["source"] < 0 else ("one", "two")[row["source"]],
                    "weight": 0.5,
                    **{
                        f"{part}_ids": ids.tolist() for part, ids in zip(("prompt", "chosen", "rejected"), used, strict=True)
                    },
                    **{
                        f"{side}_{what}": row[f"{side}_{was}"]
                        for side in ("chosen", "rejected")
                        for what, was in (("key", "key"), ("full", "tokens"))
                    },
                    **{"set": number, "place": place, "digest": row["prompt_digest"]},
                }
            )
        places = {reason: (len(each), list(dict.fromkeys(each))[:3]) for reason, each in dropped.items()}
        counts.append((left, truncated, duplicates, several, places))
    measured = [row["set"] == len(sources) for row in found]
    if held is None and config.eval is not None:
        measured = oracle.held_out([row["digest"] for row in found], config.eval.fraction).tolist()
    train = [row for row, out in zip(found, measured, strict=True) if not out]
    evaluated = [row for row, out in zip(found, measured, strict=True) if out]
    leaked = sum(row["digest"] in {other["digest"] for other in train} for row in evaluated)
    stay = oracle.kept([row["digest"] for row in train], config.fraction, config.fraction_seed)
    train = [row for row, stays in zip(train, stay, strict=True) if stays or config.fraction == 1]
    return train, evaluated, leaked, counts


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(PAIRS, min_size=1, max_size=12), min_size=1, max_size=3),
    st.none() | st.lists(PAIRS, min_size=1, max_size=6),
    st.integers(3, 11),
    st.sampled_from(["keep_start", "drop"]),
    st.sampled_from([None, 0.001, 0.3, 0.7]),
    st.sampled_from([1.0, 0.4, 0.01]),
    st.integers(1, 4),
)
def test_decisions_are_those_of_the_other_loader(sources, held, max_length, truncation, fraction, share, blocks):
    named = [(pairs, f"s{number}") for number, pairs in enumerate(sources)]
    evaluation = {"path": "held.jsonl"} if held else {"fraction": fraction} if fraction else None
    settings = {
        "max_length": max_length,
        "truncation": truncation,
        "fraction": share,
        "fraction_seed": 7,
        "max_dropped": 1.0,
    }
    config = DataConfig(train=[f"{name}.jsonl" for _, name in named], eval=evaluation, **settings)
    rows = [source_of(pairs, name, blocks) for pairs, name in named]
    out = (held, "held-out") if held else None
    held_rows = source_of(*out, blocks) if out else None
    source = TokenTables([each.tokens for each in [*rows, *([held_rows] if held_rows else [])]])
    try:
        sets = select(config, rows, held_rows, source)
    except DataError as error:
        told = str(error)
        one_prompt = "cannot split" in told
        assert one_prompt or "gives a usable pair" in told
        if not one_prompt:
            with pytest.raises(DataError) as first:
                for each in [*rows, *([held_rows] if held_rows else [])]:
                    check_source(config, each)
            assert str(first.value) == told
            return
        with pytest.raises(DataError) as other:
            expected(config, named, out)
        assert str(other.value) == told
        return
    train, evaluated, leaked, counts = expected(config, named, out)
    for table, wanted in ((sets.train, train), (sets.eval, evaluated if evaluation else None)):
        if wanted is None:
            assert table is None
            continue
        names = [name for name in table.column_names if name not in PLACE_SCHEMA.names[2:]]
        assert table.select(names).to_pylist() == [{name: row[name] for name in names} for row in wanted]
        table.validate(full=True)
        plain = table.drop_columns([*PLACE_SCHEMA.names[2:5]])
        for part in ("prompt", "chosen", "rejected"):
            assert digests_of(table, part).tolist() == digests_of(plain, part).tolist()
        assert pair_facts(table).equals(pair_facts(plain))
        for (number, place), ids in zip(
            zip(table["set"].to_pylist(), table["place"].to_pylist(), strict=True),
            pickle.loads(pickle.dumps(sets.tokens)).rows(table["set"].to_numpy(), table["place"].to_numpy()),
            strict=True,
        ):
            pairs = [*sources, held][number]
            assert [each.tolist() for each in ids] == list(pairs[place][:3])
    assert sets.report.leaked == leaked
    assert sets.report.thinned is None or sets.report.thinned[0] == len(train)
    for report, (left, truncated, duplicates, several, dropped) in zip(sets.report.sources, counts, strict=True):
        assert (report.kept, report.truncated, report.duplicates, report.several_turns) == (
            left,
            truncated,
            duplicates,
            several,
        )
        assert {
            reason: (report.dropped.counts[reason], report.dropped.places[reason]) for reason in report.dropped.counts
        } == dropped
        assert list(report.dropped.counts) == list(dropped)
    assert all(each.account.kept == 0 and not each.account.dropped.total for each in rows)  # not changed


def test_without_tokens_there_are_lengths_in_use():
    pairs = [([1], [1, 2, 3, 4], [1, 3], TEXTS[0], False, 0), ([1, 2], [5], [6, 7], TEXTS[1], False, 0)]
    source = source_of(pairs, "s", 2)
    light = SourceRows(**vars(source) | {"tokens": None})
    sets = select(DataConfig(train="s.jsonl", max_length=4), [light], None, None)
    assert sets.train.select(["prompt_tokens", "chosen_tokens", "rejected_tokens"]).to_pydict() == {
        "prompt_tokens": [1, 2],
        "chosen_tokens": [3, 1],
        "rejected_tokens": [2, 2],
    }
    assert "prompt_ids" not in sets.train.column_names and sets.sources == (light,)


def test_tokens_are_views_and_whole_columns_are_not_copied():
    pairs = [([1, number], [2, number], [3], TEXTS[0], False, 0) for number in range(1000)]
    source = source_of(pairs, "s", 4)
    before = pa.total_allocated_bytes()
    sets = select(DataConfig(train="s.jsonl"), [source], None, None)
    assert (
        sets.train["chosen_ids"].chunk(1).values.buffers()[1].address
        == source.tokens[1]["chosen_ids"].chunk(0).values.buffers()[1].address
    )
    assert sets.train["chosen_key"].chunk(0).buffers()[1].address == source.light["chosen_key"].chunk(0).buffers()[1].address
    assert pa.total_allocated_bytes() - before < 60_000


def test_keys_that_agree_in_their_digest_are_told_apart():
    """Pairs whose keys differ only in the halves that the digest leaves out."""
    light = source_of([([1], [2], [3], TEXTS[0], False, 0)] * 6, "s", 1).light
    keys = [bytes(8) + bytes([number]) * 8 for number in (1, 2, 1, 2, 3, 1)]
    column = light.column_names.index("chosen_key")
    light = light.set_column(column, "chosen_key", pa.array(keys, pa.binary(16)))
    source = SourceRows(**vars(source_of([([1], [2], [3], TEXTS[0], False, 0)] * 6, "s", 1)) | {"light": light})
    assert select(DataConfig(train="s.jsonl"), [source], None, None).report.sources[0].duplicates == 3


@given(
    st.lists(st.binary(min_size=16, max_size=16), min_size=2, max_size=9),
    st.floats(1e-12, 1, exclude_max=True),
    st.integers(0, 9),
)
def test_places_are_rounded_as_those_of_the_other_loader(digests, fraction, seed):
    edges = [b"\xff" * 16, bytes(16), b"\x80" + bytes(15), b"\x7f" + b"\xff" * 15, b"\xff" * 6 + b"\xfc\x00" + bytes(8)]
    for each in (digests, digests + edges):
        rows = np.frombuffer(b"".join(each), np.uint8).reshape(-1, 16)
        if len(set(each)) > 1:
            assert held_out(rows, fraction).tolist() == oracle.held_out(each, fraction).tolist()
        assert kept(rows, fraction, seed).tolist() == oracle.kept(each, fraction, seed).tolist()
        places = {int.from_bytes(one[:8], "big") / 2**64 for one in each}
        for place in places - {0.0, 1.0} if len(set(each)) > 1 else ():
            assert held_out(rows, place).tolist() == oracle.held_out(each, place).tolist()


def test_pairs_without_tokens_that_are_not_too_long_are_no_data():
    source = source_of([([1], [2], [3], TEXTS[0], False, 0)], "s", 1)
    column = source.light.column_names.index("prompt_tokens")
    light = source.light.set_column(column, "prompt_tokens", pa.array([0], pa.int32()))
    with pytest.raises(ValueError, match=r"1 pairs of s\.jsonl were not tokenised"):
        select(DataConfig(train="s.jsonl"), [SourceRows(**vars(source) | {"light": light})], None, None)


def marked(pairs, name="s", train_on="answer", flags=()):
    """A source of which the first token of each completion is reasoning, the second neither, and the others are the answer.

    Args:
        flags: of each pair; its marks are taken away if it has ``TURNS_NOT_FOUND``.
    """
    source = source_of(pairs, name, 2)
    light, flags = source.light, [*flags, *[0] * (len(pairs) - len(flags))]
    runs = [0 << MARK_BITS | ASSISTANT | REASONING, 1 << MARK_BITS, 2 << MARK_BITS | ASSISTANT | ANSWER]
    for column, kind in MARK_COLUMNS:
        values = runs if "marks" in column else [1.0] * 3
        lengths = light[f"{column.split('_')[0]}_tokens"].to_pylist()
        lists = [[] if flag & TURNS_NOT_FOUND else values[:length] for length, flag in zip(lengths, flags, strict=True)]
        light = light.append_column(column, pa.array(lists, kind))
    light = light.set_column(light.column_names.index("flags"), "flags", pa.array(flags, pa.uint8()))
    return SourceRows(**vars(source) | {"light": light, "train_on": {train_on: 1.0}})


def several(count):
    """Pairs of different prompts: completions of 4 and 5 tokens. With 20 pairs the first 9 are below 0.4 (``held_out``)."""
    return [([1, row], [2, row, 4, 5], [3, row, 4, 5, 6], bytes([12 * row]) * 16, False, 0) for row in range(count)]


def test_runs_are_cut_and_pairs_of_which_nothing_counts_are_dropped():
    pairs = [
        ([1], [2, 3, 4, 5], [2, 3, 4], TEXTS[0], False, 0),
        ([1, 2, 3, 4, 5], [2, 3, 4], [3, 4, 5], TEXTS[1], False, 0),  # two tokens are left of each
        ([1], [2, 3], [3, 4, 5], TEXTS[2], False, 0),
        ([1], [2, 3, 4], [3, 4, 5], TEXTS[3], False, 0),
        ([1], [2, 3, 4], [3, 4, 5], TEXTS[4], False, 0),
        ([1], [2, 3, 4], [3], TEXTS[5], False, 0),
    ]
    source = marked(pairs, flags=[0, 0, 0, TURNS_NOT_FOUND, REASONING_NOT_FOUND])
    config = DataConfig(train="s.jsonl", train_on="answer", max_length=7, max_dropped=1)
    sets = select(config, [source], None, None)
    assert sets.train["pair_id"].to_pylist() == ["s:1"]
    assert sets.train.select(COUNT_COLUMNS).to_pydict() == {
        "chosen_starts": [[0, 2]],
        "chosen_weights": [[0, 1]],
        "rejected_starts": [[0, 2]],
        "rejected_weights": [[0, 1]],
    }
    report = sets.report.sources[0]
    assert {reason: (count, report.dropped.places[reason]) for reason, count in report.dropped.counts.items()} == {
        "no token of the chosen completion counts (train_on answer)": (2, ["x:20", "y:30"]),
        "turns not found (train_on answer)": (1, ["x:40"]),
        "reasoning not found (train_on answer)": (1, ["y:50"]),
        "no token of the rejected completion counts (train_on answer)": (1, ["x:60"]),
    }
    assert report.counted == ("train_on answer", 7, 3, None)
    assert "data s: train_on answer: 3 of 7 completion tokens count (43 %)" in report.lines()
    with pytest.raises(DataError, match=r"5 of 6 pairs would be dropped .* change data\.train_on"):
        check_source(config.model_copy(update={"max_dropped": 0.1}), source)
    assert window(config, source, 0, 0).select(COUNT_COLUMNS).to_pydict() == sets.train.select(COUNT_COLUMNS).to_pydict()


def test_of_a_whole_completion_nothing_need_be_found():
    source = marked(several(2), train_on="completion", flags=[TURNS_NOT_FOUND, REASONING_NOT_FOUND])
    other = marked(several(2), "other")
    config = DataConfig(train=["s.jsonl", {"path": "other.jsonl", "train_on": "answer"}])
    sets = select(config, [source, other], None, None)
    assert sets.train["chosen_starts"].to_pylist() == [[0], [0], [0, 2], [0, 2]]
    assert [report.counted.counted for report in sets.report.sources] == [18, 10]
    # A completion with spans has runs wherever its turns are, so this one has none, and counts as a whole.
    report = select(DataConfig(train="s.jsonl", spans_column="spans"), [source], None, None).report.sources[0]
    assert report.dropped.counts == {} and report.counted.counted == 18


def test_what_counts_in_held_out_pairs_is_decided_by_itself():
    """The held-out pairs of runs with different ``train_on`` are the same ones, with the same runs."""
    found, pairs = [], several(20)
    for row in (2, 11, 12):  # pairs without an answer, one of them held out
        prompt, chosen, rejected, *more = pairs[row]
        pairs[row] = prompt, chosen[:2], rejected[:2], *more
    for train_on in ("answer", "reasoning", "completion"):
        config = DataConfig(
            train="s.jsonl", train_on=train_on, eval={"fraction": 0.4, "train_on": "reasoning"}, max_dropped=1
        )
        sets = select(config, [marked(pairs, train_on=train_on)], None, None)
        found.append(sets.eval.select(["pair_id", *COUNT_COLUMNS]).to_pydict())
        names = set(sets.train["pair_id"].to_pylist())
        assert not names & set(found[-1]["pair_id"])
        assert len(names & {"s:12", "s:13"}) == (0 if train_on == "answer" else 2) and "s:3" in found[-1]["pair_id"]
        streamed = window(config, marked(pairs, train_on=train_on), 0, 0)["pair_id"].to_pylist()
        assert names | set(found[-1]["pair_id"]) <= set(streamed)  # or no pass would score them
        report = sets.report.sources[0]
        assert report.kept == len(names) + sets.eval.num_rows
        if train_on == "answer":
            assert sets.train["chosen_weights"].to_pylist()[0] == [0, 1]
            assert f"data s, held out: train_on reasoning: {2 * sets.eval.num_rows} of" in "\n".join(report.lines())
    assert found[0] == found[1] == found[2] and found[0]["chosen_weights"][0] == [1, 0]


def test_without_train_on_of_their_own_held_out_pairs_count_as_the_others():
    config = DataConfig(train="s.jsonl", train_on="answer", eval={"fraction": 0.4})
    sets = select(config, [marked(several(20))], None, None)
    assert sets.eval["chosen_weights"].to_pylist() == [[0, 1]] * sets.eval.num_rows
    held = marked(several(3), "held-out", "reasoning")
    config = DataConfig(train="s.jsonl", train_on="answer", eval={"path": "h.jsonl", "train_on": "reasoning"})
    sets = select(config, [marked(several(20))], held, None)
    assert sets.eval["chosen_weights"].to_pylist() == [[1, 0]] * 3
    assert sets.train["chosen_weights"].to_pylist() == [[0, 1]] * 20


def test_a_side_of_a_split_of_which_nothing_counts_is_refused():
    pairs = [(prompt, chosen[:2], rejected[:2], *more) for prompt, chosen, rejected, *more in several(20)]
    settings = {"train": "s.jsonl", "train_on": "reasoning", "max_dropped": 1}
    config = DataConfig(eval={"fraction": 0.4, "train_on": "answer"}, **settings)
    with pytest.raises(DataError, match=r"no pair is left to hold out.*correct data\.train_on or data\.eval\.train_on"):
        select(config, [marked(pairs, train_on="reasoning")], None, None)


def test_a_set_without_marks_is_no_set_for_a_mask():
    source = SourceRows(**vars(source_of(several(2), "s", 1)) | {"train_on": {"answer": 1.0}})
    with pytest.raises(ValueError, match="has no marks"):
        select(DataConfig(train="s.jsonl", train_on="answer"), [source], None, None)
