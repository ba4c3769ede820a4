"""For built records and templates: the rendering holds every text, or a remark or a reason names what is lost."""

from __future__ import annotations

import json

import templates
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raydpo.data.messages import Malformed
from raydpo.data.preference import Preference
from raydpo.data.remarks import Remarks
from raydpo.data.tokenise import Tokeniser

# Texts that occur in no template, in no other text, and are not cut apart by white space.
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Z", "C")), max_size=6)
SPICE = st.sampled_from(
    ["", "</s>", "<s>", '"', "\\n", "\n\n", "'", "\u2028", "<think>", "</think>", "{{ 1 }}", "\x00", "e\u0301"]
)


class Numbered:
    """Texts that can be told apart: each holds a number of its own."""

    def __init__(self, draw):
        self.draw, self.given = draw, []

    def text(self, kind: str) -> str:
        core = f"T{len(self.given):03d}x"
        self.given.append((kind, core))
        return self.draw(SPICE) + core + self.draw(WORDS)

    def value(self, depth: int = 0):
        kinds = ["text", "number", "null"] + (["list", "object"] if depth < 2 else [])
        kind = self.draw(st.sampled_from(kinds))
        if kind == "list":
            return [self.value(depth + 1) for _ in range(self.draw(st.integers(0, 2)))]
        if kind == "object":
            return {f"key{place}": self.value(depth + 1) for place in range(self.draw(st.integers(0, 2)))}
        return {"text": lambda: self.text("call"), "number": lambda: 7, "null": lambda: None}[kind]()

    def content(self, kind: str):
        if self.draw(st.integers(0, 3)):
            return self.text(kind)
        return [{"type": "text", "text": self.text(kind)} for _ in range(self.draw(st.integers(1, 2)))]

    def assistant(self) -> dict:
        message = {"role": "assistant", "content": self.content("content")}
        if not self.draw(st.integers(0, 3)):
            message[self.draw(st.sampled_from(["reasoning_content", "thinking", "reasoning"]))] = self.text("thought")
        if not self.draw(st.integers(0, 2)):
            arguments = {"zone": self.value()}
            if self.draw(st.booleans()):
                arguments = json.dumps(arguments)
            call = {"type": "function", "id": "c", "function": {"name": self.text("call"), "arguments": arguments}}
            message["tool_calls"] = [call]
        return message


@st.composite
def templates_and_pairs(draw):
    texts = Numbered(draw)
    prompt = [{"role": "system", "content": texts.content("content")}] if draw(st.booleans()) else []
    prompt.append({"role": "user", "content": texts.content("content")})
    if draw(st.booleans()):
        prompt += [texts.assistant(), {"role": draw(st.sampled_from(["user", "tool"])), "content": texts.content("content")}]
    tools = [templates.tool(texts.text("tool"))] if not draw(st.integers(0, 2)) else None
    in_prompt = len(texts.given)
    chosen, rejected = [texts.assistant()], [texts.assistant()]
    template = draw(
        st.sampled_from([templates.CHATML, templates.QWEN, templates.DROPS_THOUGHTS, templates.CALLS, templates.PARTS_ONLY])
        | built_templates()
    )
    return template, Preference(prompt, chosen, rejected, tools=tools), texts.given[:in_prompt], texts.given[in_prompt:]


@st.composite
def built_templates(draw):
    """Templates that write or leave out each field."""

    def piece(*kinds):
        return draw(st.sampled_from(["", *kinds]))

    roles = draw(
        st.sampled_from(["", "{% if message.role != 'system' %}", "{% if message.role in ['user', 'assistant'] %}"])
    )
    call = "{{ call.function.name }}" + piece("{{ call.function.arguments | tojson }}", "{{ call.function.arguments }}")
    content = piece(
        "{{ message.content }}",
        "{{ message.content | trim }}",
        "{{ message.content[:20] }}",
        "{{ message.content | tojson }}",
    )
    return (
        piece("{{ tools | tojson }}", "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}")
        + templates.EACH
        + roles
        + piece("{{ message.reasoning_content }}", "{{ message.thinking or '' }}")
        + content
        + piece("{% for call in message.tool_calls or [] %}" + call + "{% endfor %}")
        + ("{% endif %}" if roles else "")
        + "</s>\n{% endfor %}"
        + templates.GENERATE
    )


TOKENISER = Tokeniser(templates.tokenizer_for(templates.CHATML))


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(templates_and_pairs())
def test_what_is_not_in_the_rendering_is_named(case):
    template, preference, in_prompt, in_answers = case
    tokenizer = TOKENISER.tokenizer
    tokenizer.chat_template = template
    ((ids, found),) = Tokeniser(tokenizer).encode_noted([preference])
    if isinstance(ids, Malformed):
        assert str(ids) and len(str(ids)) < 1000
        return
    prompt, chosen, rejected = (tokenizer.decode(part.tolist()) for part in ids)
    lost = {kind for kind, core in in_prompt if core not in prompt + chosen}
    lost |= {kind for kind, core in in_answers if core not in chosen + rejected}
    said = " ".join(f"{remark.kind} {remark.what}" for remark in found if "left out" in remark.kind)
    words = {"content": "content of role", "thought": "thoughts", "call": "tool calls", "tool": "tools"}
    assert {kind for kind in lost if words[kind] not in said} <= ({"content"} if "thoughts" in said else set())
    account = Remarks()
    account.add(found, "a.jsonl:1")
    assert all(len(line) < 2000 for line in account.lines("a", 1))
    json.dumps(account.to_dict())
