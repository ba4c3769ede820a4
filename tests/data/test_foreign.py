"""Records of other tools are read where they say clearly what they mean, and refused in one sentence otherwise."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import bot, decoded, make_tokenizer, user

from raydpo.config import DataConfig
from raydpo.data.messages import Malformed
from raydpo.data.pairs import load_pairs
from raydpo.data.preference import normalise
from raydpo.data.tally import SourceReport
from raydpo.data.tokenise import Tokeniser
from raydpo.errors import DataError


def human(value):
    return {"from": "human", "value": value}


def gpt(value):
    return {"from": "gpt", "value": value}


Q, GOOD, BAD = [user("q")], [bot("good")], [bot("bad")]
CHAT = {
    "messages beside answers": ({"messages": Q, "chosen": GOOD, "rejected": BAD}, "'messages' read as the prompt"),
    "messages beside single messages": (
        {"messages": Q, "chosen": bot("good"), "rejected": bot("bad")},
        "'messages' read as the prompt",
    ),
    "messages beside texts": ({"messages": Q, "chosen": "good", "rejected": "bad"}, "'messages' read as the prompt"),
    "messages with the better answer": (
        {"messages": Q + GOOD, "chosen": "good", "rejected": "bad"},
        "'messages' without its last message, which is chosen, read as the prompt",
    ),
    "rejected_response": (
        {"messages": Q + GOOD, "rejected_response": "bad"},
        "the last message of 'messages' read as chosen, 'rejected_response' as rejected",
    ),
    "rejected_response as a message": (
        {"messages": Q + GOOD, "rejected_response": bot("bad")},
        "'rejected_response' as rejected",
    ),
    "rejected_messages": ({"messages": Q + GOOD, "rejected_messages": Q + BAD}, "'rejected_messages' as rejected"),
    "messages, response": ({"messages": Q, "response": "good", "rejected_response": "bad"}, "'response' as chosen"),
    "from and value": (
        {"prompt": [human("q")], "chosen": [gpt("good")], "rejected": gpt("bad")},
        "messages with 'from' and 'value' read as 'role' and 'content'",
    ),
    "conversations": (
        {"conversations": [human("q")], "chosen": gpt("good"), "rejected": gpt("bad")},
        "'conversations' read as the prompt",
    ),
    "whole conversations of from and value": (
        {"chosen": [human("q"), gpt("good")], "rejected": [human("q"), gpt("bad")]},
        "messages with 'from' and 'value' read as 'role' and 'content'",
    ),
    "other roles": (
        {"prompt": [{"role": "Human", "content": "q"}], "chosen": [{"role": "AI", "content": "good"}], "rejected": "bad"},
        "role 'AI' read as 'assistant'",
    ),
    "JSON text": (
        {"prompt": json.dumps(Q), "chosen": json.dumps(GOOD), "rejected": json.dumps(BAD)},
        "text that is a list of messages, as JSON or Python writes it",
    ),
    "JSON text of single messages": (
        {"prompt": "q", "chosen": json.dumps(bot("good")), "rejected": json.dumps(bot("bad"))},
        "text that is a list of messages, as JSON or Python writes it",
    ),
    "whole conversations as JSON text": (
        {"prompt": "q", "chosen": json.dumps(Q + GOOD), "rejected": json.dumps(Q + BAD)},
        "text that is a list of messages, as JSON or Python writes it",
    ),
    "JSON text without a prompt": (
        {"chosen": json.dumps(Q + GOOD), "rejected": json.dumps(Q + BAD)},
        "text that is a list of messages, as JSON or Python writes it",
    ),
    "JSON text twice": (
        {"prompt": json.dumps(json.dumps(Q)), "chosen": json.dumps(GOOD), "rejected": json.dumps(BAD)},
        "text that is a list of messages, as JSON or Python writes it",
    ),
    "JSON text of one answer": (
        {"prompt": Q, "chosen": json.dumps(GOOD), "rejected": "bad"},
        "text that is a list of messages, as JSON or Python writes it",
    ),
    "as Python prints it": (
        {"prompt": str(Q), "chosen": str(GOOD), "rejected": str(BAD)},
        "text that is a list of messages, as JSON or Python writes it",
    ),
    "JSON text of from and value": (
        {"prompt": json.dumps([human("q")]), "chosen": "good", "rejected": "bad"},
        "messages with 'from' and 'value' read as 'role' and 'content'",
    ),
    "a preferred response": (
        {"context": Q, "response1": "good", "response2": "bad", "overall_preference": -2},
        "'overall_preference' prefers 'response1' or 'response2' (below 0: response1)",
    ),
    "whole conversations and a winner": (
        {"conversation_a": Q + BAD, "conversation_b": Q + GOOD, "winner": "model_b"},
        "'winner' prefers 'conversation_a' or 'conversation_b'",
    ),
    "context of another meaning": ({"context": "A text.", "chosen": Q + GOOD, "rejected": Q + BAD}, "'context' is not read"),
}
TEXT = {
    "answers with ranks": (
        {"prompt": "q", "answers": [{"answer": "bad", "rank": 2.0}, {"answer": "good", "rank": 1.0}]},
        "'answers' with ranks read as completions",
    ),
    "answers as an object of lists": (
        {"prompt": "q", "answers": {"answer": ["bad", "good"], "rank": [2, 1]}},
        "'answers' with ranks read as completions",
    ),
    "overall_score": (
        {
            "instruction": "q",
            "completions": [{"response": "bad", "overall_score": 1}, {"response": "good", "overall_score": 8.5}],
        },
        "'overall_score' of completions read as scores",
    ),
    "history and labels": (
        {"history": "q", "human_ref_A": "bad", "human_ref_B": "good", "labels": 0},
        "'labels' prefers 'human_ref_A' or 'human_ref_B' (1: human_ref_A, 0: human_ref_B)",
    ),
    "response_2 is better": (
        {"prompt": "q", "response_1": "bad", "response_2": "good", "preference_strength": 3},
        "'preference_strength' prefers 'response_1' or 'response_2'",
    ),
    "query and response": (
        {"query": "q", "response": "good", "rejected_response": "bad"},
        "'response' read as chosen, 'rejected_response' as rejected",
    ),
    "question": ({"question": "q", "chosen": "good", "rejected": "bad"}, "'question' read as the prompt"),
    "completions beside a pair": (
        {
            "prompt": "q",
            "chosen": "good",
            "rejected": "bad",
            "completions": [{"response": "good", "score": 1}, {"response": "bad", "score": 4}],
        },
        "chosen and rejected read, not 'completions' beside them",
    ),
    "completions without ranks beside a pair": (
        {"prompt": "q", "chosen": "good", "rejected": "bad", "completions": ["good", "bad"]},
        "chosen and rejected read, not 'completions' beside them",
    ),
}


@pytest.mark.parametrize("record, note", [*CHAT.values(), *TEXT.values()], ids=[*CHAT, *TEXT])
def test_a_form_of_another_tool_is_read_and_told(record, note):
    (preference,) = normalise(record)
    said = (preference.prompt, preference.chosen, preference.rejected)
    assert said == ((Q, GOOD, BAD) if preference.conversational else ("q", "good", "bad"))
    assert any(note in each for each in preference.notes), preference.notes


def test_the_plain_forms_need_no_note():
    for record in (
        {"prompt": "q", "chosen": "good", "rejected": "bad", "score": 1.0, "tools": None},
        {"prompt": Q, "chosen": GOOD, "rejected": BAD, "images": [], "system": ""},
        {"chosen": Q + GOOD, "rejected": Q + BAD},
        {"prompt": "q", "completions": ["good", "bad"], "scores": [2, 1]},
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
    ):
        (preference,) = normalise(record)
        assert (preference.notes, preference.unused) == ((), ())


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"prompt": "p", "response": "a", "label": True}, r"one answer with a label \('response', 'label'\)"),
        ({"prompt": "p", "completion": "a"}, "one answer, and neither another to compare it with nor a label"),
        (
            {"prompt": "p", "good": "a", "bad": "b"},
            "missing column 'chosen', nearest forms: prompt .* found 'prompt', 'good', 'bad'",
        ),
        (
            {"prompt": "p", "chosen_response": "a", "rejected_response": "b", "chosen_text": "a", "rejected_text": "b"},
            "each of 'chosen_response', 'chosen_text' may be the chosen answer",
        ),
        ({"data": [{"prompt": "p", "chosen": "a", "rejected": "b"}]}, "only column 'data' holds a list of records"),
        ({"prompt": "p", "chosen": "a"}, "missing column 'rejected', nearest forms: .*; found 'prompt', 'chosen'"),
        ({"prompt": "p", "response_a": "a", "response_b": "b"}, "missing column 'chosen', nearest forms: .* or .*; found"),
        ({"prompt": "p", "answers": ["a", "b"]}, "nearest forms: .*answers"),
        ({"prompt": "p", "response1": "a", "response2": "b", "overall_preference": 0}, "are alike .a tie., so no"),
        ({"history": "p", "human_ref_A": "a", "human_ref_B": "b", "labels": 7}, "'labels' is neither 0 nor 1"),
        ({"conversation_a": Q + GOOD, "conversation_b": Q + BAD, "winner": "tie"}, "are alike .a tie., so no"),
        (
            {"context": "t", "question": "q", "chosen": "a", "rejected": "b"},
            "each of 'context', 'question' may be the prompt",
        ),
        (
            {"ask": "Who is it?", "chosen": "It is I.", "rejected": "It is a dog."},
            "missing column 'prompt', but 'ask' may be it",
        ),
        ({"messages": Q, "rejected_response": "b"}, "the last message of messages is not the assistant's"),
    ],
)
def test_what_is_not_clear_is_refused_in_one_sentence(record, reason):
    with pytest.raises(Malformed, match=reason) as caught:
        normalise(record)
    assert len(str(caught.value)) <= 250


MEDIA = [
    {"prompt": "p", "chosen": "a", "rejected": "b", "images": ["x.png"]},
    {"prompt": "p", "chosen": "a", "rejected": "b", "image": {"bytes": b"x", "path": None}},
    {"prompt": "p", "chosen": "a", "rejected": "b", "photo_of_it": {"bytes": b"x", "path": None}},
    {"prompt": "p", "chosen": "a", "rejected": "b", "photo_of_it": [{"path": "x.png"}]},
    {"prompt": "p", "chosen": "a", "rejected": "b", "Video": "x.mp4"},
    {"prompt": "p", "chosen": "a", "rejected": "b", "audio": {"array": [0.1], "sampling_rate": 1}},
    *(
        {"prompt": [user([part, {"type": "text", "text": "q"}])], "chosen": GOOD, "rejected": BAD}
        for part in (
            {"type": "image", "image": "x.png"},
            {"type": "image"},
            {"type": "image_url", "image_url": {"url": "http://x"}},
            {"image": "x.png"},
            {"type": "input_audio", "input_audio": {"data": "x"}},
            {"type": "video", "video": "x.mp4"},
        )
    ),
    {"prompt": Q, "chosen": [bot([{"type": "image", "image": "x"}])], "rejected": BAD},
    {"prompt": [user("q") | {"images": ["x"]}], "chosen": GOOD, "rejected": BAD},
    {"prompt": json.dumps([user([{"type": "image", "image": "x"}])]), "chosen": "a", "rejected": "b"},
]


@pytest.mark.parametrize("record", MEDIA, ids=str)
def test_images_audio_and_video_are_refused(record):
    with pytest.raises(Malformed, match=r"(holds|with) (an image|audio|a video|a file).*, and only text is read"):
        normalise(record)


@pytest.mark.parametrize("written", [lambda said: said, json.dumps, lambda said: json.dumps({"messages": said}), str])
def test_whole_conversations_as_text_beside_a_text_prompt(written):
    """One of both may be a list of messages already."""
    for chosen, rejected in ((written(Q + GOOD), written(Q + BAD)), (Q + GOOD, written(Q + BAD))):
        (preference,) = normalise({"prompt": "q", "chosen": chosen, "rejected": rejected})
        assert (preference.prompt, preference.chosen, preference.rejected) == (Q, GOOD, BAD)
    (preference,) = normalise({"prompt": Q, "chosen": GOOD, "rejected": written(BAD)})
    assert (preference.prompt, preference.chosen, preference.rejected) == (Q, GOOD, BAD)
    with pytest.raises(Malformed, match="text that the messages of chosen and rejected do not share"):
        normalise({"prompt": "Something else.", "chosen": written(Q + GOOD), "rejected": written(Q + BAD)})


def test_text_that_looks_like_messages_and_is_none_is_warned_of():
    lines = ["\n".join(map(json.dumps, Q + said)) for said in (GOOD, BAD)]
    wrapped = [json.dumps({"id": 1, "messages": Q + said}) for said in (GOOD, BAD)]
    for chosen, rejected in (lines, wrapped):
        (preference,) = normalise({"prompt": "q", "chosen": chosen, "rejected": rejected})
        assert preference.chosen == chosen
        assert preference.notes[0].startswith("warning: chosen and rejected look like JSON text of messages, but are read")
    (plain,) = normalise({"prompt": "q", "chosen": "[1, 2]", "rejected": '{"a": 1}'})
    assert plain.notes == ("the answers are JSON or Python literals, read as text with all signs",)


def test_instruction_and_input_are_joined():
    (preference,) = normalise({"instruction": "Translate.", "input": "dog", "chosen": "Hund", "rejected": "Katze"})
    assert preference.prompt == "Translate.\ndog"
    (alone,) = normalise({"instruction": "Translate.", "input": "", "chosen": "Hund", "rejected": "Katze"})
    assert alone.prompt == "Translate."


def test_json_text_of_one_answer_to_a_text_is_warned_of():
    (preference,) = normalise({"prompt": "q", "chosen": "Done.", "rejected": json.dumps(BAD)})
    assert preference.prompt == "q" and preference.notes[0].startswith(
        "warning: only one of chosen and rejected is JSON text"
    )


def test_tools_as_texts():
    tool = {"type": "function", "function": {"name": "f"}}
    (preference,) = normalise({"prompt": Q, "chosen": GOOD, "rejected": BAD, "tools": [json.dumps(tool), tool]})
    assert preference.tools == [tool, tool]
    with pytest.raises(Malformed, match="a tool is not valid JSON"):
        normalise({"prompt": Q, "chosen": GOOD, "rejected": BAD, "tools": ["{"]})


def test_roles_that_are_calls_are_tool_calls():
    arguments = {"zone": "Oslo"}
    call = {"type": "function", "function": {"name": "clock", "arguments": arguments}}
    for written in (json.dumps({"name": "clock", "arguments": arguments}), {"name": "clock", "arguments": arguments}):
        said = [{"from": "function_call", "value": written}, {"from": "observation", "value": "nine"}]
        (preference,) = normalise({"prompt": [human("q"), *said], "chosen": "good", "rejected": "bad"})
        assert preference.prompt[1:] == [bot("") | {"tool_calls": [call]}, {"role": "tool", "content": "nine"}]
        assert "role 'function_call' read as tool calls of the assistant" in preference.notes
    two = json.dumps([{"name": "clock"}, {"name": "watch"}])
    (preference,) = normalise({"prompt": Q, "chosen": [{"role": "tool_call", "content": two}], "rejected": "bad"})
    assert [call["function"]["name"] for call in preference.chosen[0]["tool_calls"]] == ["clock", "watch"]
    for odd in ("clock()", "[]", "{}", None):
        with pytest.raises(Malformed, match="chosen has a message of role 'tool_call' that is not JSON of a call"):
            normalise({"prompt": Q, "chosen": [{"role": "tool_call", "content": odd}], "rejected": "bad"})


def test_functions_are_tools_of_the_older_form():
    function = {"name": "clock", "parameters": {"type": "object"}}
    for functions in ([function], json.dumps([function])):
        (preference,) = normalise({"prompt": Q, "chosen": GOOD, "rejected": BAD, "functions": functions})
        assert preference.tools == [{"type": "function", "function": function}]
        assert (preference.notes, preference.unused) == (("'functions' read as tools",), ())
    for functions in (["sales", "law"], "sales", {"sales": 1}):
        (other,) = normalise({"prompt": Q, "chosen": GOOD, "rejected": BAD, "functions": functions})
        assert (other.tools, other.notes, other.unused) == (None, (), ("functions",))


def test_fields_of_parts_that_are_null_are_absent():
    (preference,) = normalise(
        {"prompt": [user([{"type": "text", "text": "q", "image": None}])], "chosen": GOOD, "rejected": BAD}
    )
    assert preference.prompt == [user([{"type": "text", "text": "q"}])]


def test_an_answer_of_empty_parts_is_empty():
    with pytest.raises(Malformed, match="chosen is empty"):
        normalise({"prompt": Q, "chosen": [bot([{"type": "text", "text": " "}])], "rejected": BAD})


def test_readings_are_counted_by_source(write):
    records = [CHAT["messages beside texts"][0] | {"topic": "x", "id": str(number)} for number in range(3)]
    _, lines = decoded(write, [*records, {"prompt": "p", "chosen": " a", "rejected": " b"}])
    assert lines[:3] == [
        "data prefs: 4 records, 4 pairs kept, 2 exact duplicates kept",
        "data prefs: 3 records: 'messages' read as the prompt",
        "data prefs: columns not read (records): 'topic' (3), 'id' (3)",
    ]


def test_empty_text_prompt_needs_a_tokenizer_that_begins_with_a_token(write):
    from tokenizers import processors

    record = {"prompt": "", "chosen": "the sky", "rejected": "grass"}
    with pytest.raises(DataError, match="1 prompt is empty"):
        decoded(write, [record])
    tokenizer = make_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    (row,) = load_pairs(DataConfig(train=write([record])), Tokeniser(tokenizer)).train.to_pylist()
    assert row["prompt_ids"] == [1] and tokenizer.decode(row["chosen_ids"]) == "the sky</s>"


NAMES = [
    "prompt",
    "chosen",
    "rejected",
    "messages",
    "completions",
    "answers",
    "scores",
    "label",
    "system",
    "context",
    "input",
    "tools",
]
NAMES += [
    "question",
    "rejected_response",
    "response1",
    "response2",
    "overall_preference",
    "images",
    "history",
    "conversations",
    "response_0",
    "response_1",
    "better_response_id",
    "preference",
    "score_0",
    "score_1",
    "chosen_text",
    "rejected_text",
    "functions",
]
TEXTS = st.text(max_size=6) | st.sampled_from(
    ["\n\nHuman: a\n\nAssistant: b", "[{", '["a"]', '[{"role": "user", "content": "q"}]']
)
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "human", "x"]) | st.none() | st.integers(),
        "content": TEXTS | st.none() | st.lists(st.fixed_dictionaries({"text": TEXTS}) | TEXTS, max_size=2),
        "from": st.sampled_from(["human", "gpt"]) | st.none(),
        "value": TEXTS | st.integers(),
        "rank": st.integers(0, 3),
        "function_call": st.fixed_dictionaries({}, optional={"name": TEXTS, "arguments": TEXTS}) | TEXTS,
    },
)
ANYTHING = (
    TEXTS | st.integers(-2, 2) | st.booleans() | st.none() | MESSAGE | st.lists(MESSAGE | TEXTS | st.integers(), max_size=3)
)


@settings(max_examples=250, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), ANYTHING, max_size=6))
def test_any_record_is_read_or_refused(record):
    try:
        found = normalise(record)
    except Malformed as error:
        assert 0 < len(str(error)) <= 250
        return
    for preference in found:
        parts = (preference.prompt, preference.chosen, preference.rejected)
        assert {type(part) for part in parts} in ({str}, {list})
        assert preference.chosen != preference.rejected


def test_an_object_of_lists_is_a_list_of_messages():
    listed = {"role": ["user", "assistant"], "content": ["q", "good"]}
    other = listed | {"content": ["q", "bad"]}
    for record in (
        {"prompt": {"role": ["user"], "content": ["q"]}, "chosen": GOOD, "rejected": BAD},
        {"chosen": listed, "rejected": other},
        {"prompt": Q, "chosen": {"from": ["gpt"], "value": ["good"]}, "rejected": BAD},
    ):
        (preference,) = normalise(record)
        assert (preference.prompt, preference.chosen, preference.rejected) == (Q, GOOD, BAD)
        assert "objects with lists of roles and contents read as lists of messages" in preference.notes


def test_from_and_content():
    (preference,) = normalise({"prompt": [{"from": "human", "content": "q"}], "chosen": GOOD, "rejected": BAD})
    assert (preference.prompt, preference.unused) == (Q, ())
    assert preference.notes == ("messages with 'from' and 'value' read as 'role' and 'content'",)


def test_preferred_output():
    tool = {"type": "function", "function": {"name": "clock"}}
    record = {"input": {"messages": Q, "tools": [tool]}, "preferred_output": GOOD, "non_preferred_output": BAD}
    (preference,) = normalise(record)
    assert (preference.prompt, preference.chosen, preference.rejected, preference.tools) == (Q, GOOD, BAD, [tool])
    assert preference.notes[0].startswith("'messages' of 'input' read as the prompt, 'preferred_output' as chosen")
    (pair,) = normalise({"instruction": "q", "input": "", "output": ["good", "bad"]})
    assert (pair.prompt, pair.chosen, pair.rejected) == ("q", "good", "bad")
    assert "the first of 'output' read as chosen, the second as rejected" in pair.notes


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"messages": Q + GOOD}, "one answer, and neither another .* nor a label: .*; found 'messages'"),
        ({"prompt": Q, "chosen": [bot({"a": 1})], "rejected": BAD}, "chosen has a message whose content is an object"),
        ({"prompt": Q, "chosen": [bot(5)], "rejected": BAD}, "chosen has a message whose content is a number"),
        ({"prompt": "q", "completions": [{"text": "a", "score": 1}, {"text": "b", "score": None}]}, "1 of 2 .* no 'score'"),
        ({"prompt": "q", "completions": [{"text": "a", "stars": 1}, {"text": "b"}]}, "their fields are 'text', 'stars'"),
        (
            {"contents": Q, "completions": [{"text": "a", "score": 1}]},
            "missing column 'prompt', .*; found 'contents', 'comp",
        ),
        ({"prompt": "q", "response_a": "a", "response_b": "b", "winner": "1"}, "'winner' is '1', which names neither"),
        ({"prompt": Q, "chosen": [bot("") | {"tool_calls": "f()"}], "rejected": BAD}, "tool_calls are text that is not a"),
    ],
)
def test_what_is_missing_is_named(record, reason):
    with pytest.raises(Malformed, match=reason):
        normalise(record)


def test_tool_calls_in_json_text():
    call = {"type": "function", "function": {"name": "clock", "arguments": {}}}
    chosen = [bot("") | {"tool_calls": json.dumps([call])}]
    (preference,) = normalise({"prompt": Q, "chosen": chosen, "rejected": BAD})
    assert preference.chosen[0]["tool_calls"] == [call]


def test_ranks_that_scores_contradict_are_warned_of():
    record = {"prompt": "q", "completions": ["good", "bad"], "ranks": [1, 2], "scores": [1, 5]}
    (preference,) = normalise(record)
    assert preference.chosen == "good" and preference.notes[0].startswith("warning: 'ranks' read, though 'scores' say other")
    assert normalise(record | {"scores": [5, 1]})[0].notes == ()


def test_a_sign_that_no_record_has_is_warned_of():
    report = SourceReport("a", "a.jsonl", records=3)
    record = {"prompt": "q", "response1": "a", "response2": "b"}
    for value in (1, 5, 7):
        report.understood.update(normalise(record | {"overall_preference": value})[0].notes)
    (line,) = (line for line in report.lines() if line.startswith("warning"))
    assert "'overall_preference' is below 0 in none of 3 records, so the second answer is always chosen" in line
    report.understood.update(normalise(record | {"overall_preference": -1})[0].notes)
    assert not any(line.startswith("warning") for line in report.lines())
