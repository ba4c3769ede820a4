"""Tiny models, tokenizers and preference files, made in seconds without network."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = [
    "sky",
    "blue",
    "green",
    "red",
    "the",
    "a",
    "cat",
    "dog",
    "runs",
    "fast",
    "slow",
    "because",
    "answer",
    "is",
    "not",
    "yes",
    "no",
    "maybe",
    "compute",
    "sum",
    "of",
    "two",
    "numbers",
    "water",
    "hot",
    "cold",
    "please",
    "explain",
    "why",
    "how",
    "when",
    "where",
    "river",
    "mountain",
    "tree",
    "leaf",
    "stone",
    "light",
    "dark",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def preferences(count: int, seed: int = 0, low: int = 3, high: int = 40) -> list[dict[str, str]]:
    """Records of random words: prompt, chosen, rejected as text."""
    rng = random.Random(seed)

    def sentence(shortest: int, longest: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(shortest, longest)))

    return [
        {
            "prompt": f"Question: {sentence(4, 20)}\nAnswer:",
            "chosen": f" {sentence(low, high)}",
            "rejected": f" {sentence(low, high)}",
        }
        for _ in range(count)
    ]


def write_preferences(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def make_model(
    directory: Path, architecture: str = "llama", seed: int = 0, layers: int = 2, hidden: int = 64, **settings: object
) -> Path:
    """A random model of ``architecture`` (llama, qwen3, gemma2, ...) with a byte-level tokenizer, saved to ``directory``."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        architecture,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{"vocab_size": len(tokenizer)} | settings,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(str(directory))
    tokenizer.save_pretrained(str(directory))
    return directory


def make_tokenizer():
    """Byte-level BPE trained on the words above, with <pad>, <s>, </s> and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([record[key] for record in preferences(64) for key in record], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = CHAT_TEMPLATE
    return fast
