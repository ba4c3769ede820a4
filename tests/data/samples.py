"""A small tokenizer with a chat template, and records of preferences."""

from __future__ import annotations

CHAT_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<s>system\nYou are polite.</s>\n{% endif %}"
    "{% if tools %}<s>tools\n{{ tools | tojson }}</s>\n{% endif %}"
    "{% for message in messages %}<s>{{ message.role }}\n{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% if thinking is defined and not thinking %}(no thought){% endif %}"
    "{% endif %}"
)
EACH = "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"
SENTENCES = [
    "the sky is blue because of scattering",
    "grass is green",
    "what colour is the sky?",
    "ab ab ab abab abab",
    "system You are polite.",
    "user assistant",
    "no, the answer is four",
    "yes, the answer is five",
]


def user(content, **more):
    return {"role": "user", "content": content} | more


def bot(content):
    return {"role": "assistant", "content": content}


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=chat_template
    )


def text(number: int, **changes) -> dict:
    return {
        "prompt": f"Question {number}: what colour is the sky?",
        "chosen": f" the sky is blue {number}",
        "rejected": f" grass is green {number}",
    } | changes


def decoded(write, records, template=EACH, **settings):
    """Prompts, chosen and rejected as text of what a model reads of ``records``, and the lines of the report."""
    from raydpo.config import DataConfig
    from raydpo.data.pairs import load_pairs
    from raydpo.data.tokenise import Tokeniser

    tokeniser = Tokeniser(make_tokenizer(template))
    sets = load_pairs(DataConfig(train=write(records), **settings), tokeniser)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [tuple(tokeniser.tokenizer.decode(row[name]) for name in names) for row in sets.train.to_pylist()]
    return rows, sets.report.lines()
