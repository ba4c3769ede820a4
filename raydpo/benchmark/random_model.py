"""Models of a known shape with random weights, for measuring where no trained model is at hand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["SHAPES", "write_random_llama"]

_LLAMA_3 = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "bos_token_id": 128000, "eos_token_id": 128001}
SHAPES = {
    "random-1b": _LLAMA_3 | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
                             "tie_word_embeddings": True},
    "random-8b": _LLAMA_3 | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
}
"""The shapes of Llama 3.2 1B and Llama 3.1 8B."""
SHARD_BYTES = 2 * 2**30


def write_random_llama(directory: Path, shape: Mapping[str, object], device: torch.device, seed: int = 0) -> Path:
    """A Llama of random bfloat16 weights in ``directory``, without a tokenizer, unless it is there already.

    Weights are made on ``device`` a tensor at a time and written a shard at a time: the whole model is never in memory.
    """
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**shape, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        sizes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()
                 if not (config.tie_word_embeddings and name.startswith("lm_head."))}
    config.save_pretrained(directory)
    places: dict[str, str] = {}
    for number, shard in enumerate(_shards(sizes, config.initializer_range, device, seed), 1):
        file = f"model-{number:05}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    # Last, so that what was interrupted is made again.
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # which the processes to come need
    return directory


def _shards(sizes: Mapping[str, torch.Size], scale: float, device: torch.device, seed: int) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator(device).manual_seed(seed)
    shard: dict[str, Tensor] = {}
    for name, size in sizes.items():
        # One-dimensional weights are those of norms.
        weight = (torch.ones(size, dtype=torch.bfloat16) if len(size) == 1 else
                  torch.randn(size, dtype=torch.bfloat16, device=device, generator=generator).mul_(scale).cpu())
        if shard and sum(tensor.nbytes for tensor in shard.values()) + weight.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = weight
    yield shard
