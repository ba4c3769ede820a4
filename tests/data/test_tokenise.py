import json

import numpy as np
import pytest
from samples import CHAT_TEMPLATE, make_tokenizer

from raydpo.data.messages import Malformed
from raydpo.data.preference import Preference
from raydpo.data.tokenise import Tokeniser, load_tokenizer
from raydpo.errors import FilesError, ModelError

USER, GOOD, BAD = (
    [{"role": role, "content": content}]
    for role, content in (
        ("user", "what colour is the sky?"),
        ("assistant", "the sky is blue"),
        ("assistant", "grass is green"),
    )
)


def test_text(tokeniser, tokenizer):
    (pair,) = tokeniser.encode([Preference("what colour is the sky?", " the sky is blue", " grass is green")])
    assert all(ids.dtype == np.int32 for ids in pair)
    assert tokenizer.decode(pair.prompt) == "what colour is the sky?"
    assert tokenizer.decode(pair.chosen) == " the sky is blue</s>"
    assert tokenizer.decode(pair.rejected) == " grass is green</s>"
    assert tokeniser.merged == 0


def test_eos_is_never_doubled(tokeniser, tokenizer):
    pairs = tokeniser.encode([Preference("the", " b</s>", " c"), Preference("the", " b", " c</s>")])
    for pair in pairs:
        assert [list(ids).count(tokenizer.eos_token_id) for ids in pair] == [0, 1, 1]
        assert pair.chosen[-1] == pair.rejected[-1] == tokenizer.eos_token_id


def test_tokenizer_that_adds_special_tokens_itself():
    from tokenizers import processors

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokeniser = Tokeniser(tokenizer)
    (text, chat) = tokeniser.encode([Preference("the", " b", " c</s>"), Preference(USER, GOOD, BAD)])
    assert [tokenizer.decode(ids) for ids in text] == ["<s>the", " b</s>", " c</s>"]
    assert tokenizer.decode(chat.prompt).startswith("<s>system")
    assert tokeniser.merged == 0


def test_completion_starts_before_a_token_that_merges_across_the_boundary(tokeniser, tokenizer):
    assert len(tokenizer("ab")["input_ids"]) == 1
    (pair,) = tokeniser.encode([Preference("the a", "b", "c")])
    assert tokenizer.decode(pair.prompt) == "the"
    assert tokenizer.decode(pair.chosen) == " ab</s>"
    assert tokenizer.decode(pair.rejected) == " ac</s>"
    assert tokeniser.merged == 1


def test_nothing_before_the_completion(tokeniser):
    (problem,) = tokeniser.encode([Preference("a", "b", "c")])  # 'ab' is one token
    assert isinstance(problem, Malformed) and str(problem) == "prompt has no tokens"


def test_conversation(tokeniser, tokenizer):
    (pair,) = tokeniser.encode([Preference(USER, GOOD, BAD)])
    assert tokenizer.decode(pair.prompt) == (
        "<s>system\nYou are polite.</s>\n<s>user\nwhat colour is the sky?</s>\n<s>assistant\n"
    )
    assert tokenizer.decode(pair.chosen) == "the sky is blue</s>\n"


def test_tools_and_template_arguments_reach_the_template(tokeniser, tokenizer):
    (pair,) = tokeniser.encode([Preference(USER, GOOD, BAD, tools=[{"name": "f"}], template_kwargs={"thinking": False})])
    assert '<s>tools\n[{"name": "f"}]</s>' in tokenizer.decode(pair.prompt)
    # the template renders the prompt differently alone and with its completion, which starts where they differ
    assert tokenizer.decode(pair.prompt).endswith("<s>assistant\n")
    assert tokeniser.merged == 1


def test_order_is_kept_in_a_mixed_batch(tokeniser):
    chat, text, none = Preference(USER, GOOD, BAD), Preference("the sky", " is", " was"), Preference("p", "</s>", "")
    mixed = tokeniser.encode([chat, text, none, chat, text])
    assert [len(pair.prompt) for pair in (mixed[0], mixed[3])] == [len(tokeniser.encode([chat])[0].prompt)] * 2
    assert np.array_equal(mixed[4].prompt, tokeniser.encode([text])[0].prompt)
    assert str(mixed[2]) == "chosen and rejected have the same tokens"
    assert tokeniser.encode([]) == []


def test_template_that_refuses():
    tokeniser = Tokeniser(make_tokenizer("{{ raise_exception('roles must\nalternate') }}"))
    (problem,) = tokeniser.encode([Preference(USER, GOOD, BAD)])
    assert str(problem) == "the chat template refuses it: roles must alternate (TemplateError)"
    assert tokeniser.stop_ids == (2,)


def test_no_template_and_no_eos():
    tokenizer = make_tokenizer(None)
    with pytest.raises(ModelError, match=r"no chat template; set data\.chat_template"):
        Tokeniser(tokenizer).encode([Preference(USER, GOOD, BAD)])
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS token"):
        Tokeniser(tokenizer).encode([Preference("a", "b", "c")])


def test_stop_ids_know_the_end_of_a_turn():
    template = CHAT_TEMPLATE.replace("</s>", "<pad>")
    assert Tokeniser(make_tokenizer(template)).stop_ids == (2, 0)
    assert Tokeniser(make_tokenizer()).stop_ids == (2,)
    assert Tokeniser(make_tokenizer(None)).stop_ids == (2,)


def test_load_tokenizer(tmp_path):
    make_tokenizer().save_pretrained(str(tmp_path / "tokenizer"))
    path = str(tmp_path / "tokenizer")
    assert load_tokenizer(path).chat_template == CHAT_TEMPLATE
    (tmp_path / "template.jinja").write_text("{{ messages[0].content }}")
    assert load_tokenizer(path, chat_template=str(tmp_path / "template.jinja")).chat_template == "{{ messages[0].content }}"
    assert load_tokenizer(path, chat_template="{{ 1 }}").chat_template == "{{ 1 }}"
    with pytest.raises(ModelError, match=r"'none.jinja' is neither Jinja text nor a file"):
        load_tokenizer(path, chat_template="none.jinja")
    with pytest.raises(ModelError, match="is not valid Jinja: line 1"):
        load_tokenizer(path, chat_template="{% for %}")
    with pytest.raises(ModelError, match="cannot load a tokenizer from") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_the_chat_template_of_a_processor(tmp_path):
    """Older vision-language packages have it in chat_template.json, which transformers reads for the processor only."""
    path, template = tmp_path / "package", "{{ messages[0].content }}"
    make_tokenizer().save_pretrained(str(path))
    (path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_tokenizer(str(path)).chat_template == CHAT_TEMPLATE, "the tokenizer's own comes first"
    (path / "chat_template.jinja").unlink()
    assert load_tokenizer(str(path)).chat_template == template
    assert load_tokenizer(str(path), chat_template="{{ 1 }}").chat_template == "{{ 1 }}"
    (path / "chat_template.json").write_text("{")
    with pytest.raises(ModelError, match=r"cannot read .*chat_template.json: .*; a JSON object with chat_template"):
        load_tokenizer(str(path))


def test_a_tokenizer_is_not_blamed_for_settings_of_the_model(tmp_path):
    make_tokenizer().save_pretrained(str(tmp_path))
    settings = {"model_type": "llama", "rms_norm_eps": "1e-5"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(FilesError, match=r"transformers refuses .*/config\.json: .*'rms_norm_eps' expected float, got str"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(FilesError, match="cannot load a tokenizer from"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    "template, told",
    [
        (
            "{% for m in messages %}\n{{ m['content'] }}",
            "chat template is not valid Jinja: line 2: Unexpected end of template",
        ),
        ("{{ messages[0]['content'] | nosuch }}", "not valid Jinja: line 1: No filter named 'nosuch'"),
        ({"rag": "{{ messages }}", "tool_use": "x"}, "chat templates called 'rag', 'tool_use' and none called 'default'"),
    ],
)
def test_records_are_not_blamed_for_the_template(template, told):
    with pytest.raises(FilesError, match=told):
        Tokeniser(make_tokenizer(template)).encode([Preference(USER, GOOD, BAD)])
