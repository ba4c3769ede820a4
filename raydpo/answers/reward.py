"""A reward model that scores answers: a sequence classifier with one output."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import AutoConfig, AutoModelForSequenceClassification

from raydpo.answers.classifier import Classifier
from raydpo.data.messages import Text
from raydpo.data.template import ChatTemplate
from raydpo.data.tokenise import load_tokenizer
from raydpo.errors import FilesError, ModelError, RaydpoError, one_line, some_of
from raydpo.model.limits import ModelLimits
from raydpo.model.load import torch_dtype
from raydpo.model.weights import check_weights, refuse_gaps
from raydpo.reference.identity import ReferenceIdentity, identify, on_this_machine, proved_here
from raydpo.reference.score import ReferenceSpec

__all__ = ["RESULT", "RewardModel", "check_prompts", "check_reward_model"]

_WRONG_OUTPUTS = "the reward model {path} has {outputs} outputs (num_labels in its config.json); expected one"

RESULT = pa.schema([("score", pa.float64()), ("error", pa.string()), ("alone", pa.string()), ("seconds", pa.float64())])
"""Score of an answer; null with an ``error`` that says why it has none. ``alone`` says why the model does not score batches;
null if it does. ``seconds`` is the answer's share of the time that its block took."""
PROBE = """The sky is blue because the air scatters blue light more than red light. In the evening its way through the air is
longer, so more of the blue light is lost and the sky turns red."""
"""Words of the texts with which batches are checked."""
PROBE_WORDS = (1, 3, 9, 34)

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
_MORE_TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "spm.model",
    "vocab.txt",
)
"""Those of BERT, XLNet, XLM-R and DeBERTa. They count where they are there, so that digests of other models stay."""


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """Work that scores answers: it turns ``prompt`` (text or messages, as JSON) and ``answer`` into the columns ``RESULT``.

    The reward model's own chat template renders conversations. A text prompt is followed by its answer without a template.
    Equal rows of a block have equal scores. Those of equal rows in two blocks may differ by rounding.
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
        return {"reward": 2, "weights": self.weights.to_dict(), "tokenizer": self.tokenizer}

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
        reader = _Reader.of(spec.path, self.trust_remote_code)
        if _tokenizer_digest(spec.path) != self.tokenizer:
            raise ModelError(
                f"the reward model {spec.path} has another tokenizer on {platform.node()} than where the run was started"
            )

        classifier = Classifier(model, reader.probes())

        def act(rows: pa.Table) -> pa.Table:
            asked = list(zip(rows["prompt"].to_pylist(), rows["answer"].to_pylist(), strict=True))
            found = {one: _Score() for one in asked}
            readable: dict[tuple[str, str], list[int]] = {}
            for one in found:
                try:
                    readable[one] = reader.ids(json.loads(one[0]), one[1])
                except RaydpoError as error:
                    found[one] = _Score(error=str(error))
            started = time.perf_counter()
            scores = classifier.scores(list(readable.values()))
            seconds = (time.perf_counter() - started) / max(len(readable), 1)
            for one, score in zip(readable, scores.tolist(), strict=True):
                found[one] = _Score.of(score, one[1], seconds)
            return pa.Table.from_pylist([{**vars(found[one]), "alone": classifier.alone} for one in asked], schema=RESULT)

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
                f"cannot load the reward model {self.path!r}, which must be a sequence classifier: {one_line(error, 600)}"
            ) from error
        if model.config.num_labels != 1:
            raise FilesError(_WRONG_OUTPUTS.format(path=self.path, outputs=model.config.num_labels))
        return model.eval()


@dataclass(frozen=True)
class _Score:
    score: float | None = None
    error: str | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, score: float, answer: str, seconds: float) -> _Score:
        if math.isfinite(score):
            return cls(score, None, seconds)
        return cls(
            None,
            f"the reward model gives the answer {answer[:80]!r} a score of {score}; score in float32 "
            "(score.dtype=float32) or check its weights",
            seconds,
        )


def _tokenizer_digest(path: str) -> str:
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        file = Path(path) / name
        digest.update(f"{name}\0".encode() + (file.read_bytes() if file.is_file() else b""))
    for name in _MORE_TOKENIZER_FILES:
        file = Path(path) / name
        if file.is_file():
            digest.update(f"{name}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def check_reward_model(path: str, trust_remote_code: bool) -> list[str]:
    """Check the reward model in a local directory by its headers and its tokenizer. Reads no weights.

    Returns:
        Warnings.

    Raises:
        FilesError: if it is not a whole sequence classifier with one output, or its tokenizer gives token ids that it does
            not have.
    """
    warnings = check_weights(path, trust_remote_code=trust_remote_code, classifier=True)
    outputs = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).num_labels
    if outputs != 1:
        raise FilesError(_WRONG_OUTPUTS.format(path=path, outputs=outputs))
    reader = _Reader.of(path, trust_remote_code)
    rows, added = reader.limits.rows, reader.tokenizer.get_added_vocab()
    beyond = {token: id for token, id in reader.tokenizer.get_vocab().items() if rows is not None and id >= rows}
    if beyond.keys() - added.keys():
        reader.check(sorted(beyond.values()))
    check_prompts(path, trust_remote_code, ["x"])
    if beyond:
        warnings.append(
            f"the tokenizer of the reward model {path} has {len(beyond):,} special token(s) ({some_of(sorted(beyond))}) "
            f"beyond the {rows:,} rows of its embedding: a prompt or an answer that spells one cannot be scored"
        )
    return warnings


def check_prompts(path: str, trust_remote_code: bool, prompts: Sequence[Text]) -> None:
    """Check that the reward model in a local directory can read ``prompts`` with a short answer.

    Raises:
        FilesError: if it lacks a chat template, or has no row for a token id or no position for a token.
    """
    reader = _Reader.of(path, trust_remote_code)
    for prompt in prompts:
        reader.ids(prompt, "x")


@dataclass(frozen=True)
class _Reader:
    """How the reward model in directory ``path`` reads a prompt with its answer."""

    path: str
    tokenizer: Any
    limits: ModelLimits

    @classmethod
    def of(cls, path: str, trust_remote_code: bool) -> _Reader:
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        return cls(path, tokenizer, ModelLimits.of(path, trust_remote_code))

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)

    def ids(self, prompt: Text, answer: str) -> list[int]:
        """Token ids.

        Raises:
            FilesError: if the model lacks a chat template, or has no row for an id or no position for a token.
        """
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt + answer)["input_ids"]
        else:
            if not self.tokenizer.chat_template:
                raise FilesError(
                    f"the prompts are conversations, but the reward model {self.path} has no chat template; add one to its "
                    "tokenizer"
                )
            template = self._template
            try:
                text = template.render(template.fitted([*prompt, {"role": "assistant", "content": answer}], set()))
            except Exception as error:  # templates raise what they like
                raise FilesError(
                    f"the chat template of the reward model {self.path} cannot write a conversation: {one_line(error, 200)}"
                ) from error
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        self.check(ids)
        return ids

    def probes(self) -> list[list[int]]:
        """Token ids of texts and conversations of different lengths that the model can read."""
        found, words = [], PROBE.split()
        for count in PROBE_WORDS:
            for prompt in ("Why?", [{"role": "user", "content": "Why?"}]):
                with contextlib.suppress(RaydpoError):
                    found.append(self.ids(prompt, " ".join(words[:count])))
        return found

    def check(self, ids: Sequence[int]) -> None:
        if not ids:
            raise FilesError(f"a prompt and its answer have no token for the reward model {self.path}")
        rows, positions = self.limits.rows, self.limits.positions
        if rows is not None and max(ids, default=0) >= rows:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise FilesError(
                f"the tokenizer of the reward model {self.path} gives token ids up to {max(ids):,} ({token!r}), but its "
                f"embedding has {rows:,} rows (ids 0 to {rows - 1:,}); give the reward model with the tokenizer that "
                "belongs to it"
            )
        if positions is not None and len(ids) > positions:
            raise FilesError(
                f"a prompt and its answer have {len(ids):,} tokens, but the reward model takes at most {positions:,}; "
                "lower max_tokens of the section that samples the answers (evaluate or rounds.sample), or data.max_length"
            )
