"""One completion with a label: read from every form, tokenised without its missing side, and kept as a row of its own."""

import json

import numpy as np
import pytest
from samples import CHAT_TEMPLATE, bot, make_tokenizer, text, user

from raydpo.config import DataConfig
from raydpo.data.keys import completion_key
from raydpo.data.messages import Malformed
from raydpo.data.pairs import load_pairs
from raydpo.data.parse import Record
from raydpo.data.preference import normalise
from raydpo.data.rows import DESIRABLE, SEVERAL_TURNS, UNDESIRABLE, RowMaker
from raydpo.data.select import LABEL, window
from raydpo.data.tokenise import Tokeniser
from raydpo.reference.shards import Wanted
from raydpo.tokens.block import Span, decode, encode

Q, GOOD = [user("q")], [bot("good")]
TEXT, CHAT = ("q", "good"), (Q, GOOD)
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = [{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]},
        {"role": "tool", "content": "4"}]  # fmt: skip

FORMS = {
    "text": ({"prompt": "q", "completion": "good"}, TEXT, None),
    "messages": ({"prompt": Q, "completion": GOOD}, CHAT, None),
    "messages and text": ({"prompt": Q, "completion": "good"}, CHAT, None),
    "text and messages": ({"prompt": "q", "completion": GOOD}, CHAT, None),
    "one message": ({"prompt": Q, "completion": GOOD[0]}, CHAT, None),
    "the completion repeats the prompt": ({"prompt": Q, "completion": Q + GOOD}, CHAT, None),
    "a conversation as the completion": ({"completion": Q + GOOD}, CHAT, None),
    "a conversation beside its text prompt": ({"prompt": "q", "completion": Q + GOOD}, CHAT, None),
    "JSON text": ({"prompt": json.dumps(Q), "completion": json.dumps(GOOD)}, CHAT, "as JSON or Python writes it"),
    "conversation": ({"messages": Q + GOOD}, CHAT, "the assistant says last in 'messages' read as the completion"),
    "conversation as JSON text": ({"messages": json.dumps(Q + GOOD)}, CHAT, "read as the completion"),
    "conversation of columns": (
        {"conversation": {"role": ["user", "assistant"], "content": ["q", "good"]}},
        CHAT,
        "objects with lists of roles",
    ),
    "conversation with a call": ({"messages": [*Q, *CALL, *GOOD]}, ([*Q, *CALL], GOOD), None),
    "two messages at the end": ({"messages": [*Q, bot("so"), *GOOD]}, (Q, [bot("so"), *GOOD]), None),
    "a system column": ({"messages": Q + GOOD, "system": "Be brief."}, ([SYSTEM, *Q], GOOD), "the column 'system' put"),
    "question": ({"question": "q", "completion": "good"}, TEXT, "'question' read as the prompt"),
    "messages before the completion": ({"messages": Q, "completion": "good"}, CHAT, "'messages' read as the prompt"),
}
TAGGED = {
    "LLaMA-Factory's alpaca": (
        {"instruction": "q", "input": "", "output": "good"},
        TEXT,
        "'output' read as the completion",
    ),
    "instruction and input": ({"instruction": "q", "input": "x", "output": "good"}, ("q\nx", "good"), "joined by a newline"),
    "LLaMA-Factory's sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "good"}], "system": ""},
        CHAT,
        "messages with 'from' and 'value'",
    ),
}


@pytest.mark.parametrize(
    "label, alone", [(True, "chosen"), (False, "rejected"), (1, "chosen"), (0, "rejected"), (1.0, "chosen")]
)
@pytest.mark.parametrize("name, form", [*((("label"), each) for each in FORMS), *(("kto_tag", each) for each in TAGGED)])
def test_a_completion_with_a_label_is_read_from_every_form(name, form, label, alone):
    record, expected, note = (FORMS | TAGGED)[form]
    (found,) = normalise(record | {name: label})
    other = "rejected" if alone == "chosen" else "chosen"
    assert (found.alone, found.prompt, getattr(found, alone)) == (alone, *expected)
    assert getattr(found, other) == ("" if isinstance(expected[0], str) else [])
    assert found.sides == (("completion", expected[1]),)
    assert found.unused == ()
    assert note is None or any(note in each for each in found.notes), found.notes
    assert not any(each.startswith("warning: ") for each in found.notes), found.notes


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"prompt": "q", "completion": "a", "label": "good"}, "'label', the label of one completion, is the text 'good'"),
        ({"prompt": "q", "completion": "a", "label": 0.7}, "is a number other than 0 and 1: write true for a good"),
        ({"prompt": "q", "completion": "a", "label": -1}, "is a number other than 0 and 1"),
        ({"prompt": "q", "completion": "a", "label": float("nan")}, "is a number other than 0 and 1"),
        ({"prompt": "q", "completion": "a", "label": None}, "is null"),
        ({"prompt": "q", "completion": "a", "label": [True]}, "is neither a truth value nor a number"),
        ({"instruction": "q", "output": "a", "kto_tag": "true"}, "'kto_tag', the label of one completion, is the text"),
        ({"prompt": "q", "completion": "", "label": True}, "completion is empty"),
        ({"prompt": Q, "completion": [bot(" ")], "label": True}, "completion is empty"),
        ({"prompt": " ", "completion": "a", "label": True}, "prompt is empty"),
        ({"prompt": [user("")], "completion": "a", "label": True}, "prompt is empty"),
        ({"prompt": Q + GOOD, "completion": "a", "label": True}, "the last message of prompt is the assistant's"),
        ({"prompt": Q, "completion": [user("a")], "label": True}, "does not begin with the assistant"),
        ({"prompt": "x", "completion": Q + GOOD, "label": True}, "text that the messages of the completion do not contain"),
        ({"completion": "a", "label": True}, "missing column 'prompt'"),
        ({"messages": Q, "label": True}, "not the assistant's, so nothing has the label"),
        ({"messages": GOOD, "label": True}, "prompt is empty"),
        ({"prompt": "q", "response": "a", "label": True}, "map the columns to 'prompt', 'completion' and 'label'"),
        ({"prompt": "q", "completion": "a"}, "neither another to compare it with nor a label"),
        ({"instruction": "q", "output": "a", "answer": "b", "kto_tag": True}, "each of 'answer', 'output' may be"),
        ({"prompt": "q", "completion": "a", "label": True, "image": "x.png"}, "holds an image"),
    ],
)  # fmt: skip
def test_what_is_no_label_or_no_completion_is_malformed(record, reason):
    with pytest.raises(Malformed, match=reason) as caught:
        normalise(record)
    assert len(str(caught.value)) <= 250


@pytest.mark.parametrize(
    "record",
    [
        text(1, label=True),
        {"messages": Q + GOOD, "rejected_response": "bad", "label": 1},
        {"messages": Q, "completions": ["a", "b"], "scores": [1, 2], "label": 1},
        {"prompt": "q", "response_a": "a", "response_b": "b", "winner": "a", "label": 0},
    ],
)
def test_a_pair_stays_one_whatever_its_label(record):
    (found,) = normalise(record)
    assert found.alone is None and found.chosen and found.rejected


def test_columns_beside_a_completion_are_told_of():
    record = {"prompt": "What is ice?", "completion": "Frozen water.", "label": True}
    assert normalise(record | {"passage": "Ice floats."})[0].notes[0].startswith("warning: 'passage' is not read")
    assert normalise(record | {"remark": "It is cold outside."})[0].notes[0].startswith("warning: 'remark' is not read")
    # A text with the prompt and the answer is the record in another form; one with the prompt alone is not.
    assert normalise(record | {"remark": "What is ice? Frozen water."})[0].notes == ()
    assert normalise(record | {"remark": "What is ice? A stone."})[0].notes != ()


RECORDS = [
    *(
        {"prompt": f"Question {n}: what colour is the sky?", "completion": f" blue {n}", "label": n % 3 > 0}
        for n in range(9)
    ),
    *({"prompt": [user(f"Question {n}")], "completion": [bot(f"the sky is {n}")], "label": n % 2} for n in range(6)),
    *map(text, range(3)),
    {"prompt": "Question 0: what colour is the sky?", "completion": " blue 0", "label": False},  # a copy
    {"prompt": "Question 0: what colour is the sky?", "completion": " blue 0", "label": True},  # the opposite
    {"prompt": [user("two turns")], "completion": [bot("a"), user("b"), bot("c")], "label": True},
    {"prompt": "the a", "completion": "b", "label": True},  # tokens merge across the boundary
    {"prompt": "p", "completion": "a", "label": 3},
    {"prompt": "word " * 300, "completion": " too long", "label": False},
    {"prompt": "q", "completion": " the sky is blue" * 40, "label": False},
]


def rows_of(records, size):
    """Light rows and tokens of ``records``, made in blocks of ``size``."""
    records = [Record(f"a.jsonl:{number}", number, value, None) for number, value in enumerate(records, 1)]
    maker = RowMaker(Tokeniser(make_tokenizer()), numbers={}, special_tokens="warn", most_characters=1_000)
    maker = maker.decided(*maker.decide(records))
    parts = [maker.make(records[start : start + size]) for start in range(0, len(records), size)]
    for number, part in enumerate(parts):  # and as a stored set keeps them
        span = Span(0, number * size, number * size + len(records[number * size : (number + 1) * size]))
        info, block, index = encode(part, "0" * 32, span)
        back = decode(info, "0" * 32, block, index)
        assert (back.light, back.tokens) == (part.light, part.tokens)
    account = parts[0].account
    for part in parts[1:]:
        account.merge(part.account)
    light = [row | {"file": 0} for part in parts for row in part.light.to_pylist()]
    return light, [row for part in parts for row in part.tokens.to_pylist()], account.to_state()


def test_rows_are_the_same_whatever_the_blocks():
    whole = rows_of(RECORDS, 1000)
    assert rows_of(RECORDS, 7) == rows_of(RECORDS, 1) == whole
    light, tokens, account = whole
    assert (len(light), account["malformed_records"]) == (24, 1)
    for row, ids in zip(light, tokens, strict=True):
        flags = row["flags"] & ~SEVERAL_TURNS
        record = RECORDS[row["row"] - 1]
        if "label" not in record:
            assert flags == 0 and row["chosen_tokens"] and row["rejected_tokens"]
            continue
        assert flags == (DESIRABLE if record["label"] else UNDESIRABLE)
        side, other = ("chosen", "rejected") if record["label"] else ("rejected", "chosen")
        assert (row[f"{other}_tokens"], row[f"{other}_key"], row[f"{other}_hash"], row["agree"]) == (0, bytes(16), 0, 0)
        assert ids[f"{other}_ids"] == []
        if row["characters"] > 1000:
            assert (row["prompt_tokens"], row["highest"]) == (0, -1)
            continue
        assert row[f"{side}_key"] == completion_key(ids["prompt_ids"], ids[f"{side}_ids"])
        assert row["highest"] == max(ids["prompt_ids"] + ids[f"{side}_ids"])
    assert [row["flags"] for row in light if row["flags"] & SEVERAL_TURNS] == [DESIRABLE | SEVERAL_TURNS]


def test_a_table_of_completions_and_pairs(write):
    """Each is cut and dropped by itself; a copy has the same label; the counts tell both kinds."""
    config = DataConfig(train=write(RECORDS), max_length=60, max_malformed=1.0, max_dropped=1.0)
    tokeniser = Tokeniser(make_tokenizer())
    sets = load_pairs(config, tokeniser)
    (report,) = sets.report.sources
    assert sets.train.schema.field(LABEL).type == "int8"
    labels = np.array(sets.train[LABEL].to_pylist())
    chosen, rejected = (
        np.array([len(ids) for ids in sets.train[f"{side}_ids"].to_pylist()]) for side in ("chosen", "rejected")
    )
    assert ((labels == 1) == (rejected == 0)).all() and ((labels == -1) == (chosen == 0)).all()
    assert (report.desirable, report.undesirable) == ((labels == 1).sum(), (labels == -1).sum()) == (12, 8)
    assert (report.kept, report.duplicates, report.truncated) == (23, 1, 1)
    lines = sets.report.lines()
    assert lines[0].endswith(
        "25 records, 3 pairs and 20 completions with labels (12 desirable, 8 undesirable) kept, 1 completions truncated, "
        "1 exact duplicates kept"
    )
    assert any("1 rows dropped: 1 prompt leaves no room" in line for line in lines), lines
    # As from separate sources; those without a label have none.
    split = [write(RECORDS[:15], "a.jsonl"), write(RECORDS[15:18], "b.jsonl"), write(RECORDS[18:], "c.jsonl")]
    apart = load_pairs(DataConfig(train=split, max_length=60, max_malformed=1.0, max_dropped=1.0), tokeniser).train
    for name in (LABEL, "prompt_ids", "chosen_ids", "rejected_ids", "chosen_key", "rejected_key"):
        assert apart[name].to_pylist() == sets.train[name].to_pylist()
    pairs = load_pairs(DataConfig(train=write(RECORDS[15:18], "b.jsonl")), tokeniser)
    assert LABEL not in pairs.train.column_names
    assert pairs.report.lines()[0] == "data b: 3 records, 3 pairs kept"


def test_windows_of_a_source_are_parts_of_the_table(write):
    config = DataConfig(train=write(RECORDS), max_length=60, max_malformed=1.0, max_dropped=1.0)
    sets = load_pairs(config, Tokeniser(make_tokenizer()))
    parts = [window(config, sets.sources[0], 0, start, stop) for start, stop in ((0, 7), (7, 15), (15, 18), (18, None))]
    for name in ("pair_id", "chosen_key", "rejected_key", "chosen_full", "place"):
        assert [value for part in parts for value in part[name].to_pylist()] == sets.train[name].to_pylist()
    labels = [part[LABEL].to_pylist() if LABEL in part.column_names else [0] * part.num_rows for part in parts]
    assert [label for part in labels for label in part] == sets.train[LABEL].to_pylist()
    assert LABEL not in parts[2].column_names, "three pairs"
    wanted = [one.key for part in parts for one in Wanted([part], sets.tokens, [sets.sources[0].light])]
    assert sorted(set(wanted)) == sorted(one.key for one in Wanted([sets.train], sets.tokens, [sets.sources[0].light]))


def test_prompts_are_held_out_and_found_again(write):
    config = DataConfig(train=write(RECORDS), eval={"fraction": 0.3}, max_malformed=1.0, max_dropped=1.0)
    sets = load_pairs(config, Tokeniser(make_tokenizer()))
    prompts = [{tuple(ids) for ids in table["prompt_ids"].to_pylist()} for table in (sets.train, sets.eval)]
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]
    config = DataConfig(
        train=write(RECORDS), eval={"path": write(RECORDS[:2], "held.jsonl")}, max_malformed=1.0, max_dropped=1.0
    )
    sets = load_pairs(config, Tokeniser(make_tokenizer()))
    assert (sets.eval[LABEL].to_pylist(), sets.report.leaked) == ([-1, 1], 2)


def test_one_rendering_and_one_text_less(monkeypatch):
    """A completion alone costs two renderings and two tokenised texts."""
    tokeniser = Tokeniser(make_tokenizer())
    rendered, render = [], tokeniser.template.render
    monkeypatch.setattr(tokeniser.template, "render", lambda *a, **k: rendered.append(1) or render(*a, **k))
    counted = []
    for record in (
        {"prompt": Q, "chosen": GOOD, "rejected": [bot("bad")]},
        {"prompt": Q, "completion": GOOD, "label": True},
    ):
        for _ in range(2):  # the first time, probes of the template are rendered, too
            rendered.clear()
            tokeniser.encode(normalise(record))
        counted.append(len(rendered))
    assert counted == [3, 2]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None])
def test_tokens_are_those_of_the_pair_where_nothing_merges(template):
    tokeniser = Tokeniser(make_tokenizer(template))
    prompt = "what?\n" if template is None else [user("what?")]
    (pair,) = tokeniser.encode(normalise({"prompt": prompt, "chosen": "the sky", "rejected": "grass"}))
    for label, side in ((True, 1), (False, 2)):
        (alone,) = tokeniser.encode(
            normalise({"prompt": prompt, "completion": ("the sky", "grass")[side - 1], "label": label})
        )
        assert [alone[0].tolist(), alone[side].tolist()] == [pair[0].tolist(), pair[side].tolist()]
        assert len(alone[3 - side]) == 0


def test_what_is_odd_about_a_completion_is_told_of_it(write):
    """Renderings are checked as those of pairs, and messages name the completion."""
    records = [
        {"prompt": [user("a b")], "completion": [bot("c") | {"reasoning_content": "why so"}], "label": True},
        {"prompt": [user("a b")], "completion": [bot("spelled <s> out")], "label": False},
    ]
    sets = load_pairs(DataConfig(train=write(records), max_lost=1.0), Tokeniser(make_tokenizer()))
    lines = "\n".join(sets.report.lines())
    assert "leaves out or changes texts of 1 of 2 rows: 1 thoughts (completion), such as 'why so'" in lines
    assert "texts spell special tokens, which the model reads as such and not as text: 1 completion, such as '<s>'" in lines


def test_answers_that_repeat_the_prompt_lose_it(write):
    records = [
        {"prompt": f"What is {n} today?\n", "completion": f"What is {n} today?\n {'ab'[n % 2]}", "label": bool(n % 2)}
        for n in range(12)
    ]
    tokeniser = Tokeniser(make_tokenizer(None))
    sets = load_pairs(DataConfig(train=write(records)), tokeniser)
    side = {1: "chosen_ids", -1: "rejected_ids"}
    answers = [tokeniser.tokenizer.decode(row[side[row[LABEL]]]) for row in sets.train.to_pylist()]
    assert answers == [f" {'ab'[n % 2]}</s>" for n in range(12)]
    assert "data prefs: in 12 rows the answers repeat the prompt, which was taken off" in sets.report.lines()
