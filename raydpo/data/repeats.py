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
        kept: pairs whose answers begin with their prompt and keep it.
        without: pairs whose answers do not begin with their prompt, though those of the first records do.
    """

    take_off: bool | None = None
    taken: int = 0
    kept: int = 0
    without: int = 0

    def taken_off(self, preferences: Sequence[Preference]) -> list[Preference]:
        """Return ``preferences``, those whose answers repeat the prompt with shorter answers if all did at first."""
        counting, repeated = 0, 0
        answers: list[tuple[str, str] | None] = []
        for preference in preferences:
            prompt, shorter = preference.prompt, None
            if isinstance(prompt, str) and len(bare := prompt.strip()) >= SHORTEST:
                counting += 1
                if preference.chosen.lstrip().startswith(bare):  # type: ignore[union-attr]
                    shorter = _without_prompt(preference, bare)
                    repeated += shorter is not None
            answers.append(shorter)
        if self.take_off is None and counting:
            self.take_off = repeated == counting
        if not self.take_off:
            self.kept += repeated
            return list(preferences)
        self.taken += repeated
        self.without += counting - repeated
        return [
            preference if shorter is None else replace(preference, chosen=shorter[0], rejected=shorter[1])
            for preference, shorter in zip(preferences, answers, strict=True)
        ]

    def lines(self) -> list[str]:
        """What was done, for people. Lines that begin with ``warning:`` need attention."""
        found = []
        if self.taken:
            found.append(f"in {self.taken:,} pairs both answers repeat the prompt, which was taken off")
        if self.kept:
            found.append(
                f"warning: in {self.kept:,} pairs both answers begin with the prompt, which was kept, since the first "
                "answers of this source do not; take it off in the file if they repeat it"
            )
        if self.without:
            found.append(
                f"warning: in {self.without:,} pairs the answers do not repeat the prompt, though the first ones of this "
                "source do; separate the two kinds"
            )
        return found


def _without_prompt(preference: Preference, bare: str) -> tuple[str, str] | None:
    """Both answers without the text prompt; None if one does not begin with it, or nothing would be left.

    Args:
        bare: the prompt without white space at its ends.
    """
    prompt: str = preference.prompt  # type: ignore[assignment]
    chosen, rejected = (_rest(said, prompt, bare) for said in (preference.chosen, preference.rejected))  # type: ignore[arg-type]
    if chosen is None or rejected is None or not chosen.strip() or not rejected.strip():
        return None
    return chosen, rejected


def _rest(answer: str, prompt: str, bare: str) -> str | None:
    """``answer`` after ``prompt``, which it may repeat without white space at its ends."""
    if answer.startswith(prompt):
        return answer[len(prompt) :]
    start = answer.lstrip()
    if not start.startswith(bare):
        return None
    rest = start[len(bare) :]
    return rest.lstrip() if prompt[-1:].isspace() else rest
