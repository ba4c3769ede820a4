"""The rows of a few records of every kind stay the same as long as the recipe does."""

import hashlib
import json

from raydpo.data.parse import Record
from raydpo.data.rows import RowMaker
from raydpo.data.tokenise import Tokeniser
from raydpo.tokens.identity import RECIPE

TEMPLATE = (
    "{% if tools %}<s>tools {{ tools | tojson }}</s>{% endif %}"
    "{% for message in messages %}<s>{{ message.role }}\n{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
RECORDS = [
    {"prompt": "Once upon", "chosen": " a time", "rejected": " the end", "score_chosen": 1, "score_rejected": 4},
    {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "Hello", "rejected": "No", "weight": 2.5},
    {
        "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b <s>"}],
        "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}],
        "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}],
    },
    {"chosen": "\n\nHuman: x\n\nAssistant: y", "rejected": "\n\nHuman: x\n\nAssistant: z"},
    {"prompt": "best of", "completions": ["one", "two", "three"], "scores": [1, 2, 3]},
    {"prompt": "long " * 300, "chosen": "x", "rejected": "y", "weight": -1},
    {"prompt": "same", "chosen": "x", "rejected": "x"},
    {"prompt": [{"role": "user", "content": "Hi"}], "completion": "Hello", "label": True},
    {"prompt": "Once upon", "completion": " the end", "label": False},
    {"prompt": "", "chosen": "x", "rejected": "y"},
    {"chosen": 3},
    None,
]


def bytes_as_tokens():
    """A tokenizer without merges, so that no version of a library trains it otherwise."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATE
    )


def test_rows_change_only_with_the_recipe():
    tokeniser = Tokeniser(bytes_as_tokens())
    records = [
        Record(f"a.jsonl:{number}", number, value, None if value is not None else "not valid JSON")
        for number, value in enumerate(RECORDS, 1)
    ]
    numbers = {"pair_weight": "weight"}
    found = []
    for kinds in (RECORDS[1:3], RECORDS[:1] + RECORDS[3:]):
        chosen = [record for record in records if record.value in kinds]
        maker = RowMaker(tokeniser, numbers={}, special_tokens="warn", most_characters=1_000)
        rows = maker.decided(*maker.decide(chosen)).make(chosen)
        found.append([rows.light.to_pylist(), rows.tokens.to_pylist(), rows.account.to_state(), rows.labels, rows.sources])
    maker = RowMaker(tokeniser, numbers=numbers, special_tokens="refuse", most_characters=1_000)
    rows = maker.decided(False, 3).make(records)
    found.append([rows.light.to_pylist(), rows.tokens.to_pylist(), rows.account.to_state()])
    assert [len(one[0]) for one in found[:2]] == [2, 8]
    digest = hashlib.sha256(json.dumps(found, default=bytes.hex).encode()).hexdigest()[:16]
    assert (RECIPE, digest) == (2, "ac31f9f9e389a278"), (
        "rows or accounts of the same records have changed, and stored sets would keep the old ones: raise "
        "raydpo.tokens.identity.RECIPE, and write both numbers here"
    )
