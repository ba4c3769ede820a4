"""The trained policy as a directory that transformers or PEFT loads without raydpo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from raydpo.model.load import dropout_settings, load_causal_lm, restore_dropout
from raydpo.model.weights import ADAPTER_NAME
from raydpo.training.policy.engine import Engine, PolicySpec

__all__ = ["export_policy"]


def export_policy(
    engine: Engine, spec: PolicySpec, base_name: str, tokenizer: Any, directory: Path, merge: bool = False
) -> None:
    """Write model or adapter and tokenizer to ``directory`` on rank 0. All ranks must call it.

    Args:
        base_name: name of the base model in an adapter's configuration.
        merge: also write the adapter merged into its model, to ``merged`` below ``directory``.
    """
    weights = engine.gather()
    if engine.rank != 0:
        return
    policy = engine.module.policy
    if spec.adapts:
        policy.peft_config[ADAPTER_NAME].base_model_name_or_path = base_name
        # Some adapters, such as VeRA, store projections that do not train.
        buffers = dict(policy.named_buffers(remove_duplicate=False))
        weights |= {name: value.cpu() for name, value in policy.state_dict().items() if name in buffers}
        policy.save_pretrained(str(directory), state_dict=weights, safe_serialization=True)
    else:
        buffers = {name: value.cpu() for name, value in policy.state_dict().items() if name not in weights}
        tied = set(getattr(policy, "_tied_weights_keys", None) or ())
        weights |= {name: value for name, value in buffers.items() if name not in tied}
        policy.save_pretrained(str(directory), state_dict=weights, safe_serialization=True)
        _restore_dropout(spec, directory)
    tokenizer.save_pretrained(str(directory))
    if merge and spec.adapts:
        engine.load_whole_models()
        # Merge into the stored weights, not into those that were quantized for training.
        how = {"rope_length": spec.rope_length, "trust_remote_code": spec.trust_remote_code}
        merged = load_causal_lm(spec.path, spec.dtype, adapter=str(directory), **how)
        _untie(merged.get_base_model())
        merged.merge_and_unload().save_pretrained(str(directory / "merged"), safe_serialization=True)
        _restore_dropout(spec, directory / "merged")
        tokenizer.save_pretrained(str(directory / "merged"))


def _untie(causal_lm: nn.Module) -> None:
    """Copy the head's weight if it is tied to the embedding and one of them has an adapter: merging adds to the weight in
    place, and would change both. PEFT then writes tie_word_embeddings=false."""
    ends = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    embedding, head = (getattr(end, "base_layer", end) for end in ends)
    if (embedding, head) != ends and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())


def _restore_dropout(spec: PolicySpec, directory: Path) -> None:
    from transformers import AutoConfig

    original = AutoConfig.from_pretrained(spec.path, trust_remote_code=spec.trust_remote_code)
    restore_dropout(directory / "config.json", dropout_settings(original.to_dict()))
