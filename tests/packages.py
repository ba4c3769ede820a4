"""Tiny random packages of a text model with a vision tower or an audio encoder: model, tokenizer and processor files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import make_tokenizer

_TEXT = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_VISION = dict(
    hidden_size=16,
    embed_dim=16,
    intermediate_size=32,
    num_hidden_layers=2,
    depth=2,
    num_attention_heads=2,
    num_heads=2,
    image_size=16,
    patch_size=4,
)
_EXPERTS = dict(num_local_experts=4, num_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
_GROUPS = dict(n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1)
_THREE = dict(
    rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 2], partial_rotary_factor=1.0)
)
"""Rotary positions of time, height and width. Of a text they are equal."""
_DELTA = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, num_hidden_layers=4
)
_LATENT = dict(kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, num_key_value_heads=4)
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (dict(sliding_window=16, query_pre_attn_scalar=8, num_hidden_layers=6), {}, dict(mm_tokens_per_image=4)),
    "gemma4": (
        dict(sliding_window=16, num_hidden_layers=6, num_kv_shared_layers=0, hidden_size_per_layer_input=8),
        dict(head_dim=8, num_key_value_heads=2),
        {},
    ),
    "qwen2_5_vl": (_THREE, dict(out_hidden_size=32, fullatt_block_indexes=[0]), {}),
    "qwen3_vl": (_THREE, dict(out_hidden_size=32, deepstack_visual_indexes=[0]), {}),
    "qwen3_vl_moe": (_THREE | _EXPERTS, dict(out_hidden_size=32, deepstack_visual_indexes=[0]), {}),
    "qwen3_5": (_DELTA | _THREE, dict(out_hidden_size=32), {}),
    "mistral3": (dict(model_type="mistral"), dict(model_type="pixtral", head_dim=8), dict(spatial_merge_size=1)),
    "llama4": (
        dict(intermediate_size_mlp=64, attention_chunk_size=16, num_hidden_layers=4) | _EXPERTS,
        dict(vision_output_dim=16, projector_input_dim=16, projector_output_dim=16),
        {},
    ),
    "glm4v": (_THREE, dict(out_hidden_size=32), {}),
    "glm4v_moe": (_THREE | _EXPERTS | _GROUPS, dict(out_hidden_size=32), {}),
    "lfm2_vl": (
        dict(model_type="lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
        dict(model_type="siglip2_vision_model"),
        {},
    ),
    "internvl": (dict(model_type="qwen2"), {}, {}),
    "kimi_k25": (_EXPERTS | _GROUPS | _LATENT, {}, {}),
    "idefics3": (dict(model_type="llama"), {}, {}),
    "llava": (dict(model_type="llama"), dict(model_type="clip_vision_model", projection_dim=16), {}),
}
"""Settings of the text model, of the vision tower, and of the package, by ``model_type``."""
AUDIO = {
    "qwen2_audio": dict(model_type="qwen2"),
    "voxtral": dict(model_type="llama"),
}
"""Settings of the text model of packages with an audio encoder."""
_AUDIO = dict(
    d_model=16,
    hidden_size=16,
    intermediate_size=64,
    encoder_layers=2,
    num_hidden_layers=2,
    encoder_attention_heads=2,
    num_attention_heads=2,
    encoder_ffn_dim=32,
    num_mel_bins=8,
    max_source_positions=16,
)
PROCESSOR = {
    "preprocessor_config.json": {"image_processor_type": "SomeImageProcessor"},
    "processor_config.json": {"processor_class": "SomeProcessor"},
    "video_preprocessor_config.json": {"video_processor_type": "SomeVideoProcessor"},
}
"""Files of a processor, by name."""


def make_package(directory: Path, family: str, seed: int = 0, **text: Any) -> Path:
    """A random package with ``make_tokenizer()`` and stubs of a processor's files, saved to ``directory``.

    Args:
        text: further settings of the text model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForMultimodalLM

    tokenizer = make_tokenizer()
    vocabulary = len(tokenizer) + 8
    of_text, of_vision, of_package = FAMILIES.get(family) or (AUDIO[family], {}, {})
    part = {"audio_config": _AUDIO} if family in AUDIO else {"vision_config": _VISION | of_vision}
    if family == "gemma4":
        of_text = of_text | {"vocab_size_per_layer_input": vocabulary}
    torch.manual_seed(seed)
    config = type(AutoConfig.for_model(family))(
        text_config=_TEXT | {"vocab_size": vocabulary} | of_text | text, **part, **of_package
    )
    # Ids of placeholders for images, beyond those that the tokenizer gives.
    places = [name for name in vars(config) if name.endswith(("token_id", "token_index")) and getattr(config, name)]
    for number, name in enumerate(name for name in places if getattr(config, name) >= vocabulary):
        setattr(config, name, vocabulary - 1 - number % 8)
    AutoModelForMultimodalLM.from_config(config).save_pretrained(str(directory))
    tokenizer.save_pretrained(str(directory))
    for name, content in PROCESSOR.items():
        (directory / name).write_text(json.dumps(content))
    return directory
