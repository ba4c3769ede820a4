"""A reward model as a judge of answers: a sequence classifier with one output. Needs torch and transformers alone."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from raydpo.data.preference import Text
from raydpo.data.tokenise import load_tokenizer
from raydpo.errors import ModelError
from raydpo.model.load import torch_dtype
from raydpo.reference.identity import ReferenceIdentity, identify, on_this_machine

__all__ = ["RewardModel"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                    "chat_template.jinja", "vocab.json", "merges.txt")


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """Work for ``evaluation.work``: from ``prompt`` (a text or messages, as JSON) and ``answer`` to ``score``, float64.

    A conversation is rendered by the reward model's own chat template; a text prompt is followed by its answer as it is.
    """

    path: str
    weights: ReferenceIdentity
    tokenizer: str
    trust_remote_code: bool = False

    @classmethod
    def at(cls, path: str, dtype: str, trust_remote_code: bool) -> RewardModel:
        """The one in a local directory.

        Raises:
            ModelError: if it is not stored as safetensors.
        """
        digest = hashlib.sha256()
        for name in _TOKENIZER_FILES:
            file = Path(path) / name
            digest.update(f"{name}\0".encode() + (file.read_bytes() if file.is_file() else b""))
        return cls(path=path, weights=identify(path, dtype), tokenizer=digest.hexdigest(),
                   trust_remote_code=trust_remote_code)

    @property
    def identity(self) -> dict[str, Any]:
        return {"reward": 1, "weights": dataclasses.asdict(self.weights), "tokenizer": self.tokenizer}

    def open(self, device: str) -> Callable[[pa.Table], pa.Table]:
        """Load it.

        Raises:
            ModelError: if it is no reward model: no classifier, several outputs, or a head that is not in the files.
        """
        here = on_this_machine(self)
        tokenizer = load_tokenizer(here.path, trust_remote_code=self.trust_remote_code)
        model = here._load().to(device)

        def act(rows: pa.Table) -> pa.Table:
            return pa.table({"score": pa.array([
                _score(model, tokenizer, json.loads(prompt), answer) for prompt, answer in
                zip(rows["prompt"].to_pylist(), rows["answer"].to_pylist(), strict=True)], pa.float64())})

        return act

    def _load(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        try:
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                self.path, dtype=torch_dtype(self.weights.dtype), use_safetensors=True, output_loading_info=True,
                trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"cannot load the reward model {self.path!r}: {' '.join(str(error).split())[:300]}") from error
        if loaded["missing_keys"]:
            lacking = ", ".join(sorted(loaded["missing_keys"])[:3])
            raise ModelError(f"{self.path} is no reward model: its files lack {lacking}, which would be random numbers; "
                             "give a sequence classifier in evaluate.reward_model")
        if model.config.num_labels != 1:
            raise ModelError(f"the reward model {self.path} has {model.config.num_labels} outputs; one is wanted")
        return model.eval()


@torch.no_grad()
def _score(model: Any, tokenizer: Any, prompt: Text, answer: str) -> float:
    """Of one text at a time: a batch would need padding, which not every classifier masks."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt + answer)["input_ids"]
    else:
        if not tokenizer.chat_template:
            raise ModelError("the prompts are conversations, but the reward model has no chat template; add one to its "
                             "tokenizer")
        text = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": answer}], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and len(ids) > limit:
        raise ModelError(f"an answer and its prompt have {len(ids):,} tokens for the reward model, which takes {limit:,}; "
                         "lower evaluate.max_tokens or data.max_length")
    return float(model(input_ids=torch.tensor([ids], device=model.device)).logits[0, 0].float())
