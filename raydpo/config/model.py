"""Sections ``model`` and ``reference``: the initial policy, and the frozen model whose log-probs are cached."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from raydpo.config.section import Dtype, Float, Int, PathOrUri, Section

__all__ = ["LoraSettings", "ModelConfig", "ReferenceConfig"]

Quantization = Literal["4bit", "8bit"]


class LoraSettings(Section):
    """Low-rank adapters (arXiv 2106.09685), saved as a standard PEFT adapter."""

    r: Int = Field(default=16, ge=1)
    """Rank of each adapter."""
    alpha: Float = Field(default=32.0, gt=0)
    """The adapter's output is multiplied by alpha / r."""
    dropout: Float = Field(default=0.0, ge=0, lt=1)
    """Dropout of the adapters. Must be 0: with dropout the policy differs from the reference at step 0."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """PEFT's target modules: ``all-linear``, a list of module names, or a regular expression. In a mixture of experts,
    all-linear means all linear layers and all experts, and spares the routers."""
    target_parameters: tuple[str, ...] = ()
    """PEFT's target parameters, beside the modules: ends of names of parameters outside linear layers, such as
    mlp.experts.down_proj, or gate.weight for the routers of many mixtures."""
    exclude_modules: str | tuple[str, ...] = ()
    """PEFT's excluded modules, which get no adapters: a list of names or ends of names, such as experts, or a regular
    expression for whole names."""
    dora: bool = False
    """Weight-decomposed adapters (DoRA, arXiv 2402.09353), which train magnitude and direction separately. Slower."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) (rsLoRA, arXiv 2312.03732), for large ranks."""

    @model_validator(mode="after")
    def _check(self) -> LoraSettings:
        if self.dropout:
            raise ValueError(f"dropout is {self.dropout}, but DPO compares policy and reference without noise; set it to 0")
        return self


class ModelConfig(Section):
    """The initial policy."""

    path: PathOrUri
    """Local directory of a Hugging Face model (safetensors), or its name on the hub."""
    tokenizer: PathOrUri | None = None
    """Directory or hub name of the tokenizer; null = the model's own."""
    dtype: Dtype = "auto"
    """Precision of training. auto = bfloat16 on GPUs and on CPUs with matrix units for it (AMX), else float32.
    With bfloat16 the optimizer keeps master weights in float32."""
    lora: LoraSettings | None = None
    """Train new LoRA adapters; null = full fine-tuning, or training of ``adapter``."""
    adapter: PathOrUri | None = None
    """Directory of a PEFT adapter to train further, for example from SFT. The initial policy is model + adapter, and so is
    the reference, unless section reference sets another one."""
    quantization: Quantization | None = None
    """Quantize the frozen weights with bitsandbytes: 4bit (NF4 with double quantization, QLoRA, arXiv 2305.14314) or 8bit
    (LLM.int8 without its outliers, which would depend on the batch). Needs lora or adapter, which are trained."""
    freeze: tuple[str, ...] = ()
    """Regular expressions. Full fine-tuning does not train parameters whose names contain a match, such as embed_tokens or
    layers[.][0-3][.]."""
    layout: Literal["auto", "tree", "packed", "padded"] = "auto"
    """Layout of a micro-batch: a prefix tree, packed rows without shared prefixes, or padded rows. auto = the first of these
    that a check at load finds exact for this model."""
    fused: bool = False
    """Compute norms, rotary embeddings, gated feed-forward parts and softmax as single functions that torch compiles for the
    GPU, in scoring and training of a bfloat16 model. Only what a check at load finds equal up to rounding is replaced, and a
    line says what. Not yet measured on a GPU, therefore off."""
    trust_remote_code: bool = False
    """Run Python code from the model's directory. A warning is printed if true."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.lora is not None and self.adapter is not None:
            raise ValueError(
                f"lora (r {self.lora.r}) and adapter ({self.adapter}) contradict each other: an existing "
                "adapter has its own settings; keep one"
            )
        if self.quantization is not None and not self.adapts:
            raise ValueError(
                f"quantization is {self.quantization}, but quantized weights cannot be trained; add lora, "
                "for example lora: {r: 16}"
            )
        if self.freeze and self.adapts:
            raise ValueError(
                f"freeze ({', '.join(self.freeze)}) has no effect with lora or adapter, which do not train "
                "the model's own weights; drop one"
            )
        for pattern in self.freeze:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"freeze: {pattern!r} is not a regular expression: {error}") from None
        return self

    @property
    def adapts(self) -> bool:
        """Whether adapters are trained, and not the model's weights."""
        return self.lora is not None or self.adapter is not None


class ReferenceConfig(Section):
    """The frozen model whose log-probs are cached. Default: the initial policy."""

    path: PathOrUri | None = None
    """Directory or hub name; null = model.path."""
    adapter: PathOrUri | None = None
    """Directory of a PEFT adapter on top of it; null = model.adapter if path is null, else none."""
    quantization: Quantization | Literal["none", "model"] = "model"
    """Quantization of the reference's weights; model = as model.quantization."""
    allow_other_quantization: bool = False
    """Allow a policy and a reference of different quantization. They then differ at step 0: the gate cannot compare them,
    and part of every log-ratio is the error of quantization."""
