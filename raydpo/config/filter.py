"""Parses and checks ``data.filter``, the condition on pairs. The module ``raydpo.data.filter`` applies it."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

from raydpo.errors import ConfigError

if TYPE_CHECKING:
    import polars

__all__ = ["FACTS", "REFERENCE_FACTS", "PairFilter"]

FACTS: dict[str, tuple[str, str]] = {
    "pair_id": ("string", "source:row"),
    "source": ("string", "name of its source"),
    "label": (
        "int8",
        "0 for a pair; 1 for a desirable completion alone, -1 for an undesirable one: their facts are those of chosen and "
        "of rejected; tokens of the missing side are 0, and what needs it is null",
    ),
    "prompt_tokens": ("int64", "tokens of the prompt"),
    "chosen_tokens": ("int64", "tokens of the chosen completion that are used and count (data.train_on)"),
    "rejected_tokens": ("int64", "tokens of the rejected completion that are used and count"),
    "length_difference": ("int64", "chosen_tokens - rejected_tokens"),
    "chosen_uncounted": ("int64", "tokens of the chosen completion that are used and do not count"),
    "rejected_uncounted": ("int64", "tokens of the rejected completion that are used and do not count"),
    "chosen_cut": ("int64", "tokens that truncation took from the chosen completion"),
    "rejected_cut": ("int64", "tokens that truncation took from the rejected completion"),
    "copies": ("int64", "pairs with exactly these tokens, this one included"),
    "copy": ("int64", "number of this pair among its copies, from 0; 'copy = 0' keeps one of each"),
    "prompt_pairs": ("int64", "pairs with exactly this prompt, this one included"),
    "answer_pairs": ("int64", "pairs, with any prompt, in which the more frequent of its two answers occurs"),
    "opposites": (
        "int64",
        "pairs with its completions swapped, or of a completion alone those with the other label: each is a vote against "
        "this pair, as a copy is a vote for it",
    ),
    "contradictory": ("bool", "whether 'opposites' is above 0"),
    "chosen_weights": ("float64", "sum of the weights of chosen_tokens; equal to chosen_tokens if each has weight 1"),
    "rejected_weights": ("float64", "sum of the weights of rejected_tokens"),
    "ref_chosen_logps": (
        "float64",
        "the reference's log-prob of the chosen completion, nats: sum over the tokens that count, each times its weight",
    ),
    "ref_rejected_logps": ("float64", "the same of the rejected completion"),
    "ref_margin": ("float64", "ref_chosen_logps - ref_rejected_logps"),
    "ref_chosen_per_token": ("float64", "ref_chosen_logps / chosen_weights"),
    "ref_rejected_per_token": ("float64", "ref_rejected_logps / rejected_weights"),
}
"""Facts about a pair that a condition can name: name -> (type, meaning). ``raydpo.data.facts`` computes them."""
REFERENCE_FACTS = frozenset(name for name in FACTS if name.startswith("ref_"))
"""Facts that are known only after scoring."""
_SAMPLES = {"bool": True, "float64": -1.0, "int8": 1, "int64": 1, "string": "x"}


class PairFilter:
    """A condition that pairs must meet, such as ``chosen_tokens < 1024 and ref_margin > -20``.

    One SQL expression, parsed and evaluated by polars over the facts of the pairs only: ``and``, ``or``, ``not``,
    comparisons, ``between``, ``in (...)``, ``like``, arithmetic, ``abs``. It has no access to tables or files.

    Attributes:
        fields: the facts that the condition names.

    Raises:
        ConfigError: if the condition cannot be parsed, names no fact or an unknown one, or has other values than true and
            false for each pair.
    """

    def __init__(self, expression: str) -> None:
        import polars

        self.expression = expression
        try:
            self._condition = polars.sql_expr(expression)
        except polars.exceptions.PolarsError as error:
            raise self._wrong(_first_line(error)) from None
        self.fields = frozenset(self._condition.meta.root_names())
        for field in sorted(self.fields - FACTS.keys()):
            near = difflib.get_close_matches(field, FACTS, n=1, cutoff=0.5)
            raise self._wrong(
                f"there is no field {field!r}"
                + (f", did you mean {near[0]!r}?" if near else "")
                + f" Fields: {', '.join(FACTS)}"
            )
        if not self.fields:
            raise self._wrong(f"it names no field of a pair. Fields: {', '.join(FACTS)}")
        # Evaluate two made-up rows to learn the type of its result.
        answer = self.evaluate(polars.DataFrame({name: [_SAMPLES[kind]] * 2 for name, (kind, _) in FACTS.items()}))
        if answer.dtype != polars.Boolean or len(answer) != 2:
            raise self._wrong(
                "it does not give true or false for each pair"
                if len(answer) == 2
                else "it gives one value for all pairs; write a condition on each pair"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether the condition can be evaluated only after scoring."""
        return bool(self.fields & REFERENCE_FACTS)

    def evaluate(self, facts: polars.DataFrame) -> polars.Series:
        """Return the value of the condition for each row of ``facts``, null where a fact that it needs is null.

        Args:
            facts: has at least the columns in ``fields``.

        Raises:
            ConfigError: if polars cannot evaluate the condition.
        """
        import polars

        try:
            return facts.select(self._condition).to_series()
        except polars.exceptions.PolarsError as error:
            raise self._wrong(_first_line(error)) from None

    def _wrong(self, why: str) -> ConfigError:
        return ConfigError(f"'data.filter' is {self.expression!r}: {why}")


def _first_line(error: Exception) -> str:
    return re.split(r"\n|Resolved plan", str(error))[0].strip()
