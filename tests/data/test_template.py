"""A chat template gets messages in the form that it reads, and the same date every day."""

from __future__ import annotations

import json
from datetime import date, datetime

import pytest
import templates
from samples import CHAT_TEMPLATE, make_tokenizer, user
from templates import CALLS, EACH, GENERATE, answer, calling, say, tokenizer_for

from raydpo.config import DataConfig
from raydpo.data.messages import Malformed
from raydpo.data.pairs import load_pairs
from raydpo.data.preference import Preference
from raydpo.data.tokenise import Tokeniser


def ids_of(template, *pair, **more):
    (ids,) = Tokeniser(tokenizer_for(template)).encode([Preference(*pair, **more)])
    return str(ids) if isinstance(ids, Malformed) else [part.tolist() for part in ids]


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    "template", [CHAT_TEMPLATE, templates.LLAMA, templates.QWEN, templates.GEMMA, templates.GEMMA_PARTS]
)
def test_parts_give_the_keys_of_plain_text(template):
    text = [user("Which colour?")], answer("Red and blue."), answer("Loud.")
    split = [user(parts("Which", " colour?"))], answer(parts("Red and blue.")), answer(parts("Loud."))
    if template == templates.GEMMA_PARTS:  # reads parts, and trims each
        split = [user(parts("Which colour?"))], *split[1:]
    assert ids_of(template, *split) == ids_of(template, *text)


def test_a_system_message_of_two_parts_is_whole():
    text = [say("system", "Be kind."), user("q")], answer("a"), answer("b")
    split = [say("system", parts("Be ", "kind.")), user("q")], answer("a"), answer("b")
    assert ids_of(templates.GEMMA_PARTS, *split) == ids_of(templates.GEMMA_PARTS, *text)


def test_text_is_a_part_for_a_template_that_reads_parts_only():
    tokeniser = Tokeniser(tokenizer_for(templates.PARTS_ONLY))
    (pair,) = tokeniser.encode([Preference([user("What is ice?")], answer("Water."), answer("Stone."))])
    assert tokeniser.tokenizer.decode(pair.prompt) == "<s>User: What is ice?</s>\n<s>Assistant: "
    assert tokeniser.tokenizer.decode(pair.chosen) == "Water.</s>\n"


@pytest.mark.parametrize(
    "template",
    [CHAT_TEMPLATE, templates.GEMMA_PARTS, templates.PARTS_ONLY, templates.PARTS_ONLY.replace("['type']", ".type")],
)
@pytest.mark.parametrize("form", ["input_text", "output_text", None, "string"])
def test_parts_of_text_are_read_whatever_their_type(template, form):
    """Templates ask for the type ``text``."""

    def part(text):
        return text if form == "string" else {"text": text} if form is None else {"type": form, "text": text}

    pair = [user([part("Which colour?")])], answer([part("Red.")]), answer([part("Loud.")])
    plain = [user(parts("Which colour?"))], answer(parts("Red.")), answer(parts("Loud."))
    assert ids_of(template, *pair) == ids_of(template, *plain) and not isinstance(ids_of(template, *plain), str)
    ((_, found),) = Tokeniser(tokenizer_for(template)).encode_noted([Preference(*pair)])
    changed = (
        "content parts, joined to text" if template == CHAT_TEMPLATE else "content parts of text, given with type 'text'"
    )
    assert {remark[:2] for remark in found} == {("given in another form", changed)}
    assert pair == ([user([part("Which colour?")])], answer([part("Red.")]), answer([part("Loud.")]))


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("enable_thinking", True),
        ("thinking", False),
        ("think", False),
        ("role", False),
        ("ns", False),
        ("loop", False),
        ("style", True),
        ("mood", True),
        ("inner", True),
        ("title", False),
    ],
)
def test_arguments_are_read_if_they_are_variables_of_the_template(name, read):
    """A substring of another name, an attribute or a variable that the template sets first is not."""
    template = (
        "{# title #}{% if mood is not defined %}{% set mood = 'calm' %}{% endif %}{% set style = style | default('x') %}"
        "{% macro write() %}{{ inner }}{% endmacro %}"
        + templates.QWEN.replace("{{- content }}", "{%- generation -%}{{- content }}{% endgeneration %}")
    )
    kwargs = {name: False}
    _, found = Tokeniser(tokenizer_for(template)).encode_noted(
        [Preference([user("q")], answer("a"), answer("b"), template_kwargs=kwargs)]
    )[0]
    assert (("arguments of the template not read", name) in {remark[:2] for remark in found}) != read


def test_other_parts_are_refused_where_the_template_takes_text():
    thought = answer([{"type": "thinking", "thinking": "hm"}, *parts("Red.")])
    reason = ids_of(CHAT_TEMPLATE, [user("q")], thought, answer("b"))
    assert reason == (
        "content of role 'assistant' has parts other than text (thinking), which the chat template cannot take; write "
        "thoughts into the text, in <think> and </think>"
    )


ARGUMENTS = {"zone": "Oslo", "days": 3}
PLAIN = EACH + "{{ message.content or '' }}{% for call in message.tool_calls or [] %}[{{ call.function.name }} "


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (CALLS, '[clock {"zone": "Oslo", "days": 3}]'),
        (templates.LLAMA, '{"name": "clock", "parameters": {"zone": "Oslo", "days": 3}}'),
        (templates.QWEN, '{"name": "clock", "arguments": {"zone": "Oslo", "days": 3}}'),
        (templates.DEEPSEEK, 'clock{"zone": "Oslo", "days": 3}\n```'),
        (
            PLAIN + "{{ call.function.arguments }}]{% endfor %}</s>\n{% endfor %}" + GENERATE,
            '[clock {"zone": "Oslo", "days": 3}]',
        ),
        (
            PLAIN
            + "{% for key, value in call.function.arguments.items() %}{{ key }}={{ value }};{% endfor %}]{% endfor %}</s>\n"
            "{% endfor %}" + GENERATE,
            "[clock zone=Oslo;days=3;]",
        ),
    ],
    ids=["tojson", "llama", "either", "joined", "printed", "items"],
)
def test_arguments_as_object_and_as_text_are_written_alike(template, written):
    tokeniser = Tokeniser(tokenizer_for(template))
    for arguments in (ARGUMENTS, json.dumps(ARGUMENTS)):
        (pair,) = tokeniser.encode([Preference([user("q")], calling(arguments=arguments), answer("b"))])
        assert written in tokeniser.tokenizer.decode(pair.chosen)


def test_arguments_in_text_that_a_template_writes_stay_as_they_are():
    spaced = '{"zone":   "Oslo"}'
    tokeniser = Tokeniser(tokenizer_for(templates.QWEN))
    (pair,) = tokeniser.encode([Preference([user("q")], calling(arguments=spaced), answer("b"))])
    assert spaced in tokeniser.tokenizer.decode(pair.chosen)


class Tomorrow(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2031, 5, 6, 7, 8, 9)


TODAY = "<s>Today is {{ strftime_now('%A, %-d %B %Y %H:%M %% %y') }}.</s>\n" + CHAT_TEMPLATE
IN_MACRO = "{% macro first() %}{{ strftime_now('%Y-%m-%d') }}{% endmacro %}<s>{{ first() }}</s>\n" + CHAT_TEMPLATE
BUILT = "{% set form = '%d' ~ ' %b' %}<s>{{ strftime_now(form) if strftime_now is defined }}</s>" + CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (TODAY, "Friday, 26 July 2024 00:00 % 24"),
        (templates.LLAMA, "Today Date: 26 Jul 2024"),
        (IN_MACRO, "2024-07-26"),
        (BUILT, "26 Jul"),
    ],
)
def test_the_date_is_the_same_every_day(monkeypatch, template, written):
    pair = Preference([user("q")], answer("a"), answer("b"))
    tokeniser = Tokeniser(tokenizer_for(template))
    (today,) = tokeniser.encode([pair])
    assert written in tokeniser.tokenizer.decode(today.prompt)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    (tomorrow,) = Tokeniser(tokenizer_for(template)).encode([pair])
    assert today.prompt.tolist() == tomorrow.prompt.tolist()
    assert tokeniser.tokenizer.chat_template == template  # as it is exported


def test_the_date_is_a_setting_and_recorded(write):
    record = {"prompt": [user("q")], "chosen": answer("a"), "rejected": answer("b")}
    config = DataConfig(train=write([record]), template_date="2025-01-02")
    tokeniser = Tokeniser(tokenizer_for(templates.LLAMA), config.template_date)
    sets = load_pairs(config, tokeniser)
    assert "02 Jan 2025" in tokeniser.tokenizer.decode(sets.train["prompt_ids"][0].as_py())
    assert sets.report.to_dict()["template_date"] == "2025-01-02"
    assert (
        "the chat template writes today's date; it is told 2025-01-02 on every day (data.template_date)"
        in sets.report.lines()
    )
    own = record | {"chat_template_kwargs": {"date_string": "1 May 1999"}}
    sets = load_pairs(DataConfig(train=write([own])), tokeniser)
    assert "Date: 1 May 1999" in tokeniser.tokenizer.decode(sets.train["prompt_ids"][0].as_py())
    sets = load_pairs(DataConfig(train=write([record])), Tokeniser(tokenizer_for(CHAT_TEMPLATE)))
    assert sets.report.to_dict()["template_date"] is None and len(sets.report.lines()) == 1


def test_pinning_changes_nothing_else():
    """The text before the first tag of a template keeps its white space."""
    for start in ("\n\n x", "  x", "", "\n"):
        template = start + "{{ strftime_now('%d') }}" + CHAT_TEMPLATE
        tokenizer = tokenizer_for(template)
        rendered = Tokeniser(tokenizer, date.today()).template.render([user("q")])
        assert rendered == tokenizer.apply_chat_template([user("q")], tokenize=False)


def test_a_template_that_cuts_content_is_not_taken_for_one_that_reads_parts():
    cut = EACH + "{{ message.content[:10] }}</s>\n{% endfor %}" + GENERATE
    tokeniser = Tokeniser(tokenizer_for(cut))
    ((pair, found),) = tokeniser.encode_noted([Preference([user("q")], answer("Frozen water."), answer("b"))])
    assert isinstance(pair, Malformed) and "leaves out or changes all of chosen" in str(pair) and not found
    ((pair, _),) = tokeniser.encode_noted([Preference([user("q")], answer("Frozen."), answer("b"))])
    assert tokeniser.tokenizer.decode(pair.chosen) == "Frozen.</s>\n"


def test_a_column_called_as_a_variable_of_the_template_is_warned_of(tmp_path):
    template = CHAT_TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %}<none>{% endif %}"
    record = {"prompt": [user("q")], "chosen": "good", "rejected": "bad", "role": "x"}
    rows = [record | {"enable_thinking": False}, record | {"chat_template_kwargs": {"enable_thinking": False}}, record]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = load_pairs(DataConfig(train=[str(path)]), Tokeniser(make_tokenizer(template))).report.lines()
    (line,) = [line for line in lines if "variable" in line]
    assert line.startswith("warning: data a: 1 records: 'enable_thinking' is not given to the chat template, which reads a")
