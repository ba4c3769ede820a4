"""A mixture whose experts are a list of modules, with its code in the model's directory, as many models on the hub are."""

from __future__ import annotations

from pathlib import Path

EXPERTS = 6

CODE = """
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class ListedConfig(LlamaConfig):
    model_type = "listed"


class Expert(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            Expert(config.hidden_size, config.moe_intermediate_size) for _ in range(config.num_experts)
        )

    def forward(self, hidden):
        x = hidden.reshape(-1, hidden.shape[-1])
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == number)
            if len(rows):  # only experts that a token chose are called
                out = out.index_add(0, rows, expert(x[rows]) * weights[rows, place, None].to(x.dtype))
        return out.view_as(hidden)


class ListedForCausalLM(LlamaForCausalLM):
    config_class = ListedConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = Block(config)
        self.post_init()
"""


def make_listed(directory: Path, vocabulary: int) -> Path:
    """A random float32 model with two layers of ``EXPERTS`` experts, saved with its code."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    directory.mkdir(parents=True)
    (directory / "modeling_listed.py").write_text(CODE)
    names = {"AutoConfig": "modeling_listed.ListedConfig", "AutoModelForCausalLM": "modeling_listed.ListedForCausalLM"}
    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        auto_map=names,
        architectures=["ListedForCausalLM"],
    )
    import json

    tree = config.to_dict() | {"model_type": "listed", "auto_map": names, "dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(tree))
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
    return directory
