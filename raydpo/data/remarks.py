"""What is odd about pairs that are kept: counted by kind for each source, and said in one line each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = ["Remark", "Remarks"]

THOUGHTS, CALLS, TOOLS, NAMES = "thoughts", "tool calls", "tools", "names of tools or tool calls"
"""Texts of messages that templates often leave out."""

LOST = "left out"
THOUGHT_BEFORE, THOUGHT_BETWEEN = "thoughts of the prompt left out", "thoughts of earlier turns left out"
TOOLS_BEFORE = "tools of the prompt left out"
TOOLS_INSIDE, TOOLS_INSIDE_BEFORE = "tools inside a message", "tools inside messages of the prompt left out"
EMPTY_THOUGHT, NO_THOUGHT_BEGINS, THOUGHT_TWICE = (
    "empty thoughts added",
    "thoughts without a beginning",
    "thoughts written twice",
)
PROMPT_END, PROMPT_IN_ANSWER = "end of the prompt left out", "texts of the prompt in the completion"
NO_END, AFTER_END, EOS_TWICE = "no end of turn", "text after the end", "EOS twice"
REFLOWED, GLUED = "white space changed", "no white space between"
BOS_REMOVED, BOS_TWICE, BOS_MISSING = "second BOS taken off", "BOS twice", "no BOS"
SPELLED, SPELLED_BEFORE, TEXT_FOR_CHAT = "special tokens spelled", "special tokens in a text prompt", "text for a chat model"
CHANGED, UNREAD, FIELD = "given in another form", "arguments of the template not read", "fields of messages left out"
UNTRAINED, UNTRAINED_BEFORE = "messages marked as not to be trained", "marks of training in the prompt"
NO_TURNS, NO_REASONING = "turns not found", "reasoning not found"

_MOST, _SHORT, _PLACES = 5, 60, 3

_SENTENCES = {
    TOOLS_BEFORE: (
        "warning: the chat template leaves out tools or tool calls of {count} prompts, and the model answers without "
        "having read them: {all}; set data.chat_template to one that writes tools and tool calls"
    ),
    TOOLS_INSIDE_BEFORE: (
        "warning: the chat template leaves out tools in a field of messages of {count} prompts: {all}; move them to a "
        "column 'tools' of the record"
    ),
    THOUGHT_BEFORE: "the chat template leaves out thoughts of earlier turns in {count} prompts, as at inference: {all}",
    THOUGHT_BETWEEN: (
        "warning: the chat template leaves out thoughts of earlier turns in {count} completions, and they are not "
        "learned: {all}; make each turn a pair of its own, or use a template that keeps thoughts"
    ),
    EMPTY_THOUGHT: (
        "warning: the chat template adds an empty thought to answers without one: {all}; give the answers thoughts, or "
        "set chat_template_kwargs with which the prompt ends with the empty thought (such as enable_thinking: false)"
    ),
    NO_THOUGHT_BEGINS: (
        "warning: answers end a thought that nothing begins: {all}; put the tag that begins it before them, or use a chat"
        " template whose prompt ends with that tag"
    ),
    PROMPT_END: (
        "warning: the end of the prompt is left out of {count} {unit}, where the chat template writes the prompt alone "
        "otherwise than before its completion: {all}; begin the answers with that text, or use a template or "
        "chat_template_kwargs with which the prompt does not end so"
    ),
    PROMPT_IN_ANSWER: (
        "warning: in {count} pairs the chat template writes the prompt otherwise before a completion, so that texts of the "
        "prompt stand in the completion: {all}; set data.train_on=assistant, with which they do not count, or make each "
        "turn a pair of its own"
    ),
    THOUGHT_TWICE: (
        "warning: in {count} pairs a thought stands in a field and in the content of a message, and the chat template "
        "writes both: {all}; keep one of them"
    ),
    NO_END: (
        "warning: in {count} {unit} no special token follows the last text of an answer: {all}; so the model does not learn "
        "to stop. Use a chat template that ends a turn with a special token of the tokenizer"
    ),
    AFTER_END: (
        "warning: in {count} {unit} the chat template writes more after the end of an answer, and the model learns to write "
        "it: {all}; use a template that begins the next turn only where add_generation_prompt is set"
    ),
    REFLOWED: (
        "warning: the chat template changes white space inside texts of {count} {unit}, such as line breaks: {all}; use a "
        "template that writes them as they are"
    ),
    GLUED: (
        "warning: in {count} {unit} of plain text prompt and answer meet without white space: {all}; end the prompts with a "
        "line break, or begin the answers with a space"
    ),
    EOS_TWICE: (
        "warning: the answers of {count} {unit} end with EOS twice: {all}; take it off the end of the answers, or out of "
        "the chat template"
    ),
    BOS_REMOVED: (
        "warning: {count} prompts of plain text begin with BOS, which the tokenizer adds, too: {all}; the second is taken"
        " off"
    ),
    BOS_TWICE: "warning: {count} prompts begin with BOS twice: {all}; take it off the data or out of the chat template",
    BOS_MISSING: (
        "warning: {count} prompts begin without BOS, though the tokenizer puts it before plain text: {all}; if the model "
        "was trained with it, use a chat template that begins with bos_token"
    ),
    SPELLED: (
        "warning: texts spell special tokens, which the model reads as such and not as text: {all}; write them otherwise,"
        " or set data.special_tokens=refuse"
    ),
    SPELLED_BEFORE: "{count} prompts of plain text spell special tokens, which are read as such: {all}",
    TEXT_FOR_CHAT: (
        "warning: {count} prompts are plain text without special tokens of turns, {all}, but the tokenizer has a chat "
        "template: the model reads these prompts without it. Use messages (role, content) for a chat model"
    ),
    CHANGED: "given to the chat template in the form that it reads: {all}",
    UNREAD: (
        "warning: the chat template does not read these chat_template_kwargs: {all}; correct their names, or use a "
        "template that reads them"
    ),
    FIELD: (
        "the chat template leaves out fields of messages: {all}; if the model should read one, write it into content, or "
        "use a template that reads it"
    ),
    UNTRAINED: (
        "warning: in {count} {unit} messages of the answers are marked as not to be trained or weighted: {all}; but every "
        "message of an answer counts alike. Set data.train_on=assistant, with which these marks count, or drop the field"
    ),
    UNTRAINED_BEFORE: (
        "{count} prompts mark messages for training: {all}; nothing of a prompt is trained. Make each turn that should be "
        "a pair of its own"
    ),
    NO_TURNS: (
        "warning: in {count} {unit} it cannot be told for certain where the assistant's turns begin and end: {all}; these "
        "are dropped where data.train_on or a span needs it. Use a template that marks turns with {{% generation %}}, or "
        "data.train_on=completion"
    ),
    NO_REASONING: (
        "warning: in {count} {unit} it cannot be told for certain where the reasoning begins and ends: {all}; these are "
        "dropped where data.train_on is answer or reasoning. Put each thought between one pair of tags, or use "
        "data.train_on=assistant"
    ),
}
"""What is said of each kind but ``LOST``. ``unit`` is pairs, or rows if some are completions alone; ``all`` is each case
with its count, first places and an example."""


class Remark(NamedTuple):
    """Something odd about one pair.

    Attributes:
        kind: one of the constants of this module.
        what: the part or field concerned.
        example: text of the data or of the rendering.
        remedy: what to do, for ``LOST``.
    """

    kind: str
    what: str = ""
    example: str = ""
    remedy: str = ""


@dataclass
class Remarks:
    """Pairs of one source by what is odd about them.

    Attributes:
        counts: number of pairs, by kind and what is concerned.
        places: first places of each.
        examples: first example of each, shortened.
        pairs: number of pairs, by kind.
        remedies: what to do about texts that are left out.
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    places: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    examples: dict[tuple[str, str], str] = field(default_factory=dict)
    pairs: Counter[str] = field(default_factory=Counter)
    remedies: dict[str, None] = field(default_factory=dict)

    def add(self, found: Sequence[Remark], where: str) -> None:
        """Count what was found on one pair of the record at ``where``."""
        if not found:
            return
        done: set[tuple[str, str]] = set()
        for remark in found:
            key = remark.kind, remark.what
            if key in done:
                continue
            done.add(key)
            self.counts[key] += 1
            if (first := self.places.get(key)) is None:
                first = self.places[key] = []
                self.examples[key] = shortened(remark.example) if remark.example else ""
                self.remedies |= {remark.remedy: None} if remark.remedy else {}
            if len(first) < _PLACES and where not in first:
                first.append(where)
        for kind in {kind for kind, _ in done}:
            self.pairs[kind] += 1

    def merge(self, other: Remarks) -> None:
        """Add what was found on later pairs."""
        for key, count in other.counts.items():
            self.counts[key] += count
            first = self.places.setdefault(key, [])
            first += [where for where in other.places[key] if where not in first][: _PLACES - len(first)]
            self.examples.setdefault(key, other.examples[key])
        self.pairs.update(other.pairs)
        self.remedies |= other.remedies

    def to_state(self) -> dict[str, Any]:
        """All of it for JSON, with its order."""
        cases = [[*key, count, self.places[key], self.examples[key]] for key, count in self.counts.items()]
        return {"cases": cases, "pairs": sorted(self.pairs.items()), "remedies": list(self.remedies)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Remarks:
        found = cls(pairs=Counter(dict(state["pairs"])), remedies=dict.fromkeys(state["remedies"]))
        for kind, what, count, places, example in state["cases"]:
            key = kind, what
            found.counts[key], found.places[key], found.examples[key] = count, list(places), example
        return found

    @property
    def lost(self) -> int:
        """Pairs of which the chat template leaves out a text that counts for ``data.max_lost``."""
        return self.pairs[LOST]

    def lines(self, name: str, pairs: int, unit: str = "pairs") -> list[str]:
        """One line for each kind; those that need attention begin with ``warning:``."""
        lines = []
        for kind in dict.fromkeys(kind for kind, _ in self.counts):
            if kind == LOST:
                text = f"warning: {self.loss(pairs, unit)}; {self.remedy()}"
            else:
                text = _SENTENCES[kind].format(count=f"{self.pairs[kind]:,}", unit=unit, all=self.cases(kind))
            warning, line = ("warning: ", text.removeprefix("warning: ")) if text.startswith("warning: ") else ("", text)
            lines.append(f"{warning}data {name}: {line}")
        return lines

    def loss(self, pairs: int, unit: str = "pairs") -> str:
        """What the chat template leaves out, in words."""
        return f"the chat template leaves out or changes texts of {self.lost:,} of {pairs:,} {unit}: {self.cases(LOST)}"

    def remedy(self) -> str:
        """What to do about it, in words."""
        return "; ".join(list(self.remedies)[:3])

    def cases(self, kind: str) -> str:
        """``3 tool calls (chosen), such as 'Oslo' (a.jsonl:1, ...); ...``, most frequent first."""
        cases = [(what, count) for (other, what), count in self.counts.most_common() if other == kind]
        shown = []
        for what, count in cases[:_MOST]:
            key = (kind, what)
            example = f"such as {self.examples[key]}" if self.examples[key] else ""
            places = ", ".join(self.places[key]) + (", ..." if count > len(self.places[key]) else "")
            words = [
                f"{count:,} {what}," if what and example else f"{count:,} {what}" if what else "",
                example,
                f"({places})",
            ]
            shown.append(" ".join(filter(None, words)))
        if len(cases) > _MOST:
            shown.append(f"and {len(cases) - _MOST:,} more")
        return "; ".join(shown)

    def to_dict(self) -> dict[str, Any]:
        """Counts, first places and examples by kind, for JSON."""
        found: dict[str, Any] = {}
        for (kind, what), count in self.counts.most_common():
            entry = {"count": count, "first": self.places[kind, what]}
            if self.examples[kind, what]:
                entry["example"] = self.examples[kind, what]
            found.setdefault(kind, {})[what or "pairs"] = entry
        return found


def shortened(text: str) -> str:
    """``text`` in quotation marks on one line, cut to a few words."""
    return repr(text if len(text) <= _SHORT else text[: _SHORT - 3] + "...")
