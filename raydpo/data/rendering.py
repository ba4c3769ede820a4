"""Checks that the rendering of a conversation holds every text of its messages, and begins and ends as it should."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from raydpo.data import remarks
from raydpo.data.messages import Malformed, Message
from raydpo.data.preference import Preference
from raydpo.data.remarks import Remark
from raydpo.data.segments import any_of
from raydpo.data.texts import (
    CLOSERS,
    MARKS,
    TAG,
    TAGS,
    Text,
    fields_of,
    found_in,
    leaves,
    left_out,
    pieces_of,
    reflowed,
    texts_of,
    tool_texts,
    written_twice,
)

__all__ = ["RenderingCheck", "remedy"]

_CLOSER_SIGNS = ("</", "[/", "◁/", "<|", "<channel")
"""Texts of which each closing tag contains one."""
_EMPTY_THOUGHT = re.compile(
    "|".join(rf"{re.escape(opener)}\s*{re.escape(closer)}" for opener, closer in TAGS)
    + rf"|\A\s*(?:{'|'.join(map(re.escape, CLOSERS))})"  # opened at the end of the prompt
)
_MARK = re.compile(r"<([|\uff5c]).+\1>")
"""Tokens that can be nothing but marks, special or not."""
_MOST_SIGNS = 4
_TAIL = 40
_REMEDIES = {
    remarks.THOUGHTS: "set data.chat_template to one that keeps thoughts, or move them to where it reads them (the field "
    "reasoning_content, or <think> in content)",
    remarks.CALLS: "set data.chat_template to one that writes tool calls",
    remarks.TOOLS: "set data.chat_template to one that writes tools",
    remarks.NAMES: "set data.chat_template to one that writes tools and tool calls",
    remarks.TOOLS_INSIDE: "move them to a column 'tools' of the record",
}


_LOST_IN_PROMPT = {
    remarks.THOUGHTS: remarks.THOUGHT_BEFORE,
    remarks.TOOLS_INSIDE: remarks.TOOLS_INSIDE_BEFORE,
    **dict.fromkeys((remarks.TOOLS, remarks.CALLS, remarks.NAMES), remarks.TOOLS_BEFORE),
}
"""What does not count for ``data.max_lost`` in a prompt: many templates have no place for it, at inference neither."""


def remedy(what: str) -> str:
    """What to do so that ``what`` is not lost."""
    return _REMEDIES.get(what, f"set data.chat_template to one that writes {what}")


class RenderingCheck:
    """Compares renderings with the messages that they were made from.

    The usual case is cheap: all texts stand in the rendering one after the other. Only where they do not, each is looked
    for by itself, without regard to white space and to the escapes of JSON.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = [str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()]
        special = [str(token) for token in tokenizer.all_special_tokens] + [
            str(token)
            for token in getattr(tokenizer, "added_tokens_decoder", {}).values()
            if getattr(token, "special", False)
        ]
        self._eos = tokenizer.eos_token
        ends = [token for token in dict.fromkeys((*added, *special)) if token.strip()]
        self._end = re.compile(any_of(ends) or "(?!)")
        written = _written(tokenizer)
        special += [token for token in added if token in written or _MARK.fullmatch(token)]  # read as special tokens are
        spelled = sorted({token for token in special if token.strip() and not TAG.fullmatch(token)}, key=len, reverse=True)
        self._special = re.compile(any_of(spelled) or "(?!)")
        self._signs = _common_signs(spelled)
        self._signs_of_all = tuple(dict.fromkeys((*self._signs, *_CLOSER_SIGNS)))
        self._sound_tails: set[str] = set()

    def spelled(self, text: str) -> str | None:
        """The first special token that ``text`` spells, or None."""
        for sign in self._signs:
            if sign in text:
                found = self._special.search(text)
                return found[0] if found else None
        return None

    def remarks_of_text(self, side: str, prompt: str, answer: str) -> list[Remark]:
        """What is odd about the thoughts of an answer in plain text."""
        found: list[Remark] = []
        for sign in _CLOSER_SIGNS:
            if sign in answer:
                self._check_thoughts(side, [answer], prompt + answer, len(prompt), found)
                break
        return found

    def remarks(self, preference: Preference, prompt: str, *answers: str) -> list[Remark]:
        """What the renderings of a conversation lack, and what they have that the data do not.

        Args:
            prompt, answers: the renderings of the prompt alone, and of the prompt with each answer.

        Raises:
            Malformed: if nothing of an answer is left.
        """
        found: list[Remark] = []
        if preference.tools is not None or self._end_if_usual(preference.prompt, prompt, 0, answer=False)[0] < 0:
            self._check_prompt(preference, prompt, found)
        if preference.template_kwargs:
            values = leaves(preference.template_kwargs, [])
            self._check_spelling_of_others("chat_template_kwargs", prompt, values, found)
        for (side, messages), whole in zip(preference.sides, answers, strict=True):
            if whole.startswith(prompt):
                start = len(prompt)
            else:
                start = _start_of_answer(prompt, whole, messages)
                moved = self._moved(preference.prompt, prompt, whole, start, side)
                if not any(one.kind == remarks.PROMPT_IN_ANSWER for one in moved):
                    moved.append(Remark(remarks.PROMPT_END, "", prompt[start:]))
                found += moved
            end, adds_thought = self._end_if_usual(messages, whole, start, answer=True)
            if end < 0 or whole[end:] not in self._sound_tails:
                self._check_answer(side, messages, whole, start, found)
            elif adds_thought:
                found.append(Remark(remarks.EMPTY_THOUGHT, side))
        return found

    def _end_if_usual(self, messages: list[Message], rendered: str, start: int, answer: bool) -> tuple[int, bool]:
        """Where the last text ends if all stand in ``rendered`` one after the other from ``start``, else -1; and whether an
        empty thought stands before the first text of an ``answer``.

        Also -1 if a closer look is needed: for fields other than role and text, for what may be special tokens or thoughts,
        and for an empty thought before a later message of an ``answer``.
        """
        adds_thought = False
        for number, message in enumerate(messages):
            content = message.get("content")
            if type(content) is not str or len(message) != 2:
                return -1, False
            for sign in self._signs_of_all:
                if sign in content:
                    return -1, False
            content = content.strip()
            place = rendered.find(content, start)
            if place < 0:
                return -1, False
            if answer and place > start and _adds_thought(rendered[start:place]):
                if number:
                    return -1, False
                adds_thought = True
            start = place + len(content)
        return start, adds_thought

    def _moved(self, messages: list[Message], prompt: str, whole: str, start: int, side: str) -> list[Remark]:
        """A remark for each text of the prompt that ``prompt`` holds, and that ``whole``, the rendering with an answer,
        leaves out or holds behind ``start``, where the answer begins."""
        more: list[str] = []
        wanted = [text for turn, message in enumerate(messages) for text in texts_of(message, turn, more)]
        absent = set(left_out(prompt, wanted, more))
        behind = [one for one in left_out(whole[:start], wanted, more) if one not in absent]
        if not behind:
            return []
        lost = set(left_out(whole, wanted, more)) - absent
        return [
            Remark(
                _LOST_IN_PROMPT.get(one.what, remarks.LOST) if one in lost else remarks.PROMPT_IN_ANSWER,
                f"{one.what} (prompt, before {side})",
                one.text,
                remedy(one.what) if one in lost else "",
            )
            for one in behind
        ]

    def _check_prompt(self, preference: Preference, prompt: str, found: list[Remark]) -> None:
        wanted, more = tool_texts(preference.tools) if preference.tools else ([], [])
        fields: list[Text] = []
        for turn, message in enumerate(preference.prompt):
            wanted += texts_of(message, turn, more)
            fields += fields_of(message)
            found += [Remark(remarks.UNTRAINED_BEFORE, key) for key in message.keys() & MARKS]
        self._check_spelling("prompt", [one.text for one in wanted], found)
        self._check_spelling_of_others("prompt", prompt, [*more, *(one.text for one in fields)], found)
        _check_fields(prompt, fields, wanted, more, found)
        found += reflowed("prompt", prompt, wanted)
        for one in left_out(prompt, wanted, more):
            kind = _LOST_IN_PROMPT.get(one.what, remarks.LOST)
            found.append(Remark(kind, f"{one.what} (prompt)" if one.turn >= 0 else one.what, one.text, remedy(one.what)))

    def _check_answer(self, side: str, messages: list[Message], whole: str, start: int, found: list[Remark]) -> None:
        wanted: list[Text] = []
        more: list[str] = []
        fields: list[Text] = []
        region = whole[start:]
        for turn, message in enumerate(messages):
            wanted += texts_of(message, turn, more)
            fields += fields_of(message)
            found += [Remark(remarks.THOUGHT_TWICE, side, thought) for thought in written_twice(message, region)]
            found += [
                Remark(remarks.UNTRAINED, f"{key} ({side})", str(message[key]))
                for key in message.keys() & MARKS
                if message[key] not in (1, "1", "true", "True")
            ]
        texts = [one.text for one in wanted]
        self._check_spelling(side, texts, found)
        self._check_spelling_of_others(side, region, [*more, *(one.text for one in fields)], found)
        _check_fields(region, fields, wanted, more, found)
        lost = left_out(region, wanted, more)
        found += reflowed(side, region, wanted)
        if lost and len(lost) >= sum(len(pieces_of(one)) for one in wanted):
            what = ", ".join(dict.fromkeys(one.what for one in lost))
            raise Malformed(f"the chat template leaves out or changes all of {side} ({what}); {remedy(lost[0].what)}")
        last = max((turn for turn, message in enumerate(messages) if message["role"] == "assistant"), default=0)
        for one in lost:
            earlier = one.what == remarks.THOUGHTS and one.turn < last
            kind = remarks.THOUGHT_BETWEEN if earlier else remarks.LOST
            found.append(Remark(kind, f"{one.what} ({side})", one.text, remedy(one.what)))
        if _EMPTY_THOUGHT.search(region) and not any(_EMPTY_THOUGHT.search(text) for text in texts):
            found.append(Remark(remarks.EMPTY_THOUGHT, side))
        self._check_thoughts(side, texts, whole, start, found)
        place = self._last_place(whole, texts[-1], start) if texts else -1
        if place >= 0:
            tail = whole[place + len(texts[-1]) :]
            if type(messages[-1].get("content")) is str and len(messages[-1]) == 2:  # so that it is the last text
                self._check_after_end(tail, found)
            self._check_end(tail, texts[-1], found)
        else:  # the last text is written otherwise: its end may be among the last characters
            self._check_end(whole[max(start, len(whole) - _TAIL) :], None, found)

    def _last_place(self, whole: str, text: str, start: int) -> int:
        """Where ``text`` stands last in ``whole``, apart from the tokens that end a turn; -1 if nowhere."""
        only_ends = not self._end.sub("", text).strip()  # one of which is the turn's own end
        ends = [end.span() for end in self._end.finditer(whole, start)]
        last = place = whole.rfind(text, start)
        while place >= 0:
            after = place + len(text)
            if only_ends:
                apart = self._end.search(whole, after) is not None
            else:
                apart = not any(begin <= place and after <= end for begin, end in ends)
            if apart:
                return place
            place = whole.rfind(text, start, after - 1)
        return last if only_ends else -1

    def _check_spelling(self, part: str, texts: Iterable[str], found: list[Remark]) -> None:
        for text in texts:
            if (token := self.spelled(text)) is not None:
                found.append(Remark(remarks.SPELLED, part, token))
                return

    def _check_spelling_of_others(self, part: str, rendered: str, texts: Iterable[str], found: list[Remark]) -> None:
        """Note special tokens in texts that templates need not write, such as descriptions of tools, if they are there."""
        spelled = [text for text in texts if self.spelled(text) is not None]
        if spelled:
            rest = "".join(rendered.split())
            self._check_spelling(part, [text for text in spelled if found_in(rest, text) is not None], found)

    def _check_thoughts(self, side: str, texts: list[str], whole: str, start: int, found: list[Remark]) -> None:
        """Note an answer that ends a thought which neither it nor the prompt begins."""
        for opener, closer in TAGS:
            for text in texts:
                if closer in text and opener not in text.partition(closer)[0]:
                    place = whole.find(closer, start)
                    if place >= 0 and opener not in whole[start:place] and not whole[:start].rstrip().endswith(opener):
                        found.append(Remark(remarks.NO_THOUGHT_BEGINS, side, closer))
                    return

    def _check_end(self, tail: str, last: str | None, found: list[Remark]) -> None:
        """Note a rendering that ends without a special token, or with two EOS.

        Args:
            tail: what follows the text ``last``; None if the tail may begin within the last text.
        """
        if self._end.search(tail) is None:
            found.append(Remark(remarks.NO_END, "", tail))
        elif self._eos and self._ends_twice(tail, last):
            found.append(Remark(remarks.EOS_TWICE, "", tail))
        elif last is not None and len(self._sound_tails) < 1000 and remarks.AFTER_END not in {one.kind for one in found}:
            self._sound_tails.add(tail)

    def _check_after_end(self, tail: str, found: list[Remark]) -> None:
        """Note words behind the token that ends an answer, such as the beginning of a next turn."""
        end = self._end.search(tail)
        if end is not None and self._end.sub("", tail[end.end() :]).strip():
            found.append(Remark(remarks.AFTER_END, "", tail[end.end() :].strip()))

    def _ends_twice(self, tail: str, last: str | None) -> bool:
        if last is not None:
            spelled = last.rstrip().endswith(self._eos) and tail.lstrip().startswith(self._eos)
            return spelled or tail.count(self._eos) > 1
        before = tail.rstrip().removesuffix(self._eos)
        return tail.rstrip() != before and before.rstrip().endswith(self._eos)


def _check_fields(rendered: str, fields: list[Text], wanted: list[Text], more: list[str], found: list[Remark]) -> None:
    """Note the fields that ``rendered`` does not hold beside the texts that it must hold. Many templates have no place for
    them."""
    called = {one.text for one in wanted if one.what == remarks.CALLS}
    fields = [one for one in fields if one.what != "name" or one.text not in called]  # of a result, which its call says
    if fields:
        others = [*more, *(one.text for one in wanted)]
        found += [Remark(remarks.FIELD, one.what, one.text) for one in left_out(rendered, fields, others)]


@lru_cache(1000)
def _adds_thought(text: str) -> bool:
    return _EMPTY_THOUGHT.search(text) is not None


def _start_of_answer(prompt: str, whole: str, messages: list[Message]) -> int:
    """Where the answer begins in ``whole``, which begins otherwise than ``prompt`` does.

    What both share may hold the first characters of the answer: ``<think>`` and ``<b>`` begin alike.
    """
    common = _common(prompt, whole)
    for message in messages[:1]:
        for text in (one.text for one in texts_of(message, 0, [])):
            tag = TAG.match(text)
            first = common - (tag.end() - 1 if tag else len(text))  # a tag that both have in full is shared
            place = whole.find(text, max(0, first), common + len(text))
            if 0 <= place < common:
                return place
    return common


def _common(left: str, right: str) -> int:
    """Number of characters that two texts share at their start."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _written(tokenizer: Any) -> str:
    """What a chat template may write itself: its text, and how it writes a few words."""
    messages = [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]
    rendered = ""
    for start in (0, 1):
        try:
            rendered += tokenizer.apply_chat_template(messages[start:], tokenize=False)
        except Exception:  # templates raise what their authors wrote
            continue
    return f"{tokenizer.chat_template or ''}{rendered}"


def _common_signs(tokens: Sequence[str]) -> list[str]:
    """A few texts of which each token contains at least one, for a fast first look."""
    signs = list(dict.fromkeys(token[:2] for token in tokens))
    if len(signs) <= _MOST_SIGNS:
        return signs
    signs = []
    left = list(tokens)
    while left:
        characters = [char for token in left for char in set(token) if not char.isalnum()] or [left[0][0]]
        signs.append(max(sorted(set(characters)), key=characters.count))
        left = [token for token in left if signs[-1] not in token]
    return signs
