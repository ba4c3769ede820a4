"""Take the prompt off answers that repeat it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from raydpo.data.preference import Preference

__all__ = ["Repeats", "repeating"]

_NEAR = 60
"""Characters before a repeated prompt, such as "User: "."""
SHORTEST = 4
"""Characters of a prompt that an answer would hardly begin with by chance."""


@dataclass
class Repeats:
    """Takes the prompt off text answers of one source, if all answers of its first records begin with their prompt.

    The first records decide, since a source may be larger than memory. Later records that are otherwise are counted.

    Attributes:
        take_off: whether prompts are taken off; None if no record has a text prompt.
        taken: pairs whose answers lost their prompt.
        kept: pairs whose answers begin with their prompt and keep it, since not all do, or since it ends within a word.
        without: pairs whose answers do not begin with their prompt, though those of the first records do.
        looked: pairs with a prompt of several words.
        both, one: pairs of which both answers, or one, hold the prompt near the beginning, if it was not taken off. A
            completion alone counts as both.
        first: of the first records, those that counted, and those whose answers begin with the prompt.
    """

    take_off: bool | None = None
    taken: int = 0
    kept: int = 0
    without: int = 0
    looked: int = 0
    both: int = 0
    one: int = 0
    first: tuple[int, int] = (0, 0)

    def taken_off(self, preferences: Sequence[Preference]) -> list[Preference]:
        """Return ``preferences``, those whose answers repeat the prompt with shorter answers if all did at first."""
        answers, counting = _shorter(preferences)
        repeated, taken = sum(answer is not None for answer in answers), sum(map(bool, answers))
        if self.take_off is None and counting:
            self.take_off = taken == counting
            self.first = counting, taken
        self._look(preferences, [] if not self.take_off else answers)
        if not self.take_off:
            self.kept += repeated
            return list(preferences)
        self.taken += taken
        self.kept += repeated - taken
        self.without += counting - repeated
        return [
            replace(preference, chosen=shorter[0], rejected=shorter[1]) if shorter else preference
            for preference, shorter in zip(preferences, answers, strict=True)
        ]

    def _look(self, preferences: Sequence[Preference], taken: Sequence[object]) -> None:
        """Count answers that hold the prompt near their beginning.

        Args:
            taken: true for those that lose it; may be empty.
        """
        for number, preference in enumerate(preferences):
            bare, answers = _last_texts(preference)
            if " " not in bare or (taken and taken[number]):
                continue
            self.looked += 1
            reach = len(bare) + _NEAR
            held = [bare in answer[:reach] for answer in answers].count(True)
            if held == len(answers):
                self.both += 1
            elif held:
                self.one += 1

    def merge(self, other: Repeats) -> None:
        """Add what was counted of later records, with the same decision."""
        if self.take_off is None:
            self.take_off = other.take_off
        for name in ("taken", "kept", "without", "looked", "both", "one"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.first = self.first[0] + other.first[0], self.first[1] + other.first[1]

    def to_state(self) -> dict[str, Any]:
        """All of it for JSON."""
        return vars(self) | {"first": list(self.first)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Repeats:
        return cls(**state | {"first": tuple(state["first"])})

    def lines(self, unit: str = "pairs") -> list[str]:
        """What was done, for people. Lines that begin with ``warning:`` need attention.

        Args:
            unit: what is counted: pairs, or rows if some are completions alone.
        """
        found = []
        both = "both answers" if unit == "pairs" else "the answers"
        if self.taken:
            found.append(f"in {self.taken:,} {unit} {both} repeat the prompt, which was taken off")
        if self.kept:
            why = f"{self.first[0] - self.first[1]:,} of the first {self.first[0]:,} {unit} do not"
            if not self.first[0]:
                why = "the first records, which decide, have no text prompts"
            found.append(
                f"warning: in {self.kept:,} {unit} {both} begin with the prompt, which was kept, since {why}, or since "
                "it ends within a word of theirs; take it off in the file if they repeat it"
            )
        more = self.both if self.both > self.kept else 0  # those that were kept are told above
        for count, what in ((more, f"{both} hold"), (self.one, "one of the answers holds")):
            if count and 2 * count >= self.looked:
                found.append(
                    f"warning: in {count:,} of {self.looked:,} {unit} {what} the prompt near the beginning, so the model "
                    "learns to repeat it; take it off in the file"
                )
        if self.without:
            found.append(
                f"warning: in {self.without:,} {unit} the answers do not repeat the prompt, though the first ones of this "
                "source do; separate the two kinds"
            )
        return found


def repeating(preferences: Sequence[Preference]) -> tuple[int, int]:
    """Number of pairs with a text prompt, and of those whose answers begin with it, so that it can be taken off."""
    answers, counting = _shorter(preferences)
    return counting, sum(map(bool, answers))


def _shorter(preferences: Sequence[Preference]) -> tuple[list[tuple[str, str] | tuple[()] | None], int]:
    """What ``_without_prompt`` gives for each pair, None where the prompt is no text; and the number with a text prompt."""
    counting = 0
    answers: list[tuple[str, str] | tuple[()] | None] = []
    for preference in preferences:
        prompt, shorter = preference.prompt, None
        if isinstance(prompt, str) and len(bare := prompt.strip()) >= SHORTEST:
            counting += 1
            if (preference.chosen or preference.rejected).lstrip().startswith(bare):  # type: ignore[union-attr]
                shorter = _without_prompt(preference, bare)
        answers.append(shorter)
    return answers, counting


def _last_texts(preference: Preference) -> tuple[str, list[str]]:
    """The last message of the prompt and the first of each answer, or the texts; empty if they are no texts."""
    prompt, answers = preference.prompt, [said for said in (preference.chosen, preference.rejected) if said]
    if not isinstance(prompt, str):
        prompt, answers = prompt[-1].get("content"), [said[0].get("content") for said in answers]  # type: ignore[union-attr]
        if not (isinstance(prompt, str) and isinstance(answers[0], str) and isinstance(answers[-1], str)):
            return "", []
    return prompt.strip(), answers  # type: ignore[return-value]


def _without_prompt(preference: Preference, bare: str) -> tuple[str, str] | tuple[()] | None:
    """Chosen and rejected without the text prompt, or nothing if it ends within a word of one; None if one does not begin
    with it, or nothing would be left.

    Args:
        bare: the prompt without white space at its ends.
    """
    prompt: str = preference.prompt  # type: ignore[assignment]
    answers: list[str] = [said for _, said in preference.sides]  # type: ignore[misc]
    shorter = [_rest(said, prompt, bare) for said in answers]
    if any(said is None or not said.strip() for said in shorter):
        return None
    if any(_continues(bare, said) for said in answers):
        return ()
    if preference.alone is not None:
        shorter.insert(0 if preference.alone == "rejected" else 1, "")
    return tuple(shorter)  # type: ignore[return-value]


def _continues(bare: str, answer: str) -> bool:
    """Whether ``answer`` goes on within the last word of the prompt: "What is tea" in "What is teapot"."""
    following = answer.lstrip()[len(bare) : len(bare) + 1]
    return _in_a_word(bare[-1]) and _in_a_word(following)


def _in_a_word(character: str) -> bool:
    """Whether words made of such characters have white space between them; Chinese ones have none."""
    return character.isdecimal() or character.lower() != character.upper()


def _rest(answer: str, prompt: str, bare: str) -> str | None:
    """``answer`` after ``prompt``, which it may repeat without white space at its ends."""
    if answer.startswith(prompt):
        return answer[len(prompt) :]
    start = answer.lstrip()
    if not start.startswith(bare):
        return None
    rest = start[len(bare) :]
    return rest.lstrip() if prompt[-1:].isspace() else rest
