"""Rows of pairs: the same whatever the blocks of records, and what a loader of one record after another makes."""

import json
import re

import numpy as np
import oracle
import pyarrow as pa
import pytest
from samples import CHAT_TEMPLATE, bot, make_tokenizer, text, user
from templates import QWEN, tokenizer_for, tool

from raydpo.config import DataConfig, SourceConfig
from raydpo.data.pairs import load_pairs, number_columns
from raydpo.data.ragged import digests
from raydpo.data.records import read_records
from raydpo.data.rows import (
    FIRST_RECORDS,
    HEAD_TOKENS,
    LIGHT_SCHEMA,
    RowMaker,
    head_of,
    most_characters_of,
)
from raydpo.data.select import PLACE_SCHEMA
from raydpo.data.shapes import common_prefix
from raydpo.data.tally import SourceReport
from raydpo.data.tokenise import Tokeniser


def chat(number, **more):
    prompt = [{"role": "system", "content": "Be brief."}, user(f"Question {number}: what colour is the sky?")]
    return {"prompt": prompt, "chosen": [bot(f"blue {number}")], "rejected": [bot(f"green {number}")]} | more


def transcript(number):
    start = f"\n\nHuman: Question {number}\n\nAssistant:"
    return {"chosen": f"{start} blue {number}", "rejected": f"{start} green {number}"}


RECORDS = [
    *map(text, range(9)),
    *map(chat, range(5)),
    *map(transcript, range(4)),
    text(3),  # a copy
    chat(6, tools=[tool("sky")], chat_template_kwargs={"thinking": False}),
    {"chosen": [user("implicit"), bot("yes")], "rejected": [user("implicit"), bot("no")]},
    {"prompt": [user("two turns")], "chosen": [bot("a"), user("b"), bot("c")], "rejected": [bot("d")]},
    {"prompt": "the sky", "completions": [" is", " was", " will"], "ranks": [1, 2, 3]},
    {"prompt": "the sky", "completions": [" is", " is</s>", " was", " was</s>"], "scores": [4, 3, 2, 1]},
    {"prompt": [{"role": "system", "content": ""}, user("empty system")], "chosen": "yes", "rejected": "no"},
    text(20, prompt="grüße 天空は何色 🙂", chosen=" blau 青", rejected=" grün 緑"),
    text(21, chosen=" it is </s> blue <s>"),
    chat(22, chosen=[bot("spelled <s>assistant\nout</s>")]),
    text(23, score_chosen=1, score_rejected=2, extra="unread"),
    text(24, chosen=" the sky is blue" * 40, rejected=" the sky is blue" * 40 + " red"),
    text(25, prompt="the a", chosen="b", rejected="c"),
    text(26, prompt="word " * 300),
    {"prompt": "p"},
    "[]",
    "{",
    text(27, chosen=""),
    text(28, tools=[tool("left out beside text")]),
]
TRANSCRIPTS = [transcript(number) for number in range(30)]
REPEATING = [
    {
        "prompt": f"What is {number} today?\n",
        "chosen": f"What is {number} today?\n a",
        "rejected": f"What is {number} today?\n b",
    }
    for number in range(12)
]
NUMBERED = [text(number, importance=number % 3, gap=number - 1) for number in range(12)] + [text(13, importance=-1, gap=0)]
PARTS = ("prompt", "chosen", "rejected")
LOOSE = {"max_malformed": 1.0, "max_dropped": 1.0, "max_lost": 1.0}
CASES = {
    "all": (RECORDS, CHAT_TEMPLATE, {}),
    "short": (RECORDS, CHAT_TEMPLATE, {"max_length": 40}),
    "short, drop": (RECORDS, CHAT_TEMPLATE, {"max_length": 40, "truncation": "drop"}),
    "refused": (RECORDS, CHAT_TEMPLATE, {"special_tokens": "refuse"}),
    "split": (RECORDS, CHAT_TEMPLATE, {"eval": {"fraction": 0.4}, "fraction": 0.7, "fraction_seed": 3}),
    "no template": (TRANSCRIPTS + [text(number) for number in range(4)], None, {"eval": {"fraction": 0.3}}),
    "another template": (RECORDS[9:14] + RECORDS[19:22], QWEN, {}),
    "repeating": (REPEATING, CHAT_TEMPLATE, {}),
    "some repeating": ([*REPEATING[:5], *map(text, range(5)), *REPEATING[5:]], CHAT_TEMPLATE, {}),
    "numbers": (NUMBERED, CHAT_TEMPLATE, {"weight_column": "importance", "margin_column": "gap", "eval": {"fraction": 0.5}}),
    "refused for its share": (RECORDS, CHAT_TEMPLATE, {"max_malformed": 0.01}),
    "refused for its length": (RECORDS, CHAT_TEMPLATE, {"max_length": 25, "max_dropped": 0.1}),
    "nothing left": (RECORDS, CHAT_TEMPLATE, {"max_length": 3}),
}


def tokeniser_of(template):
    return Tokeniser(tokenizer_for(template, False) if template is QWEN else make_tokenizer(template))


def outcome(load, config, template):
    """Tables and reports, or the error."""
    try:
        sets = load(config, tokeniser_of(template))
    except Exception as error:
        return repr(error)
    tables = [
        None if table is None else table.drop_columns([name for name in PLACE_SCHEMA.names if name in table.column_names])
        for table in (sets.train, sets.eval)
    ]
    # Reasons of equal counts may come in another order: that of records, and not of stages.
    lines = [sorted(re.split("; |: ", line)) for line in sets.report.lines()]
    return [table and table.to_pylist() for table in tables], sets.report.to_dict(), lines


@pytest.mark.parametrize("case", CASES)
def test_loaded_as_by_the_other_loader(write, case):
    records, template, settings = CASES[case]
    train = [write(records, "a.jsonl"), write([*records[::2], text(99)], "b.jsonl")]
    for more in ({}, {} if "eval" in settings else {"eval": write([text(2), text(98), *records[:3]], "held.jsonl")}):
        config = DataConfig(train=train, **LOOSE | settings | more)
        expected, found = (outcome(load, config, template) for load in (oracle.load_pairs, load_pairs))
        if isinstance(expected, str) or not any(source["dropped"] for source in expected[1]["sources"]):
            assert found == expected
            continue
        # The other loader compares scores of kept pairs only.
        for old, new in zip(expected[1]["sources"], found[1]["sources"], strict=True):
            assert {**new, "scores": None} == {**old, "scores": None}
        assert found[0] == expected[0]


def maker_of(tokeniser, config, records):
    maker = RowMaker(
        tokeniser,
        numbers=number_columns(config),
        special_tokens=config.special_tokens,
        most_characters=most_characters_of(config.max_length),
    )
    return maker.decided(*maker.decide(records))


@pytest.mark.parametrize("case", ["all", "refused", "no template", "repeating", "some repeating", "numbers"])
def test_rows_and_accounts_are_the_same_for_any_blocks(write, case):
    written, template, settings = CASES[case]
    config = DataConfig(train=write(written), **settings)
    records, tokeniser = list(read_records(config.train[0])), tokeniser_of(template)
    maker = maker_of(tokeniser, config, records)
    whole = maker.make(records)
    assert whole.light.schema.names[: len(LIGHT_SCHEMA)] == LIGHT_SCHEMA.names
    for size in (1, 7):
        blocks = [maker.make(records[start : start + size]) for start in range(0, len(records), size)]
        assert pa.concat_tables([block.light for block in blocks]).equals(whole.light)
        assert pa.concat_tables([block.tokens for block in blocks]).equals(whole.tokens)
        account = SourceReport("", "")
        for block in blocks:
            state = json.loads(json.dumps(block.account.to_state()))
            assert SourceReport.from_state(state) == block.account
            account.merge(SourceReport.from_state(state))
        assert account == whole.account and account.to_state() == whole.account.to_state()
        assert account.lines() == whole.account.lines() and account.lines()


def test_light_rows_tell_what_the_tokens_are(write):
    config = DataConfig(train=write(RECORDS))
    records, tokeniser = list(read_records(config.train[0])), tokeniser_of(CHAT_TEMPLATE)
    rows = maker_of(tokeniser, config, records).make(records)
    light, tokens = rows.light.to_pylist(), rows.tokens.to_pylist()
    assert len(light) > 25 and rows.labels == ("prefs.jsonl",) and rows.sources == ()
    for row, ids in zip(light, tokens, strict=True):
        prompt, chosen, rejected = (ids[f"{part}_ids"] for part in PARTS)
        assert [len(prompt), len(chosen), len(rejected)] == [row[f"{part}_tokens"] for part in PARTS]
        assert row["agree"] == common_prefix(np.array(chosen), np.array(rejected))
        assert row["highest"] == max(*prompt, *chosen, *rejected)
        assert (row["line"], row["file"], row["source"]) == (row["row"], 0, -1)
        for part, column in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
            assert row[f"{part}_hash"] == int(digests(pa.array([column], pa.list_(pa.int32())))[0])
    assert sum(row["flags"] for row in light) == 1


def test_giants_have_no_tokens_and_are_dropped_by_the_limit_of_the_run(write):
    path = write([text(1), text(2, chosen=" yes" * 300_000), text(3)])
    records = list(read_records(SourceConfig(path=path)))
    rows = maker_of(tokeniser_of(CHAT_TEMPLATE), DataConfig(train=path), records).make(records)
    assert rows.light["chosen_tokens"].to_pylist()[1] == 0 and rows.light["highest"].to_pylist()[1] == -1
    assert [len(ids) > 0 for ids in rows.tokens["prompt_ids"].to_pylist()] == [True, False, True]
    assert [most_characters_of(length) for length in (2, 10_000, 10_001, 50_000)] == [10**6, 10**6, 4 * 10**6, 16 * 10**6]
    for max_length, limit in ((10_000, "1,000,000"), (10_001, "1,000,100"), (12_001, None)):
        config = DataConfig(train=path, max_dropped=0.5, max_length=max_length)
        found, expected = (outcome(load, config, CHAT_TEMPLATE) for load in (load_pairs, oracle.load_pairs))
        dropped = [source["dropped"] for each in (found, expected) for source in each[1]["sources"]]
        assert found[0] == expected[0] and dropped[0] == dropped[1]
        assert limit is None or f"text of more than {limit} characters" in dropped[0]


def test_heads_sort_as_tokens_do():
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 2**17, size).tolist() for size in random.integers(0, 60, 200)]
    prompts += [[1, 2, 3], [1, 2, 3, 0], [1, 2], [2**21 - 2] * 30, [2**21 + 5] * 30]
    for head in (0, 2, 24):
        cut = [[min(token, 2**21 - 2) for token in prompt[head : head + HEAD_TOKENS]] for prompt in prompts]
        by_bytes = sorted(range(len(prompts)), key=lambda at: (head_of(prompts[at], head), at))
        assert by_bytes == sorted(range(len(prompts)), key=lambda at: (cut[at], at))
    assert head_of([5, 6, 7, 8], 1) == (7 << 42 | 8 << 21 | 9).to_bytes(8, "big") + bytes(56)


def test_the_head_is_what_prompts_have_in_common(write):
    tokeniser = tokeniser_of(CHAT_TEMPLATE)
    path = write([chat(number) for number in range(30)] + [chat(3)])
    records = list(read_records(SourceConfig(path=path)))
    maker = maker_of(tokeniser, DataConfig(train=path), records)
    prompts = load_pairs(DataConfig(train=path), tokeniser).train["prompt_ids"].to_pylist()
    shared = min(common_prefix(np.array(prompts[0]), np.array(other)) for other in prompts[1:30])
    assert maker.head == shared > 5 and not maker.take_off
    assert maker.make(records).light["head"].to_pylist() == [head_of(prompt, shared) for prompt in prompts]
    assert maker_of(tokeniser, DataConfig(train=path), records[:1]).head == 0
    with pytest.raises(ValueError, match="take_off and head are not known"):
        RowMaker(tokeniser, numbers={}, special_tokens="warn", most_characters=10**6).make(records)


def test_the_first_records_are_tokenised_once(write, monkeypatch):
    tokeniser = tokeniser_of(CHAT_TEMPLATE)
    counted = []
    encode = tokeniser.encode_noted
    monkeypatch.setattr(tokeniser, "encode_noted", lambda pairs: counted.append(len(pairs)) or encode(pairs))
    load_pairs(DataConfig(train=write([text(number) for number in range(FIRST_RECORDS + 5)])), tokeniser)
    assert counted == [FIRST_RECORDS, 5]
