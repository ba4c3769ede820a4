"""Prompts that are implicit: the common beginning of two conversations, transcripts or texts."""

from __future__ import annotations

import re
from typing import Any

from raydpo.data.foreign import shared_start
from raydpo.data.messages import Malformed, Message, Notes, Text, messages

__all__ = ["Parts", "are_transcripts", "implicit", "shared_turns", "transcripts"]

Parts = tuple[Text, Text, Text, tuple[str, str, str] | None]
"""Prompt, chosen, rejected; and for a transcript the three as text."""
FEW_WORDS = 5
"""Two answers may begin with fewer equal words by chance."""
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def are_transcripts(chosen: Any, rejected: Any) -> bool:
    """Whether both answers are transcripts as HH-RLHF has them: they begin with a turn and hold one of the assistant."""
    return all(
        isinstance(said, str) and _TURN.match(said) and ("\n\nAssistant:" in said or said.lstrip().startswith("Assistant:"))
        for said in (chosen, rejected)
    )


def implicit(chosen: Any, rejected: Any, notes: Notes) -> Parts:
    """Split off the common beginning as the prompt, like TRL's extract_prompt."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        if are_transcripts(chosen, rejected):
            return transcripts(chosen, rejected, notes)
        return *_common_text(chosen, rejected, notes), None
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        raise Malformed("missing column 'prompt'")
    chosen, rejected = messages(chosen, "chosen", notes), messages(rejected, "rejected", notes)
    if chosen == rejected:
        raise Malformed("chosen equals rejected")
    common, shorter = 0, min(len(chosen), len(rejected))
    while common < shorter and chosen[common] == rejected[common]:
        common += 1
    while common == shorter and common and chosen[common - 1]["role"] == "assistant":
        common = shorter = common - 1  # one is the start of the other: keep its last answer as the completion
    if not common:
        roles = sorted({chosen[0]["role"], rejected[0]["role"]})
        raise Malformed(
            "chosen and rejected have no prompt in common: "
            + (
                "both begin with the assistant; give what they answer in a column 'prompt'"
                if roles == ["assistant"]
                else f"their first messages ({', '.join(roles)}) differ, and a pair is two answers to one prompt"
            )
        )
    return chosen[:common], chosen[common:], rejected[common:], None


def _common_text(chosen: str, rejected: str, notes: Notes) -> tuple[str, str, str]:
    """The common beginning of two texts is the prompt. It ends at white space; a space goes to the answers."""
    if chosen == rejected:
        raise Malformed("chosen equals rejected")
    common = shared_start(chosen, rejected)
    end = len(common)
    if end == min(len(chosen), len(rejected)):  # one is the start of the other: an answer must be left
        end = len(common.rstrip())
    while end and not common[end - 1].isspace():
        end -= 1
    end -= common[end - 1 : end] == " "
    if not common[:end].strip():
        raise Malformed("missing column 'prompt', and chosen and rejected have no beginning in common")
    note = "no 'prompt': the common beginning of chosen and rejected, up to white space, read as the prompt"
    if len(common.split()) < FEW_WORDS and not any(sign in common[:end].strip() for sign in "\n?:"):
        note = f"warning: {note}, though it is short; if another column is the prompt, name it with the source's 'columns'"
    notes[note] = None
    return common[:end], chosen[end:], rejected[end:]


def shared_turns(chosen: Any, rejected: Any) -> list[Message]:
    """Return the turns that two transcripts share; none if they are no transcripts."""
    if not are_transcripts(chosen, rejected):
        return []
    try:
        return transcripts(chosen, rejected)[0]  # type: ignore[return-value]
    except Malformed:
        return []


def transcripts(chosen: str, rejected: str, notes: Notes | None = None) -> Parts:
    """HH-RLHF's ``\\n\\nHuman: ...\\n\\nAssistant: ...``: the common turns are the prompt, what follows is one answer."""
    better, worse = _turns(chosen), _turns(rejected)
    if [said for said, _ in better] == [said for said, _ in worse]:
        raise Malformed("chosen equals rejected")
    common, shorter = 0, min(len(better), len(worse))
    while common < shorter and better[common][0] == worse[common][0]:
        common += 1
    for name, turns in (("chosen", better), ("rejected", worse)):
        if common == len(turns) and turns[-1][0]["role"] != "assistant":
            raise Malformed(f"{name} is empty")
    common = min(common, shorter - 1)
    while common and not (better[common][0]["role"] == worse[common][0]["role"] == "assistant"):
        common -= 1
    if not common:
        raise Malformed("chosen and rejected have no prompt in common")
    if notes is not None and max(len(better), len(worse)) > common + 1:
        notes[
            "warning: an answer of a transcript holds further turns (Human: or Assistant:), which are read and trained on "
            "as its text; cut them off unless they are quoted"
        ] = None
    starts = better[common][1], worse[common][1]
    answers = [
        [{"role": "assistant", "content": said[at:].strip()}] for said, at in zip((chosen, rejected), starts, strict=True)
    ]
    prompt = [said for said, _ in better[:common]]
    return prompt, *answers, (chosen[: starts[0]], chosen[starts[0] :], rejected[starts[1] :])


def _turns(text: str) -> list[tuple[Message, int]]:
    """Each turn of a transcript as a message, and where what is said begins."""
    found = list(_TURN.finditer(text))
    ends = [turn.start() for turn in found[1:]] + [len(text)]
    return [
        ({"role": "user" if turn[1] == "Human" else "assistant", "content": text[turn.end() : end].strip()}, turn.end())
        for turn, end in zip(found, ends, strict=True)
    ]
