"""Conversations put together from what a template did with others are those that transformers renders."""

from __future__ import annotations

import random
from datetime import date
from pathlib import Path

import pytest
import templates
from samples import EACH, make_tokenizer, user
from templates import tokenizer_for

from raydpo.data import forms, traced
from raydpo.data.template import ChatTemplate
from raydpo.errors import FilesError

THINKING = (Path(__file__).parent / "thinking.jinja").read_text()
TEMPLATES = {
    name: text for name, text in vars(templates).items() if name.isupper() and isinstance(text, str) and "endfor" in text
} | {"THINKING": THINKING}
FOLLOWED = {"CHATML", "ZEPHYR", "LLAMA", "QWEN", "MISTRAL", "GEMMA", "DEEPSEEK", "DROPS_THOUGHTS", "CALLS", "THINKING"}
"""Templates of which most conversations are put together."""
ODD = [
    "|length", "|upper", "|replace('a', 'b')", "|replace('a', messages[0].content)", "[:3]", "[0]", "[-1:]", "[::-1]",
    " in ['', 'a']", " in 'abc'", " in messages[0].content", " not in ('a', 'b')", " ~ 1 ~ none", "|tojson", " * 2",
    " < 'b'", ".format()", "|title", "|wordcount", "|indent", "|first", "|last", "|reverse", "|list",
    "|default('x', true)", "|int", "|safe", "|escape", "|string|trim('a')", ".split('a')[0]", ".split()[0]",
    ".split('a')[1]", ".split('a')|length", ".split('a')", ".split(messages[0].content)[0]", ".rsplit('a', 1)[-1]",
    ".splitlines()", ".strip", ".strip()", ".text", ".isdigit()", ".find('a')", ".startswith(('a', 'b'))",
    ".partition('a')[0]", " == none", " != 'a'", " is string", "|count", " is lower", " is in ['a']", " is in 'abc'",
    " is iterable", " is sequence", " is sameas 'a'", " == messages[0].content", "|attr('upper')", "|batch(2)|list",
    " or 'none'", " and 'some'", "|capitalize", ".title()", ".encode()", ".upper()[:2]", "|truncate(3)", "|urlize",
    "|center(9)", ".zfill(5)", ".removeprefix('a')", ".join(['x', 'y'])", "|e", "|unique|list",
    ".split('a')[-1].lstrip('\\n') + '!'", ".count('a') % 2 == 0", "|trim|length", "['type']", " is mapping",
    "|striptags", " ~ 'x' == 'ax'",
]  # fmt: skip
WHOLE = [
    "{{ '%s' % m.content }}", "{{ '%s' % (m.content,) }}", "{{ [m.content]|join('-') }}", "{{ '-'.join([m.content]) }}",
    "{{ '{}'.format(m.content) }}", "{% for x in m.content %}{{ x }}{% endfor %}", "{{ m }}", "{{ m|tojson }}",
    "{% for k, v in m.items() %}{{ k }}{{ v }}{% endfor %}", "{% for k in m %}{{ k }}{% endfor %}",
    "{{ m|items|list }}",
    "{% macro say(x) %}<{{ x|trim }}>{% endmacro %}{{ say(m.content) }}{% if 'a' in say(m.content) %}!{% endif %}",
    "{% set x %} {{ m.content }} {% endset %}{{ x|trim }}{% if x|trim == 'a' %}!{% endif %}",
    "{% set ns = namespace(t='') %}{% for n in messages %}{% set ns.t = ns.t + n.content %}{% endfor %}{{ ns.t|trim }}",
    "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}",
    "{{ messages|map(attribute='content')|join(' ') }}",
    "{{ messages|selectattr('content', 'equalto', 'a')|list|length }}", "{{ messages|map(attribute='content')|list }}",
    "{{ {m.content: 1} }}", "{{ {'a': 1}[m.content] }}", "{{ loop.previtem.content }}", "{{ loop.changed(m.content) }}",
    "{{ m.get('content') }}", "{{ m['content'] + m['role'] }}", "{{ dict(m) }}", "{{ m.content.split('a')|join('-') }}",
    "{% filter upper %}{{ m.content }}{% endfilter %}", "{% generation %}{{ m.content }}{% endgeneration %}",
    "{% set x = m.content if m.content else 'e' %}{{ x }}", "{{ loop.cycle(m.content, 'b') }}",
    "{{ range(m.content|length) }}", "{% if m.content|length > 3 and m.content[:1] == ' ' %}!{% endif %}",
    "{% if m.content == 'a' %}{{ raise_exception('no') }}{% endif %}", "{{ 'abc'.startswith(m.content) }}",
    "{{ 'abca'.replace('a', m.content) }}", "{{ 'b' + m.content + 'c' }}", "{{ m.content.a.b }}",
    "{% if not m.content %}empty{% elif m.content is none %}none{% endif %}", "{{ messages|tojson }}",
    "{{ messages|length }}", "{% for n in messages|reverse %}{{ n.content }}{% endfor %}",
    "{{ (messages|first).content }}", "{{ messages[-1]['content'] }}", "{{ (m.content, 1)|string }}",
    "{{ [m.content, 'b']|sort }}", "{{ namespace(content=m.content).content }}", "{{ m|length }}",
    "{% with x = m.content %}{{ x }}{% endwith %}", "{{ cycler('a', 'b').next() }}",
    "{{ m.content | map('upper') | list }}", "{% if 'a' < m.content < 'c' %}!{% endif %}",
    "{% if 'a' in m.content in [true] %}!{% endif %}", "{{ m.copy() }}", "{{ 7 % 4 }}",
    "{% if m.content ~ 'x' == 'ax' %}!{% endif %}", "{% if '%s' % (m.content,) == 'a' %}!{% endif %}",
    "{{ messages[m.content] is defined }}",
]  # fmt: skip
WORDS = [
    "a",
    "b",
    " ",
    "\n",
    "abc",
    "<think>",
    "</think>",
    "Hi there",
    "\u00e9\u4e2d",
    "'",
    '"',
    "\\",
    "{{ x }}",
    "%s",
    "{}",
    "7",
    "count",
    "",
]
ROLES = [("user",), ("user", "assistant"), ("system", "user", "assistant"), ("user", "assistant", "user", "assistant")]


def conversations(seed, count, roles=ROLES):
    draw = random.Random(seed)
    for _ in range(count):
        yield [
            {"role": role, "content": "".join(draw.choices(WORDS, k=draw.choice((0, 1, 1, 1, 2, 4))))}
            for role in draw.choice(roles)
        ]


def outcome(render):
    try:
        return render()
    except Exception as error:
        return type(error), str(error)


def shares(template, given, **options):
    """The share of conversations that were put together, all compared with those of transformers."""
    tokenizer = tokenizer_for(template)
    ours, asked = ChatTemplate(tokenizer, date(2026, 7, 1)), []
    oracle = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda *args, **more: (asked.append(1), oracle(*args, **more))[1]
    count = 0
    for messages in given:
        for generate in (True, False):
            count += 1
            written = {"chat_template": ours._with_pinned_date(template)} if "strftime_now" in template else {}
            expected = outcome(
                lambda: oracle(messages, tokenize=False, add_generation_prompt=generate, **written, **options)  # noqa: B023
            )
            assert outcome(lambda: ours.render(messages, generate=generate, **options)) == expected  # noqa: B023
    return 1 - len(asked) / count


@pytest.fixture(autouse=True)
def no_comparison(monkeypatch):
    monkeypatch.setattr(forms, "_COMPARED", 0)
    monkeypatch.setattr(forms, "_EVERY", 1 << 60)


@pytest.mark.parametrize("name", TEMPLATES)
def test_renderings_are_those_of_transformers(name):
    share = shares(TEMPLATES[name], conversations(name, 250))
    assert share > 0.6 or name not in FOLLOWED


@pytest.mark.parametrize(
    "options", [{"enable_thinking": False}, {"enable_thinking": True}, {"date_string": "x"}, {"n": 1}, {"n": [1]}]
)
def test_arguments_of_the_template_count(options):
    for name in ("THINKING", "LLAMA"):
        assert (shares(TEMPLATES[name], conversations(name, 60), **options) > 0.4) == (options != {"n": [1]})


@pytest.mark.parametrize("part", [f"{{{{ m.content{end} }}}}{{% if m.content{end} %}}!{{% endif %}}" for end in ODD] + WHOLE)
def test_whatever_a_template_does_with_a_text(part):
    shares(f"{{% for m in messages %}}[{{{{ m.role }}}} {part}]{{% endfor %}}", conversations(part, 60, ROLES[:2]))


def test_a_true_argument_is_not_one():
    template = "{{ n }}{% for m in messages %}{{ m.content }}{% endfor %}"
    ours = ChatTemplate(tokenizer_for(template))
    for _ in range(3):
        for value in (True, 1, "1", None):
            assert ours.render([{"role": "user", "content": "x"}], n=value) == f"{value}x"


def test_the_order_of_fields_counts():
    template = "{% for m in messages %}{% for k in m %}{{ k }}{% endfor %}{% endfor %}"
    ours = ChatTemplate(tokenizer_for(template))
    for _ in range(3):
        assert ours.render([{"role": "user", "content": "x"}]) == "rolecontent"
    assert ours.render([{"content": "x", "role": "user"}]) == "contentrole"


def test_a_form_that_differs_is_given_up(monkeypatch):
    monkeypatch.setattr(forms, "_COMPARED", 2)
    monkeypatch.setattr(traced.Traced, "strip", lambda self, *_: self)
    template = "{% for m in messages %}{{ m.content.strip() }}{% endfor %}"
    ours = ChatTemplate(tokenizer_for(template))
    for text in ("a", "b", "c", " d ", " e ", " f "):
        assert ours.render([{"role": "user", "content": text}]) == text.strip()
    assert not ours._forms._use


@pytest.mark.parametrize("name", ["_compile_jinja_template", "render_jinja_template"])
def test_another_version_of_transformers(monkeypatch, name):
    from transformers.utils import chat_template_utils

    tokenizer = tokenizer_for(templates.CHATML)
    monkeypatch.delattr(chat_template_utils, name)
    tokenizer.apply_chat_template = lambda messages, **_: messages[0]["content"]
    ours = ChatTemplate(tokenizer)
    assert [ours.render([{"role": "user", "content": text}]) for text in "abcd"] == [*"abcd"]


def test_a_tokenizer_that_renders_otherwise_is_asked():
    tokenizer = tokenizer_for(templates.CHATML)
    tokenizer.__class__ = type("Own", (type(tokenizer),), {"apply_chat_template": lambda self, messages, **_: "own"})
    ours = ChatTemplate(tokenizer)
    assert {ours.render([{"role": "user", "content": "x"}]) for _ in range(4)} == {"own"}


def test_a_later_conversation_that_differs_is_an_error(monkeypatch):
    monkeypatch.setattr(forms, "_EVERY", 5)
    tokenizer = make_tokenizer(EACH)
    ours = ChatTemplate(tokenizer)
    for number in range(3):
        ours.render([user(f"a {number}")])
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *_, **__: "other")
    texts = [ours.render([user("b")]) for _ in range(3)]
    assert set(texts) == {"<s>user b</s>"}
    with pytest.raises(FilesError, match="otherwise than others of its form: 'other', expected '<s>us"):
        [ours.render([user("c")]) for _ in range(5)]
