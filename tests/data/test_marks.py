"""Which tokens of a completion are the assistant's, its last turn, its answer and its reasoning.

All expected texts of the tables are written by hand.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import templates
from samples import bot, user
from templates import say

from raydpo.data.marks import ANSWER, ASSISTANT, LAST_TURN, MARK_BITS, REASONING, REASONING_NOT_FOUND, TURNS_NOT_FOUND
from raydpo.data.preference import Preference
from raydpo.data.remarks import NO_REASONING
from raydpo.data.spans import spans_of
from raydpo.data.tokenise import Tokeniser
from raydpo.errors import DataError

PARTS = {"assistant": ASSISTANT, "last_turn": LAST_TURN, "answer": ANSWER, "reasoning": REASONING}
THOUGHT = "<think>\nhm\n</think>\n\n"
AGAIN = "<think>\nok\n</think>\n\n"
EMPTY = "<think>\n\n</think>\n\n"
CALL = templates.calling(arguments={"zone": "UTC"})


def marked(template, preference, bos=False):
    """Ids, marks and remarks of one preference, and the tokenizer."""
    marks, tokenizer = [], templates.tokenizer_for(template, bos)
    ((ids, found),) = Tokeniser(tokenizer).encode_noted([preference], marks)
    return tokenizer, ids, marks[0], {(remark.kind, remark.what) for remark in found}


def counted(tokenizer, ids, runs, part):
    """The texts of successive tokens that count."""
    starts = [mark >> MARK_BITS for mark in runs.marks.tolist()] + [len(ids)]
    counts = np.zeros(len(ids), bool)
    for start, stop, mark in zip(starts, starts[1:], runs.marks.tolist(), strict=False):
        counts[start:stop] = part == "completion" or mark & PARTS[part]
    edges = np.flatnonzero(np.diff([0, *counts.astype(int), 0]))
    return [tokenizer.decode(ids[start:stop]) for start, stop in edges.reshape(-1, 2)]


def of_chosen(template, chosen, **more):
    """The texts that count for each value of ``train_on`` in ``chosen``, and the flags."""
    preference = Preference([user("sky?")], chosen, [bot("green")], **more)
    tokenizer, ids, pair, _ = marked(template, preference)
    found = [counted(tokenizer, ids.chosen, pair.chosen, part) for part in ("completion", *PARTS)]
    return found, pair.flags


# completion, then runs of: assistant, last_turn, answer, reasoning
CASES = {
    "ChatML, one turn": (
        templates.CHATML, [bot("blue")], {},
        "blue<|im_end|>\n", ["blue<|im_end|>"], ["blue<|im_end|>"], ["blue<|im_end|>"], [],
    ),
    "ChatML, two turns": (
        templates.CHATML, [bot("blue"), user("sure?"), bot("yes 🙂")], {},
        "blue<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\nyes 🙂<|im_end|>\n",
        ["blue<|im_end|>", "yes 🙂<|im_end|>"], ["yes 🙂<|im_end|>"], ["blue<|im_end|>", "yes 🙂<|im_end|>"], [],
    ),
    "ChatML, a tool's result between": (
        templates.CHATML, [bot("clock()"), say("tool", "12:00"), bot("noon")], {},
        "clock()<|im_end|>\n<|im_start|>tool\n12:00<|im_end|>\n<|im_start|>assistant\nnoon<|im_end|>\n",
        ["clock()<|im_end|>", "noon<|im_end|>"], ["noon<|im_end|>"], ["clock()<|im_end|>", "noon<|im_end|>"], [],
    ),
    "ChatML, thoughts in content": (
        templates.CHATML, [bot(f"{THOUGHT}blue"), user("sure?"), bot(f"{AGAIN}yes")], {},
        f"{THOUGHT}blue<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n{AGAIN}yes<|im_end|>\n",
        [f"{THOUGHT}blue<|im_end|>", f"{AGAIN}yes<|im_end|>"], [f"{AGAIN}yes<|im_end|>"],
        ["blue<|im_end|>", "yes<|im_end|>"], [THOUGHT, AGAIN],
    ),
    "ChatML, two thoughts in a turn": (
        templates.CHATML, [bot(f"{THOUGHT}blue\n{AGAIN}yes")], {},
        f"{THOUGHT}blue\n{AGAIN}yes<|im_end|>\n", [f"{THOUGHT}blue\n{AGAIN}yes<|im_end|>"],
        [f"{THOUGHT}blue\n{AGAIN}yes<|im_end|>"], ["blue\n", "yes<|im_end|>"], [THOUGHT, AGAIN],
    ),
    "Llama 3, two turns": (
        templates.LLAMA, [bot(" blue "), user("sure?"), bot("yes")], {},
        "blue<|eot|><|head|>user<|/head|>\n\nsure?<|eot|><|head|>assistant<|/head|>\n\nyes<|eot|>",
        ["blue<|eot|>", "yes<|eot|>"], ["yes<|eot|>"], ["blue<|eot|>", "yes<|eot|>"], [],
    ),
    "Llama 3, one turn with a thought": (
        templates.LLAMA, [bot(f"{THOUGHT}blue")], {},
        f"{THOUGHT}blue<|eot|>", [f"{THOUGHT}blue<|eot|>"], [f"{THOUGHT}blue<|eot|>"], ["blue<|eot|>"], [THOUGHT],
    ),
    "Llama 3, tools": (
        templates.LLAMA, [*CALL, say("tool", "12:00"), bot("noon")], {"tools": [templates.tool("clock")]},
        '{"name": "clock", "parameters": {"zone": "UTC"}}<|eot|><|head|>ipython<|/head|>\n\n"12:00"<|eot|>'
        "<|head|>assistant<|/head|>\n\nnoon<|eot|>",
        ['{"name": "clock", "parameters": {"zone": "UTC"}}<|eot|>', "noon<|eot|>"], ["noon<|eot|>"],
        ['{"name": "clock", "parameters": {"zone": "UTC"}}<|eot|>', "noon<|eot|>"], [],
    ),
    "Qwen3, a thought in content": (
        templates.QWEN, [bot(f"{THOUGHT}blue")], {},
        f"{THOUGHT}blue<|im_end|>\n", [f"{THOUGHT}blue<|im_end|>"], [f"{THOUGHT}blue<|im_end|>"], ["blue<|im_end|>"],
        [THOUGHT],
    ),
    "Qwen3, a thought in its field": (
        templates.QWEN, [say("assistant", "blue", reasoning_content="hm")], {},
        f"{THOUGHT}blue<|im_end|>\n", [f"{THOUGHT}blue<|im_end|>"], [f"{THOUGHT}blue<|im_end|>"], ["blue<|im_end|>"],
        [THOUGHT],
    ),
    "Qwen3, an empty thought added": (
        templates.QWEN, [bot("blue")], {},
        f"{EMPTY}blue<|im_end|>\n", [f"{EMPTY}blue<|im_end|>"], [f"{EMPTY}blue<|im_end|>"], ["blue<|im_end|>"], [],
    ),
    "Qwen3, an empty thought of the prompt": (
        templates.QWEN, [bot("blue")], {"template_kwargs": {"enable_thinking": False}},
        "blue<|im_end|>\n", ["blue<|im_end|>"], ["blue<|im_end|>"], ["blue<|im_end|>"], [],
    ),
    "Qwen3, thoughts of earlier turns dropped": (
        templates.QWEN, [bot(f"{THOUGHT}blue"), user("sure?"), bot(f"{AGAIN}yes")], {},
        f"blue<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n{AGAIN}yes<|im_end|>\n",
        ["blue<|im_end|>", f"{AGAIN}yes<|im_end|>"], [f"{AGAIN}yes<|im_end|>"], ["blue<|im_end|>", "yes<|im_end|>"], [AGAIN],
    ),
    "Qwen3, tools": (
        templates.QWEN,
        [CALL[0] | {"reasoning_content": "hm"}, say("tool", "12:00"), say("assistant", "noon", reasoning_content="ok")],
        {"tools": [templates.tool("clock")]},
        f'{THOUGHT}\n<tool_call>\n{{"name": "clock", "arguments": {{"zone": "UTC"}}}}\n</tool_call><|im_end|>\n'
        f"<|im_start|>tool\n12:00<|im_end|>\n<|im_start|>assistant\n{AGAIN}noon<|im_end|>\n",
        [
            f'{THOUGHT}\n<tool_call>\n{{"name": "clock", "arguments": {{"zone": "UTC"}}}}\n</tool_call><|im_end|>',
            f"{AGAIN}noon<|im_end|>",
        ],
        [f"{AGAIN}noon<|im_end|>"],
        ['<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call><|im_end|>', "noon<|im_end|>"],
        [f"{THOUGHT}\n", AGAIN],
    ),
    "Mistral, two turns": (
        templates.MISTRAL, [bot("blue"), user("sure?"), bot("yes")], {},
        " blue</s>[INST]sure?[/INST] yes</s>", [" blue</s>", " yes</s>"], [" yes</s>"], [" blue</s>", " yes</s>"], [],
    ),
    "Mistral, tools and a question after them": (
        templates.MISTRAL, [*CALL, say("tool", "12:00"), bot("noon"), user("sure?"), bot("yes")],
        {"tools": [templates.tool("clock")]},
        # The prompt alone has the tools before this question, so the completion begins there.
        '[INST]sky?[/INST][TOOL_CALLS][{"name": "clock", "arguments": {"zone": "UTC"}}]</s>'
        '[TOOL_RESULTS]{"content": "12:00"}[/TOOL_RESULTS] noon</s>'
        '[AVAILABLE_TOOLS][{"type": "function", "function": {"name": "clock", "description": "Asks for clock.", '
        '"parameters": {"type": "object", "properties": {"zone": {"type": "string", "description": "Zone of clock."}}}}}]'
        "[/AVAILABLE_TOOLS][INST]sure?[/INST] yes</s>",
        ['[TOOL_CALLS][{"name": "clock", "arguments": {"zone": "UTC"}}]</s>', " noon</s>", " yes</s>"], [" yes</s>"],
        ['[TOOL_CALLS][{"name": "clock", "arguments": {"zone": "UTC"}}]</s>', " noon</s>", " yes</s>"], [],
    ),
    "Gemma, two turns": (
        templates.GEMMA, [bot("blue\n"), user("sure?"), bot(f"{THOUGHT}yes")], {},
        f"blue<end_of_turn>\n<start_of_turn>user\nsure?<end_of_turn>\n<start_of_turn>model\n{THOUGHT}yes<end_of_turn>\n",
        ["blue<end_of_turn>", f"{THOUGHT}yes<end_of_turn>"], [f"{THOUGHT}yes<end_of_turn>"],
        ["blue<end_of_turn>", "yes<end_of_turn>"], [THOUGHT],
    ),
    "generation markers, tools": (
        templates.MARKED, [*CALL, say("tool", "12:00"), bot(f"{THOUGHT}noon")], {},
        '<call>{"name": "clock", "arguments": {"zone": "UTC"}}</call><|im_end|>\n<|im_start|>tool\n12:00<|im_end|>\n'
        f"<|im_start|>assistant\n{THOUGHT}noon<|im_end|>\n",
        ['<call>{"name": "clock", "arguments": {"zone": "UTC"}}</call><|im_end|>', f"{THOUGHT}noon<|im_end|>"],
        [f"{THOUGHT}noon<|im_end|>"],
        ['<call>{"name": "clock", "arguments": {"zone": "UTC"}}</call><|im_end|>', "noon<|im_end|>"], [THOUGHT],
    ),
    "the prompt opens the thought": (
        templates.OPENS, [say("assistant", "blue", reasoning_content="hm")], {},
        "hm\n</think>\n\nblue<|im_end|>\n", ["hm\n</think>\n\nblue<|im_end|>"], ["hm\n</think>\n\nblue<|im_end|>"],
        ["blue<|im_end|>"], ["hm\n</think>\n\n"],
    ),
    "the prompt opens the thought, and earlier ones are dropped": (
        templates.OPENS, [bot("blue"), user("sure?"), say("assistant", "yes", reasoning_content="ok")], {},
        f"blue<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n{AGAIN}yes<|im_end|>\n",
        ["blue<|im_end|>", "ok\n</think>\n\nyes<|im_end|>"], ["ok\n</think>\n\nyes<|im_end|>"],
        ["blue<|im_end|>", "yes<|im_end|>"], ["ok\n</think>\n\n"],
    ),
    "the prompt opens the thought, and there is none": (
        templates.OPENS, [bot("blue")], {},
        "\n</think>\n\nblue<|im_end|>\n", ["\n</think>\n\nblue<|im_end|>"], ["\n</think>\n\nblue<|im_end|>"],
        ["blue<|im_end|>"], [],
    ),
    "an empty thought that begins otherwise than the prompt ends": (
        templates.OPENS.replace("'<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n'", "'<think></think>\n'"),
        [bot("blue")], {},
        "</think>\nblue<|im_end|>\n", ["</think>\nblue<|im_end|>"], ["</think>\nblue<|im_end|>"], ["blue<|im_end|>"], [],
    ),
    "no words before an answer are asked for": (
        "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}",
        [bot("blue"), user("sure?"), bot("yes")], {},
        "<s>assistant\nblue</s>\n<s>user\nsure?</s>\n<s>assistant\nyes</s>\n",
        ["blue</s>", "yes</s>"], ["yes</s>"], ["blue</s>", "yes</s>"], [],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("template", "chosen", "more", "completion", "assistant", "last_turn", "answer", "reasoning"),
                         CASES.values(), ids=CASES)  # fmt: skip
def test_which_tokens_count(template, chosen, more, completion, assistant, last_turn, answer, reasoning):
    found, flags = of_chosen(template, chosen, **more)
    assert found == [[completion], assistant, last_turn, answer, reasoning]
    assert flags == 0


def flags_of(template, chosen, **more):
    return of_chosen(template, chosen, **more)[1]


def test_turns_that_cannot_be_told_are_not_found():
    # The template writes a tool's result within the message before it.
    inside = (
        "{% for m in messages %}{% if m.role != 'tool' %}<s>{{ m.role }}\n{{ m.content }}"
        "{% if loop.nextitem is defined and loop.nextitem.role == 'tool' %}<result>{{ loop.nextitem.content }}</s>"
        "{% else %}</s>{% endif %}\n{% endif %}{% endfor %}" + templates.GENERATE
    )
    assert flags_of(inside, [bot("clock()"), say("tool", "12:00"), bot("noon")]) == TURNS_NOT_FOUND
    # The last message comes first.
    last = "<s>{{ messages[-1].content }}|{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    found, flags = of_chosen(last, [bot("blue"), user("sure?"), bot("yes")])
    assert flags == TURNS_NOT_FOUND and found[1:] == [[], [], [], []]
    # Each content is written twice, and messages begin otherwise without others.
    twice = (
        "<s>{{ messages | length }}{% for m in messages %}<s>{{ m.role }} {{ m.content }}|{{ m.content }}</s>{% endfor %}"
    )
    assert flags_of(twice, [bot("blue"), user("sure?"), bot("yes")]) == TURNS_NOT_FOUND


@pytest.mark.parametrize(
    "said",
    [
        "<think>\nnever ended",
        "ended</think> without a beginning",
        "<think>one <think>within</think> another</think> blue",
        "The tag <think> begins a thought and </think> ends it.",
        "<think>hm</think> blue</think>",
    ],
)
def test_reasoning_that_cannot_be_told_is_not_found(said):
    found, flags = of_chosen(templates.CHATML, [bot(said)])
    assert flags == REASONING_NOT_FOUND and found[1] == [f"{said}<|im_end|>"] == found[2] and found[3:] == [[], []]


def test_a_thought_of_which_no_tags_are_known_is_not_found():
    template = (
        templates.EACH
        + "{{ message.reasoning_content or '' }} / {{ message.content }}</s>\n{% endfor %}"
        + templates.GENERATE
    )
    assert flags_of(template, [say("assistant", "blue", reasoning_content="let me think")]) == REASONING_NOT_FOUND


def test_plain_text_is_one_turn():
    tokenizer, ids, pair, _ = marked(None, Preference("sky?", " blue", "<think>hm</think>\nred"))
    assert [counted(tokenizer, ids.chosen, pair.chosen, part) for part in PARTS] == [[" blue</s>"]] * 3 + [[]]
    assert counted(tokenizer, ids.rejected, pair.rejected, "answer") == ["red</s>"]
    assert counted(tokenizer, ids.rejected, pair.rejected, "reasoning") == ["<think>hm</think>\n"]
    opened = Preference("sky? <think>\n", "hm</think> blue", "red")
    tokenizer, ids, pair, found = marked(None, opened)
    assert counted(tokenizer, ids.chosen, pair.chosen, "reasoning") == ["hm</think>"]  # the space is the next token's
    assert pair.flags == REASONING_NOT_FOUND and (NO_REASONING, "rejected") in found


def test_weights_of_messages():
    said = [say("assistant", "blue", weight=0), say("user", "sure?", train=False), say("assistant", "yes", weight="0.5")]
    preference = Preference([user("sky?")], said, [say("assistant", "red", trained=True)])
    tokenizer, ids, pair, found = marked(templates.CHATML, preference)
    starts = [mark >> MARK_BITS for mark in pair.chosen.marks.tolist()] + [len(ids.chosen)]
    texts = [tokenizer.decode(ids.chosen[start:stop]) for start, stop in pairwise(starts)]
    assert list(zip(texts, pair.chosen.factors.tolist(), strict=True)) == [
        ("blue<|im_end|>", 0.0),
        ("\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n", 0.0),
        ("yes<|im_end|>", 0.5),
        ("\n", 0.5),
    ]
    assert pair.rejected.factors.tolist() == [1.0, 1.0] and not found, "nobody is warned of what is heeded"
    for value in (-1, "nan", 1e39, 10**400, [1]):
        (wrong,) = Tokeniser(tokenizer).encode_noted(
            [replace(preference, rejected=[say("assistant", "red", weight=value)])], []
        )
        assert str(wrong[0]) == "rejected has a message whose 'weight' is no number from 0 to 1,000,000 and no truth value"


SPANS = [
    # value for chosen, texts that count and their weights
    ([[0, 4]], [("blue", 1.0)]),
    ([{"start": 0, "end": 4, "weight": None, "unit": None}, [8, 10, 0.5]], [("blue", 1.0), ("it", 0.5)]),
    ([[0, 2, 2], [2, 4, 3]], [("blu", 2.0), ("e", 3.0)]),  # the second token is "lu"
    ([[0, 13]], [("blue is it 🙂x", 1.0)]),
    ([[11, 12]], [("🙂", 1.0)]),
    ([], []),
]


@pytest.mark.parametrize(("value", "wanted"), SPANS)
@pytest.mark.parametrize("kind", ["messages", "text"])
def test_spans_of_characters(value, wanted, kind):
    text = "blue is it 🙂x"
    prompt, said, other = ([user("sky?")], [bot(text)], [bot("red")]) if kind == "messages" else ("sky?", text, "red")
    preference = Preference(prompt, said, other, spans=spans_of({"chosen": value}, "s", said, other))
    tokenizer, ids, pair, _ = marked(templates.CHATML if kind == "messages" else None, preference)
    assert weighted(tokenizer, ids.chosen, pair.chosen) == wanted
    assert set(pair.rejected.factors.tolist()) == {1.0}, "a side without spans counts whole"


def weighted(tokenizer, ids, runs):
    """Texts with a factor above 0, and the factor."""
    factors = np.zeros(len(ids), np.float32)
    starts = [mark >> MARK_BITS for mark in runs.marks.tolist()] + [len(ids)]
    for (start, stop), factor in zip(pairwise(starts), runs.factors.tolist(), strict=True):
        factors[start:stop] = factor
    edges = [0, *(np.flatnonzero(np.diff(factors)) + 1).tolist(), len(ids)]
    return [(tokenizer.decode(ids[one:other]), float(factors[one])) for one, other in pairwise(edges) if factors[one]]


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ([[19, 22], {"start": 0, "end": 4, "message": 0}], [("blue", 1.0), ("yes", 1.0)]),
        ([{"start": 0, "end": 5, "message": 1}], [("sure?", 1.0)]),
        ([{"start": 0, "end": 2, "unit": "tokens", "weight": 3}], [("blu", 3.0)]),
        ([[7, 22]], [("blue\n</think>\n\nyes", 1.0)]),  # in a thought that the template writes with other white space
    ],
)
def test_spans_of_messages_and_of_tokens(value, wanted):
    said = [bot("blue"), user("sure?"), bot("<think>blue</think>yes")]
    preference = Preference([user("sky?")], said, [bot("red")], spans=spans_of({"chosen": value}, "s", said, [bot("red")]))
    tokenizer, ids, pair, _ = marked(templates.QWEN, preference)
    assert weighted(tokenizer, ids.chosen, pair.chosen) == wanted


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"chosen": [[0, 3], [2, 4]]}, "'chosen' of 's' has spans that overlap"),
        ({"chosen": [[2, 2]]}, "'chosen' of 's' has a span that is empty or begins below 0"),
        ({"rejected": [[0, 4]]}, "'rejected' of 's' has a span that ends after the text"),
        ({"chosen": [[0, 1, -1]]}, "'chosen' of 's' has a span whose weight is no number from 0 to 1,000,000"),
        ({"chosen": [[0, 1, 1e39]]}, "'chosen' of 's' has a span whose weight is no number from 0 to 1,000,000"),
        ({"chosen": [[0, 1, 10**400]]}, "'chosen' of 's' has a span whose weight is no number from 0 to 1,000,000"),
        ({"chosen": [{"start": 0, "end": 1, "unit": "tokens", "message": 0}]},
         "'chosen' of 's' has a span in tokens with a message; tokens are counted in the whole completion"),
        ({"chosen": [[0, 1.5]]}, "'chosen' of 's' has a span whose start or end is no whole number"),
        ({"chosen": [{"start": 0, "end": 1, "unit": "words"}]},
         "'chosen' of 's' has a span whose unit is neither 'characters' nor 'tokens'"),
        ({"chosen": [{"start": 0, "end": 1, "message": 3}]},
         "'chosen' of 's' has a span of a message that is not there; messages of the completion count from 0"),
        ({"chosen": [[0, 1], {"start": 0, "end": 1, "unit": "tokens"}]},
         "'chosen' of 's' counts characters in one span and tokens in another; use one unit"),
        ({"chosen": "all"}, "'chosen' of 's' is no list of spans"),
        ({"better": []}, '\'s\' is no object with lists of spans; expected {"chosen": [...], "rejected": [...]}'),
        ([[0, 1]], '\'s\' is a list beside two completions; write {"chosen": [...], "rejected": [...]}'),
        ("{", "'s' is not valid JSON"),
        ({"chosen": [{"start": 0, "end": 99, "unit": "tokens"}]}, "spans of chosen end after its last token"),
    ],
)  # fmt: skip
def test_wrong_spans_are_malformed_with_the_reason(write, value, reason):
    records = [{"prompt": f"sky {number}?", "chosen": "blue", "rejected": "red"} for number in range(3)]
    lines, sets = templates.lines_of(write, None, *records, records[0] | {"s": value}, spans_column="s", max_malformed=0.5)
    assert any(f"1 malformed records: 1 {reason} (" in line for line in lines), lines
    assert sets.train.num_rows == 3


def test_turns_and_reasoning_that_are_not_found_are_told(write):
    open_thought = {"prompt": "sky?", "chosen": "blue <think>hm", "rejected": "red"}
    settings = dict(max_dropped=0.9, max_lost=1, train_on="answer")
    record = {"prompt": "tree?", "chosen": "green", "rejected": "red"}
    lines, _ = templates.lines_of(write, None, open_thought, record, **settings)
    assert any(
        "in 1 pairs it cannot be told for certain where the reasoning begins and ends: 1 chosen" in line for line in lines
    )
    said = {"prompt": [user("sky?")], "chosen": [bot("blue"), user("sure?"), bot("yes")], "rejected": [bot("red")]}
    twice = "<s>{{ messages[-1].content }}|{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    lines, _ = templates.lines_of(write, twice, said, record, **settings)
    assert any("it cannot be told for certain where the assistant's turns begin and end: 1 chosen" in line for line in lines)


def test_a_longer_limit_is_no_remedy_where_nothing_counts(write):
    record = {"prompt": "sky?", "chosen": "blue", "rejected": "red"}
    remedy = "; change data.train_on, raise data.max_length if it cuts the tokens that count, or raise data.max_dropped"
    with pytest.raises(DataError, match=f"1 of 1 pairs would be dropped .*{remedy} if that is intended$"):
        templates.lines_of(write, None, record, train_on="reasoning")


def test_a_column_of_spans_that_changes_nothing_is_told(write):
    record = {"prompt": "sky?", "chosen": "blue", "rejected": "red", "s": {"chosen": [[0, 2]]}}
    told = "no span there makes a token count more or less"
    for column, wrong in (("s", False), ("t", True)):
        lines, _ = templates.lines_of(write, None, record, spans_column=column)
        assert any(f"data.spans_column is {column!r}, but {told}" in line for line in lines) == wrong, lines


def test_spans_of_a_text_that_is_written_twice_are_malformed(write):
    template = templates.EACH + "{{ message.content }} or {{ message.content }}</s>\n{% endfor %}" + templates.GENERATE
    records = [
        {"prompt": [user(f"sky {number}?")], "chosen": [bot("blue")], "rejected": [bot("red")]} for number in range(3)
    ]
    spanned = records[0] | {"s": json.dumps({"chosen": [[0, 2]]})}
    lines, _ = templates.lines_of(write, template, *records, spanned, spans_column="s", max_malformed=0.5, max_lost=1)
    assert any("spans of chosen cannot be placed for certain" in line for line in lines), lines
