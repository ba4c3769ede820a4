"""Columns beside a pair: read, or named in a warning if the model does not read their text."""

import json

import pytest
from samples import bot, user

from raydpo.data.messages import Malformed
from raydpo.data.preference import normalise
from raydpo.data.tally import SourceReport

ASKED, SAID, OTHER = "What is ice?", "Frozen water.", "A brick."
CHAT = {
    "prompt": [{"role": "user", "content": ASKED}],
    "chosen": [{"role": "assistant", "content": SAID}],
    "rejected": [{"role": "assistant", "content": OTHER}],
}
TEXT = {"prompt": ASKED, "chosen": SAID, "rejected": OTHER}
Q, GOOD, BAD = [user("q")], [bot("good")], [bot("bad")]
SYSTEM = {"role": "system", "content": "Be kind."}


def read(base, **columns):
    (preference,) = normalise(base | columns)
    return preference


@pytest.mark.parametrize("value", ["Be kind.", SYSTEM, [SYSTEM], json.dumps(SYSTEM), ["Be kind."]], ids=str)
def test_a_system_message_is_read_in_each_form(value):
    preference = read(CHAT, system=value)
    assert preference.prompt == [SYSTEM, *CHAT["prompt"]]
    assert preference.notes == ("the column 'system' put before the prompt as a system message",)
    assert read(TEXT, system=value).notes[0].startswith("warning: the column 'system' is not read, since the prompt is text")


def test_a_system_column_that_is_not_read_is_warned_of():
    for value in (["Be kind.", "Be short."], {"text": "Be kind."}, [{"role": "user", "content": "Hello"}], [1, 2]):
        preference = read(CHAT, system_prompt=value)
        assert preference.prompt == CHAT["prompt"]
        assert preference.notes[0].startswith(
            "warning: 'system_prompt' is not read, since it is neither text nor one system"
        )
    two = read(CHAT, system="Be kind.", system_prompt="Be a nurse.")
    assert two.notes[0].startswith("warning: 'system_prompt' is not read, since 'system' is")
    assert len(read(CHAT, system="Be kind.", system_prompt="Be kind.").notes) == 1
    assert read(CHAT, system="", system_prompt=[]).notes == ()


@pytest.mark.parametrize(
    "name, value",
    [
        ("documents", [{"title": "Ice", "text": "Ice is solid."}]),
        ("documents", ["Ice is solid."]),
        ("context", {"passage": "It is cold outside."}),
        ("input", {"a": "solid"}),
        ("history", [["is", "ice"]]),
        ("passages", {"text": ["Ice is solid."], "id": [1]}),
    ],
)
@pytest.mark.parametrize("base", [CHAT, TEXT], ids=["chat", "text"])
def test_objects_that_may_belong_to_the_prompt_are_warned_of(base, name, value):
    if (name, base) != ("history", TEXT):  # there the words stand in the prompt
        (note,) = read(base, **{name: value}).notes
        assert note.startswith(f"warning: {name!r} is not read, though it may belong to the prompt")


def test_objects_whose_texts_stand_in_the_prompt_are_not_warned_of():
    asked = "Ice is\n  solid. What is ice?"
    for documents in ([{"title": "Ice", "text": "Ice is solid."}], {"text": "Ice is solid.", "id": "d-17", "score": 0.5}):
        assert read(TEXT, prompt=asked, documents=documents).notes == ()
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    assert read(CHAT, prompt=[*turns, *CHAT["prompt"]], history=[["Hello", "Hi"]]).notes == ()


UNREAD = {
    "persona": "A pirate captain.",
    "instructions": "Be very brief.",
    "initial_reason_steps": "First look at the cold.",
    "chosen_thinking": "Water freezes at zero.",
    "table_schema": "CREATE TABLE ice (cold INT)",
    "functions": "def melt(): pass",
    "few_shots": [{"question": "What is fog?", "answer": "Air."}],
    "constraints": ["no long words", "no lists"],
    "messages": [{"role": "user", "content": "Good day!"}, {"role": "assistant", "content": "Hi"}, *CHAT["prompt"]],
}


@pytest.mark.parametrize("name", UNREAD)
@pytest.mark.parametrize("base", [CHAT, TEXT], ids=["chat", "text"])
def test_a_text_that_the_model_does_not_read_is_warned_of(base, name):
    preference = read(base, **{name: UNREAD[name]})
    assert preference.notes == (
        f"warning: {name!r} is not read, though its text may belong to the prompt or to an answer: write it there, or drop "
        "the column",
    )
    assert preference.unused == ()


QUIET = {
    "messages": [*CHAT["prompt"], *CHAT["chosen"]],
    "conversation": [{"input": ASKED, "output": "Something else."}],
    "text": f"### User: {ASKED}\n### Bot: {SAID}",
    "question_text": ASKED,
    "chosen_text": SAID,
    "original_response": "It is cold water.",
    "judge_reason": "The first one is true.",
    "feedback": "The first one is true.",
    "preference_statement": "The first one is better.",
    "metadata": {"note": "from the old set"},
    "source": "made up by hand",
    "chosen_model": "model seven of nine",
    "style": "short",
    "created at date": "on 1 May",
    "persona": "",
}


@pytest.mark.parametrize("name", QUIET)
@pytest.mark.parametrize("base", [CHAT, TEXT], ids=["chat", "text"])
def test_a_column_that_describes_the_record_or_is_read_elsewhere_is_no_warning(base, name):
    preference = read(base, **{name: QUIET[name]})
    assert preference.notes == ()
    assert preference.unused == ((name,) if QUIET[name] else ())


MEDIA = {
    "img_url": "http://example.org/1",
    "screenshot": "a.jpg",
    "picture_of_it": ["A.PNG?size=2"],
    "media": [{"type": "image", "url": "x.png"}],
    "extra": "data:image/png;base64,AAAA",
    "audio_file": "a.wav",
    "speech": {"url": "http://example.org/x.mp3"},
    "recording": {"array": [0.1], "sampling_rate": 16000},
}


@pytest.mark.parametrize("name", MEDIA)
def test_media_in_columns_of_other_names_are_refused(name):
    with pytest.raises(Malformed, match=f"column '{name}' holds .*image.*, and only text is read"):
        normalise(CHAT | {name: MEDIA[name]})


def test_texts_about_images_are_no_images():
    assert read(CHAT, image_caption="ice").notes == read(CHAT, images=[None], video_title="ice").notes == ()
    assert read(CHAT, image_caption="A lump of ice.").notes[0].startswith("warning: 'image_caption' is not read")
    assert read(CHAT, attachment="a.png").notes[0].startswith("warning: 'attachment' is not read, though it names an image")
    assert read(CHAT, source="http://example.org/a.png").notes == ()


@pytest.mark.parametrize("prompt", ["<image>\nWhat is it?", "What is it?\n<image>", "<audio> What is it?"])
def test_a_placeholder_of_an_image_is_warned_of(prompt):
    for base, value in ((TEXT, prompt), (CHAT, [{"role": "user", "content": prompt}])):
        (note,) = read(base, prompt=value).notes
        assert note.startswith("warning: the prompt begins or ends with '<")
    assert read(TEXT, prompt="Is <image> a tag of SVG?").notes == ()


@pytest.mark.parametrize(
    "said, kind",
    [
        ('["Frozen water."]', "a list of one text"),
        ("['Frozen water.']", "a list of one text"),
        ('{"text": "Frozen water."}', "an object with one text"),
        ('[{"type": "text", "text": "Frozen water."}]', "a list of content parts"),
    ],
)
def test_what_json_or_python_wrote_is_warned_of(said, kind):
    for base, answer in ((TEXT, said), (CHAT, [{"role": "assistant", "content": said}])):
        preference = read(base, chosen=answer)
        assert preference.chosen == answer
        assert preference.notes[0].startswith(f"warning: chosen is {kind}, as JSON or Python writes it, and is read with")
    assert read(TEXT, prompt=said).notes[0].startswith(f"warning: prompt is {kind}")


def test_arrays_as_numpy_prints_them_are_warned_of():
    said = "array([{'role': 'assistant', 'content': 'Cold.'}], dtype=object)"
    assert read(TEXT, chosen=said).notes[0].startswith("warning: chosen is an array, as JSON or Python writes it")


def test_answers_that_are_literals_are_a_warning_where_most_are():
    report = SourceReport("a", "a.jsonl", records=2)
    (preference,) = normalise(TEXT | {"chosen": '"Frozen water."', "rejected": '"A brick."'})
    report.understood.update(preference.notes)
    told = "records: the answers are JSON or Python literals, read as text with all signs"
    assert any(line.startswith(f"warning: data a: 1 of 2 {told}; if that") for line in report.lines())
    report.records = 3
    assert not any(told in line for line in report.lines())
    assert read(TEXT, chosen='"Ice" is water.').notes == read(TEXT, chosen="[ice] is {water}").notes == ()


def test_column_system():
    (chat,) = normalise({"system": "Be kind.", "prompt": Q, "chosen": GOOD, "rejected": BAD})
    assert chat.prompt == [{"role": "system", "content": "Be kind."}, *Q]
    assert chat.notes == ("the column 'system' put before the prompt as a system message",)
    own = [{"role": "system", "content": "Be rude."}, *Q]
    for prompt, system, warned in (
        ("q", "Be kind.", True),
        ("Be kind. q", "Be kind.", False),
        (own, "x", True),
        (own, "Be rude.", False),
    ):
        (kept,) = normalise({"system_prompt": system, "prompt": prompt, "chosen": "good", "rejected": "bad"})
        assert kept.prompt == prompt
        assert [note.startswith("warning: the column 'system' is not read") for note in kept.notes] == [True] * warned


@pytest.mark.parametrize("name, value", [("input", "a dog"), ("context", "a text"), ("history", [["before", "then"]])])
def test_columns_that_belong_to_the_prompt_are_warned_of(name, value):
    (preference,) = normalise({"prompt": "Say it.", "chosen": "a", "rejected": "b", name: value})
    assert preference.notes[0].startswith(f"warning: {name!r} is not read, though it may belong to the prompt")
    (whole,) = normalise({"prompt": f"Say it: {value} before then", "chosen": "a", "rejected": "b", name: value})
    assert whole.notes == ()


def test_a_context_beside_answers_that_hold_the_prompt_is_warned_of():
    record = {
        "context": "At nine.",
        "chosen": "Q: When does it open?\nA: At nine.",
        "rejected": "Q: When does it open?\nA: Never.",
    }
    (preference,) = normalise(record)
    assert preference.prompt == "At nine."
    assert any(note.startswith("warning: 'context' read as the prompt, though") for note in preference.notes)
    start = "\n\nHuman: When does it open?\n\nAssistant:"
    (preference,) = normalise({"context": "A text.", "chosen": start + " At nine.", "rejected": start + " Never."})
    assert preference.prompt == [user("When does it open?")]
    assert preference.notes[0].startswith("warning: 'context' is not read")


@pytest.mark.parametrize(
    "record, prompt, other",
    [
        ({"input": "science", "task": "Explain rain to me."}, "science", "'task'"),
        ({"instruction": "Rate by truth alone.", "user_prompt": "Rain?"}, "Rate by truth alone.", "'user_prompt'"),
        ({"context": "You are kind.", "ask": "Is it rain?"}, "You are kind.", "'ask'"),
        ({"query": "weather api", "the question": [user("Rain?")]}, "weather api", "'the question'"),
    ],
)
def test_another_column_that_may_be_the_prompt_is_warned_of(record, prompt, other):
    (preference,) = normalise(record | {"chosen": "a", "rejected": "b"})
    assert preference.prompt == prompt
    (warning,) = (note for note in preference.notes if note.startswith("warning"))
    assert f"read as the prompt, though {other} may be it: name the prompt with the source's 'columns'" in warning
    (sure,) = normalise(
        {"question": "Which?", "prompt_id": "a b", "task_type": "a b", "user": "a", "chosen": "a", "rejected": "b"}
    )
    assert sure.notes == ("'question' read as the prompt",)


def test_a_word_beside_answers_that_hold_the_prompt_is_warned_of():
    record = {"problem": "p-17", "chosen": "Q: Is it rain?\nA: yes", "rejected": "Q: Is it rain?\nA: no"}
    (preference,) = normalise(record)
    assert preference.notes[1].startswith("warning: 'problem' read as the prompt, though chosen and rejected begin with a")


@pytest.mark.parametrize("name", ["System", "SYSTEM_PROMPT", "sys_prompt", "system_instruction", "systemMessage"])
def test_columns_of_a_system_message_have_many_names(name):
    (preference,) = normalise({name: "Be kind.", "prompt": Q, "chosen": GOOD, "rejected": BAD})
    assert preference.prompt[0] == {"role": "system", "content": "Be kind."} and preference.unused == ()
    (other,) = normalise({"system_id": "Be kind.", "prompt": Q, "chosen": GOOD, "rejected": BAD})
    assert (other.prompt, other.unused) == (Q, ("system_id",))


@pytest.mark.parametrize("name", ["Context", "INPUT", "Documents"])
def test_columns_that_belong_to_the_prompt_are_warned_of_in_capitals(name):
    (preference,) = normalise({"prompt": "Say it.", "chosen": "a", "rejected": "b", name: "a dog"})
    assert preference.notes[0].startswith(f"warning: {name!r} is not read, though it may belong to the prompt")
