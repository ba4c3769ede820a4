"""Small chat templates of the kinds that models have, and a tokenizer that knows their special tokens."""

from __future__ import annotations

from samples import make_tokenizer, user

from raydpo.config import DataConfig
from raydpo.data.pairs import load_pairs
from raydpo.data.preference import Preference
from raydpo.data.tokenise import Tokeniser

PROMPT = [user("What is it o'clock?")]
GENERATE = "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
EACH = "{% for message in messages %}<s>{{ message.role }}\n"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set first = messages[0]['content'] | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set first = '' %}{%- endif %}"
    "{{- '<|head|>system<|/head|>\n\nToday Date: ' + date_string + '\n\n' + first + '<|eot|>' }}"
    "{%- if tools %}{{- '<|head|>user<|/head|>\n\nGiven the following functions:\n\n' }}"
    "{%- for tool in tools %}{{- tool | tojson(indent=4) + '\n\n' }}{%- endfor %}"
    "{{- messages[0]['content'] | trim + '<|eot|>' }}{%- set messages = messages[1:] %}{%- endif %}"
    "{%- for message in messages %}{%- if message.role == 'tool' %}"
    "{{- '<|head|>ipython<|/head|>\n\n' + message.content | tojson + '<|eot|>' }}"
    "{%- elif 'tool_calls' in message %}{%- set call = message.tool_calls[0].function %}"
    '{{- \'<|head|>assistant<|/head|>\n\n{"name": "\' + call.name + \'", "parameters": \' }}'
    "{{- call.arguments | tojson + '}<|eot|>' }}"
    "{%- else %}{{- '<|head|>' + message['role'] + '<|/head|>\n\n' + message['content'] | trim + '<|eot|>' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|head|>assistant<|/head|>\n\n' }}{%- endif %}"
)
QWEN = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}{%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- set ns = namespace(asked=0) %}{%- for message in messages %}{%- if message.role == 'user' %}"
    "{%- set ns.asked = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- set content = message.content if message.content is string else '' %}"
    "{%- if message.role == 'assistant' %}{%- set thought = '' %}"
    "{%- if message.reasoning_content is string %}{%- set thought = message.reasoning_content %}"
    "{%- elif '</think>' in content %}{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}{%- if loop.index0 > ns.asked %}"
    "{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}{{- content }}"
    "{%- for call in message.tool_calls or [] %}"
    '{{- \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}"
    "{{- '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
MISTRAL = (
    "{{- bos_token }}{%- if messages[0].role == 'system' %}{%- set first = messages[0].content %}"
    "{%- set messages = messages[1:] %}{%- endif %}"
    "{%- set ns = namespace(asked=0) %}{%- for message in messages %}{%- if message.role == 'user' %}"
    "{%- set ns.asked = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- if message.role == 'user' %}"
    "{%- if tools and loop.index0 == ns.asked %}"
    "{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}"
    "{{- '[INST]' }}{%- if loop.first and first %}{{- first + '\n\n' }}{%- endif %}{{- message.content + '[/INST]' }}"
    "{%- elif message.tool_calls %}{{- '[TOOL_CALLS][' }}{%- for call in message.tool_calls %}"
    "{{- call.function | tojson }}{%- endfor %}{{- ']' + eos_token }}"
    "{%- elif message.role == 'tool' %}{{- '[TOOL_RESULTS]' + {'content': message.content} | tojson + '[/TOOL_RESULTS]' }}"
    "{%- else %}{{- ' ' + message.content | trim + eos_token }}{%- endif %}{%- endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n'"
    " + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA_PARTS = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- if messages[0]['content'] is string -%}"
    "{%- set first = messages[0]['content'] + '\n\n' -%}{%- else -%}"
    "{%- set first = messages[0]['content'][0]['text'] + '\n\n' -%}"
    "{%- endif -%}{%- set messages = messages[1:] -%}{%- endif -%}"
    "{%- for message in messages -%}{{ '<start_of_turn>' + message['role'] + '\n' + (first or '' if loop.first else '') }}"
    "{%- if message['content'] is string -%}{{ message['content'] | trim }}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{ part['text'] | trim }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>assistant\n' }}{%- endif -%}"
)
PARTS_ONLY = (
    "{% for message in messages %}<s>{{ message['role'] | capitalize }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>Assistant: {% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<|User|>' + message['content'] }}{% else %}"
    "{% set content = message['content'] or '' %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<|Assistant|>' + content }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '```json\n' + call['function']['name'] + call['function']['arguments'] + '\n```' }}"
    "{% endfor %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|Assistant|><think>\n' }}{% endif %}"
)
STRICT = (
    "{{- bos_token }}{%- if messages[0].role == 'system' %}{%- set first = messages[0].content %}"
    "{%- set messages = messages[1:] %}{%- endif %}{%- set ns = namespace(last='') %}"
    "{%- for message in messages %}{%- if message.role in ['user', 'assistant'] and not message.tool_calls %}"
    "{%- if ns.last == message.role or (loop.first and message.role != 'user') %}"
    "{{- raise_exception('Roles must alternate') }}{%- endif %}{%- set ns.last = message.role %}{%- endif %}"
    "{%- if message.role == 'user' %}{{- '[INST]' + (first + '\n\n' if first and loop.last else '') + message.content }}"
    "{{- '[/INST]' }}{%- elif message.tool_calls is defined and message.tool_calls is not none %}{{- '[TOOL_CALLS]' }}"
    "{%- for call in message.tool_calls %}{%- if not call.id is defined or call.id | length != 9 %}"
    "{{- raise_exception('Tool call IDs should have length 9!') }}{%- endif %}"
    "{{- call.function | tojson + call.id }}{%- endfor %}{{- eos_token }}"
    "{%- elif message.role == 'tool' %}{%- if not message.tool_call_id is defined or message.tool_call_id | length != 9 %}"
    "{{- raise_exception('Tool call IDs should have length 9!') }}{%- endif %}"
    "{{- '[TOOL_RESULTS]' + message.content + message.tool_call_id + '[/TOOL_RESULTS]' }}"
    "{%- elif message.role == 'assistant' %}{{- ' ' + message.content + eos_token }}"
    "{%- else %}{{- raise_exception('Only user and assistant roles are supported') }}{%- endif %}{%- endfor %}"
)
"""As those of Mistral: strict, short ids, and the system message before the last message of the user."""
HARMONY = (
    "{%- if tools %}{{- '<|start|>developer<|message|>' }}{%- for tool in tools %}"
    "{{- '// ' + tool.function.description + '\ntype ' + tool.function.name + ';\n' }}{%- endfor %}{{- '<|end|>' }}"
    "{%- endif %}{%- for message in messages %}{%- if message.role == 'assistant' %}{%- if message.thinking %}"
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}{%- endif %}"
    "{%- if 'tool_calls' in message %}{%- set call = message.tool_calls[0].function %}"
    "{{- '<|start|>assistant<|channel|>commentary to=' + call.name + '<|message|>' + call.arguments | tojson }}"
    "{{- '<|call|>' }}{%- else %}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}{%- endif %}"
    "{%- elif message.role == 'tool' %}{{- '<|start|>functions to=assistant<|message|>' + message.content | tojson }}"
    "{{- '<|end|>' }}{%- elif message.role in ['system', 'user'] %}"
    "{{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}"
    "{%- else %}{{- raise_exception('Unexpected message role.') }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"
)
"""As that of gpt-oss: channels, the field ``thinking``, one call a message."""
TWO_ENDS = (
    "{%- for message in messages %}{%- if message.role == 'assistant' %}"
    "{{- '<|START|><|BOT|><|START_RESPONSE|>' + message.content + '<|END_RESPONSE|>' }}{%- else %}"
    "{{- '<|START|><|USER|>' + message.content }}{%- endif %}{{- '<|END|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|START|><|BOT|><|START_RESPONSE|>' }}{%- endif %}"
)
"""As those of Cohere: two tokens end a turn, the second of which is EOS."""
FOLDED = (
    "{%- for message in messages %}{%- if message.role != 'tool' %}{{- '<start_of_turn>' + message.role + '\n' }}"
    "{%- if message.tool_calls %}{{- '[CALL]' + message.tool_calls[0].function.name }}"
    "{{- message.tool_calls[0].function.arguments | tojson + '[RESULT]' }}"
    "{%- if not loop.last %}{{- messages[loop.index0 + 1].content | tojson }}{%- endif %}{%- endif %}"
    "{{- message.content + '<end_of_turn>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<start_of_turn>assistant\n' }}{%- endif %}"
)
"""As those of Gemma 4: the result of a tool stands within the turn that calls it, before the text of that turn."""
DROPS_THOUGHTS = (
    "{% for message in messages %}<s>{{ message.role }}"
    "\n{{ message.content.split('</think>')[-1].lstrip('\n') }}</s>\n{% endfor %}" + GENERATE
)
CALLS = (
    "{% if tools %}<s>tools\n{{ tools | tojson }}</s>\n{% endif %}"
    + EACH
    + "{{ message.content or '' }}{% for call in message.tool_calls or [] %}[{{ call.function.name }} "
    "{{ call.function.arguments | tojson }}]{% endfor %}</s>\n{% endfor %}" + GENERATE
)
"""Writes everything, arguments of calls as JSON."""
MARKED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}<|im_start|>assistant\n"
    "{{ message.content }}{% for call in message.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endgeneration %}{% else %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Marks its turns itself, with their headers and the line break after them, as some do."""
OPENS = (
    "{%- set ns = namespace(asked=0) %}{%- for message in messages %}{%- if message.role == 'user' %}"
    "{%- set ns.asked = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' and loop.index0 > ns.asked %}"
    "{{- '<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' }}{%- endif %}"
    "{{- message.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
)
"""Begins each thought in the prompt, and drops those of earlier turns."""


def tokenizer_for(template: str | None, bos: bool = False):
    """A tokenizer with a template and its special tokens; with ``bos`` it puts BOS before plain text."""
    import re

    from tokenizers import processors

    tokenizer = make_tokenizer(template)
    special = set(re.findall(r"<\|[a-zA-Z_/]+\|>|<[a-z]+_of_turn>|\[/?[A-Z_]+\]", template or ""))
    tokenizer.add_special_tokens({"extra_special_tokens": sorted(special)})
    if bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    return tokenizer


def say(role: str, content=None, **more) -> dict:
    return {"role": role, "content": content} | more if content is not None else {"role": role} | more


def answer(content=None, **more) -> list[dict]:
    return [say("assistant", content, **more)]


def calling(name="clock", arguments=None, content="") -> list[dict]:
    """An answer that is one call."""
    call = {"type": "function", "id": "c1", "function": {"name": name, "arguments": {} if arguments is None else arguments}}
    return answer(content, tool_calls=[call])


def tool(name: str) -> dict:
    parameters = {"type": "object", "properties": {"zone": {"type": "string", "description": f"Zone of {name}."}}}
    return {"type": "function", "function": {"name": name, "description": f"Asks for {name}.", "parameters": parameters}}


def noted(template, prompt, chosen, rejected, bos=False, **more):
    """Ids, or what is wrong, and remarks on one pair."""
    ((ids, found),) = Tokeniser(tokenizer_for(template, bos)).encode_noted([Preference(prompt, chosen, rejected, **more)])
    return ids, {(remark.kind, remark.what) for remark in found}


def lines_of(write, template, *records, bos=False, **settings):
    """Lines of the report on ``records``, and the data read."""
    sets = load_pairs(DataConfig(train=write(list(records)), **settings), Tokeniser(tokenizer_for(template, bos)))
    return sets.report.lines(), sets


def record(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | more
