"""Sections ``model`` and ``reference``: the policy as it starts, and the frozen model whose log-probs are cached."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from raydpo.config.section import Dtype, Float, Int, PathOrUri, Section

__all__ = ["LoraSettings", "ModelConfig", "ReferenceConfig"]


class LoraSettings(Section):
    """Low-rank adapters (arXiv 2106.09685), saved as a standard PEFT adapter."""

    r: Int = Field(16, ge=1)
    """Rank of each adapter."""
    alpha: Float = Field(32.0, gt=0)
    """Scale of the adapter's output: alpha / r."""
    dropout: Float = Field(0.0, ge=0, lt=1)
    """Must stay 0: a policy with dropout is not the reference at step 0, whatever the weights."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """PEFT's target modules: ``all-linear``, a list of module names, or a regular expression."""

    @model_validator(mode="after")
    def _check(self) -> LoraSettings:
        if self.dropout:
            raise ValueError(f"dropout is {self.dropout}, but DPO compares policy and reference without noise; "
                             "set it to 0")
        return self


class ModelConfig(Section):
    """The policy as it starts."""

    path: PathOrUri
    """Local directory of a Hugging Face model (safetensors), or its name on the hub."""
    tokenizer: PathOrUri | None = None
    """Directory or hub name of the tokenizer; null = the model's own."""
    dtype: Dtype = "auto"
    """Precision of training. auto = bfloat16 on GPUs and on CPUs with matrix units for it (AMX), else float32.
    With bfloat16 the optimizer keeps float32 master weights."""
    lora: LoraSettings | None = None
    """Adapters to train; null = full fine-tuning."""
    layout: Literal["auto", "tree", "packed", "padded"] = "auto"
    """How a micro-batch is computed: as a prefix tree, as a pack without shared prefixes, or as padded rows. auto = the
    first of them that a check at load finds exact for this model."""
    trust_remote_code: bool = False
    """Run Python code that the model's directory carries. Named loudly when on."""


class ReferenceConfig(Section):
    """The frozen model whose log-probs are cached. Default: the policy as it starts."""

    path: PathOrUri | None = None
    """Directory or hub name; null = model.path."""
    adapter: PathOrUri | None = None
    """Directory of a PEFT adapter applied on top of it."""
