"""Take the prompt off answers that repeat it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from raydpo.data.preference import Preference

__all__ = ["Repeats"]

SHORTEST = 4
"""Characters of a prompt that an answer would hardly begin with by chance."""


@dataclass
class Repeats:
    """Takes the prompt off text answers of one source, if all answers of its first records begin with their prompt.

    The first records decide, since a source may be larger than memory. Later records that are otherwise are counted.

    Attributes:
        take_off: whether prompts are taken off; None before a record decided it.
        taken: pairs whose answers lost their prompt.
        kept: pairs whose answers begin with their prompt and keep it, since not all do, or since it ends within a word.
        without: pairs whose answers do not begin with their prompt, though those of the first records do.
    """

    take_off: bool | None = None
    taken: int = 0
    kept: int = 0
    without: int = 0

    def taken_off(self, preferences: Sequence[Preference]) -> list[Preference]:
        """Return ``preferences``, those whose answers repeat the prompt with shorter answers if all did at first."""
        counting, repeated, taken = 0, 0, 0
        answers: list[tuple[str, str] | tuple[()] | None] = []
        for preference in preferences:
            prompt, shorter = preference.prompt, None
            if isinstance(prompt, str) and len(bare := prompt.strip()) >= SHORTEST:
                counting += 1
                if preference.chosen.lstrip().startswith(bare):  # type: ignore[union-attr]
                    shorter = _without_prompt(preference, bare)
                    repeated += shorter is not None
                    taken += bool(shorter)
            answers.append(shorter)
        if self.take_off is None and counting:
            self.take_off = taken == counting
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

    def lines(self) -> list[str]:
        """What was done, for people. Lines that begin with ``warning:`` need attention."""
        found = []
        if self.taken:
            found.append(f"in {self.taken:,} pairs both answers repeat the prompt, which was taken off")
        if self.kept:
            found.append(
                f"warning: in {self.kept:,} pairs both answers begin with the prompt, which was kept, since not all first "
                "answers of this source do, or since it ends within a word of theirs; take it off in the file if they "
                "repeat it"
            )
        if self.without:
            found.append(
                f"warning: in {self.without:,} pairs the answers do not repeat the prompt, though the first ones of this "
                "source do; separate the two kinds"
            )
        return found


def _without_prompt(preference: Preference, bare: str) -> tuple[str, str] | tuple[()] | None:
    """Both answers without the text prompt, or nothing if it ends within a word of one; None if one does not begin with it,
    or nothing would be left.

    Args:
        bare: the prompt without white space at its ends.
    """
    prompt: str = preference.prompt  # type: ignore[assignment]
    chosen, rejected = (_rest(said, prompt, bare) for said in (preference.chosen, preference.rejected))  # type: ignore[arg-type]
    if chosen is None or rejected is None or not chosen.strip() or not rejected.strip():
        return None
    if any(_continues(bare, said) for said in (preference.chosen, preference.rejected)):
        return ()
    return chosen, rejected


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
