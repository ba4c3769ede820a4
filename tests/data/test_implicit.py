"""Prompts that are implicit: the common beginning of two texts, and Human/Assistant transcripts."""

import pytest
from samples import decoded

from raydpo.data.preference import normalise


@pytest.mark.parametrize(
    "chosen, rejected, prompt",
    [
        ("Q: ice?\nA: Frozen water.", "Q: ice?\nA: A stone.", "Q: ice?\nA:"),
        ("Q: fog?\nA: It is a dog.", "Q: fog?\nA: Air.", "Q: fog?\nA:"),
        ("Say it:\nwatermelon", "Say it:\nwaterfall", "Say it:\n"),
        ("Human: ice?\nAssistant: Water.", "Human: ice?\nAssistant: A stone.", "Human: ice?\nAssistant:"),
        (
            "### Human: ice?\n### Assistant: Water.",
            "### Human: ice?\n### Assistant: Stone.",
            "### Human: ice?\n### Assistant:",
        ),
        ("Q: ice? Water", "Q: ice? Water and cold", "Q: ice?"),
    ],
)
def test_implicit_prompt_of_texts_ends_at_white_space(chosen, rejected, prompt):
    (preference,) = normalise({"chosen": chosen, "rejected": rejected, "source": "made up"})
    assert preference.prompt == prompt
    assert (prompt + preference.chosen, prompt + preference.rejected) == (chosen, rejected)
    assert "common beginning" in preference.notes[0]


def test_a_short_common_beginning_is_warned_of():
    (preference,) = normalise({"chosen": "Frozen water.", "rejected": "Frozen stone."})
    assert preference.prompt == "Frozen" and preference.notes[0].startswith("warning: no 'prompt'")


TURNS = "\n\nHuman: Write a chat.\n\nAssistant:"


@pytest.mark.parametrize("template", [None, "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"])
@pytest.mark.parametrize(
    "chosen, rejected",
    [
        (" Here:\n\nHuman: Hi\n\nAssistant: Hello", " No."),
        (" Fine.", " Fine.\n\nHuman: Thanks"),
        (" As follows.\n\nHuman: a\n\nAssistant: b", " As told.\n\nHuman: a\n\nAssistant: c"),
    ],
)
def test_turns_in_an_answer_of_a_transcript_stay_its_text_and_are_warned_of(write, template, chosen, rejected):
    ((prompt, better, worse),), lines = decoded(write, [{"chosen": TURNS + chosen, "rejected": TURNS + rejected}], template)
    assert chosen.strip() in better and rejected.strip() in worse and "Write a chat." in prompt
    assert any(line.startswith("warning: data prefs: 1 records: an answer of a transcript holds further") for line in lines)
    _, lines = decoded(write, [{"chosen": TURNS + " Fine.", "rejected": TURNS + " No."}], template)
    assert not any("further turns" in line for line in lines)


def test_transcripts_beside_a_prompt_of_another_text_are_warned_of():
    start = "\n\nHuman: q\n\nAssistant:"
    (preference,) = normalise({"prompt": "Something else.", "chosen": start + " good", "rejected": start + " bad"})
    assert preference.prompt == "Something else." and preference.notes[0].startswith(
        "warning: chosen and rejected are transcripts"
    )


def test_transcripts_for_a_tokenizer_without_a_chat_template(write):
    start = "\n\nHuman: the sky?\n\nAssistant:"
    rows, lines = decoded(write, [{"chosen": start + " blue", "rejected": start + " green"}], None)
    assert rows == [(start, " blue</s>", " green</s>")]
    assert lines[1] == (
        "data prefs: 1 records: Human/Assistant transcripts read as text, since the tokenizer has no chat template"
    )


def test_both_readings_of_a_transcript_are_held_out_alike(write):
    start = "\n\nHuman: {}\n\nAssistant:"
    records = [{side: start.format(number) + f" {side}" for side in ("chosen", "rejected")} for number in range(40)]
    rows = [
        decoded(write, records, template, eval={"fraction": 0.5})[0]
        for template in ("{{ messages[0].content }} {{ messages[1:] }}", None)
    ]
    asked = [{int("".join(filter(str.isdigit, prompt))) for prompt, _, _ in each} for each in rows]
    assert asked[0] == asked[1] and 5 < len(asked[0]) < 35
