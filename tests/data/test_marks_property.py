"""For built conversations: the tokens of the assistant's turns are what its messages say and the tokens that end them, in
order, or the pair says that they were not found."""

from __future__ import annotations

from itertools import pairwise

import templates
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from templates import say, tokenizer_for

from raydpo.data.marks import ANSWER, ASSISTANT, LAST_TURN, MARK_BITS, REASONING, REASONING_NOT_FOUND, TURNS_NOT_FOUND
from raydpo.data.messages import Malformed
from raydpo.data.preference import Preference
from raydpo.data.remarks import NO_REASONING, NO_TURNS, PROMPT_END
from raydpo.data.tokenise import Tokeniser

END = "<|im_end|>"
OPEN, CLOSE = "<think>\n", "\n</think>\n\n"


def as_it_is(message, later):
    thought = message.get("reasoning_content")
    assert thought is None
    return message["content"] + END


def qwen(message, later):
    """``later``: whether a user's message follows."""
    thought = message.get("reasoning_content", "")
    return ("" if later else OPEN + thought + CLOSE) + message["content"] + END


def opens(message, later):
    return qwen(message, later).removeprefix(OPEN)


# A template, how a turn is written, and whether it reads thoughts.
WRITTEN = {
    "ChatML": (templates.CHATML, as_it_is, False),
    "marked": (templates.MARKED, as_it_is, False),
    "Llama": (templates.LLAMA, lambda message, _: message["content"].strip() + "<|eot|>", False),
    "Mistral": (templates.MISTRAL, lambda message, _: " " + message["content"].strip() + "</s>", False),
    "Gemma": (templates.GEMMA, lambda message, _: message["content"].strip() + "<end_of_turn>", False),
    "Qwen": (templates.QWEN, qwen, True),
    "opens": (templates.OPENS, opens, True),
}
TOKENISERS = {name: Tokeniser(tokenizer_for(template)) for name, (template, _, _) in WRITTEN.items()}
TEXTS = st.text(st.sampled_from("ab \n\té🙂<>/_yes"), max_size=12).map(lambda text: f"{text}x") | st.sampled_from(
    ["x", " x", "blue\n\n", "<b>bold</b>", "a <tag> b", "天空", "x" * 40, "assistant\n", "user: x"]
)
SPICE = st.sampled_from(
    ["</s>", END, "<|im_start|>assistant\n", "<think>", "</think>", "[INST]", "<end_of_turn>\n", "<|eot|>"]
)


@st.composite
def conversations(draw, texts=TEXTS):
    name = draw(st.sampled_from(sorted(WRITTEN)))
    thinks = WRITTEN[name][2]
    sides = []
    for _ in range(2):
        said = []
        for number in range(draw(st.integers(1, 3))):
            if number:
                said.append(say("user", draw(texts)))
            thought = {"reasoning_content": f"t{number}"} if thinks and draw(st.booleans()) else {}
            said.append(say("assistant", draw(texts), **thought))
        sides.append(said)
    return name, Preference([say("user", draw(texts))], *sides)


def encoded(name, preference):
    marks = []
    ((ids, found),) = TOKENISERS[name].encode_noted([preference], marks)
    return ids, {remark.kind for remark in found}, marks[0]


def turns_of(name, ids, runs):
    """The text of each turn of the assistant."""
    starts = [mark >> MARK_BITS for mark in runs.marks.tolist()] + [len(ids)]
    turns, before = [], 0
    for start, stop, mark in zip(starts, starts[1:], runs.marks.tolist(), strict=False):
        if mark & ASSISTANT:
            turns = turns if before & ASSISTANT else [*turns, []]
            turns[-1].append(ids[start:stop])
        before = mark
    tokenizer = TOKENISERS[name].tokenizer
    return [tokenizer.decode([token for part in turn for token in part]) for turn in turns]


def expected(name, messages):
    users = [place for place, message in enumerate(messages) if message["role"] == "user"]
    said = [(message, place < max(users, default=-1)) for place, message in enumerate(messages)]
    return [WRITTEN[name][1](message, later) for message, later in said if message["role"] == "assistant"]


@given(conversations())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_turns_are_what_the_messages_say(given):
    name, preference = given
    ids, kinds, pair = encoded(name, preference)
    if isinstance(ids, Malformed):
        return
    assert not pair.flags and not kinds & {NO_TURNS, NO_REASONING}
    for side in ("chosen", "rejected"):
        runs, tokens = getattr(pair, side), getattr(ids, side)
        check_turns(name, tokens, runs, getattr(preference, side), kinds)
        check_runs(runs, tokens)


def check_turns(name, tokens, runs, messages, kinds):
    found, wanted = turns_of(name, tokens, runs), expected(name, messages)
    if PROMPT_END in kinds and wanted[0].startswith("<"):
        # The prompt alone ends with ``<think>``: a first token ``<`` is what all three texts share, and so the prompt's.
        found[0] = "<" + found[0].removeprefix("<")
    assert found == wanted


def check_runs(runs, tokens):
    marks = runs.marks.tolist()
    starts, parts = [mark >> MARK_BITS for mark in marks], [mark & (2**MARK_BITS - 1) for mark in marks]
    assert starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] < len(tokens)
    assert all(one != other for one, other in pairwise(parts)), "neighbours differ"
    for each in parts:
        assert not each & ANSWER or not each & REASONING
        assert each & ASSISTANT or not each
    assert any(each & LAST_TURN for each in parts)


@given(conversations(st.lists(TEXTS | SPICE, min_size=1, max_size=3).map("".join)))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_nothing_is_guessed_where_texts_spell_tokens_and_tags(given):
    name, preference = given
    ids, kinds, pair = encoded(name, preference)
    if isinstance(ids, Malformed):
        return
    assert bool(pair.flags & TURNS_NOT_FOUND) == (NO_TURNS in kinds)
    assert bool(pair.flags & REASONING_NOT_FOUND) == (NO_REASONING in kinds)
    for side in ("chosen", "rejected"):
        runs, tokens = getattr(pair, side), getattr(ids, side)
        if not len(runs.marks):
            assert pair.flags & TURNS_NOT_FOUND
            continue
        check_runs(runs, tokens)
        if not any("think>" in str(message) for message in getattr(preference, side)):  # which two of the templates read
            check_turns(name, tokens, runs, getattr(preference, side), kinds)
