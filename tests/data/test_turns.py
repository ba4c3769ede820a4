"""Conversations with turns, tools and reasoning in the forms that people have them, given to templates of many kinds."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import templates
from samples import user
from templates import PROMPT, answer, calling, lines_of, noted, record, say, tokenizer_for, tool

from raydpo.data import marks, remarks
from raydpo.data.messages import Malformed
from raydpo.data.preference import normalise
from raydpo.data.tokenise import Tokeniser

REJECTED = answer("No idea.")
RESULT = say("tool", "Noon.", tool_call_id="call00001", name="clock")
CALL = {"type": "function", "id": "call00001", "function": {"name": "clock", "arguments": {"zone": "Oslo"}}}
FINAL = say("assistant", "It is noon.")
TEMPLATES = {
    name: value for name, value in vars(templates).items() if name.isupper() and isinstance(value, str) and "endfor" in value
}


def read(template: str, record: dict):
    """Prompt, chosen and rejected of a record as text of what the model reads, or the reason; and remarks."""
    tokeniser = Tokeniser(tokenizer_for(template))
    try:
        ((ids, found),) = tokeniser.encode_noted(normalise(record))
    except Malformed as error:
        return str(error), []
    if isinstance(ids, Malformed):
        return str(ids), found
    return tuple(tokeniser.tokenizer.decode(part.tolist()) for part in ids), found


def with_tools(chosen: list[dict], **more) -> dict:
    return record(PROMPT, chosen, REJECTED, tools=[tool("clock")]) | more


def called(**more) -> dict:
    return {"role": "assistant", "content": "", "tool_calls": [CALL]} | more


def without(entry: dict, *names: str) -> dict:
    return {name: value for name, value in entry.items() if name not in names}


# -- one conversation in several forms ---------------------------------------------------------------------------------

ANY_CALLS = ("QWEN", "STRICT", "HARMONY", "CALLS", "DEEPSEEK")
FORMS = {
    "arguments as text": [called(tool_calls=[CALL | {"function": {"name": "clock", "arguments": '{"zone": "Oslo"}'}}])],
    "calls as text": [called(tool_calls=json.dumps([CALL]))],
    "a bare call": [called(tool_calls=[{"id": "call00001", "name": "clock", "arguments": {"zone": "Oslo"}}])],
    "no content": [without(called(), "content")],
    "null content": [called(content=None)],
}


@pytest.mark.parametrize("template", ANY_CALLS)
@pytest.mark.parametrize("form", FORMS)
def test_a_call_in_another_form_is_the_same_call(template, form):
    plain, _ = read(TEMPLATES[template], with_tools([called(), RESULT, FINAL]))
    found, _ = read(TEMPLATES[template], with_tools([*FORMS[form], RESULT, FINAL]))
    assert isinstance(plain, tuple)
    assert found == plain


@pytest.mark.parametrize("form", ["no content", "null content"])
def test_a_call_without_content_gets_an_empty_one_where_the_template_needs_it(form):
    template = templates.CALLS.replace("message.content or ''", "message.content + ''")
    plain, _ = read(template, with_tools([called(), RESULT, FINAL]))
    assert read(template, with_tools([*FORMS[form], RESULT, FINAL]))[0] == plain
    assert "[clock " in plain[1]


@pytest.mark.parametrize("arguments", [None, "", " ", "{}"])
@pytest.mark.parametrize("template", ANY_CALLS)
def test_a_call_without_arguments_has_an_empty_object(template, arguments):
    plain, _ = read(TEMPLATES[template], with_tools(calling("clock", {})))
    found, _ = read(TEMPLATES[template], with_tools(calling("clock") if arguments is None else calling("clock", arguments)))
    call = CALL | {"function": {"name": "clock", "arguments": arguments}}
    given, _ = read(TEMPLATES[template], with_tools([called(tool_calls=[call | {"id": "c1"}])]))
    assert found == given == plain


@pytest.mark.parametrize("nothing", [[], None, ""])
@pytest.mark.parametrize("template", ["HARMONY", "STRICT", "LLAMA", "QWEN"])
def test_an_empty_list_of_calls_is_none(template, nothing):
    plain, _ = read(TEMPLATES[template], record(PROMPT, answer("Noon."), REJECTED))
    assert read(TEMPLATES[template], record(PROMPT, answer("Noon.", tool_calls=nothing), REJECTED))[0] == plain


@pytest.mark.parametrize("role", ["ipython", "environment", "observation", "tool_response"])
def test_results_of_any_role_are_results_where_the_template_takes_one_role(role):
    plain, _ = read(templates.HARMONY, with_tools([called(), RESULT, FINAL]))
    found, notes = read(templates.HARMONY, with_tools([called(), RESULT | {"role": role}, FINAL]))
    assert found == plain
    if role in ("ipython", "environment"):
        assert (remarks.CHANGED, f"role {role!r}, given as 'tool'") in {note[:2] for note in notes}


def test_a_role_that_the_template_writes_stays():
    found, _ = read(templates.CHATML, with_tools([called(content="Asking."), RESULT | {"role": "ipython"}, FINAL]))
    assert "<|im_start|>ipython\nNoon." in found[1]


def test_a_developer_is_a_system_message_where_the_template_takes_none():
    asked = [say("developer", "Be brief."), *PROMPT]
    found, notes = read(templates.HARMONY, record(asked, answer("Noon."), REJECTED))
    assert found[0].startswith("<|start|>system<|message|>Be brief.<|end|>")
    assert (remarks.CHANGED, "role 'developer', given as 'system'") in {note[:2] for note in notes}
    assert "<|im_start|>developer" in read(templates.CHATML, record(asked, answer("Noon."), REJECTED))[0][0]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking", "thought"])
@pytest.mark.parametrize("template", ["HARMONY", "QWEN"])
def test_thoughts_are_given_in_the_field_that_the_template_reads(template, field):
    found, notes = read(TEMPLATES[template], record(PROMPT, answer("Noon.", **{field: "Sun is up."}), REJECTED))
    assert "Sun is up." in found[1]
    assert not [note for note in notes if note.kind == remarks.LOST]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "thinking", "thinking": "Sun is up.", "signature": "x"},
        {"type": "thinking", "thinking": [{"type": "text", "text": "Sun is up."}]},
        {"type": "reasoning", "text": "Sun is up."},
    ],
)
@pytest.mark.parametrize("template", ["HARMONY", "QWEN"])
def test_thoughts_in_content_parts_are_thoughts(template, part):
    plain, _ = read(TEMPLATES[template], record(PROMPT, answer("Noon.", reasoning_content="Sun is up."), REJECTED))
    parts = answer([part, {"type": "text", "text": "Noon."}])
    found, notes = read(TEMPLATES[template], record(PROMPT, parts, REJECTED))
    assert found == plain
    assert not [note for note in notes if note.kind == remarks.LOST]


def test_a_thought_that_a_template_would_write_into_the_answer_is_refused():
    parts = answer([{"type": "reasoning", "text": "Sun is up."}, {"type": "text", "text": "Noon."}])
    any_part = templates.EACH + "{% for part in message.content %}{{ part.text }}{% endfor %}</s>{% endfor %}"
    for template in (any_part, templates.PARTS_ONLY, templates.CHATML):
        found, _ = read(template, record(PROMPT, parts, REJECTED))
        assert found.startswith("content of role 'assistant' has parts other than text (reasoning), which the chat template")


@pytest.mark.parametrize("more", [{}, {"content": ""}, {"content": None}])
def test_an_answer_that_is_only_a_thought_is_an_answer(more):
    thought = {"role": "assistant", "reasoning_content": "Sun is up."} | more
    found, _ = read(templates.QWEN, record(PROMPT, answer("Noon.", reasoning_content="Sun is up."), [thought]))
    assert found[2] == "<think>\nSun is up.\n</think>\n\n<|im_end|>\n"
    reason, _ = read(templates.CHATML, record(PROMPT, answer("Noon."), [thought]))
    assert reason.startswith("the chat template leaves out or changes all of rejected (thoughts); set data.chat_template")


# -- results of tools --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [{"time": ["noon"], "id": "x1"}, [{"time": "noon"}], 12.5, True])
@pytest.mark.parametrize("template", ["QWEN", "STRICT", "CHATML"])
def test_results_may_be_any_json(template, value):
    plain, _ = read(TEMPLATES[template], with_tools([called(), RESULT | {"content": json.dumps(value)}, FINAL]))
    found, notes = read(TEMPLATES[template], with_tools([called(), RESULT | {"content": value}, FINAL]))
    assert isinstance(plain, tuple)
    assert found == plain
    assert not [note for note in notes if "content" in note.what]


def test_a_template_that_writes_objects_as_json_gets_them():
    found, _ = read(templates.HARMONY, with_tools([called(), RESULT | {"content": {"time": "noon"}}, FINAL]))
    assert '<|message|>{"time": "noon"}<|end|>' in found[1]


def test_an_object_that_the_template_leaves_out_is_named():
    template = templates.QWEN.replace("message.role + '\n' + content", "message.role + '\n' + content[:3]")
    _, notes = read(template, with_tools([called(), RESULT | {"content": {"time": "high noon", "id": "x1"}}, FINAL]))
    assert {note.example for note in notes if "role 'tool'" in note.what} == {"high noon", "x1"}


def test_the_content_of_others_is_text():
    reason, _ = read(templates.QWEN, record(PROMPT, answer({"time": "noon"}), REJECTED))
    assert reason == "chosen has a message whose content is an object: write it as text"


@pytest.mark.parametrize("ids", [("call00001", "call00002"), ("call_a", "call_b"), (None, None)])
def test_calls_get_ids_that_the_template_takes(ids):
    calls = [CALL | {"id": name} if name else without(CALL, "id") for name in ids]
    results = [say("tool", text, **({"tool_call_id": name} if name else {})) for text, name in zip("AB", ids, strict=True)]
    found, _ = read(templates.STRICT, with_tools([called(tool_calls=calls), *results, FINAL]))
    written = re.findall(r"\}\}(\w{9})", found[1]), re.findall(r"\[TOOL_RESULTS\][AB](\w{9})", found[1])
    assert written[0] == written[1] and len(set(written[0])) == 2
    if ids[0] == "call00001":
        assert written[0] == list(ids)


def test_ids_and_names_of_calls_that_are_not_written_are_no_news():
    _, notes = read(templates.QWEN, with_tools([called(), RESULT, FINAL]))
    assert not [note for note in notes if note.kind == remarks.FIELD]
    _, notes = read(templates.QWEN, with_tools([called(), RESULT | {"name": "sundial"}, FINAL]))
    assert [note.what for note in notes if note.kind == remarks.FIELD] == ["name"]


# -- tools -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["parameters", "input_schema"])
def test_tools_without_function_are_wrapped_for_templates_that_ask_for_it(key):
    function = tool("clock")["function"]
    bare = without(function, "parameters") | {key: function["parameters"]}
    plain, _ = read(templates.HARMONY, with_tools(answer("Noon.")))
    assert read(templates.HARMONY, with_tools(answer("Noon."), tools=[bare]))[0] == plain
    assert read(templates.QWEN, with_tools(answer("Noon."), tools=[bare]))[0][0].count('"function"') == 0  # stays as it was


# -- what a template does to a prompt once it has an answer ------------------------------------------------------------


def test_texts_of_the_prompt_that_move_behind_it_or_vanish_are_named(write):
    asked = [say("system", "Be very brief, please."), *PROMPT]
    lines, _ = lines_of(write, templates.STRICT, record(asked, answer("Noon."), REJECTED), max_lost=1)
    (lost,) = [line for line in lines if "leaves out or changes" in line]
    assert "content of role 'system' (prompt, before chosen), such as 'Be very brief, please.'" in lost
    (moved,) = [line for line in lines if "stand in the completion" in line]
    assert "1 content of role 'user' (prompt, before chosen)" in moved and "data.train_on=assistant" in moved
    assert not [line for line in lines if "tokens merge" in line]


def test_thoughts_of_the_prompt_that_a_longer_answer_drops_are_named():
    asked = [*PROMPT, called(content="<think>Look it up now.</think>"), RESULT]
    longer = [say("assistant", "Noon."), user("Sure?"), say("assistant", "Yes.")]
    _, notes = read(templates.QWEN, record(asked, longer, answer("No."), tools=[tool("clock")]))
    found = {note[:2] for note in notes}
    assert (remarks.THOUGHT_BEFORE, "thoughts (prompt, before chosen)") in found
    assert (remarks.PROMPT_IN_ANSWER, "content of role 'tool' (prompt, before chosen)") in found
    assert not [note for note in notes if "before rejected" in note.what]


def test_a_thought_in_a_field_and_in_content_is_written_twice(write):
    thought = "The sun is right above us."
    both = answer(f"<think>{thought}</think>Noon.", reasoning_content=thought)
    lines, _ = lines_of(write, templates.QWEN, record(PROMPT, both, answer("No.", reasoning_content="Hm.")), max_lost=1)
    assert [line for line in lines if "writes both: 1 chosen, such as 'The sun is" in line and "keep one of them" in line]
    _, found = noted(templates.QWEN, PROMPT, answer("Noon.", reasoning_content=thought), answer("No."))
    assert remarks.THOUGHT_TWICE not in {kind for kind, _ in found}


# -- refusals name what to change --------------------------------------------------------------------------------------

REFUSED = [
    (
        templates.GEMMA,
        [say("system", "Be brief."), *PROMPT],
        answer("Noon."),
        "write the system text into the first user message",
    ),
    (templates.STRICT, [*PROMPT, user("Please.")], answer("Noon."), "join messages of role 'user' that follow one another"),
    (templates.STRICT, PROMPT, [FINAL, FINAL], "join messages of role 'assistant' that follow one another"),
    (templates.STRICT, [FINAL, *PROMPT], answer("Noon."), "begin with a user message"),
    (
        templates.STRICT,
        [*PROMPT, FINAL, say("system", "Hm."), *PROMPT],
        answer("Noon."),
        "a system message only as the first",
    ),
    (templates.HARMONY, PROMPT, [FINAL, say("function", "Noon."), FINAL], ""),
    (
        templates.HARMONY.replace("message.role == 'tool'", "message.role == 'result'"),
        PROMPT,
        [FINAL, say("tool", "Noon."), FINAL],
        "set a data.chat_template that takes role 'tool'",
    ),
]


@pytest.mark.parametrize(("template", "prompt", "chosen", "remedy"), REFUSED)
def test_a_refusal_says_what_to_change(template, prompt, chosen, remedy):
    found, _ = read(template, record(prompt, chosen, REJECTED))
    if not remedy:
        assert isinstance(found, tuple)
        return
    assert found.startswith("the chat template refuses it: ") and found.endswith(remedy)


@pytest.mark.parametrize(
    ("first", "told"),
    [
        ("system", "their first messages (system) differ, and a pair is two answers to one prompt"),
        ("user", "their first messages (user) differ, and a pair is two answers to one prompt"),
        ("assistant", "both begin with the assistant; give what they answer in a column 'prompt'"),
    ],
)
def test_answers_to_different_prompts_are_refused(first, told):
    sides = ([say(first, text), *PROMPT, FINAL] for text in "AB")
    found, _ = read(templates.CHATML, dict(zip(("chosen", "rejected"), sides, strict=True)))
    assert found == f"chosen and rejected have no prompt in common: {told}"


def test_several_turns_name_the_setting_that_counts_only_the_assistant(write):
    turns = [FINAL, user("Sure?"), say("assistant", "Yes.", weight=0)]
    lines, _ = lines_of(write, templates.CHATML, record(PROMPT, turns, REJECTED))
    assert len([line for line in lines if "ata.train_on=assistant" in line]) == 2  # for the turns, and for the mark


# -- marks ------------------------------------------------------------------------------------------------------------


def marked(template: str, chosen: list[dict], eos: str | None = None, **more) -> list[tuple[int, str]]:
    """Runs of the chosen completion: parts, and text."""
    tokenizer = tokenizer_for(template)
    tokenizer.eos_token = eos or tokenizer.eos_token
    noted: list = []
    ((ids, _),) = Tokeniser(tokenizer).encode_noted(normalise(record(PROMPT, chosen, REJECTED, **more)), noted)
    firsts = noted[0].chosen.marks >> marks.MARK_BITS
    ends = [*firsts[1:], len(ids.chosen)]
    return [
        (run & 15, tokenizer.decode(ids.chosen[first:end]))
        for run, first, end in zip(noted[0].chosen.marks.tolist(), firsts, ends, strict=False)
    ]


def test_a_turn_that_two_tokens_end_ends_with_eos():
    turns = [FINAL, user("Sure?"), FINAL]
    assert marked(templates.TWO_ENDS, turns, "<|END|>") == [
        (5, "It is noon.<|END_RESPONSE|><|END|>"),
        (0, "<|START|><|USER|>Sure?<|END|><|START|><|BOT|><|START_RESPONSE|>"),
        (7, "It is noon.<|END_RESPONSE|><|END|>"),
    ]


@pytest.mark.parametrize("result", ["At noon.", {"time": "noon", "n": 1}, [{"time": "noon"}]])
def test_a_turn_that_holds_a_result_of_a_tool_is_not_found(result):
    assert marked(templates.FOLDED, [called(content="Asking."), RESULT | {"content": result}, FINAL]) == []
    assert marked(templates.FOLDED, [called(content="Asking."), user("Well?"), FINAL])[-1][0] == 0


def test_turns_are_found_with_tools_that_are_given_in_another_form():
    turns, bare = [FINAL, user("Sure?"), FINAL], [tool("clock")["function"]]
    assert marked(templates.HARMONY, turns, tools=bare) == marked(templates.HARMONY, turns, tools=[tool("clock")]) != []


# -- nothing vanishes --------------------------------------------------------------------------------------------------

WORD = re.compile(r"w\d+x")
KINDS = {"content": "content of role", "thought": "thoughts", "call": "tool calls", "tool": "tools"}


class Words:
    """Texts that hold a word of their own, so that a search tells whether a rendering holds them."""

    def __init__(self):
        self.kinds: dict[str, str] = {}

    def say(self, kind: str) -> str:
        word = f"w{len(self.kinds)}x"
        self.kinds[word] = kind
        return word

    def bot(self, thought: str | None = None, calls: int = 0) -> dict:
        said = self.say("content")
        if thought == "tags":
            said = f"<think>\n{self.say('thought')} more\n</think>\n\n{said}"
        message = say("assistant", said)
        if thought and thought != "tags":
            message[thought] = f"{self.say('thought')} and so on"
        if calls:
            functions = [{"name": self.say("call"), "arguments": {"zone": self.say("call")}} for _ in range(calls)]
            message["tool_calls"] = [
                {"type": "function", "id": f"call0000{n}", "function": f} for n, f in enumerate(functions)
            ]
        return message

    def other(self, role: str, **more) -> dict:
        return say(role, self.say("content"), **more)


def conversations(words: Words):
    """Prompts and answers, each text with a word of its own."""
    for first in ([], ["system"], ["developer"]):
        for thought in (None, "tags", "reasoning_content", "thinking"):
            prompt = [*map(words.other, first), words.other("user")]
            yield prompt, [words.bot(thought)]
            yield prompt, [words.bot(thought), words.other("user"), words.bot(thought)]
            earlier = [words.bot(thought), words.other("user")]
            yield [*prompt, *earlier], [words.bot(thought)]
            for role in ("tool", "function", "ipython"):
                result = words.other(role, tool_call_id="call00000")
                yield prompt, [words.bot(thought, 1), result, words.bot(thought)]
                yield [*prompt, words.bot(thought, 1), result], [words.bot(thought), words.other("user"), words.bot()]
            yield (
                prompt,
                [words.bot(None, 2), *(words.other("tool", tool_call_id=f"call0000{n}") for n in (0, 1)), words.bot()],
            )
    yield [words.other("user"), words.other("user")], [words.bot(), words.bot()]


def parts_of(message: dict, last: bool, kind: str) -> int:
    """The parts that a text of a message belongs to."""
    if message["role"] != "assistant":
        return 0
    return marks.ASSISTANT | last * marks.LAST_TURN | (marks.REASONING if kind == "thought" else marks.ANSWER)


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_each_text_has_the_marks_of_its_message_or_none_are_told(template):
    tokeniser = Tokeniser(tokenizer_for(TEMPLATES[template]))
    marked = 0
    for prompt, chosen in conversations(words := Words()):
        noted: list = []
        ((ids, found),) = tokeniser.encode_noted(normalise(record(prompt, chosen, REJECTED)), noted)
        if isinstance(ids, Malformed):
            continue
        runs, kinds = noted[0].chosen, {note.kind for note in found if note.what == "chosen"}
        if not len(runs.marks):
            assert remarks.NO_TURNS in kinds
            continue
        marked += 1
        firsts = runs.marks >> marks.MARK_BITS
        bits = np.repeat(runs.marks & 15, np.diff(firsts, append=len(ids.chosen)))
        pieces = [tokeniser.tokenizer.decode([token]) for token in ids.chosen.tolist()]
        text, ends = "".join(pieces), np.cumsum([len(piece) for piece in pieces])
        last = max(place for place, message in enumerate(chosen) if message["role"] == "assistant")
        known = marks.ASSISTANT | marks.LAST_TURN if remarks.NO_REASONING in kinds else 15
        for place, message in enumerate(chosen):
            for word in set(WORD.findall(json.dumps(message))):
                if text.count(word) != 1:
                    continue
                start = text.index(word)
                inside = (ends > start + 1) & (ends <= start + len(word))  # tokens that begin before it may belong elsewhere
                wanted = parts_of(message, place == last, words.kinds[word]) & known
                assert set(bits[inside].tolist()) <= {wanted}, (word, text, runs)
    assert marked


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_each_text_is_written_or_named(template):
    tokeniser = Tokeniser(tokenizer_for(TEMPLATES[template]))
    kept = 0
    for prompt, chosen in conversations(words := Words()):
        ((ids, found),) = tokeniser.encode_noted(normalise(record(prompt, chosen, REJECTED, tools=None)))
        if isinstance(ids, Malformed):
            continue
        kept += 1
        parts = [tokeniser.tokenizer.decode(part.tolist()) for part in ids]
        for side, messages, text in (("prompt", prompt, parts[0]), ("chosen", chosen, parts[1])):
            lost = {word for word in WORD.findall(json.dumps(messages)) if word not in text}
            told = [note for note in found if f"({side}" in note.what]
            missed = {word for word in lost if not any(KINDS[words.kinds[word]] in note.what for note in told)}
            assert not missed, (messages, text, found)
            named = {note.example for note in told if note.kind == remarks.LOST}
            assert all(any(word in lost for word in WORD.findall(example)) for example in named), (text, named)
    assert kept
