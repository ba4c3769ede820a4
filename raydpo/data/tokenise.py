"""Tokenise preferences, and find where the prompt ends and the completion begins."""

import json
from collections.abc import Sequence
from datetime import date
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from raydpo.config.data import PINNED_DATE
from raydpo.data import remarks
from raydpo.data.marks import MarkedPair, Marker
from raydpo.data.messages import Malformed
from raydpo.data.preference import Preference
from raydpo.data.refusal import refusal
from raydpo.data.remarks import Remark
from raydpo.data.rendering import RenderingCheck, remedy
from raydpo.data.segments import Segments
from raydpo.data.shapes import common_prefix
from raydpo.data.template import ChatTemplate
from raydpo.data.words import Words
from raydpo.errors import FilesError, RaydpoError, reason
from raydpo.storage.pointers import refuse_pointers

__all__ = ["FILES", "TokenisedPair", "Tokeniser", "has_tokenizer", "load_tokenizer", "template_text"]

FILES = (
    # Without one of the first four there is no tokenizer.
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Names of the files of a tokenizer."""

_ID = np.dtype("<i4")
_SHORT = 20
_SENTENCE_ENDS = (".", "?", "!")
_PROBE = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]


class TokenisedPair(NamedTuple):
    """Token ids, int32 arrays [tokens], not to be changed. The completions are not truncated yet. Empty is only the missing
    side of a completion alone, see ``Preference.alone``."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


def has_tokenizer(path: str | Path) -> bool:
    """Whether directory ``path`` has files of a tokenizer. Not every model's or adapter's has."""
    return any(Path(path, name).is_file() for name in FILES[:4])


def load_tokenizer(path: str, *, chat_template: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load the transformers tokenizer in directory ``path``, or of that name on the hub.

    Args:
        chat_template: Jinja text, or the path of a file with it, in place of the tokenizer's own.

    Raises:
        FilesError: if there is no tokenizer, its files are Git LFS pointers, or the template is not valid Jinja.
    """
    from transformers import AutoTokenizer

    refuse_pointers(Path(path) / name for name in FILES)  # tokenizers would report broken JSON
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raise what their backends raise
        _refuse_config(path, error, trust_remote_code)
        raise FilesError(
            f"cannot load a tokenizer from {path!r}: {reason(error, 300)}; set model.tokenizer to a directory "
            "with tokenizer.json, or a hub name"
        ) from None
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _processors_template(Path(path))
    if chat_template is not None:
        tokenizer.chat_template = template_text(chat_template)
        _check_syntax(tokenizer, chat_template)
    return tokenizer


def _processors_template(directory: Path) -> str | None:
    """The chat template in chat_template.json, where older vision-language packages have it. transformers reads it for the
    processor only."""
    file = directory / "chat_template.json"
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FilesError(f"cannot read {file}: {reason(error, 200)}; a JSON object with chat_template is expected") from None
    return found if isinstance(found, str) else None


def _refuse_config(path: str, error: Exception, trust_remote_code: bool) -> None:
    """Refuse config.json if ``error``, raised while a tokenizer was loaded, is about it: that reads the model's settings."""
    from transformers import AutoConfig

    if has_tokenizer(path) and Path(path, "config.json").is_file():
        try:
            AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        except Exception as wrong:  # settings are checked by many classes
            if str(wrong) == str(error):
                raise FilesError(
                    f"transformers refuses {path}/config.json: {reason(wrong, 300)}; correct that entry, or give the "
                    "config.json that belongs to the weights"
                ) from None


def template_text(template: str) -> str:
    """The text of ``data.chat_template``, which is that text or the path of a file.

    Raises:
        FilesError: if it is neither.
    """
    if "{{" in template or "{%" in template:
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise FilesError(
            f"data.chat_template {template!r} is neither Jinja text nor a file that can be read: {reason(error, 200)}"
        ) from None


def _check_syntax(tokenizer: Any, name: str) -> None:
    from jinja2 import TemplateSyntaxError

    try:
        tokenizer.apply_chat_template(_PROBE[:1], tokenize=False)
    except TemplateSyntaxError as error:
        shown = name if len(name) <= 80 else name[:77] + "..."
        raise FilesError(
            f"data.chat_template {shown!r} is not valid Jinja: line {error.lineno}: {reason(error, 200)}"
        ) from None
    except Exception:  # a template may refuse this conversation and accept those of the data
        return


def _short(content: Any) -> str:
    """The text of ``content`` if it is so short that the words of a template may hold it by chance, else empty."""
    if isinstance(content, list):
        content = content[0].get("text") if len(content) == 1 and isinstance(content[0], dict) else None
    return content.strip() if isinstance(content, str) and len(content) <= _SHORT else ""


def _glued(preference: Preference) -> str:
    """Where a text prompt and an answer meet, if a sentence or word ends there and the next begins without white space."""
    last = preference.prompt[-1:]
    answers = [answer for _, answer in preference.sides]
    for answer in answers:
        first = answer[:1]
        begins = first.isupper() and (last.islower() or last.isdecimal())
        if not (begins or (last in _SENTENCE_ENDS and (first.isupper() or first.islower() or first.isdecimal()))):
            return ""
    return f"{preference.prompt[-_SHORT:]}{answers[0][:_SHORT]}" if answers else ""


class Tokeniser:
    """Turns preferences into token ids exactly as TRL's DPOTrainer does, and notes what is odd about them.

    Attributes:
        tokenizer: the transformers tokenizer.
        template: its chat template.
        merged: number of pairs so far whose prompt, tokenised alone, is no prefix of prompt and completion together.
    """

    def __init__(self, tokenizer: Any, day: date = PINNED_DATE) -> None:
        """Args:
        day: the day that a chat template is told instead of today.
        """
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, day)
        self.merged = 0
        self._check = RenderingCheck(tokenizer)
        words, bare = Words.of(getattr(tokenizer, "backend_tokenizer", None)), partial(self._ids, add_special_tokens=False)
        self._segments = {True: Segments(tokenizer, words, bare), False: Segments(tokenizer, words, bare, self._ids)}

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: EOS, and what the chat template puts after the assistant's message."""
        ids = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        if self.tokenizer.chat_template:
            try:
                texts = [self.template.render(_PROBE[:1], generate=True), self.template.render(_PROBE)]
                prompt, whole = self._ids(texts, add_special_tokens=False)
            except Exception:  # a template that refuses the probe
                return tuple(ids)
            special = set(self.tokenizer.all_special_ids)
            ids += [token for token in whole[common_prefix(np.array(prompt), np.array(whole)) :] if token in special][-1:]
        return tuple(dict.fromkeys(ids))

    def encode(self, preferences: Sequence[Preference]) -> list[TokenisedPair | Malformed]:
        """Tokenise preferences.

        Prompt, prompt + chosen and prompt + rejected are each tokenised as a whole; of a completion alone, prompt and
        prompt + completion; of a ``PromptAlone``, the prompt, and both completions are empty. The completions begin where
        these differ, since tokens may merge across the boundary. The EOS token is appended to completions of plain text
        where it is missing; conversations are as the chat template renders them.

        Returns:
            Token ids of each preference, or what is wrong with it.

        Raises:
            FilesError: if there are conversations and no chat template, or text and no EOS token.
        """
        return [ids for ids, _ in self.encode_noted(preferences)]

    def encode_noted(
        self, preferences: Sequence[Preference], marks: list[MarkedPair | None] | None = None
    ) -> list[tuple[TokenisedPair | Malformed, list[Remark]]]:
        """As ``encode``, with what is odd about each preference.

        Args:
            marks: where the marks of each preference are added, None of those that are malformed.
        """
        encoded: list[tuple[TokenisedPair | Malformed, list[Remark]] | None] = [None] * len(preferences)
        plain: list[tuple[int, tuple[str, ...], list[Remark]]] = []
        rendered: list[tuple[int, tuple[str, ...], list[Remark]]] = []
        for index, preference in enumerate(preferences):
            if isinstance(preference.prompt, str):
                plain.append((index, self._texts(preference), self._of_text(preference)))
                continue
            try:
                rendered.append((index, *self._render(preference)))
            except Malformed as error:
                encoded[index] = error, []
        for entries, conversational in ((plain, False), (rendered, True)):
            # A template writes special tokens itself; for plain text the tokenizer adds its own, such as BOS.
            texts = [text for _, parts, _ in entries for text in parts]
            ids = iter(self._segments[conversational].encode(texts))
            for index, parts, found in entries:
                alone = preferences[index].alone
                whole = self._begun(*islice(ids, len(parts)), conversational=conversational, found=found)
                encoded[index] = self._split(*whole, alone=alone, conversational=conversational, found=found), found
        if marks is not None:
            marks += self._marked(preferences, encoded, [*plain, *rendered])
        return encoded  # type: ignore[return-value]

    def _marked(
        self, preferences: Sequence[Preference], encoded: list[Any], entries: list[tuple[int, tuple[str, ...], list]]
    ) -> list[MarkedPair | None]:
        """The marks of each preference. Those with a wrong weight of a message become malformed in ``encoded``."""
        marks: list[MarkedPair | None] = [None] * len(preferences)
        for index, texts, found in entries:
            pair, preference = encoded[index][0], preferences[index]
            if isinstance(pair, Malformed):
                continue
            if not preference.conversational and self._adds_eos:
                texts = (texts[0], *(f"{whole}{self._eos}" for whole in texts[1:]))
            found[:] = [remark for remark in found if remark.kind != remarks.UNTRAINED]  # they count as they say
            try:
                marks[index] = self._marker.mark(preference, texts, pair, found)
            except Malformed as error:
                encoded[index] = error, found
        return marks

    @cached_property
    def _marker(self) -> Marker:
        return Marker(self.tokenizer, self.template)

    def _ids(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        if not texts:
            return []
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        return self.tokenizer(texts, add_special_tokens=add_special_tokens, **options)["input_ids"]

    @cached_property
    def _adds_eos(self) -> bool:
        """Whether the tokenizer itself ends every text with EOS."""
        return self._ids(["x"], True)[0][-1:] == [self.tokenizer.eos_token_id]

    @cached_property
    def _adds_bos(self) -> bool:
        """Whether the tokenizer itself begins every text with BOS."""
        return self._ids(["x"], True)[0][:1] == [self.tokenizer.bos_token_id]

    @cached_property
    def _bos(self) -> bytes | None:
        bos = self.tokenizer.bos_token_id  # kept, since the tokenizer looks it up slowly
        return None if bos is None else np.array([bos], _ID).tobytes()

    @cached_property
    def _eos(self) -> str | None:
        return self.tokenizer.eos_token

    def _texts(self, preference: Preference) -> tuple[str, ...]:
        eos = self._eos
        if eos is None:
            raise FilesError(
                "the tokenizer has no EOS token, so the end of a text completion cannot be learned; set "
                "eos_token in its tokenizer_config.json"
            )
        end = "" if self._adds_eos else eos
        prompt = preference.prompt
        return prompt, *(f"{prompt}{answer.removesuffix(eos)}{end}" for _, answer in preference.sides)

    def _of_text(self, preference: Preference) -> list[Remark]:
        """What is odd about a preference of plain text."""
        found = []
        for side, answer in preference.sides:
            found += self._check.remarks_of_text(side, preference.prompt, answer)
            if self._check.spelled(answer) is None:
                continue
            eos = self._eos
            rest = answer.removesuffix(eos).rstrip()  # one EOS is not written again
            if rest.endswith(eos):
                found.append(Remark(remarks.EOS_TWICE, side, eos))
            while rest.endswith(eos):
                rest = rest.removesuffix(eos).rstrip()
            if (token := self._check.spelled(rest)) is not None:
                found.append(Remark(remarks.SPELLED, side, token))
        prompt = preference.prompt
        own, token = prompt, self._check.spelled(prompt)
        if token is not None:
            own = prompt.removeprefix(self.tokenizer.bos_token or "")  # BOS alone makes no turn
            other = self._check.spelled(own)
            if own == prompt or other is not None or not self._adds_bos:
                found.append(Remark(remarks.SPELLED_BEFORE, "", other or token))
            token = other
        if token is None and self.tokenizer.chat_template:
            found.append(Remark(remarks.TEXT_FOR_CHAT, "", own))
        elif token is None and (meeting := _glued(preference)):
            found.append(Remark(remarks.GLUED, "", meeting))
        if preference.tools or preference.template_kwargs:
            for what, value in ((remarks.TOOLS, preference.tools), ("chat_template_kwargs", preference.template_kwargs)):
                if value:
                    remedy = "give messages (role, content) instead of text"
                    found.append(Remark(remarks.LOST, f"{what} (beside plain text)", "", remedy))
        return found

    def _render(self, preference: Preference) -> tuple[tuple[str, ...], list[Remark]]:
        """Prompt, and prompt with each answer, as the chat template renders them, and what is odd about them."""
        if not self.tokenizer.chat_template:
            raise FilesError(
                "the data are conversations, but the tokenizer has no chat template; set data.chat_template "
                "to one, or use prompt, chosen and rejected as text"
            )
        names, answers = [name for name, _ in preference.sides], [answer for _, answer in preference.sides]
        prompt = preference.prompt
        changes: set[str] = set()
        if not (self.template.fits(prompt) and all(map(self.template.fits, answers))):
            prompt = self.template.fitted(prompt, changes)
            answers = [self.template.fitted(part, changes, len(prompt)) for part in answers]
        tools, arguments = preference.tools, preference.template_kwargs
        if tools:
            tools = self.template.fitted_tools(tools, changes)
        try:
            texts = (
                self.template.render(prompt, tools, generate=True, **arguments),
                *[self.template.render(prompt + answer, tools, **arguments) for answer in answers],
            )
        except RaydpoError:  # a fault of ours, see ``Forms``
            raise
        except Exception as error:  # templates raise what their authors wrote
            self._refuse_template(error)
            told = refusal(error, self.tokenizer.chat_template)
            told += self.template.probes.hint(prompt + max(answers, key=len, default=[]))
            raise Malformed(f"the chat template refuses it: {told}") from None
        found = self._check.remarks(preference, *texts)
        for part, before, messages in (("prompt", [], prompt), *zip(names, (prompt, prompt), answers, strict=False)):
            for place, message in enumerate(messages):
                if len(message) == 2 and (text := _short(message.get("content"))):
                    options = arguments if before else {"generate": True, **arguments}
                    if not self.template.writes([*before, *messages], len(before) + place, tools, **options):
                        what = f"content of role {message['role']!r}"
                        found.append(Remark(remarks.LOST, f"{what} ({part})", text, remedy(what)))
        for change in sorted(changes):
            found.append(Remark(remarks.CHANGED, change))
        for key in arguments:
            if not self.template.reads(key, tools):
                found.append(Remark(remarks.UNREAD, key))
        return texts, found

    def _refuse_template(self, error: Exception) -> None:
        """Refuse the tokenizer's chat template if ``error`` is about the template, whatever the record holds."""
        from jinja2 import TemplateSyntaxError

        template = self.tokenizer.chat_template
        if isinstance(error, TemplateSyntaxError):
            raise FilesError(
                f"the tokenizer's chat template is not valid Jinja: line {error.lineno}: {reason(error, 200)}; correct it, "
                "or set data.chat_template"
            ) from None
        if isinstance(template, dict) and "default" not in template and isinstance(error, ValueError):
            raise FilesError(
                f"the tokenizer has chat templates called {', '.join(map(repr, sorted(template)))} and none called "
                "'default'; set data.chat_template to one of them"
            ) from None

    def _begun(self, *texts: bytes, conversational: bool, found: list[Remark]) -> tuple[bytes, ...]:
        """The ids of a pair, without a second BOS that the tokenizer put before the text's own."""
        if (bos := self._bos) is None:
            return texts
        if texts[0].startswith(bos + bos):
            found.append(Remark(remarks.BOS_TWICE if conversational else remarks.BOS_REMOVED))
            return texts if conversational else tuple(ids[_ID.itemsize :] for ids in texts)
        if conversational and self._adds_bos and not texts[0].startswith(bos):
            found.append(Remark(remarks.BOS_MISSING))
        return texts

    def _split(
        self, *texts: bytes, alone: str | None, conversational: bool, found: list[Remark]
    ) -> TokenisedPair | Malformed:
        """Args:
        texts: ids of the prompt and of the prompt with each answer, as ``Segments`` gives them.
        alone: as of the preference.
        """
        prompt, *wholes = texts
        if not conversational and self._adds_eos:
            prompt = prompt[: -_ID.itemsize]
        if not wholes:
            none = np.empty(0, _ID)
            return TokenisedPair(np.frombuffer(prompt, _ID), none, none) if prompt else Malformed("prompt has no tokens")
        if not (wholes[0].startswith(prompt) and wholes[-1].startswith(prompt)):
            ids = np.frombuffer(prompt, _ID)
            common = min(common_prefix(ids, np.frombuffer(whole, _ID)) for whole in wholes)
            self.merged += common < len(ids)
            prompt = prompt[: common * _ID.itemsize]
        boundary = len(prompt)
        answers = [whole[boundary:] for whole in wholes]
        if not (prompt and answers[0] and answers[-1]):  # the first token of a sequence is never predicted
            names = ("chosen", "rejected") if alone is None else ("completion",)
            empty = [name for name, part in zip(("prompt", *names), (prompt, *answers), strict=True) if not part]
            return Malformed(f"{empty[0]} has no tokens")
        if alone is not None:
            answers.insert(0 if alone == "rejected" else 1, b"")
        elif answers[0] == answers[1]:
            lost = [remark for remark in found if remark.kind in (remarks.LOST, remarks.THOUGHT_BETWEEN)]
            if lost:
                what = ", ".join(sorted({remark.what for remark in lost}))
                return Malformed(
                    f"the chat template leaves out what tells chosen from rejected ({what}), so they have the same tokens; "
                    f"{lost[0].remedy}"
                )
            return Malformed("chosen and rejected have the same tokens")
        return TokenisedPair(*(np.frombuffer(part, _ID) for part in (prompt, *answers)))
