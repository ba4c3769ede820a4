"""Verify a cache: every byte of its files, and a sample of its log-probs scored again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raydpo.data.index import as_bytes
from raydpo.errors import CacheError
from raydpo.reference.join import join
from raydpo.reference.part import KEY_TYPE
from raydpo.reference.score import Scorer
from raydpo.reference.shards import Completion, Wanted, grouped, prompt_groups
from raydpo.reference.store import PARTS, UNVERIFIED, ReferenceCache
from raydpo.reference.team import TeamScorer

__all__ = [
    "SAMPLE",
    "TOLERANCES",
    "ScoresReport",
    "promote",
    "sum_tolerance",
    "verify_files",
    "verify_scores",
]

SAMPLE = 256
"""Completions that are scored again by default."""
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest accepted mean difference per token of a completion, nats, by the reference's precision. Other batches, layouts and
devices give differences ten times smaller; other weights or tokens give far larger ones."""
SUM_SPREAD = 4.0
"""Largest accepted difference of a sum over n tokens, in tolerances times sqrt(n): rounding errors have either sign, so the
error of a sum grows with the root of n. Largest differences measured between layouts, on SmolLM2-135M and tiny models: 0.02
in float32 and 0.9 in bfloat16; from transformers' own forward pass: 0.2 and 1.6."""
SHIFT = 0.02
"""Largest accepted mean difference of sums, with its sign, in tolerances times their mean number of tokens. Largest measured
beyond chance: 0.008 in float32 and 0.007 in bfloat16. Tokens left out or added shift all sums to one side."""
SHIFT_ERRORS = 4.0
"""A mean difference within this many standard errors of 0 counts as chance."""
TOKENS_PER_BATCH = 16384


def sum_tolerance(tolerance: float, tokens: np.ndarray | int) -> np.ndarray | float:
    """Largest accepted difference of a sum over ``tokens`` tokens, nats, given the tolerance per token."""
    return tolerance * SUM_SPREAD * np.sqrt(tokens)


@dataclass(frozen=True)
class FilesReport:
    """Result of reading every part completely.

    Attributes:
        parts, rows, bytes: of intact parts, superseded and unverified ones included.
        twice: rows that readers skip because another row answers for the same completion.
        problems: a sentence for each file that is not used.
    """

    parts: int
    rows: int
    bytes: int
    twice: int
    problems: tuple[str, ...]


def verify_files(cache: ReferenceCache) -> FilesReport:
    """Check the checksum, footer, identity and values of every part of the cache."""
    parts = rows = size = 0
    for folder in (PARTS, UNVERIFIED):
        for entry in cache.storage.entries(f"{cache.directory}/{folder}"):
            try:
                part = cache.read(f"{cache.directory}/{folder}/{entry.name}") if entry.name.endswith(".parquet") else None
            except CacheError:
                continue  # named in cache.problems
            if part is not None:
                parts, rows, size = parts + 1, rows + part.info.rows, size + entry.size
    problems = dict.fromkeys(cache.problems)
    cache.refresh()
    return FilesReport(parts, rows, size, cache.rows_passed_over(), tuple(problems | dict.fromkeys(cache.problems)))


@dataclass(frozen=True)
class ScoresReport:
    """Stored against newly computed log-probs. Differences are absolute, in nats, unless noted.

    Attributes:
        wanted, stored: completions of the data, and how many of them the cache holds.
        checked, tokens: completions scored again, and their tokens.
        sums_only: checked completions that are stored as sums. Their difference is that of the sum divided by its tokens.
        imported: by path of each unverified imported part, how many of its rows were checked.
        quantiles: of the completions' mean differences per token.
        worst: the completion with the largest difference relative to its tolerance: name, key, mean, tolerance of that mean,
            and its most different token with both values.
        tolerance: accepted mean difference of a completion stored per token; for sums see ``sum_tolerance``.
        shift: mean difference of the sums, stored minus live, with its sign; None if no sum was checked.
        problem: what is wrong, as a sentence without its full stop; None if nothing is.
    """

    wanted: int
    stored: int
    checked: int
    tokens: int
    sums_only: int
    imported: dict[str, int]
    quantiles: dict[str, float]
    worst: dict[str, Any]
    tolerance: float
    shift: float | None
    problem: str | None

    @property
    def passed(self) -> bool:
        return self.checked > 0 and self.problem is None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"passed": self.passed}


def verify_scores(
    cache: ReferenceCache,
    wanted: Sequence[Completion],
    name_of: Callable[[bytes], str],
    scorer: Scorer | TeamScorer,
    *,
    sample: int | None,
    seed: int = 0,
    tolerance: float | None = None,
) -> ScoresReport:
    """Score stored completions again: all of them, or random samples.

    One sample is drawn from the verified rows and one from each part of imported rows: a common sample would rarely contain
    a few wrong rows among many right ones.

    Args:
        wanted: completions of the configuration's data; the cache holds keys, not tokens.
        name_of: gives the display name of a key.
        sample: largest size of each sample; None = all rows.

    Raises:
        CacheError: if the cache holds none of ``wanted``.
    """
    cache.refresh()
    parts, _ = _answers(cache, wanted)
    stored = np.flatnonzero(parts >= 0)
    if not len(stored):
        raise CacheError(
            f"the cache holds none of the {len(wanted):,} completions of this configuration, so none can be "
            "scored again; give the configuration whose data it was built from"
        )
    imports = [number for number in np.unique(parts[stored]).tolist() if cache.is_unverified(number)]
    drawn = [
        _drawn(stored[~np.isin(parts[stored], imports)], sample, seed),
        *(_drawn(np.flatnonzero(parts == number), sample, seed) for number in imports),
    ]
    paths = cache.paths()
    imported = {paths[number]: len(rows) for number, rows in zip(imports, drawn[1:], strict=True)}
    tolerance = TOLERANCES[cache.identity.dtype] if tolerance is None else tolerance
    chosen = np.concatenate(drawn)
    completions = wanted.at(chosen) if isinstance(wanted, Wanted) else [wanted[index] for index in chosen]
    rows = _compare(cache, completions, scorer, tolerance)
    gaps = np.array([row["mean"] for row in rows])
    beyond = np.array([row["mean"] / row["tolerance"] for row in rows])
    worst = rows[int(np.argmax(np.where(np.isnan(beyond), np.inf, beyond)))]
    worst = {"name": name_of(bytes.fromhex(worst["key"]))} | worst
    shares = {"median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    quantiles = {name: float(np.quantile(gaps, share)) for name, share in shares.items()} | {"mean": float(gaps.mean())}
    sums = [row for row in rows if row["token"] is None]
    shift, shifted = _shift(sums, tolerance)
    counts = len(wanted), len(stored), len(rows), sum(row["tokens"] for row in rows), len(sums)
    return ScoresReport(*counts, imported, quantiles, worst, tolerance, shift, _problem(worst) or shifted)


def _answers(cache: ReferenceCache, wanted: Sequence[Completion]) -> tuple[np.ndarray, np.ndarray]:
    """Part and row that answer each completion, as ``ReferenceCache.locate``."""
    if isinstance(wanted, Wanted):
        return cache.locate(as_bytes(wanted.keys), wanted.tokens)
    keys = pa.array([one.key for one in wanted], KEY_TYPE)
    return cache.locate(as_bytes(keys), np.array([len(one.tokens) for one in wanted], np.int32))


def _drawn(rows: np.ndarray, count: int | None, seed: int) -> np.ndarray:
    return rows if count is None else np.random.default_rng(seed).permutation(rows)[:count]


def _compare(
    cache: ReferenceCache, completions: Sequence[Completion], scorer: Scorer | TeamScorer, tolerance: float
) -> list[dict[str, Any]]:
    """Key, tokens, mean difference, its tolerance, and most different token with both values, of each completion."""
    rows: list[dict[str, Any]] = []
    for groups in _portions(grouped(completions)):
        together = [one for group in groups for one in group]
        scored = [values for group in scorer.score(prompt_groups(groups)) for values in group]
        tokens = np.array([len(one.tokens) for one in together], np.int32)
        keys = pa.array([one.key for one in together], KEY_TYPE)
        found = cache.lookup(keys)
        sums = join(cache, as_bytes(keys), tokens).sums
        for index, (one, live) in enumerate(zip(together, scored, strict=True)):
            row = found["logps"][index]
            if row.is_valid and len(row) >= len(live):
                values = row.values.to_numpy()[: len(live)]
                different = np.abs(values - live)
                mean, allowed, place = float(different.mean()), tolerance, int(different.argmax())
                detail = {"token": place, "stored": float(values[place]), "live": float(live[place])}
            else:
                live_sum = float(live.astype(np.float64).sum())
                mean = abs(float(sums[index]) - live_sum) / len(live)
                allowed = float(sum_tolerance(tolerance, len(live))) / len(live)
                detail = {"token": None, "stored": float(sums[index]), "live": live_sum}
            rows.append({"key": one.key.hex(), "tokens": len(live), "mean": mean, "tolerance": allowed, **detail})
    return rows


def _portions(groups: Sequence[tuple[Completion, ...]]) -> Iterator[list[tuple[Completion, ...]]]:
    """Groups that are scored at once."""
    portion: list[tuple[Completion, ...]] = []
    filled = 0
    for group in groups:
        portion.append(group)
        filled += sum(one.length for one in group)
        if filled >= 8 * TOKENS_PER_BATCH:
            yield portion
            portion, filled = [], 0
    if portion:
        yield portion


def _problem(worst: dict[str, Any]) -> str | None:
    if worst["mean"] <= worst["tolerance"]:
        return None
    if not np.isfinite(worst["live"]):
        return (
            f"scored again, {worst['name']} has a log-prob of {worst['live']}, which is invalid; score in float32 "
            "(score.dtype=float32) or check the weights"
        )
    if worst["token"] is None:
        return (
            f"scored again, the sum of {worst['name']} differs by {abs(worst['stored'] - worst['live']):.3g} nats, more "
            f"than the {worst['tolerance'] * worst['tokens']:.3g} of a sum over {worst['tokens']:,} tokens"
        )
    return f"scored again, {worst['name']} differs by {worst['mean']:.3g} nats a token, more than {worst['tolerance']:g}"


def _shift(sums: Sequence[dict[str, Any]], tolerance: float) -> tuple[float | None, str | None]:
    """Mean difference of the sums, and a sentence if neither chance nor rounding explains it."""
    if not sums:
        return None, None
    different = np.array([row["stored"] - row["live"] for row in sums])
    shift = float(different.mean())
    tokens = np.array([row["tokens"] for row in sums])
    # The spread of few sums tells little; then the tolerance of a single sum decides, reduced for the mean.
    single = float(sum_tolerance(tolerance, tokens).mean()) / np.sqrt(len(sums))
    chance = max(SHIFT_ERRORS * float(different.std()) / np.sqrt(len(sums)), single)
    allowed = SHIFT * tolerance * float(tokens.mean())
    if abs(shift) <= max(allowed, chance):
        return shift, None
    side = "high" if shift > 0 else "low"
    return shift, (
        f"scored again, the {len(sums):,} sums are {abs(shift):.3g} nats too {side} on average, more than "
        f"{max(allowed, chance):.3g}: the other trainer probably summed other tokens, such as all but the last"
    )


def promote(cache: ReferenceCache, wanted: Sequence[Completion], report: ScoresReport) -> int:
    """Make unverified rows count that answer ``wanted`` and belong to a part that was checked for ``report``.

    Parts all of whose rows are now answered by verified ones are deleted. After a kill nothing is lost, and the next call
    promotes the rest.

    Returns:
        Number of rows that were promoted.
    """
    cache.refresh()
    parts, rows = _answers(cache, wanted)
    vouched = {"verified": {"checked": report.checked, "mean": report.quantiles["mean"], "max": report.quantiles["max"]}}
    promoted = 0
    for number, path in enumerate(cache.paths()):
        mine = np.unique(rows[parts == number])
        if not report.imported.get(path) or not len(mine):
            continue
        part, places = cache.read(path), pa.array(mine)
        values = part.sums[mine] if part.logps is None else part.logps.take(places)
        cache.commit_rows(part.keys.take(places), part.tokens[mine], values, part.info.provenance | vouched)
        promoted += len(mine)
    cache.refresh()
    for path in cache.passed_over(by_verified=True):
        cache.storage.delete(path)
    cache.refresh()
    return promoted
