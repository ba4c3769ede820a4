"""Preferences as token ids, and where the prompt ends and the completion begins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raydpo.data.preference import Malformed, Preference
from raydpo.errors import ModelError

__all__ = ["TokenisedPair", "Tokeniser", "load_tokenizer"]

TokenisedPair = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Token ids of prompt, chosen and rejected completion: int32 arrays."""


def load_tokenizer(path: str, *, chat_template: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer in directory ``path``.

    Args:
        chat_template: Jinja text, or the path of a file that holds it, in place of the tokenizer's own.

    Raises:
        ModelError: if there is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raise whatever their backend raises
        raise ModelError(f"cannot load a tokenizer from {path}: {' '.join(str(error).split())[:300]}") from None
    if chat_template is not None:
        is_text = "{" in chat_template or "\n" in chat_template
        if not is_text and not Path(chat_template).is_file():
            raise ModelError(f"data.chat_template {chat_template!r} is neither Jinja text nor a file")
        tokenizer.chat_template = chat_template if is_text else Path(chat_template).read_text(encoding="utf-8")
    return tokenizer


class Tokeniser:
    """Turns preferences into token ids exactly as TRL's DPOTrainer does.

    Attributes:
        tokenizer: the transformers tokenizer.
        merged: how many pairs so far had a prompt that, tokenised alone, is no prefix of prompt and completion together.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.merged = 0

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return () if self.tokenizer.eos_token_id is None else (self.tokenizer.eos_token_id,)

    def encode(self, preferences: Sequence[Preference]) -> list[TokenisedPair | Malformed]:
        """Ids of each preference, or what is wrong with it.

        Prompt, prompt + chosen and prompt + rejected are tokenised whole; the completions begin where the three stop
        agreeing, since tokens may merge across the boundary. Text completions end with the EOS token, appended where it
        is absent; conversations are as the chat template renders them.

        Raises:
            ModelError: if there are conversations and the tokenizer has no chat template.
        """
        texts = [preference for preference in preferences if not preference.conversational]
        whole = iter(self._encode_texts(texts))
        encoded: list[TokenisedPair | Malformed] = []
        for preference in preferences:
            try:
                encoded.append(self._split(*(self._encode_messages(preference) if preference.conversational else
                                             next(whole))))
            except Malformed as error:
                encoded.append(error)
        return encoded

    def _encode_texts(self, preferences: Sequence[Preference]) -> list[tuple[list[int], ...]]:
        if not preferences:
            return []
        eos = self.tokenizer.eos_token
        if eos is None:
            raise ModelError("the tokenizer has no EOS token, so the end of a text completion cannot be learned; set "
                             "eos_token in its tokenizer_config.json")
        texts = [text for preference in preferences for text in (
            preference.prompt, *(preference.prompt + (answer if answer.endswith(eos) else answer + eos)
                                 for answer in (preference.chosen, preference.rejected)))]
        ids = self.tokenizer(texts)["input_ids"]
        return list(zip(ids[::3], ids[1::3], ids[2::3], strict=True))

    def _encode_messages(self, preference: Preference) -> tuple[list[int], ...]:
        if not self.tokenizer.chat_template:
            raise ModelError("the data are conversations, but the tokenizer has no chat template; set data.chat_template "
                             "to one, or use prompt, chosen and rejected as text")

        def render(messages: list[dict[str, Any]], **kwargs: Any) -> list[int]:
            return self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, tools=preference.tools,
                                                      **kwargs, **preference.template_kwargs)["input_ids"]

        try:
            return (render(preference.prompt, add_generation_prompt=True), render(preference.prompt + preference.chosen),
                    render(preference.prompt + preference.rejected))
        except Exception as error:  # templates raise whatever their author wrote
            raise Malformed(f"the chat template refuses it ({type(error).__name__}: {str(error)[:80]})") from None

    def _split(self, prompt: list[int], chosen: list[int], rejected: list[int]) -> TokenisedPair:
        boundary = min(_common(prompt, chosen), _common(prompt, rejected))
        self.merged += boundary < len(prompt)
        ids = tuple(np.array(part, dtype=np.int32) for part in
                    (prompt[:boundary], chosen[boundary:], rejected[boundary:]))
        for part, name in zip(ids, ("prompt", "chosen", "rejected"), strict=True):
            if not len(part):
                # The first token of a sequence has no predecessor to predict it.
                raise Malformed(f"{name} has no tokens")
        return ids


def _common(one: list[int], other: list[int]) -> int:
    """Length of the common prefix."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return next(index for index in range(length) if one[index] != other[index])
