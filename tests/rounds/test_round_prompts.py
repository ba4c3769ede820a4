"""Prompts of rounds: tokenised as those of pairs, divided for good, and given to reward functions with their columns."""

from __future__ import annotations

import io
import json
from datetime import date
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from round_tables import config, prompts, settings
from tiny import make_tokenizer

from raydpo.data.messages import Malformed
from raydpo.data.preference import normalise, prompt_alone
from raydpo.data.tokenise import Tokeniser
from raydpo.errors import DataError
from raydpo.rounds.prompts import held_out_of, prompt_id, read_prompts, round_seed, sampled_of, slice_of
from raydpo.rundir.rounds import PROMPT_SCHEMA
from raydpo.terminal.console import Console

TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}
TEMPLATE = "{% if tools %}<s>tools\n{{ tools | tojson }}</s>\n{% endif %}"


@pytest.fixture(scope="module")
def tokeniser():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE + tokenizer.chat_template
    return Tokeniser(tokenizer)


@pytest.fixture
def write(tmp_path):
    def lines(records, name="prompts.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return lines


def read(path, tokeniser, data=None, **rounds):
    """The table, and what was said."""
    stream = io.StringIO()
    return read_prompts(config(path, data, **rounds), tokeniser, Console(stream)), stream.getvalue()


def asked(count, start=0):
    return [{"prompt": f"what is the sum of {number} and two?\n"} for number in range(start, start + count)]


# ---- tokens

ANSWERS = {
    "text": {"chosen": "yes, because", "rejected": "no"},
    "chat": {name: [{"role": "assistant", "content": said}] for name, said in (("chosen", "yes"), ("rejected", "no"))},
}
USER = {"role": "user", "content": "is the sky blue?"}
RECORDS = {
    "text": ({"prompt": "Question: is the sky blue?\nAnswer:\n"}, "text"),
    "messages": ({"prompt": [USER]}, "chat"),
    "system message": ({"prompt": [{"role": "system", "content": "Be short."}, USER]}, "chat"),
    "column system": ({"prompt": [USER], "system": "Be short."}, "chat"),
    "turns": ({"prompt": [USER, {"role": "assistant", "content": "yes"}, USER]}, "chat"),
    "tools": ({"prompt": [USER], "tools": [TOOL]}, "chat"),
    "json": ({"prompt": json.dumps([USER])}, "chat"),
    "sharegpt": ({"prompt": [{"from": "human", "value": "is the sky blue?"}]}, "chat"),
    "question": ({"question": "is the sky blue?\n"}, "text"),
    "messages only": ({"messages": [USER]}, "chat"),
}


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("adds", [False, True])
def test_tokens_are_those_of_a_pair_with_this_prompt(name, adds, tokeniser):
    record, kind = RECORDS[name]
    if adds:  # a tokenizer that puts BOS and EOS around every text
        from tokenizers import processors

        tokenizer = make_tokenizer()
        tokenizer.chat_template = TEMPLATE + tokenizer.chat_template
        around = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
        tokenizer.backend_tokenizer.post_processor = around
        tokeniser = Tokeniser(tokenizer)
    pair = tokeniser.encode(normalise(record | ANSWERS[kind]))[0]
    alone = tokeniser.encode([prompt_alone(record)])[0]
    assert alone.prompt.tolist() == pair.prompt.tolist()
    assert len(alone.prompt) > 5
    assert len(alone.chosen) == len(alone.rejected) == 0


def test_a_prompt_is_whole_though_an_answer_would_merge_into_it(tokeniser):
    record = {"prompt": "the a", "chosen": "nswer", "rejected": "nd"}
    pair, alone = tokeniser.encode(normalise(record))[0], tokeniser.encode([prompt_alone(record)])[0]
    assert alone.prompt.tolist() == tokeniser.tokenizer("the a")["input_ids"]
    assert len(pair.prompt) < len(alone.prompt)


def test_the_table_holds_what_the_record_says(tokeniser, write):
    path = write([{"prompt": [USER], "system": "Be short.", "answer": "yes", "tests": {"in": [1]}}, *asked(8)])
    table, said = read(path, tokeniser)
    assert table.schema == PROMPT_SCHEMA
    assert len(table) == 9
    row = table.slice(0, 1).to_pylist()[0]
    system = {"role": "system", "content": "Be short."}
    text = tokeniser.tokenizer.apply_chat_template([system, USER], tokenize=False, add_generation_prompt=True)
    assert tokeniser.tokenizer.decode(row["prompt_ids"]) == text
    assert row["prompt_id"] == prompt_id(row["prompt_ids"])
    assert json.loads(row["prompt"]) == [system, USER]
    assert json.loads(row["columns"]) == {"system": "Be short.", "answer": "yes", "tests": {"in": [1]}}
    assert (row["row"], row["source"]) == (1, "prompts")
    assert "the column 'system' put before the prompt" in said
    assert "8 prompts are plain text" in said  # as of pairs


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"prompt": [USER, {"role": "assistant", "content": "yes"}]}, "the last message of prompt is the assistant's"),
        ({"prompt": "  "}, "prompt is empty"),
        ({"prompt": []}, "prompt is empty"),
        ({"text": "is the sky blue, or is it red?"}, "missing column 'prompt', but 'text' may be it"),
        ({"answer": "4"}, "missing column 'prompt'"),
        ({"prompt": 3}, "neither text nor messages"),
        ({"prompt": [USER], "image": "a.png"}, "holds an image"),
        ({"prompt": [USER], "chat_template_kwargs": {"chat_template": "x"}}, "must not set 'chat_template'"),
    ],
)
def test_a_record_without_a_prompt_is_malformed(record, why):
    with pytest.raises(Malformed, match=why):
        prompt_alone(record)


def test_preference_data_give_their_prompts(tokeniser, write):
    shared = [{"role": "user", "content": "why?"}]
    records = [
        {name: [*shared, {"role": "assistant", "content": said}] for name, said in (("chosen", "a"), ("rejected", "b"))},
        {"prompt": "how?\n", "chosen": "x", "rejected": "y"},
        *asked(3),
    ]
    table, _ = read(write(records), tokeniser)
    assert json.loads(table["prompt"][0].as_py()) == shared
    assert json.loads(table["prompt"][1].as_py()) == "how?\n"


def test_a_column_that_may_belong_to_the_prompt_is_told_and_others_are_not(tokeniser, write):
    records = [
        one | {"context": f"the long text {n} that tells", "hint": "a text of words"} for n, one in enumerate(asked(6))
    ]
    _, said = read(write(records), tokeniser)
    assert "'context' is not read, though it may belong to the prompt" in said
    assert "hint" not in said


# ---- columns


def test_columns_of_any_type_become_json(tokeniser, tmp_path):
    table = pa.table(
        {
            "prompt": [one["prompt"] for one in asked(4)],
            "day": [date(2024, 2, 29)] * 4,
            "price": pa.array([Decimal("1.10")] * 4),  # a float wherever Parquet is read
            "raw": [b"\x00\xff"] * 4,
            "score": [1.5, float("nan"), float("inf"), None],
            "completions": [["a"]] * 4,
            "nested": [{"steps": [1, 2], "day": date(2024, 3, 1)}] * 4,
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    found, said = read(tmp_path / "p.parquet", tokeniser)
    columns = [json.loads(each) for each in found["columns"].to_pylist()]
    first = {"day": "2024-02-29", "price": 1.1, "raw": "AP8=", "score": 1.5}
    assert columns[0] == first | {"nested": {"steps": [1, 2], "day": "2024-03-01"}}
    assert [one.get("score") for one in columns] == [1.5, None, None, None]
    assert "4 records: the column 'completions' is not given to reward functions" in said
    assert "2 records: numbers that are not finite" in said
    assert "4 records: bytes are given to reward functions as text in base64" in said
    assert "4 records: dates" in said


# ---- what is refused and counted


def test_malformed_records_are_counted_and_refused_with_their_places(tokeniser, write):
    path = write([*asked(18), {"prompt": ""}, {"nothing": 1}])
    with pytest.raises(DataError, match=r"2 of 20 records are malformed.*prompts.jsonl:19.*data.max_malformed"):
        read(path, tokeniser)
    table, said = read(path, tokeniser, {"max_malformed": 0.2})
    assert len(table) == 18
    assert "2 malformed records" in said


def test_a_prompt_without_room_for_an_answer_is_dropped(tokeniser, write):
    long = {"prompt": "sum of two numbers " * 30}
    path, data = write([*asked(8), long, {"prompt": long["prompt"] + "!"}]), {"max_length": 40}
    with pytest.raises(
        DataError, match=r"2 of 10 prompts would be dropped.*no room for .*max_tokens \(8\).*prompts.jsonl:9"
    ):
        read(path, tokeniser, data)
    table, said = read(path, tokeniser, data | {"max_dropped": 0.2})
    assert len(table) == 8
    assert "2 prompts dropped" in said
    longest = max(map(len, table["prompt_ids"].to_pylist()))
    exact, _ = read(path, tokeniser, {"max_length": longest + 8, "max_dropped": 0.2})
    assert len(exact) == 8  # an answer of max_tokens just fits


def test_special_tokens_are_refused_where_pairs_refuse_them(tokeniser, write):
    records = [{"prompt": [{"role": "user", "content": f"what is {n}?"}]} for n in range(9)]
    path = write([*records, {"prompt": [{"role": "user", "content": "what is </s> here?"}]}])
    _, said = read(path, tokeniser)
    assert "texts spell special tokens" in said
    with pytest.raises(DataError, match="its text spells a special token"):
        read(path, tokeniser, {"special_tokens": "refuse"})


def test_nothing_usable_and_nothing_to_split(tokeniser, write):
    with pytest.raises(DataError, match="gives a usable prompt"):
        read(write([{"prompt": ""}]), tokeniser, {"max_malformed": 1})
    with pytest.raises(DataError, match=r"rounds.held_out.fraction 0.15 cannot split 1 distinct prompt"):
        read(write(asked(1) * 3), tokeniser)


def test_two_sources_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"two sources of rounds.prompts are both named 'p'; give each its own name"):
        settings(prompts=[{"path": "a/p.jsonl"}, {"path": "b/p.jsonl"}])
    assert len(settings(prompts=[{"path": "a/p.jsonl"}, {"path": "b/p.jsonl", "name": "other"}]).prompts) == 2


def test_the_same_tokens_are_one_prompt(tokeniser, write):
    records = [one | {"answer": str(number)} for number, one in enumerate(asked(6))]
    table, said = read(write([*records, records[0], records[1] | {"answer": "other"}]), tokeniser)
    assert len(table) == 6
    assert "2 records repeat an earlier prompt" in said
    assert "1 of them have other columns" in said
    assert "prompts.jsonl:8" in said
    assert json.loads(table["columns"][1].as_py()) == {"answer": "1"}


# ---- held out


def keys_of(table, split):
    return {
        key for key, each in zip(table["prompt_id"].to_pylist(), table["split"].to_pylist(), strict=True) if each == split
    }


def test_a_share_is_held_out_by_content_alone(tokeniser, write):
    table, said = read(write(asked(200)), tokeniser, held_out={"fraction": 0.25})
    out, train = keys_of(table, "held_out"), keys_of(table, "train")
    assert len(out | train) == 200
    assert not out & train
    assert 30 < len(out) < 70
    assert f"prompts: {len(train)} to train on, {len(out)} held out" in said
    again, _ = read(write(asked(200)[::-1] + asked(50, 500)), tokeniser, held_out={"fraction": 0.25})
    assert out <= keys_of(again, "held_out")
    assert train <= keys_of(again, "train")


def test_the_same_question_is_on_one_side_whatever_its_form(tokeniser, write):
    both = [{"prompt": [{"role": "user", "content": one["prompt"]}]} for one in asked(100)]
    table, said = read(write([*asked(100), *both]), tokeniser, held_out={"fraction": 0.3})
    text = [json.loads(prompt) for prompt in table["prompt"].to_pylist()]
    plain = [one if isinstance(one, str) else one[0]["content"] for one in text]
    sides = {}
    for one, split in zip(plain, table["split"].to_pylist(), strict=True):
        sides.setdefault(one, set()).add(split)
    assert all(len(each) == 1 for each in sides.values())
    assert "in another form, and are not trained on" in said


def test_a_file_of_held_out_prompts_is_never_trained_on(tokeniser, write):
    out = write([*asked(3), {"prompt": " " + asked(1, 3)[0]["prompt"]}, *asked(2, 90)], "out.jsonl")
    table, said = read(write(asked(20)), tokeniser, held_out={"path": str(out)})
    assert len(keys_of(table, "held_out")) == 6
    assert len(keys_of(table, "train")) == 16
    assert set(table["source"].to_pylist()) == {"prompts", "held-out"}
    assert "3 training prompts are also held out, and are not trained on" in said
    assert "1 training prompts, such as" in said
    assert "with other white space" in said
    with pytest.raises(DataError, match="no prompt is left to train on: all 6 are held out"):
        read(write(asked(3)), tokeniser, held_out={"path": str(out)})


# ---- prompts of a round


def test_rounds_take_disjoint_slices_and_then_the_same_ones_again():
    table, rounds = prompts(26, held_out=2), settings(per_round=8)
    slices = [slice_of(table, rounds, number) for number in range(1, 7)]
    assert sorted(np.concatenate(slices[:3]).tolist()) == list(range(24))
    assert all(one.tolist() == other.tolist() for one, other in zip(slices[:3], slices[3:], strict=True))
    assert slices[0].tolist() != sorted(slices[0].tolist())
    other = settings(per_round=8, sample={"seed": 1})
    assert set(slice_of(table, other, 1).tolist()) != set(slices[0].tolist())


@pytest.mark.parametrize(("count", "offline", "slices"), [(1, False, 1), (2, False, 2), (9, False, 3), (9, True, 1)])
def test_prompts_that_are_sampled_are_those_of_all_slices(count, offline, slices):
    table, rounds = prompts(26, held_out=2), settings(per_round=8, count=count, offline=offline)
    all_slices = np.concatenate([slice_of(table, rounds, number) for number in range(1, slices + 1)])
    assert sampled_of(table, rounds).tolist() == all_slices.tolist()


def test_a_slice_goes_on_at_the_first_prompt_and_never_repeats_one():
    table, rounds = prompts(20), settings(per_round=8)
    slices = [slice_of(table, rounds, number).tolist() for number in range(1, 6)]
    assert all(len(set(one)) == 8 for one in slices)
    counts = np.bincount(np.concatenate(slices))
    assert counts.tolist() == [2] * 20
    assert sorted(slice_of(table, settings(per_round=99), 3).tolist()) == list(range(20))


def test_slices_and_held_out_prompts_do_not_depend_on_the_order_of_rows():
    table, rounds = prompts(40, held_out=12), settings(per_round=7, measure={"prompts": 5})
    shuffled = table.take(pa.array(np.random.default_rng(0).permutation(40)))
    for number in (1, 2, 9):
        one, other = (each["prompt_id"].take(slice_of(each, rounds, number)).to_pylist() for each in (table, shuffled))
        assert one == other
    one, other = (each["prompt_id"].take(held_out_of(each, rounds)).to_pylist() for each in (table, shuffled))
    assert one == other
    assert len(one) == 5
    seeded = settings(sample={"seed": 9}, measure={"prompts": 5})
    assert held_out_of(table, seeded).tolist() == held_out_of(table, rounds).tolist()
    assert set(held_out_of(table, settings()).tolist()) == set(range(28, 40))


def test_seeds_of_rounds():
    """Pinned: stored samples depend on them."""
    seeds = [round_seed(seed, number) for seed in (0, 1) for number in range(100)]
    assert len(set(seeds)) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
    assert round_seed(0, 0) == 4021111880135961154
