"""Normalise one record of any format to preferences: prompt, chosen and rejected, as text or as messages."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from raydpo.data.beside import BESIDE, look_beside, possible_prompts
from raydpo.data.foreign import Ranks, pairs_of, prompt_of
from raydpo.data.implicit import Parts, are_transcripts, implicit, shared_turns, transcripts
from raydpo.data.labels import split_conversation
from raydpo.data.messages import (
    CONVERSATIONS,
    LITERALS,
    MAY_BE_MEANT,
    PLACEHOLDERS,
    Malformed,
    Message,
    Notes,
    Text,
    answer,
    as_written,
    check_media,
    content_text,
    from_text,
    is_plain,
    messages,
    of_columns,
    role_of,
    says_something,
)
from raydpo.data.spans import Spans

__all__ = ["Preference", "PromptAlone", "as_text", "normalise", "prompt_alone"]

# A row must not decide how it is rendered and tokenised; 'chat_template' would even be code.
_RESERVED = frozenset({
    "conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs", "sanitize_control_tokens",
})  # fmt: skip
_WRITTEN = "text that is a list of messages, as JSON or Python writes it, read as messages"
_FUNCTIONS = "'functions' read as tools"
_ONE_IS_JSON = "warning: only one of chosen and rejected is JSON text of messages, so both are read as text"
_MAY_BE_JSON = frozenset('[{" \n\r\t')
_UNUSUAL_STARTS = frozenset(("", *'[{"'))
_TURNS = ("Human:", "Assistant:", "array(", *PLACEHOLDERS)
_MAY_BE_COLUMNS = ("prompt", "chosen", "rejected", *CONVERSATIONS)


@dataclass(frozen=True)
class Preference:
    """``chosen`` is preferred to ``rejected`` as an answer to ``prompt``. All three are text, or all three are lists of
    messages.

    Attributes:
        alone: None for a pair. Of one completion with a label, where it stands: ``chosen`` if it is good, ``rejected`` if it
            is bad; the other is empty.
        numbers: values of the columns that ``normalise`` was asked for, such as a weight.
        texts: prompt, chosen and rejected of a transcript as they stand in it, for a tokenizer without a chat template.
        notes: how the record was understood, where it is not in the plain form. Warnings begin with ``warning:``.
        unused: columns with text or other data that were not read.
        ranks: places of chosen and rejected in their ranked list, from 0, equal for ties. None if it has no more
            completions; ``rejected`` is then empty.
        spans: which characters or tokens of the completions count.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    numbers: tuple[float, ...] = ()
    texts: tuple[str, str, str] | None = None
    notes: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    alone: Literal["chosen", "rejected"] | None = None
    ranks: tuple[int, int | None] = (0, 1)
    spans: Spans | None = None

    @property
    def sides(self) -> tuple[tuple[str, Text], ...]:
        """The completions that are there, each with what messages call it."""
        if self.alone is None:
            return ("chosen", self.chosen), ("rejected", self.rejected)
        return (("completion", self.chosen if self.alone == "chosen" else self.rejected),)

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompt, str)

    @property
    def several_turns(self) -> bool:
        """Whether a completion continues beyond the assistant's turn; its user or tool messages are then trained on, too."""
        return self.conversational and any(
            message["role"] != "assistant" for answer in (self.chosen, self.rejected) for message in answer
        )

    @property
    def characters(self) -> int:
        """Characters of all texts, with those of tools."""
        if isinstance(self.prompt, str):
            count = len(self.prompt) + len(self.chosen) + len(self.rejected)
        else:
            count = 0
            for part in (self.prompt, self.chosen, self.rejected):
                for message in part:
                    content = message.get("content")  # type: ignore[union-attr]
                    count += len(content) if type(content) is str and len(message) == 2 else _characters(message)
        return count if self.tools is None else count + _characters(self.tools)


@dataclass(frozen=True)
class PromptAlone(Preference):
    """A prompt without any answer; ``chosen`` and ``rejected`` are empty.

    Attributes:
        columns: columns that hold the prompt.
    """

    columns: tuple[str, ...] = ()

    @property
    def sides(self) -> tuple[tuple[str, Text], ...]:
        return ()


def _characters(value: Any) -> int:
    """Characters of all texts inside ``value``."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, (list, tuple)) else 0


def normalise(
    record: Mapping[str, Any], numbers: Sequence[str] = (), read: Sequence[str] = (), *, lists: bool = False
) -> list[Preference]:
    """The preferences in one record; several if it ranks or scores several completions.

    Plain forms: prompt, chosen, rejected as text; as messages (chosen and rejected may be the text of one assistant message,
    and may repeat the prompt); messages or text whose prompt is implicit, the common start of chosen and rejected; HH-RLHF's
    transcripts; a prompt (or ``context``) with ``completions`` and their ranks (lower is better) or scores (higher is
    better), best pairs first; a prompt with one ``completion`` and its ``label``, true or false. ``tools`` and
    ``chat_template_kwargs`` may be JSON text. ``raydpo.data.foreign`` reads forms of other tools, and ``notes`` of the
    result say how.

    Args:
        numbers: columns with a number for each record, to be returned with its preferences.
        read: further columns that are read elsewhere.
        lists: whether several ranked completions become one list, see ``data.ranked``.

    Raises:
        Malformed: with the reason.
    """
    if len(record) == 3 and not numbers and (plain := _plain(record)) is not None:
        return [plain]
    notes: Notes = {}
    record = _of_columns(record, notes)
    tools = _tools(_given_tools(record), notes) or _functions(record.get("functions"), notes)
    kwargs = _template_kwargs(record)
    present = tuple([key for key, value in record.items() if value is not None])
    check_media(record, present)
    chosen, rejected = record.get("chosen"), record.get("rejected")
    ranks: Ranks = []
    if chosen is None or rejected is None:
        pairs, used = pairs_of(record, present, notes, ranks if lists else None)
    else:
        if "completions" in present:
            notes["chosen and rejected read, not 'completions' beside them"] = None
        chosen, rejected = _decoded(chosen, rejected, notes)
        prompt, used = record.get("prompt"), ()
        if prompt is None and not _whole(chosen, rejected, record):
            prompt, used = prompt_of(record, present, notes, (chosen, rejected))
            if prompt is None and isinstance(chosen, str) and (names := possible_prompts(record, present)):
                raise Malformed(
                    f"missing column 'prompt', but {', '.join(map(repr, names[:5]))} may be it: name it with the source's "
                    "'columns'"
                )
        pairs, used = [(prompt, chosen, rejected)], (*used, "completions", "ranks", "scores")
    found = tuple(_number(record, column) for column in numbers)
    parts = [_parts(*pair, notes) for pair in pairs]
    prompt, *both = parts[0][:3]
    answers = [said for said in both if said]  # the missing one is empty
    _check_texts(prompt, answers, notes)
    unused: tuple[str, ...] = ()
    if len(present) > 3 or "prompt" not in present:
        more = (*numbers, *read, *(("functions",) if _FUNCTIONS in notes else ()))
        system, unused = look_beside(record, present, (*used, *more), (prompt, *answers), notes)
        if system is not None:
            parts = [_with_system(each, system, notes) for each in parts]
    told = tuple(notes)
    preferences = [
        Preference(*part[:3], tools, kwargs, found, part[3], told, unused, _alone(*pair[1:]))
        for part, pair in zip(parts, pairs, strict=True)
    ]
    return _of_a_list(preferences, ranks) if ranks else preferences


def prompt_alone(record: Mapping[str, Any]) -> PromptAlone:
    """The prompt of a record: the column ``prompt``, text or messages; or where records of pairs have it. It is read as that
    of a pair, with ``system``, ``tools`` and ``chat_template_kwargs``.

    Raises:
        Malformed: with the reason.
    """
    notes: Notes = {}
    record = _of_columns(record, notes)
    present = tuple([key for key, value in record.items() if value is not None])
    check_media(record, present)
    prompt, used = prompt_of(record, present, notes)
    if prompt is None and "chosen" in present and "rejected" in present:
        pair = normalise(record)[0]
        empty: Text = [] if pair.conversational else ""
        return PromptAlone(pair.prompt, empty, empty, pair.tools, pair.template_kwargs, notes=pair.notes)
    if prompt is None:
        names = possible_prompts(record, present)
        told = f", but {', '.join(map(repr, names[:5]))} may be it: name it with the source's 'columns'" if names else ""
        raise Malformed(f"missing column 'prompt'{told}")
    if isinstance(prompt, str):
        prompt = _mixed(prompt, notes)
    if not isinstance(prompt, str):
        prompt = _as_prompt(prompt, notes)
    elif prompt and not prompt.strip():
        raise Malformed("prompt is empty")
    _check_texts(prompt, (), notes)
    # Only columns that may belong to the prompt are looked at: reward functions read the others.
    others = tuple(name for name in present if name.lower() not in BESIDE)
    system, _ = look_beside(record, present, (*used, *others), (prompt,), notes)
    if system is not None:
        prompt = _with_system((prompt, "", "", None), system, notes)[0]
    tools = _tools(_given_tools(record), notes) or _functions(record.get("functions"), notes)
    empty = "" if isinstance(prompt, str) else []
    return PromptAlone(prompt, empty, empty, tools, _template_kwargs(record), notes=tuple(notes), columns=used)


def _template_kwargs(record: Mapping[str, Any]) -> dict[str, Any]:
    kwargs = _json(record.get("chat_template_kwargs"), "chat_template_kwargs", dict) or {}
    for key in sorted(_RESERVED & kwargs.keys()):
        raise Malformed(f"chat_template_kwargs must not set {key!r}")
    return kwargs


def _of_a_list(preferences: Sequence[Preference], ranks: Ranks) -> list[Preference]:
    """The rows of a list with their ranks, and without the answer in place of the one that an odd list lacks."""
    if any(each.prompt != preferences[0].prompt for each in preferences):
        raise Malformed("the completions of a list contain different beginnings, so they do not answer one prompt")
    preferences = [replace(each, ranks=both) for each, both in zip(preferences, ranks, strict=True)]
    if ranks[-1][1] is None:
        last = preferences[-1]
        texts = last.texts and (*last.texts[:2], "")
        empty: Text = "" if isinstance(last.rejected, str) else []
        preferences[-1] = replace(last, rejected=empty, texts=texts, alone="chosen")
    return preferences


def _alone(chosen: Any, rejected: Any) -> Literal["chosen", "rejected"] | None:
    """Which of both answers is given, if one is missing."""
    if chosen is not None and rejected is not None:
        return None
    return "rejected" if chosen is None else "chosen"


def _given_tools(record: Mapping[str, Any]) -> Any:
    """The column ``tools``, or where OpenAI's form has them, in ``input``."""
    inside = record.get("input")
    if record.get("tools") is None and isinstance(inside, Mapping) and "preferred_output" in record:
        return inside.get("tools")
    return record.get("tools")


def _of_columns(record: Mapping[str, Any], notes: Notes) -> Mapping[str, Any]:
    """``record`` with each object of lists, as some readers make of a list of messages, as that list."""
    found = {
        name: listed for name in _MAY_BE_COLUMNS if type(record.get(name)) is dict and (listed := of_columns(record[name]))
    }
    if not found:
        return record
    notes["objects with lists of roles and contents read as lists of messages"] = None
    return {**record, **found}


def _plain(record: Mapping[str, Any]) -> Preference | None:
    """The preference in a record that has the plain form at first sight: three texts, or three lists of messages with role
    and content. None if a closer look is needed."""
    prompt, chosen, rejected = record.get("prompt"), record.get("chosen"), record.get("rejected")
    if type(prompt) is str:
        for text in (prompt, chosen, rejected):
            if type(text) is not str:
                return None
            start = text.lstrip()
            if start[:1] in _UNUSUAL_STARTS or start.startswith(_TURNS):
                return None
        if prompt.endswith(PLACEHOLDERS):
            return None
    else:
        for part in (prompt, chosen, rejected):
            if not (is_plain(part) and part[-1]["content"].strip()):
                return None
        if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
            return None
        if prompt[0]["role"] == "assistant" or prompt[-1]["role"] == "assistant":  # answers may repeat such a prompt
            return None
        for message in prompt:
            content = message["content"]
            if content.startswith(PLACEHOLDERS) or content.endswith(PLACEHOLDERS):
                return None
    return None if chosen == rejected else Preference(prompt, chosen, rejected)


def _number(record: Mapping[str, Any], column: str) -> float:
    value = record.get(column)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise Malformed(f"{column!r} is missing or no number")
    return float(value)


def _decoded(chosen: Any, rejected: Any, notes: Notes) -> tuple[Any, Any]:
    """Both answers, as messages if both are, or one is a list of messages and the other JSON text of messages."""
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        if isinstance(chosen, str) or isinstance(rejected, str):
            return tuple(_mixed(said, notes) if isinstance(said, str) else said for said in (chosen, rejected))
        return chosen, rejected
    if chosen[:1] not in _MAY_BE_JSON and rejected[:1] not in _MAY_BE_JSON:
        return chosen, rejected
    better, worse = from_text(chosen), from_text(rejected)
    if better is not None and worse is not None:
        notes[_WRITTEN] = None
        return better, worse
    if better is not None or worse is not None:
        notes[_ONE_IS_JSON] = None
    elif all(name in said for name in ("role", "content") for said in (chosen, rejected)):
        notes[
            "warning: chosen and rejected look like JSON text of messages, but are read as text; write a list of messages"
        ] = None
    return chosen, rejected


def _mixed(said: str, notes: Notes) -> Any:
    """An answer in text beside one that is messages."""
    if said[:1] not in _MAY_BE_JSON or (decoded := from_text(said)) is None:
        return said
    notes[_WRITTEN] = None
    return decoded


def _whole(chosen: Any, rejected: Any, record: Mapping[str, Any]) -> bool:
    """Whether both answers are whole conversations, so that their common beginning is the prompt."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        return are_transcripts(chosen, rejected)
    if not all(
        isinstance(said, list) and said and role_of(said[0]) not in (None, "assistant") for said in (chosen, rejected)
    ):
        return False
    context = record.get("context")  # where it repeats the beginning, it says where the prompt ends
    return not (
        isinstance(context, list) and context and all(said[: len(context)] == context for said in (chosen, rejected))
    )


def _parts(prompt: Any, chosen: Any, rejected: Any, notes: Notes) -> Parts:
    """Prompt, chosen and rejected, validated, all as text or all as messages; and the texts of a transcript. An answer that
    is None becomes empty."""
    if (alone := _alone(chosen, rejected)) is not None:
        prompt, said = _one_answer(prompt, rejected if chosen is None else chosen, notes)
        none: Text = "" if isinstance(prompt, str) else []
        return (prompt, said, none, None) if alone == "chosen" else (prompt, none, said, None)
    texts = None
    chosen, rejected = _decoded(chosen, rejected, notes)
    if isinstance(prompt, str) and prompt[:1] in _MAY_BE_JSON and (said := from_text(prompt)) is not None:
        notes[_WRITTEN] = None
        prompt = said
    if prompt is None:
        prompt, chosen, rejected, texts = implicit(chosen, rejected, notes)
    elif isinstance(prompt, str) and (isinstance(chosen, (list, dict)) or isinstance(rejected, (list, dict))):
        prompt, chosen, rejected = _text_beside_messages(prompt, chosen, rejected, notes)
    elif isinstance(prompt, str) and (shared := shared_turns(chosen, rejected)) and not chosen.startswith(prompt.rstrip()):
        if any(message["content"] == prompt.strip() for message in shared):
            notes["transcripts that contain the prompt read as conversations"] = None
            prompt, chosen, rejected, texts = transcripts(chosen, rejected, notes)
        else:
            notes["warning: chosen and rejected are transcripts with turns in common, which do not contain the prompt"] = (
                None
            )
    if isinstance(prompt, str):
        if prompt and not prompt.strip():
            raise Malformed("prompt is empty")
        for said, name in ((chosen, "chosen"), (rejected, "rejected")):
            if not isinstance(said, str):
                raise Malformed(f"{name} is neither text nor messages")
    else:
        prompt = _as_prompt(prompt, notes)
        if _ONE_IS_JSON in notes:  # the other is the text of an answer, so both are answers in a conversation
            del notes[_ONE_IS_JSON]
            notes[_WRITTEN] = None
            chosen, rejected = (from_text(said) or said for said in (chosen, rejected))
        chosen, rejected = answer(chosen, "chosen", notes), answer(rejected, "rejected", notes)
        if all(said[: len(prompt)] == prompt for said in (chosen, rejected)):
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    for said, name in ((chosen, "chosen"), (rejected, "rejected")):
        if not says_something(said):
            raise Malformed(f"{name} is empty")
        if not isinstance(said, str) and said[0]["role"] != "assistant":
            raise Malformed("chosen and rejected do not begin with the assistant after the prompt")
    if chosen == rejected:
        raise Malformed("chosen equals rejected")
    return prompt, chosen, rejected, texts


def _as_prompt(prompt: Any, notes: Notes) -> list[Message]:
    """The messages of a prompt, validated."""
    prompt = messages(prompt, "prompt", notes)
    if not says_something(prompt):
        raise Malformed("prompt is empty")
    if prompt[-1]["role"] == "user" and not says_something(prompt[-1:]):
        notes["warning: the last message of the prompt is empty, so the answers are to nothing; remove these records"] = None
    if prompt[-1]["role"] == "system":
        notes["warning: prompts end with a system message, so the model answers to no question; add the user's turn"] = None
    if prompt[-1]["role"] == "assistant":
        raise Malformed("the last message of prompt is the assistant's")
    return prompt


def _one_answer(prompt: Any, said: Any, notes: Notes) -> tuple[Text, Text]:
    """Prompt and completion, validated, of a record without another completion: both as text or both as messages.

    Args:
        prompt: None = what stands in the conversation ``said`` before the assistant's last words.
    """
    prompt, said = (_mixed(each, notes) if isinstance(each, str) else each for each in (prompt, said))
    if isinstance(prompt, str) and isinstance(said, str):
        if prompt and not prompt.strip():
            raise Malformed("prompt is empty")
    else:
        said = answer(said, "completion", notes)
        if prompt is None:
            prompt, said = split_conversation(said)
        elif isinstance(prompt, str):
            if not prompt.strip():
                raise Malformed("prompt is empty")
            asked, prompt = prompt, [{"role": "user", "content": prompt}]
            if said[0]["role"] != "assistant":
                prompt, said = split_conversation(said)
                if not any(content_text(message).strip() == asked.strip() for message in prompt):
                    raise Malformed("prompt is text that the messages of the completion do not contain")
        prompt = _as_prompt(prompt, notes)
        if said[: len(prompt)] == prompt:
            said = said[len(prompt) :]
    if not says_something(said):
        raise Malformed("completion is empty")
    if not isinstance(said, str) and said[0]["role"] != "assistant":
        raise Malformed("the completion does not begin with the assistant after the prompt")
    return prompt, said


def _check_texts(prompt: Text, answers: Sequence[Text], notes: Notes) -> None:
    """Note a prompt with a placeholder of an image, and texts that are JSON or Python."""
    for said in [prompt] if isinstance(prompt, str) else map(content_text, prompt):
        said = said.strip()
        for placeholder in PLACEHOLDERS if said.startswith(PLACEHOLDERS) or said.endswith(PLACEHOLDERS) else ():
            if said.startswith(placeholder) or said.endswith(placeholder):
                notes[
                    f"warning: the prompt begins or ends with {placeholder!r}, which stands for an image, audio or a video, "
                    "but only text is read; remove the records that need it, or the placeholder"
                ] = None
    names = ("chosen", "rejected") if len(answers) > 1 else ("completion",) * len(answers)
    kinds = {
        name: kind
        for name, said in zip(("prompt", *names), (prompt, *answers), strict=True)
        if (kind := as_written(said)) is not None
    }
    for name, kind in kinds.items():
        if kind not in MAY_BE_MEANT:
            notes[
                f"warning: {name} is {kind}, as JSON or Python writes it, and is read with its signs; write the text itself"
            ] = None
    if names and all(name in kinds for name in names) and kinds[names[0]] in MAY_BE_MEANT:
        notes[LITERALS] = None


def _text_beside_messages(prompt: str, chosen: Any, rejected: Any, notes: Notes) -> tuple[Text, Text, Text]:
    """A text prompt beside message lists is the user's message, or repeats one that the lists contain."""
    chosen, rejected = answer(chosen, "chosen", notes), answer(rejected, "rejected", notes)
    if not prompt.strip():
        raise Malformed("prompt is empty")
    if chosen[0]["role"] == "assistant" and rejected[0]["role"] == "assistant":
        return [{"role": "user", "content": prompt}], chosen, rejected
    shared, chosen, rejected, _ = implicit(chosen, rejected, notes)
    if not any(content_text(message).strip() == prompt.strip() for message in shared):
        raise Malformed("prompt is text that the messages of chosen and rejected do not share")
    return shared, chosen, rejected


def _with_system(parts: Parts, system: str, notes: Notes) -> Parts:
    """``parts`` with the text of the column ``system`` as the first message."""
    prompt, chosen, rejected, _ = parts
    if isinstance(prompt, str):
        if system.strip() not in prompt:
            notes[
                "warning: the column 'system' is not read, since the prompt is text: write it into the prompt, or write the "
                "prompt as messages"
            ] = None
        return parts
    if prompt[0]["role"] in ("system", "developer"):
        if content_text(prompt[0]).strip() != system.strip():
            notes["warning: the column 'system' is not read, since the conversation has another system message"] = None
        return parts
    notes["the column 'system' put before the prompt as a system message"] = None
    return [{"role": "system", "content": system}, *prompt], chosen, rejected, None


def _tools(value: Any, notes: Notes) -> list[Any] | None:
    """The tools of a record. Each may be JSON text, and so may be the whole list."""
    tools = _json(value, "tools", list)
    if tools and any(isinstance(tool, str) for tool in tools):
        notes["tools that are JSON text read as objects"] = None
        tools = [_json(tool, "a tool", dict) if isinstance(tool, str) else tool for tool in tools]
    return tools


def _functions(value: Any, notes: Notes) -> list[Any] | None:
    """The column ``functions``, OpenAI's older form of tools; None if it holds something else."""
    try:
        functions = _json(value, "functions", list)
    except Malformed:
        return None
    if not functions or not all(isinstance(each, Mapping) and isinstance(each.get("name"), str) for each in functions):
        return None
    notes[_FUNCTIONS] = None
    return [{"type": "function", "function": each} for each in functions]


def _json(value: Any, name: str, kind: type) -> Any:
    """A value that data sets store either directly or as JSON text; None if empty."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            raise Malformed(f"{name} is not valid JSON") from None
    if value is not None and not isinstance(value, kind):
        raise Malformed(f"{name} is not a JSON {'list' if kind is list else 'object'}")
    return value or None


def as_text(prompt: Text) -> str:
    """Return a prompt as text; a conversation as ``role: content`` paragraphs."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {content_text(message)}" for message in prompt)
