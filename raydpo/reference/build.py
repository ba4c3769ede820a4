"""Fill the cache: plan what is missing, score it with Ray Data actors, and commit each shard as one part."""

from __future__ import annotations

import pickle
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from raydpo.cluster.actors import over_actors
from raydpo.cluster.resources import Resources
from raydpo.errors import CacheError, ModelError
from raydpo.model.layout import PromptGroup
from raydpo.model.selfcheck import CHECK_ROWS
from raydpo.reference.claims import Claims
from raydpo.reference.identity import on_this_machine
from raydpo.reference.part import builder_of
from raydpo.reference.score import ReferenceSpec, Scorer, refuse_difference
from raydpo.reference.shards import Shard, Wanted, missing_shards, still_missing
from raydpo.reference.store import ReferenceCache
from raydpo.reference.team import TeamScorer

__all__ = ["BuildReport", "build"]

SHARDS_PER_WORKER = 8
"""Shards per actor of a small job. Shards are then smaller than ``tokens_per_part``, so that all actors finish at about the
same time and progress is visible."""
MIN_SHARD_TOKENS = 2048
PATIENCE_SHARDS, PATIENCE_SECONDS = 2, 10.0
"""How long a build waits for the next part of another build that claimed the remaining completions: this many times the
duration of its own longest shard, and at least this many seconds."""


@dataclass(frozen=True)
class BuildReport:
    """Result of a build.

    Attributes:
        identity: digest of the reference's identity.
        wanted: distinct completions of the pairs.
        hits: completions that were in the cache at the start.
        scored: completions that this build scored.
        by_others: completions that another build of the same cache scored meanwhile.
        twice: completions that this build and another one scored at the same time.
        tokens: tokens that this build scored, a prompt counted once for each of its completions.
        seconds: duration of the build, the start of its workers included.
        parts: parts that this build committed.
        problems: one sentence for each damaged file that was found at the start.
    """

    identity: str
    wanted: int
    hits: int
    scored: int
    by_others: int
    twice: int
    tokens: int
    seconds: float
    parts: int
    problems: tuple[str, ...]

    @property
    def hit_rate(self) -> float:
        return self.hits / self.wanted if self.wanted else 1.0


def build(
    pairs: list[pa.Table],
    spec: ReferenceSpec,
    cache: ReferenceCache,
    resources: Resources,
    *,
    tokens_per_batch: int | Literal["auto"],
    tokens_per_part: int,
    progress: Callable[[int, int], None],
    note: Callable[[str], None] = lambda line: None,
) -> BuildReport:
    """Score the completions of ``pairs`` that ``cache`` lacks.

    A build may be killed at any moment; only uncommitted parts are scored again. Any number of builds may fill the same
    cache at once. Each build takes its shards in its own order. Before each shard it looks at what others have committed or
    claimed (see ``claims``). At the end it waits for the completions that others have claimed, and scores them if they do
    not arrive. So at most the shards in progress when another build started are scored twice.

    Args:
        pairs: tables of tokenised pairs, for training and evaluation.
        resources: number of actors and the resources of each.
        progress: called with (completions done, completions to do), at the start and after each part.
        note: called once for each message of an actor to the user.

    Raises:
        RaydpoError: what an actor raised.
        CacheError: if rows are still missing after scoring.
    """
    start = time.perf_counter()
    cache.prepare({"model": spec.path, "adapter": spec.adapter})
    wanted = Wanted(pairs)
    covered = cache.covers(wanted.keys, wanted.tokens)
    problems = tuple(cache.problems)
    cache.set_aside()
    before = _parts(cache)
    hits = int(covered.sum())
    here = version("transformers")
    others = sorted(one for one in cache.transformers if one.split(".")[:2] != here.split(".")[:2])
    if hits and others:
        note(
            f"warning: stored log-probs were computed with transformers {', '.join(others)}, here is {here}: a release may "
            f"change what a model computes; 'raydpo cache verify {cache.storage} --config CONFIG' scores a sample again"
        )
    to_do = len(wanted) - hits
    tokens = parts = scored = found = 0  # found: scored by other builds
    told: set[str] = set()
    if to_do:
        progress(0, to_do)
    try:
        while not covered.all():
            left, longest, first = 0, 0.0, None  # first: the sample of the first worker that answers
            known = _parts(cache) | {*Claims.names(cache)}
            # Completions of one prompt are only split where they exceed a part, even if shards are smaller.
            shard_tokens = _shard_tokens(wanted, tokens_per_part, resources.teams)
            shards = missing_shards(wanted, covered, shard_tokens, tokens_per_part)
            for row in _score_on_ray(shards, spec, cache, known, resources, tokens_per_batch, note):
                sample = np.array(row["sample"], np.float32)
                first = sample if first is None else first
                _compare_workers(spec, cache, first, sample)
                scored += row["completions"]
                found += row["by_others"]
                left += row["left"]
                tokens += row["tokens"]
                parts += row["part"] is not None
                longest = max(longest, row["seconds"])
                for line in row["notes"]:
                    if line not in told:
                        told.add(line)
                        note(line)
                progress(scored + found, to_do)
            covered = cache.covers(wanted.keys, wanted.tokens)
            if not covered.all():
                lacking = np.flatnonzero(~covered)
                if not left:
                    raise CacheError(
                        f"after scoring, {len(lacking):,} completions are still missing from {cache.storage} "
                        f"(first key {wanted.keys[int(lacking[0])].as_py().hex()}); run it again"
                        f"{''.join(f'; {problem}' for problem in cache.problems)}"
                    )
                note(f"waiting for another build that is scoring {len(lacking):,} of the completions")
                covered = _wait_for_others(cache, wanted, covered, max(PATIENCE_SECONDS, PATIENCE_SHARDS * longest))
            found = int(covered.sum()) - hits - scored
            progress(scored + found, to_do)
    finally:
        if to_do:
            Claims(cache, frozenset()).clear()
    counts = len(wanted), hits, scored, to_do - scored, cache.stored_twice(cache.builder, since=before)
    return BuildReport(cache.identity.digest, *counts, tokens, time.perf_counter() - start, parts, problems)


def _compare_workers(spec: ReferenceSpec, cache: ReferenceCache, one: np.ndarray, other: np.ndarray) -> None:
    """Refuse the model if two workers have computed different log-probs, and delete the parts that this build committed."""
    try:
        refuse_difference(spec, one, other, "scored by two workers")
    except ModelError:
        cache.refresh()
        for path in cache.paths():
            if builder_of(path.rsplit("/", 1)[-1]) == cache.builder:
                cache.storage.delete(path)
        raise


def _parts(cache: ReferenceCache) -> set[str]:
    """Names of the parts in use as of the last refresh."""
    return {path.rsplit("/", 1)[-1] for path in cache.paths()}


def _wait_for_others(cache: ReferenceCache, wanted: Wanted, covered: np.ndarray, patience: float) -> np.ndarray:
    """Wait until others have committed all or added nothing for ``patience`` seconds. Returns the new ``covered``."""
    since = time.monotonic()
    while not covered.all() and time.monotonic() - since < patience:
        time.sleep(1)
        now = cache.covers(wanted.keys, wanted.tokens)
        if now.sum() > covered.sum():
            since = time.monotonic()
        covered = now
    return covered


def _shard_tokens(wanted: Wanted, tokens_per_part: int, actors: int) -> int:
    total = int(wanted.tokens.sum(dtype=np.int64) + wanted.prompt_tokens.sum(dtype=np.int64))
    return min(tokens_per_part, max(MIN_SHARD_TOKENS, total // (SHARDS_PER_WORKER * actors)))


def _score_on_ray(
    shards: Iterable[Shard],
    spec: ReferenceSpec,
    cache: ReferenceCache,
    known: set[str],
    resources: Resources,
    tokens_per_batch: int | Literal["auto"],
    tell: Callable[[str], None],
) -> Any:
    import ray

    # One row per shard and one block per row, so that a task is exactly one shard. Blocks go to the object store one by one,
    # which spills to disk.
    check_rows: list[PromptGroup] = []
    blocks = []
    for shard in shards:
        check_rows = check_rows or shard.prompt_groups()[:CHECK_ROWS]
        blocks.append(ray.put(pa.table({"shard": [pickle.dumps(shard)]})))
    random.Random(cache.builder).shuffle(blocks)
    alone = min(resources.teams, len(blocks)) == 1
    arguments = (spec, cache.storage.uri, cache.builder, frozenset(known), resources, tokens_per_batch, check_rows, alone)
    # Two calls at once: while one shard is computed, the previous one is written, or the next one is unpacked and claimed.
    given = {"calls_at_once": 2, "environment": resources.environment, "tell": tell}
    yield from over_actors(_ScoreShard, arguments, blocks, resources, "scoring the reference", **given)


class _ScoreShard:
    """Ray Data actor that holds the reference, alone or in a team. Each call scores one shard and commits one part."""

    def __init__(
        self,
        spec: ReferenceSpec,
        cache_uri: str,
        builder: str,
        known: frozenset[str],
        resources: Resources,
        tokens_per_batch: int | Literal["auto"],
        check_rows: Sequence[PromptGroup],
        alone: bool = False,
    ) -> None:
        import torch

        if resources.threads is not None:
            torch.set_num_threads(resources.threads)
        self.threads = resources.threads
        self.cache = ReferenceCache.open(cache_uri, spec.identity)
        self.cache.builder = builder
        self.known = known  # claims and parts that existed when the shards were planned
        self.claims = Claims(self.cache, known)
        spec = on_this_machine(spec)
        settings = {"tokens_per_batch": tokens_per_batch, "memory_share": resources.memory_share, "check_rows": check_rows}
        settings["alone"] = alone
        if resources.together > 1:
            settings |= {"size": resources.together, "threads": resources.threads}
        scorer = Scorer if resources.together == 1 else TeamScorer
        self.scorer = scorer(spec, device=resources.device, **settings)
        self.planning, self.computing = threading.Lock(), threading.Lock()

    def __call__(self, block: pa.Table) -> pa.Table:
        import torch

        planned: Shard = pickle.loads(block["shard"][0].as_buffer())
        with self.planning:  # asks the storage, while the other call computes
            # Another build may have scored it meanwhile. Parts of this build cannot contain it, so they are skipped.
            known, builder = self.known, self.cache.builder
            open_ = still_missing(planned, self.cache, skip=lambda name: name in known or builder_of(name) == builder)
            shard, claim = self.claims.take(open_)
        with self.computing:
            if self.threads is not None:
                torch.set_num_threads(self.threads)  # OpenMP keeps this number per calling thread
            started = time.perf_counter()
            scored = self.scorer.score(shard.prompt_groups())
            seconds = time.perf_counter() - started
        logps = [values for group in scored for values in group]
        name = self.cache.commit([one.key for one in shard.completions], logps, self.scorer.provenance) if logps else None
        if claim is not None:
            self.claims.release(claim)
        return pa.table(
            {
                "part": pa.array([name], pa.string()),
                "completions": [len(logps)],
                "by_others": [len(planned.completions) - len(open_.completions)],
                "left": [len(open_.completions) - len(logps)],
                "tokens": [shard.tokens],
                "seconds": [seconds],
                "sample": pa.array([self.scorer.sample], pa.list_(pa.float32())),
                "notes": pa.array([self.scorer.notes], pa.list_(pa.string())),
            }
        )
