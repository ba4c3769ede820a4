"""Measure what the quickstart changed: how many answers are bullet lists before training, and how many after.

The prompts are held out: the policy was not trained on them. The answers are greedy, so equal weights give equal answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raydpo.config import Config
from raydpo.quickstart.config import PREFERENCES
from raydpo.terminal.console import Console

if TYPE_CHECKING:
    import pyarrow as pa

    from raydpo.data.tokenise import Tokeniser
    from raydpo.reference.score import ReferenceSpec

__all__ = ["Effect", "is_bullet_list", "measure_effect", "print_effect"]

PROMPTS = 20
MAX_TOKENS = 48
"""Longest answer, in tokens. The first lines of an answer tell a list from a paragraph."""
BULLET = "- "


@dataclass(frozen=True)
class Effect:
    """Answers to the same held-out prompts.

    Attributes:
        before: of the reference, one text for each prompt.
        after: of the trained policy, in the same order.
    """

    before: list[str]
    after: list[str]

    @property
    def lists_before(self) -> int:
        """Number of bullet lists in ``before``."""
        return sum(map(is_bullet_list, self.before))

    @property
    def lists_after(self) -> int:
        """Number of bullet lists in ``after``."""
        return sum(map(is_bullet_list, self.after))


def is_bullet_list(answer: str) -> bool:
    """Whether the first line of an answer, and at least one more line, begins with ``"- "``."""
    lines = [line for line in answer.splitlines() if line.strip()]
    return bool(lines) and lines[0].startswith(BULLET) and sum(line.startswith(BULLET) for line in lines) >= 2


def measure_effect(config: Config) -> Effect | None:
    """Let the reference and the trained policy answer the first ``PROMPTS`` held-out prompts of the shipped pairs.

    Returns:
        The answers; None if the run used other pairs or held nothing out.

    Raises:
        RaydpoError: if a model cannot be loaded.
    """
    if [str(source.path) for source in config.data.train] != [str(PREFERENCES)]:
        return None
    from raydpo.data.pairs import load_pairs
    from raydpo.evaluation.policy import find_policy
    from raydpo.pipeline.prepare import open_reference
    from raydpo.pipeline.tokenised import open_tokeniser

    tokeniser = open_tokeniser(config)
    held_out = load_pairs(config.data, tokeniser).eval
    if held_out is None or not held_out.num_rows:
        return None
    prompts = held_out.slice(0, PROMPTS)  # no two shipped pairs have the same prompt
    reference, _ = open_reference(config)
    policy = find_policy(config, reference.identity.dtype)
    return Effect(_answers(reference, prompts, tokeniser), _answers(policy.spec, prompts, tokeniser))


def _answers(spec: ReferenceSpec, pairs: pa.Table, tokeniser: Tokeniser) -> list[str]:
    """Greedy answers of a model to the prompts of ``pairs``."""
    import pyarrow as pa
    import torch

    from raydpo.answers.answering import Answering
    from raydpo.answers.draws import ROWS

    # One thread: sums depend on the number of threads, and threads that wait for each other are slow on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = pa.Table.from_pylist([{"prompt_ids": ids} for ids in pairs["prompt_ids"].to_pylist()], schema=ROWS)
    answering = Answering(spec=spec, max_tokens=MAX_TOKENS, stop=tokeniser.stop_ids, batch=PROMPTS)
    try:
        found = answering.open("cuda" if torch.cuda.is_available() else "cpu")(rows)["answer_ids"].to_pylist()
    finally:
        torch.set_num_threads(threads)
    return [text.strip() for text in tokeniser.tokenizer.batch_decode(found, skip_special_tokens=True)]


def print_effect(effect: Effect, console: Console) -> None:
    """Print in how many answers the property holds, before and after."""
    count = len(effect.before)
    console.say(
        f"bullet lists among the answers to {count} held-out prompts: {effect.lists_before} before training "
        f"({effect.lists_before / count:.0%}), {effect.lists_after} after ({effect.lists_after / count:.0%})"
    )
    console.say(
        "  (a bullet list: the first line and at least one more begin with '- '; greedy answers of at most "
        f"{MAX_TOKENS} tokens)"
    )
