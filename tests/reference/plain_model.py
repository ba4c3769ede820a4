"""A model and an adapter whose files are identical on every machine and with every version of the libraries."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 16,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "dtype": "float32",
    "transformers_version": "5.0.0",
    "eos_token_id": [2, 1],
}
ADAPTER = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["v_proj", "q_proj"],
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "plain",
    "alpha_pattern": {},
    "bias": "none",
}


def plain_weights() -> dict[str, np.ndarray]:
    """Weights of the architecture above, with names and shapes as in transformers."""
    shapes = {"model.embed_tokens.weight": (16, 8), "model.norm.weight": (8,), "lm_head.weight": (16, 8)}
    for layer in ("model.layers.0", "model.layers.1"):
        shapes |= {
            f"{layer}.{name}.weight": shape
            for name, shape in {
                "self_attn.q_proj": (8, 8),
                "self_attn.k_proj": (4, 8),
                "self_attn.v_proj": (4, 8),
                "self_attn.o_proj": (8, 8),
                "mlp.gate_proj": (16, 8),
                "mlp.up_proj": (16, 8),
                "mlp.down_proj": (8, 16),
                "input_layernorm": (8,),
                "post_attention_layernorm": (8,),
            }.items()
        }
    return {name: _values(shape, number) for number, (name, shape) in enumerate(sorted(shapes.items()))}


def write_plain_model(directory: Path) -> Path:
    """Write config.json and model.safetensors."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    save_file(plain_weights(), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_plain_adapter(directory: Path) -> Path:
    """Write a LoRA adapter for it, as PEFT saves one."""
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(ADAPTER))
    shapes = {
        f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{side}.weight": shape
        for layer in (0, 1)
        for name, width in (("q_proj", 8), ("v_proj", 4))
        for side, shape in (("A", (2, 8)), ("B", (width, 2)))
    }
    save_file(
        {name: _values(shape, number) for number, (name, shape) in enumerate(sorted(shapes.items()))},
        directory / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    return directory


def _values(shape: tuple[int, ...], number: int) -> np.ndarray:
    """float32 multiples of 1/64, which are exact in every precision."""
    return ((np.arange(np.prod(shape), dtype=np.float32).reshape(shape) * 7 + number) % 13 - 6) / 64
