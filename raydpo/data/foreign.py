"""Records without chosen and rejected: where the prompt is, which of several answers is preferred to which, and whether a
single one is good."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from raydpo.data.beside import PROMPTS, asking, may_be_prompt
from raydpo.data.choices import named_pair, preferred
from raydpo.data.labels import labelled
from raydpo.data.messages import CONVERSATIONS, Malformed, Notes, content_text, from_text, messages, role_of
from raydpo.data.nearest import lacking, quoted

__all__ = ["Pairs", "Ranks", "pairs_of", "prompt_of", "shared_start"]

Pairs = list[tuple[Any, Any, Any]]
"""Prompt (None = the common beginning of both answers), the better and the worse answer. Of a single answer with a label the
other is None, and a prompt of None stands within the answer's conversation."""
Ranks = list[tuple[int, int | None]]
"""Rank of both answers of each pair within a list, from 0, equal for ties."""
_ANSWERS = ("completion", "response", "content", "answer", "text", "output")
"""Fields of an entry of ``completions`` that hold the answer."""
_PLACES = (
    ("ranks", ("rank",), 1),
    ("scores", ("score", "overall_score", "rating", "pm_score", "reward"), -1),
)
"""Columns of all ranks or scores, fields of an entry with its own, and the sign that makes lower better."""
_RANKED = ("completions", "answers", "responses", "candidates")


def pairs_of(
    record: Mapping[str, Any], present: tuple[str, ...], notes: Notes, ranks: Ranks | None = None
) -> tuple[Pairs, tuple[str, ...]]:
    """Return the pairs of a record without ``chosen`` and ``rejected``, and the columns used.

    Args:
        ranks: if given, ranked completions become one list: the first and the second, the third and the fourth, and so on.
            Their ranks are added to it. The last of an odd number stands before the first, whose rank is then None.

    Raises:
        Malformed: if no form fits. The message names the columns found and the two nearest forms.
    """
    if "chosen" not in present and "rejected" not in present:
        if names := named_pair(present):
            notes[f"{names[0]!r} read as chosen, {names[1]!r} as rejected"] = None
            pair, used = _two_answers(record, present, names, notes)
            return [pair], (*used, *names)
        if found := _rejected_response(record, notes) or _preferred_output(record, present, notes):
            return found
        for name in _RANKED:
            if name in present and (name == "completions" or _has_places(_entries(record[name]), record)):
                found, used = _ranked(record, present, name, notes, ranks)
                return found, (*used, name, "ranks", "scores")
        if found := preferred(record, present, notes):
            pair, used = _two_answers(record, present, found[0], notes)
            return [pair], (*used, *found[1])
        if single := labelled(record, present, notes):
            return _single(record, present, *single, notes)
    if (
        len(present) == 1
        and present[0] not in CONVERSATIONS
        and isinstance(record[present[0]], list)
        and all(isinstance(each, Mapping) for each in record[present[0]])
    ):
        raise Malformed(
            f"the only column {present[0][:40]!r} holds a list of records: write the list alone, or one record a line"
        )
    raise Malformed(lacking(present))


def prompt_of(
    record: Mapping[str, Any], present: tuple[str, ...], notes: Notes, answers: tuple[Any, Any] | None = None
) -> tuple[Any, tuple[str, ...]]:
    """Return the prompt of a record, and the columns used. None if it is the beginning that both answers share.

    Raises:
        Malformed: if several columns may be the prompt.
    """
    if record.get("prompt") is not None:
        return record["prompt"], ("prompt",)
    conversation = next((name for name in CONVERSATIONS if name in present and record[name]), None)
    if conversation is not None:
        value = record[conversation]
        prompt = messages(from_text(value) or value if isinstance(value, str) else value, conversation, notes)
        if answers is not None and len(prompt) > 1 and prompt[-1]["role"] == "assistant" and _says(prompt[-1], answers[0]):
            prompt = prompt[:-1]
            notes[f"{conversation!r} without its last message, which is chosen, read as the prompt"] = None
        else:
            notes[f"{conversation!r} read as the prompt"] = None
        return prompt, (conversation,)
    question = record.get("question")
    if isinstance(question, Mapping) and isinstance(question.get("full_text"), str):  # WebGPT's comparisons
        notes["'full_text' of 'question' read as the prompt"] = None
        return question["full_text"], ("question",)
    names = tuple(name for name in PROMPTS if name in present and may_be_prompt(record[name]))
    shared = ""
    if answers is not None and names and all(isinstance(answer, str) for answer in answers):
        shared = shared_start(*answers)
        names = tuple(name for name in names if not (isinstance(record[name], str) and record[name].strip() in shared))
        if not names:  # the answers are whole texts that hold it
            return None, ()
    if len(names) == 1:
        notes[f"{names[0]!r} read as the prompt"] = None
        one_word = isinstance(record[names[0]], str) and len(record[names[0]].split(maxsplit=1)) < 2
        if (names == ("context",) or one_word) and _may_be_question(shared):
            notes[
                f"warning: {names[0]!r} read as the prompt, though chosen and rejected begin with a text of their own; drop "
                "the column if that is the prompt"
            ] = None
        others = asking(record, present, one_word)
        if others:
            notes[
                f"warning: {names[0]!r} read as the prompt, though {quoted(others)} may be it: name the prompt with the "
                "source's 'columns'"
            ] = None
        return record[names[0]], names
    if names == ("instruction", "input") and all(isinstance(record[name], str) for name in names):
        notes["'instruction' and 'input', joined by a newline, read as the prompt"] = None
        return f"{record['instruction']}\n{record['input']}", names
    if names:
        raise Malformed(
            f"each of {quoted(names)} may be the prompt or a part of it: join them in a column 'prompt', or name the "
            "prompt with the source's 'columns'"
        )
    return None, ()


def shared_start(one: str, other: str) -> str:
    """Return the longest common beginning of two texts."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if other.startswith(one[:middle]):
            low = middle
        else:
            high = middle - 1
    return one[:low]


def _may_be_question(shared: str) -> bool:
    """Whether the common beginning of two answers may be a question: several words that end a line or a sentence."""
    return len(shared.split()) > 2 and ("\n" in shared.strip() or "?" in shared)


def _says(message: Mapping[str, Any], answer: Any) -> bool:
    """Whether ``answer`` is the text of ``message``."""
    if isinstance(answer, list):
        answer = answer[0] if len(answer) == 1 else None
    if isinstance(answer, Mapping):
        answer = answer.get("content", answer.get("value"))
    return isinstance(answer, str) and answer.strip() == content_text(dict(message)).strip()


def _rejected_response(record: Mapping[str, Any], notes: Notes) -> tuple[Pairs, tuple[str, ...]] | None:
    """The better answer is the last message or ``response``, the worse one a column of its own."""
    name = next((name for name in CONVERSATIONS if record.get(name)), None)
    value = None if name is None else record[name]
    value = from_text(value) if isinstance(value, str) else value
    if value and record.get("rejected_messages") is not None:
        notes[f"{name!r} read as chosen, 'rejected_messages' as rejected"] = None
        return [(None, value, record["rejected_messages"])], (name, "rejected_messages")
    worse = record.get("rejected_response")
    if worse is None:
        return None
    if value is not None:
        conversation = messages(value, name, notes)
        better = record.get("response")
        if better is not None and conversation[-1]["role"] != "assistant":
            notes[f"{name!r} read as the prompt, 'response' as chosen, 'rejected_response' as rejected"] = None
            return [(conversation, better, worse)], (name, "response", "rejected_response")
        if conversation[-1]["role"] != "assistant":
            raise Malformed(
                f"the last message of {name} is not the assistant's, so nothing is preferred to rejected_response"
            )
        if len(conversation) == 1:
            raise Malformed("prompt is empty")
        notes[f"the last message of {name!r} read as chosen, 'rejected_response' as rejected"] = None
        return [(conversation[:-1], conversation[-1:], worse)], (name, "rejected_response")
    if record.get("response") is None:
        return None
    present = tuple(key for key, entry in record.items() if entry is not None)
    prompt, used = prompt_of(record, present, notes)
    if prompt is None:
        raise Malformed(lacking(present, "prompt"))
    notes["'response' read as chosen, 'rejected_response' as rejected"] = None
    return [(prompt, record["response"], worse)], (*used, "response", "rejected_response")


def _preferred_output(
    record: Mapping[str, Any], present: tuple[str, ...], notes: Notes
) -> tuple[Pairs, tuple[str, ...]] | None:
    """OpenAI's ``input``, ``preferred_output`` and ``non_preferred_output``; or ``output`` with the better and the worse."""
    better, worse = record.get("preferred_output"), record.get("non_preferred_output")
    asked = record.get("input")
    if better is not None and worse is not None and isinstance(asked, Mapping) and asked.get("messages"):
        notes[
            "'messages' of 'input' read as the prompt, 'preferred_output' as chosen, 'non_preferred_output' as rejected"
        ] = None
        return [(asked["messages"], better, worse)], ("input", "preferred_output", "non_preferred_output")
    answers = record.get("output")
    if isinstance(answers, list) and len(answers) == 2 and all(isinstance(answer, str) for answer in answers):
        prompt, used = prompt_of(record, present, notes)
        if prompt is None:
            raise Malformed(lacking(present, "prompt"))
        notes["the first of 'output' read as chosen, the second as rejected"] = None
        return [(prompt, *answers)], (*used, "output")
    return None


def _entries(value: Any) -> Any:
    """Completions as a list. One object of lists, as some readers make of a list of objects, becomes a list of objects."""
    if not (isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values())):
        return value
    if len({len(column) for column in value.values()}) > 1:
        return value
    return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]


def _has_places(entries: Any, record: Mapping[str, Any]) -> bool:
    return isinstance(entries, list) and (
        record.get("ranks") is not None
        or record.get("scores") is not None
        or any(
            isinstance(entry, Mapping) and any(key in entry for _, keys, _ in _PLACES for key in keys) for entry in entries
        )
    )


def _ranked(
    record: Mapping[str, Any], present: tuple[str, ...], name: str, notes: Notes, ranks: Ranks | None
) -> tuple[Pairs, tuple[str, ...]]:
    """All pairs of completions of strictly different rank, or one list of them, see ``pairs_of``."""
    prompt, used = prompt_of(record, present, notes)
    if used == ("context",):
        notes.pop("'context' read as the prompt", None)  # a form that we document
    if prompt is None:
        raise Malformed(lacking(present, "prompt"))
    entries = _entries(record[name])
    if not isinstance(entries, list) or len(entries) < 2:
        raise Malformed(f"{name} is not a list of two or more")
    places, kind, key = _places(entries, record, name)
    if name != "completions":
        notes[f"{name!r} with {kind} read as completions"] = None
    elif key not in (None, "rank", "score"):
        notes[f"{key!r} of completions read as scores"] = None
    answers = [
        next((entry[key] for key in _ANSWERS if entry.get(key) is not None), None)
        if isinstance(entry, Mapping) and role_of(entry) is None
        else entry
        for entry in entries
    ]
    if without := [entry for entry, answer in zip(entries, answers, strict=True) if answer is None]:
        fields = quoted(dict.fromkeys(str(field) for entry in without if isinstance(entry, Mapping) for field in entry))
        raise Malformed(
            f"{len(without)} of {len(entries)} {name} have none of the fields {quoted(_ANSWERS[:3])} with an answer"
            + (f"; their fields are {fields}" if fields else "")
        )
    best_first = sorted(range(len(answers)), key=places.__getitem__)
    if kind == "ranks" and isinstance(scores := record.get("scores"), list) and len(scores) == len(places):
        one_by_one = combinations(range(len(places)), 2)
        try:
            against = any(
                (places[one] - places[two]) * (float(scores[one]) - float(scores[two])) > 0 for one, two in one_by_one
            )
        except (TypeError, ValueError):
            against = False
        if against:
            notes["warning: 'ranks' read, though 'scores' say otherwise; drop the column that should not be read"] = None
    if ranks is not None:
        return _listed(prompt, [(answers[one], places[one]) for one in best_first], notes, ranks), used
    pairs = [
        (prompt, answers[better], answers[worse])
        for better, worse in combinations(best_first, 2)
        if places[better] < places[worse] and answers[better] != answers[worse]
    ]
    if not pairs:
        raise Malformed("no completion is better than another")
    return pairs, used


def _listed(prompt: Any, best_first: Sequence[tuple[Any, float]], notes: Notes, ranks: Ranks) -> Pairs:
    """Answers with their places, best first, as the rows of one list. Adds to ``ranks``, see ``pairs_of``."""
    answers: list[tuple[Any, float]] = []
    for answer, place in best_first:
        if all(answer != known for known, _ in answers):
            answers.append((answer, place))
        else:
            notes["an answer that a list has twice counts once, at its best place"] = None
    places = [place for _, place in answers]
    if places[0] == places[-1]:
        raise Malformed("no completion is better than another")
    pairs = []
    for index in range(0, len(answers), 2):
        second = index + 1 if index + 1 < len(answers) else None
        ranks.append((places.index(places[index]), None if second is None else places.index(places[second])))
        pairs.append((prompt, answers[index][0], answers[second or 0][0]))
    return pairs


def _places(entries: list[Any], record: Mapping[str, Any], name: str) -> tuple[list[float], str, str | None]:
    """One number per completion, lower is better; whether they are ranks or scores; the field of an entry with its own."""
    for column, keys, sign in _PLACES:
        values, key = record.get(column), None
        for key in keys if values is None else ():
            if all(isinstance(entry, Mapping) and entry.get(key) is not None for entry in entries):
                values = [entry[key] for entry in entries]
                break
        if values is None:
            continue
        if not isinstance(values, Sequence) or len(values) != len(entries):
            raise Malformed(f"{name} and {column} differ in number")
        if column == "ranks" and any(isinstance(value, bool) for value in values):
            raise Malformed("ranks are truth values, and true may mean best or worst: write 1 for the best, 2 for the next")
        try:
            numbers = [sign * float(value) for value in values]
        except (TypeError, ValueError):
            numbers = [math.nan]
        if any(math.isnan(number) for number in numbers):
            raise Malformed(f"{column} are not all numbers")
        return numbers, column, key
    for _, keys, _ in _PLACES:
        for key in keys:
            given = [isinstance(entry, Mapping) and entry.get(key) is not None for entry in entries]
            if any(given):
                raise Malformed(f"{given.count(False)} of {len(given)} {name} have no {key!r}; each needs one")
    fields = quoted(dict.fromkeys(str(field) for entry in entries if isinstance(entry, Mapping) for field in entry))
    raise Malformed(f"{name} have neither ranks nor scores" + (f"; their fields are {fields}" if fields else ""))


def _two_answers(
    record: Mapping[str, Any], present: tuple[str, ...], names: tuple[str, str], notes: Notes
) -> tuple[tuple[Any, Any, Any], tuple[str, ...]]:
    """The pair whose better and worse answer are in the columns ``names``, and the columns of its prompt."""
    answers = record[names[0]], record[names[1]]
    turns = [_turns(each) for each in (record.get("prompt"), *answers)]
    if all(turns):  # as Arena writes them
        if any(len(each) > 1 for each in turns):
            raise Malformed(
                f"'prompt', {names[0]!r} and {names[1]!r} are lists of several turns, and the first answers differ: write "
                "messages, or the first turn alone"
            )
        notes[f"'prompt', {names[0]!r} and {names[1]!r} are lists of one text, read as that text"] = None
        return (turns[0][0], turns[1][0], turns[2][0]), ("prompt",)
    whole = all(isinstance(answer, list) and answer and role_of(answer[0]) not in ("assistant", None) for answer in answers)
    prompt, used = (record.get("prompt"), ()) if whole else prompt_of(record, present, notes)
    if prompt is None and not whole:
        raise Malformed(lacking(present, "prompt"))
    return (prompt, *answers), used


def _single(
    record: Mapping[str, Any], present: tuple[str, ...], side: str, said: Any, names: tuple[str, ...], notes: Notes
) -> tuple[Pairs, tuple[str, ...]]:
    """One completion as ``labels.labelled`` found it, with its prompt."""
    whole = names[0] in CONVERSATIONS
    prompt, used = (record.get("prompt"), ()) if whole else prompt_of(record, present, notes)
    if prompt is None and isinstance(said, str) and from_text(said) is None:
        raise Malformed(lacking(present, "prompt"))
    return [(prompt, said, None) if side == "chosen" else (prompt, None, said)], (*used, *names)


def _turns(value: Any) -> list[str]:
    """The texts of a list of texts, which may be JSON text; none if it is something else."""
    if isinstance(value, str) and value[:1] == "[":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    return value if isinstance(value, list) and all(isinstance(each, str) for each in value) else []
