"""A reward model as a judge of answers: a sequence classifier with one output."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from transformers import AutoModelForSequenceClassification

from raydpo.data.messages import Text
from raydpo.data.template import ChatTemplate
from raydpo.data.tokenise import load_tokenizer
from raydpo.errors import ModelError
from raydpo.model.load import torch_dtype
from raydpo.model.weights import refuse_gaps
from raydpo.reference.identity import ReferenceIdentity, identify, on_this_machine, proved_here
from raydpo.reference.score import ReferenceSpec

__all__ = ["RewardModel"]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """Work that turns ``prompt`` (text or messages, as JSON) and ``answer`` into ``score``, float64.

    The reward model's own chat template renders conversations. A text prompt is followed by its answer without a template.
    """

    path: str
    weights: ReferenceIdentity
    tokenizer: str
    trust_remote_code: bool = False

    @classmethod
    def at(cls, path: str, dtype: str, trust_remote_code: bool) -> RewardModel:
        """Identify the reward model in a local directory.

        Raises:
            ModelError: if it is not stored as safetensors.
        """
        weights, tokenizer = identify(path, dtype, trust_remote_code=trust_remote_code), _tokenizer_digest(path)
        return cls(path=path, weights=weights, tokenizer=tokenizer, trust_remote_code=trust_remote_code)

    @property
    def identity(self) -> dict[str, Any]:
        return {"reward": 1, "weights": self.weights.to_dict(), "tokenizer": self.tokenizer}

    def open(self, device: str) -> Callable[[pa.Table], pa.Table]:
        """Load the model and return a function that scores a table of rows.

        Raises:
            ModelError: if it is not a classifier, has several outputs, or its head is not in the files; or if the files on
                this machine are another model.
        """
        spec = on_this_machine(
            ReferenceSpec(path=self.path, adapter=None, identity=self.weights, trust_remote_code=self.trust_remote_code)
        )
        with proved_here(spec):
            model = self._load(spec.path).to(device)
        tokenizer = load_tokenizer(spec.path, trust_remote_code=self.trust_remote_code)
        if _tokenizer_digest(spec.path) != self.tokenizer:
            raise ModelError(
                f"the reward model {spec.path} has another tokenizer on {platform.node()} than where the run was started"
            )

        def act(rows: pa.Table) -> pa.Table:
            asked = zip(rows["prompt"].to_pylist(), rows["answer"].to_pylist(), strict=True)
            scores = [_score(model, tokenizer, json.loads(prompt), answer) for prompt, answer in asked]
            return pa.table({"score": pa.array(scores, pa.float64())})

        return act

    def _load(self, path: str) -> Any:
        try:
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                path,
                dtype=torch_dtype(self.weights.dtype),
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=self.trust_remote_code,
            )
            refuse_gaps(path, loaded)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(
                f"cannot load the reward model {self.path!r}; evaluate.reward_model must be a sequence "
                f"classifier: {' '.join(str(error).split())[:600]}"
            ) from error
        if model.config.num_labels != 1:
            raise ModelError(f"the reward model {self.path} has {model.config.num_labels} outputs; expected one")
        return model.eval()


def _tokenizer_digest(path: str) -> str:
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        file = Path(path) / name
        digest.update(f"{name}\0".encode() + (file.read_bytes() if file.is_file() else b""))
    return digest.hexdigest()


@torch.no_grad()
def _score(model: Any, tokenizer: Any, prompt: Text, answer: str) -> float:
    """Score one answer. Batches would need padding, which not every classifier masks."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt + answer)["input_ids"]
    else:
        if not tokenizer.chat_template:
            raise ModelError(
                "the prompts are conversations, but the reward model has no chat template; add one to its tokenizer"
            )
        template = ChatTemplate(tokenizer)
        text = template.render(template.fitted([*prompt, {"role": "assistant", "content": answer}], set()))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and len(ids) > limit:
        raise ModelError(
            f"a prompt and its answer have {len(ids):,} tokens, but the reward model takes at most {limit:,}; "
            "lower evaluate.max_tokens or data.max_length"
        )
    score = float(model(input_ids=torch.tensor([ids], device=model.device)).logits[0, 0].float())
    if not math.isfinite(score):
        raise ModelError(
            f"the reward model gives the answer {answer[:80]!r} a score of {score}; score in float32 "
            "(score.dtype=float32) or check its weights"
        )
    return score
