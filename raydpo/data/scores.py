"""Scores beside a pair, such as ``score_chosen`` and ``score_rejected``: pairs that they contradict are counted."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

__all__ = ["Compared", "Contradictions", "compared"]

_WORDS = {
    "score", "scores", "rating", "ratings", "reward", "rewards", "quality", "grade", "points", "overall", "rank", "ranks",
    "ranking", "votes", "utility", "helpfulness", "preference",
}  # fmt: skip
"""Words in the names of columns that say how good an answer is."""
_LOWER_IS_BETTER = {
    "rank", "ranks", "ranking", "toxicity", "toxic", "harm", "harmfulness", "error", "errors", "loss", "perplexity",
    "penalty", "cost", "risk", "violation", "violations", "bias", "hallucination", "hallucinations",
}  # fmt: skip
_DIFFERENCES = {"margin", "difference", "diff", "gap", "strength"}
"""Words in the names of columns that hold how much better the chosen answer is."""
_NOT_QUALITY = {"logp", "logps", "logprob", "logprobs", "ref", "reference", "length", "tokens", "weight"}
_VERDICTS, _VERDICT = ("status", "winner", "verdict", "preference", "preferred", "better", "choice"), 0
"""Columns of text that may call a pair a tie or name its better answer, and what stands for the sign of such a column."""
_SAID = {"chosen": 1, "rejected": -1}
_LISTED = 2
"""What stands for the sign of a column with two numbers."""
_GENERATIONS = ("generations", "completions", "responses")
_FIRST = 3


class Compared(NamedTuple):
    """What scores say of one pair.

    Attributes:
        columns: the columns that were read.
        better: how much better the chosen answer is by them.
    """

    columns: tuple[str, ...]
    better: float


@dataclass
class Contradictions:
    """Number of pairs whose scores say the opposite, or that both answers are equal; and the first places of each.

    Attributes:
        compared: pairs with scores.
        columns: the columns that were read, in the order in which they were found.
    """

    reversed: int = 0
    tied: int = 0
    compared: int = 0
    columns: dict[str, None] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=lambda: {"reversed": [], "tied": []})

    def look(self, record: Mapping[str, Any], where: str) -> None:
        """Compare the scores of a record that is one pair with its order, and count it. A record without scores is not
        counted."""
        self.add(compared(record), where)

    def add(self, found: Compared | None, where: str) -> None:
        """Count a pair, of which ``compared`` says ``found``."""
        if found is None:
            return
        self.compared += 1
        self.columns |= dict.fromkeys(found.columns)
        if found.better <= 0:
            kind = "reversed" if found.better < 0 else "tied"
            setattr(self, kind, getattr(self, kind) + 1)
            if len(self.places[kind]) < _FIRST:
                self.places[kind].append(where)

    def merge(self, other: Contradictions) -> None:
        """Add what was counted of later records."""
        self.reversed += other.reversed
        self.tied += other.tied
        self.compared += other.compared
        self.columns |= other.columns
        for kind, places in other.places.items():
            self.places[kind] = [*self.places[kind], *places][:_FIRST]

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Contradictions:
        """The reverse of ``to_dict``."""
        return cls(**state | {"columns": dict.fromkeys(state["columns"])})

    def lines(self, records: int) -> Iterator[str]:
        """What to warn of, in at most one line; none if all scores agree with the order."""
        told = [
            f"{count:,} {'pair scores' if count == 1 else 'pairs score'} {what} ({', '.join(self.places[kind])}"
            f"{', ...' if count > len(self.places[kind]) else ''})"
            for kind, count, what in (
                ("reversed", self.reversed, "the rejected answer higher"),
                ("tied", self.tied, "both answers alike"),
            )
            if count
        ]
        if told:
            names = " and ".join(map(repr, list(self.columns)[:4]))
            yield (
                f"by {names}, {' and '.join(told)}, of {self.compared:,} scored pairs in {records:,} records; the pairs are "
                "used as they stand. Swap or remove them in the file, or remove the columns if they mean something else"
            )

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"columns": list(self.columns)}

    to_state = to_dict


def compared(record: Mapping[str, Any]) -> Compared | None:
    """What the scores of a record that is one pair say of its order; None without scores."""
    for names, sign in _columns(tuple(record)):
        better = _better(record, names, sign)
        if better is not None:
            return Compared(names, better)
    return None


@lru_cache(maxsize=1024)
def _columns(names: tuple[str, ...]) -> tuple[tuple[tuple[str, ...], int], ...]:
    """The columns to compare, the most direct first: (of chosen, of rejected), or one column of differences; and the sign of
    what is better. None if nothing is called chosen: the record's form then has its own rules."""
    if not any(isinstance(name, str) and "chosen" in name.lower() for name in names):
        return ()
    found: list[tuple[tuple[str, ...], int]] = [((name,), _VERDICT) for name in _VERDICTS if name in names]
    words = {name: _split(name) for name in names if isinstance(name, str)}
    for name, parts in words.items():
        if "chosen" in parts and set(parts) & _WORDS and not set(parts) & _NOT_QUALITY:
            wanted = ["rejected" if part == "chosen" else part for part in parts]
            sign = -1 if _LOWER_IS_BETTER & set(parts) else 1
            found += [((name, other), sign) for other, theirs in words.items() if theirs == wanted][:1]
    found += [((name,), _LISTED) for name, parts in words.items() if len(parts) == 1 and parts[0] in _WORDS]
    for name, parts in words.items():
        known = "margin" in parts or (set(parts) & _DIFFERENCES and set(parts) & _WORDS)
        if known and not set(parts) & (_NOT_QUALITY | {"chosen", "rejected"}):
            found.append(((name,), 1))
    return tuple(found)


def _split(name: str) -> list[str]:
    """The words of a name: ``chosenScore`` and ``chosen-score`` are the same."""
    return re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())


def _better(record: Mapping[str, Any], names: tuple[str, ...], sign: int) -> float | None:
    """How much better the chosen answer is by these columns; None if they do not say."""
    if sign == _VERDICT:
        value = record[names[0]]
        value = value.strip().lower() if isinstance(value, str) else ""
        return 0 if value.startswith("tie") else _SAID.get(value)
    if sign == _LISTED:
        return _of_list(record, names[0])
    values = [_total(record[name]) for name in names]
    if None in values:
        return None
    return sign * (values[0] - values[1] if len(values) == 2 else values[0])


def _of_list(record: Mapping[str, Any], name: str) -> float | None:
    """How much better the chosen answer is by an object of two numbers, or a list of them: of the answers in the column
    ``generations`` if that holds two, otherwise of chosen and rejected."""
    value = record[name]
    named = isinstance(value, Mapping) and value.keys() >= _SAID.keys()
    if named:
        value = [value[side] for side in _SAID]
    if not isinstance(value, list) or len(value) != 2:
        return None
    numbers = [_number(each) for each in value]
    if None in numbers:
        return None
    listed = next((record[other] for other in _GENERATIONS if isinstance(record.get(other), list)), None)
    if listed is not None and not named:
        said = [_answer(record.get("chosen")), _answer(record.get("rejected"))]
        found = [_answer(each) for each in listed]
        if len(found) != 2 or said[0] == said[1] or set(map(str, said)) != set(map(str, found)):
            return None
        numbers = numbers if found == said else numbers[::-1]
    sign = -1 if name.lower() in _LOWER_IS_BETTER else 1
    return sign * (numbers[0] - numbers[1])  # type: ignore[operator]


def _answer(value: Any) -> Any:
    """The text of an answer, whether it is a text, a message or a list that ends with one."""
    value = value[-1] if isinstance(value, list) and value else value
    value = value.get("content") if isinstance(value, Mapping) else value
    return value.strip() if isinstance(value, str) else value


def _total(value: Any) -> float | None:
    """A number, or the sum of the numbers of an object."""
    if not isinstance(value, Mapping):
        return _number(value)
    numbers = [_number(each) for each in value.values()]
    return None if not numbers or None in numbers else sum(numbers)  # type: ignore[arg-type]


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
