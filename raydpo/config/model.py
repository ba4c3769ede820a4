"""Sections ``model`` and ``reference``: the policy as it starts, and the frozen model whose log-probs are cached."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from raydpo.config.section import Dtype, Float, Int, PathOrUri, Section

__all__ = ["LoraSettings", "ModelConfig", "ReferenceConfig"]

Quantization = Literal["4bit", "8bit"]


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
    dora: bool = False
    """Weight-decomposed adapters (DoRA, arXiv 2402.09353): direction and magnitude apart. Slower."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) (rsLoRA, arXiv 2312.03732), for large ranks."""

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
    """Fresh adapters to train; null = full fine-tuning, or the adapter below."""
    adapter: PathOrUri | None = None
    """Directory of a PEFT adapter, such as an SFT's, that is trained further: the policy starts as model + adapter, and so
    is the reference unless section reference says otherwise."""
    quantization: Quantization | None = None
    """Frozen weights in 4 bits (NF4, double quantization: QLoRA, arXiv 2305.14314) or 8 (LLM.int8, without its outliers,
    which would depend on the batch) through bitsandbytes; lora or adapter is what trains then."""
    freeze: tuple[str, ...] = ()
    """Regular expressions; full fine-tuning leaves parameters alone whose name contains one, such as embed_tokens or
    layers[.][0-3][.]."""
    layout: Literal["auto", "tree", "packed", "padded"] = "auto"
    """How a micro-batch is computed: as a prefix tree, as a pack without shared prefixes, or as padded rows. auto = the
    first of them that a check at load finds exact for this model."""
    trust_remote_code: bool = False
    """Run Python code that the model's directory carries. Named loudly when on."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.lora is not None and self.adapter is not None:
            raise ValueError(f"lora (r {self.lora.r}) and adapter ({self.adapter}) contradict each other: an adapter that "
                             "exists brings its own settings; keep one")
        if self.quantization is not None and not self.adapts:
            raise ValueError(f"quantization is {self.quantization}, but quantized weights cannot be trained; add lora, "
                             "for example lora: {r: 16}")
        if self.freeze and self.adapts:
            raise ValueError(f"freeze ({', '.join(self.freeze)}) has no effect beside lora or adapter, which leave the "
                             "whole model alone; drop one")
        for pattern in self.freeze:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"freeze: {pattern!r} is no regular expression: {error}") from None
        return self

    @property
    def adapts(self) -> bool:
        """Whether adapters train, not the model."""
        return self.lora is not None or self.adapter is not None


class ReferenceConfig(Section):
    """The frozen model whose log-probs are cached. Default: the policy as it starts."""

    path: PathOrUri | None = None
    """Directory or hub name; null = model.path."""
    adapter: PathOrUri | None = None
    """Directory of a PEFT adapter applied on top of it; null = model.adapter where path is null, else none."""
    quantization: Quantization | Literal["none", "model"] = "model"
    """Of the reference's weights; model = as model.quantization."""
    allow_other_quantization: bool = False
    """Train a quantized policy against a reference of other precision. The policy is then not the reference at step 0: the
    gate cannot compare them, and part of every log-ratio is quantization."""
