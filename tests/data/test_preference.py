import pytest
from samples import bot, user

from raydpo.data.messages import Malformed
from raydpo.data.preference import normalise

CHAT = {"prompt": [user("q")], "chosen": [bot("good")], "rejected": [bot("bad")]}
RANKED = {"chosen": None, "rejected": None}


@pytest.mark.parametrize(
    "record",
    [
        CHAT,
        {"prompt": [user("q")], "chosen": "good", "rejected": "bad"},
        {"chosen": [user("q"), bot("good")], "rejected": [user("q"), bot("bad")]},
        {"prompt": "q", "chosen": [user("q"), bot("good")], "rejected": [user("q"), bot("bad")]},
        {"prompt": "q", "chosen": [bot("good")], "rejected": [bot("bad")]},
        {"prompt": [user("q")], "chosen": [user("q"), bot("good")], "rejected": [user("q"), bot("bad")]},
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
        {"prompt": [user("q") | {"name": None, "tool_calls": None}], "chosen": "good", "rejected": "bad", "tools": None},
        {
            "context": [user("q")],
            "completions": [{"completion": [bot("bad")], "rank": 1}, {"completion": "good", "rank": 0}],
        },
        {"prompt": [user("q")], "completions": ["bad", "good"], "scores": [0.1, 0.9]},
        {"prompt": [user("q")], "completions": [bot("bad"), bot("good")], "ranks": [2, 1]},
        {"prompt": [user("q")], "completions": [{"response": "bad", "score": -3}, {"response": "good", "score": "4.5"}]},
    ],
    ids=lambda record: "+".join(record),
)
def test_every_format_says_the_same(record):
    (preference,) = normalise(record)
    assert (preference.prompt, preference.chosen, preference.rejected) == (CHAT["prompt"], CHAT["chosen"], CHAT["rejected"])
    assert preference.conversational and preference.tools is None and preference.template_kwargs == {}


def test_text_stays_text():
    (preference,) = normalise({"prompt": "p", "chosen": "c", "rejected": "r", "other": 1})
    assert (preference.prompt, preference.chosen, preference.rejected) == ("p", "c", "r")
    assert not preference.conversational


def test_transcript_of_several_turns():
    shared = "\n\nHuman: a\n\nAssistant: b\nb\n\nHuman: c\n\nAssistant:"
    (preference,) = normalise({"chosen": shared + " one", "rejected": shared + " two"})
    assert preference.prompt == [user("a"), bot("b\nb"), user("c")]
    assert (preference.chosen, preference.rejected) == ([bot("one")], [bot("two")])
    assert not preference.several_turns


def test_what_follows_the_common_turns_of_a_transcript_is_one_answer():
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    quoted = " Here:\n\nHuman: Hello?\n\nAssistant: Hello!"
    (preference,) = normalise({"chosen": start + quoted, "rejected": start + " No."})
    assert preference.prompt == [user("a"), bot("b"), user("c")]
    assert (preference.chosen, preference.rejected) == ([bot(quoted.strip())], [bot("No.")])
    assert preference.texts == (start, quoted, " No.")


def test_quoted_turns_that_both_answers_begin_with():
    start = "\n\nHuman: a\n\nAssistant:"
    (preference,) = normalise({"chosen": start + " b\n\nHuman: c", "rejected": start + " b\n\nHuman: d"})
    assert preference.prompt == [user("a")] and preference.chosen == [bot("b\n\nHuman: c")]
    with pytest.raises(Malformed, match="rejected is empty"):
        normalise({"chosen": start + " b\n\nHuman: c\n\nAssistant: d", "rejected": start + " b\n\nHuman: c"})


def test_a_transcript_that_begins_the_other():
    start = "\n\nHuman: a\n\nAssistant: b"
    (preference,) = normalise({"chosen": start, "rejected": start + "\n\nHuman: c\n\nAssistant: d"})
    assert (preference.prompt, preference.chosen) == ([user("a")], [bot("b")])
    assert preference.rejected == [bot("b\n\nHuman: c\n\nAssistant: d")]


def test_transcripts_beside_what_the_human_said():
    start = "\n\nHuman: q\n\nAssistant:"
    (preference,) = normalise({"prompt": "q", "chosen": start + " good", "rejected": start + " bad"})
    assert (preference.prompt, preference.chosen, preference.rejected) == (CHAT["prompt"], CHAT["chosen"], CHAT["rejected"])


def test_answer_that_differs_early_keeps_its_later_turns():
    (preference,) = normalise({"chosen": [user("a"), bot("x"), user("b"), bot("y")], "rejected": [user("a"), bot("z")]})
    assert preference.chosen == [bot("x"), user("b"), bot("y")]
    assert preference.several_turns


def test_answer_that_begins_the_other():
    (preference,) = normalise({"chosen": [user("a"), bot("x")], "rejected": [user("a"), bot("x"), user("b"), bot("y")]})
    assert (preference.prompt, preference.chosen) == ([user("a")], [bot("x")])


def test_ranked_completions_give_all_strict_pairs_best_first():
    pairs = normalise({"prompt": "p", "completions": ["d", "a", "b", "c"], "ranks": [3, 1, 2, 2]})
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("a", "b"), ("a", "c"), ("a", "d"), ("b", "d"), ("c", "d")]


def test_equal_completions_of_different_score_are_no_pair():
    pairs = normalise({"prompt": "p", "completions": ["a", "a", "b"], "scores": [3, 2, 1]})
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("a", "b"), ("a", "b")]


@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]'])
def test_tools_and_template_arguments(tools):
    (preference,) = normalise(CHAT | {"tools": tools, "chat_template_kwargs": '{"thinking": false}'})
    assert preference.tools == [{"name": "f"}]
    assert preference.template_kwargs == {"thinking": False}


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"rejected": None}, "missing column 'rejected'"),
        ({"chosen": None}, "missing column 'chosen'"),
        ({"chosen": ""}, "chosen is empty"),
        ({"rejected": " \n"}, "rejected is empty"),
        ({"chosen": []}, "chosen is empty"),
        ({"chosen": [bot("bad")]}, "chosen equals rejected"),
        ({"prompt": 5}, "prompt is neither text nor messages"),
        ({"chosen": 5}, "chosen is neither text nor messages"),
        ({"prompt": ["q"]}, "prompt is neither text nor messages"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [user(" \n")]}, "prompt is empty"),
        ({"prompt": None, "chosen": [user(""), bot("a")], "rejected": [user(""), bot("b")]}, "prompt is empty"),
        ({"prompt": [user("q"), bot("a")]}, "the last message of prompt is the assistant's"),
        ({"prompt": [{"role": "critic", "content": "q"}]}, "whose role is none of system, developer, user, .* but 'critic'"),
        ({"prompt": [{"speaker": "human", "said": "q"}]}, "whose role is none of .*: it has the fields 'said', 'speaker'"),
        ({"prompt": [{"role": "user"}]}, "prompt has a message without content"),
        ({"prompt": [user({"text": "q"})]}, "prompt has a message whose content is an object"),
        ({"chosen": [user("a"), bot("b")]}, "do not begin with the assistant"),
        ({"tools": "[1"}, "tools is not valid JSON"),
        ({"tools": '{"a": 1}'}, "tools is not a JSON list"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "must not set 'chat_template'"),
        ({"prompt": None}, "have no prompt in common"),
        ({"prompt": None, "chosen": "c", "rejected": "r"}, "missing column 'prompt'"),
        ({"prompt": "other", "chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")]}, "do not share"),
        (
            {"prompt": None, "chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: b"},
            "chosen is e",
        ),
        (
            {"prompt": None, "chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: y"},
            "in common",
        ),
        (RANKED | {"completions": 5}, "not a list of two"),
        (RANKED | {"completions": ["a"]}, "not a list of two"),
        (RANKED | {"completions": ["a", "b"]}, "neither ranks nor scores"),
        (RANKED | {"completions": ["a", "b"], "scores": [1]}, "completions and scores differ in number"),
        (RANKED | {"completions": ["a", "b"], "scores": [1, None]}, "scores are not all numbers"),
        (RANKED | {"completions": ["a", "b"], "ranks": [True, False]}, "ranks are truth values"),
        (
            RANKED | {"completions": [{"messages": [bot("a")], "score": 2}, {"text": "b", "score": 1}]},
            "1 of 2 completions have none of the fields 'completion', 'response', 'content' with an answer; their fields "
            "are 'messages', 'score'",
        ),
        (RANKED | {"completions": ["a", "b"], "scores": [1, float("nan")]}, "scores are not all numbers"),
        (RANKED | {"completions": ["a", "b"], "ranks": [1, 1]}, "no completion is better"),
        (RANKED | {"completions": [{"rank": 1}, {"completion": "b", "rank": 2}]}, "1 of 2 completions have none of the fie"),
        (RANKED | {"completions": ["a", "b"], "ranks": [1, 2], "prompt": None}, "missing column 'prompt'"),
    ],
)
def test_malformed_records_say_why(change, reason):
    with pytest.raises(Malformed, match=reason):
        normalise(CHAT | change)
