"""Tiny random models of many architectures, made from their configuration."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from raydpo.model.rotary import fix_rotary, rope_length

COMMON = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
_EXPERTS = dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
_GPT2_LIKE = dict(n_embd=32, n_layer=2, n_head=4, n_positions=256)
_LONGROPE = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    short_factor=[1.0, 1.1, 1.2, 1.3],
    long_factor=[1.5, 3.0, 6.0, 12.0],
    original_max_position_embeddings=32,
)
LONGEST = 256
"""Positions that every model supports."""
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 16},
    "gemma2": dict(
        head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=20.0, final_logit_softcapping=5.0, sliding_window=16
    ),
    "gemma3_text": dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=16, num_hidden_layers=6),
    "phi3": {},
    "phi3-longrope": dict(model_type="phi3", original_max_position_embeddings=32, rope_parameters=_LONGROPE),
    "llama-dynamic": dict(
        model_type="llama",
        max_position_embeddings=32,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    ),
    "olmo2": {},
    "olmo3": dict(sliding_window=16, num_hidden_layers=4),
    "gpt_neox": {"num_key_value_heads": None},
    "gpt2": _GPT2_LIKE,
    "gptj": {**_GPT2_LIKE, "rotary_dim": 4},
    "opt": dict(word_embed_proj_dim=16, ffn_dim=64),
    "falcon": {},
    "falcon-alibi": dict(model_type="falcon", alibi=True),
    "bloom": dict(n_layer=2, n_head=4),
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.25},
    "cohere2": dict(sliding_window=16, head_dim=8, num_hidden_layers=4),
    "mixtral": _EXPERTS,
    "mixtral-jitter": dict(model_type="mixtral", router_jitter_noise=0.05, **_EXPERTS),
    "phimoe": dict(
        router_jitter_noise=0.05,
        input_jitter_noise=0.05,
        rope_parameters=_LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.3},
        **_EXPERTS,
    ),
    "ernie4_5_moe": dict(moe_num_experts=4, moe_k=2, moe_layer_start_index=0, **_EXPERTS),
    "qwen3_moe": {"head_dim": 8, **_EXPERTS},
    "gpt_oss": {"head_dim": 8, "sliding_window": 16, **_EXPERTS},
    "mamba": {"state_size": 8},
    "qwen3_next": dict(
        head_dim=8,
        shared_expert_intermediate_size=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_hidden_layers=4,
        **_EXPERTS,
    ),
}
_SPARSE = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1)
MORE_MIXTURES: dict[str, dict[str, Any]] = {
    "deepseek_v3": dict(
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        num_key_value_heads=4,
        **_SPARSE,
    ),
    "qwen2_moe": dict(shared_expert_intermediate_size=32, **_EXPERTS),
    "olmoe": _EXPERTS,
    "granitemoe": dict(num_local_experts=4, num_experts_per_tok=2),
    "jetmoe": dict(num_local_experts=4, num_experts_per_tok=2, kv_channels=8),
    "llama4_text": dict(num_local_experts=4, intermediate_size_mlp=64, head_dim=8),
    "glm4_moe": dict(head_dim=8, **_SPARSE),
}
"""Mixtures beside those of ARCHITECTURES: shared experts, dense first layers, experts of attention."""
NO_TREE = {"gptj", "falcon", "falcon-alibi", "bloom"}
"""Models with ALiBi, or attention outside transformers' interface."""
_KINDS = {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_DELTA = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, head_dim=8, **_KINDS
)
_LATENT = dict(
    num_key_value_heads=4,
    mlp_layer_types=["dense", "sparse", "dense"],
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    **_KINDS,
)
_MAMBA2 = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=16, mamba_expand=2)
_CONV = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
_SLOW = {"use_mamba_kernels": False, "mamba_d_state": 8, "mamba_dt_rank": 4}
_PURE = {"state_size": 8, "num_attention_heads": None, "num_key_value_heads": None}
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5_text": ("Qwen3_5GatedDeltaNet", _DELTA),
    "qwen3_5_moe_text": ("Qwen3_5MoeGatedDeltaNet", dict(shared_expert_intermediate_size=32, **_DELTA, **_EXPERTS)),
    "olmo_hybrid": ("OlmoHybridGatedDeltaNet", _DELTA),
    "kimi_linear": ("KimiLinearDeltaAttention", dict(linear_head_dim=8, linear_num_heads=4, **_LATENT, **_EXPERTS)),
    "bailing_hybrid": (
        "BailingHybridDeltaAttention",
        dict(n_group=2, topk_group=1, q_lora_rank=16, head_dim=8, **_LATENT, **_EXPERTS),
    ),
    "minimax": ("MiniMaxLightningAttention", dict(block_size=16, **_KINDS, **_EXPERTS)),
    "falcon_h1": ("FalconH1Mixer", dict(mamba_d_ssm=64, **_MAMBA2)),
    "bamba": ("BambaMixer", dict(num_hidden_layers=3, attn_layer_indices=[1], **_MAMBA2)),
    "granitemoehybrid": (
        "GraniteMoeHybridMambaLayer",
        dict(num_hidden_layers=3, layer_types=["mamba", "attention", "mamba"], **_MAMBA2, **_EXPERTS),
    ),
    "jamba": (
        "JambaMambaMixer",
        dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, **_SLOW, **_EXPERTS),
    ),
    "zamba": (
        "ZambaMambaMixer",
        dict(num_hidden_layers=6, attn_layer_period=3, attn_layer_offset=2, n_mamba_heads=2, **_SLOW),
    ),
    "zamba2": (
        "Zamba2MambaMixer",
        dict(
            num_hidden_layers=6,
            layers_block_type=["mamba", "mamba", "hybrid"] * 2,
            num_mem_blocks=1,
            n_mamba_heads=8,
            mamba_headdim=8,
            mamba_d_state=8,
            mamba_ngroups=1,
            chunk_size=16,
            use_mamba_kernels=False,
        ),
    ),
    "nemotron_h": (
        "NemotronHMamba2Mixer",
        dict(
            num_hidden_layers=4,
            hybrid_override_pattern="M*M-",
            head_dim=8,
            mamba_num_heads=8,
            mamba_head_dim=8,
            ssm_state_size=8,
            n_groups=1,
            chunk_size=16,
        ),
    ),
    "recurrent_gemma": (
        "RecurrentGemmaRecurrentBlock",
        dict(num_hidden_layers=3, lru_width=32, head_dim=8, attention_window_size=16),
    ),
    "lfm2": ("Lfm2ShortConv", dict(block_auto_adjust_ff_dim=False, **_CONV)),
    "lfm2_moe": ("Lfm2MoeShortConv", dict(num_dense_layers=1, **_CONV, **_EXPERTS)),
    "lfm3": ("Lfm3ShortConv", _CONV),
    "zaya": ("ZayaCCAProjection", {"head_dim": 8}),
    "falcon_mamba": ("FalconMambaMixer", _PURE),
    "mamba2": ("Mamba2Mixer", dict(num_heads=8, head_dim=8, n_groups=1, chunk_size=16, **_PURE)),
    "rwkv": ("RwkvSelfAttention, ZeroPad2d", {"attention_hidden_size": 32}),
    "xlstm": ("xLSTMLayer", dict(embedding_dim=32, num_blocks=2, num_heads=4)),
}
"""Models with layers that carry a state from token to token: the classes of these layers, and the settings."""


def make_random(name: str, vocabulary: int, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random float32 model in evaluation mode, without dropout, with rotary frequencies for ``LONGEST`` tokens."""
    own = HYBRIDS[name][1] if name in HYBRIDS else (ARCHITECTURES | MORE_MIXTURES)[name]
    settings = {**COMMON, **own, **settings}
    kind = settings.pop("model_type", name)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, vocab_size=vocabulary, pad_token_id=0, bos_token_id=1, eos_token_id=2, **settings)
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "attention_dropout", "hidden_dropout"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    model = AutoModelForCausalLM.from_config(config).eval()
    fix_rotary(model, rope_length(config.to_dict(), LONGEST))
    return model


def make_directories(names: Iterable[str], folder: Path, vocabulary: int) -> dict[str, Path]:
    """Save random models below ``folder``."""
    for name in names:
        make_random(name, vocabulary).save_pretrained(folder / name)
    return {name: folder / name for name in names}
