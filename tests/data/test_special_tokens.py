"""Ends of turns, BOS and EOS, and special tokens that texts spell, in what a chat template writes."""

from __future__ import annotations

import pytest
import templates
from samples import CHAT_TEMPLATE, make_tokenizer, user
from templates import CALLS, PROMPT, answer, calling, lines_of, noted, record, tokenizer_for, tool

from raydpo.config import DataConfig
from raydpo.data.pairs import load_pairs
from raydpo.data.preference import Preference
from raydpo.data.tokenise import Tokeniser
from raydpo.errors import DataError


def test_no_end_of_turn(write):
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    lines, _ = lines_of(write, template, record(PROMPT, answer("Nine."), answer("Ten.")))
    assert any(
        "in 1 pairs no special token follows the last text of an answer: such as '\\n' (prefs.jsonl:1); so the model" in line
        for line in lines
    )
    # spelled like a special token, but none of the tokenizer's
    foreign = template.replace("\n{%", "<|end|>\n{%")
    tokenizer = tokenizer_for(None)
    tokenizer.chat_template = foreign
    ((_, found),) = Tokeniser(tokenizer).encode_noted([Preference(PROMPT, answer("Nine."), answer("Ten."))])
    assert ("no end of turn", "") in {(one.kind, one.what) for one in found}


@pytest.mark.parametrize("text", ["</s>", "s", "/s", "</s></s>", "</", "<s>"])
def test_the_end_of_turn_is_not_taken_for_the_last_text(text):
    """A text that spells the end of a turn, or part of it."""
    _, found = noted(CALLS, PROMPT, calling(arguments={"zone": text}), answer(text))
    twice = {("EOS twice", "")} if text.endswith("</s>") else set()
    assert {one for one in found if one[0] in ("no end of turn", "EOS twice")} == twice
    endless = CALLS.replace("</s>", "")
    assert ("no end of turn", "") in noted(endless, PROMPT, calling(arguments={"zone": text}), answer("Ten."))[1]
    _, found = noted(CALLS, PROMPT, calling(arguments={"zone": text}), answer("Ten."))
    assert {one for one in found if one[0] != "special tokens spelled"} == set()


def test_eos_twice():
    twice = ("EOS twice", "")
    assert twice in noted(CHAT_TEMPLATE, PROMPT, answer("Nine.</s>"), answer("Ten."))[1]
    assert (
        twice in noted(CHAT_TEMPLATE + "{{ '' if add_generation_prompt else '</s>' }}", PROMPT, answer("a"), answer("b"))[1]
    )
    assert ("EOS twice", "chosen") in noted(None, "the sky", " is</s>\n</s>", " was")[1]
    assert noted(None, "the sky", " is</s>", " was")[1] == set()
    on_one_line = CHAT_TEMPLATE.replace("message.content", "message.content | replace('\n', ' ')")
    changed = {("white space changed", "content of role 'assistant' (chosen)")}
    assert noted(on_one_line, [user("q")], answer("one\ntwo"), answer("b"))[1] == changed


def test_a_template_that_begins_the_next_turn_whether_asked_or_not():
    always = CHAT_TEMPLATE.replace("{% if add_generation_prompt %}", "").removesuffix("{% endif %}")
    for repeated in range(2):  # what is known to be sound must not hide it
        assert noted(always, PROMPT, answer(f"Nine {repeated}."), answer("Ten."))[1] == {("text after the end", "")}
    assert noted(CHAT_TEMPLATE, PROMPT, answer("Nine."), answer("Ten."))[1] == set()


@pytest.mark.parametrize(
    "prompt, chosen, rejected, glued",
    [
        ("the sky?", "It is", "No", True),
        ("the sky", "Blue", "Red", True),
        ("the sky?", "it is", " no", False),
        ("the sky?\n", "It is", "No", False),
        ("the sky:", "It is", "No", False),
        ("def na", "me(x):", "med():", False),
    ],
)
def test_text_that_meets_its_answer(prompt, chosen, rejected, glued):
    assert (("no white space between", "") in noted(None, prompt, chosen, rejected)[1]) == glued


@pytest.mark.parametrize(
    "end, twice, spelled",
    [("", 0, 0), ("</s>", 0, 0), ("</s>\n", 1, 0), ("</s></s>", 1, 0), ("</s> </s>\n</s>", 1, 0), ("</s>!</s></s>", 1, 1)],
)
@pytest.mark.parametrize("adds_eos", [False, True])
def test_eos_at_the_end_of_text_answers(write, end, twice, spelled, adds_eos):
    """One EOS is what is wanted, whether the text, the tokenizer or raydpo writes it."""
    from tokenizers import processors

    tokenizer = tokenizer_for(None)
    if adds_eos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
        )
    path = write([{"prompt": "the sky", "chosen": " is" + end, "rejected": " was"}])
    sets = load_pairs(DataConfig(train=path), Tokeniser(tokenizer))
    lines = [line for line in sets.report.lines() if line.startswith("warning")]
    assert [sum(word in line for line in lines) for word in ("EOS twice", "spell")] == [twice, spelled]
    ids = sets.train["chosen_ids"][0].as_py()
    assert (ids.count(tokenizer.eos_token_id) == 1) == (not twice) and ids[-1] == tokenizer.eos_token_id
    for line in lines[:twice]:
        assert line == (
            "warning: data prefs: the answers of 1 pairs end with EOS twice: 1 chosen, such as '</s>' (prefs.jsonl:1); take "
            "it off the end of the answers, or out of the chat template"
        )


@pytest.mark.parametrize("end", ["</s>", "</s>\n", " </s>"])
def test_eos_at_the_end_of_answers_in_messages(write, end):
    lines, _ = lines_of(write, CHAT_TEMPLATE, record(PROMPT, answer("Nine." + end), answer("Ten.")))
    (line,) = (line for line in lines if "EOS twice" in line)
    assert line.endswith("take it off the end of the answers, or out of the chat template")


def test_bos_twice_or_missing(write):
    lines, sets = lines_of(write, None, {"prompt": "<s>the sky", "chosen": " is", "rejected": " was"}, bos=True)
    assert any(
        "1 prompts of plain text begin with BOS, which the tokenizer adds, too: (prefs.jsonl:1)" in line for line in lines
    )
    tokenizer = tokenizer_for(None, bos=True)
    assert tokenizer.decode(sets.train["prompt_ids"][0].as_py()) == "<s>the sky"
    (once,) = Tokeniser(tokenizer).encode([Preference("the sky", " is", " was")])
    assert sets.train["prompt_ids"][0].as_py() == once.prompt.tolist()
    assert ("no BOS", "") in noted(templates.CHATML, PROMPT, answer("a"), answer("b"), bos=True)[1]
    assert ("no BOS", "") not in noted(templates.LLAMA, PROMPT, answer("a"), answer("b"), bos=True)[1]
    assert ("no BOS", "") not in noted(templates.CHATML, PROMPT, answer("a"), answer("b"))[1]
    assert ("BOS twice", "") in noted("<s>" + templates.LLAMA, PROMPT, answer("a"), answer("b"))[1]


def test_special_tokens_that_texts_spell(write):
    bad = record([user("What does </s>\n<s>system mean?")], answer("With </s>, and then."), answer("Ten."))
    lines, _ = lines_of(write, CHAT_TEMPLATE, bad)
    (line,) = (line for line in lines if "spell special tokens" in line)
    assert line.startswith("warning: ") and "1 prompt, such as '</s>' (prefs.jsonl:1); 1 chosen, such as '</s>'" in line
    with pytest.raises(DataError, match="1 its text spells a special token"):
        lines_of(write, CHAT_TEMPLATE, bad, special_tokens="refuse")
    assert ("special tokens spelled", "chosen") in noted(None, "the sky", " is</s> was", " was")[1]
    inside = calling(arguments={"zone": "a<s>b"})
    assert ("special tokens spelled", "chosen") in noted(CALLS, PROMPT, inside, answer("b"))[1]
    assert ("special tokens spelled", "prompt") in noted(CALLS, PROMPT, answer("a"), answer("b"), tools=[tool("a<s>")])[1]


@pytest.mark.parametrize("token", ["<|User|>", "<tool_call>", "<|unused|>", "<\uff5cUser\uff5c>"])
def test_tokens_of_turns_that_are_added_but_not_special(token):
    """The tokenizer reads them as one token, whatever it calls them."""
    template = templates.DEEPSEEK + "{# writes <tool_call> #}"

    def found_in(chosen, added=True):
        tokenizer = make_tokenizer(template)
        if added:
            tokenizer.add_tokens([token, "<|Assistant|>", "<think>", "water", "<b>"])
        ((_, found),) = Tokeniser(tokenizer).encode_noted([Preference(PROMPT, answer(chosen), answer("Ten."))])
        return [(remark.what, remark.example) for remark in found if remark.kind == "special tokens spelled"]

    assert found_in(f"It writes {token}.") == [("chosen", token)]
    assert found_in("<think>So.</think>Frozen <b>water</b>.") == [] == found_in(f"It writes {token}.", added=False)


def test_tokens_that_a_template_puts_together():
    tokenizer = make_tokenizer(
        templates.CHATML.replace("<|im_start|>", "[{{ '' }}").replace("{{ message['role'] }}\n", "x]")
    )
    tokenizer.add_tokens(["[x]"])
    ((_, found),) = Tokeniser(tokenizer).encode_noted([Preference([user("a[x]b")], answer("a"), answer("b"))])
    assert ("special tokens spelled", "prompt", "[x]") in {remark[:3] for remark in found}


def test_special_tokens_in_what_templates_need_not_write(write):
    odd = tool("clock")
    odd["function"]["parameters"]["properties"]["a</s>b"] = {"type": "string"}
    for tools in ([tool("clock") | {"note": "x </s> y"}], [odd]):
        bad = record(PROMPT, answer("a"), answer("b"), tools=tools)
        lines, _ = lines_of(write, CHAT_TEMPLATE, bad)
        assert any("spell special tokens" in line and "1 prompt, such as '</s>' (prefs.jsonl:1)" in line for line in lines)
        lines, _ = lines_of(write, CHAT_TEMPLATE.replace("tools | tojson", "tools[0].function.name"), bad)
        assert not any("spell special tokens" in line for line in lines)  # not written
    named = [user("Hello?", name="Bo<s>b")]
    writes = CHAT_TEMPLATE.replace("{{ message.role }}", "{{ message.role }} {{ message.name or '' }}")
    assert ("special tokens spelled", "prompt") in noted(writes, named, answer("a"), answer("b"))[1]
    assert ("special tokens spelled", "prompt") not in noted(CHAT_TEMPLATE, named, answer("a"), answer("b"))[1]
    keys = calling(arguments={"zo</s>ne": "a"})
    assert ("special tokens spelled", "chosen") in noted(CALLS, PROMPT, keys, answer("b"))[1]
    lines, _ = lines_of(
        write,
        "{{ first }}" + CHAT_TEMPLATE,
        record(PROMPT, answer("a"), answer("b"), chat_template_kwargs={"first": "a<s>", "thinking": False}),
    )
    assert any("1 chat_template_kwargs, such as '<s>' (prefs.jsonl:1)" in line for line in lines)


def test_plain_text_for_a_chat_model(write):
    plain = {"prompt": "the sky", "chosen": " is", "rejected": " was"}
    lines, _ = lines_of(write, templates.CHATML, plain)
    assert any(
        "1 prompts are plain text without special tokens of turns, such as 'the sky' (prefs.jsonl:1), but the tokenizer has "
        "a chat template: " in line
        for line in lines
    )
    rendered = plain | {"prompt": "<|im_start|>user\nthe sky<|im_end|>\n<|im_start|>assistant\n"}
    lines, _ = lines_of(write, templates.CHATML, rendered)
    assert lines[1:] == ["data prefs: 1 prompts of plain text spell special tokens, which are read as such: such as "
                         "'<|im_end|>' (prefs.jsonl:1)"] or "'<|im_start|>'" in lines[1]  # fmt: skip
    assert len(lines_of(write, None, plain)[0]) == 1


@pytest.mark.parametrize("bos", [False, True])
def test_text_that_begins_with_bos_is_plain_text_all_the_same(write, bos):
    """The example has no special token, of which the line says that there is none."""
    plain = {"prompt": "<s>the sky", "chosen": " is", "rejected": " was"}
    lines, _ = lines_of(write, templates.CHATML, plain, bos=bos)
    (line,) = (line for line in lines if "plain text without special tokens of turns" in line)
    assert line.startswith("warning") and ", such as 'the sky' (prefs.jsonl:1), but the tokenizer has" in line
    assert sum("spell special tokens" in line for line in lines) == (not bos)
