"""The trained policy as a directory that transformers or PEFT loads without raydpo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raydpo.model.load import dropout_settings, restore_dropout
from raydpo.training.engine import PolicyEngine, PolicySpec

__all__ = ["export_policy"]


def export_policy(engine: PolicyEngine, spec: PolicySpec, base_name: str, tokenizer: Any, directory: Path) -> None:
    """Gather the weights and, on rank 0, write model or adapter and tokenizer to ``directory``. All ranks must call it.

    Args:
        base_name: how an adapter names the model it belongs to.
    """
    from transformers import AutoConfig

    weights = engine.gather()
    if engine.rank != 0:
        return
    policy = engine.module.policy
    if spec.adapts:
        policy.peft_config["default"].base_model_name_or_path = base_name
        policy.save_pretrained(str(directory), state_dict=weights, safe_serialization=True)
    else:
        buffers = {name: value.cpu() for name, value in policy.state_dict().items() if name not in weights}
        tied = set(getattr(policy, "_tied_weights_keys", None) or ())
        weights |= {name: value for name, value in buffers.items() if name not in tied}
        policy.save_pretrained(str(directory), state_dict=weights, safe_serialization=True)
        original = AutoConfig.from_pretrained(spec.path, trust_remote_code=spec.trust_remote_code)
        restore_dropout(directory / "config.json", dropout_settings(original.to_dict()))
    tokenizer.save_pretrained(str(directory))
