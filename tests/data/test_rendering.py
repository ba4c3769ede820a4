"""What a chat template leaves out or adds is noticed; sound templates raise no alarm."""

from __future__ import annotations

import json

import pytest
import templates
from samples import CHAT_TEMPLATE, user
from templates import CALLS, EACH, GENERATE, PROMPT, answer, calling, lines_of, noted, record, say, tokenizer_for, tool

from raydpo.data.messages import Malformed
from raydpo.data.preference import Preference
from raydpo.data.tokenise import Tokeniser
from raydpo.errors import DataError

THOUGHT = "<think>\nThe hands show\n  nine.\n</think>\n\nNine."
WORSE = "<think>\nLazy.\n</think>\n\nTen."


SOUND = {
    "chatml": (templates.CHATML, {}),
    "zephyr": (templates.ZEPHYR, {}),
    "llama": (templates.LLAMA, {}),
    "qwen": (templates.QWEN, {"template_kwargs": {"enable_thinking": False}}),
    "mistral": (templates.MISTRAL, {}),
    "gemma": (templates.GEMMA, {}),
    "gemma parts": (templates.GEMMA_PARTS, {}),
    "parts only": (templates.PARTS_ONLY, {}),
    "calls": (CALLS, {}),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_templates_raise_no_alarm(name):
    template, more = SOUND[name]
    words = '  Is "nine"\n\n\tright? 5 < 6 & \\n \\nabla \u00e4\u4e2d \U0001f600 '
    prompt = [user(words), say("assistant", "No."), user("And now?")]
    _, found = noted(template, prompt, answer(f"Yes, {words}"), answer("Hm.\n"), **more)
    assert found <= {("given in another form", "text, given as a content part")}


@pytest.mark.parametrize("name", ["llama", "qwen", "mistral", "calls"])
def test_templates_that_write_calls_and_tools_raise_no_alarm(name):
    arguments = {
        "zone": 'Os"lo\n\u00e4 <b>',
        "days": 3,
        "far": True,
        "near": 1e22,
        "many": ["a b", {"deep": "c"}],
        "no": None,
    }
    said = say("tool", 'nine\n"sharp"', tool_call_id="c1", name="clock")
    history = [user("Clock?"), *calling(arguments=arguments), said]
    template, more = SOUND[name]
    for prompt, chosen in ((history, answer("It is nine.")), ([user("Clock?")], calling(arguments=arguments))):
        ids, found = noted(template, prompt, chosen, answer("No idea."), tools=[tool("clock"), tool("zone")], **more)
        assert found <= {("fields of messages left out", "tool_call_id")} and not isinstance(ids, Malformed)


def test_a_system_message_may_move(write):
    _, found = noted(templates.MISTRAL, [say("system", "Be kind."), *PROMPT], answer("Nine."), answer("Ten."))
    assert not found


LEFT_OUT = {
    "tool calls (chosen)": (CALLS.replace("message.tool_calls", "none"), record(PROMPT, calling(content="x"), answer("b"))),
    "values of a call": (
        CALLS.replace("{{ call.function.arguments | tojson }}", ""),
        record(PROMPT, calling(arguments={"zone": "Oslo"}), answer("b")),
    ),
    "a second call": (
        CALLS.replace("message.tool_calls or []", "(message.tool_calls or [])[:1]"),
        record(
            PROMPT, answer("", tool_calls=calling("one")[0]["tool_calls"] + calling("two")[0]["tool_calls"]), answer("b")
        ),
    ),
    "content of role 'tool' (prompt)": (
        "{% for message in messages %}{% if message.role != 'tool' %}<s>{{ message.role }}\n{{ message.content }}</s>\n"
        "{% endif %}{% endfor %}" + GENERATE,
        record([*PROMPT, say("assistant", "Wait."), say("tool", "nine")], answer("a"), answer("b")),
    ),
    "content of role 'system' (prompt)": (
        EACH.replace("messages", "messages if message.role != 'system'")
        + "{{ message.content }}</s>\n{% endfor %}"
        + GENERATE,
        record([say("system", "Be kind."), *PROMPT], answer("a"), answer("b")),
    ),
    "thoughts (chosen)": (templates.DROPS_THOUGHTS, record(PROMPT, answer(THOUGHT), answer("Ten."))),
    "thoughts (rejected)": (templates.CHATML, record(PROMPT, answer("Nine."), answer("Ten.", reasoning_content="Hm hm."))),
    "thoughts in a field of another name": (
        templates.CHATML,
        record(PROMPT, answer("Nine.", thinking="Hm hm."), answer("b")),
    ),
    "content of role 'assistant' (chosen)": (
        CALLS.replace("{{ message.content or '' }}", "{{ message.content or '' if not message.tool_calls else '' }}"),
        record(PROMPT, calling(content="Let me look."), answer("b")),
    ),
    "an end that is cut off": (
        EACH + "{{ message.content[:30] }}</s>\n{% endfor %}" + GENERATE,
        record(PROMPT, answer("x" * 40), answer("b")),
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_left_out_is_an_error_and_a_warning_if_allowed(write, name):
    template, bad = LEFT_OUT[name]
    good = record([user("Hello?")], answer("a c"), answer("b c"))
    with pytest.raises(
        DataError, match=r"the chat template leaves out or changes (texts of 1 of 5|all of).*set data\.chat_template to"
    ):
        lines_of(write, template, bad, *[good] * 4)
    if "leaves out or changes all" not in (reason := str(noted_of(template, bad))):
        lines, sets = lines_of(write, template, bad, *[good] * 4, max_lost=0.2)
        (line,) = (line for line in lines if "leaves out" in line)
        assert line.startswith("warning: data prefs: the chat template leaves out or changes texts of 1 of 5 pairs: 1 ")
        assert "prefs.jsonl:1" in line and len(line) < 2000
        assert name not in reason
        if " (" in name:
            assert f"1 {name}, such as '" in line
        stored = sets.report.to_dict()["sources"][0]["remarks"]["left out"]
        assert json.dumps(stored) and next(iter(stored.values()))["example"]


@pytest.mark.parametrize("text", ["user", "s", "<s>user", "assistant", "You are kind."])
def test_texts_that_the_words_of_the_template_hold_are_missed_all_the_same(write, text):
    skips = EACH.replace("messages", "messages if message.role != 'system'") + "{{ message.content }}</s>\n{% endfor %}"
    odd = record([say("system", text), *PROMPT], answer("a"), answer("b"))
    with pytest.raises(DataError, match=r"1 content of role 'system' \(prompt\), such as"):
        lines_of(write, skips + GENERATE, odd)
    every = EACH + "{{ message.content }}</s>\n{% endfor %}" + GENERATE
    for template in (every, templates.GEMMA_PARTS):
        lines, _ = lines_of(write, template, record(odd["prompt"], answer(text.replace("<s>", "")), answer("b")))
        assert not any("leaves out" in line for line in lines) and ("<s>" in text or len(lines) == 1)
    called = record([*PROMPT, *calling(), say("tool", "s")], answer("a"), answer("b"))
    with pytest.raises(DataError, match=r"1 content of role 'tool' \(prompt\), such as 's'"):
        lines_of(write, CALLS.replace("messages", "messages if message.role != 'tool'"), called)


def test_tools_and_calls_that_the_prompt_lacks_are_a_warning(write):
    """A tool's name must stand in a place of its own, not in the words of a message."""
    asked = record([user("clock, please")], answer("the clock"), answer("b"), tools=[tool("clock")])
    called = record([user("Ask."), *calling("clock"), say("tool", "nine")], answer("a"), answer("b"))
    lines, _ = lines_of(write, EACH + "{{ message.content }}</s>\n{% endfor %}" + GENERATE, asked, called)
    (line,) = (line for line in lines if line.startswith("warning"))
    assert line.startswith("warning: data prefs: the chat template leaves out tools or tool calls of 2 prompts, ")
    assert "1 tools, such as 'clock' (prefs.jsonl:1); 1 tool calls (prompt), such as 'clock' (prefs.jsonl:2); set" in line


def noted_of(template, bad):
    return noted(template, bad["prompt"], bad["chosen"], bad["rejected"], tools=bad.get("tools"))[0]


def test_an_answer_of_which_nothing_is_left_is_malformed(write):
    template = CALLS.replace("message.tool_calls", "none")
    with pytest.raises(
        DataError, match=r"leaves out or changes all of chosen \(tool calls\); set data\.chat_template to one that writes"
    ):
        lines_of(write, template, record(PROMPT, calling(), answer("b")), max_lost=1.0)


def test_answers_that_become_equal_are_malformed_and_the_reason_is_named(write):
    bad = record(PROMPT, answer("<think>a</think>Nine."), answer("<think>b</think>Nine."))
    with pytest.raises(DataError, match=r"leaves out what tells chosen from rejected \(thoughts \(chosen\)"):
        lines_of(write, templates.DROPS_THOUGHTS, bad, max_lost=1.0)


def test_thoughts_of_earlier_turns_are_told_apart(write):
    before = [*PROMPT, say("assistant", THOUGHT), user("Sure?")]
    several = record(
        PROMPT, [*answer(THOUGHT), user("Sure?"), *answer("Yes.")], [*answer(WORSE), user("Sure?"), *answer("No.")]
    )
    lines, _ = lines_of(write, templates.DROPS_THOUGHTS, record(before, answer("Yes."), answer("No.")), several)
    prompt, completion = (line for line in lines if "leaves out thoughts" in line)
    assert prompt.startswith("data prefs: ") and "in 1 prompts, as at inference" in prompt
    assert completion.startswith("warning: ") and "in 1 completions" in completion and "1 thoughts (rejected)" in completion


def test_thoughts_that_are_kept_raise_no_alarm():
    for chosen in (answer(THOUGHT), answer("Nine.", reasoning_content="The hands show."), answer("a\n</think>\n\nNine.")):
        assert noted(templates.QWEN, PROMPT, chosen, answer(WORSE))[1] == set()


def test_an_empty_thought_that_the_template_adds():
    _, found = noted(templates.QWEN, PROMPT, answer(THOUGHT), answer("Ten."))
    assert found == {("empty thoughts added", "rejected")}
    kwargs = {"template_kwargs": {"enable_thinking": False}}
    assert noted(templates.QWEN, PROMPT, answer("Nine."), answer("Ten."), **kwargs)[1] == set()
    assert noted(templates.CHATML, PROMPT, answer("<think></think>Nine."), answer("<think></think>Ten."))[1] == set()


def test_the_end_of_a_thought_that_nothing_begins(write):
    half = record(PROMPT, answer("So nine.\n</think>\n\nNine."), answer("Ten."))
    lines, _ = lines_of(write, templates.CHATML, half)
    assert any(
        "answers end a thought that nothing begins: 1 chosen, such as '</think>' (prefs.jsonl:1)" in line for line in lines
    )


@pytest.mark.parametrize("closer", ["</think>", "</reasoning>", "[/THINK]", "<|END_THINKING|>"])
def test_the_end_of_a_thought_in_text_that_nothing_begins(write, closer):
    half, opener = f" So nine.\n{closer}\nNine.", closer.replace("/", "").replace("END", "START")
    for prompt, chosen, warned in (
        ("Clock?\n", half, 1),
        (f"Clock?\n{opener}\n", half, 0),
        ("Clock?\n", opener + half, 0),
        ("Clock?\n", " Nine.", 0),
    ):
        lines, _ = lines_of(write, None, {"prompt": prompt, "chosen": chosen, "rejected": " Ten."})
        assert sum(f"that nothing begins: 1 chosen, such as '{closer}'" in line for line in lines) == warned


def test_the_end_of_the_prompt_that_is_left_out_is_quoted(write):
    template = CHAT_TEMPLATE.replace("<s>assistant\n{%", "<s>assistant\n<think>\n{%")
    lines, _ = lines_of(write, template, record(PROMPT, answer("Nine."), answer("Ten.")))
    assert [line for line in lines if line.startswith("warning")] == [
        "warning: data prefs: the end of the prompt is left out of 1 pairs, where the chat template writes the prompt alone "
        "otherwise than before its completion: such as '<think>\\n' (prefs.jsonl:1); begin the answers with that text, or "
        "use a template or chat_template_kwargs with which the prompt does not end so"
    ]
    assert not any(
        "end of the prompt" in line for line in lines_of(write, template, record(PROMPT, answer(THOUGHT), answer(WORSE)))[0]
    )


@pytest.mark.parametrize("opened", ["<think>\n", "[THINK]", "Answer: ", "<|thought|>\n"])
def test_an_answer_that_begins_as_the_end_of_the_prompt_does(write, opened):
    """What prompt and answer share is of the answer."""
    template = CHAT_TEMPLATE.replace("<s>assistant\n{%", f"<s>assistant\n{opened}{{%")
    for length in (1, 2, 4):
        chosen = f"{opened[:length]}!b>Frozen</b> water."
        for text in (chosen, opened[:length]):
            lines, _ = lines_of(write, template, record(PROMPT, answer(text), answer("Ten.")))
            (line,) = (line for line in lines if line.startswith("warning"))
            assert "the end of the prompt is left out of 1 pairs, where the chat template writes" in line
            assert f"such as {opened!r} (prefs.jsonl:1)" in line


def test_an_answer_with_the_tag_that_the_prompt_ends_with_lacks_only_the_rest(write):
    template = CHAT_TEMPLATE.replace("<s>assistant\n{%", "<s>assistant\n<think>\n{%")
    lines, _ = lines_of(write, template, record(PROMPT, answer("<think>So.</think>Nine."), answer("<think>\nb</think>Ten.")))
    assert [line for line in lines if line.startswith("warning")] == [
        line for line in lines if "such as '\\n' (prefs.jsonl:1)" in line
    ]


def test_tools_beside_plain_text_are_left_out(write):
    with pytest.raises(DataError, match=r"1 tools \(beside plain text\).*give messages"):
        lines_of(write, None, {"prompt": "the", "chosen": " a", "rejected": " b", "tools": [tool("clock")]})


def test_arguments_that_the_template_does_not_read(write):
    lines, _ = lines_of(
        write, templates.QWEN, record(PROMPT, answer(THOUGHT), answer(WORSE), chat_template_kwargs={"thinkng": 1})
    )
    assert any("does not read these chat_template_kwargs: 1 thinkng" in line for line in lines)


def test_fields_that_are_left_out_are_named(write):
    odd = [user("Hello?", mood="angry and loud")]
    lines, _ = lines_of(write, CHAT_TEMPLATE, record(odd, answer("a"), answer("b")))
    assert any("leaves out fields of messages: 1 mood, such as 'angry and loud' (prefs.jsonl:1)" in line for line in lines)


def test_a_field_that_the_template_writes_is_not_named(write):
    writes = CHAT_TEMPLATE.replace("{{ message.role }}", "{{ message.role }} {{ message.name or '' }}")
    chosen = answer("a", refusal="I would rather not.")
    asked = [user("Hello?", name="Bob Miller"), say("assistant", "Hm.", name="Ann"), user("And?", name="Bob Miller")]
    (line,) = (each for each in lines_of(write, writes, record(asked, chosen, answer("b")))[0] if "fields of" in each)
    assert line.startswith("data prefs: the chat template leaves out fields of messages: 1 refusal, such as 'I would rather")
    (line,) = (each for each in lines_of(write, CHAT_TEMPLATE, record(asked, chosen, answer("b")))[0] if "fields of" in each)
    assert "1 name, such as 'Bob Miller' (prefs.jsonl:1)" in line and "write it into content, or use a template" in line


def test_fields_that_no_template_reads_do_not_refuse_an_answer(write):
    """Only what a message says counts as lost."""
    long = answer("a", original="A text of another kind that no template reads.", score=3, hidden=True)
    lines, _ = lines_of(write, CHAT_TEMPLATE, record(PROMPT, long, answer("b")))
    assert not any(line.startswith("warning") for line in lines)
    assert all(any(f"1 {key}, such as" in line for line in lines) for key in ("original", "score", "hidden"))


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 0.5}, {"training": "false"}, {"loss": 0}])
def test_marks_that_a_message_is_not_trained_are_warned_of(write, mark):
    (key,) = mark
    chosen = [*answer("Hm.", **mark), user("Sure?"), *answer("Yes.", **{key: 1})]
    lines, _ = lines_of(write, CHAT_TEMPLATE, record(PROMPT, chosen, answer("b")))
    (line,) = (each for each in lines if "marked as not to be trained" in each)
    assert line.startswith("warning: data prefs: in 1 pairs messages of the answers are marked as not to be trained")
    assert f"1 {key} (chosen), such as '{mark[key]}' (prefs.jsonl:1)" in line and "but every message of an answer" in line


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, templates.GEMMA_PARTS])
def test_what_a_content_part_says_about_its_text_is_not_lost_content(write, template):
    part = {"type": "text", "text": "Frozen water.", "citations": ["abc def"], "annotations": [], "where": {"page": 7}}
    lines, _ = lines_of(write, template, record([user([part])], answer([part]), answer("b")))
    assert not any(line.startswith("warning") for line in lines)
    (line,) = (line for line in lines if "fields of messages" in line)
    assert "1 citations of a content part, such as 'abc def'" in line and "1 where of a content part, such as '7'" in line
    other = {"type": "thinking", "thinking": "Hm hm hm.", "signature": "EqQBCgIYAhIM"}
    ((_, found),) = Tokeniser(tokenizer_for(templates.GEMMA_PARTS)).encode_noted(
        [Preference(PROMPT, answer([other, part]), answer("b"))]
    )
    assert {remark[:3] for remark in found if remark.kind == "left out"} == {("left out", "thoughts (chosen)", "Hm hm hm.")}


def test_marks_in_the_prompt_are_information_and_marks_of_what_is_trained_none(write):
    asked = [user("Hello?"), say("assistant", "Hm.", weight=0), user("And?")]
    lines, _ = lines_of(write, CHAT_TEMPLATE, record(asked, answer("a", weight=1, train=True), answer("b", weight=1.0)))
    assert [line for line in lines if "mark" in line] == [
        "data prefs: 1 prompts mark messages for training: 1 weight (prefs.jsonl:1); nothing of a prompt is trained. Make "
        "each turn that should be a pair of its own"
    ]


OLD_CALL = {"name": "clock", "arguments": '{"zone": "Oslo"}'}


def test_calls_of_functions_in_the_older_form_are_tool_calls():
    asked = [user("Clock?"), say("assistant", None, function_call=OLD_CALL), say("function", "nine", name="clock")]
    called = [user("Clock?"), *calling(arguments={"zone": "Oslo"}), say("tool", "nine", name="clock")]
    for template in (CALLS, templates.QWEN, templates.LLAMA):
        more = {"template_kwargs": {"enable_thinking": False}} if template == templates.QWEN else {}
        old, found = noted(template, asked, answer("It is nine."), answer("No."), **more)
        new, _ = noted(template, called, answer("It is nine."), answer("No."), **more)
        assert [ids.tolist() for ids in old] == [ids.tolist() for ids in new]
        kinds = {what for kind, what in found if kind == "given in another form"}
        assert kinds >= {"function_call, given as tool_calls", "role 'function', given as 'tool'"}
        old, _ = noted(template, PROMPT, answer(function_call=OLD_CALL), answer("No."), **more)
        new, _ = noted(template, PROMPT, calling(arguments={"zone": "Oslo"}), answer("No."), **more)
        assert [ids.tolist() for ids in old] == [ids.tolist() for ids in new]


def test_a_template_that_reads_the_older_form_gets_it():
    own = CHAT_TEMPLATE.replace(
        "{{ message.content }}", "{{ message.content or '' }}{{ message.function_call.name if message.function_call }}"
    )
    tokenizer = tokenizer_for(own)
    ((ids, found),) = Tokeniser(tokenizer).encode_noted([Preference(PROMPT, answer(function_call=OLD_CALL), answer("No."))])
    assert tokenizer.decode(ids.chosen) == "clock</s>\n"
    assert {(one.kind, one.what) for one in found} == {("left out", "tool calls (chosen)")}  # its argument


def test_a_call_in_the_older_form_that_the_template_cannot_write_is_refused(write):
    with pytest.raises(DataError, match=r"leaves out or changes all of chosen \(tool calls\); set data\.chat_template"):
        lines_of(write, templates.CHATML, record(PROMPT, answer(function_call=OLD_CALL), answer("b")), max_lost=1.0)


@pytest.mark.parametrize(
    "message, reason",
    [
        ({"function_call": "auto"}, "chosen has a function_call that is not an object with name and arguments; write tool"),
        ({"function_call": {"arguments": "{}"}}, "function_call that is not an object with name and arguments"),
        ({"function_call": OLD_CALL, "tool_calls": calling()[0]["tool_calls"]}, "both function_call and tool_calls"),
        ({"refusal": "No."}, "chosen has a message without content, only with 'refusal': write its text into content"),
    ],
)
def test_calls_in_the_older_form_that_are_not_clear_are_refused(write, message, reason):
    with pytest.raises(DataError, match=reason):
        lines_of(write, CALLS, record(PROMPT, answer(**message), answer("b")))


def test_lines_are_short_for_long_texts(write):
    bad = record(PROMPT, answer("y", reasoning_content="x" * 9000), answer("b"), tools=[tool("t" * 3000)])
    lines, _ = lines_of(write, templates.CHATML, *[bad] * 5, max_lost=1.0)
    assert max(map(len, lines)) < 2000


@pytest.mark.parametrize(
    "field, value",
    [
        ("chain_of_thought", "Look at the hands."),
        ("analysis", "Look at the hands."),
        ("reason", "Look at the hands."),
        ("cot_steps", ["Look at the hands."]),
        ("assistant_thinking", "Look at the hands."),
        (
            "reasoning_details",
            [{"type": "reasoning.text", "text": "Look at the hands.", "format": "x-v1", "index": 0, "id": "r-1"}],
        ),
        ("reasoning_content", "Nine"),  # stands in the answer by chance
    ],
)
def test_a_thought_in_a_field_of_any_name_is_lost_like_others(write, field, value):
    pair = record(PROMPT, answer("Nine it is.", **{field: value}), answer("Ten."))
    lines, _ = lines_of(write, templates.CHATML, pair, max_lost=1)
    (line,) = (line for line in lines if "thoughts (chosen)" in line)
    assert line.startswith("warning: ") and "1 of 1 pairs: 1 thoughts (chosen), such as " in line
    assert "set data.chat_template to one that keeps thoughts" in line
    with pytest.raises(DataError, match=r"data\.max_lost"):
        lines_of(write, templates.CHATML, pair)
    asked = [user("Hm?"), *answer("What?", **{field: value}), *PROMPT]
    lines, _ = lines_of(write, templates.CHATML, record(asked, answer("Nine."), answer("Ten.")))
    assert not any(line.startswith("warning: ") for line in lines)


def test_fields_that_only_sound_like_thoughts():
    for field, value in (("finish_reason", "stop"), ("reasoning_tokens", 5), ("reasoning_effort", "high")):
        _, found = noted(templates.CHATML, PROMPT, answer("Nine.", **{field: value}), answer("Ten."))
        assert {kind for kind, _ in found} <= {"fields of messages left out"}
    thought = "The hands show it."
    _, found = noted(templates.CHATML, PROMPT, answer(f"{thought} Nine.", reasoning_content=thought), answer("Ten."))
    assert found == set()  # content holds it


def test_tools_inside_a_message_are_warned_of(write):
    asked = [user(PROMPT[0]["content"]) | {"tools": [tool("clock_of_the_hall")]}]
    lines, _ = lines_of(write, templates.CHATML, record(asked, answer("Nine."), answer("Ten.")))
    (line,) = (line for line in lines if line.startswith("warning: "))
    assert "the chat template leaves out tools in a field of messages of 1 prompts" in line
    assert "'clock_of_the_hall'" in line and "move them to a column 'tools'" in line
    lines, _ = lines_of(
        write,
        templates.CHATML,
        record(PROMPT, answer("Nine.", tools=[tool("clock_of_the_hall")]), answer("Ten.")),
        max_lost=1,
    )
    (line,) = (line for line in lines if line.startswith("warning: "))
    assert "1 tools inside a message (chosen), such as 'clock_of_the_hall'" in line
