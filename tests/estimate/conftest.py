"""A model for plans, which is never loaded."""

import json

import pytest

from raydpo.estimate.anatomy import Anatomy


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Llama 3.1 8B from its config.json, without weights."""
    directory = tmp_path_factory.mktemp("llama")
    (directory / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "vocab_size": 128256,
                "max_position_embeddings": 131072,
                "tie_word_embeddings": False,
            }
        )
    )
    return Anatomy.of(directory)
